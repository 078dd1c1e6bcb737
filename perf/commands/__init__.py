"""The subcommands of ``python -m perf``, a file for those that belong together.

A command is a function that carries it out and returns the exit status. It is typed by the
function's name, and its docstring is the help, the first line alone in the list of commands. It
raises `UsageError` where an argument is wrong; nothing was written.
"""

import argparse
from collections.abc import Callable

from perf.commands import campaign, counts, reports, run, tune

# With what declares its arguments, where it takes any.
COMMANDS: dict[
    Callable[[argparse.Namespace], int], Callable[[argparse.ArgumentParser], None] | None
] = {
    run.run: run.add_run,
    campaign.campaign: campaign.add_campaign,
    run.check: run.add_check,
    reports.compare: reports.add_compare,
    reports.plot: reports.add_plot,
    reports.publish: None,
    reports.summary: reports.add_summary,
    counts.traffic: counts.add_traffic,
    counts.host: counts.add_host,
    counts.kernels: counts.add_kernels,
    tune.tune: tune.add_tune,
    run.env: None,
}
