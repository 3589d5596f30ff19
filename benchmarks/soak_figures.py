"""The figures of a soak run (benchmarks/soak.py): lines through samples, aims, report, picture."""

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
    if is_steady(medians):
        aims["step"] = True
    else:
        aims["step"] = None if is_steady(used) else False


def is_steady(values: list[float]) -> bool:
    """Return whether all values are near the first one."""
    return max(abs(value / values[0] - 1) for value in values) < AIMS["step"]


def judge_records(figures: dict, aims: dict, samples: list[dict], records: list[dict]) -> None:
    """Judge what was written: bytes on a straight line, checkpoints of one size, no gap."""
    for name in RECORDS:
        per_step, furthest = off_line(*columns(samples, "step", name))
        figures[name] = {
            "bytes_per_step": per_step,
            "last": samples[-1][name],
            "furthest_from_line": furthest,
        }
        aims[name] = furthest < AIMS["records"]
    sizes = sorted({sample["checkpoint"] for sample in samples} - {0})
    figures["checkpoint_bytes"] = [sizes[0], sizes[-1]] if sizes else []
    figures["gaps"] = gaps(records)
    aims["checkpoint"] = bool(sizes) and sizes[-1] < 1.01 * sizes[0]
    aims["gaps"] = figures["gaps"] == 0


# ----------------------------------------------------------------------------------------- report


def report(figures: dict) -> str:
    """Return the figures and verdicts as lines of text."""
    lines = []

    def add(name: str, text: str) -> None:
        lines.append(f"{name:12} {text}: {figures['aims'][name]}")

    for name in HELD:
        unit = " MiB" if name in ("memory", "workers") else ""
        aim = "under 20" if unit else "0"
        held = figures[name]
        slopes = " and ".join(f"{value:+.1f}" for value in held["slopes_per_hour"])
        span = f"{held['first']:.0f} to {held['last']:.0f}{unit}"
        add(name, f"{span}, slopes {slopes}{unit} an hour, aim {aim}")
    add("step", f"{against_first(figures['seconds_per_step'])} of it, aim within 5 %")
    processor = against_first(figures["processor_seconds_per_step"])
    lines.append(f"{'':12} processor: {processor} of it")
    for name in RECORDS:
        written = figures[name]
        furthest = f"at most {written['furthest_from_line']:.1%} off a line, aim 3 %"
        add(name, f"{written['bytes_per_step']:.1f} bytes a step, {furthest}")
    sizes = [f"{size / 1e6:.2f}" for size in figures["checkpoint_bytes"]]
    add("checkpoint", f"{' to '.join(sizes)} MB")
    add("gaps", f"{figures['gaps']} in the steps on record")
    return "\n".join(lines)


def against_first(times: list[float]) -> str:
    """Return the first quarter's time of a step, and the others' as shares of it."""
    others = ", ".join(f"{time / times[0]:.3f}" for time in times[1:])
    return f"{times[0] * 1e3:.1f} ms a step in the first quarter, then {others}"


def pace(part: list[dict]) -> tuple[list[float], list[float]]:
    """Return steps, and milliseconds a step up to there, of about 50 stretches of a process.

    The times are those of the clock, with the k-NN evaluations and the saving in between.
    """
    ends = part[:: max(1, len(part) // 50)]
    steps, times = [], []
    for before, after in zip(ends, ends[1:]):
        if after["step"] > before["step"]:
            minutes = after["minute"] - before["minute"]
            steps.append(after["step"])
            times.append(6e4 * minutes / (after["step"] - before["step"]))
    return steps, times


def draw(samples: list[dict], path: Path) -> None:
    """Write the curves of a run as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    memory, held, written, time_of = figure.subplots(2, 2).flat
    for part in by_part(samples):
        minutes = columns(part, "minute")[0]
        memory.plot(minutes, columns(part, "memory")[0], color="C0", label="main process")
        memory.plot(minutes, columns(part, "workers")[0], color="C1", lw=0.6, label="its workers")
        held.plot(minutes, columns(part, "descriptors")[0], color="C0", lw=0.8, label="open files")
        held.plot(minutes, columns(part, "threads")[0], color="C1", lw=0.8, label="threads")
        time_of.plot(*pace(part), color="C0")
    for number, name in enumerate(RECORDS):
        steps, sizes = columns(samples, "step", name)
        written.plot(steps, [size / 1e6 for size in sizes], color=f"C{number}", label=name)
    titles = (
        (memory, "resident memory, MiB", "minutes"),
        (held, "held by the main process", "minutes"),
        (written, "records, MB", "steps"),
        (time_of, "milliseconds a step", "steps"),
    )
    for axes, title, x in titles:
        axes.set(title=title, xlabel=x, ylim=(0, None))
        axes.grid(alpha=0.3)
        if axes is not time_of:
            handles, labels = axes.get_legend_handles_labels()
            once = dict(zip(labels, handles))
            axes.legend(once.values(), once.keys(), fontsize="small")
    for axes in (written, time_of):  # numbers of steps are long
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    figure.savefig(path, dpi=110)
