"""Batch norms as the kernels read them, and the gradients of what lies between the passes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
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


class Running(NamedTuple):
    """Running statistics of batch norms over the same channels, one a branch, moved in place.

    Attributes:
        mean: [n] each.
        var: unbiased, likewise.
        tracked: how many batches they have seen, [] each.
        momentum: the weight of a new batch.
    """

    mean: tuple[Tensor, ...]
    var: tuple[Tensor, ...]
    tracked: tuple[Tensor, ...]
    momentum: float

    def signature(self) -> object:
        """Returns what a compiled kernel depends on."""
        return self.momentum, tuple([(x.dtype, x.data_ptr() % 16) for xs in self[:3] for x in xs])


class ChannelGradients(NamedTuple):
    """Gradients of small tensors, each in the dtype of its parameter; None where there is none.

    Attributes:
        share: gradient of a branch's every position through the pooled average, ds / S [B, C].
        drift: dbeta_i / m and dgamma_i / m [2, M, C]; None where statistics are constants.
        gamma: of the branches' norms [M, C].
        beta: likewise.
        fc1_weight: [d, C].
        fc1_bias: [d].
        fc1_gamma: of fc1's norm [d].
        fc1_beta: likewise.
        fc2_weight: [M * C, d].
        fc2_bias: [M * C].
    """

    share: Tensor
    drift: Tensor | None
    gamma: Tensor
    beta: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc1_gamma: Tensor | None
    fc1_beta: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None


def common_dtype(parameters: Sequence[Tensor | None], otherwise: Tensor) -> torch.dtype:
    """Returns the dtype of the first parameter that there is, else that of ``otherwise``."""
    return next((x.dtype for x in parameters if x is not None), otherwise.dtype)
