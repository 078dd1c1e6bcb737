"""Selective-kernel networks for PyTorch, with Triton kernels for fuse and select.

The stages follow Li et al., "Selective Kernel Networks", CVPR 2019. Importing this package
imports neither triton nor a device driver; both wait for the first GPU tensor.
"""

from sknet_triton import functional
from sknet_triton.acceleration import Family, accelerate, register_family, restore
from sknet_triton.backend import Backend, set_backend, use_backend
from sknet_triton.checkpoints import convert_state_dict, load_checkpoint
from sknet_triton.inference import fuse_bn
from sknet_triton.layers import BranchSpec, SKConv, SKUnit
from sknet_triton.models import SKNet, SKNetFeatures, StageSpec, sknet26, sknet50, sknet101

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BranchSpec",
    "Family",
    "SKConv",
    "SKNet",
    "SKNetFeatures",
    "SKUnit",
    "StageSpec",
    "__version__",
    "accelerate",
    "convert_state_dict",
    "functional",
    "fuse_bn",
    "load_checkpoint",
    "register_family",
    "restore",
    "set_backend",
    "sknet26",
    "sknet50",
    "sknet101",
    "use_backend",
]
