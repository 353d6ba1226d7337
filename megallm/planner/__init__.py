"""Predictions of memory, communication and time (nothing here yet)."""
