"""Putting the stages into the selective-kernel modules of models that people already have."""

from sknet_triton.acceleration.family import Family
from sknet_triton.acceleration.registry import families, register_family, unregister_family
from sknet_triton.acceleration.report import Report, Row
from sknet_triton.acceleration.swap import accelerate, restore

__all__ = [
    "Family",
    "Report",
    "Row",
    "accelerate",
    "families",
    "register_family",
    "restore",
    "unregister_family",
]
