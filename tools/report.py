"""Run folders beside the published table they belong to: `python tools/report.py RUNS...`, from any working directory.

A run's result.json names its table (a JSON file in the paper's folder). Runs with the same label and setting are one row:
mean and standard deviation, the seeds listed. A published number stands in the column of what it is: acc1_best where the
paper reports the best epoch on the validation set, acc1 where it is the last one.
"""

import csv
import io
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import common  # isort: split

from common import UsageError, cli, printable
from common.files import ROOT

TABLES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/published*.json"))
ACCURACIES = ("acc1", "acc5", "acc1_best")
HEADINGS = {"shape_bias": "shape bias"}  # columns of a table that are not called by their name
EPOCHS = "acc1_best: of the best epoch on the validation set; acc1: of the last epoch"


def main(argv=None) -> None:
    parser = cli.Parser(prog="report.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders (or folders of them) with a result.json of an evaluation")
    parser.add_argument("--format", choices=["text", "markdown", "csv"], default="text")
    parser.add_argument("--no-published", action="store_true", help="only the given runs")
    args = parser.parse_args(argv)
    for i, (title, header, rows) in enumerate(tables(find_results(args.runs), not args.no_published)):
        if args.format == "csv":
            out = io.StringIO()
            csv.writer(out, lineterminator="\n").writerows([header, *rows])
            print(("\n" if i else "") + out.getvalue(), end="")
        else:
            print(("\n" if i else "") + title + "\n")
            print(layout(header, rows, args.format == "markdown"))


def results_in(folder: Path) -> list[Path]:
    """result.json, and where kinds of runs share a folder result-lincls.json and result-robustness.json."""
    names = ("result.json", "result-lincls.json", "result-robustness.json")
    return [folder / name for name in names if (folder / name).is_file()]


def find_results(paths: list[str]) -> list[dict]:
    """The result.json of every folder named, or of the folders one or two below it."""
    results = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else results_in(path)
        for depth in ("*", "*/*") if path.is_dir() else ():
            below = (folder for folder in sorted(path.glob(depth)) if folder.is_dir())
            found = found or [file for folder in below for file in results_in(folder)]
        if not found:
            raise UsageError(
                f"{printable(path)}: no result.json in it; an evaluation script writes one when it is done"
            )
        results += map(read, found)
    return results


def read(file: Path) -> dict:
    """A result.json, checked: what a table shows of it has the type that it should. UsageError names file and field."""
    where = printable(file)
    try:
        result = json.loads(file.read_text())
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror.lower()}") from None
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict) or not result.keys() & {"table", "acc1"}:
        raise UsageError(f"{where}: not a result of an evaluation script")

    def check(field: str, wanted: str, fits) -> None:
        if field in result and not fits(result[field]):
            shown = printable(repr(result[field])[:60])
            raise UsageError(f"{where}: its {field} is {shown}, not {wanted}; delete the file, or evaluate again")

    check("table", f"one of {', '.join(TABLES)}", lambda v: v is None or v in TABLES)
    for field in ("label", "arch", "data"):
        check(field, "a text", lambda v: v is None or isinstance(v, str))
    for field in ("epochs", "seed"):
        check(field, "a number", lambda v: v is None or _is_number(v) and 0 <= v < 2**63)
    check("settings", "a table of settings", lambda v: v is None or isinstance(v, dict))
    check("pending", "a list", lambda v: v is None or isinstance(v, list))
    columns = ACCURACIES
    if result.get("table"):
        columns = [*published_table(result["table"])["columns"], *HEADINGS, *ACCURACIES]
    for column in columns:
        for field in (column, f"{column}_masked"):
            check(field, "a number from 0 to 100", lambda v: _is_number(v) and 0 <= v <= 100)
    return result | {"folder": str(file.parent)}


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def published_table(name: str) -> dict:
    return json.loads((ROOT / name).read_text())


def tables(results: list[dict], with_published: bool) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) for every published table that a result names, and one for the results without any."""
    grouped: dict[str | None, list[dict]] = {}
    for result in results:
        grouped.setdefault(result.get("table"), []).append(result)
    made = []
    for table, members in grouped.items():
        if table is None:
            columns = [c for c in ACCURACIES if any(c in m for m in members)]
            rows = [
                [shown(m["folder"]) + unfinished([m]), *(cell([m[c]]) if c in m else "-" for c in columns)]
                for m in members
            ]
            made.append((f"Linear evaluation in percent ({EPOCHS})", ["run", *columns], rows))
            continue
        published = published_table(table)
        columns, there = list(published["columns"]), {field for m in members for field in m}
        columns += [c for c in (*HEADINGS, "acc1_best", "acc1") if c in there and c not in columns]
        columns += sorted(k for k in there if k.endswith("_masked") and k.removesuffix("_masked") in columns)
        by_row: dict[tuple, list[dict]] = {}
        for member in members:
            key = (*(member.get(k) for k in ("label", "arch", "epochs", "data")), json.dumps(member.get("settings")))
            by_row.setdefault(key, []).append(member)
        rows = [
            [
                f"{shown(label)}, {shown(arch)}{seeds(same)}{unfinished(same)}",
                shown(data),
                shown(epochs),
                *(cell([m[c] for m in same if c in m]) for c in columns),
            ]
            for (label, arch, epochs, data, _), same in by_row.items()
        ]
        headings = [HEADINGS.get(c, c) for c in columns]
        if with_published:  # its own table: other data, other sizes
            theirs = [
                [row["label"], published["data"], str(published["epochs"]), *(interval(row.get(c)) for c in columns)]
                for row in published["rows"]
            ]
            made.append((published["title"], ["published", "data", "epochs", *headings], theirs))
        which = f" ({EPOCHS})" if "acc1_best" in columns else ""
        made.append((f"Accuracy in percent of the runs here{which}", ["run", "data", "epochs", *headings], rows))
    return made


def shown(value) -> str:
    return "-" if value is None else printable(str(value))


def unfinished(runs: list[dict]) -> str:
    """Where a pre-training behind a result was not at its end, how far it had come; sets that an evaluation
    (tools/robustness.py) had not come to."""
    left, said = dict.fromkeys(str(name) for run in runs for name in run.get("pending") or ()), ""
    for run in runs:
        done, asked = (run.get(f"backbone_{name}") for name in ("epochs", "epochs_asked"))
        if isinstance(done, int) and isinstance(asked, int) and done < asked:
            said = f" (backbone NOT finished: {done} of {asked} epochs)"
    return said + (f" (unfinished: {shown(', '.join(left))})" if left else "")


def cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f"±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def seeds(runs: list[dict]) -> str:
    return f" (seeds {', '.join(str(r.get('seed')) for r in runs)})" if len(runs) > 1 else ""


def interval(published) -> str:
    """[mean, std] or [value] of a published table."""
    return "-" if published is None else "±".join(f"{v:.2f}" for v in published)


def layout(header: list[str], rows: list[list[str]], markdown: bool) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells):
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]
        return "| " + " | ".join(padded) + " |" if markdown else "  ".join(padded)

    rule = ["-" * w for w in widths]
    if markdown:
        rule = [rule[0]] + [r[:-1] + ":" for r in rule[1:]]
    return "\n".join([line(header), line(rule), *map(line, rows)])


if __name__ == "__main__":
    cli.run(main)
