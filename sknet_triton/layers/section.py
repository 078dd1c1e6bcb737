"""How modules hand their norms and their MLP to `sk_fuse_select`, and when they may."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sknet_kernels.norms import Norms
from sknet_triton import functional
from sknet_triton.backend import is_symbolic
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

    @property
    def silent(self) -> list[nn.Module]:
        """What is not called. A branch's convolution is: its own hooks are served."""
        modules = [self.fc1.conv, self.fc2, *self.fc1.silent]
        for branch in self.branches:
            modules += branch.silent
        return modules


def sequential(block: nn.Module) -> Block | None:
    """Returns a plain Sequential of conv, bn and act as a `Block`; None for anything else."""
    if type(block) is not nn.Sequential or tuple(block._modules) != ("conv", "bn", "act"):
        return None
    conv, norm, act = block._modules.values()
    if type(norm) not in NORMS or type(act) is not nn.ReLU:
        return None
    return Block(conv, norm, (block, norm, act))


def chosen(find: Callable[[], Section | None], x: Tensor) -> tuple[Section, functional.Way] | None:
    """Returns what ``find`` does and how `sk_fuse_select` carries it out, on an input like ``x``.

    None says to call the modules one by one. The Triton kernels and torch.compile fuse the formulas
    of `sk_fuse_select`; elsewhere the modules are as fast, and an exported program and a graph of
    torch.fx hold what they compute, for what comes after knows them: it folds batch norms into
    convolutions. torch's SyncBatchNorm takes no CPU tensors among several processes, this does.
    """
    if is_symbolic(x):
        return None
    way = functional.way_of(x)
    # An empty batch has no statistics: the modules know what torch does then. Processes that share
    # statistics all take part, also one without an image.
    by_modules = way == "composed" or x.shape[0] == 0
    if by_modules and not (dist.is_available() and dist.is_initialized()):
        return None
    section = find()
    if section is None:
        return None
    if by_modules:
        norms = [section.fc1.norm, *(block.norm for block in section.branches)]
        if not any(isinstance(norm, nn.SyncBatchNorm) for norm in norms):
            return None
    return section, "formulas" if way == "composed" else way


def plain(branches: Sequence[Block | None], fc1: Block | None, fc2: nn.Module) -> Section | None:
    """Returns the parts as a section where it is what `sk_fuse_select` computes, else None.

    It is not where a part is None, a module was parametrized, a hook wants to see an intermediate
    tensor, the norms disagree, or a convolution of the MLP is no plain one.
    """
    found = tuple([block for block in branches if block is not None])
    if fc1 is None or len(found) < len(branches):
        return None
    if not (is_linear(fc1.conv) and is_linear(fc2)):
        return None
    section = Section(found, fc1, fc2)
    return None if any_hook(section.silent) or not _agree(section) else section


def run(section: Section, maps: Sequence[Tensor], way: functional.Way) -> Tensor:
    """Runs `sk_fuse_select` on the convolutions' outputs and updates the running statistics."""
    norms, fc1_norm = [block.norm for block in section.branches], section.fc1.norm
    batch_stats, fc1_batch_stats = _takes_batch(norms[0]), _takes_batch(fc1_norm)
    out, kept, fc1_kept = functional.fused(
        way,
        maps,
        _norms(norms, batch_stats),
        _parameter(section.fc1.conv, "weight"),
        _parameter(section.fc1.conv, "bias"),
        _norms([fc1_norm], fc1_batch_stats),
        _parameter(section.fc2, "weight"),
        _parameter(section.fc2, "bias"),
        batch_stats,
        fc1_batch_stats,
        (batch_stats and group_of(norms[0])) or (fc1_batch_stats and group_of(fc1_norm)) or "",
    )
    groups = [(norms, kept), ([fc1_norm], None if fc1_kept is None else fc1_kept[:, None])]
    _move([(moved, statistics) for moved, statistics in groups if statistics is not None])
    return out


def is_linear(conv: nn.Module) -> bool:
    """Tells whether ``conv`` is a plain 1x1 convolution: a matrix product at every position."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
    )


def _agree(section: Section) -> bool:
    norms, fc1_norm = [branch.norm for branch in section.branches], section.fc1.norm
    first: Any = norms[0]
    batch, group = _takes_batch(first), group_of(first)
    for n in norms[1:]:
        if (first.eps, batch, group) != (n.eps, _takes_batch(n), group_of(n)):
            return False
    return not (batch and _takes_batch(fc1_norm)) or group == group_of(fc1_norm)


def _takes_batch(bn: Any) -> bool:
    return bool(bn.training or _buffer(bn, "running_mean") is None)


def group_of(bn: Any) -> str:
    """Names the group that ``bn`` takes statistics over; empty for this process alone."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return ""
    if not dist.is_available() or not dist.is_initialized():
        return ""
    group: Any = bn.process_group or dist.group.WORLD
    return str(group.group_name) if group.size() > 1 else ""


def _norms(norms: Sequence[Any], batch_stats: bool) -> Norms:
    nothing = (None,) * len(norms)
    return Norms(
        nothing if batch_stats else tuple([_buffer(n, "running_mean") for n in norms]),
        nothing if batch_stats else tuple([_buffer(n, "running_var") for n in norms]),
        tuple([_parameter(n, "weight") for n in norms]),
        tuple([_parameter(n, "bias") for n in norms]),
        norms[0].eps,
    )


def _parameter(module: nn.Module, name: str) -> Any:
    # Wrappers such as FSDP put plain attributes in the place of parameters. Attribute access on a
    # module costs more than a kernel launch's share of the host.
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def _buffer(module: nn.Module, name: str) -> Any:
    buffers = module._buffers
    return buffers[name] if name in buffers else getattr(module, name)


def _keeps(bn: Any) -> bool:
    return bool(bn.training and bn.track_running_stats and _buffer(bn, "running_mean") is not None)


def _move(groups: Sequence[tuple[Sequence[Any], Tensor]]) -> None:
    """Moves running statistics towards the batch's, as ``nn.BatchNorm2d`` in training does.

    ``groups`` are n norms with the batch's mean and unbiased variance [2, n, C], overwritten.
    """
    norms = [bn for group, _ in groups for bn in group]
    momenta = {bn.momentum for bn in norms}
    together = len(momenta) == 1 and None not in momenta and len(set(map(id, norms))) == len(norms)
    if not (together and all([_keeps(bn) for bn in norms])):  # noqa: C419 - at every call
        for group, statistics in groups:
            for bn, mean, var in zip(group, *statistics, strict=True):
                _move_one(bn, mean, var)
        return
    (momentum,) = momenta
    torch._foreach_add_([_buffer(bn, "num_batches_tracked") for bn in norms], 1)
    running: list[Tensor] = []
    batch: list[Tensor] = []
    for group, statistics in groups:
        running += [_buffer(bn, "running_mean") for bn in group]
        running += [_buffer(bn, "running_var") for bn in group]
        batch += statistics.flatten(0, 1).unbind()
    taken = [statistics for _, statistics in groups]
    weights = [1 - momentum] * len(running) + [momentum] * len(taken)
    torch._foreach_mul_(running + taken, weights)
    torch._foreach_add_(running, batch)


def _move_one(bn: Any, mean: Tensor, var: Tensor) -> None:
    if not _keeps(bn):
        return
    bn.num_batches_tracked.add_(1)
    weight = bn.momentum
    if weight is None:
        weight = bn.num_batches_tracked.double().reciprocal()
    for running, batch in ((bn.running_mean, mean), (bn.running_var, var)):
        running.mul_(1 - weight).add_(batch * weight)
