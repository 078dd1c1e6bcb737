"""Batch norms as the kernels read them."""

from typing import NamedTuple

from torch import Tensor


class Norms(NamedTuple):
    """Batch norms over the same number n of channels, one a branch, with statistics to apply.

    Attributes:
        mean: [n] each; None where a kernel takes it from the batch.
        var: biased, likewise.
        weight: [n] each, or None for ones.
        bias: [n] each, or None for zeros.
        eps: added to every variance.
    """

    mean: tuple[Tensor | None, ...]
    var: tuple[Tensor | None, ...]
    weight: tuple[Tensor | None, ...]
    bias: tuple[Tensor | None, ...]
    eps: float
