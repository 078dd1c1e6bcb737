"""The baseline, plain PyTorch as tutorials write it, and the functions of ours as modules.

The baseline stacks the branches, which costs a copy of all of them, and leaves everything else to
PyTorch. It shares no code with sknet_triton, so its float64 run is an oracle for ours.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sknet_triton as skt
from perf.peers.rebuilt import conv, named
from sknet_triton import SKConv


class Function(nn.Module):
    """A function as a module, as the harness runs modules."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        """Calls the function."""
        return self.function(*inputs)


def plain_fuse(*branches: Tensor) -> Tensor:
    """Averages the sum of M branches [B, C, H, W] over space to [B, C]."""
    return torch.stack(branches, dim=1).sum(dim=1).mean(dim=(2, 3))


def plain_select(logits: Tensor, *branches: Tensor) -> Tensor:
    """Adds M branches [B, C, H, W], weighted by the softmax over M of the logits [B, M, C]."""
    attn = torch.softmax(logits, dim=1)[..., None, None]
    return (torch.stack(branches, dim=1) * attn).sum(dim=1)


class PlainFuseSelect(nn.Module):
    """Everything between the convolutions and V, on the very parameters of an `OursFuseSelect`."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.norms, self.fc1 = ours.norms, ours.fc1
        self.fc1_norm, self.fc2 = ours.fc1_norm, ours.fc2

    def forward(self, *branches: Tensor) -> Tensor:
        """M branches [B, C, H, W], not normalised -> [B, C, H, W]."""
        maps = [norm(x).relu() for norm, x in zip(self.norms, branches, strict=True)]
        stacked = torch.stack(maps, dim=1)
        pooled = stacked.sum(dim=1).mean(dim=(2, 3))
        logits = self.fc2(self.fc1_norm(self.fc1(pooled)).relu())
        attn = torch.softmax(logits.view(len(pooled), len(maps), -1), dim=1)
        return (stacked * attn[..., None, None]).sum(dim=1)


class PlainSKConv(nn.Module):
    """SKConv with the parameter names of `sknet_triton.SKConv`, whose state dict it loads."""

    def __init__(self, C_in: int, C: int, stride: int, M: int, G: int, d: int) -> None:
        super().__init__()
        self.M = M
        self.branches = nn.ModuleList(_conv_bn_relu(C_in, C, 3, stride, 1 + i, G) for i in range(M))
        self.fc1 = _conv_bn_relu(C, d, 1)
        self.fc2 = conv(d, M * C, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C_in, H, W] to [B, C, H', W']."""
        maps = torch.stack([branch(x) for branch in self.branches], dim=1)
        pooled = maps.sum(dim=1).mean(dim=(2, 3), keepdim=True)
        logits = self.fc2(self.fc1(pooled)).unflatten(1, (self.M, -1))
        return (maps * torch.softmax(logits, dim=1)).sum(dim=1)


class PortSKConv(PlainSKConv):
    """PlainSKConv as the ports write it that do not stack: sums of maps, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C_in, H, W] to [B, C, H', W']."""
        maps = [branch(x) for branch in self.branches]
        pooled = functools.reduce(torch.add, maps).mean(dim=(2, 3), keepdim=True)
        logits = self.fc2(self.fc1(pooled)).unflatten(1, (self.M, -1))
        attn = torch.softmax(logits, dim=1).unbind(dim=1)
        return functools.reduce(torch.add, [a * x for a, x in zip(attn, maps, strict=True)])


def with_plain_convs(module: nn.Module, plain: type[PlainSKConv] = PlainSKConv) -> nn.Module:
    """Returns a copy of ``module`` in which every SKConv is a ``plain`` one of its parameters."""
    twin = nn.Sequential(copy.deepcopy(module))
    for name, child in list(twin.named_modules()):
        if isinstance(child, SKConv):
            twin.set_submodule(name, _plain(child, plain))
    return twin[0]


def _plain(ours: SKConv, plain: type[PlainSKConv]) -> PlainSKConv:
    groups = ours.branches[0].get_submodule("conv").groups
    assert isinstance(groups, int)
    d = ours.fc2.in_channels
    twin = plain(ours.in_channels, ours.out_channels, ours.stride, ours.M, groups, d)
    twin.load_state_dict(ours.state_dict())
    twin.to(ours.fc2.weight.device, ours.fc2.weight.dtype)
    return twin.train(ours.training)


def _conv_bn_relu(cin: int, cout: int, *sizes: int) -> nn.Sequential:
    bn = nn.BatchNorm2d(cout)
    return named(conv=conv(cin, cout, *sizes), bn=bn, act=nn.ReLU(inplace=True))


# What is ours.


def sk_fuse(*branches: Tensor) -> Tensor:
    """M branches [B, C, H, W] -> [B, C]."""
    return skt.functional.sk_fuse(branches)


def sk_select(logits: Tensor, *branches: Tensor) -> Tensor:
    """Logits [B, M, C] and M branches [B, C, H, W] -> [B, C, H, W]."""
    return skt.functional.sk_select(branches, logits)


class OursFuseSelect(nn.Module):
    """`functional.sk_fuse_select` as a module, with the sizes of an SKConv on C channels."""

    def __init__(self, C: int, M: int) -> None:
        super().__init__()
        d = max(C // 16, 32)
        self.norms = nn.ModuleList(nn.BatchNorm2d(C) for _ in range(M))
        self.fc1 = nn.Linear(C, d, bias=False)
        self.fc1_norm = nn.BatchNorm1d(d)
        self.fc2 = nn.Linear(d, M * C, bias=False)

    def forward(self, *branches: Tensor) -> Tensor:
        """M branches [B, C, H, W], not normalised -> [B, C, H, W]."""
        return skt.functional.sk_fuse_select(
            branches,
            [self._arguments(norm) for norm in self.norms],
            self.fc1.weight,
            self._arguments(self.fc1_norm),
            self.fc2.weight,
        ).out

    def _arguments(self, norm: Any) -> skt.functional.BatchNormArgs:
        return skt.functional.BatchNormArgs(
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            batch_stats=norm.training,
        )


# Both on given maps, running statistics too: what lies between the convolutions and V.

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Side:
    """One of two modules that are compared on the same given maps."""

    module: nn.Module  # SKConv, or the plain module
    maps: list[Tensor]  # what the convolutions would return, M of [B, C, H, W] with a gradient

    @functools.cached_property
    def _leaves(self) -> list[Tensor]:
        return [*self.maps, *self.module.parameters()]

    def infer(self) -> None:
        """Computes V in evaluation mode."""
        if self.module.training:
            self.module.eval()
        with torch.no_grad():
            self.module(self.maps[0])

    def train(self, dout: Tensor) -> None:
        """Computes V, moves the running statistics and computes every gradient anew."""
        if not self.module.training:
            self.module.train()
        for leaf in self._leaves:
            leaf.grad = None
        torch.autograd.backward(self.module(self.maps[0]), dout)


def both_sides(maps: list[Tensor]) -> tuple[Side, Side]:
    """Returns ours and the plain one, with the same parameters, on ``maps``."""
    C = maps[0].shape[1]
    ours = skt.SKConv(C, C, M=len(maps), G=1).to(maps[0].dtype)
    plain = with_plain_convs(ours)
    for module in (ours, plain):
        for branch, out in zip(module.get_submodule("branches").children(), maps, strict=True):
            branch.conv = Function(lambda x, out=out: out)  # whatever comes in
    return Side(ours, maps), Side(plain, maps)
