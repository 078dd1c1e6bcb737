"""Selective-kernel and squeeze-and-excitation networks of timm, where it can be imported.

They compute something else than ours, with their own parameters; each is checked against its own
float64 run.
"""

from typing import Literal

from torch import nn

from perf.rows.schema import Case

Competitor = Literal["timm-sk", "timm-se"]

_MODELS: dict[tuple[Competitor, str], str] = {
    ("timm-sk", "sknet50"): "skresnext50_32x4d",
    ("timm-se", "sknet50"): "seresnext50_32x4d",
}


def unavailable(source: Competitor, case: Case) -> str | None:
    """Tells why ``source`` cannot carry out ``case``; None where it can."""
    if not _has_counterpart(source, case):
        return f"{source} has no counterpart of {case.workload} with M={case.M}"
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        # A torchvision that was built for another torch fails with a RuntimeError.
        return f"timm cannot be imported: {error}"
    return None


def build(source: Competitor, case: Case) -> nn.Module:
    """Returns timm's counterpart of the workload, with timm's own initialisation."""
    import timm
    from timm.layers.selective_kernel import SelectiveKernel

    if case.workload == "sk_conv":
        layer: nn.Module = SelectiveKernel(
            case.C, case.C, kernel_size=[3, 5], groups=32, split_input=False
        )
        return layer
    model: nn.Module = timm.create_model(_MODELS[source, case.workload])
    return model


def _has_counterpart(source: Competitor, case: Case) -> bool:
    if case.M != 2:
        return False
    return (source, case.workload) in _MODELS or (source, case.workload) == ("timm-sk", "sk_conv")
