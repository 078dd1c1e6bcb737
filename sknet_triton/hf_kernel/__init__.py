"""Fuse and select of selective-kernel networks as a kernel of Hugging Face `kernels`.

What a loaded kernel offers is what ``__all__`` names; ``python -m sknet_triton.hf_kernel FOLDER``
writes it. Its choice of a backend is its own: an installed sknet_triton keeps its choice. Without
a GPU the functions run in plain PyTorch.
"""

from sknet_triton.backend import set_backend, use_backend
from sknet_triton.functional import BatchNormArgs, FuseSelect, sk_fuse, sk_fuse_select, sk_select
from sknet_triton.hf_kernel import layers

__all__ = [
    "BatchNormArgs",
    "FuseSelect",
    "layers",
    "set_backend",
    "sk_fuse",
    "sk_fuse_select",
    "sk_select",
    "use_backend",
]
