"""Temporary."""
import torch
def rope_frequencies(*, head_dim, theta, scaling, max_position_embeddings):
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim)), 1.0
