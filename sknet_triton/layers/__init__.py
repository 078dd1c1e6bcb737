"""Selective-kernel layers as plain modules."""

from sknet_triton.layers.sk_conv import BranchSpec, SKConv
from sknet_triton.layers.sk_unit import SKUnit

__all__ = ["BranchSpec", "SKConv", "SKUnit"]
