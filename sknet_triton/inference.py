"""Folding batch norms into the convolutions before them, for inference."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sknet_triton.layers import SKConv, SKUnit
from sknet_triton.layers.parts import NORMS, any_hook
from sknet_triton.models import SKNet
from sknet_triton.reference import accumulation_dtype

_Model = TypeVar("_Model", bound=nn.Module)


def fuse_bn(model: _Model) -> _Model:
    """Folds the batch norms of selective-kernel layers into their convolutions, in place.

    Folded are the stem of an `SKNet`, reduce, increase and shortcut of an `SKUnit`, and the
    branches of an `SKConv` that only sums them or whose fc1 has no batch norm. The norms become
    ``nn.Identity``; names and ``forward`` stay. Other layers of ``model`` are left as they are.

    The norms of any other `SKConv` stay where they are: `functional.sk_fuse_select` normalises
    and rectifies while it reads the branches, in 2M + 1 passes altogether. Folding would save it
    none of them and would leave M operators for the ReLUs, of two passes each.

    Skipped is a pair of convolution and norm of which one has a hook or a parametrization, is of
    another type or is used in a second place, or where the norm has no running statistics.

    The state dict changes: a folded pair has ``conv.bias`` and no entries of ``bn``. Load
    checkpoints first, then fold. Results change by rounding only. A second call changes nothing.

    Args:
        model: a network or layer in eval mode that contains selective-kernel layers.

    Returns:
        ``model``.

    Raises:
        ValueError: ``model`` or one of its batch norms is in training mode; nothing is changed.
    """
    _check_eval(model)
    # Not children(), which leaves out the second name of a module.
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    blocks = {id(block): block for block in _blocks(model) if _is_foldable(block, uses)}
    # All are computed before the first is put in place: an error leaves the model whole.
    folded = [(block, _folded(cast(Any, block))) for block in blocks.values()]
    for block, conv in folded:
        block.add_module("conv", conv)
        block.add_module("bn", nn.Identity())
    return model


def _check_eval(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if module.training and (module is model or isinstance(module, _BatchNorm)):
            where = f"model.{name}" if name else "model"
            raise ValueError(
                "model: expected eval mode, because statistics of a batch cannot be folded into "
                f"weights, got {where} in training mode; call model.eval() first"
            )


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yields what may hold a pair to fold."""
    for module in model.modules():
        if isinstance(module, SKNet):
            yield module.stem
        elif isinstance(module, SKUnit):
            yield from (module.reduce, module.increase, module.shortcut)
        elif isinstance(module, SKConv) and (
            module.aggregate == "sum" or not hasattr(module.fc1, "bn")
        ):
            # `sk_fuse_select` applies the norms of any other on the fly.
            yield from module.branches


def _is_foldable(block: nn.Module, uses: Counter[int]) -> bool:
    if type(block) is not nn.Sequential:
        return False
    pair = [*block.named_children()][:2]
    if [name for name, _ in pair] != ["conv", "bn"]:
        return False
    conv, bn = cast(Any, block).conv, cast(Any, block).bn
    # A parametrized module has a type of its own.
    if type(conv) is not nn.Conv2d or type(bn) not in NORMS or bn.running_mean is None:
        return False
    free = not any_hook((conv, bn), everywhere=False)
    return free and uses[id(conv)] == uses[id(bn)] == 1


def _folded(block: Any) -> nn.Conv2d:
    """Returns a new convolution that does what ``block.conv`` and ``block.bn`` do, rounded once."""
    dtype, trained = block.conv.weight.dtype, block.conv.weight.requires_grad
    conv, bn = (copy.deepcopy(module).eval() for module in (block.conv, block.bn))
    wide = accumulation_dtype(dtype)
    folded: nn.Conv2d = fuse_conv_bn_eval(conv.to(wide), bn.to(wide)).to(dtype)
    return folded.requires_grad_(trained)
