"""The table of what every kernel compiles to, on a machine that needs no GPU."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import pandas as pd

from perf.static.aot import TARGETS, Target, compile_launch
from perf.static.specialisations import specialisations


def kernel_table() -> pd.DataFrame:
    """Compiles every specialisation for every target: one row each, by target and kernel."""
    # Spawned, because compilers keep threads that a fork would lose.
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return pd.DataFrame([row for rows in pool.map(_rows, TARGETS) for row in rows])


def _rows(target: Target) -> list[dict[str, Any]]:
    rows = []
    for spec in specialisations(target.facts):
        B, C, S = spec.shape
        rows.append(
            {
                "target": target.name,
                "kernel": spec.launch.kernel.__name__.strip("_").removesuffix("_kernel"),
                "stage": spec.stage,
                "M": spec.M,
                "layout": spec.layout,
                "dtype": str(spec.dtype).removeprefix("torch."),
                "B": B,
                "C": C,
                "S": S,
                "splits": spec.splits,
                "block_c": spec.launch.constants.get("BLOCK_C"),
                "block_s": spec.launch.constants.get("BLOCK_S"),
                "num_warps": spec.launch.num_warps,
                "fast": spec.is_fast,
                "reduces": spec.is_reduction,
                "streaming": spec.is_streaming,
                **asdict(compile_launch(spec.launch, target)),
            }
        )
    return rows
