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
        if not any(type(norm) is nn.SyncBatchNorm for norm in norms):
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
    moved: list[tuple[Any, Tensor, Tensor]] = []
    if kept is not None:
        rows = kept.flatten(0, 1).unbind()
        moved += zip(norms, rows[: len(norms)], rows[len(norms) :], strict=True)
    if fc1_kept is not None:
        mean, var = fc1_kept.unbind()
        moved.append((fc1_norm, mean, var))
    _move([entry for entry in moved if _keeps(entry[0])])
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
    if type(bn) is not nn.SyncBatchNorm or not bn.training:
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


def _move(moved: Sequence[tuple[Any, Tensor, Tensor]]) -> None:
    """Moves running statistics towards the batch's, as ``nn.BatchNorm2d`` in training does.

    ``moved`` holds norms with the batch's mean and unbiased variance, which are overwritten.
    """
    if len({id(bn) for bn, _, _ in moved}) < len(moved):
        for entry in moved:  # one norm of several branches moves once for each
            _move([entry])
        return
    if not moved:
        return
    counters = [_buffer(bn, "num_batches_tracked") for bn, _, _ in moved]
    torch._foreach_add_(counters, 1)
    running, batch, kept, taken = [], [], [], []
    for (bn, mean, var), counter in zip(moved, counters, strict=True):
        momentum = bn.momentum
        for name, new in (("running_mean", mean), ("running_var", var)):
            old = _buffer(bn, name)
            new = new if new.dtype == old.dtype else new.to(old.dtype)
            if momentum is None:
                weight = counter.double().reciprocal()
                old.mul_(1 - weight).add_(new * weight)
                continue
            running.append(old)
            batch.append(new)
            kept.append(1 - momentum)
            taken.append(momentum)
    if running:
        torch._foreach_mul_(running + batch, kept + taken)
        torch._foreach_add_(running, batch)
