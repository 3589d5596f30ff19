"""Write docs/flags.md, the flags of all train scripts side by side, from their parsers.

python tools/flags.py            # print the page
python tools/flags.py --write    # write it
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli, files
from common.files import ROOT
from runner import papers

PAGE = ROOT / "docs/flags.md"
COMMON = {  # {spelling that every script takes: its meaning}
    "data": "pictures",
    "arch": "network",
    "out": "where run folders are written",
    "lr": "learning rate",
    "epochs": "epochs",
    "batch-size": "global batch",
    "temperature": "temperature of the loss",
    "negatives-k": "negatives per query",
    "queue": "negatives per query, where they are the length of a queue",
    "ema": "momentum of the key encoder",
    "weight-decay": "weight decay",
}
AMBIGUOUS = ("alpha", "aug", "k", "model_path", "view", "warm")  # each means several things
HEAD = """\
# Flags

`python tools/flags.py --write` makes this page from the parsers of the scripts, and a test compares
them. Every flag can be typed with dashes or with underscores. `--help` lists the flags of a script,
and `--help-presets` what its presets set.
"""
COMMON_HEAD = """
## One spelling for all train scripts

Every train script takes the first column beside the published spellings, which stand in its own
column. `-` is what its method does not have.
"""
AMBIGUOUS_HEAD = """
## One spelling, several meanings

These are spelled as published.
"""
ALL_HEAD = """
## All flags of the train scripts

Cells are the defaults without a preset. `none` means that other flags decide, or that it is left
out; `-` is a flag that the script lacks. Scripts word the meaning of a flag for their own method;
here it is in the words of one of them.
"""


class _Parsed(Exception):
    """Carries a parser out of the script that has built it."""


def scripts(stages: tuple[str, ...] = ("pretraining", "evaluation")) -> list[str]:
    """Return FOLDER/SCRIPT.py of all train scripts, evaluations, or both."""
    return [getattr(paper, stage) for stage in stages for paper in papers.find().values()]


def parser_of(script: str) -> cli.Parser:
    """Return the parser of a script, as its `parse_args` has built it."""

    def caught(parser, *_):
        raise _Parsed(parser)

    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    with mock.patch.object(cli.Parser, "parse_args", caught):
        try:
            module.parse_args([])
        except _Parsed as parsed:
            return parsed.args[0]
    raise AssertionError(f"{script} parses no flags")


def flags_of(parser: cli.Parser) -> dict[str, argparse.Action]:
    """Return {spelling with dashes: its action} of the long flags that have a help text."""
    found = {}
    for action in parser._actions:
        if action.help is not argparse.SUPPRESS and not action.dest.startswith("help"):
            for option in action.option_strings:
                if option.startswith("--"):
                    found[option[2:].replace("_", "-")] = action
    return found


def text_of(action: argparse.Action) -> str:
    return (action.help or "").replace("|", "\\|").replace("%%", "%")


def default_of(action: argparse.Action) -> str:
    """Return the default as a cell of a table."""
    words = {None: "none", True: "on", False: "off"}
    value = action.default
    if isinstance(value, list):
        return " ".join(map(str, value))
    if value is None or isinstance(value, bool):
        return words[value]
    return str(value) or "none"


# ----------------------------------------------------------------------------------------- tables


def common_table(parsers: dict[str, cli.Parser]) -> str:
    """Return the published spellings beside the common ones."""
    rows = []
    for name, meaning in COMMON.items():
        cells = []
        for parser in parsers.values():
            action = flags_of(parser).get(name)
            options = [option for option in action.option_strings if option] if action else []
            own = [f"`{o}`" for o in options if not o.startswith("--no-")]
            cells.append(", ".join(own) or "-")
        rows.append([f"`--{name}`", meaning, *cells])
    return markdown(["common", "meaning", *map(_folder, parsers)], rows)


def ambiguous_table(parsers: dict[str, cli.Parser]) -> str:
    """Return the meanings of spellings that have several; scripts that agree are one row."""
    rows = []
    for name in AMBIGUOUS:
        meanings: dict[str, list[str]] = {}
        for script, parser in parsers.items():
            if f"--{name}" in parser._option_string_actions:
                action = parser._option_string_actions[f"--{name}"]
                if action.help is not argparse.SUPPRESS:
                    meanings.setdefault(text_of(action), []).append(f"`{script}`")
        rows += [[f"`--{name}`", text, ", ".join(named)] for text, named in meanings.items()]
    return markdown(["flag", "meaning", "scripts"], rows)


def all_table(parsers: dict[str, cli.Parser]) -> str:
    """Return the defaults of every flag in every train script."""
    of_script = [flags_of(parser) for parser in parsers.values()]
    rows = {}
    for found in of_script:
        for action in dict.fromkeys(found.values()):
            own = [name for name, other in found.items() if other is action]
            first = next((name for name in COMMON if name in own), own[0])
            cells = [default_of(flags[first]) if first in flags else "-" for flags in of_script]
            rows.setdefault(first, [f"`--{first}`", *cells, meaning_of(first, action)])
    heads = ["flag", *map(_folder, parsers), "meaning"]
    return markdown(heads, sorted(rows.values(), key=lambda row: row[0].lower()))


def meaning_of(name: str, action: argparse.Action) -> str:
    if name in AMBIGUOUS:
        return "several, [see above](#one-spelling-several-meanings)"
    return COMMON.get(name) or text_of(action)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a table without padding, as some texts are long."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _folder(script: str) -> str:
    return script.partition("/")[0]


def page() -> str:
    """Return the text of docs/flags.md."""
    train = {script: parser_of(script) for script in scripts(("pretraining",))}
    everything = train | {script: parser_of(script) for script in scripts(("evaluation",))}
    parts = [HEAD, COMMON_HEAD, common_table(train), AMBIGUOUS_HEAD, ambiguous_table(everything)]
    return "\n\n".join(part.strip("\n") for part in [*parts, ALL_HEAD, all_table(train)]) + "\n"


def main(argv=None) -> None:
    parser = cli.Parser(prog="flags.py", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write docs/flags.md")
    if not parser.parse_args(argv).write:
        print(page(), end="")
        return
    with files.replacing(PAGE, "w") as file:
        file.write(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    cli.run(main)
