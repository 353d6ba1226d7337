"""Decoding on the weights that train: KV cache, sampling, the loop under tp x pp."""
