"""What is measured: one case is one computation at one size, dtype, layout and mode."""

from dataclasses import dataclass
from typing import Literal, get_args

Level = Literal["op", "layer", "model", "workload"]
Mode = Literal["infer", "train", "bwd"]
DType = Literal["fp32", "tf32", "bf16", "fp16", "autocast"]
Layout = Literal["nchw", "channels_last"]

LEVELS: tuple[Level, ...] = get_args(Level)
MODES: tuple[Mode, ...] = get_args(Mode)
DTYPES: tuple[DType, ...] = get_args(DType)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
STAGES = (1, 2, 3, 4)

WHOLE_NETWORK = 0
DIGITS_RESOLUTION = 8

LEVEL_OF: dict[str, Level] = {
    "sk_fuse": "op",
    "sk_select": "op",
    "sk_fuse_select": "op",
    "sk_conv": "layer",
    "sk_unit": "layer",
    "sknet26": "model",
    "sknet50": "model",
    "sknet101": "model",
    "digits": "workload",
}


@dataclass(frozen=True)
class Case:
    """One computation. The fields are the key columns of the CSV, in this order.

    ``resolution`` is that of the image; an op or a layer sees the map [B, C, H, W] that an SKNet
    has in ``stage`` at that resolution. ``stage`` is 0 where the whole network runs, and C, H, W
    are then those of its input. Mode infer is the forward pass without gradients, train the
    forward and the backward pass, bwd the backward pass of an op or a layer alone; the digits
    workload trains to the end, optimiser included.
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


def make_case(
    workload: str,
    mode: Mode,
    *,
    dtype: DType = "fp32",
    layout: Layout = "nchw",
    M: int = 2,
    batch: int = 8,
    resolution: int = 224,
    stage: int = 1,
) -> Case:
    """Returns the case with the shape that ``workload`` has at ``resolution``.

    A network and the digits have no stage; the digits have their own resolution.
    """
    level = LEVEL_OF[workload]
    if level in ("op", "layer"):
        channels, size = stage_shape(stage, resolution)
    else:
        stage = WHOLE_NETWORK
        resolution = DIGITS_RESOLUTION if level == "workload" else resolution
        channels, size = (1 if level == "workload" else 3), resolution
    return Case(
        level, workload, mode, dtype, layout, M, batch, resolution, stage, channels, size, size
    )


def stage_shape(stage: int, resolution: int) -> tuple[int, int]:
    """Returns channels and side of the maps of an SKNet stage: 128 and 56 in stage 1 at 224.

    Every strided layer rounds up, so that the whole way down does.
    """
    reduction = 2 ** (stage + 1)
    return 64 * 2**stage, -(-resolution // reduction)
