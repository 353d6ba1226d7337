"""Fused operations: each with a reference that is its specification."""
