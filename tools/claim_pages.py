"""Pages about claims, written from the records: results/PAPER/README.md, RESULTS.md and the ledger.

Of a page of results/ only what follows its heading "Notes", prose about results, is kept as it is.
Of RESULTS.md and the pages of docs/ only what stands between `<!-- claims: ... -->` and
`<!-- end -->` is written anew.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from common import UserError, files
from runner import papers as declarations
from runner.records import read as read_records
from tools import claim_records as records
from tools.claim_records import NAMES, Comparison, Setting
from tools.report import cell, layout

PAGES = (  # with tables that are written here
    "RESULTS.md",
    "docs/compare.md",
    "docs/feature_transform.md",
    "docs/footing.md",
    "docs/nonsem_neg.md",
)
NOTES = "\n## Notes\n"
BLOCK = re.compile(r"(<!-- claims: ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
HEAD = (
    "The tables are written from the records in this folder by `python tools/claims.py --write`.\n"
    "A difference is paired over the seeds, with its 95 % interval (Student's t); a run is mean ±\n"
    "standard deviation. Accuracies are in percent."
)


def title(paper: str) -> str:
    """Return the title of a paper, or the name of a folder that declares none."""
    paper_declared = declarations.find().get(paper)
    return paper_declared.title if paper_declared else paper


# ----------------------------------------------------------------------------------------- tables


def claim_table(claims: list[Comparison]) -> str:
    """Return the claims that have records, beside what was published: Markdown."""
    numbers = claims[0].setting.numbers
    rows = []
    for claim in claims:
        if not claim.is_recorded():
            continue
        differences = claim.differences()
        said = claim.claim
        pair = f"`{said['better']}` - `{said['than']}`"
        count = len(differences[numbers[0]])
        shown = [records.difference(differences[key]) for key in numbers]
        cells = [said["claim"], said["published"], said["source"], pair, str(count)]
        rows.append([*cells, *shown, claim.verdict()])
    names = claims[0].setting.names
    head = ["claim", "published", "source", "pair", "seeds"]
    return layout([*head, *names, f"verdict ({names[0]})"], rows, markdown=True)


def measured(setting: Setting) -> Iterator[tuple[str, list[int], list[str]]]:
    """Yield (run, its seeds, its numbers as a table shows them) of the runs that have records."""
    for run in setting.runs:
        seeds = setting.seeds(run)
        if seeds:
            yield run, seeds, [cell(setting.values(run, key)) for key in setting.numbers]


def distinct(environments: list[dict], key: str) -> str:
    """Return the different values of a key of `Setting.environment`, in order, for a cell."""
    return ", ".join(dict.fromkeys(environment[key] for environment in environments))


def run_table(setting: Setting) -> str:
    """Return mean ± standard deviation, precision, commit and flags of the recorded runs."""
    rows = []
    for run, seeds, cells in measured(setting):
        made = [setting.environment(run, seed) for seed in seeds]
        how = [distinct(made, "precision"), distinct(made, "commit")]
        flags = f"`{setting.runs[run]}`" if setting.runs[run] else "-"
        rows.append([f"`{run}`", ", ".join(map(str, seeds)), *cells, *how, flags])
    head = ["run", "seeds", *setting.names, "precision", "commit", "flags"]
    return layout(head, rows, markdown=True)


def footing_table(scale: str, root: Path, folder: str) -> str:
    """Return the recorded runs of all papers at a scale in one table, with minutes: Markdown."""
    rows = []
    settings = [records.setting(paper, scale, root) for paper in records.papers(root)]
    settings = [setting for setting in settings if setting]
    for setting in settings:
        for run, seeds, cells in measured(setting):
            made = [setting.environment(run, seed) for seed in seeds]
            minutes = f"{statistics.median(env['seconds'] for env in made) / 60:.0f}"
            page = f"[{setting.paper}]({folder}/{setting.paper}/README.md)"
            rows.append(
                [page, f"`{run}`", str(len(seeds)), *cells, distinct(made, "precision"), minutes]
            )
    if not rows:
        return "No run of this scale has been recorded."
    head = ["paper", "run", "seeds", *settings[0].names, "precision", "minutes"]
    return layout(head, rows, markdown=True)


def course_table(scale: str, root: Path, folder: str) -> str:
    """Return k-NN in the course of each training at a scale, by epochs, a row a seed: Markdown."""
    courses = {}
    for paper in records.papers(root):
        setting = records.setting(paper, scale, root)
        for run in setting.runs if setting else ():
            for seed in setting.seeds(run):
                courses[paper, run, seed] = setting.course(run, seed, "knn_acc1")
    epochs = sorted({epoch for course in courses.values() for epoch in course})
    rows = [
        [f"[{paper}]({folder}/{paper}/README.md)", f"`{run}`", str(seed)]
        + [f"{course[epoch]:.1f}" if epoch in course else "" for epoch in epochs]
        for (paper, run, seed), course in courses.items()
    ]
    return layout(["paper", "run", "seed", *map(str, epochs)], rows, markdown=True)


def curve_table(published: Path, folder: Path) -> str:
    """Return a published training curve beside that of the run recorded in `folder`."""
    theirs = json.loads(published.read_text())
    ours = {}
    for line in read_records(folder / "metrics.jsonl"):
        ours.setdefault(line["epoch"] + 1, {}).update(line)
    rows = []
    for key, name, digits in (("knn_acc1", "k-NN", 2), ("epoch_loss", "loss", 3)):
        values = [ours.get(epoch, {}).get(key) for epoch in theirs["epochs"]]
        rows.append([f"{name}, published", *(f"{value:.{digits}f}" for value in theirs[key])])
        cells = ["" if value is None else f"{value:.{digits}f}" for value in values]
        rows.append([f"{name}, here", *cells])
    return layout(["epoch", *map(str, theirs["epochs"])], rows, markdown=True)


def verdict_table(scale: str, root: Path, folder: str) -> str:
    """Return one line for each claim at a scale, with links to the pages in `folder`."""
    rows = []
    for paper in records.papers(root):
        for claim in records.comparisons(paper, scale, root):
            if not claim.sides():
                continue
            page = f"[{paper}]({folder}/{paper}/README.md)" if claim.is_recorded() else paper
            number = NAMES.get(claim.number, claim.number)
            values = claim.differences()[claim.number]
            verdict = records.verdict(values)
            if claim.failures():
                verdict += ", runs failed"
            shown = f"{number} {records.difference(values)}"
            seeds = str(len(values))
            if mixed := claim.mixed():
                seeds += f" ({len(mixed)} of mixed precision)"
            rows.append([claim.claim["claim"], verdict, shown, seeds, page])
    head = ["claim", "verdict", "difference, 95 % interval", "seeds", "records"]
    return layout(head, rows, markdown=True)


OF_SCALE = {"verdicts": verdict_table, "runs": footing_table, "course": course_table}


def study_tables(name: str, root: Path) -> str:
    """Return the runs of docs/NAME.json recorded in results/NAME, and its claims: Markdown."""
    path = root / "docs" / f"{name}.json"
    content = records.read_study(path)
    scale = next(iter(content["scales"]))
    setting = records.setting(name, scale, path)
    setting = dataclasses.replace(setting, records=root / "results" / name)
    rows = []
    for said in content["claims"]:
        claim = Comparison(name, said, setting, scale)
        differences = claim.differences()
        shown = [records.difference(differences[key]) for key in setting.numbers]
        rows.append([f"`{said['better']}` - `{said['than']}`", *shown, claim.verdict()])
    if not rows:
        return run_table(setting)
    head = ["difference, 95 % interval", *setting.names, f"verdict ({setting.names[0]})"]
    return f"{run_table(setting)}\n\n{layout(head, rows, markdown=True)}"


# ------------------------------------------------------------------------------------------ pages


def page(paper: str, text: str, root: Path) -> str:
    """Return results/PAPER/README.md; `text` is the page as it is, whose notes are kept."""
    parts = [f"# {title(paper)}: results\n", HEAD]
    for scale in records.papers(root)[paper]["scales"]:
        setting = records.setting(paper, scale, root)
        if any(setting.seeds(run) or setting.failed(run) for run in setting.runs):
            parts.append(section(setting))
    _, heading, notes = text.partition(NOTES)
    return "\n".join(parts) + "\n" + heading + notes


def section(setting: Setting) -> str:
    """Return the part of a page about one scale: setting, claims, runs, commands, hardware."""
    first = next(iter(setting.runs))
    command = f"python tools/claims.py {setting.paper} --run --scale {setting.scale}"
    if setting.pictures:
        command += " --cifar CIFAR_TREE"
    commands = [command for command, _ in setting.commands(first, 0)]
    return "\n".join(
        [
            f"\n## Scale {setting.scale}\n",
            f"{setting.about[0].upper()}{setting.about[1:]}.\n",
            "### Claims\n",
            claim_table(records.comparisons(setting.paper, setting.scale, setting.root)),
            "\n### Runs\n",
            run_table(setting),
            *(f"\n`{run}` is `{other}`: the same steps." for run, other in setting.same_as.items()),
            f"\n{hardware(setting)}",
            "\nThe first command runs what has no records; the others are one of its runs, "
            f"`{first}` with seed 0.",
            "The flags of another run take the place of that run's.\n",
            "```",
            command,
            *commands,
            "```",
        ]
    )


def hardware(setting: Setting) -> str:
    """Return a sentence with the machines and PyTorch of the recorded runs and, if noted, times."""
    environments = [
        setting.environment(run, seed) for run in setting.runs for seed in setting.seeds(run)
    ]
    machines = dict.fromkeys(
        f"{env['device']}, torch {env['torch']}" for env in environments if env["device"]
    )
    text = f"Hardware: {'; '.join(machines) or 'not recorded'}."
    seconds = [env["seconds"] for env in environments if env["seconds"]]
    if seconds:
        minutes = statistics.median(seconds) / 60
        text += f" A run takes {minutes:.1f} minutes (median of {len(seconds)})."
    return text


def results(text: str, root: Path) -> str:
    """Return RESULTS.md, or a page of docs/, with its blocks made anew.

    `verdicts SCALE FOLDER` is one line for each claim, with links into FOLDER, that of the results;
    `runs SCALE FOLDER` one for each run of all papers, and `course SCALE FOLDER` its k-NN in the
    course of training; `curve PAPER RUN` is the run in
    results/PAPER/RUN beside the published curve that `curves` in the paper's claims.json names;
    `study NAME` is that of docs/NAME.json, recorded in results/NAME. Raises UserError for any other
    block.
    """

    def block(match: re.Match) -> str:
        kind, *names = match[2].split()
        if kind in OF_SCALE and len(names) == 2 and names[0] in records.scales(root):
            table = OF_SCALE[kind](names[0], root, names[1])
        elif kind == "curve" and len(names) == 2 and names[0] in records.papers(root):
            paper, run = names
            published = records.papers(root)[paper]["curves"][run]
            table = curve_table(root / published, root / "results" / paper / run)
        elif kind == "study" and len(names) == 1:
            table = study_tables(names[0], root)
        else:
            raise UserError(f"no table is known for `claims: {match[2]}`")
        return f"{match[1]}{table}\n{match[3]}"

    return BLOCK.sub(block, text)


def ledger(root: Path) -> list[dict]:
    """Return every number of every claim at every scale that has records."""
    rows = []
    for paper, content in records.papers(root).items():
        for scale in content["scales"]:
            for claim in records.comparisons(paper, scale, root):
                rows += ledger_rows(paper, claim)
    return rows


def ledger_rows(paper: str, comparison: Comparison) -> list[dict]:
    """Return a row for each number of a claim at one scale; [] where there are no records."""
    claim = comparison.claim
    names = (claim["better"], claim["than"])
    runs = {
        name: [side.environment(run, seed) for seed in side.seeds(run)]
        for name, (side, run) in zip(names, comparison.sides())
    }
    failed = [f"{run}, seed {seed}" for run, seed in comparison.failures()]
    rows = []
    for key, values in comparison.differences().items():
        if not values and not failed:
            continue
        half = records.interval(values)
        rows.append(
            {
                "paper": paper,
                "scale": comparison.scale,
                "name": claim["name"],
                "claim": claim["claim"],
                "published": claim["published"],
                "source": claim["source"],
                "number": key,
                "differences": [round(value, 4) for value in values],
                "mean": round(statistics.mean(values), 4) if values else None,
                "interval": None if half is None else round(half, 4),
                "verdict": records.verdict(values),
                "failed": failed,
                "runs": runs,
            }
        )
    return rows


def write(root: Path) -> list[Path]:
    """Write all pages and the ledger anew; return the files."""
    pages = (root / page for page in PAGES)
    texts = {path: results(path.read_text(), root) for path in pages if path.is_file()}
    for paper in records.papers(root):
        path = root / "results" / paper / "README.md"
        texts[path] = page(paper, path.read_text() if path.is_file() else "", root)
    texts[root / "results" / "ledger.json"] = json.dumps(ledger(root), indent=1) + "\n"
    for path, text in texts.items():
        with files.replacing(path, "w") as file:
            file.write(text)
    return list(texts)
