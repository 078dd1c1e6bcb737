"""The ops of sknet_triton as modules, as the harness runs modules."""

from torch import Tensor, nn

import sknet_triton as skt
from perf.peers import baseline


class SKFuse(nn.Module):
    """`functional.sk_fuse` as a module, as the harness runs modules."""

    def forward(self, *branches: Tensor) -> Tensor:
        """M branches [B, C, H, W] -> [B, C]."""
        return skt.functional.sk_fuse(branches)


class SKSelect(nn.Module):
    """`functional.sk_select` as a module."""

    def forward(self, logits: Tensor, *branches: Tensor) -> Tensor:
        """Logits [B, M, C] and M branches [B, C, H, W] -> [B, C, H, W]."""
        return skt.functional.sk_select(branches, logits)


class SKFuseSelect(nn.Module):
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

    def plain(self) -> nn.Module:
        """Returns the baseline on these very parameters."""
        return baseline.PlainFuseSelect(self.norms, self.fc1, self.fc1_norm, self.fc2)

    def _arguments(self, norm: nn.Module) -> skt.functional.BatchNormArgs:
        assert isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d))
        return skt.functional.BatchNormArgs(
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            batch_stats=norm.training,
        )
