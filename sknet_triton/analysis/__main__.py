"""Worked examples: ``python -m sknet_triton.analysis digits`` or ``photos``.

Each is run from several seeds on one thread of the CPU. It writes a CSV and the paper's Figures 3
and 4, and prints by how much each unit's difference changes from 1.0 to 2.0.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import sknet_triton
from sknet_triton.analysis.examples import digits, photos
from sknet_triton.analysis.figures import plot_classes, plot_units, save_figure
from sknet_triton.analysis.record import SCALES
from sknet_triton.analysis.table import over_classes, write_csv

SEEDS = (0, 1, 2, 3, 4)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the example that the arguments name."""
    args = vars(_parser().parse_args(arguments))
    run, seeds, out = args.pop("run"), args.pop("seeds"), args.pop("out")
    name = args.pop("example")
    torch.set_num_threads(1)
    table = _with_environment(run, seeds, args)
    out.mkdir(parents=True, exist_ok=True)
    stem = f"attention-{name}-cpu-torch{torch.__version__.partition('+')[0]}"
    paths = [out / f"{stem}.csv"]
    write_csv(table, paths[0])
    print(summary(table).to_string(index=False, float_format="{:+.5f}".format))
    # What was trained, where something was.
    last = table[table.network == table.network.iloc[-1]]
    for kind, plot in (("units", plot_units), ("classes", plot_classes)):
        paths.append(out / f"{stem}-{kind}.png")
        save_figure(plot(last), paths[-1])
    print(*paths, sep="\n")
    return 0


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Returns a row for every network and unit: the change from the least scale to the greatest.

    Columns: the difference at 1.0, averaged over the seeds; the change at the greatest scale,
    averaged, least and greatest over the seeds; and in how many of them it is above 0.
    """
    means = over_classes(table)
    keys = ["network", "stage", "index"]
    base = means[means.scale == SCALES[0]].groupby(keys, sort=False).difference.mean()
    change = means[means.scale == SCALES[-1]].groupby(keys, sort=False).change
    columns: dict[str, Any] = {
        f"difference at {SCALES[0]:g}": base,
        f"change at {SCALES[-1]:g}": change.mean(),
        "least": change.min(),
        "greatest": change.max(),
        "seeds above 0": change.agg(lambda x: f"{(x > 0).sum()} of {len(x)}"),
    }
    return pd.DataFrame(columns).reset_index()


def _with_environment(
    run: Callable[..., pd.DataFrame], seeds: Sequence[int], options: dict[str, Any]
) -> pd.DataFrame:
    tables = []
    for seed in seeds:
        print(f"seed {seed}", file=sys.stderr)
        tables.append(
            run(seed, **options).assign(
                seed=seed,
                device="cpu",
                torch=str(torch.__version__),
                sknet_triton=sknet_triton.__version__,
            )
        )
    return pd.concat(tables, ignore_index=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sknet_triton.analysis", description=__doc__.partition("\n\n")[2]
    )
    examples = parser.add_subparsers(dest="example", required=True)
    for name, module in (("digits", digits), ("photos", photos)):
        described = (module.__doc__ or "").partition("\n\n")
        example = examples.add_parser(name, help=described[0], description=described[2])
        example.set_defaults(run=module.run)
        example.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="N")
        example.add_argument("--out", type=Path, default=Path(), metavar="FOLDER")
        if module is digits:
            example.add_argument("--epochs", type=int, default=digits.EPOCHS, metavar="N")
    return parser


if __name__ == "__main__":
    sys.exit(main())
