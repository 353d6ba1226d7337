"""Checkpoints of any layout, and Hugging Face directories in and out."""
