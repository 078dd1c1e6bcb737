"""timm's SelectiveKernel (timm/layers/selective_kernel.py)."""

import torch
from torch import Tensor, nn

from perf.peers.rebuilt.stacked import pooled, weighted

NUM_PATHS = 2


class BatchNormAct2d(nn.BatchNorm2d):
    """timm's batch norm with its activation inside."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to the same shape."""
        out: Tensor = self.act(self.drop(super().forward(x)))
        return out


class ConvNormAct(nn.Module):
    """A convolution and its batch norm with activation."""

    def __init__(self, cin: int, cout: int, stride: int, dilation: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            cin, cout, 3, stride, dilation, dilation=dilation, groups=groups, bias=False
        )
        self.bn = BatchNormAct2d(cout)
        self.aa = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, cin, H, W] to [B, cout, H', W']."""
        out: Tensor = self.aa(self.bn(self.conv(x)))
        return out


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
        """[B, M, C, H, W] -> [B, M, C]."""
        wide = self.fc_select(self.act(self.bn(self.fc_reduce(pooled(stacked)))))
        weights: Tensor = wide.view(wide.shape[0], self.num_paths, -1).softmax(1)
        return weights


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
        width: int = 32,
    ) -> None:
        super().__init__()
        self.num_paths, self.in_channels, self.split_input = NUM_PATHS, channels, split
        each = channels // NUM_PATHS if split else channels
        self.paths = nn.ModuleList(
            ConvNormAct(each, out, stride, 1 + i, groups) for i in range(NUM_PATHS)
        )
        self.attn = SelectiveKernelAttn(out, NUM_PATHS, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, channels, H, W] to [B, out, H', W']."""
        parts = x.chunk(NUM_PATHS, 1) if self.split_input else (x,) * NUM_PATHS
        stacked = torch.stack([path(p) for path, p in zip(self.paths, parts, strict=True)], 1)
        return weighted(stacked, self.attn(stacked))
