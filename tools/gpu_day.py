"""Run what is waiting for a GPU, step by step: `make gpu`, or this file with any python3.

Each step takes at most ten minutes and leaves a record in results/gpu/. A step that has its record
is skipped, so what a first call does not reach, the next one does. Where a step needs longer than
its time it is asked to stop, as Slurm would: those that can go on do so in the next call, of the
others that is their record. A step that fails is recorded as such, and the others go on.

    python tools/gpu_day.py --list                      # the steps, their commands, their records
    python tools/gpu_day.py --cifar CIFAR               # all; CIFAR has train/CLASS/* and val/
    python tools/gpu_day.py throughput cifar20 --again throughput
    python tools/gpu_day.py --toy                       # every step at toy size, on any device

On a batch system with a short time limit and no lasting disk, a day is the calls 1 to 4; each
brings back one file, which is unpacked in the project's root. It holds records and logs but no
checkpoints, so a step that was cut short starts over there (claims keep the runs that have ended):

    python3 tools/gpu_day.py --call 1 --budget 580 --pack day-1.tgz
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common import UsageError, UserError, cli, clock, printable
from common.files import ROOT, only_writer, write_json
from preprocess import demo
from runner.folder import environment
from tools import claim_records
from tools.gpu_command import Caller, Ended
from tools.gpu_records import CUT, DONE, OUT_OF_TIME, check_budget, free_gib, judge, pack, rows_of
from tools.gpu_steps import STEPS, Output, Step
from tools.report import layout

LIMIT = 570  # seconds until a step is asked to stop
GRACE = 25  # seconds that it then has to save: ten minutes in all


class Day:
    """The steps, their records below `records`, their run folders and logs below `runs`.

    toy: at toy size. cifar: CIFAR-10 as files. root: folder of the project, where commands run.
    Raises UserError where `cifar` is no such tree.
    """

    def __init__(self, records: Path, runs: Path, toy: bool, cifar: str | None, root: Path):
        self.records = records
        self.runs = runs
        self.toy = toy
        self.root = root
        self.cifar = Path(cifar).resolve() if cifar else None
        if self.cifar and not (self.cifar / "train").is_dir():
            raise UserError(f"--cifar {printable(cifar)}: no train/ in it")

    def record(self, step: Step) -> dict | None:
        """Return the record of a step, or None."""
        with suppress(FileNotFoundError, ValueError):
            return json.loads((self.records / step.name / "record.json").read_text())

    def is_due(self, step: Step, again: list[str]) -> bool:
        """Return whether a step is to be run: it has no whole record, or is asked for again."""
        record = self.record(step)
        return record is None or record["state"] == CUT or step.name in again

    def obstacle(self, step: Step) -> str | None:
        """Return why a step cannot be run here, or None."""
        if step.paper and claim_records.setting(step.paper, "gpu") is None:
            return f"{step.paper} has no claims at scale gpu"
        if "{cifar}" in step.command and not self.toy and self.cifar is None:
            return "needs --cifar TREE, CIFAR-10 as files with train/CLASS/* and val/ or test/"
        return None

    def due(self, steps: list[Step], again: list[str]) -> list[Step]:
        """Return the steps that are to be run and can be."""
        return [step for step in steps if self.is_due(step, again) and not self.obstacle(step)]

    def command(self, step: Step, cifar: str) -> str:
        """Return the command of a step as it is run in the project's root."""
        out = self.from_root(self.runs / step.name)
        values = {"out": out, "cifar": cifar}
        return re.sub(r"{(\w+)}", lambda match: shlex.quote(values[match[1]]), step.line(self.toy))

    def from_root(self, path: Path) -> str:
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)

    def pictures(self) -> str:
        """Return a link to --cifar, as records name no folder of this machine.

        Without --cifar, at toy size, return a few of the built-in pictures, which are made.
        """
        if self.cifar is None:
            tree = self.runs / "pictures"
            demo.ensure(
                tree,
                workers=1,
                progress=False,
                size=32,
                train_per_class=2,
                val_per_class=1,
                severities=(),
                corruption_per_class=1,
            )
            return self.from_root(tree)
        link = self.runs / "cifar"
        link.unlink(missing_ok=True)
        link.symlink_to(self.cifar)
        return self.from_root(link)

    def run(self, step: Step, caller: Caller, again: bool) -> dict | None:
        """Run a step and write its record.

        Return the record, or None where this process was told to stop and the step cannot go on.
        """
        before = self.record(step) or {}
        folder = self.runs / step.name
        if before.get("state") == CUT and not again and not folder.is_dir():
            print("      its checkpoints were left on another machine: it starts over")
        if again or before.get("state") != CUT or not folder.is_dir():
            before = {}
            shutil.rmtree(folder, ignore_errors=True)
        started = datetime.now().isoformat(timespec="seconds")
        folder.mkdir(parents=True, exist_ok=True)
        cifar = self.pictures() if "{cifar}" in step.command else ""
        command = self.command(step, cifar)
        print(f"      $ {printable(command)}", flush=True)
        ended = caller.run(command, self.runs / f"{step.name}.log")
        numbers, unread = self.numbers(step, ended)
        seconds = round(before.get("seconds", 0) + ended.seconds, 1)
        numbers["seconds"] = seconds
        state, why = judge(step, ended, numbers, unread, bool(caller.received))
        if state == OUT_OF_TIME and not ended.out_of_time:
            return None
        record = {
            "step": step.name,
            "about": step.about,
            "state": state,
            "why": why,
            "command": command,
            "toy": self.toy,
            "exit_code": ended.code,
            "seconds": seconds,
            "calls": before.get("calls", 0) + 1,
            "started": started,
            "numbers": numbers,
            "aims": self.aims(step, numbers),
            "published": step.published,
            **environment(),
        }
        (self.records / step.name).mkdir(parents=True, exist_ok=True)
        write_json(self.records / step.name / "record.json", record)
        for name in step.kept:
            with suppress(FileNotFoundError):
                shutil.copyfile(self.runs / step.name / name, self.records / step.name / name)
        return record

    def numbers(self, step: Step, ended: Ended) -> tuple[dict[str, float], str]:
        """Return the numbers of a step that has ended, and why they cannot be read, or ""."""
        output = Output(self.runs / step.name, ended.printed, ended.code, self.toy)
        try:
            return step.read(output), ""
        except (OSError, ValueError, KeyError, UserError) as error:
            return {}, f"{type(error).__name__}: {error}"

    def aims(self, step: Step, numbers: dict[str, float]) -> list[dict]:
        """Return the aims of a step with their values; at toy size nothing is met or missed."""
        aims = []
        for aim in step.aims:
            if aim.number in numbers:
                value = numbers[aim.number]
                met = None if self.toy else aim.is_met(value)
                aims.append({**asdict(aim), "value": value, "met": met})
        return aims

    def go(self, steps: list[Step], again: list[str], caller: Caller) -> list[str]:
        """Run the steps that are due; return a line for each that did not finish.

        Raises SystemExit where this process was told to stop.
        """
        began = time.monotonic()
        unfinished = []
        left = self.due(steps, again)
        for number, step in enumerate(steps):
            head = f"[{number + 1}/{len(steps)}] {step.name}"
            record = self.record(step)
            if not self.is_due(step, again):
                earlier = f"{record['state']} in a call before ({record['commit']})"
                print(f"{head}: {earlier}, --again {step.name} repeats it")
            elif obstacle := self.obstacle(step):
                print(f"{head}: not run: {obstacle}")
                continue
            elif caller.seconds_left() < 60 * step.minutes:
                left_over = clock(max(0, caller.seconds_left()))
                print(f"{head}: not begun: it takes {step.minutes:g} min, {left_over} are left")
                continue
            else:
                minutes = sum(other.minutes for other in left[left.index(step) :])
                about = "" if self.toy else f", about {clock(60 * minutes)} left"
                gone = clock(time.monotonic() - began)
                print(f"{head}: {step.about} ({gone} gone{about})", flush=True)
                record = self.run(step, caller, step.name in again)
                if record:
                    state = f"{record['state']} after {clock(record['seconds'])}"
                    print(f"      {state}: {record['why']}" if record["why"] else f"      {state}")
            if record and record["state"] != DONE:
                reason = f" ({record['why']})" if record["why"] else ""
                unfinished.append(f"{step.name}: {record['state']}{reason}")
            if caller.received:
                print(f"stopped by a signal; the next call goes on at {step.name}", flush=True)
                print(self.table(steps))
                raise SystemExit(128 + caller.received)
        print("\n" + self.table(steps), flush=True)
        return unfinished

    def table(self, steps: list[Step]) -> str:
        """Return all numbers that have an aim, with their verdicts."""
        rows = []
        for step in steps:
            record = self.record(step)
            rows += rows_of(step.name, record) if record else [[step.name, *"---", "not run"]]
        header = ["step", "number", "aim", "published", "verdict"]
        return layout(header, rows, markdown=False)

    def listing(self, steps: list[Step]) -> str:
        """Return what there is to do: steps, their states and commands."""
        lines = []
        for step in steps:
            record = self.record(step)
            state = record["state"] if record else self.obstacle(step) or "to be run"
            aims = [f"{aim.number} {aim}" for aim in step.aims if str(aim) != "-"]
            lines.append(f"{step.name}: {step.about}")
            lines.append(f"    {state}; about {step.minutes:g} min; aims: {'; '.join(aims)}")
            lines.append(f"    $ {self.command(step, 'CIFAR')}")
        return "\n".join(lines)


def parse_args(argv, steps: tuple[Step, ...]):
    parser = cli.Parser(prog="gpu_day.py", description=__doc__.splitlines()[0])
    about = "steps by name, in the order of the list; default: all"
    parser.add_argument("which", nargs="*", metavar="STEP", help=about)
    about = "list the steps, their states and commands, and end"
    parser.add_argument("--list", action="store_true", help=about)
    about = "run these anew though they have records"
    parser.add_argument("--again", nargs="+", default=[], metavar="STEP", help=about)
    about = "CIFAR-10 as files: train/CLASS/* and val/ or test/"
    parser.add_argument("--cifar", metavar="TREE", help=about)
    about = "every step at toy size on whatever device there is"
    parser.add_argument("--toy", action="store_true", help=about)
    about = "default: results/gpu, with --toy runs/gpu-toy/records"
    parser.add_argument("--records", metavar="DIR", help=about)
    about = "run folders and logs; default: runs/gpu, with --toy runs/gpu-toy"
    parser.add_argument("--runs", metavar="DIR", help=about)
    about = "only the steps of this call of a day on a machine that forgets"
    parser.add_argument("--call", type=cli.positive_int, metavar="N", help=about)
    about = "seconds of the whole call; a step that takes longer than what is left is not begun"
    parser.add_argument("--budget", type=cli.positive, metavar="SECONDS", help=about)
    about = "write all records and logs into one archive at the end"
    parser.add_argument("--pack", metavar="FILE.tgz", help=about)
    about = f"seconds after which a step is asked to stop; it then has {GRACE} to save"
    parser.add_argument("--limit", type=cli.positive, default=LIMIT, help=about)
    args = parser.parse_args(argv)
    for name in [*args.which, *args.again]:
        if name not in [step.name for step in steps]:
            raise UsageError(
                f"{printable(name)}: no step of that name; --list says which there are"
            )
    return cli.freeze(args)


def main(argv=None, steps=STEPS, root: Path = ROOT, grace: float = GRACE) -> None:
    args = parse_args(argv, steps)
    runs = Path(args.runs or root / "runs" / ("gpu-toy" if args.toy else "gpu")).resolve()
    default = runs / "records" if args.toy else root / "results" / "gpu"
    records = Path(args.records or default).resolve()
    day = Day(records, runs, args.toy, args.cifar, root)
    chosen = [
        step
        for step in steps
        if (not args.which or step.name in args.which) and args.call in (None, step.call)
    ]
    if not chosen:
        raise UsageError(f"--call {args.call}: no step belongs to it; --list says which there are")
    if args.list:
        print(day.listing(chosen))
        return
    if not args.toy and not torch.cuda.is_available():
        raise UsageError(
            "no GPU is usable here (torch.cuda.is_available() is False); "
            "--toy runs every step at toy size"
        )
    with only_writer(records), Caller(root, args.limit, grace, args.budget) as caller:
        check_budget(args.budget, day.due(chosen, args.again), grace)
        print(f"/dev/shm, where workers hand over pictures: {free_gib('/dev/shm'):.1f} GiB free")
        try:
            unfinished = day.go(chosen, args.again, caller)
        finally:
            if args.pack:
                pack(args.pack, root / "results", records, runs)
    if unfinished:
        count = f"{len(unfinished)} of {len(chosen)} steps did not finish"
        raise UserError(f"{count}: {'; '.join(unfinished)}")


if __name__ == "__main__":
    cli.run(main)
