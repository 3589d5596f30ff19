"""Train scripts in forked processes of which some kill themselves; test_killed.py starts this once.

    python tests/killed.py < JSON     # {name of a Case: [kill before step, place in a save]}

Of every run, in a folder with data/demo: NAME-whole has it undisturbed; NAME-parts has it killed
(SIGKILL) before a step, resumed and killed within a save, resumed again and left alone. Prints a
JSON object per run: what the processes ended with, and which checkpoints lay there after the kill
within a save. A fork saves an import: nothing has started a thread before.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # NumPy's: one per core

import torch
import torch.utils.tensorboard  # noqa: F401  (once, before the forks)
from conftest import slim_networks
from papers import CASES, checkpoints

from common import data

SUFFIXES = (".pth", ".tar", ".ckpt")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_step(n: int) -> None:
    """Die before step n of this process, counted from 0."""
    batches = data.Loader.__iter__

    def counted(self):
        nonlocal n
        for batch in batches(self):
            if n == 0:
                die()
            n -= 1
            yield batch

    data.Loader.__iter__ = counted


class Half:
    """A file that ends the process after 100,000 bytes, which the disk has."""

    def __init__(self, file):
        self.file = file
        self.room = 100_000

    def write(self, chunk):
        self.file.write(bytes(chunk)[: max(0, self.room)])
        self.room -= len(chunk)
        if self.room < 0:
            self.file.flush()
            die()
        return len(chunk)

    def __getattr__(self, name):
        return getattr(self.file, name)


def kill_in_save(place: str) -> None:
    """Die in this process's first save: half way in the file, before its rename or after it."""
    save = torch.save
    replace = os.replace

    def save_half(value, file, *rest, **options):
        save(value, Half(file), *rest, **options)

    def replace_and_die(old, new, **options):
        is_checkpoint = str(new).endswith(SUFFIXES)
        if place == "before the rename" and is_checkpoint:
            die()
        replace(old, new, **options)
        if is_checkpoint:
            die()

    if place == "half way":
        torch.save = save_half
    else:
        os.replace = replace_and_die


def forked(name: str, flags: list[str], log: str, plant=None) -> int:
    """Start the script of a Case in a fork and return its number. plant(): is called before."""
    child = os.fork()
    if child:
        return child
    code = 99  # of an error, which is in the log
    try:
        with open(log, "a") as file:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                try:
                    if plant is not None:
                        plant()
                    CASES[name].module.main(flags)
                    code = 0
                except BaseException:
                    traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Return the exit code of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_and_resumed(name: str, step: int, place: str) -> dict:
    """Run a Case as a whole and in parts, and return what became of it."""
    folder, log = f"{name}-parts", f"{name}-parts.log"
    whole = forked(name, CASES[name].run_in(f"{name}-whole"), f"{name}-whole.log")
    first = CASES[name].run_in(folder)
    again = CASES[name].run_in(folder, "--resume", "auto")
    codes = [
        ended(forked(name, first, log, lambda: kill_before_step(step))),
        ended(forked(name, again, log, lambda: kill_in_save(place))),
    ]
    left = list(checkpoints(folder))
    for path in checkpoints(folder).values():
        torch.load(path, weights_only=True)
        (path.parent / "scores").mkdir(exist_ok=True)
        (path.parent / "scores" / ".score_001.npy.1-ab.partial").touch()  # of a killed writer
    codes.append(ended(forked(name, again, log)))
    return {"run": name, "whole": ended(whole), "parts": codes, "left": left}


def main() -> None:
    runs = json.loads(sys.stdin.read())
    for name in runs:
        CASES[name].module  # noqa: B018 imported before the forks
    if os.path.exists("/proc/self/task"):
        assert len(os.listdir("/proc/self/task")) == 1, "a fork needs a process without threads"
    for name, (step, place) in runs.items():
        print(json.dumps(killed_and_resumed(name, step, place)))


if __name__ == "__main__":
    with slim_networks():
        main()
