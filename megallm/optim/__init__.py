"""Gradient buckets, clipping, the optimizer and its learning rate."""
