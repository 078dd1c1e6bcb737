"""What a user can put right."""


class UsageError(Exception):
    """An argument is wrong; the message is one clear line, and nothing was written."""
