"""The fusion of given maps in restoration networks: MIRNet, DehazeFormer, gUNet."""

import torch
from torch import Tensor, nn

from perf.peers.rebuilt.stacked import weighted

REDUCTION = 8
SMALLEST_WIDTH = 4


class SKFF(nn.Module):
    """MIRNet's feature fusion; v1 has a PReLU, v2 a LeakyReLU."""

    def __init__(self, channels: int, height: int = 3, *, leaky: bool = False) -> None:
        super().__init__()
        self.height = height
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        width = max(channels // REDUCTION, SMALLEST_WIDTH)
        act = nn.LeakyReLU(0.2) if leaky else nn.PReLU()
        self.conv_du = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), act)
        self.fcs = nn.ModuleList(nn.Conv2d(width, channels, 1, bias=False) for _ in range(height))
        self.softmax = nn.Softmax(dim=1)

    def forward(self, inp_feats: list[Tensor]) -> Tensor:
        """M maps [B, C, H, W] -> [B, C, H, W]."""
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
        width = max(dim // REDUCTION, SMALLEST_WIDTH)
        layers: list[nn.Module] = [
            nn.Conv2d(dim, width, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, dim * height, 1, bias=False),
        ]
        self.avg_pool = nn.Identity() if inside else pool
        self.mlp = nn.Sequential(*([pool] if inside else []), *layers)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, in_feats: list[Tensor]) -> Tensor:
        """M maps [B, C, H, W] -> [B, C, H, W]."""
        stacked = torch.stack(in_feats, 1)
        wide = self.mlp(self.avg_pool(stacked.sum(1)))
        return weighted(stacked, self.softmax(wide.view(stacked.shape[:3])))
