"""How a provider is drawn, the same in every figure: colour for whose code, the rest for how.

The colours are Okabe and Ito's, which differ under every common colour blindness; ours are blue and
green. Lines, markers and hatches differ in print.
"""

from dataclasses import dataclass

from perf.sweep.providers import PROVIDERS, Wrap

SMALL = 8


@dataclass(frozen=True)
class Look:
    """Colour, marker of a point, style of a line and hatch of a bar."""

    colour: str
    marker: str
    line: str
    hatch: str


_COLOURS = {
    "plain": "#D55E00",
    "port": "#E69F00",
    "ours-pytorch": "#0072B2",
    "ours-triton": "#009E73",
    "timm-sk": "#CC79A7",
    "timm-se": "#8C8C8C",
}
_WRAPS: dict[Wrap, tuple[str, str, str]] = {
    "eager": ("o", "-", ""),
    "compile": ("s", "--", "///"),
    "reduce-overhead": ("P", "-.", "++"),
    "max-autotune": ("D", "-.", "xxx"),
    "max-autotune-no-cudagraphs": ("v", ":", "..."),
    "cudagraph": ("^", ":", "|||"),
}


_CODE = {
    "plain": "PyTorch as in tutorials",
    "port": "PyTorch as in common ports",
    "ours-pytorch": "this package, no Triton",
    "ours-triton": "this package, Triton kernels",
    "timm-sk": "timm's selective kernels",
    "timm-se": "timm's squeeze and excitation",
}
_CALL: dict[Wrap, str] = {
    "eager": "",
    "compile": ", torch.compile",
    "reduce-overhead": ", reduce-overhead",
    "max-autotune": ", max-autotune",
    "max-autotune-no-cudagraphs": ", max-autotune, no graphs",
    "cudagraph": ", CUDA graph",
}


def explained(provider: str) -> str:
    """Returns the name of a provider, and below it whose code runs and how."""
    chosen = PROVIDERS[provider]
    return f"{provider}\n({_CODE[chosen.code]}{_CALL[chosen.wrap]})"


def look(provider: str) -> Look:
    """Returns the look of a provider."""
    chosen = PROVIDERS[provider]
    return Look(_COLOURS[chosen.code], *_WRAPS[chosen.wrap])
