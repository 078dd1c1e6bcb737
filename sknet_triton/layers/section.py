"""How an SKConv hands its norms and its MLP to `sk_fuse_select`, and when it may."""

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from sknet_triton import functional
from sknet_triton.backend import takes_triton
from sknet_triton.layers.blocks import HOOKS, has_hook

if TYPE_CHECKING:
    from sknet_triton.layers.sk_conv import SKConv

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def pays(sk: "SKConv", x: Tensor) -> bool:
    """Tells whether `sk_fuse_select` is to be preferred to calling the modules one by one.

    The Triton kernels and torch.compile fuse its formulas; in eager PyTorch each would be an
    operator, and the modules are faster. torch's SyncBatchNorm takes no CPU tensors, this does.
    """
    if takes_triton(x) or torch.compiler.is_compiling():
        return True
    return any(type(m) is nn.SyncBatchNorm for m in sk.modules())


def is_plain(sk: "SKConv") -> bool:
    """Tells whether everything between the convolutions and V is what `sk_fuse_select` computes.

    It is not where a module was replaced or parametrized, a hook wants to see an intermediate
    tensor, the norms disagree, or a convolution of the MLP is no plain one.
    """
    fc1, fc2 = sk.fc1, sk.fc2
    blocks = [*sk.branches, fc1]
    if not all(_is_conv_bn_relu(block) for block in blocks) or _any_hook(sk):
        return False
    if not all(_is_linear(conv) for conv in (cast(Any, fc1).conv, fc2)):
        return False
    norms = [cast(Any, block).bn for block in blocks]
    first, fc1_norm = norms[0], norms[-1]
    agree = all(
        (n.eps, _takes_batch(n), _group(n)) == (first.eps, _takes_batch(first), _group(first))
        for n in norms[:-1]
    )
    both = _takes_batch(first) and _takes_batch(fc1_norm)
    return agree and (not both or _group(first) == _group(fc1_norm))


def run(sk: "SKConv", maps: list[Tensor]) -> Tensor:
    """Runs `sk_fuse_select` on the convolutions' outputs and updates the running statistics."""
    norms = [cast(Any, branch).bn for branch in sk.branches]
    fc1, fc1_norm = cast(Any, sk.fc1).conv, cast(Any, sk.fc1).bn
    result = functional.sk_fuse_select(
        maps,
        [_arguments(n) for n in norms],
        fc1.weight.flatten(1),
        _arguments(fc1_norm),
        sk.fc2.weight.flatten(1),
        fc1_bias=fc1.bias,
        fc2_bias=sk.fc2.bias,
    )
    if result.mean is not None and result.var is not None:
        for n, mean, var in zip(norms, result.mean, result.var, strict=True):
            _update(n, mean, var)
    if result.fc1_mean is not None and result.fc1_var is not None:
        _update(fc1_norm, result.fc1_mean, result.fc1_var)
    return result.out


def _is_conv_bn_relu(block: nn.Module) -> bool:
    names = [name for name, _ in block.named_children()]
    return (
        type(block) is nn.Sequential
        and names == ["conv", "bn", "act"]
        and type(block.bn) in _NORMS
        and type(block.act) is nn.ReLU
    )


def _is_linear(conv: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
    )


def _any_hook(sk: "SKConv") -> bool:
    # A convolution of a branch is called as a module, so its own hooks are served.
    silent = [sk.fc2, *sk.fc1.modules()]
    for branch in sk.branches:
        silent += [branch, cast(Any, branch).bn, cast(Any, branch).act]
    everywhere = any(getattr(module_globals, f"_global{name}", None) for name in HOOKS)
    return everywhere or any(has_hook(m) for m in silent)


def _takes_batch(bn: Any) -> bool:
    return bool(bn.training or bn.running_mean is None)


def _group(bn: Any) -> str:
    """Names the group that ``bn`` takes statistics over; empty for this process alone."""
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
        return ""
    if not dist.is_available() or not dist.is_initialized():
        return ""
    group: Any = bn.process_group or dist.group.WORLD
    return str(group.group_name) if group.size() > 1 else ""


def _arguments(bn: Any) -> functional.BatchNormArgs:
    return functional.BatchNormArgs(
        bn.weight,
        bn.bias,
        bn.running_mean,
        bn.running_var,
        bn.eps,
        _takes_batch(bn),
        _group(bn),
    )


@torch.no_grad()
def _update(bn: Any, mean: Tensor, var: Tensor) -> None:
    """Moves the running statistics towards the batch's, as ``nn.BatchNorm2d`` in training does."""
    if not bn.training or not bn.track_running_stats or bn.running_mean is None:
        return
    bn.num_batches_tracked.add_(1)
    for running, batch in ((bn.running_mean, mean), (bn.running_var, var)):
        weight = bn.momentum
        if weight is None:
            weight = (1 / bn.num_batches_tracked).to(running.dtype)
        running.lerp_(batch.to(running.dtype), weight)
