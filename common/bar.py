"""Progress of a job that counts things: a bar on a terminal, a plain line every few seconds in a pipe."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Bar:
    """Counts from `start` to `total` on standard error: "LABEL: 640/10000 img, 3 s". Silent when disabled or done at once."""

    def __init__(self, label: str, total: int, unit: str, enabled: bool = True, every: float = 5.0, start: int = 0):
        self.label, self.total, self.unit, self.every, self.done = label, total, unit, every, start
        self.started, self.next_line = time.monotonic(), 1.0 if enabled else float("inf")
        on_terminal = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, desc=label, unit=unit, leave=False) if on_terminal else None

    def add(self, n: int) -> None:
        self.done += n
        elapsed = time.monotonic() - self.started
        if self.bar is not None:
            self.bar.update(n)
        elif elapsed >= self.next_line or (self.done == self.total and 1.0 < self.next_line < float("inf")):
            print(f"{self.label}: {self.done}/{self.total} {self.unit}, {elapsed:.0f} s", file=sys.stderr, flush=True)
            self.next_line = elapsed + self.every

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
