"""The stages as PyTorch operators; importing this package registers them, once.

They are ``torch.library.custom_op``s rather than ``triton_op``s: a custom op is checked whole on a
machine without a GPU (opcheck, fake tensors, compile, under Triton's interpreter too), and Inductor
cannot relaunch its kernels with arguments of its own choosing. What is given up is Inductor's view
into the kernel, which has no neighbour worth fusing: convolutions stand before it and after it.

Importing ``sknet_triton`` imports this package, so that a saved program finds its operators.
"""

from sknet_triton.ops.sk_fuse import sk_fuse
from sknet_triton.ops.sk_fuse_select import sk_fuse_select, sk_fuse_select_bwd
from sknet_triton.ops.sk_select import sk_select, sk_select_bwd

__all__ = ["sk_fuse", "sk_fuse_select", "sk_fuse_select_bwd", "sk_select", "sk_select_bwd"]
