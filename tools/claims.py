"""What the papers claim, run here: listed by `python tools/claims.py`, run with `--run`, into RESULTS.md with `--write`.

A paper's folder has claims.json: settings ("scales") with the commands of a run, the runs that differ in some flags, and
claims, each of which says which run ought to be better than which other. A run's records (config.json, metrics.jsonl,
result.json) are kept below results/; what has its records is not run again. A claim is a paired difference over seeds with its
95 % interval.

    python tools/claims.py                                         # every claim: published, ours, verdict
    python tools/claims.py ring --run --scale cpu --cifar CIFAR    # of one paper: what is missing, then the list
    python tools/claims.py --run --scale gpu --toy                 # one run of each paper's GPU setting, a few steps of it
    python tools/claims.py --write                                 # RESULTS.md from the records, and results/ledger.json
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import common  # isort: split

from common import UserError, cli, files, printable
from common.files import ROOT
from runner.progress import clock
from runner.folder import environment
from preprocess import demo
from tools.report import layout

# Student's t, two-sided 95 %, by degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
NAMES = {"acc1": "linear", "acc1_best": "linear, best epoch", "knn_acc1": "k-NN"}
KEPT = ("config.json", "metrics.jsonl", "result.json")
TOY = "runs/claims/toy-pictures"
FAILED = "failed.json"  # instead of the records of a run that did not come through
BLOCK = re.compile(r"(<!-- claims: (\S+) (\S+) (runs|claims|curve) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass
class Setting:
    """Runs of a paper at one scale. steps: a command, the folder it writes, the suffix of its records; runs: {name: flags}.

    toy: flags after those of a step, with which it ends after a few batches.
    """

    paper: str
    scale: str
    about: str
    records: Path
    steps: list[dict]
    runs: dict[str, str]
    numbers: list[str]
    pictures: dict | None

    def record(self, name: str, seed: int, suffix: str = "") -> Path:
        return self.records / f"{name}-s{seed}{suffix}"

    def done(self, name: str, seed: int) -> bool:
        return (self.record(name, seed, self.steps[-1]["suffix"]) / "result.json").is_file()

    def failed(self, name: str) -> list[int]:
        """Seeds of which a command failed, and that have not come through since."""
        found = (
            re.fullmatch(re.escape(name) + r"-s(\d+)", path.parent.name) for path in self.records.glob(f"*/{FAILED}")
        )
        return sorted(int(match[1]) for match in found if match and not self.done(name, int(match[1])))

    def seeds(self, name: str) -> list[int]:
        """Seeds of which there are records."""
        last = self.steps[-1]["suffix"]
        found = (re.fullmatch(re.escape(name) + r"-s(\d+)" + last, path.name) for path in self.records.glob("*"))
        return sorted(int(match[1]) for match in found if match and self.done(name, int(match[1])))

    def number(self, name: str, seed: int, key: str) -> float:
        """Of the last step's result.json, else the newest of that name in any step's metrics.jsonl."""
        for step in reversed(self.steps):
            folder = self.record(name, seed, step["suffix"])
            result = folder / "result.json"
            lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
            for text in ([result.read_text()] if result.is_file() else []) + lines[::-1]:
                if key in (found := json.loads(text)):
                    return float(found[key])
        raise UserError(f"{printable(self.record(name, seed))}: no {key} in its records")

    def facts(self, name: str, seed: int) -> dict:
        """Commit, hardware and, where it was noted, the time of a run."""
        folder = self.record(name, seed, self.steps[-1]["suffix"])
        said = json.loads((folder / "result.json").read_text())
        took = json.loads((folder / "took.json").read_text()) if (folder / "took.json").is_file() else {}
        return {"seed": seed, "commit": said["commit"], "device": said.get("device"), "seconds": took.get("seconds")}

    def commands(self, name: str, seed: int, toy: bool = False) -> list[tuple[str, Path]]:
        """(command, folder that it writes) of every step."""
        names = {"name": f"{'toy-' * toy}{name}-s{seed}", "seed": str(seed), "flags": self.runs[name]}
        if self.pictures:
            names["data"] = TOY if toy else self.pictures["name"]
        more = [" " + step["toy"] if toy else "" for step in self.steps]
        return [
            (_filled(step["command"] + extra, names), ROOT / _filled(step["folder"], names))
            for step, extra in zip(self.steps, more)
        ]


def _filled(text: str, names: dict[str, str]) -> str:
    return re.sub(r"{(\w+)}", lambda found: names[found[1]], text)


def papers() -> dict[str, dict]:
    """The content of every claims.json, by the folder's name."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(ROOT.glob("*/claims.json"))}


def scales() -> list[str]:
    return sorted({scale for content in papers().values() for scale in content["scales"]})


def setting(paper: str, content: dict, scale: str) -> Setting | None:
    found = content["scales"].get(scale)
    if found is None:
        return None
    keys = ("about", "steps", "runs", "numbers")
    return Setting(
        paper, scale, records=ROOT / found["records"], pictures=found.get("pictures"), **{k: found[k] for k in keys}
    )


# ------------------------------------------------------------------------------------------------------------- numbers


def interval(values: list[float]) -> float | None:
    """Half of the 95 % interval of a mean (Student's t); None for fewer than three values, of which it says nothing."""
    if len(values) < 3:
        return None
    t = T95[len(values) - 2] if len(values) - 2 < len(T95) else 2.1
    return t * statistics.stdev(values) / math.sqrt(len(values))


def verdict(differences: list[float]) -> str:
    """Of `better - than`, one number a seed."""
    if len(differences) < 3:
        return f"too few seeds ({len(differences)})" if differences else "not run"
    mean, half = statistics.mean(differences), interval(differences)
    if abs(mean) <= half:
        return "cannot be told"
    return "agrees" if mean > 0 else "does not agree"


def sides(claim: dict, how: Setting) -> list[tuple[Setting, str]]:
    """What a claim compares, each a setting and its run: RUN of the same paper, or PAPER/RUN; [] where one is not set up."""
    found = []
    if claim.get("number", how.numbers[0]) not in how.numbers:
        return []
    for name in (claim["better"], claim["than"]):
        paper, _, run = name.rpartition("/")
        other = setting(paper, papers()[paper], how.scale) if paper else how
        if other is None or run not in other.runs:
            return []
        found.append((other, run))
    return found


def compared(claim: dict, how: Setting) -> dict[str, list[float]]:
    """For each number: `better - than` of every seed that both have."""
    if not (pair := sides(claim, how)):
        return {}
    (a, better), (b, than) = pair
    both = [seed for seed in a.seeds(better) if seed in b.seeds(than)]
    return {key: [a.number(better, s, key) - b.number(than, s, key) for s in both] for key in how.numbers}


def lost(claim: dict, how: Setting) -> list[tuple[str, int]]:
    """(run, seed) of what a claim compares where a command failed."""
    return [(run, seed) for side, run in sides(claim, how) for seed in side.failed(run)]


def concluded(claim: dict, how: Setting) -> str:
    """The verdict by the number that the claim is about (the setting's first, unless it says), and which runs failed."""
    found, first = compared(claim, how), claim.get("number", how.numbers[0])
    if not found:
        return f"not set up at scale {how.scale}"
    about = f" ({NAMES.get(first, first)})" if first != how.numbers[0] else ""
    failed = [f"`{run}` seed {seed}" for run, seed in lost(claim, how)]
    return verdict(found[first]) + about + (f"; failed: {', '.join(failed)}" if failed else "")


def difference(values: list[float]) -> str:
    if not values:
        return "-"
    half = interval(values)
    return f"{statistics.mean(values):+.2f}" + ("" if half is None else f"±{half:.2f}")


def run_table(how: Setting) -> str:
    """Mean ± standard deviation of every run that has records, Markdown."""
    rows = []
    for name in how.runs:
        if seeds := how.seeds(name):
            cells = [[how.number(name, s, key) for s in seeds] for key in how.numbers]
            spread = [f"±{statistics.stdev(values):.2f}" if len(values) > 1 else "" for values in cells]
            shown = [f"{statistics.mean(values):.2f}{sd}" for values, sd in zip(cells, spread)]
            rows.append([f"`{name}`", ", ".join(map(str, seeds)), *shown])
    return layout(["run", "seeds", *(NAMES.get(key, key) for key in how.numbers)], rows, markdown=True)


def claim_table(content: dict, how: Setting) -> str:
    rows = []
    for claim in content["claims"]:
        found = compared(claim, how)
        if any(found.values()) or lost(claim, how):
            pair = f"`{claim['better']}` - `{claim['than']}`"
            shown = [difference(values) for values in found.values()]
            count = str(len(found[how.numbers[0]]))
            rows.append([claim["claim"], claim["published"], pair, count, *shown, concluded(claim, how)])
    numbers = [NAMES.get(key, key) for key in how.numbers]
    return layout(["claim", "published", "pair", "seeds", *numbers, f"verdict ({numbers[0]})"], rows, markdown=True)


def curve_table(published: Path, records: Path) -> str:
    """A published training curve, and that of the run whose metrics.jsonl is in `records`, as far as it has come."""
    theirs, ours = json.loads(published.read_text()), {}
    for line in map(json.loads, (records / "metrics.jsonl").read_text().splitlines()):
        ours.setdefault(line["epoch"] + 1, {}).update(line)
    rows = []
    for key, name, digits in (("knn_acc1", "k-NN", 2), ("epoch_loss", "loss", 3)):
        found = [ours.get(epoch, {}).get(key) for epoch in theirs["epochs"]]
        rows.append([f"{name}, published", *(f"{value:.{digits}f}" for value in theirs[key])])
        rows.append([f"{name}, here", *("" if value is None else f"{value:.{digits}f}" for value in found)])
    return layout(["epoch", *map(str, theirs["epochs"])], rows, markdown=True)


def written(text: str) -> str:
    """RESULTS.md with every block between `<!-- claims: PAPER SCALE runs|claims -->` and `<!-- end -->` made anew, and those
    of `<!-- claims: PAPER RUN curve -->`: results/PAPER/RUN beside the curve that "curves" in its claims.json names."""
    known = papers()

    def block(found: re.Match) -> str:
        paper, scale, kind = found[2], found[3], found[4]
        if kind == "curve":
            published = known[paper]["curves"][scale]
            return found[1] + curve_table(ROOT / published, ROOT / "results" / paper / scale) + "\n" + found[5]
        how = setting(paper, known.get(paper, {"scales": {}}), scale)
        if how is None:
            raise UserError(f"RESULTS.md: a table of {paper} at scale {scale}, of which no claims.json knows")
        return found[1] + (run_table(how) if kind == "runs" else claim_table(known[paper], how)) + "\n" + found[5]

    return BLOCK.sub(block, text)


def ledger() -> list[dict]:
    """Every claim at every scale that has records."""
    rows = []
    for paper, content in papers().items():
        for scale in content["scales"]:
            how = setting(paper, content, scale)
            for claim in content["claims"]:
                pair = sides(claim, how)
                failed = [f"{run}, seed {seed}" for run, seed in lost(claim, how)]
                runs = {
                    name: [side.facts(run, seed) for seed in side.seeds(run)]
                    for name, (side, run) in zip((claim["better"], claim["than"]), pair)
                }
                for key, values in compared(claim, how).items():
                    if not values and not failed:
                        continue
                    row = {"paper": paper, "scale": scale, "name": claim["name"], "claim": claim["claim"]}
                    row |= {"published": claim["published"], "source": claim["source"], "number": key}
                    row |= {"differences": [round(v, 4) for v in values]}
                    row |= {"mean": round(statistics.mean(values), 4) if values else None}
                    half = interval(values)
                    row |= {"interval": half and round(half, 4), "verdict": verdict(values), "failed": failed}
                    rows.append(row | {"runs": runs})
    return rows


# ---------------------------------------------------------------------------------------------------------------- runs


def missing(claims: list[tuple[dict, Setting]], seeds: int) -> list[tuple[Setting, str, int]]:
    """(setting, run, seed) without records, of the claims given: seed by seed, so that pairs are complete early."""
    runs = {(how.paper, run): (how, run) for claim, own in claims for how, run in sides(claim, own)}
    return [(how, run, seed) for seed in range(seeds) for how, run in runs.values() if not how.done(run, seed)]


def make_pictures(wanted: dict, cifar: str | None) -> None:
    """Links to the first pictures of each class of a CIFAR-10 tree, where a setting asks for a part of it."""
    folder = ROOT / wanted["name"]
    if folder.exists():
        return
    if cifar is None:
        raise UserError(
            f"{wanted['name']} is not there: give --cifar TREE, a CIFAR-10 tree with train/CLASS/* and test/"
        )
    source = Path(cifar).resolve()
    if not (source / "train").is_dir():
        raise UserError(f"--cifar {printable(cifar)}: no train/ in it")
    link(source / "train", folder / "train", wanted["per_class"])
    (folder / "val").symlink_to(next(source / split for split in ("val", "test") if (source / split).is_dir()))


def make_toy_pictures() -> None:
    """A few of the built-in pictures, which are made where they are missing."""
    if demo.read(ROOT / "data/demo") is None:
        demo.ensure(ROOT / "data/demo")
    for split in ("train", "val"):
        if not (ROOT / TOY / split).exists():
            link(ROOT / "data/demo" / split, ROOT / TOY / split, 4)


def link(source: Path, folder: Path, per_class: int) -> None:
    for kind in sorted(path for path in source.iterdir() if path.is_dir()):
        (folder / kind.name).mkdir(parents=True)
        for picture in sorted(kind.iterdir())[:per_class]:
            (folder / kind.name / picture.name).symlink_to(picture)


def name_weights(folder: Path, record: Path) -> None:
    """The sha256 of a run's newest checkpoint, as `sha256sum` writes it: weights themselves are not kept with the records."""
    found = [path for ending in ("*.pth", "*.pth.tar", "*.ckpt", "*.pt") for path in folder.glob(ending)]
    if found:
        newest = max(found, key=lambda path: (path.stat().st_mtime, path.name))
        digest = hashlib.sha256(newest.read_bytes()).hexdigest()
        (record / "weights.sha256").write_text(f"{digest}  {newest.name}\n")


def run_missing(jobs: list[tuple[Setting, str, int]], threads: int | None, toy: bool = False) -> list[str]:
    """Run them one after another; what failed. A run that fails leaves the others alone. toy: nothing is kept."""
    failed, began = [], time.perf_counter()
    for number, (how, name, seed) in enumerate(jobs):
        spent = time.perf_counter() - began
        left = f", about {clock(spent / number * (len(jobs) - number))} left" if number else ""
        print(
            f"[{number + 1}/{len(jobs)}] {how.paper} {how.scale}: {name}, seed {seed} ({clock(spent)} gone{left})",
            flush=True,
        )
        log = ROOT / "runs" / "claims" / f"{how.paper}-{how.scale}-{name}-s{seed}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        first, last = (how.record(name, seed, how.steps[n]["suffix"]) for n in (0, -1))
        if not toy:
            (first / FAILED).unlink(missing_ok=True)
        started, commands = time.perf_counter(), how.commands(name, seed, toy)
        for _, folder in commands if toy else ():
            shutil.rmtree(folder, ignore_errors=True)
        for step, (command, folder) in zip(how.steps, commands):
            variables = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
            arguments = [sys.executable, *shlex.split(command)[1:]]
            with open(log, "a") as out:
                print(f"\n$ {command}", file=out, flush=True)
                code = subprocess.call(arguments, cwd=ROOT, env=variables, stdout=out, stderr=out)
            if code:
                failed.append(f"{name}, seed {seed}: exit code {code}; {log.relative_to(ROOT)} says why")
                print(f"      {failed[-1]}", flush=True)
                if not toy:
                    first.mkdir(parents=True, exist_ok=True)
                    said = {"command": command, "exit_code": code, "said": log.read_text().rstrip().splitlines()[-1]}
                    (first / FAILED).write_text(json.dumps(said | environment(), indent=1) + "\n")
                break
            record = how.record(name, seed, step["suffix"])
            for file in (folder / kept for kept in KEPT if not toy):
                if file.is_file():
                    record.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, record / file.name)
            if record.is_dir() and not toy:
                name_weights(folder, record)
        else:
            if not toy:
                took = {"seconds": round(time.perf_counter() - started, 3), "commands": [c for c, _ in commands]}
                (last / "took.json").write_text(json.dumps(took | {"threads": threads}, indent=1) + "\n")
    return failed


@functools.cache
def stale(paper: str, commit: str) -> bool:
    """Has what a run of this paper is made of changed since its commit?"""
    if commit.endswith("-dirty") or commit == "unknown":
        return True
    git = ["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", paper, "common"]
    return subprocess.run(git, capture_output=True).returncode != 0


def show(chosen: dict[str, dict], scale: str) -> None:
    rows = []
    for paper, content in chosen.items():
        how = setting(paper, content, scale)
        for claim in content["claims"]:
            found = compared(claim, how) if how else {}
            first = next(iter(found.values()), [])
            pair = sides(claim, how) if first else ()
            old = any(
                stale(side.paper, side.facts(run, seed)["commit"]) for side, run in pair for seed in side.seeds(run)
            )
            numbers = ", ".join(f"{NAMES.get(key, key)} {difference(v)}" for key, v in found.items() if v) or "-"
            said = concluded(claim, how) if how else f"not set up at scale {scale}"
            rows.append(
                [
                    f"{paper}: {claim['name']}",
                    claim["published"],
                    numbers,
                    said + (", records of older code" if old else ""),
                ]
            )
    print(layout(["claim", "published", f"here ({scale}), 95 % interval", "verdict"], rows, markdown=False))


def main(argv=None) -> None:
    parser = cli.Parser(prog="claims.py", description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", metavar="PAPER|CLAIM", help="folders or names of claims; default: all")
    parser.add_argument("--scale", choices=scales(), default="cpu", help="size of the runs")
    about = "with --run: a few steps of the first run of each paper, on a few pictures, to see that it works; nothing is kept"
    parser.add_argument("--toy", action="store_true", help=about)
    parser.add_argument("--run", action="store_true", help="run what has no records")
    parser.add_argument("--seeds", type=cli.positive_int, default=3, help="0 to this number, exclusive, of each run")
    parser.add_argument("--cifar", metavar="TREE", help="CIFAR-10 as files, of which smaller trees are linked")
    parser.add_argument("--threads", type=cli.positive_int, help="OMP_NUM_THREADS of the runs")
    parser.add_argument("--write", action="store_true", help="write the tables of RESULTS.md and results/ledger.json")
    args = parser.parse_args(argv)
    known = papers()
    names = {claim["name"]: paper for paper, content in known.items() for claim in content["claims"]}
    if unknown := [name for name in args.which if name not in known.keys() | names.keys()]:
        raise UserError(
            f"{printable(unknown[0])}: no paper's folder and no claim; there are {', '.join([*known, *names])}"
        )
    papers_chosen = {names.get(name, name) for name in args.which} or known.keys()
    chosen = {paper: known[paper] for paper in known if paper in papers_chosen}
    failed = []
    if args.run:
        claims = []
        for paper, content in chosen.items():
            some = set() if paper in args.which else {name for name in args.which if names.get(name) == paper}
            if how := setting(paper, content, args.scale):
                claims += [(claim, how) for claim in content["claims"] if not some or claim["name"] in some]
        jobs = missing(claims, args.seeds)
        if args.toy:
            jobs = list({how.paper: (how, next(iter(how.runs)), 0) for how, *_ in jobs}.values())
            make_toy_pictures()
        for how, *_ in jobs if not args.toy else ():
            if how.pictures:
                make_pictures(how.pictures, args.cifar)
        failed = run_missing(jobs, args.threads, args.toy)
    show(chosen, args.scale)
    if args.write:
        path = ROOT / "RESULTS.md"
        text = written(path.read_text())
        with files.replacing(path, "w") as file:
            file.write(text)
        with files.replacing(ROOT / "results" / "ledger.json", "w") as file:
            json.dump(ledger(), file, indent=1)
            file.write("\n")
    if failed:
        raise UserError(f"{len(failed)} runs failed: {'; '.join(failed)}")


if __name__ == "__main__":
    cli.run(main)
