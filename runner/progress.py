"""Show the progress of an epoch: a live bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import threading
import time

import torch
from torch import Tensor
from tqdm import tqdm

from common import UserError, clock, collectives

# Only one process prints. The default lock of tqdm would be shared between processes.
tqdm.set_lock(threading.RLock())


class Progress:
    """Average the values of an epoch's steps on their device, and print them on rank 0.

    label: first word of a line. total: steps of the epoch. every: steps between two read-backs.
    start: steps that an earlier run has done.

    `update` takes the values of one step. The sums are read back only at the first step, at every
    `every`-th step and at the last one; nothing else waits for the device. A value that is not
    finite then raises a UserError on every rank, before it could be saved.
    """

    def __init__(
        self, label: str, total: int, every: int = 10, start: int = 0, enabled: bool = True
    ):
        self.label = label
        self.total = total
        self.every = max(1, every)
        self.enabled = enabled
        self.done = self.first = self._shown_at = start
        self.rows = 0  # read back so far in this epoch, of all ranks
        self.numbers: dict[str, float] = {}  # the newest values that are plain numbers
        self._names: list[str] = []
        self._pending: Tensor | None = None  # sums since the last read-back, on the device
        self._pending_rows = 0
        self._sums = torch.zeros(0, dtype=torch.float64)  # of the epoch, on the CPU
        self.began = self._shown_when = time.perf_counter()
        self.bar = tqdm(
            total=total,
            initial=start,
            desc=label,
            dynamic_ncols=True,
            leave=False,
            file=sys.stdout,
            disable=not (enabled and sys.stdout.isatty()),
        )

    def update(self, rows: int, **values: Tensor | float) -> dict | None:
        """Count one step of `rows` rows on this rank.

        values: 0-dim tensors, which are means over the rows, and plain numbers, which are shown as
        they are. Returns None unless the sums are read back. Otherwise it returns the means since
        the last read-back over the rows of all ranks, the plain numbers, `seconds_per_step`, and
        at the end of the epoch its means `epoch_NAME`. Every rank must make the same calls.
        """
        self.done += 1
        self._pending_rows += rows
        means = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        self._names = list(means)
        self.numbers = {name: value for name, value in values.items() if name not in means}
        if means:
            now = torch.stack([value.detach().float() for value in means.values()]) * rows
            self._pending = now if self._pending is None else self._pending + now
        self.bar.update(1)
        is_due = (self.done - self.first) % self.every == 0
        if is_due or self.done in (self.total, self.first + 1):
            return self._read_back()
        return None

    def _read_back(self) -> dict:
        sums, rows = self._sum_over_ranks()
        if not torch.isfinite(sums).all():
            raise UserError(
                f"{self.label}: the loss is not finite at step {self.done}; the last checkpoint "
                "is older than that. Lower the learning rate, raise the temperature, or try "
                "without --amp"
            )
        self._sums = self._sums + sums if len(self._sums) else sums
        self.rows += rows
        recent = dict(zip(self._names, (sums / rows).tolist()))
        now = time.perf_counter()
        seconds = (now - self._shown_when) / (self.done - self._shown_at)
        if self.enabled:
            self._print(recent, seconds)
        self._pending = None
        self._pending_rows = 0
        self._shown_when = now
        self._shown_at = self.done
        shown = recent | self.numbers | {"seconds_per_step": seconds}
        if self.done == self.total:
            shown |= {f"epoch_{name}": value for name, value in self.means.items()}
        return shown

    def _sum_over_ranks(self) -> tuple[Tensor, float]:
        """Return the sums since the last read-back (float64, on the CPU) and their row count."""
        if self._pending is None:
            return torch.zeros(len(self._names), dtype=torch.float64), self._pending_rows
        mine = torch.cat([self._pending, self._pending.new_tensor([self._pending_rows])])
        *sums, rows = collectives.summed(mine).tolist()
        return torch.tensor(sums, dtype=torch.float64), rows

    def _print(self, recent: dict[str, float], seconds: float) -> None:
        mean_seconds = self.elapsed / (self.done - self.first)
        parts = [f"{name} {recent[name]:.4g} ({mean:.4g})" for name, mean in self.means.items()]
        parts += [f"{name} {value:.3g}" for name, value in self.numbers.items()]
        self.bar.set_postfix_str("  ".join(parts))
        if self.bar.disable:
            time_left = clock((self.total - self.done) * mean_seconds)
            line = [f"Time {seconds:.3f} ({mean_seconds:.3f})", *parts, f"eta {time_left}"]
            print(f"{self.label}[{self.done}/{self.total}]  " + "  ".join(line), flush=True)

    @property
    def means(self) -> dict[str, float]:
        """Means over the part of the epoch that was read back, of all ranks."""
        return dict(zip(self._names, (self._sums / max(self.rows, 1)).tolist()))

    @property
    def elapsed(self) -> float:
        """Seconds since this run started the epoch."""
        return time.perf_counter() - self.began

    def summary(self) -> str:
        """Return the means over the epoch, the newest numbers, the speed and the time in words."""
        values = self.means | self.numbers
        words = [f"{name} {value:.4g}" for name, value in values.items()]
        words.append(f"{self.rows / self.elapsed:.0f} images/s")
        words.append(clock(self.elapsed))
        return ", ".join(words)

    def close(self) -> dict[str, float]:
        """Finish the epoch, or the part that was run, and return its means."""
        if self._pending_rows:
            self._read_back()
        self.bar.close()
        return self.means
