"""What the papers share and no paper claims: start-up, data, augmentation, backbones, checkpoints, run folders.

Nothing in here knows the name of a method. Scripts call these modules; these modules never call a script.
"""

import os


class UserError(Exception):
    """Something the user can put right. Scripts print it as one line, without a traceback, and exit with `code`."""

    code = 1

    def __init__(self, text: str):
        super().__init__(printable(text))


class UsageError(UserError):
    """A flag value or a path that cannot work, found before any work was done."""

    code = 2


def printable(path: str | os.PathLike) -> str:
    """A path or text as one line that any terminal takes: a byte that is not UTF-8 and a control character become escapes."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
