"""The longest run, by simulation: hours of tiny steps, of which only the records may grow.

    python benchmarks/soak.py --minutes 120                     # tens of thousands of steps
    python benchmarks/soak.py --minutes 3 --out runs/soak-try   # to see it work; nothing is judged

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
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side_by_side import generate
from benchmarks.soak_figures import SHOWN, columns, draw, judge, report
from common import UsageError, UserError, cli
from common.files import ROOT, write_json
from runner.folder import environment
from runner.records import read as read_records

SCRIPT = "nonsem_neg/moco_non_sem_neg.py"
FLAGS = (
    "-a shufflenet_v2_x0_5 --input-res 32 -b 8 --mlp --aug-plus --cos --moco-t 0.2 --moco-k 1024 "
    "--bn-splits 2 --alpha 2 --patch-ratio 2 8 --epochs 1000000 --lr 0.003 --seed 0 -j 1 "
    f"--data-device host -p {SHOWN} --device cpu --knn-every 5 --knn-k 20 --save-freq 5 "
    "--save_score"
)
MIB = 2**20
TICK = 100  # of processor time, a second
PAGE = 4096
if hasattr(os, "sysconf"):
    TICK = os.sysconf("SC_CLK_TCK")
    PAGE = os.sysconf("SC_PAGESIZE")
PATIENCE = 600  # seconds without a record


def tree(folder: Path) -> Path:
    """Make 2560 pictures of 32 pixels to train on and 64 for k-NN, or take an earlier run's."""
    if not (folder / "val").is_dir():
        shutil.rmtree(folder, ignore_errors=True)
        generate(folder, 64)
        (folder / "train").rename(folder / "val")
        generate(folder, 2560)
    return folder


# --------------------------------------------------------------------------------- what /proc says


def processor_seconds(pid: int) -> float:
    """Return those of a process and its ended children (proc(5): utime, stime, cutime, cstime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICK


def resident(pid: int) -> float:
    """Return the memory that a process holds, MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / MIB


def children(pid: int) -> list[int]:
    """Return the children of all threads of a process."""
    pids = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        pids += map(int, (task / "children").read_text().split())
    return pids


# ------------------------------------------------------------------------------- what is written


def last_step(path: Path) -> int:
    """Return the step of the newest whole record, or 0 where there is none yet."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def size(folder: Path, pattern: str) -> int:
    """Return the bytes of the files of that pattern."""
    return sum(path.stat().st_size for path in folder.glob(pattern))


def sample(pid: int, folder: Path) -> dict:
    """Return what the process holds now, and the folder.

    Raises OSError where the process has just ended.
    """
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
    """Run a command, stop it by SIGTERM, and return the samples in between.

    It runs for `seconds` after its first new record; a sample is taken `every` so many.
    Raises UserError where it ends before that, writes nothing for ten minutes, or does not end as a
    stopped run does.
    """
    log = folder.parent / f"log-{part}.txt"
    samples = []
    newest = last_step(folder / "metrics.jsonl")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        progressed = time.monotonic()
        began = None  # when the first new record was written
        while began is None or time.monotonic() - began < seconds:
            time.sleep(every)
            if process.poll() is not None:
                raise UserError(f"the run ended with {process.returncode} by itself: {tail(log)}")
            try:
                found = sample(process.pid, folder)
            except FileNotFoundError:  # a file was replaced while it was looked at
                continue
            now = time.monotonic()
            if found["step"] > newest:
                newest = found["step"]
                progressed = now
                began = began or now
            elif now - progressed > PATIENCE:
                raise UserError(f"no record for ten minutes after step {newest}: {tail(log)}")
            if began is not None:
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
    """Return the last line of a log, and its name."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"{lines[-1] if lines else 'nothing printed'} ({log})"


def parse_args(argv=None):
    parser = cli.Parser(prog="soak.py", description=__doc__.splitlines()[0])
    about = "of training, without the start of the processes"
    parser.add_argument("--minutes", type=cli.positive, default=120, help=about)
    parser.add_argument("--every", type=cli.positive, default=5, help="seconds between samples")
    about = "folder of the run, of soak.json and soak.png"
    parser.add_argument("--out", default="runs/soak", help=about)
    about = "run nothing: draw soak.png again, beside this soak.json"
    parser.add_argument("--redraw", metavar="SOAK.json", help=about)
    return cli.freeze(parser.parse_args(argv))


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.redraw:
        curves = json.loads(Path(args.redraw).read_text())["curves"]
        samples = [dict(zip(curves, values)) for values in zip(*curves.values())]
        draw(samples, Path(args.redraw).with_suffix(".png"))
        return 0
    if not Path("/proc/self/task").exists():
        raise UsageError("this looks into /proc, which only Linux has")
    out = Path(args.out).resolve()
    folder = out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = [sys.executable, str(ROOT / SCRIPT), str(tree(out / "pictures"))]
    command = [*script, *FLAGS.split(), "--ckpt_path", str(folder)]
    began = time.monotonic()
    samples = []
    for part, flags in ((1, []), (2, ["--resume", "auto"])):
        samples += watch([*command, *flags], folder, 30 * args.minutes, args.every, part, began)
        last = samples[-1]
        print(f"part {part}: {last['step']} steps after {last['minute']:.1f} minutes", flush=True)
    records = read_records(folder / "metrics.jsonl")
    figures = judge(samples, records, short=args.minutes < 30)
    content = {
        "script": f"{SCRIPT} {FLAGS}",
        "minutes": args.minutes,
        **environment(),
        "load": os.getloadavg(),
        **figures,
        "curves": {name: columns(samples, name)[0] for name in samples[0]},
    }
    write_json(out / "soak.json", content)
    draw(samples, out / "soak.png")
    print(report(figures))
    files = f"{out / 'soak.json'}, {out / 'soak.png'}"
    print(f"{figures['steps']} steps, {len(samples)} samples: {files}")
    return sum(verdict == "missed" for verdict in figures["aims"].values())


if __name__ == "__main__":
    cli.run(lambda: sys.exit(main()))
