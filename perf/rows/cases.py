"""What is measured: one case is one computation at one size, dtype, layout and mode."""

from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["pass", "op", "layer", "family", "model", "workload"]
Mode = Literal["infer", "train", "bwd"]
DType = Literal["fp32", "tf32", "bf16", "fp16", "autocast"]
Layout = Literal["nchw", "channels_last"]

LEVELS: tuple[Level, ...] = get_args(Level)
MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES: tuple[DType, ...] = get_args(DType)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
STAGES = (1, 2, 3, 4)


@dataclass(frozen=True)
class Case:
    """One computation. The fields are the key columns of the CSV, in this order.

    ``resolution`` is that of the image; a pass, an op or a layer sees the map [B, C, H, W] that an
    SKNet has in ``stage`` at that resolution, a family the map that it has in its own network.
    ``stage`` is 0 there and for networks, whose C, H, W are those of their input.
    Mode infer is the forward pass without gradients, train the forward and the backward pass, bwd
    the backward pass of an op, a layer or a family alone; the digits workload trains to the end,
    optimiser included.
    """

    level: Level
    workload: str
    mode: Mode
    dtype: DType
    layout: Layout
    M: int
    B: int
    resolution: int
    stage: int
    C: int
    H: int
    W: int

    @property
    def differentiates(self) -> bool:
        """Whether a backward pass belongs to it."""
        return self.mode != "infer"

    @property
    def label(self) -> str:
        """The case in one short line."""
        stage = f" stage {self.stage}" if self.stage else ""
        return (
            f"{self.workload}{stage} {self.mode} {self.dtype} {self.layout} "
            f"M={self.M} B={self.B} {self.resolution}px"
        )
