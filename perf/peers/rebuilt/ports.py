"""The SKConv of the common ports: ``conv``, ``fc1``, ``fc2``, or a head a branch."""

import torch
from torch import Tensor, nn

from perf.peers.rebuilt.stacked import weighted


def conv_bn_relu(
    cin: int, cout: int, *, stride: int = 1, dilation: int = 1, groups: int = 1, k: int = 3
) -> nn.Sequential:
    """Returns convolution, batch norm and ReLU; with a stride of 1 the map keeps its size."""
    padding = dilation * (k // 2)
    conv = nn.Conv2d(cin, cout, k, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU(inplace=True))


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
        width: int = 32,
    ) -> None:
        super().__init__()
        self.M, self.out_channels = M, out
        self.conv = nn.ModuleList(
            conv_bn_relu(channels, out, stride=stride, dilation=1 + i, groups=groups)
            for i in range(M)
        )
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = conv_bn_relu(out, width, k=1)
        self.fc2 = nn.Conv2d(width, out * M, 1, bias=False)
        self.softmax = nn.Softmax(dim=1)

    def attention(self, wide: Tensor) -> Tensor:
        """Logits [B, M * C, 1, 1] -> weights [B, M, C]."""
        weights: Tensor = self.softmax(wide.reshape(wide.shape[0], self.M, self.out_channels))
        return weights

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, channels, H, W] to [B, out, H', W']."""
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
        width: int = 32,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.convs = nn.ModuleList(
            conv_bn_relu(channels, out, stride=stride, dilation=1 + i, groups=groups)
            for i in range(M)
        )
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module
        if linear:
            self.fc = nn.Linear(out, width)
            self.fcs = nn.ModuleList(nn.Linear(width, out) for _ in range(M))
        else:
            self.fc = conv_bn_relu(out, width, k=1)
            self.fcs = nn.ModuleList(nn.Conv2d(width, out, 1) for _ in range(M))
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, channels, H, W] to [B, out, H', W']."""
        stacked = torch.stack([conv(x) for conv in self.convs], 1)
        s = self.gap(stacked.sum(1))
        z = self.fc(s.flatten(1) if self.linear else s)
        weights = self.softmax(torch.stack([head(z).flatten(1) for head in self.fcs], 1))
        return weighted(stacked, weights)
