"""Test the claims of the papers with runs of this project.

A paper's folder has claims.json: settings ("scales") with the commands of a run, the runs that
differ in some flags, and claims, each of which says which run ought to be better than which other.
A run's records (config.json, metrics.jsonl, result.json) are kept below results/; what has its
records is not run again. A claim is a paired difference over seeds with its 95 % interval.

    python tools/claims.py                                       # every claim and its verdict
    python tools/claims.py ring --run --scale cpu --cifar CIFAR  # run what one paper's claims lack
    python tools/claims.py --run --scale gpu --toy               # a few steps of each GPU setting
    python tools/claims.py --write                               # RESULTS.md, results/*/README.md
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common  # isort: split

from common import UserError, cli, printable
from common.files import ROOT
from tools import claim_pages, claim_records, claim_runs
from tools.claim_records import NAMES, Comparison
from tools.report import layout


def parse_args(argv=None, root: Path = ROOT):
    parser = cli.Parser(prog="claims.py", description=__doc__.splitlines()[0])
    about = "folders or names of claims; default: all"
    parser.add_argument("which", nargs="*", metavar="PAPER|CLAIM", help=about)
    scales = claim_records.scales(root)
    parser.add_argument("--scale", choices=scales, default="cpu", help="size of the runs")
    about = "with --run: a few steps of the first run of each paper; no records are kept"
    parser.add_argument("--toy", action="store_true", help=about)
    parser.add_argument("--run", action="store_true", help="run what has no records")
    about = "run the seeds from 0 to this number, exclusive"
    parser.add_argument("--seeds", type=cli.positive_int, default=3, help=about)
    about = "CIFAR-10 as files, of which smaller trees are linked"
    parser.add_argument("--cifar", metavar="TREE", help=about)
    about = "OMP_NUM_THREADS of the runs"
    parser.add_argument("--threads", type=cli.positive_int, help=about)
    about = "write RESULTS.md, the pages of results/ and results/ledger.json from the records"
    parser.add_argument("--write", action="store_true", help=about)
    return cli.freeze(parser.parse_args(argv))


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
                f"{printable(name)}: no paper's folder and no claim; there are {', '.join(names)}"
            )
    return {paper: chosen[paper] for paper in claims if paper in chosen}


def run_missing(args, chosen: dict[str, set[str]], root: Path) -> list[str]:
    """Run what the chosen claims have no records of; return what failed."""
    claims = [
        claim
        for paper, names in chosen.items()
        for claim in claim_records.comparisons(paper, args.scale, root)
        if claim.claim["name"] in names
    ]
    jobs = claim_records.missing(claims, args.seeds)
    if args.toy:
        settings = {setting.paper: setting for setting, _, _ in jobs}
        jobs = [(setting, next(iter(setting.runs)), 0) for setting in settings.values()]
        claim_runs.make_toy_pictures(root)
    else:
        for setting, _, _ in jobs:
            if setting.pictures:
                claim_runs.make_pictures(setting.pictures, args.cifar, root)
    return claim_runs.run_all(jobs, args.threads, args.toy)


@functools.cache
def is_stale(paper: str, commit: str) -> bool:
    """Return whether the code of a paper's runs has changed since a commit."""
    if commit.endswith("-dirty") or commit == "unknown":
        return True
    git = ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", paper, "common", "runner"]
    return subprocess.run(git, capture_output=True).returncode != 0


def listed(paper: str, claim: Comparison, scale: str) -> list[str]:
    """Return the row of a claim: name, published, differences, verdict."""
    differences = claim.differences()
    shown = [
        f"{NAMES.get(key, key)} {claim_records.difference(values)}"
        for key, values in differences.items()
        if values
    ]
    verdict = claim.verdict()
    if shown:
        commits = [
            (side.paper, side.environment(run, seed)["commit"])
            for side, run in claim.sides()
            for seed in side.seeds(run)
        ]
        if any(is_stale(*commit) for commit in commits):
            verdict += ", records of older code"
    name = f"{paper}: {claim.claim['name']}"
    return [name, claim.claim["published"], ", ".join(shown) or "-", verdict]


def main(argv=None, root: Path = ROOT) -> None:
    args = parse_args(argv, root)
    chosen = choose(args.which, root)
    failed = []
    if args.run:
        failed = run_missing(args, chosen, root)
    rows = [
        listed(paper, claim, args.scale)
        for paper in chosen
        for claim in claim_records.comparisons(paper, args.scale, root)
    ]
    header = ["claim", "published", f"here ({args.scale}), 95 % interval", "verdict"]
    print(layout(header, rows, markdown=False))
    if args.write:
        for path in claim_pages.write(root):
            print(f"wrote {path.relative_to(root)}")
    if failed:
        raise UserError(f"{len(failed)} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    cli.run(main)
