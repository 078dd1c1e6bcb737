"""The spatial mixers of CycleMLP and Vision Permutator, on maps [B, H, W, C]."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

NUM_BRANCHES = 3
REDUCTION = 4


class Mlp(nn.Module):
    """The pooled channels [B, dim] -> logits [B, out]."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, dim // REDUCTION), nn.Linear(dim // REDUCTION, out)

    def forward(self, x: Tensor) -> Tensor:
        """Two linear layers with a GELU between them."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class CycleMLP(nn.Module):
    """CycleMLP's block; convolutions stand for its cycle layers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp_c = nn.Linear(dim, dim, bias=False)
        self.sfc_h = nn.Conv2d(dim, dim, (1, 3), padding=(0, 1))
        self.sfc_w = nn.Conv2d(dim, dim, (3, 1), padding=(1, 0))
        self.reweight = Mlp(dim, NUM_BRANCHES * dim)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        maps = x.permute(0, 3, 1, 2)
        h, w = (layer(maps).permute(0, 2, 3, 1) for layer in (self.sfc_h, self.sfc_w))
        return _reweighted(self, h, w, self.mlp_c(x))


class WeightedPermuteMLP(nn.Module):
    """Vision Permutator's block, for maps of ``segment_dim`` rows and columns."""

    def __init__(self, dim: int, segment_dim: int) -> None:
        super().__init__()
        self.segment_dim = segment_dim
        self.mlp_c, self.mlp_h, self.mlp_w = (nn.Linear(dim, dim) for _ in range(3))
        self.reweight = Mlp(dim, NUM_BRANCHES * dim)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        B, H, W, C = x.shape
        n, S = self.segment_dim, C // self.segment_dim
        h = x.reshape(B, H, W, n, S).permute(0, 3, 2, 1, 4).reshape(B, n, W, H * S)
        h = self.mlp_h(h).reshape(B, n, W, H, S).permute(0, 3, 2, 1, 4).reshape(B, H, W, C)
        w = x.reshape(B, H, W, n, S).permute(0, 1, 3, 2, 4).reshape(B, H, n, W * S)
        w = self.mlp_w(w).reshape(B, H, n, W, S).permute(0, 1, 3, 2, 4).reshape(B, H, W, C)
        return _reweighted(self, h, w, self.mlp_c(x))


def _reweighted(block: Any, h: Tensor, w: Tensor, c: Tensor) -> Tensor:
    """The three mixed maps [B, H, W, C], weighed by the softmax of ``block.reweight``."""
    a = block.reweight((h + w + c).flatten(1, 2).mean(1))
    a = a.reshape(a.shape[0], -1, NUM_BRANCHES).permute(2, 0, 1).softmax(0)[:, :, None, None]
    out: Tensor = block.proj_drop(block.proj(h * a[0] + w * a[1] + c * a[2]))
    return out
