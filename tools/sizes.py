"""List the lines of every package, and what is too large to read: `python tools/sizes.py`.

Too large are files above 320 lines, functions above 60 lines or 8 parameters, and lines above 100
columns.
"""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli
from common.files import ROOT

FILE_LINES = 320
FUNCTION_LINES = 60
PARAMETERS = 8
COLUMNS = 100
AIMS = {"common": 2400, "runner": 1400}  # lines


@dataclass(frozen=True)
class Function:
    """A function or method: its place, its lines, and its parameters without self and cls."""

    place: str
    lines: int
    parameters: int


def sources(folder: str) -> list[Path]:
    """Return the Python files of a folder of the project, sorted."""
    return sorted((ROOT / folder).glob("*.py"))


def packages() -> list[str]:
    """Return the folders of the project that hold Python files."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."]
    return sorted(folder.name for folder in folders if any(folder.glob("*.py")))


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def functions(path: Path) -> list[Function]:
    """Return all functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    measured = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = sum(argument.arg not in ("self", "cls") for argument in named)
            place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            measured.append(Function(place, node.end_lineno - node.lineno + 1, count))
    return measured


def oversized(path: Path) -> list[str]:
    """Return a remark for everything in a file that is above a limit."""
    lines = lines_of(path)
    name = path.relative_to(ROOT)
    remarks = []
    if len(lines) > FILE_LINES:
        remarks.append(f"{name}: {len(lines)} lines")
    wide = sum(len(line) > COLUMNS for line in lines)
    if wide:
        remarks.append(f"{name}: {wide} lines above {COLUMNS} columns")
    for function in functions(path):
        if function.lines > FUNCTION_LINES:
            remarks.append(f"{function.place}: {function.lines} lines")
        if function.parameters > PARAMETERS:
            remarks.append(f"{function.place}: {function.parameters} parameters")
    return remarks


def main(argv=None) -> None:
    parser = cli.Parser(prog="sizes.py", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    for package in packages():
        total = sum(len(lines_of(path)) for path in sources(package))
        aim = f" (aim {AIMS[package]})" if package in AIMS else ""
        print(f"{package:<20}{total:6}{aim}")
    print()
    for package in packages():
        for path in sources(package):
            for remark in oversized(path):
                print(remark)


if __name__ == "__main__":
    cli.run(main)
