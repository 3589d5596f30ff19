"""Print run folders beside the published table that they belong to.

    python tools/report.py RUNS...

Runs from any working directory. A run's result.json names its table (a JSON file in the paper's
folder). Runs with the same label and setting, which differ in the seed alone, are one row: mean and
standard deviation, the seeds listed. A published number stands in the column of what it is:
acc1_best where the paper reports the best epoch on the validation set, acc1 where it is the last.
"""

import csv
import io
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # isort: split

from common import UsageError, cli, printable
from common.files import ROOT

TABLES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/published*.json"))
ACCURACIES = ("acc1", "acc5", "acc1_best")
HEADINGS = {"shape_bias": "shape bias"}  # columns of a table that are not called by their name
EPOCHS = "acc1_best: of the best epoch on the validation set; acc1: of the last epoch"
# result.json, and where kinds of runs share a folder those of each kind.
RESULTS = ("result.json", "result-lincls.json", "result-robustness.json")


class Table(NamedTuple):
    """A table to print: its title, the names of the columns, and rows of texts."""

    title: str
    header: list[str]
    rows: list[list[str]]


def main(argv=None) -> None:
    parser = cli.Parser(prog="report.py", description=__doc__.splitlines()[0])
    about = "run folders (or folders of them) with a result.json of an evaluation"
    parser.add_argument("runs", nargs="+", help=about)
    about = "of the tables; csv has no titles"
    parser.add_argument("--format", choices=["text", "markdown", "csv"], default="text", help=about)
    about = "print the given runs alone"
    parser.add_argument("--no-published", action="store_true", help=about)
    args = cli.freeze(parser.parse_args(argv))
    printed = [
        as_csv(table) if args.format == "csv" else as_text(table, args.format == "markdown")
        for table in tables(find_results(args.runs), not args.no_published)
    ]
    print("\n\n".join(printed))


# ---------------------------------------------------------------------------------------- results


def results_in(folder: Path) -> list[Path]:
    """Return the results that lie in a folder."""
    return [folder / name for name in RESULTS if (folder / name).is_file()]


def find_results(paths: list[str]) -> list[dict]:
    """Return the results of every folder named, or else of the folders one or two below it.

    Raises UsageError for a folder without.
    """
    results = []
    for path in map(Path, paths):
        files = [path] if path.is_file() else results_in(path)
        for depth in ("*", "*/*"):
            if files or not path.is_dir():
                break
            folders = [folder for folder in sorted(path.glob(depth)) if folder.is_dir()]
            files = [file for folder in folders for file in results_in(folder)]
        if not files:
            raise UsageError(
                f"{printable(path)}: no result.json in it; an evaluation script writes one when "
                "it is done"
            )
        results += map(read, files)
    return results


def read(file: Path) -> dict:
    """Return a result.json and its folder, with the types that a table needs.

    Raises UsageError, which names file and field, where they differ.
    """
    where = printable(file)
    try:
        result = json.loads(file.read_text())
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror.lower()}") from None
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict) or not result.keys() & {"table", "acc1"}:
        raise UsageError(f"{where}: not a result of an evaluation script")
    _check(result, where)
    return result | {"folder": str(file.parent)}


def _check(result: dict, where: str) -> None:
    def check(field: str, wanted: str, fits) -> None:
        if field in result and not fits(result[field]):
            value = printable(repr(result[field])[:60])
            raise UsageError(
                f"{where}: its {field} is {value}, not {wanted}; delete the file, or evaluate again"
            )

    check("table", f"one of {', '.join(TABLES)}", lambda v: v is None or v in TABLES)
    for field in ("label", "arch", "data"):
        check(field, "a text", lambda v: v is None or isinstance(v, str))
    for field in ("epochs", "seed"):
        check(field, "a number", lambda v: v is None or _is_number(v) and 0 <= v < 2**63)
    check("settings", "a table of settings", lambda v: v is None or isinstance(v, dict))
    check("pending", "a list", lambda v: v is None or isinstance(v, list))
    columns = ACCURACIES
    if result.get("table"):
        columns = (*published_table(result["table"])["columns"], *HEADINGS, *ACCURACIES)
    for column in columns:
        for field in (column, f"{column}_masked"):
            check(field, "a number from 0 to 100", lambda v: _is_number(v) and 0 <= v <= 100)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def published_table(name: str) -> dict:
    """Return the content of FOLDER/published.json."""
    return json.loads((ROOT / name).read_text())


# ----------------------------------------------------------------------------------------- tables


def tables(results: list[dict], with_published: bool) -> list[Table]:
    """Return a table, or two with the published one, for each that results name."""
    grouped: dict[str | None, list[dict]] = {}
    for result in results:
        grouped.setdefault(result.get("table"), []).append(result)
    found = []
    for name, members in grouped.items():
        if name is None:
            found.append(plain_table(members))
            continue
        published = published_table(name)
        columns = columns_of(published, members)
        if with_published:  # a table of its own: other data, other sizes
            found.append(their_table(published, columns))
        found.append(our_table(members, columns))
    return found


def plain_table(results: list[dict]) -> Table:
    """Return the table of results that belong to no published one."""
    columns = [column for column in ACCURACIES if any(column in result for result in results)]
    rows = []
    for result in results:
        cells = [cell([result[column]]) if column in result else "-" for column in columns]
        rows.append([shown(result["folder"]) + unfinished([result]), *cells])
    return Table(f"Linear evaluation in percent ({EPOCHS})", ["run", *columns], rows)


def columns_of(published: dict, results: list[dict]) -> list[str]:
    """Return the columns of a published table, and others that these results have."""
    fields = {field for result in results for field in result}
    columns = list(published["columns"])
    columns += [
        column
        for column in (*HEADINGS, "acc1_best", "acc1")
        if column in fields and column not in columns
    ]
    masked = [field for field in fields if field.endswith("_masked")]
    return columns + sorted(name for name in masked if name.removesuffix("_masked") in columns)


def their_table(published: dict, columns: list[str]) -> Table:
    """Return the published numbers."""
    header = ["published", "data", "epochs", *(HEADINGS.get(name, name) for name in columns)]
    rows = []
    for row in published["rows"]:
        cells = [interval(row.get(name)) for name in columns]
        rows.append([row["label"], published["data"], str(published["epochs"]), *cells])
    return Table(published["title"], header, rows)


def our_table(results: list[dict], columns: list[str]) -> Table:
    """Return these results, those that differ in the seed alone in one row."""
    by_row: dict[tuple, list[dict]] = {}
    for result in results:
        setting = [result.get(name) for name in ("label", "arch", "epochs", "data")]
        key = (*setting, json.dumps(result.get("settings")))
        by_row.setdefault(key, []).append(result)
    rows = []
    for (label, arch, epochs, data, _), same in by_row.items():
        name = f"{shown(label)}, {shown(arch)}{seeds(same)}{unfinished(same)}"
        cells = [cell([one[column] for one in same if column in one]) for column in columns]
        rows.append([name, shown(data), shown(epochs), *cells])
    header = ["run", "data", "epochs", *(HEADINGS.get(name, name) for name in columns)]
    about = f" ({EPOCHS})" if "acc1_best" in columns else ""
    return Table(f"Accuracy in percent of the runs here{about}", header, rows)


# ------------------------------------------------------------------------------------------ cells


def shown(value) -> str:
    return "-" if value is None else printable(str(value))


def unfinished(results: list[dict]) -> str:
    """Return, in brackets, what behind these results was not at its end.

    That is how far a pre-training had come, or sets that tools/robustness.py had not come to.
    """
    text = ""
    for result in results:
        done = result.get("backbone_epochs")
        asked = result.get("backbone_epochs_asked")
        if isinstance(done, int) and isinstance(asked, int) and done < asked:
            text = f" (backbone NOT finished: {done} of {asked} epochs)"
    pending = dict.fromkeys(str(name) for one in results for name in one.get("pending") or ())
    if pending:
        text += f" (unfinished: {shown(', '.join(pending))})"
    return text


def cell(values: list[float]) -> str:
    """Return mean ± standard deviation."""
    if not values:
        return "-"
    spread = f"±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def seeds(results: list[dict]) -> str:
    """Return the seeds of several results, in brackets."""
    if len(results) == 1:
        return ""
    return f" (seeds {', '.join(str(result.get('seed')) for result in results)})"


def interval(published: list[float] | None) -> str:
    """Return [mean, standard deviation] or [value] of a published table as a text."""
    return "-" if published is None else "±".join(f"{value:.2f}" for value in published)


# --------------------------------------------------------------------------------------- printing


def as_csv(table: Table) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.header, *table.rows])
    return out.getvalue().rstrip("\n")


def as_text(table: Table, markdown: bool) -> str:
    return f"{table.title}\n\n{layout(table.header, table.rows, markdown)}"


def layout(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    """Return a table as lines of equal width, the first column to the left, others to the right."""
    columns = range(len(header))
    widths = [max(len(row[column]) for row in [header, *rows]) for column in columns]

    def line(cells: list[str]) -> str:
        others = [text.rjust(width) for text, width in zip(cells[1:], widths[1:])]
        padded = [cells[0].ljust(widths[0]), *others]
        return f"| {' | '.join(padded)} |" if markdown else "  ".join(padded)

    rule = ["-" * width for width in widths]
    if markdown:
        rule = [rule[0], *(dashes[:-1] + ":" for dashes in rule[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


if __name__ == "__main__":
    cli.run(main)
