"""Run one command at a time with a limit of time, in a process group of its own."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common import clock, printable


@dataclass
class Ended:
    """How a command ended: exit code, seconds, what it printed, whether its time was over."""

    code: int
    seconds: float
    printed: str
    out_of_time: bool


class Caller:
    """Run commands in the folder `root`, and pass a signal to this process on to them as SIGTERM.

    limit: seconds until a command is asked to stop, by SIGTERM to its whole group. grace: seconds
    that it then has to save, before SIGKILL. budget: seconds of all commands together, or None.

    received: number of the signal that this process got, or 0.
    """

    seconds_between_lines = 60  # in a pipe; a terminal has one line, renewed every second

    def __init__(self, root: Path, limit: float, grace: float, budget: float | None = None):
        self.root = root
        self.limit = limit
        self.grace = grace
        self.budget = budget
        self.began = time.monotonic()
        self.received = 0

    def __enter__(self) -> Caller:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        handlers = {number: signal.getsignal(number) for number in numbers}
        self.previous = {n: h for n, h in handlers.items() if h is not signal.SIG_IGN}
        for number in self.previous:
            signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number, frame) -> None:
        self.received = number

    def seconds_left(self) -> float:
        """Return how many seconds the budget leaves until a command is asked to stop."""
        if self.budget is None:
            return math.inf
        return self.budget - self.grace - (time.monotonic() - self.began)

    def run(self, command: str, log: Path) -> Ended:
        """Run `python SCRIPT ...`; its output is appended to `log`, and its last line shown."""
        began = time.monotonic()
        limit = min(self.limit, self.seconds_left())
        start, process = self._start(command, log)
        shown = began
        asked = None  # when the command was asked to stop
        out_of_time = False
        while process.poll() is None or (asked and _is_alive(process.pid)):
            now = time.monotonic()
            if process.returncode is None and now - began > limit:
                out_of_time = True
            if asked is None and (out_of_time or self.received):
                asked = now
                _send(process.pid, signal.SIGTERM)
            if asked and now - asked > self.grace:
                _send(process.pid, signal.SIGKILL)
            if now - shown > (1 if sys.stdout.isatty() else self.seconds_between_lines):
                shown = now
                self._show(now - began, limit, log)
            time.sleep(0.05)
        if sys.stdout.isatty():
            print("\r\033[K", end="")
        printed = log.read_bytes()[start:].decode(errors="replace")
        return Ended(process.returncode, time.monotonic() - began, printed, out_of_time)

    def _start(self, command: str, log: Path) -> tuple[int, subprocess.Popen]:
        """Return where in `log` the output of the command begins, and its process."""
        with open(log, "ab") as out:
            out.write(f"\n$ {command}\n".encode())
            out.flush()
            start = out.tell()
            process = subprocess.Popen(
                [sys.executable, *shlex.split(command)[1:]],
                cwd=self.root,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return start, process

    def _show(self, seconds: float, limit: float, log: Path) -> None:
        newest = last_line(log.read_text(errors="replace"))
        line = f"      {clock(seconds)} of at most {clock(limit)}  {newest}"
        if sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{line[:columns]}", end="", flush=True)
        else:
            print(line[:160], flush=True)


def last_line(text: str) -> str:
    """Return the last line of a text that is not empty."""
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    return printable(lines[-1].strip()) if lines else ""


def _send(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _is_alive(group: int) -> bool:
    """Return whether a process of this group has not ended; one that nobody reaps has."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, number = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(number) == group and state not in "ZX":
                return True
    return False
