"""The longest run, by simulation: hours of tiny steps of a train script, watched from outside. Only records may grow.

    python benchmarks/soak.py --minutes 120                       # tens of thousands of steps
    python benchmarks/soak.py --minutes 3 --out runs/soak-try     # to see it work; slopes of minutes are not judged

nonsem_neg/moco_non_sem_neg.py with patch negatives, its smallest network and 32-pixel pictures, and
everything on that a long run uses: pictures read by a worker, k-NN now and then, numbered
checkpoints (this program keeps the newest two), TensorBoard, --save_score. Half way it is stopped
by SIGTERM, as a scheduler does, and goes on with --resume auto. Every few seconds /proc says what
the process holds, and the run folder what it has written.

memory       resident: slope under 20 MiB an hour, by a straight line over the second half of what
             each of the two processes ran (the median of the slopes between all pairs of samples: a
             spike does not move it); of its workers, too
descriptors  open files: that line's slope is 0, and the last quarter's median is that of the
             quarter before; threads, too
step         seconds a step as metrics.jsonl tells them: the median of every later quarter within 5
             % of the first one's. Where it is not, but the processor time of a step is, the machine
             had other work: it cannot be told.
records      bytes of metrics.jsonl, event files and scores: no sample further than 3 % of the whole
             from one straight line in the steps, over both processes; the steps on record leave no
             gap, the checkpoints keep their size

Writes OUT/soak.json and OUT/soak.png. The exit code is the number of aims missed. Linux only.
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.side_by_side import generate
from common import UsageError, UserError, cli
from common.files import write_json
from runner.folder import environment

SHOWN = 10  # steps between records
SCRIPT = "nonsem_neg/moco_non_sem_neg.py"
FLAGS = (
    "-a shufflenet_v2_x0_5 --input-res 32 -b 8 --mlp --aug-plus --cos --moco-t 0.2 --moco-k 1024 --bn-splits 2 --alpha 2 "
    f"--patch-ratio 2 8 --epochs 1000000 --lr 0.003 --seed 0 -j 1 --data-device host -p {SHOWN} --device cpu "
    "--knn-every 5 --knn-k 20 --save-freq 5 --save_score"
)
MIB, AIMS = 2**20, {"memory": 20.0, "step": 0.05, "records": 0.03}
TICK, PAGE = (
    (os.sysconf(name) for name in ("SC_CLK_TCK", "SC_PAGESIZE"))
    if hasattr(os, "sysconf")
    else (100, 4096)
)


def tree(folder: Path) -> Path:
    """2560 pictures of 32 pixels to train on, 64 for k-NN; those of an earlier run are taken."""
    if not (folder / "val").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        generate(folder, 64)
        (folder / "train").rename(folder / "val")
        generate(folder, 2560)
    return folder


def stat(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def processor_seconds(pid: int) -> float:
    """Of a process and its ended children so far (`proc(5)`: utime, stime, cutime, cstime)."""
    return sum(map(int, stat(pid)[11:15])) / TICK


def resident(pid: int) -> float:
    """MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / MIB


def children(pid: int) -> list[int]:
    return [
        int(c)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for c in (task / "children").read_text().split()
    ]


def last_step(path: Path) -> int:
    """Of the newest whole record; 0: there is none yet."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def size(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def sample(pid: int, folder: Path) -> dict:
    """What the process holds now, and the folder. OSError where the process has just ended."""
    workers = 0.0
    for child in children(pid):
        try:
            workers += resident(child)
        except OSError:  # ended meanwhile
            pass
    return {
        "memory": resident(pid),
        "workers": workers,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "processor": processor_seconds(pid),
        "step": last_step(folder / "metrics.jsonl"),
        "metrics": size(folder, "metrics.jsonl"),
        "events": size(folder, "events.*"),
        "scores": size(folder, "scores/*.npy"),
        "checkpoint": size(folder, "checkpoint_last.pth.tar"),
    }


def watch(
    command: list[str], folder: Path, seconds: float, every: float, part: int, start: float
) -> list[dict]:
    """Run a command for `seconds` after its first new record, then stop it by SIGTERM: the samples in between.

    UserError where it ends before that, writes nothing for ten minutes, or does not end as a stopped run does.
    """
    log, samples, before = (
        folder.parent / f"log-{part}.txt",
        [],
        last_step(folder / "metrics.jsonl"),
    )
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        began = progressed = time.monotonic()
        running, newest = False, before
        while not running or time.monotonic() - began < seconds:
            time.sleep(every)
            if process.poll() is not None:
                raise UserError(f"the run ended with {process.returncode} by itself: {tail(log)}")
            try:
                found = sample(process.pid, folder)
            except FileNotFoundError:  # a file was replaced under our eyes
                continue
            now = time.monotonic()
            if found["step"] > newest:
                newest, progressed = found["step"], now
                if not running:
                    running, began = True, now
            elif now - progressed > 600:
                raise UserError(f"no record for ten minutes after step {newest}: {tail(log)}")
            if running:
                samples.append({"part": part, "minute": (now - start) / 60, **found})
            for old in sorted(folder.glob("checkpoint_[0-9]*.pth.tar"))[:-2]:
                old.unlink()
        process.send_signal(signal.SIGTERM)
        code = process.wait(300)
        if code != 128 + signal.SIGTERM:
            raise UserError(f"stopped by SIGTERM, the run ended with {code}: {tail(log)}")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return samples


def tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'without a word'} ({log})"


def slope(x, y) -> float:
    """Of a straight line: the median of the slopes between all pairs of points (Theil-Sen). 0 of fewer than two.

    At most 1,000 evenly spread points are taken.
    """
    x, y = (np.asarray(values, float)[:: max(1, len(x) // 1000)] for values in (x, y))
    first, second = np.triu_indices(len(x), 1)
    different = x[first] != x[second]
    first, second = first[different], second[different]
    return float(np.median((y[second] - y[first]) / (x[second] - x[first]))) if len(first) else 0.0


def off_line(x, y) -> tuple[float, float]:
    """(slope, furthest point from the line as a share of the last y) of the least-squares line."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if len(x) < 3 or not y[-1]:
        return 0.0, 0.0
    line = np.polyfit(x, y, 1)
    return float(line[0]), float(np.abs(np.polyval(line, x) - y).max() / y[-1])


def step_times(records: list[dict]) -> list[tuple[int, float]]:
    return [(r["step"], r["seconds_per_step"]) for r in records if "seconds_per_step" in r]


def gaps(records: list[dict], every: int = SHOWN) -> int:
    """How often the steps on record go back, or further on than `every`. k-NN has a record of its own at a step."""
    steps = [step for step, _ in step_times(records)]
    return sum(not 0 < b - a <= every for a, b in zip(steps, steps[1:]))


def judge(samples: list[dict], records: list[dict], short: bool) -> dict:
    """The figures, and of each aim "met", "missed" or "cannot be told" (`short`: always that).

    samples: of `watch`, both parts. records: of metrics.jsonl, in order.
    """
    halves = [part[len(part) // 2 :] for part in split(samples)]
    figures, aims = {"steps": records[-1]["step"] if records else 0, "samples": len(samples)}, {}
    for what in ("memory", "workers", "descriptors", "threads"):
        slopes = [60 * slope(*columns(half, "minute", what)) for half in halves]
        figures[what] = {
            "first": samples[0][what],
            "last": samples[-1][what],
            "slopes_per_hour": slopes,
        }
    for what in ("descriptors", "threads"):
        rises = [
            np.median(columns(b, what)[0]) - np.median(columns(a, what)[0])
            for a, b in map(two, halves)
        ]
        figures[what]["rises"] = list(map(float, rises))
        aims[what] = not any(rises) and not any(figures[what]["slopes_per_hour"])
    for what in ("memory", "workers"):
        aims[what] = max(figures[what]["slopes_per_hour"]) < AIMS["memory"]

    quarters = [quarter for part in split(samples) for quarter in two(part)]
    times, ends = step_times(records), [quarter[-1]["step"] for quarter in quarters]
    starts = [0, *ends[:-1]]
    medians = [
        statistics.median([t for s, t in times if a < s <= b] or [np.nan])
        for a, b in zip(starts, ends)
    ]
    used = [
        (q[-1]["processor"] - q[0]["processor"]) / max(1, q[-1]["step"] - q[0]["step"])
        if len(q) > 1
        else np.nan
        for q in quarters
    ]
    figures["seconds_per_step"], figures["processor_seconds_per_step"] = medians, used
    steady, steady_processor = (
        max(abs(t / of[0] - 1) for t in of) < AIMS["step"] for of in (medians, used)
    )
    aims["step"] = steady if steady or not steady_processor else None

    for what in ("metrics", "events", "scores"):
        per_step, furthest = off_line(*columns(samples, "step", what))
        figures[what] = {
            "bytes_per_step": per_step,
            "last": samples[-1][what],
            "furthest_from_line": furthest,
        }
        aims[what] = furthest < AIMS["records"]
    sizes = sorted({s["checkpoint"] for s in samples} - {0})
    figures["checkpoint_bytes"], figures["gaps"] = (
        [sizes[0], sizes[-1]] if sizes else [],
        gaps(records),
    )
    aims["checkpoint"] = bool(sizes) and sizes[-1] < 1.01 * sizes[0]
    aims["gaps"] = figures["gaps"] == 0
    words = {True: "met", False: "missed", None: "cannot be told"}
    return {
        **figures,
        "aims": {
            what: words[None if short else bool(ok) if ok is not None else None]
            for what, ok in aims.items()
        },
    }


def split(samples: list[dict]) -> list[list[dict]]:
    """By the process that they are of."""
    return [
        [s for s in samples if s["part"] == part] for part in sorted({s["part"] for s in samples})
    ]


def two(samples: list[dict]) -> tuple[list[dict], list[dict]]:
    middle = max(1, len(samples) // 2)
    return samples[:middle], samples[middle:] or samples[-1:]


def columns(samples: list[dict], *names: str) -> list[list]:
    return [[s[name] for s in samples] for name in names]


def say(found: dict) -> None:
    def line(what: str, text: str) -> None:
        print(f"{what:12} {text}: {found['aims'][what]}")

    for what, unit, aim in (
        ("memory", " MiB", "under 20"),
        ("workers", " MiB", "under 20"),
        ("descriptors", "", "0"),
        ("threads", "", "0"),
    ):
        f = found[what]
        slopes = " and ".join(f"{s:+.1f}" for s in f["slopes_per_hour"])
        line(
            what,
            f"{f['first']:.0f} to {f['last']:.0f}{unit}, slopes {slopes}{unit} an hour, aim {aim}",
        )
    for what, times in (
        ("step", found["seconds_per_step"]),
        ("", found["processor_seconds_per_step"]),
    ):
        text = f"{times[0] * 1e3:.1f} ms a step in the first quarter, then " + ", ".join(
            f"{t / times[0]:.3f}" for t in times[1:]
        )
        line(what, f"{text} of it, aim within 5 %") if what else print(
            f"{'':12} processor: {text} of it"
        )
    for what in ("metrics", "events", "scores"):
        f = found[what]
        line(
            what,
            f"{f['bytes_per_step']:.1f} bytes a step, at most {f['furthest_from_line']:.1%} off a line, aim 3 %",
        )
    line("checkpoint", " to ".join(f"{b / 1e6:.2f}" for b in found["checkpoint_bytes"]) + " MB")
    line("gaps", f"{found['gaps']} in the steps on record")


def draw(samples: list[dict], records: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    memory, held, written, time_of = figure.subplots(2, 2).flat
    for part in split(samples):
        minutes = columns(part, "minute")[0]
        memory.plot(minutes, columns(part, "memory")[0], color="C0", label="main process")
        memory.plot(minutes, columns(part, "workers")[0], color="C1", lw=0.6, label="its workers")
        held.plot(minutes, columns(part, "descriptors")[0], color="C0", lw=0.8, label="open files")
        held.plot(minutes, columns(part, "threads")[0], color="C1", lw=0.8, label="threads")
    for what, colour in (("metrics", "C0"), ("events", "C1"), ("scores", "C2")):
        written.plot(
            *columns(samples, "step"),
            [b / 1e6 for b in columns(samples, what)[0]],
            color=colour,
            label=what,
        )
    times = step_times(records)
    if times:
        steps, seconds = zip(*times)
        width = max(1, len(times) // 200)
        blocks = [
            (steps[i], statistics.median(seconds[i : i + width]))
            for i in range(0, len(times), width)
        ]
        time_of.plot(*zip(*((s, 1e3 * t) for s, t in blocks)), color="C0")
    for axes, title, x in (
        (memory, "resident memory, MiB", "minutes"),
        (held, "held by the main process", "minutes"),
        (written, "records, MB", "steps"),
        (time_of, "milliseconds a step, medians", "steps"),
    ):
        axes.set(title=title, xlabel=x, ylim=(0, None))
        axes.grid(alpha=0.3)
        if axes is not time_of:
            handles, labels = axes.get_legend_handles_labels()
            once = dict(zip(labels, handles))
            axes.legend(once.values(), once.keys(), fontsize="small")
    figure.savefig(path, dpi=110)


def main(argv=None) -> int:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes",
        type=cli.positive,
        default=120,
        help="of training, without the start of the processes",
    )
    parser.add_argument("--every", type=cli.positive, default=5, help="seconds between samples")
    parser.add_argument("--out", default="runs/soak", help="folder of the run and of what is found")
    args = parser.parse_args(argv)
    if not Path("/proc/self/task").exists():
        raise UsageError("this looks into /proc, which only Linux has")
    out = Path(args.out).resolve()
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [
        sys.executable,
        str(ROOT / SCRIPT),
        str(tree(out / "pictures")),
        *FLAGS.split(),
        "--ckpt_path",
        str(folder),
    ]
    began = time.monotonic()
    samples = []
    for part, flags in ((1, []), (2, ["--resume", "auto"])):
        samples += watch([*command, *flags], folder, 30 * args.minutes, args.every, part, began)
        print(
            f"part {part}: {samples[-1]['step']} steps after {samples[-1]['minute']:.1f} minutes",
            flush=True,
        )
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = judge(samples, records, short=args.minutes < 30)
    where = {
        "script": f"{SCRIPT} {FLAGS}",
        "minutes": args.minutes,
        **environment(),
        "load": os.getloadavg(),
    }
    write_json(
        out / "soak.json",
        {**where, **found, "curves": {k: columns(samples, k)[0] for k in samples[0]}},
    )
    draw(samples, records, out / "soak.png")
    say(found)
    print(
        f"{found['steps']} steps, {len(samples)} samples: {out / 'soak.json'}, {out / 'soak.png'}"
    )
    return sum(verdict == "missed" for verdict in found["aims"].values())


if __name__ == "__main__":
    cli.run(lambda: sys.exit(main()))
