"""The modules of other packages at the sizes of a case, before and after `accelerate`.

The structures are those of `perf.peers.rebuilt`. Here each takes maps [B, C, H, W] and returns one,
so that a case's layout means the same for all of them.
"""

import copy
from collections.abc import Callable

from torch import Tensor, nn

import sknet_triton as skt
from perf.peers import rebuilt
from perf.rows.cases import Case

GROUPS = 32


class OnList(nn.Module):
    """A module that takes its branches in a list."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *branches: Tensor) -> Tensor:
        """M branches [B, C, H, W] -> [B, C, H, W]."""
        out: Tensor = self.module(list(branches))
        return out


class OnChannelsLast(nn.Module):
    """A module on maps [B, H, W, C], called as in its network: on a view of [B, C, H, W]."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        out: Tensor = self.module(x.permute(0, 2, 3, 1))
        return out.permute(0, 3, 1, 2)


BUILDERS: dict[str, Callable[[Case], nn.Module]] = {
    "timm_selective_kernel": lambda case: rebuilt.SelectiveKernel(case.C, case.C, groups=GROUPS),
    "port_sk_conv": lambda case: rebuilt.SKConv(case.C, case.C, groups=GROUPS),
    "pytorchcv_sk_conv": lambda case: rebuilt.SKConvBlock(case.C, case.C, groups=GROUPS),
    "resnest_split_attention": lambda case: rebuilt.SplitAttn(case.C, case.C),
    "simclr_sk_conv": lambda case: rebuilt.SimCLRSelectiveKernel(case.C, case.C),
    "cycle_mlp": lambda case: OnChannelsLast(rebuilt.CycleMLP(case.C)),
    "vision_permutator": lambda case: OnChannelsLast(rebuilt.WeightedPermuteMLP(case.C, case.H)),
    "mirnet_skff": lambda case: OnList(rebuilt.SKFF(case.C, case.M)),
    "dehazeformer_sk_fusion": lambda case: OnList(rebuilt.SKFusion(case.C, case.M)),
}


def accelerated(case: Case) -> nn.Module:
    """Returns the module of ``case`` after `accelerate`.

    Raises:
        ValueError: `accelerate` left it as it was, so that there is no "after" to measure.
    """
    module = BUILDERS[case.workload](case)
    report = skt.accelerate(module)
    if len(report.paths("accelerated")) != 1 or report.paths("left"):
        raise ValueError(f"{case.workload}: expected one accelerated module, got: {report}")
    return module


def original(module: nn.Module) -> nn.Module:
    """Returns a copy of what `accelerated` made that computes as its own package does."""
    twin = copy.deepcopy(module)
    skt.restore(twin)
    return twin


def unsupported(case: Case) -> str | None:
    """Tells why a family cannot have the sizes of ``case``; None where it can."""
    if case.workload == "vision_permutator" and case.C % case.H:
        return f"Vision Permutator cuts {case.C} channels into one segment a row, not into {case.H}"
    return None
