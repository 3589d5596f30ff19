"""Test the claims of the papers with runs of this project, or run a study of one's own.

A paper's folder has claims.json: settings ("scales") with the commands of a run, the runs that
differ in some flags, and claims, each of which says which run ought to be better than which other.
A run's records (config.json, metrics.jsonl, result.json) are kept below results/; what has its
records is not run again. A claim is a paired difference over seeds with its 95 % interval.

    python tools/claims.py                                       # every claim and its verdict
    python tools/claims.py ring --run --scale cpu --cifar CIFAR  # run what one paper's claims lack
    python tools/claims.py --run --scale gpu --toy               # a few steps of each GPU setting
    python tools/claims.py --write                               # the tables of the pages
    python tools/claims.py --study my.json --run --jobs 2 --figure my.png

A study is a file in the same format (docs/studies.md). All its runs are made, its paths start from
the working directory, and the table of its runs is printed as well.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import UsageError, UserError, cli, launch, printable
from common.files import ROOT
from tools import claim_figure, claim_pages, claim_records, claim_runs
from tools.claim_records import NAMES, Comparison, Setting
from tools.report import cell, layout


def parse_args(argv=None):
    parser = cli.Parser(prog="claims.py", description=__doc__.splitlines()[0])
    about = "folders or names of claims; default: all"
    parser.add_argument("which", nargs="*", metavar="PAPER|CLAIM", help=about)
    about = "a file in the format of claims.json, in place of the papers' claims"
    parser.add_argument("--study", type=Path, metavar="FILE", help=about)
    about = "size of the runs; default: cpu, or the first one of the study"
    parser.add_argument("--scale", help=about)
    about = "with --run: a few steps of the first run of each paper; no records are kept"
    parser.add_argument("--toy", action="store_true", help=about)
    parser.add_argument("--run", action="store_true", help="run what has no records")
    about = "run the seeds from 0 to this number, exclusive"
    parser.add_argument("--seeds", type=cli.positive_int, default=3, help=about)
    about = "runs at once; they share the processor's cores unless --threads is given"
    parser.add_argument("--jobs", type=cli.positive_int, default=1, help=about)
    about = "CIFAR-10 as image files; smaller trees are made as links to them"
    parser.add_argument("--cifar", metavar="TREE", help=about)
    about = "OMP_NUM_THREADS of the runs"
    parser.add_argument("--threads", type=cli.positive_int, help=about)
    about = "draw the differences that the claims are about, and the runs of a --study"
    parser.add_argument("--figure", type=cli.figure_path, metavar="FILE", help=about)
    about = "draw the differences in k-NN in the course of training, where the runs logged it"
    parser.add_argument("--curves", type=cli.figure_path, metavar="FILE", help=about)
    about = "write the tables of RESULTS.md, docs/ and results/ from the records"
    parser.add_argument("--write", action="store_true", help=about)
    args = parser.parse_args(argv)
    for flag in ("toy", "jobs", "threads", "cifar"):
        if flag in args.typed and not args.run:
            raise UsageError(f"--{flag} needs --run: add it, or omit the flag")
    if args.study and args.write:
        raise UsageError("--write makes the pages of this project, not of a --study: take --figure")
    if args.jobs > 1 and args.threads is None:
        args.threads = max(1, launch.cores() // args.jobs)
    return cli.freeze(args)


def chosen_scale(args, root: Path) -> str:
    """Return the scale that was asked for. Raises UsageError for one that nothing is set up for."""
    scales = claim_records.scales(root)
    first = next(iter(claim_records.read_study(root)["scales"])) if args.study else "cpu"
    scale = args.scale or first
    if scale not in scales:
        raise UsageError(f"--scale {printable(scale)}: there are {', '.join(scales)}")
    return scale


def choose(which: list[str], root: Path) -> dict[str, set[str]]:
    """Return {paper: names of the claims asked for}, of all papers where nothing is asked for.

    Raises UserError for a name that is neither a folder nor a claim.
    """
    claims = {
        paper: {claim["name"] for claim in content["claims"]}
        for paper, content in claim_records.papers(root).items()
    }
    if not which:
        return claims
    chosen = {}
    for name in which:
        owners = [paper for paper, names in claims.items() if name in names]
        if name in claims:
            chosen[name] = claims[name]
        elif owners:
            chosen.setdefault(owners[0], set()).add(name)
        else:
            names = [*claims, *(name for paper in claims for name in sorted(claims[paper]))]
            raise UserError(
                f"{printable(name)}: neither a paper's folder nor a claim; there are "
                f"{', '.join(names)}"
            )
    return {paper: chosen[paper] for paper in claims if paper in chosen}


def check_toy(jobs: list[tuple[Setting, str, int]]) -> None:
    """Raise UsageError where a step has no flags for toy size, or the folder of the whole run."""
    for setting, run, seed in jobs:
        if not all("toy" in step for step in setting.steps):
            raise UsageError(
                f"--toy: give each step of scale {setting.scale} its flags as `toy`, or omit it"
            )
        for whole, toy in zip(setting.commands(run, seed), setting.commands(run, seed, toy=True)):
            if whole[1] == toy[1]:  # which would be removed first
                raise UsageError(
                    f"--toy: {printable(toy[1])} is also the folder of the whole run: put {{name}} "
                    "into it, or omit --toy"
                )


def run_missing(args, claims: list[Comparison], studied: Setting | None, root: Path) -> list[str]:
    """Make the runs of the claims, or of a study, that have no records; return what failed."""
    jobs = claim_records.missing(claims, args.seeds)
    if studied and not args.which:
        runs = [(studied, run) for run in studied.runs]
        jobs = claim_records.unrecorded(runs, args.seeds)
    root = studied.root if studied else root
    if args.toy:
        settings = {setting.paper: setting for setting, _, _ in jobs}
        jobs = [(setting, next(iter(setting.runs)), 0) for setting in settings.values()]
        check_toy(jobs)
        claim_runs.make_toy_pictures(root)
    else:
        for setting, _, _ in jobs:
            if setting.pictures:
                claim_runs.make_pictures(setting.pictures, args.cifar, root)
    return claim_runs.run_all(jobs, args.threads, args.toy, args.jobs)


# ----------------------------------------------------------------------------------------- tables


@functools.cache
def is_stale(code: tuple[str, ...], commit: str) -> bool:
    """Return whether one of these folders of code has changed since a commit."""
    if commit.endswith("-dirty") or commit == "unknown":
        return True
    git = ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", *code]
    try:
        return subprocess.run(git, capture_output=True).returncode != 0
    except OSError:  # there is no git
        return True


def listed(claim: Comparison) -> list[str]:
    """Return the row of a claim: name, seeds, difference, verdict."""
    name = f"{claim.paper}: {claim.claim['name']}"
    values = claim.differences().get(claim.number, []) if claim.sides() else []
    shown = "-"
    verdict = claim.verdict()
    if values:
        number = NAMES.get(claim.number, claim.number)
        verdict = verdict.replace(f" ({number})", "")  # it is in the column before
        shown = f"{number} {claim_records.difference(values)}"
        made = [
            (side.code, side.environment(run, seed)["commit"])
            for side, run in claim.sides()
            for seed in side.seeds(run)
        ]
        if any(is_stale(*of_run) for of_run in made):
            verdict += " *"
        if mixed := claim.mixed():
            verdict += f" (mixed precision: seed {', '.join(map(str, mixed))})"
    return [name, str(len(values)), shown, verdict]


def print_claims(claims: list[Comparison]) -> None:
    """Print a line for each claim, and what a star at its end means."""
    rows = [listed(claim) for claim in claims]
    print(layout(["claim", "seeds", "difference, 95 % interval", "verdict"], rows, markdown=False))
    if any(" *" in row[-1] for row in rows):
        print(
            "\n* from records of older code: common, runner or another folder that their commands\n"
            "use has changed since, or had changes that were not committed. --run keeps such\n"
            "records; delete their folders to make them again."
        )


def shown(setting: Setting, run: str, key: str) -> str:
    """Return the cell of a number, "-" where the steps that a run takes do not record it."""
    try:
        return cell(setting.values(run, key))
    except UserError:
        return "-"


def print_runs(setting: Setting) -> None:
    """Print mean ± standard deviation of each number of the runs that have records."""
    rows = [
        [run, str(len(setting.seeds(run)))] + [shown(setting, run, key) for key in setting.numbers]
        for run in setting.runs
    ]
    print(f"{setting.paper}, {setting.about}: mean ± standard deviation over the seeds\n")
    print(layout(["run", "seeds", *setting.names], rows, markdown=False) + "\n")
    for run in setting.runs:
        for seed in setting.seeds(run):
            if setting.is_changed(run, seed):
                suffixes = dict.fromkeys(step["suffix"] for step in setting.steps_of(run))
                folders = (setting.record(run, seed, suffix) for suffix in suffixes)
                listed = ", ".join(printable(folder) for folder in folders if folder.exists())
                print(
                    f"note: {run}, seed {seed} was made by other commands than it has now; to make "
                    f"it again, delete {listed}"
                )


def main(argv=None, root: Path = ROOT) -> None:
    args = parse_args(argv)
    root = args.study or root
    scale = chosen_scale(args, root)
    studied = claim_records.setting(root.stem, scale, root) if args.study else None
    claims = [
        claim
        for paper, names in choose(args.which, root).items()
        for claim in claim_records.comparisons(paper, scale, root)
        if claim.claim["name"] in names
    ]
    failed = run_missing(args, claims, studied, root) if args.run else []
    if studied:
        print_runs(studied)
    if claims:
        print_claims(claims)
    if args.figure:
        claim_figure.draw(args.figure, studied, claims)
        print(f"wrote {printable(args.figure)}")
    if args.curves:
        claim_figure.draw_curves(args.curves, claims)
        print(f"wrote {printable(args.curves)}")
    if args.write:
        for path in claim_pages.write(root):
            print(f"wrote {path.relative_to(root)}")
    if failed:
        raise UserError(f"{len(failed)} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    cli.run(main)
