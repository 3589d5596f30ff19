"""Print run folders beside the published table that they belong to, or as a page with curves.

    python tools/report.py RUNS...
    python tools/report.py RUNS... --html report.html

Runs from any working directory. A run's result.json names its table (a JSON file in the paper's
folder). Runs are one row only where all their recorded settings agree but the seed (places and
hardware aside): mean and standard deviation, the seeds listed. A row names the settings in which it
differs from most rows of the same script. A published number stands in the column of what it is:
"linear (best)" where the paper reports the best epoch on the validation set, "linear (last)" where
it is the last epoch.
"""

import csv
import io
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UsageError, cli, printable
from tools import report_page
from tools.report_runs import (
    HEADINGS,
    Row,
    epochs_of,
    find_results,
    pool,
    published_table,
    seed_of,
    seed_word,
    unfinished,
)

ABOUT = """\
The runs here; accuracies in percent, mean ± standard deviation over the seeds. last, best: epoch of
the linear evaluation (best is chosen on val); tuned: its rate is chosen on pictures kept back."""
ASCENDING = ("alignment", "uniformity")  # columns whose lowest number comes first


class Table(NamedTuple):
    """A table to print: its title, the keys of the columns, their headings, and rows of texts."""

    title: str
    columns: list[str]
    header: list[str]
    rows: list[list[str]]


def parse_args(argv=None):
    parser = cli.Parser(prog="report.py", description=__doc__.splitlines()[0])
    about = "run folders (or folders of them) with a result.json of an evaluation"
    parser.add_argument("runs", nargs="+", help=about)
    about = "of the tables; csv has the names of result.json as headings and no titles"
    parser.add_argument("--format", choices=FORMATS, default="text", help=about)
    about = f"print these numbers alone: {', '.join(HEADINGS)}, or those of a published table"
    parser.add_argument("--columns", metavar="NAME,NAME", help=about)
    about = "sort the runs by this number, the best first"
    parser.add_argument("--sort", metavar="NAME", help=about)
    about = "print the given runs alone"
    parser.add_argument("--no-published", action="store_true", help=about)
    about = "also write one page with a table to sort, curves, scores and pictures of the runs"
    parser.add_argument("--html", metavar="FILE", help=about)
    return cli.freeze(parser.parse_args(argv))


def main(argv=None) -> None:
    args = parse_args(argv)
    results = find_results(args.runs)
    chosen = args.columns.split(",") if args.columns else None
    _check_columns(results, chosen, args.sort)
    found = tables(results, not args.no_published, chosen, args.sort)
    if args.html:
        rows = ordered(pool(results), args.sort)
        report_page.write(args.html, rows, chosen or _columns_with_numbers(found, rows))
    print("\n\n".join(FORMATS[args.format](table) for table in found))
    if args.html:
        print(f"wrote {printable(args.html)}", file=sys.stderr)


def _check_columns(results: list[dict], chosen: list[str] | None, sort: str | None) -> None:
    published = [published_table(result["table"]) for result in results if result.get("table")]
    there = dict.fromkeys(name for table in published for name in table["columns"])
    there |= dict.fromkeys(columns_of({"columns": []}, results))
    for flag, name in [("columns", name) for name in chosen or ()] + [("sort", sort)]:
        if name is not None and name not in there:
            raise UsageError(f"--{flag} {name}: no run has it; there are {', '.join(there)}")


# ----------------------------------------------------------------------------------------- tables


def tables(
    results: list[dict], with_published: bool, chosen: list[str] | None, sort: str | None
) -> list[Table]:
    """Return a table, or two with the published one, for each that results name.

    chosen: the columns, or None for all. sort: the column that runs are sorted by.
    """
    grouped: dict[str | None, list[dict]] = {}
    for result in results:
        grouped.setdefault(result.get("table"), []).append(result)
    found = []
    for name, members in grouped.items():
        published = published_table(name) if name else {"columns": []}
        columns = chosen or columns_of(published, members)
        if name and with_published:  # a table of its own: other data, other sizes
            found.append(their_table(published, columns))
        found.append(our_table(ordered(pool(members), sort), columns))
    return found


def columns_of(published: dict, results: list[dict]) -> list[str]:
    """Return the columns of a published table, and others that these results have."""
    fields = {field for result in results for field in result}
    columns = list(published["columns"])
    columns += [name for name in HEADINGS if name in fields and name not in columns]
    masked = [field for field in fields if field.endswith("_masked")]
    return columns + sorted(name for name in masked if name.removesuffix("_masked") in columns)


def _columns_with_numbers(found: list[Table], rows: list[Row]) -> list[str]:
    """Return the columns of the tables in which a row has a number."""
    own = len(_heads("", [])[0])  # columns in front of the numbers
    columns = dict.fromkeys(name for table in found for name in table.columns[own:])
    return [name for name in columns if any(row.values(name) for row in rows)]


def ordered(rows: list[Row], sort: str | None) -> list[Row]:
    """Return the rows with the best mean of a column first, and those without it last."""
    if sort is None:
        return rows
    sign = 1 if sort in ASCENDING else -1
    with_it = [row for row in rows if row.values(sort)]
    return sorted(with_it, key=lambda row: sign * row.mean(sort)) + [
        row for row in rows if not row.values(sort)
    ]


def their_table(published: dict, columns: list[str]) -> Table:
    """Return the published numbers."""
    names, header = _heads("published", columns)
    rows = []
    for row in published["rows"]:
        cells = [interval(row.get(name)) for name in columns]
        rows.append([row["label"], published["data"], str(published["epochs"]), *cells])
    return Table(published["title"], names, header, rows)


def our_table(rows: list[Row], columns: list[str]) -> Table:
    """Return the rows of these runs."""
    names, header = _heads("run", columns)
    cells = []
    for row in rows:
        first = row.results[0]
        name = row.name + seeds(row.results) + unfinished(row.results)
        own = [shown(first.get("data")), shown(epochs_of(first))]
        cells.append([name, *own, *(cell(row.values(column)) for column in columns)])
    return Table(ABOUT, names, header, cells)


def _heads(first: str, columns: list[str]) -> tuple[list[str], list[str]]:
    names = [first, "data", "epochs", *columns]
    return names, [HEADINGS.get(name, name) for name in names]


# ------------------------------------------------------------------------------------------ cells


def shown(value) -> str:
    return "-" if value is None else printable(str(value))


def cell(values: list[float]) -> str:
    """Return mean ± standard deviation."""
    if not values:
        return "-"
    spread = f"±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def seeds(results: list[dict]) -> str:
    """Return the seeds of several results, in brackets; with that of the evaluation if one recurs.

    So 0/0, 0/1 are two evaluations of a network with seed 0. See `seed_word`.
    """
    if len(results) == 1:
        return ""
    numbers = [seed_of(result) for result in results]
    names = [seed_word(number) for number in numbers]
    if len(set(numbers)) < len(numbers):
        own = [seed_word(result.get("linear_seed", result.get("seed"))) for result in results]
        names = [f"{name}/{seed}" for name, seed in zip(names, own)]
    return f" (seeds {', '.join(names)})"


def interval(published: list[float] | None) -> str:
    """Return [mean, standard deviation] or [value] of a published table as a text."""
    return "-" if published is None else "±".join(f"{value:.2f}" for value in published)


# --------------------------------------------------------------------------------------- printing


def as_csv(table: Table) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.columns, *table.rows])
    return out.getvalue().rstrip("\n")


def as_text(table: Table) -> str:
    return f"{table.title}\n\n{layout(table.header, table.rows, markdown=False)}"


def as_markdown(table: Table) -> str:
    return f"{table.title}\n\n{layout(table.header, table.rows, markdown=True)}"


def as_latex(table: Table) -> str:
    """Return a tabular, with the title as a comment."""
    special = {ord(char): f"\\{char}" for char in "&%$#_{}"}
    special |= {ord("±"): "$\\pm$", ord("\\"): "\\textbackslash{}", ord("~"): "\\~{}"}
    lines = [
        " & ".join(text.translate(special) for text in cells) + r" \\"
        for cells in [table.header, *table.rows]
    ]
    head, *rows = lines
    form = "l" + "r" * (len(table.header) - 1)
    title = [f"% {line}" for line in table.title.split("\n")]
    begin = [*title, f"\\begin{{tabular}}{{{form}}}", "\\hline", head, "\\hline"]
    return "\n".join([*begin, *rows, "\\hline", "\\end{tabular}"])


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


FORMATS = {"text": as_text, "markdown": as_markdown, "csv": as_csv, "latex": as_latex}

if __name__ == "__main__":
    cli.run(main)
