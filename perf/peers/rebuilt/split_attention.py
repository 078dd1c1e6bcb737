"""ResNeSt's split attention: timm/layers/split_attn.py and resnest's SplAtConv2d."""

from collections.abc import Callable

from torch import Tensor, nn

from perf.peers.rebuilt.stacked import pooled, weighted


class RadixSoftmax(nn.Module):
    """The softmax over the branches; one branch alone gets a sigmoid."""

    def __init__(self, radix: int, cardinality: int) -> None:
        super().__init__()
        self.radix, self.cardinality = radix, cardinality

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, radix * C, 1, 1], grouped by cardinality, -> weights [B, radix * C]."""
        if self.radix == 1:
            return x.flatten(1).sigmoid()
        grouped = x.view(x.shape[0], self.cardinality, self.radix, -1).transpose(1, 2)
        return grouped.softmax(1).flatten(1)


class SplitAttn(nn.Module):
    """timm's; with ``one_relu``, ``relu`` stands for ``act0`` and ``act1``, as in SplAtConv2d."""

    def __init__(
        self,
        channels: int,
        out: int,
        *,
        radix: int = 2,
        groups: int = 1,
        one_relu: bool = False,
        width: int = 32,
    ) -> None:
        super().__init__()
        self.radix = radix
        self.conv = nn.Conv2d(channels, out * radix, 3, padding=1, groups=groups * radix)
        self.bn0 = nn.BatchNorm2d(out * radix)
        self.fc1 = nn.Conv2d(out, width, 1, groups=groups)
        self.bn1 = nn.BatchNorm2d(width)
        if one_relu:
            self.relu = nn.ReLU(inplace=True)
        else:
            self.act0, self.act1 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(width, out * radix, 1, groups=groups)
        self.rsoftmax = RadixSoftmax(radix, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, channels, H, W] to [B, out, H, W]."""
        x = self._relu("act0")(self.bn0(self.conv(x)))
        stacked = x.reshape(x.shape[0], self.radix, -1, *x.shape[2:])
        z = self._relu("act1")(self.bn1(self.fc1(pooled(stacked))))
        weights = self.rsoftmax(self.fc2(z))
        return weighted(stacked, weights.view(stacked.shape[:3])).contiguous()

    def _relu(self, name: str) -> Callable[[Tensor], Tensor]:
        relu: Callable[[Tensor], Tensor] = getattr(self, name, None) or self.relu
        return relu
