"""Fused Triton kernels, one op a file, and the loader of the compiled part. Knows nothing of megallm.

Nothing is imported here: `import megallm_kernels.norm` needs triton, `import megallm_kernels.device` does not.
Each op file holds its kernels, their launch settings as data, functions that launch them, and the
`torch.library.custom_op`s `megallm_kernels::...` with their fake and autograd forms.
"""
