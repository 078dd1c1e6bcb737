"""Triton kernels of the selective-kernel stages and their launchers; knows tensors, no modules."""
