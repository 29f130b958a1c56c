"""Kernels made of PyTorch's own operations, which run on every CPU."""
