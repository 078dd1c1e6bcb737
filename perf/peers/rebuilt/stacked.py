"""The two stages on stacked branches [B, M, C, H, W], as the originals carry them out."""

from torch import Tensor


def weighted(stacked: Tensor, weights: Tensor) -> Tensor:
    """[B, M, C, H, W] and weights [B, M, C] -> [B, C, H, W]."""
    return (stacked * weights[..., None, None]).sum(1)


def pooled(stacked: Tensor) -> Tensor:
    """[B, M, C, H, W] -> the mean over space of the sum over branches, [B, C, 1, 1]."""
    return stacked.sum(1).mean((2, 3), keepdim=True)
