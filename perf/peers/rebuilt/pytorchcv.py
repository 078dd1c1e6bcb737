"""pytorchcv's SKConvBlock (pytorchcv/models/sknet.py)."""

import torch
from torch import Tensor, nn

from perf.peers.rebuilt.stacked import weighted

NUM_BRANCHES = 2


class ConvBlock(nn.Module):
    """A convolution, its batch norm and its activation."""

    def __init__(
        self, cin: int, cout: int, k: int, stride: int = 1, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        padding = dilation * (k // 2)
        self.conv = nn.Conv2d(cin, cout, k, stride, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.activ = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, cin, H, W] to [B, cout, H', W']."""
        out: Tensor = self.activ(self.bn(self.conv(x)))
        return out


class Concurrent(nn.Sequential):
    """Runs its children side by side and stacks what they return."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, M, C', H, W]."""
        return torch.stack([branch(x) for branch in self], 1)


class SKConvBlock(nn.Module):
    """The selective-kernel convolution."""

    def __init__(
        self, channels: int, out: int, *, stride: int = 1, groups: int = 1, width: int = 32
    ) -> None:
        super().__init__()
        self.num_branches, self.out_channels = NUM_BRANCHES, out
        self.branches = Concurrent()
        for i in range(NUM_BRANCHES):
            branch = ConvBlock(channels, out, 3, stride, 1 + i, groups)
            self.branches.add_module(f"branch{i + 2}", branch)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = ConvBlock(out, width, 1)
        self.fc2 = nn.Conv2d(width, out * NUM_BRANCHES, 1, bias=False)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, channels, H, W] to [B, out, H', W']."""
        stacked = self.branches(x)
        wide = self.fc2(self.fc1(self.pool(stacked.sum(1))))
        return weighted(stacked, self.softmax(wide.view(-1, NUM_BRANCHES, self.out_channels)))
