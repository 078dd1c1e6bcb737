"""The selective-kernel convolution: split, fuse, select (Li et al. 2019, section 3.1)."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from sknet_triton import functional
from sknet_triton.backend import is_symbolic
from sknet_triton.layers import parts
from sknet_triton.layers.parts import conv_bn

Aggregate = Literal["sk", "sum"]
FcNorm = Literal["batch", "layer", "none"]


@dataclass(frozen=True)
class BranchSpec:
    """One branch of the split: a square kernel, its dilation and its groups.

    Padding keeps the size at stride 1: dilation * (kernel - 1) / 2, so ``kernel`` is odd.
    """

    kernel: int = 3
    dilation: int = 1
    groups: int = 32

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd positive number, got {self.kernel}")
        _check_positive(dilation=self.dilation, groups=self.groups)

    @property
    def padding(self) -> int:
        """Zeros on each side that keep the size at stride 1."""
        return self.dilation * (self.kernel - 1) // 2


class SKConv(nn.Module):
    """Convolution whose channels each choose among M kernels (section 3.1).

    Branch i is a 3x3 convolution of dilation 1 + i and G groups, then batch norm and ReLU. The
    branches' sum is averaged over space, goes through fc1 (1x1, norm, ReLU) of width
    d = max(in_channels // r, L) and fc2 (1x1) to M * out_channels logits, branch-major; their
    softmax over the branches weighs the branches. Input [B, in_channels, H, W], output
    [B, out_channels, H', W'] in the input's memory format.

    Args:
        in_channels: channels of the input.
        out_channels: channels of every branch and of the output.
        stride: stride of every branch.
        M: number of branches.
        r: reduction ratio of fc1.
        L: least width of fc1.
        G: groups of every branch.
        branches: replaces M and G, as the paper's ablations need: a `BranchSpec` or a tuple
            (kernel, dilation, groups) per branch.
        aggregate: ``"sk"``, or ``"sum"`` for the plain sum of the branches (table 7), which has
            neither fc1 nor fc2.
        d: replaces the rule for fc1's width.
        fc_norm: norm of fc1: ``"batch"`` as published, ``"layer"`` (one group over d), which
            does not depend on the batch and so trains at batch 1, or ``"none"``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: an argument is out of range, named with the value; in ``forward``, a batch of
            one in training with ``fc_norm="batch"``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
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
        specs = _branch_specs(branches, M, G)
        _check_sizes(
            specs,
            in_channels=in_channels,
            out_channels=out_channels,
            stride=stride,
            r=r,
            L=L,
            d=1 if d is None else d,
        )
        if aggregate not in get_args(Aggregate):
            raise ValueError(f"aggregate: expected 'sk' or 'sum', got {aggregate!r}")
        if fc_norm not in get_args(FcNorm):
            raise ValueError(f"fc_norm: expected 'batch', 'layer' or 'none', got {fc_norm!r}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.M = len(specs)
        self.aggregate = aggregate
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.branches = nn.ModuleList(
            conv_bn(
                in_channels,
                out_channels,
                spec.kernel,
                stride=stride,
                padding=spec.padding,
                dilation=spec.dilation,
                groups=spec.groups,
                **factory,
            )
            for spec in specs
        )
        if aggregate == "sk":
            width = d if d is not None else max(in_channels // r, L)
            self.fc1 = _fc1(out_channels, width, fc_norm, **factory)
            self.fc2 = nn.Conv2d(width, self.M * out_channels, 1, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, in_channels, H, W] to [B, out_channels, H', W']."""
        if self.aggregate == "sum":
            maps = [branch(x) for branch in self.branches]
            total: Tensor = sum(maps[1:], start=maps[0])
            return total
        fusible = parts.fusible(self._parts, x)
        if fusible is not None:
            found, way = fusible
            self._check_batch(x.shape[0])
            return parts.run(found, [branch.conv(x) for branch in found.branches], way)
        maps = [branch(x) for branch in self.branches]
        logits = self.logits(functional.sk_fuse(maps))
        return functional.sk_select(maps, logits)

    def logits(self, pooled: Tensor) -> Tensor:
        """Maps the pooled sum [B, out_channels] to logits [B, M, out_channels] (eqs. 3 and 5)."""
        self._check_batch(pooled.shape[0])
        wide: Tensor = self.fc2(self.fc1(pooled[:, :, None, None]))
        return wide.reshape(pooled.shape[0], self.M, pooled.shape[1])

    def _parts(self) -> parts.Parts | None:
        # Asked at every call, and attributes of modules are slow.
        children: Any = self._modules
        blocks = [parts.sequential(x) for x in children["branches"]._modules.values()]
        return parts.parts_of(blocks, parts.sequential(children["fc1"]), children["fc2"])

    def _check_batch(self, size: int) -> None:
        if is_symbolic(size) or size != 1:
            return
        bn = getattr(self.fc1, "bn", None)
        alone = isinstance(bn, parts.NORMS) and bn.training and parts.group_of(bn) is None
        if alone:
            raise ValueError(
                "x: SKConv in training needs a batch of at least 2, because fc1's batch norm sees "
                "one value per channel and image, got 1; SKConv(..., fc_norm='layer') takes any "
                "batch, and so does .eval()"
            )

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuses torch.jit.script, which asks every module for its form in TorchScript."""
        raise NotImplementedError(
            "SKConv: torch.jit.script cannot compile this module; use torch.export.export, or "
            "torch.jit.trace of the model in eval mode"
        )

    def extra_repr(self) -> str:
        """Shows what the child modules do not."""
        return f"M={self.M}, aggregate={self.aggregate!r}"


def _branch_specs(
    branches: Sequence[BranchSpec | tuple[int, int, int]] | None, M: int, G: int
) -> list[BranchSpec]:
    if branches is None:
        if M < 1:
            raise ValueError(f"M: expected at least one branch, got {M}")
        return [BranchSpec(3, 1 + i, G) for i in range(M)]
    if not branches:
        raise ValueError("branches: expected at least one, got none")
    return [spec if isinstance(spec, BranchSpec) else BranchSpec(*spec) for spec in branches]


def _check_sizes(specs: list[BranchSpec], **sizes: int) -> None:
    _check_positive(**sizes)
    for i, spec in enumerate(specs):
        for name in ("in_channels", "out_channels"):
            if sizes[name] % spec.groups:
                raise ValueError(
                    f"{name}: expected a multiple of the groups of branch {i}, {spec.groups}, "
                    f"got {sizes[name]}"
                )


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected a positive number, got {size}")


def _fc1(in_channels: int, width: int, norm: FcNorm, **factory: Any) -> nn.Sequential:
    if norm == "batch":
        return conv_bn(in_channels, width, **factory)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    modules["conv"] = nn.Conv2d(in_channels, width, 1, bias=norm == "none", **factory)
    if norm == "layer":
        modules["norm"] = nn.GroupNorm(1, width, **factory)
    modules["act"] = nn.ReLU(inplace=True)
    return nn.Sequential(modules)
