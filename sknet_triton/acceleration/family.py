"""What is known of one structure of selective-kernel module, and the structures that are known."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sknet_triton import functional
from sknet_triton.backend import takes_triton
from sknet_triton.functional import Activation, Reduction
from sknet_triton.layers import parts
from sknet_triton.layers.parts import Parts


def _unchanged(module: nn.Module, out: Tensor) -> Tensor:
    return out


@dataclass(frozen=True)
class Family:
    """One structure of module: sum, average over space, small MLP, activation, weighted sum.

    The functions take the module and read its children and attributes; none of them needs the
    package that the module comes from. A family that `accelerate` knows is pickled by its name.

    Attributes:
        name: what reports call it.
        recognises: tells whether a module has the structure. It may be generous: `accelerate`
            compares with the module's own forward before it swaps.
        maps: the module's inputs -> M branches [B, C, *spatial], in any strides. Branches of
            several dtypes, as autocast makes them, are promoted to one.
        logits: the pooled branches [B, C] -> [B, M, C], in any strides.
        example: inputs of forward for that comparison, in float64 on the CPU. A call with other
            arguments than as many, the first of forward's, runs the module's own forward.
        finish: V -> what the module returns.
        activation: as in `functional.sk_select`.
        reduction: as in `functional.sk_fuse`.
        parts: what lies between the convolutions and V where the branches are convolution,
            batch norm and ReLU and the MLP likewise, for `functional.sk_fuse_select` to compute;
            the function may return None, too.
        branch_inputs: the module's input -> the input of every branch's convolution; None where
            each gets the module's own.
        stacks: whether the module's own forward stacks the branches. Where it does not, and
            torch.compile fuses it without our kernels, there is nothing to gain: it runs itself.
    """

    name: str
    recognises: Callable[[Any], bool]
    maps: Callable[..., Sequence[Tensor]]
    logits: Callable[[Any, Tensor], Tensor]
    example: Callable[[Any], tuple[Any, ...]]
    finish: Callable[[Any, Tensor], Tensor] = _unchanged
    activation: Activation | None = "softmax"
    reduction: Reduction = "mean"
    parts: Callable[[Any], Parts | None] | None = None
    branch_inputs: Callable[[Any, Any], Sequence[Any]] | None = None
    stacks: bool = True

    def forward(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Computes what the module's own forward does."""
        out = self.through_fuse_select(module, *inputs)
        return self.through_stages(module, *inputs) if out is None else out

    def pays(self, inputs: tuple[Any, ...]) -> bool:
        """Tells whether to prefer it to the module's own forward on ``inputs``."""
        if self.stacks or not torch.compiler.is_dynamo_compiling():
            return True
        first = inputs[0][0] if isinstance(inputs[0], (list, tuple)) else inputs[0]
        return takes_triton(first)

    def through_stages(self, module: nn.Module, *inputs: Any) -> Tensor:
        """Calls the module's children, fuse and select."""
        maps, logits = self.maps_and_logits(module, *inputs)
        out = functional.sk_select(maps, logits, activation=self.activation)
        return self.finish(module, out)

    def maps_and_logits(self, module: nn.Module, *inputs: Any) -> tuple[Sequence[Tensor], Tensor]:
        """Returns the M branches, of one dtype, and their logits [B, M, C]."""
        maps = _promoted(self.maps(module, *inputs))
        return maps, self.logits(module, functional.sk_fuse(maps, reduction=self.reduction))

    def through_fuse_select(self, module: nn.Module, *inputs: Any) -> Tensor | None:
        """Calls the convolutions and `functional.sk_fuse_select`; None where it may not."""
        find = self.parts
        fusible = None if find is None else parts.fusible(lambda: find(module), inputs[0])
        if fusible is None:
            return None
        (x,), (found, way) = inputs, fusible
        inputs_of = self.branch_inputs
        each = [x] * len(found.branches) if inputs_of is None else inputs_of(module, x)
        maps = [branch.conv(part) for branch, part in zip(found.branches, each, strict=True)]
        return self.finish(module, parts.run(found, _promoted(maps), way))

    def __reduce__(self) -> str | tuple[Any, ...]:
        # Its functions may be lambdas, which pickle cannot find.
        if _known.get(self.name) is self:
            return family_called, (self.name,)
        return super().__reduce__()


def _promoted(maps: Sequence[Tensor]) -> Sequence[Tensor]:
    """Brings maps to one dtype, as torch.stack and torch.cat do."""
    if all(x.dtype == maps[0].dtype for x in maps):
        return maps
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in maps))
    return [x.to(dtype) for x in maps]


# By name, in the order that they were registered; the built-in ones are never forgotten.
_known: dict[str, Family] = {}
_built_in: set[str] = set()


def families() -> tuple[Family, ...]:
    """Returns the families in the order that they are tried, the last one registered first."""
    return tuple(reversed(_known.values()))


def family_called(name: str) -> Family:
    """Returns the family of that name, of which a pickle holds nothing else."""
    if name not in _known:
        raise ValueError(
            f"name: expected one of {sorted(_known)}, got {name!r}; register_family adds a family, "
            "which a module that was saved with it needs before it is loaded"
        )
    return _known[name]


def register_family(family: Family) -> None:
    """Makes `accelerate` recognise a structure of your own.

    Raises:
        TypeError: ``family`` is not a `Family`.
        ValueError: a family of that name is known already.
    """
    if not isinstance(family, Family):
        raise TypeError(f"family: expected a Family, got {type(family).__name__}")
    if family.name in _known:
        raise ValueError(f"family: the name {family.name!r} is taken; unregister_family frees it")
    _known[family.name] = family


def register_built_in(*built_in: Family) -> None:
    """Registers the families of this package, which are tried in the order given."""
    for family in reversed(built_in):
        register_family(family)
        _built_in.add(family.name)


def unregister_family(name: str) -> None:
    """Forgets a family of the user's own; modules that were swapped stay so.

    Raises:
        ValueError: none of that name was registered.
    """
    own = _known.keys() - _built_in
    if name not in own:
        raise ValueError(f"name: expected one of {sorted(own)}, got {name!r}")
    del _known[name]
