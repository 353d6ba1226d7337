"""Triton kernels, one op a file. Knows nothing of megallm: it is tested and benchmarked alone."""
