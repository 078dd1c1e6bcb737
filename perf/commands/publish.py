"""Write every table of the READMEs from the reports in perf/reports.

Nothing is measured. A document whose tables already say what the reports say is left alone.
"""

import argparse

from perf.commands.files import whole_file
from perf.report.documents import published
from perf.rows import env


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares nothing: documents and reports are those of the checkout."""


def main(args: argparse.Namespace) -> int:
    """Writes the documents that change and prints their paths."""
    for path, text in published(env.CHECKOUT).items():
        if text != path.read_text():
            with whole_file(path) as file:
                file.write(text.encode())
            print(path.relative_to(env.CHECKOUT))
    return 0
