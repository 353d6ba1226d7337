"""MegaLLM: trains large language models end to end on any 3D layout of ranks."""

__version__ = "0.1.0"
