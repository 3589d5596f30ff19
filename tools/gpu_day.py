"""What is waiting for a GPU, step by step: `make gpu`. Each step takes at most ten minutes and leaves a record in results/gpu/.

A step that has its record is skipped, so what a first call does not reach, the next one does. Where a step needs longer than
its time it is asked to stop, as Slurm would: those that can go on do so in the next call, of the others that is their record.
A step that fails is recorded as such, and the others go on.

    python tools/gpu_day.py --list                       # the steps, their commands, and which have their record
    python tools/gpu_day.py --cifar CIFAR                # all of them; CIFAR: CIFAR-10 as files, train/CLASS/* and val/
    python tools/gpu_day.py throughput decode --again throughput
    python tools/gpu_day.py --toy                        # every step at toy size, on whatever device there is
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import common  # isort: split

import torch

from common import UsageError, UserError, cli, printable
from common.files import ROOT, only_writer, write_json
from runner.progress import clock
from runner.folder import environment
from preprocess import demo
from tools import claims
from tools.report import layout


@dataclass(frozen=True)
class Aim:
    """What a number of a step's record should be. Without bounds it is only shown."""

    number: str
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        words = [f"at least {self.least}"] * (self.least is not None) + [f"at most {self.most}"] * (
            self.most is not None
        )
        return ", ".join(words) or "-"

    def met(self, value: float) -> bool | None:
        if self.least is None and self.most is None:
            return None
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


@dataclass(frozen=True)
class Step:
    """One command. {cifar}, {photos}: trees of pictures; {out}: the step's own folder. What is typed last wins.

    minutes: about what it takes. full, toy: what follows `command` at either size. read(found): the numbers of a Found.
    goes_on: the same command goes on where it was stopped. codes: exit codes that are no failure. kept: files of {out} that
    belong to the record. published: what others have measured, by the names of the numbers. paper: whose claims it runs.
    """

    name: str
    about: str
    minutes: float
    command: str
    full: str
    toy: str
    aims: tuple[Aim, ...]
    read: Callable[[Found], dict[str, float]]
    goes_on: bool = False
    codes: tuple[int, ...] = (0,)
    kept: tuple[str, ...] = ()
    published: dict[str, float] | None = None
    paper: str = ""

    def line(self, toy: bool) -> str:
        return f"{self.command} {self.toy if toy else self.full}".strip()


@dataclass
class Found:
    """What a step has left: its folder, what it printed, its exit code."""

    out: Path
    said: str
    code: int
    toy: bool


# ---------------------------------------------------------------------------------------------------- numbers of a step


def tests(found: Found) -> dict[str, float]:
    counts = {
        word.rstrip("s"): int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", found.said)
    }
    return {name: counts.get(name, 0) for name in ("passed", "failed", "error", "skipped")} if counts else {}


def throughput(found: Found) -> dict[str, float]:
    return json.loads((found.out / "numbers.json").read_text())


def decoding(found: Found) -> dict[str, float]:
    """Ratios of rates: this loader to one of the published style, decoding on the device to this loader."""
    said = {"loader / published": r"^result: ratio ([\d.]+)", "device / loader": r"^on the device.*: ratio ([\d.]+)"}
    ratios = {name: re.search(pattern, found.said, re.MULTILINE) for name, pattern in said.items()}
    return {name: float(ratio[1]) for name, ratio in ratios.items() if ratio}


def yardstick(epochs: int) -> Callable[[Found], dict[str, float]]:
    """k-NN accuracy and mean loss by epoch, counted from 1, and k-NN after `epochs` of them (at toy size the last)."""

    def read(found: Found) -> dict[str, float]:
        lines = map(json.loads, (found.out / "metrics.jsonl").read_text().splitlines())
        numbers = {}
        for line in lines:
            for key, name in (("knn_acc1", "k-NN"), ("epoch_loss", "loss")):
                if key in line:
                    numbers[f"{name} {line['epoch'] + 1}"] = line[key]
        last = max((int(name.split()[1]) for name in numbers if name.startswith("k-NN")), default=0)
        if found.toy or last >= epochs:
            numbers["k-NN"] = numbers[f"k-NN {last if found.toy else epochs}"]
        return numbers

    return read


def settled(paper: str) -> Callable[[Found], dict[str, float]]:
    """How many claims agree and do not, and how many runs have no records yet."""

    def read(found: Found) -> dict[str, float]:
        content = claims.papers()[paper]
        how = claims.setting(paper, content, "gpu")
        said = [claims.concluded(claim, how) for claim in content["claims"]]
        numbers = {"runs missing": len(claims.missing([(claim, how) for claim in content["claims"]], 3))}
        verdicts = ("agrees", "does not agree", "cannot be told")
        return numbers | {verdict: sum(s.startswith(verdict) for s in said) for verdict in verdicts}

    return read


# ------------------------------------------------------------------------------------------------------------- the steps

PYTEST = "python -m pytest -m gpu -n 0"
THROUGHPUT = "python benchmarks/gpu_throughput.py --json {out}/numbers.json"
DECODE = "python benchmarks/decode_jpeg.py --data {photos}"
# --stop-after ends with exit code 0; metrics.jsonl counts epochs from 0. One line of it an epoch: 97 steps
YARDSTICK = (
    "python nonsem_neg/moco_non_sem_neg.py --preset moco-cifar {cifar} --dataset folder --seed 0 -p 97 -j 16 "
    "--ckpt_path {out} --resume auto"
)
YARDSTICK_TOY = "-b 8 --moco-k 64 --bn-splits 2 --epochs 2 --knn-k 5 -j 1"
CLAIMS = "python tools/claims.py {paper} --run --scale gpu --seeds 3 --cifar {cifar}"
PUBLISHED = json.loads((ROOT / "nonsem_neg" / "published_moco_cifar.json").read_text())
CURVE = {
    f"{name} {epoch}": value
    for name, key in (("k-NN", "knn_acc1"), ("loss", "epoch_loss"))
    for epoch, value in zip(PUBLISHED["epochs"], PUBLISHED[key])
}
RECORDS = ("config.json", "metrics.jsonl")
SETTLES = {  # papers by what a GPU settles: first what a CPU could not tell at all
    "nonsem_neg": "patch negatives on real pictures, clean and corrupted",
    "ring": "rings, which the CPU's runs are too short for",
    "debiased": "the debiased loss at larger batches",
    "feature_transform": "transformed features at longer budgets",
    "cmc": "colour spaces and the number of views",
    "moco_insdis": "CMC, MoCo and InsDis; momentum, shuffled batch-norm",
}

STEPS = (
    Step(
        "tests", "the tests that need a GPU", 2, PYTEST, full="tests", toy="tests/test_augment.py",
        aims=(Aim("failed", most=0), Aim("error", most=0), Aim("passed", least=1)), read=tests, codes=(0, 1),
    ),
    Step(
        "throughput", "ResNet-50, 224 px, batch 256, bfloat16: MoCo and MoCo + patch beside supervised", 4, THROUGHPUT,
        full="--device cuda --data {photos}",
        toy="--arch resnet18 --size 32 --batch 8 --bn-splits 2 --moco-k 64 --pictures 16 --steps 2 --repeats 1",
        aims=(
            Aim("moco_of_its_share", least=0.8), Aim("patch_of_its_share", least=0.8), Aim("waiting", most=0.02),
            Aim("views_ms", most=15), Aim("views_share", most=0.1),
        ),
        read=throughput, codes=(0, 1), published={"views_ms": 230, "views_share": 0.7},
    ),
    Step(
        "decode", "JPEG files decoded on the GPU and on the host", 4, DECODE,
        full="--device cuda --workers 16 --batch-size 256 --pictures 4096",
        toy="--device cpu --workers 1 --batch-size 4 --pictures 8 --repeats 1",
        aims=(Aim("loader / published", least=3), Aim("device / loader", least=1)), read=decoding, codes=(0, 1),
    ),
    Step(
        "cifar20", "MoCo on CIFAR-10 as its authors' notebook: 20 epochs of its 200", 5, YARDSTICK,
        full="--data-device device --stop-after 20", toy=f"{YARDSTICK_TOY} --stop-after 1",
        aims=(Aim("k-NN", 59.9, 62.9),), read=yardstick(20), goes_on=True, kept=RECORDS,
        published=CURVE | {"k-NN": CURVE["k-NN 20"]},
    ),
    Step(
        "cifar200", "all 200 of them, fast (published: 85 to 112 minutes)", 9, YARDSTICK,
        full="--data-device device --knn-every 20 --save-freq 200 --last-every 20 --amp --compile",
        toy=f"{YARDSTICK_TOY} --amp",
        aims=(Aim("seconds", most=480), Aim("k-NN", least=82)), read=yardstick(200), goes_on=True, kept=RECORDS,
        published=CURVE | {"k-NN": CURVE["k-NN 200"], "seconds": 60 * 85},
    ),
    *(
        Step(
            f"claims-{paper}", f"claims: {about}", 10, CLAIMS.replace("{paper}", paper), full="", toy="--toy",
            aims=(Aim("runs missing", most=0), Aim("agrees"), Aim("does not agree"), Aim("cannot be told")),
            read=settled(paper), goes_on=True, paper=paper,
        )
        for paper, about in SETTLES.items()
    ),
)  # fmt: skip

LIMIT, GRACE = 570, 25  # seconds: until a step is asked to stop, and that it then has to save: ten minutes in all
DONE, FAILED, OUT_OF_TIME, CUT = "done", "failed", "out of time", "cut short, goes on in the next call"


# ------------------------------------------------------------------------------------------------------------ one command


@dataclass
class Ended:
    code: int
    seconds: float
    said: str
    out_of_time: bool


class Caller:
    """Runs commands one at a time in process groups of their own; a signal to this process is passed on as SIGTERM."""

    every = 60  # seconds between lines in a pipe; on a terminal it is one, and one line

    def __init__(self, limit: float, grace: float):
        self.limit, self.grace, self.received = limit, grace, 0

    def __enter__(self) -> Caller:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self.previous = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
        for number in self.previous:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame) -> None:
        self.received = number

    def run(self, command: str, log: Path) -> Ended:
        """Its output goes to `log`; the last line of it is shown on a terminal, and every minute in a pipe."""
        began, shown, asked = (now := time.monotonic()), now, None
        with open(log, "ab") as out:
            out.write(f"\n$ {command}\n".encode())
            out.flush()
            start = out.tell()
            arguments = [sys.executable, *shlex.split(command)[1:]]
            how = dict(cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
            process = subprocess.Popen(arguments, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **how)
        out_of_time = False
        while process.poll() is None or (asked and _alive(process.pid)):
            now = time.monotonic()
            out_of_time |= process.returncode is None and now - began > self.limit
            if (out_of_time or self.received) and asked is None:
                asked = now
                _signal(process.pid, signal.SIGTERM)
            if asked and now - asked > self.grace:
                _signal(process.pid, signal.SIGKILL)
            if now - shown > (1 if sys.stdout.isatty() else self.every):
                shown = now
                self._show(now - began, log)
            time.sleep(0.05)
        if sys.stdout.isatty():
            print("\r\033[K", end="")
        said = log.read_bytes()[start:].decode(errors="replace")
        return Ended(process.returncode, time.monotonic() - began, said, out_of_time)

    def _show(self, seconds: float, log: Path) -> None:
        line = f"      {clock(seconds)} of at most {clock(self.limit)}  {last_line(log.read_text(errors='replace'))}"
        if sys.stdout.isatty():
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            print(line[:160], flush=True)


def last_line(text: str) -> str:
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    return printable(lines[-1].strip()) if lines else ""


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _alive(group: int) -> bool:
    """Has a process of this group not ended yet? One that nobody reaps counts as ended."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, number = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(number) == group and state not in "ZX":
                return True
    return False


# ------------------------------------------------------------------------------------------------------------- one day


class Day:
    """The steps with their records below `records` and their runs and logs below `runs`."""

    def __init__(self, records: Path, runs: Path, toy: bool, cifar: str | None, limit: float):
        self.records, self.runs, self.toy, self.limit = records, runs, toy, limit
        self.cifar = Path(cifar).resolve() if cifar else None
        if self.cifar and not (self.cifar / "train").is_dir():
            raise UserError(f"--cifar {printable(cifar)}: no train/ in it")

    def record(self, step: Step) -> dict | None:
        with suppress(FileNotFoundError, ValueError):
            return json.loads((self.records / step.name / "record.json").read_text())

    def cannot(self, step: Step) -> str | None:
        """Why a step cannot be run here."""
        if step.paper and "gpu" not in claims.papers().get(step.paper, {"scales": {}})["scales"]:
            return f"{step.paper} has no claims at scale gpu"
        if "{cifar}" in step.command and not self.toy and self.cifar is None:
            return "needs --cifar TREE, CIFAR-10 as files with train/CLASS/* and val/ or test/"
        return None

    def command(self, step: Step) -> str:
        """Its command, to be run in the project's root; makes the pictures that it needs."""
        out, photos, tree = (self.runs / name for name in (step.name, "photos", "pictures"))
        out.mkdir(parents=True, exist_ok=True)
        if "{photos}" in step.line(self.toy) and not photos.exists():
            from benchmarks.decode_jpeg import generate

            shutil.rmtree(begun := self.runs / "photos-begun", ignore_errors=True)
            generate(begun / "train", 16 if self.toy else 512)
            begun.rename(photos)
        if "{cifar}" in step.command and self.cifar is None:
            few = dict(size=32, train_per_class=2, val_per_class=1, severities=(), corruption_per_class=1)
            demo.ensure(tree, workers=1, progress=False, **few)
        elif "{cifar}" in step.command:  # a link: the records name no folder of this machine
            tree = self.runs / "cifar"
            tree.unlink(missing_ok=True)
            tree.symlink_to(self.cifar)
        return _filled(step.line(self.toy), out=_from_root(out), photos=_from_root(photos), cifar=_from_root(tree))

    def run(self, step: Step, caller: Caller, again: bool) -> dict | None:
        """Its record, written; None where this process was told to stop and nothing of the step is kept."""
        before = self.record(step) or {}
        if again or before.get("state") != CUT:
            before = {}
            shutil.rmtree(self.runs / step.name, ignore_errors=True)
        started, command = datetime.now().isoformat(timespec="seconds"), self.command(step)
        print(f"      $ {printable(command)}", flush=True)
        ended = caller.run(command, self.runs / f"{step.name}.log")
        numbers, why = {}, ""
        try:
            numbers = step.read(Found(self.runs / step.name, ended.said, ended.code, self.toy))
        except (OSError, ValueError, KeyError, UserError) as error:
            why = f"{type(error).__name__}: {error}"
        seconds = round(before.get("seconds", 0) + ended.seconds, 1)
        numbers |= {"seconds": seconds}
        lacking = [aim.number for aim in step.aims if aim.number not in numbers]
        if ended.code in step.codes and not lacking:
            state, why = DONE, ""
        elif ended.out_of_time or caller.received:
            state, why = CUT if step.goes_on else OUT_OF_TIME, ""
            if state == OUT_OF_TIME and not ended.out_of_time:
                return None
        else:
            state = FAILED
            why = last_line(ended.said) if ended.code not in step.codes else why or f"no {lacking[0]} in what it left"
        aims = [
            asdict(aim) | {"value": numbers[aim.number], "met": None if self.toy else aim.met(numbers[aim.number])}
            for aim in step.aims
            if aim.number in numbers
        ]
        record = {
            "step": step.name,
            "about": step.about,
            "state": state,
            "why": why,
            "command": command,
            "toy": self.toy,
        }
        record |= {"exit_code": ended.code, "seconds": seconds, "calls": before.get("calls", 0) + 1, "started": started}
        record |= {"numbers": numbers, "aims": aims, "published": step.published, **environment()}
        (self.records / step.name).mkdir(parents=True, exist_ok=True)
        write_json(self.records / step.name / "record.json", record)
        for name in step.kept:
            with suppress(FileNotFoundError):
                shutil.copyfile(self.runs / step.name / name, self.records / step.name / name)
        return record

    def go(self, steps: list[Step], again: list[str]) -> list[str]:
        """Run what has no record; what failed or was cut short, one line each."""
        with Caller(self.limit, GRACE) as caller:
            return self._go(caller, steps, again)

    def _go(self, caller: Caller, steps: list[Step], again: list[str]) -> list[str]:
        began, bad = time.monotonic(), []
        left = [step for step in steps if self.due(step, again) and not self.cannot(step)]
        for number, step in enumerate(steps):
            head, record = f"[{number + 1}/{len(steps)}] {step.name}", self.record(step)
            if not self.due(step, again):
                print(
                    f"{head}: {record['state']} in a call before ({record['commit']}), --again {step.name} repeats it"
                )
            elif reason := self.cannot(step):
                print(f"{head}: not run: {reason}")
                continue
            else:
                minutes = sum(other.minutes for other in left[left.index(step) :])
                about = "" if self.toy else f", about {clock(60 * minutes)} left"
                print(f"{head}: {step.about} ({clock(time.monotonic() - began)} gone{about})", flush=True)
                record = self.run(step, caller, step.name in again)
                if record:
                    print(
                        f"      {record['state']} after {clock(record['seconds'])}{': ' * bool(record['why'])}{record['why']}"
                    )
            if record and record["state"] != DONE:
                bad.append(f"{step.name}: {record['state']}" + (f" ({record['why']})" if record["why"] else ""))
            if caller.received:
                print(f"stopped by a signal; the next call goes on at {step.name}", flush=True)
                print(self.table(steps))
                raise SystemExit(128 + caller.received)
        print("\n" + self.table(steps), flush=True)
        return bad

    def due(self, step: Step, again: list[str]) -> bool:
        record = self.record(step)
        return record is None or record["state"] == CUT or step.name in again

    def table(self, steps: list[Step]) -> str:
        rows = []
        for step in steps:
            record = self.record(step)
            if record is None:
                rows.append([step.name, "-", "-", "-", "not run"])
                continue
            toy = " (toy)" * record["toy"]
            if record["state"] != DONE or not record["aims"]:
                rows.append([step.name, "-", "-", "-", record["state"] + toy])
            for aim in record["aims"] if record["state"] in (DONE, CUT) else ():
                met = {True: "met", False: "missed", None: "-"}[aim["met"]] if record["state"] == DONE else "-"
                bound = str(Aim(*(aim[key] for key in ("number", "least", "most"))))
                others = f"{(record['published'] or {}).get(aim['number'], '-')}"
                rows.append([step.name, f"{aim['number']} {aim['value']:.5g}", bound, others, met + toy])
        return layout(["step", "number", "aim", "published", "verdict"], rows, markdown=False)


def _filled(line: str, **names: str) -> str:
    return re.sub(r"{(\w+)}", lambda found: shlex.quote(names[found[1]]), line)


def _from_root(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def listing(day: Day, steps: list[Step]) -> str:
    lines = []
    for step in steps:
        record, aims = day.record(step), [f"{aim.number} {aim}" for aim in step.aims if str(aim) != "-"]
        state = record["state"] if record else day.cannot(step) or "to be run"
        command = _filled(step.line(day.toy), out=_from_root(day.runs / step.name), photos="PHOTOS", cifar="CIFAR")
        lines += [f"{step.name}: {step.about}", f"    {state}; about {step.minutes:g} min; aims: {'; '.join(aims)}"]
        lines.append(f"    $ {command}")
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = cli.Parser(prog="gpu_day.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "which", nargs="*", metavar="STEP", help="steps by name, in the order of the list; default: all"
    )
    parser.add_argument("--list", action="store_true", help="say what there is to do, and end")
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="STEP", help="run these anew though they have records"
    )
    parser.add_argument("--cifar", metavar="TREE", help="CIFAR-10 as files: train/CLASS/* and val/ or test/")
    parser.add_argument("--toy", action="store_true", help="every step at toy size on whatever device there is")
    parser.add_argument("--records", metavar="DIR", help="default: results/gpu, with --toy runs/gpu-toy/records")
    parser.add_argument(
        "--runs", metavar="DIR", help="run folders and logs; default: runs/gpu, with --toy runs/gpu-toy"
    )
    about = "seconds after which a step is asked to stop; it then has 25 to save"
    parser.add_argument("--limit", type=cli.positive, default=LIMIT, help=about)
    args = parser.parse_args(argv)
    for name in [*args.which, *args.again]:
        if name not in [step.name for step in STEPS]:
            raise UsageError(f"{printable(name)}: no step of that name; --list says which there are")
    runs = Path(args.runs or ROOT / "runs" / ("gpu-toy" if args.toy else "gpu")).resolve()
    records = Path(args.records or (runs / "records" if args.toy else ROOT / "results" / "gpu")).resolve()
    day = Day(records, runs, args.toy, args.cifar, args.limit)
    steps = [step for step in STEPS if not args.which or step.name in args.which]
    if args.list:
        print(listing(day, steps))
        return
    if not args.toy and not torch.cuda.is_available():
        raise UsageError(
            "no GPU is usable here (torch.cuda.is_available() is False); --toy runs every step at toy size"
        )
    with only_writer(records):
        bad = day.go(steps, args.again)
    if bad:
        raise UserError(f"{len(bad)} of {len(steps)} steps did not finish: {'; '.join(bad)}")


if __name__ == "__main__":
    cli.run(main)
