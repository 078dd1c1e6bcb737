"""The selective-kernel convolution as tutorials write it, in plain PyTorch: the baseline.

It stacks the branches, which costs a copy of all of them, and leaves everything else to PyTorch.
It shares no code with sknet_triton, so its float64 run is an oracle for ours.
"""

import copy
import functools
from collections import OrderedDict

import torch
from torch import Tensor, nn

from sknet_triton import SKConv


class PlainFuse(nn.Module):
    """Fuse: M branches [B, C, H, W] -> [B, C]."""

    def forward(self, *branches: Tensor) -> Tensor:
        """Averages the sum of the branches over space."""
        return torch.stack(branches, dim=1).sum(dim=1).mean(dim=(2, 3))


class PlainSelect(nn.Module):
    """Select: logits [B, M, C] and M branches [B, C, H, W] -> [B, C, H, W]."""

    def forward(self, logits: Tensor, *branches: Tensor) -> Tensor:
        """Adds the branches, weighted by the softmax of the logits over M."""
        attn = torch.softmax(logits, dim=1)[..., None, None]
        return (torch.stack(branches, dim=1) * attn).sum(dim=1)


class PlainFuseSelect(nn.Module):
    """Everything between the convolutions and V, with the parameters of an `SKFuseSelect`."""

    def __init__(self, norms: nn.ModuleList, fc1: nn.Module, fc1_norm: nn.Module, fc2: nn.Module):
        super().__init__()
        self.norms = norms
        self.fc1 = fc1
        self.fc1_norm = fc1_norm
        self.fc2 = fc2

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

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        M: int = 2,
        r: int = 16,
        L: int = 32,
        G: int = 32,
    ) -> None:
        super().__init__()
        self.M = M
        self.out_channels = out_channels
        self.branches = nn.ModuleList(
            _conv_bn_relu(
                nn.Conv2d(
                    in_channels,
                    out_channels,
                    3,
                    stride=stride,
                    padding=1 + i,
                    dilation=1 + i,
                    groups=G,
                    bias=False,
                )
            )
            for i in range(M)
        )
        d = max(in_channels // r, L)
        self.fc1 = _conv_bn_relu(nn.Conv2d(out_channels, d, 1, bias=False))
        self.fc2 = nn.Conv2d(d, M * out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, in_channels, H, W] to [B, out_channels, H', W']."""
        maps = torch.stack([branch(x) for branch in self.branches], dim=1)
        pooled = maps.sum(dim=1).mean(dim=(2, 3), keepdim=True)
        logits = self.fc2(self.fc1(pooled)).view(-1, self.M, self.out_channels, 1, 1)
        return (maps * torch.softmax(logits, dim=1)).sum(dim=1)


class PortSKConv(PlainSKConv):
    """PlainSKConv as the ports write it that do not stack: sums of maps, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, in_channels, H, W] to [B, out_channels, H', W']."""
        maps = [branch(x) for branch in self.branches]
        pooled = functools.reduce(torch.add, maps).mean(dim=(2, 3), keepdim=True)
        logits = self.fc2(self.fc1(pooled)).view(-1, self.M, self.out_channels, 1, 1)
        attn = torch.softmax(logits, dim=1).unbind(dim=1)
        weighted = [a * x for a, x in zip(attn, maps, strict=True)]
        out: Tensor = functools.reduce(torch.add, weighted)
        return out


def with_plain_convs(module: nn.Module, plain: type[PlainSKConv] = PlainSKConv) -> nn.Module:
    """Returns a copy of ``module`` in which every SKConv is a ``plain`` one of its parameters."""
    if isinstance(module, SKConv):
        return _plain(module, plain)
    twin = copy.deepcopy(module)
    names = [name for name, child in twin.named_modules() if isinstance(child, SKConv)]
    for name in names:
        child = twin.get_submodule(name)
        assert isinstance(child, SKConv)
        twin.set_submodule(name, _plain(child, plain))
    return twin


def _plain(conv: SKConv, plain: type[PlainSKConv]) -> PlainSKConv:
    groups = conv.branches[0].get_submodule("conv").groups
    assert isinstance(groups, int)
    twin = plain(conv.in_channels, conv.out_channels, conv.stride, conv.M, G=groups)
    twin.load_state_dict(conv.state_dict())
    twin.to(conv.fc2.weight.device, conv.fc2.weight.dtype)
    return twin.train(conv.training)


def _conv_bn_relu(conv: nn.Conv2d) -> nn.Sequential:
    layers = OrderedDict(conv=conv, bn=nn.BatchNorm2d(conv.out_channels), act=nn.ReLU(inplace=True))
    return nn.Sequential(layers)
