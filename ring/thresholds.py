"""The outer threshold over a training: constant, annealed by formula, or following the loss or the accuracy.

Follows src/utils/policy.py of mhw32/contrastive-ring-public at fb3e1c2. Differs: formulas instead of tables, so that any
number of steps, and any length of the annealing, has a threshold at every step (published: an annealing longer than the run,
or one that its ten levels do not divide, ends in an error); the history of the adaptive ones is saved with the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from common import UsageError

START, END = 1.0, 0.1  # of every policy that anneals; --thres-outer is of the constant one, as published
POLICIES = ("constant", "linear", "step", "exponential", "loss", "accuracy")


@dataclass
class Constant:
    value: float

    def __call__(self, step: int) -> float:
        return self.value

    @property
    def least(self) -> float:
        return self.value

    def record(self, value: float) -> None:
        """A loss or an accuracy was measured. Only the adaptive policy listens."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """KeyError, TypeError or ValueError where it is no state of this policy."""


@dataclass
class Annealed(Constant):
    """From `value` down to `least` in `length` steps, counted from 0, and `least` after them."""

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
    """Levels `drop` apart, each held for the same whole number of steps."""

    drop: float = 0.1

    def inside(self, step: int) -> float:
        levels = round((self.value - self.least) / self.drop) + 1
        held = self.length // levels
        level = step // held if held else levels
        return self.value - self.drop * level if level < levels else self.least


@dataclass
class Exponential(Annealed):
    """rate: per step; the published .1 is below .11 after 45 iterations, wherever the annealing ends."""

    rate: float = 0.1

    def inside(self, step: int) -> float:
        return self.least + (self.value - self.least) * math.exp(-self.rate * step)


@dataclass
class Adaptive(Constant):
    """Moves by `delta` whenever a value is recorded: easier where it is worse than the mean of the last ones, else harder.

    lower_is_better: of a loss, not of an accuracy. window: values that are remembered. The first value moves nothing.
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
            worse = (value > mean) - (value < mean)
            moved = self.value + self.delta * (worse if self.lower_is_better else -worse)
            self.value = min(max(moved, self.least), self.most)
        self.history = [*self.history, value][-self.window :]

    def state_dict(self) -> dict:
        return {"value": self.value, "history": list(self.history)}

    def load_state_dict(self, state: dict) -> None:
        if state:  # none: of a run without this policy, which begins here
            value, history = float(state["value"]), [float(one) for one in state["history"]]
            if not (self.least <= value <= self.most and all(map(math.isfinite, history))):
                raise ValueError(value)
            self.value, self.history = value, history


def build(name: str, thres_outer: float, length: int, rate: float | None = None) -> Constant:
    """The policy `name` of POLICIES. length: of the annealing, in steps. rate: of the exponential one, over its whole
    length; None: .1 per step, as published."""
    if name == "constant":
        return Constant(thres_outer)
    if name in ("linear", "step"):
        return {"linear": Linear, "step": Step}[name](length=length)
    if name == "exponential":
        return Exponential(length=length, rate=0.1 if rate is None else rate / length)
    if name == "loss":
        return Adaptive()
    if name == "accuracy":
        return Adaptive(delta=0.05, window=5, lower_is_better=False)
    raise UsageError(f"--anneal {name}: there are {', '.join(POLICIES)}")
