"""Cases, bounds and comparisons that the tests share."""

import copy
import os
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sknet_triton import Backend, SKConv, SKNet, StageSpec
from sknet_triton.functional import BatchNormArgs, FuseSelect
from tests.plain_sknet import scramble

needs_compiler = pytest.mark.skipif(
    sys.platform == "win32" or not (shutil.which("g++") or shutil.which("clang++")),
    reason="Inductor compiles for the CPU with a C++ compiler, and there is none",
)

ROOT = Path(__file__).parent.parent
# Where packages are installed.
SITE = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
# Where kernels run: a GPU, or the CPU under the interpreter.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

FLOAT64: dict[str, Any] = {"device": DEVICE, "dtype": torch.float64}

BACKENDS: tuple[Backend, ...] = ("reference", "triton")
# What two ways to compute the same float64 may differ by, in units of the largest value: the order
# of a few hundred additions (10^4 eps), and the same through the layers of a network.
EXACT, EXACT_NETWORK = 1e-11, 1e-9

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """Branches to test with, and why."""

    shape: tuple[int, ...]
    M: int = 2
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    why: str = ""

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{size}-M{self.M}-{self.layout}-{str(self.dtype).removeprefix('torch.')}"

    def tensor(self, seed: int = 0, device: torch.device = DEVICE) -> Tensor:
        """Returns one random tensor of the case."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return laid_out(x.to(self.dtype).to(device), self.layout)

    def branches(self, device: torch.device = DEVICE) -> list[Tensor]:
        """Returns M random branches; each differs from the others."""
        return [self.tensor(1 + i, device) for i in range(self.M)]

    def logits(self, device: torch.device = DEVICE) -> Tensor:
        """Returns random logits [B, M, C], wide enough for weights far from 1 / M."""
        B, C = self.shape[:2]
        return 2 * torch.randn(B, self.M, C, dtype=self.dtype, device=device)


# The sizes that must be right, small enough for the interpreter: S = 1, a prime, the network's
# 49, 196 and 3136, and 50176; C = 1, 24, 63, 128, 1024; an empty batch; 1, 2 and 3 axes of space.
CASES = (
    Case((2, 24, 7, 7), why="S = 49 is a multiple of nothing"),
    Case((2, 24, 7, 7), layout="channels_last"),
    Case((1, 63, 14, 14), M=3, dtype=torch.float16, why="S = 196 is a multiple of 4, C of nothing"),
    Case((1, 63, 14, 14), M=3, layout="channels_last"),
    Case((1, 2, 56, 56), dtype=torch.bfloat16, why="S = 3136: several tiles a row"),
    Case((1, 16, 56, 56), layout="channels_last", dtype=torch.bfloat16),
    Case((1, 1, 224, 224), dtype=torch.float16, why="C = 1, S = 50176"),
    Case((1, 1, 224, 224), M=1, layout="channels_last"),
    Case((2, 1024, 1, 1), why="S = 1, C = 1024"),
    Case((2, 128, 1, 1), layout="channels_last", dtype=torch.float16),
    Case((1, 1, 1), M=2, why="every size is one, which Triton makes a constant"),
    Case((3, 5, 101), M=4, dtype=torch.bfloat16, why="one axis of space, prime"),
    Case((3, 5, 101), M=2, layout="channels_last"),
    Case((2, 3, 2, 3, 5), M=5, why="three axes of space"),
    Case((2, 3, 2, 3, 5), M=2, layout="channels_last", dtype=torch.float64),
    Case((1, 4, 5, 5), M=8, why="as many branches as the kernels take"),
    Case((0, 4, 3, 3), why="an empty batch"),
    Case((2, 0, 3, 3), why="no channels"),
    Case((2, 8, 6, 6), layout="sliced", why="channels of a wider tensor"),
    Case((2, 8, 6, 6), layout="unaligned", dtype=torch.bfloat16, why="a storage offset of one"),
    Case((2, 8, 6, 6), layout="cropped", why="space that is no single axis: copied"),
    Case((2, 8, 6, 5), layout="transposed", why="dense, but height runs fastest"),
    Case((2, 8, 6, 6), layout="expanded", why="stride 0 along the batch"),
    Case((2, 3, 4, 4), M=2, dtype=torch.float64),
)

every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow) if c.shape[-1] == 224 else c for c in CASES],
    ids=str,
)


def small_conv(**options: Any) -> SKConv:
    """Returns an SKConv of 4 channels, in float64 and where kernels run: always the same."""
    torch.manual_seed(3)
    return scramble(SKConv(4, 4, **{"G": 2, "d": 3, **FLOAT64, **options}))


def small_network(units: int = 1, **options: Any) -> SKNet:
    """Returns an SKNet of one stage for images of 4 channels, likewise."""
    torch.manual_seed(3)
    stage = StageSpec(4, units, 1, d=3)
    options = {"num_classes": 3, "in_chans": 4, "unit_options": {"G": 2}, **FLOAT64, **options}
    return scramble(SKNet((stage,), **options))


def images(
    B: int = 4, size: tuple[int, int] = (5, 4), seed: int = 1, device: torch.device = DEVICE
) -> Tensor:
    """Returns what `small_conv` takes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, 4, *size, dtype=torch.float64, generator=generator).to(device)


def one_by_one(sk: SKConv) -> SKConv:
    """Returns a copy that a do-nothing hook keeps from using `sk_fuse_select`."""
    return call_one_by_one(copy.deepcopy(sk))


def call_one_by_one(sk: SKConv) -> SKConv:
    """Puts the hook into ``sk`` itself."""
    sk.fc2.register_forward_hook(lambda *_: None)
    assert not is_plain(sk)
    return sk


def source_environment(**variables: str) -> dict[str, str]:
    """Returns the environment of a child process that imports this checkout."""
    roots = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": roots, **variables}


def run_python(*arguments: str | Path, cwd: Path = ROOT, **variables: str) -> str:
    """Runs Python in a process that imports this checkout; returns what it prints."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=source_environment(**variables), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_alone(code: str, *path: str | Path, cwd: Path, **variables: str) -> str:
    """Runs ``code`` in a process that imports from ``path`` and nowhere else; returns its output.

    -I and -S leave the checkout, the user's folder and every .pth file out.
    """
    found = f"import sys\nsys.path[:0] = {[*map(str, path)]}\n"
    variables = {"TRITON_INTERPRET": "0", "SKNET_TRITON_BACKEND": "auto", **variables}
    return run_python("-I", "-S", "-c", found + code, cwd=cwd, **variables)


_LAID_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "sliced": lambda x: torch.cat([x + 1e4, x, x + 1e4], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "cropped": lambda x: F.pad(x, (1, 1, 1, 1), value=1e4)[..., 1:-1, 1:-1],
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "expanded": lambda x: x[:1].expand(x.shape),
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Returns the values of ``x`` [B, C, *spatial] in another memory layout."""
    return _LAID_OUT[layout](x)


Seen = dict[str, Tensor]


def ramp(out: Tensor) -> Tensor:
    """Returns a gradient for ``out``, of both signs."""
    return torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view_as(out)


def outcome(
    run: Callable[..., Tensor],
    module: nn.Module,
    x: Tensor | Sequence[Tensor],
    dout: Tensor | None = None,
    forward: AbstractContextManager[Any] | None = None,
) -> Seen:
    """Runs forward and backward of ``run``, a module or what was made of it, once.

    Where ``x`` is a list it is passed as one; the default of ``dout`` is `ramp`; only the forward
    is run in ``forward``. Returns "out"; "dx", or "dx0", "dx1", ... for a list;
    "grad NAME" of every parameter of ``module`` that got one; and every buffer by its name.
    """
    leaves = [t.detach().requires_grad_() for t in ([x] if isinstance(x, Tensor) else x)]
    module.zero_grad()
    with forward or nullcontext():
        out = run(leaves[0] if isinstance(x, Tensor) else leaves)
    torch.autograd.backward([out], [ramp(out) if dout is None else dout])
    names = ["dx"] if isinstance(x, Tensor) else [f"dx{i}" for i in range(len(leaves))]
    seen = {"out": out.detach()}
    seen |= {name: cast(Tensor, leaf.grad) for name, leaf in zip(names, leaves, strict=True)}
    seen |= {f"grad {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    return {name: t.clone() for name, t in {**seen, **dict(module.named_buffers())}.items()}


def without_buffers(seen: Seen) -> Seen:
    """Returns the output and the gradients of an `outcome`."""
    return {name: t for name, t in seen.items() if name.startswith(("out", "dx", "grad "))}


def state_of(model: nn.Module) -> Seen:
    """Returns every gradient that there is, parameter and buffer."""
    seen = {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return seen | {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same(actual: Seen, expected: Seen, bound: float = EXACT, least: float = 0.0) -> None:
    """Asserts the same names, shapes and values, up to ``bound`` times a tensor's largest value.

    That is at least ``least``, where a tensor is nothing but rounding: the gradient of a bias in
    front of a batch norm. A bound of 0 compares dtypes and bits.
    """
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        if bound == 0:
            assert actual[name].dtype == value.dtype, name
            assert torch.equal(actual[name], value), name
        elif value.numel():
            scale = max(value.abs().max().item(), least) or 1.0
            error = (actual[name].to(value.device).double() - value.double()).abs().max().item()
            assert error < bound * scale, f"{name}: off by {error}, its largest value is {scale}"


def assert_close(
    actual: Iterable[Tensor], expected: Iterable[Tensor], bound: float = EXACT
) -> None:
    """Asserts the same float64 tensors one by one, up to another order of operations."""
    for got, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=bound, atol=bound)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Asserts that the block leaves the modules themselves and every value as they are."""
    modules, state = [*model.modules()], copy.deepcopy(model.state_dict())
    yield
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert_same(model.state_dict(), state, bound=0)


def message_of(error: type[Exception], call: Callable[[], object]) -> str:
    """Returns the whole message of the error that ``call`` raises."""
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def assert_matches(
    actual: Tensor, oracle: Tensor, magnitude: Tensor, terms: float = 1.0, name: str = "result"
) -> None:
    """Asserts that ``actual`` is ``oracle``, in float64, up to rounding in its own dtype.

    A result kept in float32 and cast once is off by that cast and by a few float32 ulps of what
    was added: ``terms`` of ``magnitude``, the same sums over absolute values or what bounds them.
    """
    actual = actual.detach()
    accumulated = torch.float64 if actual.dtype == torch.float64 else torch.float32
    bound = (
        store_rounding(actual) * torch.finfo(actual.dtype).eps * oracle.abs()
        + terms * torch.finfo(accumulated).eps * magnitude
        + torch.finfo(actual.dtype).smallest_normal
    )
    assert actual.shape == oracle.shape, f"{name}: {tuple(actual.shape)}"
    error = (actual.double() - oracle).abs()
    bad = ~(error <= bound)
    assert not bad.any(), (
        f"{name}: {int(bad.sum())} of {bad.numel()} elements off, the first at "
        f"{bad.nonzero()[0].tolist()}: got {actual[bad][0].item()}, "
        f"expected {oracle[bad][0].item()} within {bound[bad][0].item()}"
    )


def store_rounding(x: Tensor) -> float:
    """Returns the error of one cast to the dtype of ``x``, in ulps.

    Hardware rounds to nearest; the interpreter cuts the tail off a bfloat16.
    """
    return 1.01 if x.dtype == torch.bfloat16 and x.device.type == "cpu" else 0.51


def wide(xs: Sequence[Tensor]) -> list[Tensor]:
    """Returns float64 copies, without history."""
    return [x.detach().double() for x in xs]


def magnitudes(xs: Sequence[Tensor]) -> list[Tensor]:
    """Returns the absolute values, in float64."""
    return [x.abs() for x in wide(xs)]


def weights(logits: Tensor, activation: str | None = "softmax") -> Tensor:
    """Returns the branches' weights [B, M, C], written out."""
    if activation == "softmax":
        exponentials = (logits - logits.amax(1, keepdim=True)).exp()
        return exponentials / exponentials.sum(1, keepdim=True)
    return 1 / (1 + (-logits).exp()) if activation == "sigmoid" else logits


def weighed(xs: Sequence[Tensor], attn: Tensor) -> Tensor:
    """Returns the sum of the branches, each times its weight [B, M, C]."""
    stacked = torch.stack([x.flatten(2) for x in xs], 1)
    return (stacked * attn[..., None]).sum(1).view(xs[0].shape)


def averaged(xs: Sequence[Tensor], reduction: str = "mean") -> Tensor:
    """Returns the sum of the branches, and its average over space or its sum: [B, C]."""
    total = torch.stack(list(xs)).sum(0).flatten(2)
    return total.mean(2) if reduction == "mean" else total.sum(2)


def beside_branches(
    M: int,
    C: int,
    *,
    d: int = 3,
    batch_stats: bool = True,
    fc1_batch_stats: bool | None = None,
    affine: bool = True,
    biases: bool = True,
    dtype: torch.dtype = torch.float64,
    draw: Callable[..., Tensor] | None = None,
) -> dict[str, Any]:
    """Returns what `sk_fuse_select` takes beside branches, by name.

    The values are normal numbers in float64, those of ``draw`` where it is given, in ``dtype``.
    """
    draw = draw or partial(torch.randn, dtype=torch.float64, device=DEVICE)

    def vector(n: int, there: bool = True) -> Tensor | None:
        return draw(n).to(dtype) if there else None

    def norm(n: int, batch: bool) -> BatchNormArgs:
        weight, bias, mean = vector(n, affine), vector(n, affine), vector(n, not batch)
        var = None if batch else (draw(n).abs() + 0.5).to(dtype)
        return BatchNormArgs(weight, bias, mean, var, 1e-3, batch)

    return {
        "norms": [norm(C, batch_stats) for _ in range(M)],
        "fc1_weight": (draw(d, C) / C**0.5).to(dtype),
        "fc1_norm": norm(d, batch_stats if fc1_batch_stats is None else fc1_batch_stats),
        "fc2_weight": (draw(M * C, d) / d**0.5).to(dtype),
        "fc1_bias": vector(d, biases),
        "fc2_bias": vector(M * C, biases),
    }


def trained(arguments: dict[str, Any]) -> list[Tensor]:
    """Returns what has a gradient of `beside_branches`, as leaves that ask for one."""
    norms = [*arguments["norms"], arguments["fc1_norm"]]
    found = [x for n in norms for x in (n.weight, n.bias)]
    found += [x for name, x in arguments.items() if "norm" not in name]
    return [x.requires_grad_() for x in found if x is not None]


def plain_fuse_select(
    xs: Sequence[Tensor],
    norms: Sequence[BatchNormArgs],
    fc1_weight: Tensor,
    fc1_norm: BatchNormArgs,
    fc2_weight: Tensor,
    fc1_bias: Tensor | None = None,
    fc2_bias: Tensor | None = None,
) -> FuseSelect:
    """Computes `functional.sk_fuse_select` as modules in a row would."""

    def activated(x: Tensor, n: BatchNormArgs) -> Tensor:
        running = (None, None) if n.batch_stats else (n.running_mean, n.running_var)
        return F.batch_norm(x, *running, n.weight, n.bias, n.batch_stats, eps=n.eps).relu()

    def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.detach().transpose(0, 1).flatten(1)
        return rows.mean(1), rows.var(1)

    us = [activated(x, n) for x, n in zip(xs, norms, strict=True)]
    hidden = F.linear(averaged(us), fc1_weight, fc1_bias)
    wide = F.linear(activated(hidden, fc1_norm), fc2_weight, fc2_bias)
    out = weighed(us, torch.softmax(wide.view(len(hidden), len(us), -1), 1))
    kept: Any = (None, None)
    if norms[0].batch_stats:
        kept = map(torch.stack, zip(*map(statistics, xs), strict=True))
    return FuseSelect(out, *kept, *(statistics(hidden) if fc1_norm.batch_stats else (None, None)))


def is_plain(sk: SKConv) -> bool:
    """Tells whether what lies between the convolutions and V is what `sk_fuse_select` computes."""
    return sk._parts() is not None


class Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Records the calls of our operators, the inputs as they were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.calls: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "sknet_triton":
            name = func.name().partition("::")[2]
            self.calls[name] = func, tree_map_only(Tensor, Tensor.detach, args)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Counts the launches of every kernel inside, by its name: in the interpreter or on a GPU."""
    import triton
    from triton.runtime.interpreter import GridExecutor

    counts: Counter[str] = Counter()
    if torch.cuda.is_available():
        hook = triton.knobs.runtime.launch_enter_hook

        def entered(metadata: Any) -> None:
            counts[metadata.get()["name"]] += 1

        hook.add(entered)
        yield counts
        hook.remove(entered)
        return
    call = GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[self.fn.__name__] += 1
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", counted)
        yield counts
