"""Fuse and select of selective-kernel networks as a kernel of Hugging Face `kernels`.

What it offers is what ``__all__`` names. `use_backend` is this kernel's own: an installed
sknet_triton keeps its choice. Without a GPU the functions run in plain PyTorch.
"""

from sknet_triton.backend import use_backend
from sknet_triton.functional import BatchNormArgs, FuseSelect, sk_fuse, sk_fuse_select, sk_select

from . import layers

__all__ = [
    "BatchNormArgs",
    "FuseSelect",
    "layers",
    "sk_fuse",
    "sk_fuse_select",
    "sk_select",
    "use_backend",
]
