"""The residual unit of SKNet (Li et al. 2019, section 3.2 and table 1)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sknet_triton.layers.parts import conv_bn
from sknet_triton.layers.sk_conv import Aggregate, BranchSpec, FcNorm, SKConv


class SKUnit(nn.Module):
    """Bottleneck with a selective-kernel convolution: 1x1 reduce, SKConv, 1x1 increase, shortcut.

    Input [B, in_channels, H, W], output [B, out_channels, H', W'] in the input's memory format.
    The shortcut is the identity where the shapes agree, else a strided 1x1 projection.

    Args:
        in_channels: channels of the input.
        width: channels inside the unit, those of the SKConv.
        out_channels: channels of the output; None for the paper's 2 * width.
        stride: stride of the SKConv and of the projection.
        M: number of branches, as in `SKConv`.
        r: reduction ratio, as in `SKConv`.
        L: least width of fc1, as in `SKConv`.
        G: groups, as in `SKConv`.
        branches: as in `SKConv`.
        aggregate: as in `SKConv`.
        d: as in `SKConv`.
        fc_norm: as in `SKConv`.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: as in `SKConv`.
    """

    expansion = 2

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int | None = None,
        stride: int = 1,
        M: int = 2,
        r: int = 16,
        L: int = 32,
        G: int = 32,
        *,
        branches: Sequence[BranchSpec | tuple[int, int, int]] | None = None,
        aggregate: Aggregate = "sk",
        d: int | None = None,
        fc_norm: FcNorm = "batch",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_channels = self.expansion * width if out_channels is None else out_channels
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.reduce = conv_bn(in_channels, width, **factory)
        self.sk = SKConv(
            width,
            width,
            stride,
            M,
            r,
            L,
            G,
            branches=branches,
            aggregate=aggregate,
            d=d,
            fc_norm=fc_norm,
            **factory,
        )
        self.increase = conv_bn(width, out_channels, act=False, **factory)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv_bn(in_channels, out_channels, stride=stride, act=False, **factory)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, in_channels, H, W] to [B, out_channels, H', W']."""
        out: Tensor = self.act(self.increase(self.sk(self.reduce(x))) + self.shortcut(x))
        return out
