"""Check the kernels' results on chosen cases, against float64; nothing is timed or written.

Meant to run under compute-sanitizer as well, which slows every access down.
"""

import argparse

from perf.commands.arguments import DEVICES, chosen_device, seed
from perf.sweep.contest import Conditions, judge_case
from perf.sweep.presets import PRESETS, jobs
from perf.sweep.providers import PROVIDERS
from perf.sweep.ranks import this_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the cases, who carries them out, and where."""
    parser.add_argument(
        "--preset", choices=PRESETS, default="gpu-checks", help="cases (default: gpu-checks)"
    )
    parser.add_argument(
        "--provider", nargs="+", choices=PROVIDERS, metavar="NAME", help="not the preset's"
    )
    parser.add_argument("--device", choices=DEVICES, help="default: a GPU where there is one")
    parser.add_argument("--seed", type=seed, default=0, metavar="N")


def main(args: argparse.Namespace) -> int:
    """Prints a line for each case and provider; exits with 1 where one is not right."""
    device = chosen_device(args.device, this_rank())
    conditions = Conditions(device, args.seed, seconds=0.0, rounds=1)
    wrong = 0
    for job in jobs(PRESETS[args.preset].grids, args.seed):
        names = args.provider or job.providers
        results = judge_case(job.case, tuple(PROVIDERS[name] for name in names), conditions)
        for name, result in results.items():
            wrong += result.status not in ("ok", "unsupported")
            line = f"{result.status:11} {job.case.label}: {name} {result.reason}"
            print(line.rstrip(), flush=True)
    return int(wrong > 0)
