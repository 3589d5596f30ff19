"""What a script reads, and no paper's idea: start-up, data, augmentation, networks, memories."""

import os
import sys


class UserError(Exception):
    """Something the user can put right. Scripts print it as one line and exit with `code`."""

    code = 1

    def __init__(self, text: str):
        super().__init__(printable(text))


class UsageError(UserError):
    """A flag value or a path that cannot work, found before any work was done."""

    code = 2


def printable(path: str | os.PathLike) -> str:
    """Return a path or text as one line that any terminal takes.

    Bytes that are not UTF-8 and control characters become escapes.
    """
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    escaped = [c if c.isprintable() else c.encode("unicode_escape").decode() for c in text]
    return "".join(escaped)


def _leave_quietly(kind, error, trace, otherwise=sys.excepthook) -> None:
    """End with 130 and no traceback where Ctrl-C is pressed while torch is being imported."""
    os._exit(130) if issubclass(kind, KeyboardInterrupt) else otherwise(kind, error, trace)


sys.excepthook = _leave_quietly
