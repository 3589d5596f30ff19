"""Word the --help of a script: first what people change, then every flag; and what presets set."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap

FIRST = ("--data", "--out", "--epochs", "--batch-size", "--lr")  # what people change
LONG = 20  # flags beyond which the first line does not list them all
WIDTH = 100


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names the default of a flag unless it is none, on, off or in the text."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=WIDTH)

    def _get_help_string(self, action):
        is_plain = any(action.default is value for value in (None, False, True))
        is_plain = is_plain or not str(action.default)
        if is_plain or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ShowPresets(argparse.Action):
    """The flag --help-presets: print what every preset sets, and exit."""

    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, *_):
        print("\n\n".join(_preset(parser, name) for name in parser.presets))
        parser.exit()


def _preset(parser, name: str) -> str:
    """Return a preset as the flags that it stands for."""
    actions = {action.dest: action for action in parser._actions}
    settings = [item for item in parser.presets[name].items() if item[1] is not None]
    words = [_word(actions.get(dest), dest, value) for dest, value in settings]
    head = "--demo" if name == "demo" else f"--preset {name}"
    indents = {"initial_indent": "  ", "subsequent_indent": "  "}
    text = " ".join(word.replace(" ", "\0") for word in words)  # a line ends between flags only
    lines = textwrap.fill(text, WIDTH, break_on_hyphens=False, break_long_words=False, **indents)
    return f"{head} sets\n{lines}".replace("\0", " ")


def _word(action: argparse.Action | None, dest: str, value) -> str:
    if action is None or not action.option_strings:
        return str(value) if action else f"{dest}={value}"
    flag = next(option for option in action.option_strings if option.startswith("--"))
    if isinstance(value, bool):
        return flag if value else f"--no-{flag[2:]}"
    value = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return f"{flag} {value}"


def opening(parser) -> str:
    """Return the first lines of --help for a script with many flags; "" for others.

    They are the usage in one line, the task, the flags that people change, and an example.
    """
    if len(parser._actions) < LONG:
        return ""
    places = "".join(f" [{a.dest.upper()}]" for a in parser._get_positional_actions())
    lines = [f"usage: {parser.prog}{places} [flags]", "", parser.description or "", ""]
    names = {name.replace("_", "-"): a for name, a in parser._option_string_actions.items()}
    first = {name: names[name] for name in FIRST if name in names}
    if len(first) == len(FIRST):
        script = os.path.relpath(sys.argv[0])
        defaults = [
            f"{name} {first[name].default}" for name in FIRST[2:] if first[name].default is not None
        ]
        formatter = Formatter(parser.prog)
        formatter.start_section("what people change")
        formatter.add_arguments(first.values())
        formatter.end_section()
        example = " ".join([f"python {script} --data DATA --out runs/mine", *defaults])
        lines += [formatter.format_help(), f"example:\n  {example}", "", "every flag:\n\n"]
    return "\n".join(lines)
