"""Photographs that scikit-image ships, in an SKNet-26 with random weights.

The network has learned nothing: what is seen is what the structure does to images by itself.
That is next to nothing: every mean weight is within 0.01 of 1/2.
"""

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from sknet_triton.analysis.record import record_sizes
from sknet_triton.models import sknet26

# The class of a photograph is its place here. All have something in the middle.
PHOTOS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "retina", "rocket")
SIDE = 224

# The mean and standard deviation of ImageNet's channels, as photographs are usually normalised.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def run(seed: int) -> pd.DataFrame:
    """Records the photographs in a network of random weights from one seed.

    Returns:
        The columns of `record_sizes` and before them ``network``, which is ``untrained``.

    Raises:
        ImportError: scikit-image is not installed.
    """
    images = load()
    torch.manual_seed(seed)
    table = record_sizes(sknet26(), DataLoader(TensorDataset(images, torch.arange(len(images)))))
    table.insert(0, "network", "untrained")
    return table


def load() -> Tensor:
    """Returns the photographs [6, 3, 224, 224], normalised; the longer side is cut at its ends."""
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError(
            "the photographs come with scikit-image: pip install 'sknet-triton[analysis]'"
        ) from error
    return torch.stack([_prepared(torch.tensor(getattr(data, name)())) for name in PHOTOS])


def _prepared(pixels: Tensor) -> Tensor:
    image = pixels.movedim(-1, 0).float() / 255
    side = min(image.shape[1:])
    top, left = ((n - side) // 2 for n in image.shape[1:])
    square = image[None, :, top : top + side, left : left + side]
    small = F.interpolate(square, size=(SIDE, SIDE), mode="bilinear", antialias=True)[0]
    mean, std = torch.tensor(_MEAN), torch.tensor(_STD)
    return (small - mean[:, None, None]) / std[:, None, None]
