"""The command line: a parser with presets, number types, and errors as one line."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
import time

from common import processes


class Parser(argparse.ArgumentParser):
    """argparse with what every script here promises.

    - each long flag is taken with dashes and with underscores;
    - a wrong flag or value is one line on stderr and exit code 2;
    - `presets` ({name: {flag: value}}) are defaults only: whatever is typed on the command line wins. The flag `--demo`
      selects the preset "demo", `--preset NAME` another one; the demo wins over that where both set a flag.
    """

    def __init__(self, *args, presets: dict[str, dict] | None = None, **kwargs):
        super().__init__(*args, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        self.presets = presets or {}
        self._refused: dict[str, str] = {}
        named = [name for name in self.presets if name != "demo"]
        if named:
            self.add_argument(
                "--preset", choices=named, default=None, help="set the flags of a recipe; what is typed wins"
            )
        if "demo" in self.presets:
            self.add_argument("--demo", action="store_true", help="built-in data and a small setting; minutes on a CPU")

    def refuse(self, flag: str, reason: str) -> None:
        """A published flag that does nothing there and is not taken here: typing it is an error that says why."""
        self.add_argument(f"--{flag}", nargs="?", const=True, default=None, dest=f"_{flag}", help=argparse.SUPPRESS)
        self._refused[f"_{flag}"] = reason

    def parse_args(self, args=None, namespace=None):
        argv = [self._spelling(a) for a in (sys.argv[1:] if args is None else list(args))]
        published = {a.dest: a.default for a in self._actions}
        for name in _wanted_presets(self, argv):
            self.set_defaults(**self.presets[name])
        try:
            parsed = super().parse_args(argv, namespace)
        finally:
            self.set_defaults(**published)
        typed = super().parse_args(argv, argparse.Namespace(**{a.dest: _UNSET for a in self._actions}))
        for dest, reason in self._refused.items():
            if getattr(parsed, dest) is not None:
                self.error(f"--{dest[1:]} {reason}; leave it away")
        parsed._published = published
        parsed._typed = sorted(k for k, v in vars(typed).items() if v is not _UNSET)
        return parsed

    def _spelling(self, token: str) -> str:
        if not token.startswith("--") or token == "--":
            return token
        flag, equals, value = token.partition("=")
        if flag not in self._option_string_actions:
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


class _Unset:
    def __repr__(self):
        return "unset"


_UNSET = _Unset()


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action):
        if any(action.default is plain for plain in (None, False, True)) or not str(action.default):
            return action.help
        if "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _wanted_presets(parser: Parser, argv: list[str]) -> list[str]:
    if not parser.presets:
        return []
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--preset")
    first_look.add_argument("--demo", action="store_true")
    try:
        found, _ = first_look.parse_known_args(argv)
    except SystemExit:  # `--preset` without a value: the real parser says so
        return []
    wanted = [found.preset] if found.preset in parser.presets else []
    return wanted + (["demo"] if found.demo and "demo" in parser.presets else [])


OnOff = argparse.BooleanOptionalAction


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^63 - 1")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def run(main) -> None:
    """Run `main()` as a program: an error that the user can put right becomes one line on stderr and its exit code."""
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
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))):  # let rank 0 say what all ranks have to say
            time.sleep(2)
        print(f"error: {told[0]}", file=sys.stderr, flush=True)
        sys.exit(told[1])


def flags(args) -> dict:
    """The flags as a plain dict (no private entries), for config.json and checkpoints."""
    return {k: v for k, v in vars(args).items() if not k.startswith("_")}
