"""What is known of one structure of selective-kernel module, and how it is computed with it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sknet_triton import functional
from sknet_triton.functional import Activation, Reduction
from sknet_triton.layers import section
from sknet_triton.layers.section import Section


def _unchanged(module: nn.Module, out: Tensor) -> Tensor:
    return out


def _no_section(module: nn.Module) -> Section | None:
    return None


def _same_for_all(module: nn.Module, x: Any) -> Sequence[Any] | None:
    return None


@dataclass(frozen=True)
class Family:
    """One structure of module: sum, average over space, small MLP, activation, weighted sum.

    The functions take the module and read its children and attributes; none of them needs the
    package that the module comes from.

    Attributes:
        name: what reports call it.
        recognises: tells whether a module has the structure. It may be generous: `accelerate`
            compares with the module's own forward before it swaps.
        maps: the module's inputs -> M branches [B, C, *spatial], in any strides.
        logits: the pooled branches [B, C] -> [B, M, C], in any strides.
        example: inputs of forward for that comparison, in float64 on the CPU.
        finish: V -> what the module returns.
        activation: as in `functional.sk_select`.
        reduction: as in `functional.sk_fuse`.
        section: the parts between the convolutions and V where the branches are convolution,
            batch norm and ReLU and the MLP likewise: `functional.sk_fuse_select` computes them.
        branch_inputs: the module's input -> the input of every branch's convolution; None where
            each gets the module's own.
    """

    name: str
    recognises: Callable[[nn.Module], bool]
    maps: Callable[..., Sequence[Tensor]]
    logits: Callable[[Any, Tensor], Tensor]
    example: Callable[[Any], tuple[Any, ...]]
    finish: Callable[[Any, Tensor], Tensor] = _unchanged
    activation: Activation | None = "softmax"
    reduction: Reduction = "mean"
    section: Callable[[Any], Section | None] = _no_section
    branch_inputs: Callable[[Any, Any], Sequence[Any] | None] = _same_for_all

    def forward(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Computes what the module's own forward does."""
        out = self.through_section(module, *inputs)
        return self.through_stages(module, *inputs) if out is None else out

    def through_stages(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Calls the module's children, fuse and select."""
        maps = self.maps(module, *inputs)
        logits = self.logits(module, functional.sk_fuse(maps, reduction=self.reduction))
        out = functional.sk_select(maps, logits, activation=self.activation)
        return self.finish(module, out)

    def through_section(self, module: nn.Module, *inputs: Any) -> Tensor | None:
        """Calls the convolutions and `functional.sk_fuse_select`; None where it may not."""
        chosen = section.chosen(lambda: self.section(module), inputs[0])
        if chosen is None:
            return None
        (x,), (parts, way) = inputs, chosen
        each = self.branch_inputs(module, x) or [x] * len(parts.branches)
        maps = [branch.conv(part) for branch, part in zip(parts.branches, each, strict=True)]
        return self.finish(module, section.run(parts, maps, way))
