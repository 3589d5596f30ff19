"""Run folders beside the published table they belong to: `python tools/report.py RUNS...`, from any working directory.

A run's result.json names its table (a JSON file in the paper's folder). Runs with the same label and setting are one row:
mean and standard deviation, the seeds listed.
"""

import csv
import io
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UsageError, cli
from common.run import ROOT


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
    return [folder / name for name in names if (folder / name).exists()]


def find_results(paths: list[str]) -> list[dict]:
    """The result.json of every folder named, or of the folders directly below it."""
    results = []
    for path in map(Path, paths):
        found = [path] if path.is_file() else results_in(path)
        if not found and path.is_dir():
            found = [file for folder in sorted(p for p in path.iterdir() if p.is_dir()) for file in results_in(folder)]
        if not found:
            raise UsageError(f"{path}: no result.json in it; an evaluation script writes one when it is done")
        for file in found:
            try:
                results.append(json.loads(file.read_text()) | {"folder": str(file.parent)})
            except (ValueError, TypeError):
                raise UsageError(f"{file}: not a result of an evaluation script") from None
    return results


def tables(results: list[dict], with_published: bool) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) for every published table that a result names, and one for the results without any."""
    grouped: dict[str | None, list[dict]] = {}
    for result in results:
        grouped.setdefault(result.get("table"), []).append(result)
    made = []
    for table, members in grouped.items():
        if table is None:
            columns = [c for c in ("acc1", "acc5", "acc1_best") if any(c in m for m in members)]
            rows = [[m["folder"] + unfinished(m), *(cell([m[c]]) if c in m else "-" for c in columns)] for m in members]
            made.append(("Linear evaluation (percent; acc1 and acc5 after the last epoch)", ["run", *columns], rows))
            continue
        published = json.loads((ROOT / table).read_text())
        columns = list(published["columns"])
        columns += sorted(
            {k for m in members for k in m if k.endswith("_masked") and k.removesuffix("_masked") in columns}
        )
        by_row: dict[tuple, list[dict]] = {}
        for member in members:
            key = (*(member.get(k) for k in ("label", "arch", "epochs", "data")), json.dumps(member.get("settings")))
            by_row.setdefault(key, []).append(member)
        rows = [
            [
                f"{label}, {arch}{seeds(same)}{unfinished(*same)}",
                str(data),
                str(epochs),
                *(cell([m[c] for m in same if c in m]) for c in columns),
            ]
            for (label, arch, epochs, data, _), same in by_row.items()
        ]
        if with_published:  # its own table: other data, other sizes
            theirs = [
                [row["label"], published["data"], str(published["epochs"]), *(interval(row.get(c)) for c in columns)]
                for row in published["rows"]
            ]
            made.append((published["title"], ["published", "data", "epochs", *columns], theirs))
        made.append(("Accuracy in percent of the runs here", ["run", "data", "epochs", *columns], rows))
    return made


def cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f"±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def seeds(runs: list[dict]) -> str:
    return f" (seeds {', '.join(str(r.get('seed')) for r in runs)})" if len(runs) > 1 else ""


def unfinished(*runs: dict) -> str:
    """Where the pre-training behind a result was not at its end: how far it had come."""
    for run in runs:
        done, asked = (run.get(f"backbone_{name}") for name in ("epochs", "epochs_asked"))
        if isinstance(done, int) and isinstance(asked, int) and done < asked:
            return f" (backbone NOT finished: {done} of {asked} epochs)"
    return ""


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
