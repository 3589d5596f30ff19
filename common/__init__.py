"""What the papers share and no paper claims: start-up, data, augmentation, backbones, checkpoints, run folders.

Nothing in here knows the name of a method. Scripts call these modules; these modules never call a script.
"""


class UserError(Exception):
    """Something the user can put right. Scripts print it as one line, without a traceback, and exit with `code`."""

    code = 1


class UsageError(UserError):
    """A flag value or a path that cannot work, found before any work was done."""

    code = 2
