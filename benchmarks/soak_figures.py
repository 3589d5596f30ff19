"""The figures of a soak run (benchmarks/soak.py): slopes, lines, aims, the report and the picture."""

import statistics
from pathlib import Path

import numpy as np

SHOWN = 10  # steps between records
AIMS = {"memory": 20.0, "step": 0.05, "records": 0.03}  # MiB an hour, share, share
WORDS = {True: "met", False: "missed", None: "cannot be told"}
HELD = ("memory", "workers", "descriptors", "threads")
RECORDS = ("metrics", "events", "scores")

# ---------------------------------------------------------------------------------------- samples


def columns(samples: list[dict], *names: str) -> list[list]:
    """Return the values of samples by name."""
    return [[sample[name] for sample in samples] for name in names]


def by_part(samples: list[dict]) -> list[list[dict]]:
    """Return the samples of each process."""
    parts = sorted({sample["part"] for sample in samples})
    return [[sample for sample in samples if sample["part"] == part] for part in parts]


def two(samples: list[dict]) -> tuple[list[dict], list[dict]]:
    """Return both halves of samples, neither of them empty."""
    middle = max(1, len(samples) // 2)
    return samples[:middle], samples[middle:] or samples[-1:]


def step_times(records: list[dict]) -> list[tuple[int, float]]:
    """Return (step, seconds per step) of the records that have a time."""
    return [(r["step"], r["seconds_per_step"]) for r in records if "seconds_per_step" in r]


def gaps(records: list[dict], every: int = SHOWN) -> int:
    """Return how often the steps on record go back, or further on than `every`.

    k-NN has a record of its own at a step.
    """
    steps = [step for step, _ in step_times(records)]
    return sum(not 0 < after - before <= every for before, after in zip(steps, steps[1:]))


# ------------------------------------------------------------------------------------------ lines


def slope(x, y) -> float:
    """Return the median of the slopes between all pairs of points (Theil-Sen), 0 of fewer than two.

    At most 1,000 evenly spread points are taken.
    """
    x, y = (np.asarray(values, float)[:: max(1, len(x) // 1000)] for values in (x, y))
    first, second = np.triu_indices(len(x), 1)
    is_apart = x[first] != x[second]
    first = first[is_apart]
    second = second[is_apart]
    if not len(first):
        return 0.0
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


def off_line(x, y) -> tuple[float, float]:
    """Return slope, and furthest point as a share of the last y, of the least-squares line."""
    x = np.asarray(x, float)
    y = np.asarray(y, float)
    if len(x) < 3 or not y[-1]:
        return 0.0, 0.0
    line = np.polyfit(x, y, 1)
    return float(line[0]), float(np.abs(np.polyval(line, x) - y).max() / y[-1])


# ------------------------------------------------------------------------------------------- aims


def judge(samples: list[dict], records: list[dict], short: bool) -> dict:
    """Return the figures, and of each aim "met", "missed" or "cannot be told".

    samples: of both parts. records: of metrics.jsonl, in order. short: nothing can be told.
    """
    figures = {"steps": records[-1]["step"] if records else 0, "samples": len(samples)}
    aims = {}
    for judge_one in (judge_held, judge_steps, judge_records):
        judge_one(figures, aims, samples, records)
    verdicts = {name: WORDS[None if short else is_met] for name, is_met in aims.items()}
    return {**figures, "aims": verdicts}


def judge_held(figures: dict, aims: dict, samples: list[dict], records: list[dict]) -> None:
    """Judge what the processes hold, over the second half of what each of them ran."""
    halves = [part[len(part) // 2 :] for part in by_part(samples)]
    for name in HELD:
        slopes = [60 * slope(*columns(half, "minute", name)) for half in halves]
        figures[name] = {
            "first": samples[0][name],
            "last": samples[-1][name],
            "slopes_per_hour": slopes,
        }
    for name in ("descriptors", "threads"):
        rises = []
        for earlier, later in map(two, halves):
            before, after = (np.median(columns(part, name)[0]) for part in (earlier, later))
            rises.append(float(after - before))
        figures[name]["rises"] = rises
        aims[name] = not any(rises) and not any(figures[name]["slopes_per_hour"])
    for name in ("memory", "workers"):
        aims[name] = bool(max(figures[name]["slopes_per_hour"]) < AIMS["memory"])


def judge_steps(figures: dict, aims: dict, samples: list[dict], records: list[dict]) -> None:
    """Judge the time of a step: every later quarter against the first.

    Where the clock is not steady and processor time is, the machine had other work.
    """
    quarters = [quarter for part in by_part(samples) for quarter in two(part)]
    times = step_times(records)
    ends = [quarter[-1]["step"] for quarter in quarters]
    starts = [0, *ends[:-1]]
    medians = []
    used = []
    for quarter, start, end in zip(quarters, starts, ends):
        seconds = [time for step, time in times if start < step <= end]
        medians.append(statistics.median(seconds or [np.nan]))
        steps = max(1, quarter[-1]["step"] - quarter[0]["step"])
        processor = quarter[-1]["processor"] - quarter[0]["processor"]
        used.append(processor / steps if len(quarter) > 1 else np.nan)
    figures["seconds_per_step"] = medians
    figures["processor_seconds_per_step"] = used
    aims["step"] = True if is_steady(medians) else None if is_steady(used) is False else None
    if not is_steady(medians):
        aims["step"] = None if not is_steady(used) else None
