"""Train scripts in forked processes of which some kill themselves; test_killed.py starts this once and reads what became.

    python tests/killed.py < JSON     # {name: [script, flags, flag of the folder, kill before step, place in a save]}

For every run, in a folder with data/demo: NAME-whole has it undisturbed; NAME-parts has it killed (SIGKILL) before a step,
resumed and killed within a save, resumed again and left alone. Prints a JSON object per run: what the processes ended with,
and which checkpoints lay there after the kill within a save. A fork saves an import: nothing has started a thread before.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # NumPy's would start a thread per core

import torch
from conftest import slim_networks

from common import data


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_step(n: int) -> None:
    """n counts the steps of this process from 0."""
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
        self.file, self.room = file, 100_000

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
    """In the first save of this process: half way through the file, before its rename or after it."""
    save, replace = torch.save, os.replace

    def dies(old, new, **how):
        if place == "before the rename" and str(new).endswith((".pth", ".tar")):
            die()
        replace(old, new, **how)
        if str(new).endswith((".pth", ".tar")):
            die()

    if place == "half way":
        torch.save = lambda value, file, *rest, **how: save(value, Half(file), *rest, **how)
    else:
        os.replace = dies


def forked(script: str, flags: list[str], log: str, plant=None) -> int:
    child = os.fork()
    if child:
        return child
    code = 99  # of an error that the log tells
    try:
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                if plant is not None:
                    plant()
                sys.modules[script].main(flags)
                code = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """Exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    runs = json.loads(sys.stdin.read())
    for script, *_ in runs.values():
        importlib.import_module(script)
    if os.path.exists("/proc/self/task"):
        assert len(os.listdir("/proc/self/task")) == 1, "a fork needs a process without threads"
    for name, (script, flags, folder, step, place) in runs.items():
        whole = forked(script, [*flags, folder, f"{name}-whole"], f"{name}-whole.log")
        parts = [*flags, folder, f"{name}-parts"]
        log = f"{name}-parts.log"
        codes = [ended(forked(script, parts, log, lambda step=step: kill_before_step(step)))]
        parts += ["--resume", "auto"]
        codes.append(ended(forked(script, parts, log, lambda place=place: kill_in_save(place))))
        left = sorted(str(path) for path in Path(f"{name}-parts").rglob("*") if path.name.endswith((".pth", ".tar")))
        readable = [path for path in left if isinstance(torch.load(path, weights_only=True), dict)]
        codes.append(ended(forked(script, parts, log)))
        print(json.dumps({"run": name, "whole": ended(whole), "parts": codes, "left": left, "readable": readable}))


if __name__ == "__main__":
    with slim_networks():
        main()
