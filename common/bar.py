"""Progress of a job that counts things: a bar on a terminal, a plain line every few seconds in a pipe."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Bar:
    """Counts up to `total` on standard error: "LABEL: 640/10000 img, 3 s". Silent when not enabled or done at once.

    start: of them were done before this one began.
    """

    def __init__(self, label: str, total: int, unit: str, enabled: bool = True, every: float = 5.0, start: int = 0):
        self.label, self.total, self.unit, self.every = label, total, unit, every
        self.done, self.started, self.next_line = start, time.monotonic(), 1.0
        terminal = sys.stderr.isatty()
        self.plain = enabled and not terminal
        self.bar = (
            tqdm(total=total, initial=start, desc=label, unit=unit, leave=False) if enabled and terminal else None
        )

    def add(self, n: int) -> None:
        self.done += n
        elapsed = time.monotonic() - self.started
        if self.bar is not None:
            self.bar.update(n)
        elif self.plain and (elapsed >= self.next_line or (self.done == self.total and self.next_line > 1.0)):
            print(f"{self.label}: {self.done}/{self.total} {self.unit}, {elapsed:.0f} s", file=sys.stderr, flush=True)
            self.next_line = elapsed + self.every

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
