"""What a row is: its columns, its CSV, its environment; here, how the user is told of mistakes."""


class UsageError(Exception):
    """A mistake that the user can put right; nothing was measured, and nothing written."""


class StopError(Exception):
    """The command cannot go on: a full disk, a report that is gone, a rank that died.

    What was written before is whole.
    """


def one_line(message: str) -> str:
    """Returns the first line of a message that says something."""
    lines = [line.strip() for line in message.splitlines()]
    return next((line for line in lines if line), "")


def printable(text: str) -> str:
    """Returns ``text`` with everything escaped that is neither a visible character nor a space."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
