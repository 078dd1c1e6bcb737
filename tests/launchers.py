"""The launchers on tensors [B, C, *spatial], as operators call them, for the tests."""

import functools
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from perf.static.specialisations import chosen
from sknet_kernels.config import STREAMING_KERNELS, LaunchConfig
from sknet_kernels.layout import empty_like_branch, evenly, positions
from sknet_kernels.norms import Norms
from sknet_kernels.sk_fuse import sk_fuse_fwd, sk_fuse_partials
from sknet_kernels.sk_fuse_select import sk_fuse_select_dx, sk_fuse_select_sums
from sknet_kernels.sk_moments import sk_moments
from sknet_kernels.sk_select import sk_select_bwd, sk_select_fwd
from tests.helpers import ROOT

_T = TypeVar("_T")


def tiled(config: LaunchConfig | None) -> AbstractContextManager[object]:
    """Lets every kernel that reads branches take ``config``, unless it is None."""
    return chosen(dict.fromkeys(STREAMING_KERNELS, config)) if config else nullcontext()


def _tiled(launcher: Callable[..., _T]) -> Callable[..., _T]:
    """Returns ``launcher`` with an argument ``config``."""

    @functools.wraps(launcher)
    def launch(*args: Any, config: LaunchConfig | None = None, **options: Any) -> _T:
        with tiled(config):
            return launcher(*args, **options)

    return launch


def read(xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the tensors as kernels read them."""
    return tuple(evenly(x) for x in xs)


@_tiled
def fuse(xs: Sequence[Tensor], reduction: str = "mean") -> Tensor:
    """Returns the pooled branches [B, C]."""
    return sk_fuse_fwd(read(xs), reduction)


@_tiled
def fuse_norm(xs: Sequence[Tensor], norms: Norms) -> Tensor:
    """Returns the pooled branches [B, C], normalised and rectified."""
    return sk_fuse_partials(read(xs), norms).sum(0) / positions(xs[0])


@_tiled
def select(
    xs: Sequence[Tensor], logits: Tensor, norms: Norms | None = None, activation: str = "softmax"
) -> Tensor:
    """Returns the weighed branches, in the layout of the first."""
    out = empty_like_branch(xs[0])
    sk_select_fwd(out, read(xs), logits, norms, activation=activation)
    return out


@_tiled
def select_bwd(
    dout: Tensor, xs: Sequence[Tensor], logits: Tensor, activation: str = "softmax"
) -> tuple[list[Tensor], Tensor]:
    """Returns the gradients of the branches and of the logits."""
    dxs = [empty_like_branch(x) for x in xs]
    return dxs, sk_select_bwd(tuple(dxs), evenly(dout), read(xs), logits, activation=activation)


@_tiled
def moments(xs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean, biased and unbiased variance [M, C]."""
    (mean, var), kept = sk_moments(read(xs))
    assert kept is not None
    assert torch.equal(kept[0], mean)
    return mean, var, kept[1]


@_tiled
def sums(dout: Tensor, xs: Sequence[Tensor], norms: Norms) -> Tensor:
    """Returns the sums of the backward [4, B, M, C]."""
    return sk_fuse_select_sums(evenly(dout), read(xs), norms).sum(0)


@_tiled
def dx(
    dout: Tensor,
    xs: Sequence[Tensor],
    norms: Norms,
    logits: Tensor,
    share: Tensor,
    drift: Tensor | None,
) -> list[Tensor]:
    """Returns the gradients of the branches."""
    dxs = [empty_like_branch(x) for x in xs]
    sk_fuse_select_dx(tuple(dxs), evenly(dout), read(xs), norms, logits, share, drift)
    return dxs


def random_norms(M: int, C: int, like: Tensor) -> Norms:
    """Returns norms with gammas of both signs and a zero, in the dtype of sums over ``like``."""
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    mean, gamma, beta = torch.randn(3, M, C, dtype=wide, device=like.device)
    gamma[:, 0] = 0.0
    var = torch.rand(M, C, dtype=wide, device=like.device) + 0.5
    return Norms(tuple(mean), tuple(var), tuple(gamma), tuple(beta), 1e-3)


def kernel_names() -> set[str]:
    """Returns the names of all kernels, which are the functions that launches are made of."""
    sources = (ROOT / "kernels" / "sknet_kernels").glob("*.py")
    defined = (re.findall(r"(?m)^def (_\w+_kernel)\(", source.read_text()) for source in sources)
    return {name for names in defined for name in names}
