"""Operators: PyTorch oracles, CPU paths and Triton kernels."""
