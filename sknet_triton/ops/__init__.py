"""The stages and the steps of the section as PyTorch operators; importing registers them, once."""

from sknet_triton.ops.passes import LAUNCHERS, OPERATORS
from sknet_triton.ops.sk_fuse import sk_fuse
from sknet_triton.ops.sk_select import sk_select, sk_select_bwd

__all__ = ["LAUNCHERS", "OPERATORS", "sk_fuse", "sk_select", "sk_select_bwd"]
