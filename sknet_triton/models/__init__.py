"""SKNet-26, 50 and 101."""

from sknet_triton.models.sknet import SKNet, SKNetFeatures, StageSpec, sknet26, sknet50, sknet101

__all__ = ["SKNet", "SKNetFeatures", "StageSpec", "sknet26", "sknet50", "sknet101"]
