"""Which of a row's two times counts: the GPU's own, or that from call to call."""

import pandas as pd

# Calls up to this batch are often over before the host has started the next one: a user waits for
# the host there, and the GPU's own time says little.
SMALL_BATCH = 8


def counts_call_to_call(batch: int, call_ms: float | None) -> bool:
    """Tells whether the time from call to call counts, where it was taken at all."""
    return batch <= SMALL_BATCH and pd.notna(call_ms)


def by_the_clock_that_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """Returns ``frame`` with the times from call to call as its ms where those count."""
    small = (frame.B <= SMALL_BATCH) & frame.call_ms_p50.notna()
    names = ("ms_p20", "ms_p50", "ms_p80")
    return frame.assign(**{name: frame[name].mask(small, frame[f"call_{name}"]) for name in names})
