"""The subcommands of ``python -m perf``, a file for those that belong together."""

import argparse
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from perf.commands import campaign, counts, reports, run, tune


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        main: carries it out and returns the exit status. The command has the function's name, and
            its docstring is the help, the first line alone in the list of commands. It raises
            `UsageError` where an argument is wrong; nothing was written.
        add_arguments: declares its arguments.
    """

    main: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None

    @property
    def name(self) -> str:
        """What is typed."""
        return self.main.__name__

    @property
    def help(self) -> str:
        """What ``--help`` says."""
        return inspect.getdoc(self.main) or ""


COMMANDS = (
    Command(run.run, run.add_run),
    Command(campaign.campaign, campaign.add_campaign),
    Command(run.check, run.add_check),
    Command(reports.compare, reports.add_compare),
    Command(reports.plot, reports.add_plot),
    Command(reports.publish),
    Command(reports.summary, reports.add_summary),
    Command(counts.traffic, counts.add_traffic),
    Command(counts.host, counts.add_host),
    Command(counts.kernels, counts.add_kernels),
    Command(tune.tune, tune.add_tune),
    Command(run.env),
)
