"""Provide what every script needs and no paper claims: data, augmentation, networks, memories."""

import os


class UserError(Exception):
    """An error that the user can correct. Scripts print it as one line and exit with `code`."""

    code = 1

    def __init__(self, text: str):
        super().__init__(printable(text))


class UsageError(UserError):
    """An invalid flag value or path, detected before any work was done."""

    code = 2


def printable(path: str | os.PathLike) -> str:
    """Return a path or text as one line that any terminal can print.

    Bytes that are not UTF-8 and control characters become escapes.
    """
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    escaped = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text]
    return "".join(escaped)


def clock(seconds: float) -> str:
    """Format seconds: 75 as "1:15", 3675 as "1:01:15"."""
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{seconds:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
