"""Run what a claim has no records of, and keep the records: see tools/claims.py."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent import futures
from pathlib import Path

from common import UserError, clock
from common.files import ROOT
from preprocess import demo, subset
from runner.folder import environment
from tools.claim_records import FAILED, TOY_PICTURES, Setting

KEPT = ("config.json", "metrics.jsonl", "result.json")
WEIGHTS = ("*.pth", "*.pth.tar", "*.ckpt", "*.pt")


# --------------------------------------------------------------------------------------- pictures


def make_pictures(part: dict, cifar: str | None, root: Path) -> None:
    """Link to the first pictures of each class of a CIFAR-10 tree, where links are missing.

    part: `name` of the folder to make and `per_class`. Raises UserError if there is neither a
    tree nor the folder.
    """
    folder = root / part["name"]
    if cifar is not None:
        subset.link_tree(Path(cifar), folder, part["per_class"])
    elif not folder.exists():
        raise UserError(
            f"{part['name']} is not there: give --cifar TREE, a CIFAR-10 tree with train/CLASS/* "
            "and val/ or test/"
        )


def make_toy_pictures(root: Path) -> None:
    """Link a few of the built-in pictures, which are made where they are missing."""
    pictures = root / "data/demo"
    if demo.read(pictures) is None:
        demo.ensure(pictures)
    for split in ("train", "val"):
        folder = root / TOY_PICTURES / split
        if not folder.exists():
            subset.link_classes(pictures / split, folder, 4)


# ------------------------------------------------------------------------------------------- runs


def run_all(
    jobs: list[tuple[Setting, str, int]], threads: int | None, toy: bool, at_once: int = 1
) -> list[str]:
    """Run jobs, some of them at once; return a line for each that failed, which stops no other.

    threads: OMP_NUM_THREADS of the commands. toy: at toy size, and no records are kept.
    """
    began = time.perf_counter()
    done = 0
    failed = []
    locks: dict[Path, threading.Lock] = collections.defaultdict(threading.Lock)

    def run(number: int) -> None:
        nonlocal done
        setting, name, seed = jobs[number]
        spent = time.perf_counter() - began
        left = f", about {clock(spent / done * (len(jobs) - done))} left" if done else ""
        place = f"{setting.paper} {setting.scale}: {name}, seed {seed}"
        print(f"[{number + 1}/{len(jobs)}] {place} ({clock(spent)} gone{left})", flush=True)
        failure = run_one(setting, name, seed, threads, toy, locks)
        done += 1
        if failure:
            failed.append(failure)
            print(f"      {failure}", flush=True)

    with futures.ThreadPoolExecutor(at_once) as pool:
        try:
            for future in [pool.submit(run, number) for number in range(len(jobs))]:
                future.result()
        except BaseException:  # Ctrl-C, which the commands have received as well
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def run_one(
    setting: Setting, run: str, seed: int, threads: int | None, toy: bool, locks: dict
) -> str | None:
    """Run the commands of one run and keep its records; return what failed, or None.

    locks: {folder that a command writes: its lock}, as several runs may share a first step.
    """
    log = setting.root / "runs/claims" / f"{setting.paper}-{setting.scale}-{run}-s{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    first = setting.record(run, seed, setting.steps_of(run)[0]["suffix"])
    commands = setting.commands(run, seed, toy)
    if toy:
        for _, folder in commands:
            shutil.rmtree(folder, ignore_errors=True)
    else:
        (first / FAILED).unlink(missing_ok=True)
    started = time.perf_counter()
    for step, (command, folder) in zip(setting.steps_of(run), commands):
        with locks[folder]:
            code = call(command, log, setting.root, threads)
            if not (toy or code):
                keep_records(folder, setting.record(run, seed, step["suffix"]))
        if code:
            is_stopped = code < 0 or code > 128  # by a signal
            if not (toy or is_stopped):
                keep_failure(first, command, code, log)
            place = log.relative_to(setting.root)
            return f"{run}, seed {seed}: exit code {code}; {place} says why"
    if not toy:
        took = {
            "seconds": round(time.perf_counter() - started, 3),
            "commands": [command for command, _ in commands],
            "threads": threads,
        }
        path = setting.last_record(run, seed) / "took.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(took, indent=1) + "\n")
    return None


def call(command: str, log: Path, root: Path, threads: int | None) -> int:
    """Run a command, its output after what `log` holds; return its exit code.

    A script of this project is found from any `root`, the command's working directory.
    """
    variables = dict(os.environ)
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    _, script, *words = shlex.split(command)
    own = ROOT / script
    with open(log, "a") as out:
        print(f"\n$ {command}", file=out, flush=True)
        arguments = [sys.executable, str(own if own.is_file() else script), *words]
        return subprocess.call(arguments, cwd=root, env=variables, stdout=out, stderr=out)


def keep_failure(record: Path, command: str, code: int, log: Path) -> None:
    """Record that a command failed, its last line of output, and on which machine."""
    record.mkdir(parents=True, exist_ok=True)
    failure = {
        "command": command,
        "exit_code": code,
        "said": log.read_text().rstrip().splitlines()[-1],
        **environment(),
    }
    (record / FAILED).write_text(json.dumps(failure, indent=1) + "\n")


def keep_records(folder: Path, record: Path) -> None:
    """Copy the records of a run folder, and name its weights, which are not kept, by sha256."""
    for name in KEPT:
        if (folder / name).is_file():
            record.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, record / name)
    weights = [path for ending in WEIGHTS for path in folder.glob(ending)]
    if record.is_dir() and weights:
        newest = max(weights, key=lambda path: (path.stat().st_mtime, path.name))
        digest = hashlib.sha256(newest.read_bytes()).hexdigest()
        (record / "weights.sha256").write_text(f"{digest}  {newest.name}\n")
