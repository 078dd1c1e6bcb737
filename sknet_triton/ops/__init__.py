"""The stages, and the steps of `sk_fuse_select`, as PyTorch operators.

Importing ``sknet_triton`` imports this package, so that a saved program finds its operators.
"""

from sknet_triton.ops.sk_fuse import sk_fuse
from sknet_triton.ops.sk_select import sk_select, sk_select_bwd
from sknet_triton.ops.steps import OPERATORS, launchers

__all__ = ["OPERATORS", "launchers", "sk_fuse", "sk_select", "sk_select_bwd"]
