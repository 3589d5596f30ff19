"""The outer threshold over a training: constant, annealed by a formula, or adaptive.

Policies follow src/utils/policy.py of mhw32/contrastive-ring-public at fb3e1c2, with two
differences. Formulas replace its tables, so that there is a threshold at every step of any run (in
the published code an annealing that is longer than the run, or that its ten levels do not divide,
ends in an error). The history of the adaptive policies is saved with the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

START = 1.0  # of every policy but the constant one, which has --thres-outer, as published
END = 0.1
POLICIES = ("constant", "linear", "step", "exponential", "loss", "accuracy")


@dataclass
class Constant:
    """The same threshold at every step; the base of all policies."""

    value: float

    def __call__(self, step: int) -> float:
        """Return the threshold at a step of the run, counted from 0."""
        return self.value

    @property
    def least(self) -> float:
        """Return the smallest threshold of the run."""
        return self.value

    def record(self, value: float) -> None:
        """Record a measured loss or accuracy, which adaptive policies follow."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Load a `state_dict`. Raises LookupError, TypeError or ValueError if it does not fit."""


@dataclass
class Annealed(Constant):
    """A threshold that falls from `value` to `least` in `length` steps, and stays there."""

    value: float = START
    length: int = 1
    least: float = END

    def __call__(self, step: int) -> float:
        return self.inside(step) if step < self.length else self.least


class Linear(Annealed):
    def inside(self, step: int) -> float:
        return self.value + (self.least - self.value) * step / max(1, self.length - 1)


@dataclass
class Step(Annealed):
    """A fall in levels that are `drop` apart, each held for the same whole number of steps."""

    drop: float = 0.1

    def inside(self, step: int) -> float:
        # as np.arange(least, value + drop, drop) counts them, which the published code reverses
        levels = math.ceil((self.value + self.drop - self.least) / self.drop)
        held = self.length // levels
        level = step // held if held else levels
        return self.least + self.drop * (levels - 1 - level) if level < levels else self.least


@dataclass
class Exponential(Annealed):
    """An exponential fall at `rate` per step; the published .1 reaches .11 within 45 steps."""

    rate: float = 0.1

    def inside(self, step: int) -> float:
        return self.least + (self.value - self.least) * math.exp(-self.rate * step)


@dataclass
class Adaptive(Constant):
    """A threshold that moves by `delta` with every recorded value but the first.

    Where the value is worse than the mean of the last `window` ones the threshold rises, which
    makes the negatives easier; else it falls. lower_is_better: the values are losses, not
    accuracies.
    """

    value: float = START
    delta: float = 0.01
    window: int = 10
    lower_is_better: bool = True
    least: float = END
    most: float = START
    history: list[float] = field(default_factory=list)

    def record(self, value: float) -> None:
        if self.history:
            mean = sum(self.history) / len(self.history)
            if value > mean or value < mean:  # not equal, and a number
                is_worse = (value > mean) == self.lower_is_better
                moved = self.value + (self.delta if is_worse else -self.delta)
                self.value = min(max(moved, self.least), self.most)
        self.history = [*self.history, value][-self.window :]

    def state_dict(self) -> dict:
        return {"value": self.value, "history": list(self.history)}

    def load_state_dict(self, state: dict) -> None:
        if not state:  # the checkpoint is of a run without this policy, which begins here
            return
        value = float(state["value"])
        history = [float(number) for number in state["history"]]
        if not self.least <= value <= self.most or not all(map(math.isfinite, history)):
            raise ValueError(f"threshold {value}, history {history}")
        self.value = value
        self.history = history


def build(name: str, thres_outer: float, length: int, rate: float | None = None) -> Constant:
    """Return the policy `name` of POLICIES. Raises ValueError for another name.

    length: steps of the annealing. rate: exponential decay over the whole length; None: .1 per
    step, as published.
    """
    if name == "constant":
        return Constant(thres_outer)
    if name == "linear":
        return Linear(length=length)
    if name == "step":
        return Step(length=length)
    if name == "exponential":
        return Exponential(length=length, rate=0.1 if rate is None else rate / length)
    if name == "loss":
        return Adaptive()
    if name == "accuracy":
        return Adaptive(delta=0.05, window=5, lower_is_better=False)
    raise ValueError(f"policy {name!r} must be one of {', '.join(POLICIES)}")
