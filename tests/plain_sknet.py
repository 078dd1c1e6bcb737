"""SKNet from the paper's equations, for tests, in functions of torch.

Nothing of the package is used here: convolutions are told what each equation says, the branches are
stacked, and weights come as a dict with the names of the module's state dict.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Scrambled = TypeVar("Scrambled", bound=nn.Module)
Tensors = Mapping[str, Tensor]
# (kernel, dilation, groups) of every branch
Branches = Sequence[tuple[int, int, int]]


@dataclass(frozen=True)
class PlainConfig:
    """What the tensors alone do not say about a selective-kernel convolution."""

    branches: Branches = ((3, 1, 32), (3, 2, 32))
    stride: int = 1
    training: bool = True
    aggregate: str = "sk"


def scramble(module: Scrambled, seed: int = 0) -> Scrambled:
    """Gives every norm and fc2 values that a forgotten or swapped term cannot hide behind."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        shape, cpu = tensor.shape, torch.device("cpu")
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device=cpu)
        tensor.copy_(low + (high - low) * drawn)

    with torch.no_grad():
        for path, child in module.named_modules():
            if isinstance(child, (_BatchNorm, nn.LayerNorm)):
                for name, tensor in child.state_dict().items():
                    if name in ("weight", "running_var"):
                        uniform(tensor, 0.5, 1.5)
                    elif name in ("bias", "running_mean"):
                        uniform(tensor, -0.3, 0.3)
            elif path.endswith(("fc2", "fc_select")) and isinstance(child, (nn.Conv2d, nn.Linear)):
                uniform(child.weight, -1.0, 1.0)
    return module


def for_norms(change: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
    """Returns what does ``change`` to every batch norm of a module."""

    def apply(top: nn.Module) -> None:
        for module in top.modules():
            if isinstance(module, nn.BatchNorm2d):
                change(module)

    return apply


def without_affine(bn: nn.BatchNorm2d) -> None:
    """Takes the weight and the bias out."""
    bn.affine = False
    bn.register_parameter("weight", None)
    bn.register_parameter("bias", None)


def without_tracking(bn: nn.BatchNorm2d) -> None:
    """Takes the running statistics out."""
    bn.track_running_stats = False
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        bn.register_buffer(name, None)


def leaves(module: nn.Module) -> dict[str, Tensor]:
    """Returns the module's tensors as float64 copies, the parameters with requires_grad."""
    tensors = {name: t.detach().double().clone() for name, t in module.state_dict().items()}
    for name, _ in module.named_parameters():
        tensors[name].requires_grad_()
    return tensors


def plain_conv(x: Tensor, weight: Tensor, stride: int, dilation: int, groups: int) -> Tensor:
    """Convolves, with zeros that keep the size at stride 1."""
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


def plain_batch_norm(x: Tensor, p: Tensors, name: str, training: bool) -> Tensor:
    """Normalises [B, C, ...], by the batch in training."""
    mean, var = (None if training else p[f"{name}.running_{kind}"] for kind in ("mean", "var"))
    return F.batch_norm(x, mean, var, p[f"{name}.weight"], p[f"{name}.bias"], training)


def plain_maps(x: Tensor, p: Tensors, config: PlainConfig, prefix: str = "") -> Tensor:
    """Returns the branches after their ReLU, stacked: [M, B, C, H', W']."""
    maps = []
    for i, (_, dilation, groups) in enumerate(config.branches):
        name = f"{prefix}branches.{i}"
        u = plain_conv(x, p[f"{name}.conv.weight"], config.stride, dilation, groups)
        maps.append(plain_batch_norm(u, p, f"{name}.bn", config.training).clamp(min=0))
    return torch.stack(maps)


def plain_logits(pooled: Tensor, p: Tensors, config: PlainConfig, prefix: str = "") -> Tensor:
    """Maps [B, C] to logits [M, B, C]: the rows of fc2 are branch-major."""
    z = pooled @ p[f"{prefix}fc1.conv.weight"].flatten(1).T
    if f"{prefix}fc1.conv.bias" in p:
        z = z + p[f"{prefix}fc1.conv.bias"]
    if f"{prefix}fc1.bn.weight" in p:
        z = plain_batch_norm(z, p, f"{prefix}fc1.bn", config.training)
    elif (norm := f"{prefix}fc1.norm") + ".weight" in p:
        z = F.layer_norm(z, z.shape[1:], p[f"{norm}.weight"], p[f"{norm}.bias"])
    z = z.clamp(min=0)
    rows = p[f"{prefix}fc2.weight"].flatten(1).chunk(len(config.branches))
    return torch.stack([z @ weight.T for weight in rows])


def plain_sk_conv(x: Tensor, p: Tensors, config: PlainConfig, prefix: str = "") -> Tensor:
    """Section 3.1 in full: split, fuse, select."""
    stacked = plain_maps(x, p, config, prefix)
    total = stacked.sum(0)
    if config.aggregate == "sum":
        return total
    attn = torch.softmax(plain_logits(total.mean((2, 3)), p, config, prefix), 0)
    return (attn[..., None, None] * stacked).sum(0)


def plain_sk_unit(x: Tensor, p: Tensors, config: PlainConfig, prefix: str = "") -> Tensor:
    """1x1 reduce, selective-kernel convolution, 1x1 increase, shortcut, ReLU."""
    training = config.training
    inner = plain_conv(x, p[f"{prefix}reduce.conv.weight"], 1, 1, 1)
    inner = plain_batch_norm(inner, p, f"{prefix}reduce.bn", training).clamp(min=0)
    inner = plain_sk_conv(inner, p, config, f"{prefix}sk.")
    inner = plain_conv(inner, p[f"{prefix}increase.conv.weight"], 1, 1, 1)
    inner = plain_batch_norm(inner, p, f"{prefix}increase.bn", training)
    if f"{prefix}shortcut.conv.weight" in p:
        x = plain_conv(x, p[f"{prefix}shortcut.conv.weight"], config.stride, 1, 1)
        x = plain_batch_norm(x, p, f"{prefix}shortcut.bn", training)
    return (inner + x).clamp(min=0)


def plain_max_pool(x: Tensor, padding: int) -> Tensor:
    """3x3 windows every two pixels; one may hang over the right and the lower edge.

    With padding 1 this is the usual pooling; with padding 0, Caffe's, which rounds up.
    """
    height, width = x.shape[2:]
    if padding == 1:
        x = F.pad(x, (1, 1, 1, 1), value=-torch.inf)
    else:
        x = F.pad(x, (0, 1 - width % 2, 0, 1 - height % 2), value=-torch.inf)
    windows = x.unfold(2, 3, 2).unfold(3, 3, 2)
    return windows.amax((-2, -1))


def plain_sknet(
    x: Tensor, p: Tensors, strides: Sequence[int], training: bool, pool_padding: int = 1
) -> list[Tensor]:
    """Returns the maps of the stem and of every stage, and the logits."""
    x = plain_conv(x, p["stem.conv.weight"], 2, 1, 1)
    maps = [plain_batch_norm(x, p, "stem.bn", training).clamp(min=0)]
    x = plain_max_pool(maps[0], pool_padding)
    for i, stage_stride in enumerate(strides):
        unit = 0
        while f"stages.{i}.{unit}.reduce.conv.weight" in p:
            stride = stage_stride if unit == 0 else 1
            config = PlainConfig(stride=stride, training=training)
            x = plain_sk_unit(x, p, config, f"stages.{i}.{unit}.")
            unit += 1
        maps.append(x)
    return [*maps, x.mean((2, 3)) @ p["head.weight"].T + p["head.bias"]]


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference in units of the largest expected value."""
    scale = expected.abs().max().item()
    return (actual.double() - expected).abs().max().item() / (scale or 1.0)


def distance(actual: Tensor | None, expected: Tensor | None) -> float:
    """Returns the 2-norm of the difference over that of what is expected, in float64."""
    assert actual is not None
    assert expected is not None
    error = torch.linalg.vector_norm(actual.detach().double() - expected.detach())
    return float(error / torch.linalg.vector_norm(expected.detach()))
