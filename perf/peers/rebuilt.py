"""Selective-kernel modules of other packages, rebuilt from their formulas by our own hand.

Names of classes, children and attributes are theirs, since modules are recognised by structure and
checkpoints by key. Each computes in the plainest way, as the originals do: stack, multiply, sum.
They are what `perf` measures as "before", and what the tests accelerate.

A selective-kernel convolution takes maps [B, channels, H, W] and returns [B, out, H', W'], where
H' and W' are smaller by ``stride``; what fuses given maps takes M of them in a list; what mixes
takes and returns [B, H, W, C]. Stacked branches are [B, M, C, H, W], their weights [B, M, C].
"""

from collections import OrderedDict
from functools import partial

import torch
from torch import Tensor, nn

# Branches of the modules that have no other number of them.
TWO = 2
# Between the two layers of an MLP, where nothing is said.
WIDTH = 32


def weighted(stacked: Tensor, weights: Tensor) -> Tensor:
    """[B, M, C, H, W] and weights [B, M, C] -> [B, C, H, W]."""
    return (stacked * weights[..., None, None]).sum(1)


def pooled(stacked: Tensor) -> Tensor:
    """[B, M, C, H, W] -> the mean over space of the sum over branches, [B, C, 1, 1]."""
    return stacked.sum(1).mean((2, 3), keepdim=True)


def conv(
    cin: int, cout: int, k: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Returns a convolution without bias; the map keeps its size where ``stride`` is 1."""
    padding = dilation * (k // 2)
    return nn.Conv2d(cin, cout, k, stride, padding, dilation, groups, bias=False)


def conv_bn_relu(cin: int, cout: int, *sizes: int, k: int = 3) -> nn.Sequential:
    """Returns convolution, batch norm and ReLU; ``sizes`` are stride, dilation and groups."""
    layers = conv(cin, cout, k, *sizes), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)
    return nn.Sequential(*layers)


def named(**children: nn.Module) -> nn.Sequential:
    """Returns the children, called one after the other."""
    return nn.Sequential(OrderedDict(children))


# timm's SelectiveKernel (timm/layers/selective_kernel.py).


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's batch norm with its activation inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class SelectiveKernelAttn(nn.Module):
    """Stacked branches to their weights."""

    def __init__(self, channels: int, num_paths: int, width: int) -> None:
        super().__init__()
        self.num_paths = num_paths
        self.fc_reduce = nn.Conv2d(channels, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.fc_select = nn.Conv2d(width, channels * num_paths, 1, bias=False)

    def forward(self, stacked: Tensor) -> Tensor:
        wide = self.fc_select(self.act(self.bn(self.fc_reduce(pooled(stacked)))))
        return wide.view(wide.shape[0], self.num_paths, -1).softmax(1)


class SelectiveKernel(nn.Module):
    """A 3x3 path and a dilated one; with ``split`` each sees half of the channels."""

    def __init__(
        self,
        channels: int,
        out: int,
        *,
        stride: int = 1,
        groups: int = 1,
        split: bool = False,
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        self.num_paths, self.in_channels, self.split_input = TWO, channels, split
        each = channels // TWO if split else channels
        self.paths = nn.ModuleList(
            named(
                conv=conv(each, out, 3, stride, 1 + i, groups),
                bn=BatchNormAct2d(out),
                aa=nn.Identity(),
            )
            for i in range(TWO)
        )
        self.attn = SelectiveKernelAttn(out, TWO, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.chunk(TWO, 1) if self.split_input else (x,) * TWO
        stacked = torch.stack([path(p) for path, p in zip(self.paths, parts, strict=True)], 1)
        return weighted(stacked, self.attn(stacked))


# The SKConv of the common ports: ``conv``, ``fc1``, ``fc2``, or a head a branch.


class SKConv(nn.Module):
    """The form that most repositories copy: ``conv``, ``fc1``, ``fc2``."""

    def __init__(
        self,
        channels: int,
        out: int,
        M: int = 2,
        *,
        stride: int = 1,
        groups: int = 1,
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        self.M, self.out_channels = M, out
        self.conv = nn.ModuleList(
            conv_bn_relu(channels, out, stride, 1 + i, groups) for i in range(M)
        )
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = conv_bn_relu(out, width, k=1)
        self.fc2 = nn.Conv2d(width, out * M, 1, bias=False)
        self.softmax = nn.Softmax(dim=1)

    def attention(self, wide: Tensor) -> Tensor:
        return self.softmax(wide.reshape(wide.shape[0], self.M, self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([conv(x) for conv in self.conv], 1)
        wide = self.fc2(self.fc1(self.global_pool(stacked.sum(1))))
        return weighted(stacked, self.attention(wide))


class SKConvHeads(nn.Module):
    """A biased head a branch: ``convs``, ``fc``, ``fcs``; of convolutions, or of linear layers."""

    def __init__(
        self,
        channels: int,
        out: int,
        M: int = 3,
        *,
        linear: bool = False,
        stride: int = 1,
        groups: int = 1,
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.convs = nn.ModuleList(
            conv_bn_relu(channels, out, stride, 1 + i, groups) for i in range(M)
        )
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(out, width) if linear else conv_bn_relu(out, width, k=1)
        head = partial(nn.Linear, width, out) if linear else partial(nn.Conv2d, width, out, 1)
        self.fcs = nn.ModuleList(head() for _ in range(M))
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([conv(x) for conv in self.convs], 1)
        s = self.gap(stacked.sum(1))
        z = self.fc(s.flatten(1) if self.linear else s)
        weights = self.softmax(torch.stack([head(z).flatten(1) for head in self.fcs], 1))
        return weighted(stacked, weights)


# pytorchcv's SKConvBlock (pytorchcv/models/sknet.py).


class Concurrent(nn.Sequential):
    """Runs its children side by side and stacks what they return."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self], 1)


class SKConvBlock(nn.Module):
    """The selective-kernel convolution."""

    def __init__(
        self, channels: int, out: int, *, stride: int = 1, groups: int = 1, width: int = WIDTH
    ) -> None:
        super().__init__()
        self.num_branches, self.out_channels = TWO, out
        self.branches = Concurrent()
        for i in range(TWO):
            block = self._block(channels, out, 3, stride, 1 + i, groups)
            self.branches.add_module(f"branch{i + 2}", block)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = self._block(out, width, 1)
        self.fc2 = nn.Conv2d(width, out * TWO, 1, bias=False)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        stacked = self.branches(x)
        wide = self.fc2(self.fc1(self.pool(stacked.sum(1))))
        return weighted(stacked, self.softmax(wide.view(-1, TWO, self.out_channels)))

    @staticmethod
    def _block(cin: int, cout: int, *sizes: int) -> nn.Sequential:
        bn = nn.BatchNorm2d(cout)
        return named(conv=conv(cin, cout, *sizes), bn=bn, activ=nn.ReLU(inplace=True))


# ResNeSt's split attention: timm/layers/split_attn.py and resnest's SplAtConv2d.


class RadixSoftmax(nn.Module):
    """The softmax over the branches; one branch alone gets a sigmoid."""

    def __init__(self, radix: int, cardinality: int) -> None:
        super().__init__()
        self.radix, self.cardinality = radix, cardinality

    def forward(self, x: Tensor) -> Tensor:
        if self.radix == 1:
            return x.flatten(1).sigmoid()
        grouped = x.view(x.shape[0], self.cardinality, self.radix, -1).transpose(1, 2)
        return grouped.softmax(1).flatten(1)


class SplitAttn(nn.Module):
    """timm's; with ``one_relu``, ``relu`` stands for ``act0`` and ``act1``, as in SplAtConv2d."""

    def __init__(
        self, channels: int, out: int, *, radix: int = 2, groups: int = 1, one_relu: bool = False
    ) -> None:
        super().__init__()
        self.radix = radix
        self.conv = nn.Conv2d(channels, out * radix, 3, padding=1, groups=groups * radix)
        self.bn0 = nn.BatchNorm2d(out * radix)
        self.fc1 = nn.Conv2d(out, WIDTH, 1, groups=groups)
        self.bn1 = nn.BatchNorm2d(WIDTH)
        self.acts = ("relu", "relu") if one_relu else ("act0", "act1")
        for name in self.acts:
            self.add_module(name, nn.ReLU(inplace=True))
        self.fc2 = nn.Conv2d(WIDTH, out * radix, 1, groups=groups)
        self.rsoftmax = RadixSoftmax(radix, groups)

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(self, self.acts[0])(self.bn0(self.conv(x)))
        stacked = x.reshape(x.shape[0], self.radix, -1, *x.shape[2:])
        z = getattr(self, self.acts[1])(self.bn1(self.fc1(pooled(stacked))))
        weights = self.rsoftmax(self.fc2(z))
        return weighted(stacked, weights.view(stacked.shape[:3])).contiguous()


# SimCLRv2.


class SimCLRSelectiveKernel(nn.Module):
    """One convolution makes both branches."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.main_conv = conv_bn_relu(channels, TWO * out)
        mlp = conv_bn_relu(out, WIDTH, k=1), conv(WIDTH, TWO * out, 1)
        self.mixing_conv = nn.Sequential(*mlp)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.stack(self.main_conv(x).chunk(TWO, 1))
        mixed = self.mixing_conv(both.sum(0).mean((2, 3), keepdim=True))
        weights = torch.stack(mixed.chunk(TWO, 1)).softmax(0)
        return (both * weights).sum(0)


# The fusion of given maps in restoration networks: MIRNet, DehazeFormer, gUNet.


class SKFF(nn.Module):
    """MIRNet's feature fusion; v1 has a PReLU, v2 a LeakyReLU."""

    def __init__(self, channels: int, height: int = 3, *, leaky: bool = False) -> None:
        super().__init__()
        self.height = height
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        width = max(channels // 8, 4)
        act = nn.LeakyReLU(0.2) if leaky else nn.PReLU()
        self.conv_du = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), act)
        self.fcs = nn.ModuleList(nn.Conv2d(width, channels, 1, bias=False) for _ in range(height))
        self.softmax = nn.Softmax(dim=1)

    def forward(self, inp_feats: list[Tensor]) -> Tensor:
        stacked = torch.stack(inp_feats, 1)
        z = self.conv_du(self.avg_pool(stacked.sum(1)))
        weights = self.softmax(torch.stack([head(z).flatten(1) for head in self.fcs], 1))
        return weighted(stacked, weights)


class SKFusion(nn.Module):
    """DehazeFormer's; with ``inside``, gUNet's, whose pooling is part of the MLP."""

    def __init__(self, dim: int, height: int = 2, *, inside: bool = False) -> None:
        super().__init__()
        self.height = height
        pool = nn.AdaptiveAvgPool2d(1)
        width = max(dim // 8, 4)
        layers = [
            nn.Conv2d(dim, width, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, dim * height, 1, bias=False),
        ]
        self.avg_pool = nn.Identity() if inside else pool
        self.mlp = nn.Sequential(*([pool] if inside else []), *layers)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, in_feats: list[Tensor]) -> Tensor:
        stacked = torch.stack(in_feats, 1)
        wide = self.mlp(self.avg_pool(stacked.sum(1)))
        return weighted(stacked, self.softmax(wide.view(stacked.shape[:3])))


# The spatial mixers of CycleMLP and Vision Permutator, on maps [B, H, W, C].


MIXERS = 3


class Mixer(nn.Module):
    """What both have: three mixed maps, weighed by the softmax of ``reweight``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        fc1, fc2 = nn.Linear(dim, dim // 4), nn.Linear(dim // 4, MIXERS * dim)
        self.reweight = named(fc1=fc1, act=nn.GELU(), fc2=fc2)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def reweighted(self, h: Tensor, w: Tensor, c: Tensor) -> Tensor:
        a = self.reweight((h + w + c).flatten(1, 2).mean(1))
        a = a.reshape(a.shape[0], -1, MIXERS).permute(2, 0, 1).softmax(0)[:, :, None, None]
        return self.proj_drop(self.proj(h * a[0] + w * a[1] + c * a[2]))


class CycleMLP(Mixer):
    """CycleMLP's block; convolutions stand for its cycle layers."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.mlp_c = nn.Linear(dim, dim, bias=False)
        self.sfc_h = nn.Conv2d(dim, dim, (1, 3), padding=(0, 1))
        self.sfc_w = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0))

    def forward(self, x: Tensor) -> Tensor:
        maps = x.permute(0, 3, 1, 2)
        h, w = (layer(maps).permute(0, 2, 3, 1) for layer in (self.sfc_h, self.sfc_w))
        return self.reweighted(h, w, self.mlp_c(x))


class WeightedPermuteMLP(Mixer):
    """Vision Permutator's block, for maps of ``segment_dim`` rows and columns."""

    def __init__(self, dim: int, segment_dim: int) -> None:
        super().__init__(dim)
        self.segment_dim = segment_dim
        self.mlp_c, self.mlp_h, self.mlp_w = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        n, S = self.segment_dim, C // self.segment_dim
        h = x.reshape(B, H, W, n, S).permute(0, 3, 2, 1, 4).reshape(B, n, W, H * S)
        h = self.mlp_h(h).reshape(B, n, W, H, S).permute(0, 3, 2, 1, 4).reshape(B, H, W, C)
        w = x.reshape(B, H, W, n, S).permute(0, 1, 3, 2, 4).reshape(B, H, n, W * S)
        w = self.mlp_w(w).reshape(B, H, n, W, S).permute(0, 1, 3, 2, 4).reshape(B, H, W, C)
        return self.reweighted(h, w, self.mlp_c(x))
