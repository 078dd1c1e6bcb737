"""Putting the stages into the selective-kernel modules of models that people already have."""

from sknet_triton.acceleration import known  # noqa: F401 - registers the built-in families
from sknet_triton.acceleration.family import Family, families, register_family, unregister_family
from sknet_triton.acceleration.swap import Report, Row, accelerate, restore

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
