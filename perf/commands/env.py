"""Print the environment that a row would carry."""

import argparse
from dataclasses import asdict

from perf.rows import env
from perf.sweep.ranks import this_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares nothing: the environment is what it is."""


def main(args: argparse.Namespace) -> int:
    """Prints one line for each column."""
    rank = this_rank()
    now = env.snapshot(env.default_device(rank.local), seed=0, ranks=rank.count)
    for name, value in asdict(now).items():
        print(f"{name:14} {value}")
    return 0
