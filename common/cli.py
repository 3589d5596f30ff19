"""The command line: a parser with presets, number types, and errors as one line."""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import os
import sys
import time

from common import early, processes

OnOff = argparse.BooleanOptionalAction


class Parser(argparse.ArgumentParser):
    """argparse with what every script here promises.

    - each long flag is taken with dashes and with underscores;
    - a wrong flag or value is one line on stderr and exit code 2;
    - `presets` ({name: {flag: value}}) are defaults only: whatever is typed on the command line wins. The flag `--demo`
      selects the preset "demo", `--preset NAME` another one; the demo wins over that where both set a flag.

    What it returns also says `typed`: the names of the flags that were given.
    """

    def __init__(self, *args, presets: dict[str, dict] | None = None, **kwargs):
        formatter = functools.partial(_HelpFormatter, max_help_position=30, width=110)
        super().__init__(*args, formatter_class=formatter, allow_abbrev=False, **kwargs)
        self.presets = presets or {}
        self._ignored: dict[str, tuple[str, str]] = {}  # by name in the namespace: flag, reason
        if named := [name for name in self.presets if name != "demo"]:
            self.add_argument("--preset", choices=named, help="set the flags of a recipe; what is typed wins")
        if "demo" in self.presets:
            self.add_argument("--demo", action="store_true", help="built-in data and a small setting; minutes on a CPU")

    def ignore(self, reason: str, *flags: str) -> None:
        """Published flags that did nothing there and do nothing here: taken, so that a published command runs as printed,
        and left out of what `parse_args` returns; one note names those that were typed."""
        for flag in flags:
            hidden = dict(default=argparse.SUPPRESS, help=argparse.SUPPRESS)
            action = self.add_argument(f"--{flag}", nargs="?", const=True, **hidden)
            self._ignored[action.dest] = f"--{flag}", reason

    def parse_args(self, args=None, namespace=None):
        argv = [self._spelling(a) for a in (sys.argv[1:] if args is None else list(args))]
        defaults = {a.dest: a.default for a in self._actions if a.default is not argparse.SUPPRESS}
        first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # refuses nothing: that is the other's
        first_look.add_argument("--preset", nargs="?")
        first_look.add_argument("--demo", nargs="?", const=True)
        found, _ = first_look.parse_known_args(argv)
        for name in (found.preset, "demo" if found.demo else None):
            self.set_defaults(**self.presets.get(name, {}))
        try:
            parsed = super().parse_args(argv, namespace)
        finally:
            self.set_defaults(**defaults)
        unset = object()
        typed = super().parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults, unset)))
        parsed.typed = {name for name, value in vars(typed).items() if value is not unset}
        self._forget_ignored(parsed)
        return parsed

    def _forget_ignored(self, parsed) -> None:
        flags: dict[str, list[str]] = {}
        for name in [name for name in self._ignored if name in parsed.typed]:
            delattr(parsed, name)
            parsed.typed.remove(name)
            flag, reason = self._ignored[name]
            flags.setdefault(reason, []).append(flag)
        if flags and not int(os.environ.get("RANK", 0)):
            named = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in flags.items())
            print(f"note: without effect, as in the published code: {named}", file=sys.stderr)

    def _spelling(self, token: str) -> str:
        flag, equals, value = token.partition("=")
        if flag.startswith("--") and flag not in self._option_string_actions:
            for other in (flag[2:].replace("_", "-"), flag[2:].replace("-", "_")):
                if f"--{other}" in self._option_string_actions:
                    return f"--{other}{equals}{value}"
        return token

    def error(self, message: str):
        if message.startswith("unrecognized arguments"):
            flag = message.split()[2].partition("=")[0]
            close = difflib.get_close_matches(flag, [o for o in self._option_string_actions if o.startswith("--")], 1)
            message += f"; did you mean {close[0]}?" if close else ""
        self.exit(2, f"error: {message} (--help lists every flag)\n")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        plain = any(action.default is value for value in (None, False, True)) or not str(action.default)
        return action.help if plain or "default" in (action.help or "") else super()._get_help_string(action)


def flags(args) -> dict:
    """The flags as a plain dict, for config.json and checkpoints."""
    return {k: v for k, v in vars(args).items() if k != "typed"}


def folder_name(text: str) -> str:
    """An argparse type: the name of one folder, not a path."""
    if text in ("", ".", "..") or os.path.basename(text) != text:
        raise argparse.ArgumentTypeError(f"{text!r} must be the name of a folder, without {os.sep}")
    return text


def number(kind: type, least: float = -math.inf, most: float = math.inf, above: float = -math.inf):
    """An argparse type: an int or a finite float, at least `least`, at most `most` and greater than `above`."""
    bounds = {"above": above, "at least": least, "at most": most}
    wanted = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if math.isfinite(bound))

    def parse(text: str):
        value = kind(text)
        if not (-math.inf < value < math.inf and above < value and least <= value <= most):
            raise argparse.ArgumentTypeError(f"{text} must be {wanted or 'finite'}")
        return value

    parse.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return parse


count = number(int, least=0)
positive_int = number(int, least=1)
seed = number(int, least=0, most=2**63 - 1)
positive = number(float, above=0)
not_negative = number(float, least=0)
fraction = number(float, least=0, most=1)
share = number(float, above=0, most=1)


def run(main) -> None:
    """Run `main()` as a program: an error that the user can put right becomes one line on stderr and its exit code."""
    early.over()
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; a checkpoint that was written before is whole", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `script | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        told = processes.in_one_line(error)
        if told is None:
            raise
        if int(os.environ.get("RANK", 0)):  # let rank 0 say what all ranks have to say
            time.sleep(2)
        print(f"error: {told[0]}", file=sys.stderr, flush=True)
        sys.exit(told[1])
