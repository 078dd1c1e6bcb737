"""The table of what every kernel compiles to, on a machine that needs no GPU."""

import multiprocessing
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch

from perf.static.aot import MODELLED, TARGETS, compile_launch
from perf.static.model import ceiling
from perf.static.specialisations import (
    BATCHES,
    FAST_SHAPE,
    LAYOUTS,
    SHORT_ROWS,
    Setting,
    kernel_name,
    settings,
    streaming_kernel,
)
from sknet_kernels.config import MAX_BRANCHES
from sknet_kernels.launch import Launch


def kernel_table(
    targets: Sequence[str], branches: Sequence[int] = (), at_risk: bool = False
) -> pd.DataFrame:
    """Compiles the launches of every setting for ``targets``: a row each.

    With ``branches`` these are a training step's with so many branches of one shape. Else, of the
    target that is modelled they are all, of others those whose kernels differ by more than a tile;
    with ``at_risk`` only those that a change of tiles or compilers breaks first.
    """
    # By layouts first: those of one target share kernels, which the second finds in Triton's cache.
    order = [name for name in TARGETS if name in targets]
    shares = [(name, layout, branches, at_risk) for layout in LAYOUTS for name in order]
    # Spawned, because compilers keep threads that a fork would lose.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=spawn, initializer=_end_with_parent) as pool:
        table = pd.DataFrame([row for rows in pool.map(_rows, shares) for row in rows])
    return table.sort_values("target", key=lambda names: names.map(order.index), kind="stable")


def _end_with_parent() -> None:
    """Ends this process where its parent is killed, which would otherwise compile on for nobody."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _rows(share: tuple[str, str, Sequence[int], bool]) -> list[dict[str, Any]]:
    target, layout, branches, at_risk = share
    rows = []
    for setting in settings(branches):
        if setting.layout == layout:
            launches = _launches(setting, target, branches, at_risk)
            rows += [_row(setting, launch, target) for launch in launches]
    return rows


def _launches(
    setting: Setting, target: str, branches: Sequence[int], at_risk: bool
) -> list[Launch]:
    """Returns the launches of ``setting`` to compile: all, a training step's, or none."""
    modelled, facts = target == MODELLED, TARGETS[target].facts
    fast, most = setting.shape == FAST_SHAPE, setting.M == MAX_BRANCHES
    if branches:
        every, training = False, True
    elif at_risk:
        every = setting.is_fast
        # float16 is bfloat16 but for a conversion.
        training = (modelled and setting.dtype != torch.float16) or (fast and most)
    else:
        every = modelled or (fast and (setting.is_usual or most))
        B, _, S = setting.shape
        # Rows that do not fill a tile are read in ways of their own.
        short = setting.layout == "contiguous" and S in SHORT_ROWS
        training = fast or (setting.is_usual and short and BATCHES[-1] == B)
    if every:
        return setting.launches(facts)
    return setting.training(facts) if training else []


def _row(setting: Setting, launch: Launch, target: str) -> dict[str, Any]:
    compiled, kernel = compile_launch(launch, TARGETS[target]), streaming_kernel(launch)
    B, C, S = setting.shape
    constants, tile = launch.constants, launch.constants.get("TILE")
    row = {
        "target": target,
        "kernel": kernel_name(launch),
        "norm": launch.pointers.get("norm_ptrs", True) is not None,
        "M": setting.M,
        "layout": setting.layout,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "B": B,
        "C": C,
        "S": S,
        "splits": launch.scalars.get("splits"),
        "block_c": constants.get("BLOCK_C", tile and tile.block_c),
        "block_s": tile and tile.block_s,
        "num_warps": launch.num_warps,
        "num_stages": tile and tile.num_stages,
        "access": tile and tile.align,
        "reading": tile and tile.layout,
        "fast": setting.is_fast,
        "streaming": kernel is not None,
        "writes": kernel is not None and any(kernel.writes),
        **asdict(compiled.resources),
    }
    if kernel is None or target != MODELLED:
        return row
    return {**row, **asdict(ceiling(setting, kernel, launch, compiled))}
