"""Enlarging the object in the middle of an image, as the paper's Figures 3 and 4 do."""

import torch
from torch import Tensor

from sknet_triton.reference import accumulation_dtype


def enlarge(images: Tensor, scale: float) -> Tensor:
    """Enlarges images around their centre and keeps their size (Li et al. 2019, figure 3).

    The paper crops the centre and resizes the crop. Here the crop is exactly H / scale by
    W / scale, not rounded to whole pixels, and the resizing is bilinear: with pixel i covering
    [i, i + 1), the middle of output pixel i reads position n / 2 + (i + 1/2 - n / 2) / scale of a
    side of n pixels. So the centre stays the centre at odd and even sizes, every position read
    lies within the image, and 1.0 returns the same values. Beside ``F.interpolate`` of a crop of
    whole pixels only the outermost pixels differ: they read on across the border of the crop,
    where ``F.interpolate`` repeats its last pixel.

    Args:
        images: [..., H, W], floating point.
        scale: at least 1.

    Returns:
        Images of the same shape, dtype and device.

    Raises:
        TypeError: ``images`` is not a floating-point tensor.
        ValueError: ``scale`` is below 1, which would need pixels outside the image, or not finite;
            or ``images`` has fewer than two axes.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"images: expected a floating-point tensor, got {got}")
    if images.dim() < 2:
        raise ValueError(f"images: expected shape [..., H, W], got {tuple(images.shape)}")
    if not 1 <= scale < float("inf"):
        raise ValueError(f"scale: expected a finite number of at least 1, got {scale}")
    dtype = accumulation_dtype(images.dtype)
    rows, columns = (_reading(n, scale).to(images.device, dtype) for n in images.shape[-2:])
    return (rows @ images.to(dtype) @ columns.T).to(images.dtype)


def _reading(n: int, scale: float) -> Tensor:
    """Returns the weights [n, n] with which each output pixel of a side reads the input's."""
    out = torch.arange(n, dtype=torch.float64)
    # Counted from the middle of the first pixel.
    position = (n - 1) / 2 + (out - (n - 1) / 2) / scale
    distance = (position[:, None] - torch.arange(n, dtype=torch.float64)).abs()
    return (1 - distance).clamp_min(0)
