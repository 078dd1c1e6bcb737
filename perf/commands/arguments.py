"""Values as arguments: numbers within limits, ranges, times and devices."""

import argparse
from collections.abc import Callable

import torch

from perf.rows import env
from perf.rows.errors import UsageError
from perf.sweep.ranks import Rank

DEVICES = ("cuda", "cpu")
_LARGEST_SIZE = 1_000_000
_LONGEST_TIME = 1e7
_LONGEST_QUOTE = 40


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Returns a parser of whole numbers from ``least`` to ``most``."""

    def parse(text: str) -> int:
        # Python refuses to parse thousands of digits.
        if not text.isdecimal() or len(text) > len(str(most)) or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{_short(text)} is not a whole number from {least} to {most:,}"
            )
        return int(text)

    return parse


seed = whole_number(0, 2**32 - 1)


def sizes(text: str) -> range:
    """Parses a positive number, or a range START:STOP:STEP that includes STOP."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{_short(text)} is neither a positive number nor a range")
    numbers = [whole_number(1, _LARGEST_SIZE)(part) for part in parts]
    start, stop, step = numbers if len(numbers) == 3 else (*numbers, *numbers, 1)
    if start > stop:
        raise argparse.ArgumentTypeError(f"the range {text!r} is empty")
    return range(start, stop + 1, step)


def duration(unit: str) -> Callable[[str], float]:
    """Returns a parser of positive numbers of a unit of time."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not 0 < value <= _LONGEST_TIME:
            raise argparse.ArgumentTypeError(
                f"{_short(text)} is not a positive number of {unit} up to {_LONGEST_TIME:,.0f}"
            )
        return value

    return parse


def chosen_device(name: str | None, rank: Rank) -> torch.device:
    """Returns the device that ``--device`` names, this rank's one where there are several.

    Raises:
        UsageError: there is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: there is no GPU")
    device = torch.device("cpu") if name == "cpu" else env.default_device(rank.local)
    if device.type == "cuda" and rank.local >= torch.cuda.device_count():
        raise UsageError(
            f"LOCAL_RANK: expected less than the number of GPUs, which is "
            f"{torch.cuda.device_count()}, got {rank.local}"
        )
    return device


def _short(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}...")
