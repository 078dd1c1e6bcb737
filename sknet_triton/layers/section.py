"""How modules hand their norms and their MLP to `sk_fuse_select`, and when they may."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sknet_triton import functional
from sknet_triton.backend import in_transform, is_symbolic, takes_triton
from sknet_triton.layers.blocks import any_hook

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Block(NamedTuple):
    """A convolution, its batch norm and its ReLU.

    Attributes:
        conv: called as a module.
        norm: read, not called.
        silent: every module that is not called: the norm, the activation, what holds the three.
    """

    conv: nn.Module
    norm: nn.Module
    silent: tuple[nn.Module, ...]


class Section(NamedTuple):
    """Everything between the convolutions and V that `sk_fuse_select` computes."""

    branches: tuple[Block, ...]
    fc1: Block
    fc2: nn.Module


def sequential(block: nn.Module) -> Block | None:
    """Returns a plain Sequential of conv, bn and act as a `Block`; None for anything else."""
    names = [name for name, _ in block.named_children()]
    if type(block) is not nn.Sequential or names != ["conv", "bn", "act"]:
        return None
    conv, norm, act = block
    if type(norm) not in NORMS or type(act) is not nn.ReLU:
        return None
    return Block(conv, norm, (block, norm, act))


def pays(module: nn.Module, x: Tensor) -> bool:
    """Tells whether `sk_fuse_select` is to be preferred to calling the modules one by one.

    The Triton kernels and torch.compile fuse its formulas; in eager PyTorch, and in torch.func's
    transforms, each would be an operator, and the modules are faster. An exported program holds
    the modules' operators, for what comes after it knows them: it folds batch norms into
    convolutions; so does a graph of torch.fx. torch's SyncBatchNorm takes no CPU tensors, this
    does.
    """
    if is_symbolic(x):
        return False
    fused = takes_triton(x) or (torch.compiler.is_dynamo_compiling() and not in_transform())
    # An empty batch has no statistics: the modules know what torch does then. Processes that share
    # statistics all take part, also one without an image.
    if fused and x.shape[0] > 0:
        return True
    return any(isinstance(m, nn.SyncBatchNorm) for m in module.modules())


def plain(branches: Sequence[Block | None], fc1: Block | None, fc2: nn.Module) -> Section | None:
    """Returns the parts as a section where it is what `sk_fuse_select` computes, else None.

    It is not where a part is None, a module was parametrized, a hook wants to see an intermediate
    tensor, the norms disagree, or a convolution of the MLP is no plain one.
    """
    found = tuple(block for block in branches if block is not None)
    if fc1 is None or len(found) < len(branches):
        return None
    if not (is_linear(fc1.conv) and is_linear(fc2)):
        return None
    section = Section(found, fc1, fc2)
    return None if _any_hook(section) or not _agree(section) else section


def run(section: Section, maps: Sequence[Tensor]) -> Tensor:
    """Runs `sk_fuse_select` on the convolutions' outputs and updates the running statistics."""
    norms = [cast(Any, branch).norm for branch in section.branches]
    fc1, fc1_norm, fc2 = (cast(Any, m) for m in (section.fc1.conv, section.fc1.norm, section.fc2))
    result = functional.sk_fuse_select(
        maps,
        [_arguments(n) for n in norms],
        fc1.weight.flatten(1),
        _arguments(fc1_norm),
        fc2.weight.flatten(1),
        fc1_bias=fc1.bias,
        fc2_bias=fc2.bias,
    )
    if result.mean is not None and result.var is not None:
        for n, mean, var in zip(norms, result.mean, result.var, strict=True):
            _update(n, mean, var)
    if result.fc1_mean is not None and result.fc1_var is not None:
        _update(fc1_norm, result.fc1_mean, result.fc1_var)
    return result.out


def is_linear(conv: nn.Module) -> bool:
    """Tells whether ``conv`` is a plain 1x1 convolution: a matrix product at every position."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
    )


def _any_hook(section: Section) -> bool:
    # A convolution of a branch is called as a module, so its own hooks are served.
    silent = [section.fc1.conv, *section.fc1.silent, section.fc2]
    for branch in section.branches:
        silent += branch.silent
    return any_hook(silent)


def _agree(section: Section) -> bool:
    norms, fc1_norm = [branch.norm for branch in section.branches], section.fc1.norm
    first = norms[0]
    settings = {(cast(Any, n).eps, _takes_batch(n), _group(n)) for n in norms}
    both = _takes_batch(first) and _takes_batch(fc1_norm)
    return len(settings) == 1 and (not both or _group(first) == _group(fc1_norm))


def _takes_batch(bn: Any) -> bool:
    return bool(bn.training or bn.running_mean is None)


def _group(bn: Any) -> str:
    """Names the group that ``bn`` takes statistics over; empty for this process alone."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
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


def _update(bn: Any, mean: Tensor, var: Tensor) -> None:
    """Moves the running statistics towards the batch's, as ``nn.BatchNorm2d`` in training does."""
    if not bn.training or not bn.track_running_stats or bn.running_mean is None:
        return
    bn.num_batches_tracked.add_(1)
    for running, batch in ((bn.running_mean, mean), (bn.running_var, var)):
        weight = bn.momentum
        if weight is None:
            weight = bn.num_batches_tracked.to(running.dtype).reciprocal()
        running.lerp_(batch.detach().to(running.dtype), weight)
