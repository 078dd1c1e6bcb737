"""Triton kernels of the selective-kernel stages and their launchers; knows tensors, no modules.

A module of kernels, such as `sknet_kernels.sk_select`, imports triton; this package, `config`,
`small` and `layout` do not, so that code for machines without triton can use them.
"""
