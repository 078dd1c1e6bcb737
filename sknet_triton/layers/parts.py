"""What selective-kernel layers are made of, and how it is handed to `fused.fuse_select`."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

from sknet_kernels.norms import Norms, Running
from sknet_triton import fused, reference
from sknet_triton.backend import is_symbolic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    *,
    act: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Sequential:
    """Returns convolution without bias, batch norm and, with ``act``, ReLU as conv, bn, act.

    The ``options`` are those of the convolution.
    """
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    modules["conv"] = nn.Conv2d(
        in_channels, out_channels, kernel_size, bias=False, **options, **factory
    )
    modules["bn"] = nn.BatchNorm2d(out_channels, **factory)
    if act:
        modules["act"] = nn.ReLU(inplace=True)
    return nn.Sequential(modules)


def any_hook(modules: Iterable[nn.Module], *, everywhere: bool = True) -> bool:
    """Tells whether calling one of ``modules`` does more than its class says.

    It does with a hook of any kind, of which those on all modules count ``everywhere``, and where
    its own ``forward`` was replaced, as wrappers that keep a module's type do.
    """
    # Spelt out, since this is asked at every call of a layer.
    if everywhere and (
        module_globals._global_forward_hooks
        or module_globals._global_forward_pre_hooks
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    ):
        return True
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return True
    return False


class Block(NamedTuple):
    """A convolution, its batch norm and its ReLU."""

    conv: nn.Module
    norm: nn.Module
    silent: tuple[nn.Module, ...]  # what is not called: norm, activation, what holds the three


class Parts(NamedTuple):
    """What lies between a module's convolutions and V, as `sk_fuse_select` computes it."""

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


def fusible(find: Callable[[], Parts | None], x: Tensor) -> tuple[Parts, fused.Way] | None:
    """Returns what ``find`` does and how it is carried out, on an input like ``x``.

    None says to call the modules one by one: where a graph is made without our kernels, for what
    comes after knows modules (it folds batch norms into convolutions), and for an empty batch,
    which has no statistics. torch's SyncBatchNorm takes no CPU tensors among several processes,
    this does, and all of them take part, also one without an image.
    """
    if is_symbolic(x):
        return None
    way = fused.way_of(x)
    makes_graph = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    by_modules = x.shape[0] == 0 or (way == "composed" and makes_graph)
    joint = dist.is_available() and dist.is_initialized()
    if by_modules and not joint:
        return None
    parts = find()
    if parts is None:
        return None
    if joint and way == "composed":
        norms = [parts.fc1.norm, *(block.norm for block in parts.branches)]
        if any(isinstance(norm, nn.SyncBatchNorm) for norm in norms):
            return parts, "formulas"
    return None if by_modules and way == "composed" else (parts, way)


def parts_of(branches: Sequence[Block | None], fc1: Block | None, fc2: nn.Module) -> Parts | None:
    """Returns the parts where they are what `sk_fuse_select` computes, else None.

    They are not where one is None, a module was parametrized, a hook wants to see an intermediate
    tensor, the norms disagree, or a convolution of the MLP is no plain one.
    """
    found = tuple([block for block in branches if block is not None])
    if fc1 is None or len(found) < len(branches):
        return None
    if not (is_linear(fc1.conv) and is_linear(fc2)):
        return None
    parts = Parts(found, fc1, fc2)
    return None if any_hook(parts.silent) or not _agree(parts) else parts


def run(parts: Parts, maps: Sequence[Tensor], way: fused.Way) -> Tensor:
    """Computes V of the convolutions' outputs and moves the running statistics."""
    return _composed(parts, maps) if way == "composed" else _fused(parts, maps, way)


def _composed(parts: Parts, maps: Sequence[Tensor]) -> Tensor:
    """Takes PyTorch's operators one by one, without the modules' calls where they do no more.

    fc1 and fc2 are products of matrices: a convolution of one position takes longer to start.
    """
    B, C = maps[0].shape[:2]
    us = [_activated(block.norm, x) for block, x in zip(parts.branches, maps, strict=True)]
    hidden = _product(parts.fc1.conv, reference.sk_fuse(us))
    z = _activated(parts.fc1.norm, hidden)
    return reference.sk_select(us, _product(parts.fc2, z).view(B, len(us), C))


def _activated(bn: Any, x: Tensor) -> Tensor:
    # As ``_BatchNorm.forward``, whose attributes take longer than the operator at small sizes.
    training, factor = bn.training, bn.momentum or 0.0
    mean, var = _buffer(bn, "running_mean"), _buffer(bn, "running_var")
    if training and (mean is None or not bn.track_running_stats):
        mean = var = None
    elif training and (tracked := _buffer(bn, "num_batches_tracked")) is not None:
        tracked.add_(1)
        factor = 1 / float(tracked) if bn.momentum is None else factor
    weight, bias = _parameter(bn, "weight"), _parameter(bn, "bias")
    batch_stats = training or mean is None
    return torch.relu_(F.batch_norm(x, mean, var, weight, bias, batch_stats, factor, bn.eps))


def _product(conv: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, _parameter(conv, "weight").flatten(1), _parameter(conv, "bias"))


def _fused(parts: Parts, maps: Sequence[Tensor], way: fused.Way) -> Tensor:
    norms, fc1_norm = [block.norm for block in parts.branches], parts.fc1.norm
    batch_stats, fc1_batch_stats = _takes_batch(norms[0]), _takes_batch(fc1_norm)
    arguments = fused.Arguments(
        maps,
        _norms(norms, batch_stats),
        _parameter(parts.fc1.conv, "weight"),
        _parameter(parts.fc1.conv, "bias"),
        _norms([fc1_norm], fc1_batch_stats),
        _parameter(parts.fc2, "weight"),
        _parameter(parts.fc2, "bias"),
    )
    group = group_of(norms[0]) if batch_stats else group_of(fc1_norm)
    out, kept, fc1_kept = fused.fuse_select(
        way,
        arguments,
        group,
        _running(norms) if batch_stats else None,
        _running([fc1_norm]) if fc1_batch_stats else None,
    )
    if kept is not None:
        _move(norms, *kept)
    if fc1_kept is not None:
        _move([fc1_norm], *fc1_kept[:, None])
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


def _agree(parts: Parts) -> bool:
    first: Any = parts.branches[0].norm
    eps, batch, group = first.eps, _takes_batch(first), group_of(first)
    for _, n, _ in parts.branches[1:]:
        if n.eps != eps or _takes_batch(n) != batch or group_of(n) != group:
            return False
    fc1_norm = parts.fc1.norm
    return not (batch and _takes_batch(fc1_norm)) or group == group_of(fc1_norm)


def _takes_batch(bn: Any) -> bool:
    return bool(bn.training or _buffer(bn, "running_mean") is None)


def group_of(bn: Any) -> "ProcessGroup | None":
    """Returns the processes that ``bn`` takes statistics over; None for this one alone."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group: Any = bn.process_group or dist.group.WORLD
    found: ProcessGroup | None = group if group.size() > 1 else None
    return found


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


def _running(norms: Sequence[Any]) -> Running | None:
    """Returns the running statistics, None where they are no plain vectors moved all alike."""
    first = norms[0]
    momentum = first.momentum
    if momentum is None or len(set(map(id, norms))) < len(norms):
        return None
    if not all([_keeps(bn) and bn.momentum == momentum for bn in norms]):  # noqa: C419 - every call
        return None
    mean, var, tracked = (
        tuple([_buffer(bn, name) for bn in norms])
        for name in ("running_mean", "running_var", "num_batches_tracked")
    )
    plain = [type(x) is Tensor and x.is_contiguous() for x in (*mean, *var, *tracked)]
    return Running(mean, var, tracked, momentum) if all(plain) else None


def _keeps(bn: Any) -> bool:
    return bool(bn.training and bn.track_running_stats and _buffer(bn, "running_mean") is not None)


def _move(norms: Sequence[Any], means: Tensor, variances: Tensor) -> None:
    """Moves running statistics one by one, of norms that are not all alike or share a module."""
    for bn, mean, var in zip(norms, means, variances, strict=True):
        if not _keeps(bn):
            continue
        bn.num_batches_tracked.add_(1)
        weight = bn.momentum
        if weight is None:
            weight = bn.num_batches_tracked.double().reciprocal()
        for running, batch in ((bn.running_mean, mean), (bn.running_var, var)):
            running.mul_(1 - weight).add_(batch * weight)
