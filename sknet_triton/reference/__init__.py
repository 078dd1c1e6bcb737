"""The mathematics of the stages in plain PyTorch: oracle, CPU path and baseline in one.

Every function takes branches as a sequence of M tensors [B, C, *spatial] of one shape and dtype,
accumulates in float32 (float64 for float64 input) and casts once at the end. Arguments are not
checked here; `sknet_triton.functional` does that.
"""

from sknet_triton.reference.common import accumulation_dtype
from sknet_triton.reference.sk_fuse import sk_fuse, sk_fuse_bwd
from sknet_triton.reference.sk_select import sk_select, sk_select_bwd
from sknet_triton.reference.steps import REFERENCE, composed

__all__ = [
    "REFERENCE",
    "accumulation_dtype",
    "composed",
    "sk_fuse",
    "sk_fuse_bwd",
    "sk_select",
    "sk_select_bwd",
]
