"""Predictions of memory and communication (of time: nothing yet)."""
