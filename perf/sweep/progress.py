"""The progress bar: on stderr, and only where somebody watches it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from perf.sweep.presets import Job


class Progress:
    """A bar over cases with the remaining time; invisible where stderr is no terminal."""

    def __init__(self, total: int, *, shown: bool) -> None:
        hidden = not (shown and sys.stderr.isatty())
        self._bar = tqdm(total=total, unit="case", file=sys.stderr, disable=hidden, leave=False)

    @contextmanager
    def working_on(self, job: Job) -> Iterator[None]:
        """Shows ``job`` while the block runs, and counts it when it is done."""
        self._bar.set_postfix_str(job.case.label)
        yield
        self._bar.update()

    def close(self) -> None:
        """Takes the bar off the screen."""
        self._bar.close()
