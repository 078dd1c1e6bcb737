"""The selective-kernel convolution of SimCLRv2."""

import torch
from torch import Tensor, nn

from perf.peers.rebuilt.ports import conv_bn_relu

NUM_BRANCHES = 2


class SimCLRSelectiveKernel(nn.Module):
    """One convolution makes both branches."""

    def __init__(self, channels: int, out: int, *, width: int = 32) -> None:
        super().__init__()
        self.main_conv = conv_bn_relu(channels, NUM_BRANCHES * out)
        self.mixing_conv = nn.Sequential(
            conv_bn_relu(out, width, k=1), nn.Conv2d(width, NUM_BRANCHES * out, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, channels, H, W] to [B, out, H, W]."""
        both = torch.stack(self.main_conv(x).chunk(NUM_BRANCHES, 1))
        mixed = self.mixing_conv(both.sum(0).mean((2, 3), keepdim=True))
        weights = torch.stack(mixed.chunk(NUM_BRANCHES, 1)).softmax(0)
        return (both * weights).sum(0)
