"""What surrounds a training loop: the command line, the run folder, progress, seeds and signals."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from datetime import datetime
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

from common import UsageError, UserError, cli, printable, processes

ROOT = Path(__file__).resolve().parent.parent
tqdm.set_lock(threading.RLock())  # one process of a job prints; the lock that tqdm makes is one between processes

# ---------------------------------------------------------------------------------------------------------------- seeds


def settle_seed(seed: int | None) -> int:
    """The seed to use: the given one, else one drawn here, the same on every rank. It is printed and recorded."""
    return processes.agree(random.SystemRandom().randrange(2**31) if seed is None else seed)


def seed_all(seed: int) -> None:
    """Seed the global generators (weight initialisation, drop-out). The data loader has its own."""
    random.seed(seed)
    torch.manual_seed(seed)


# ----------------------------------------------------------------------------------------------------------- run folder


def environment() -> dict:
    """Versions, commit and hardware, as recorded with every run."""
    cuda = torch.cuda.is_available()
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else f"{_cpu_name()}, {os.cpu_count()} cores",
    }


def commit() -> str:
    """Short commit of the project, with `-dirty` where tracked files differ from it; `unknown` outside git."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
        return head.strip() + ("-dirty" if dirty.strip() else "")
    return "unknown"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def unlike(args, then: dict, flags: tuple[str, ...]) -> list[str]:
    """What a resumed run has to say of `flags` that differ from those of the run that wrote the checkpoint: [] or one line."""

    def plain(value):  # published scripts keep "120,160,200" as the list that it stands for
        return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value

    now = vars(args)
    differing = [f"{k}={now[k]} (was {then[k]})" for k in flags if k in then and plain(then[k]) != plain(now[k])]
    return [f"note: unlike the run that wrote the checkpoint: {', '.join(differing)}"] if differing else []


class Run:
    """A folder that holds one run: config.json, metrics.jsonl, TensorBoard events, checkpoints, result.json.

    folder: created with its parents. process: only rank 0 writes and prints; on other ranks every method is silent.
    suffix: of config<suffix>.json, metrics<suffix>.jsonl and result<suffix>.json, and the name of a folder for events, where
    a second kind of run shares the folder.
    tensorboard: False for none, True for events in the run folder, or the folder to write them to.
    """

    def __init__(
        self, folder: str | Path, args, process: processes.Process, tensorboard: bool | str = True, suffix: str = ""
    ):
        self.folder, self.process, self.main = Path(folder), process, process.is_main
        self._config, self._result = self.folder / f"config{suffix}.json", self.folder / f"result{suffix}.json"
        self._metrics = self.folder / f"metrics{suffix}.jsonl"
        self._tensorboard, self._jsonl = None, None
        self.command = shlex.join(["python", *sys.argv])
        if not self.main:
            return
        try:
            make_folder(self.folder)
            config = {"command": self.command, **environment(), "world_size": process.world_size,
                      "started": datetime.now().isoformat(timespec="seconds"), "options": cli.flags(args)}  # fmt: skip
            write_json(self._config, config)
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.folder}: {error.strerror}") from None
        self._events = str(self.folder / suffix.lstrip("-")) if tensorboard is True else tensorboard
        self._echo(args, config)

    def _echo(self, args, config) -> None:
        where = f"{self.process.device.type} x {self.process.world_size}"
        threads = "" if self.process.device.type == "cuda" else f" ({torch.get_num_threads()} threads)"
        self.say(f"command  {self.command}")
        self.say(f"code     {config['commit']}, Python {config['python']}, torch {config['torch']}, "
                 f"torchvision {config['torchvision']}, CUDA {config['cuda'] or '-'}")  # fmt: skip
        self.say(f"machine  {config['device']}; {where}{threads}")
        default = getattr(args, "_published", {})
        shown = [f"{'*' if v != default.get(k, v) else ''}{k}={v}" for k, v in sorted(cli.flags(args).items())]
        self.say("options  (* differs from the default)\n         " + _wrap(shown))
        self.say(f"folder   {self.folder}")

    def say(self, text: str) -> None:
        """Print a line, once per job."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def derived(self, **facts) -> None:
        """Echo and record facts that follow from the options and the data."""
        if self.main:
            write_json(self._config, json.loads(self._config.read_text()) | {"derived": facts})
            self.say("derived  " + _wrap([f"{k}={v}" for k, v in facts.items()]))

    def rewind(self, step: int) -> None:
        """Drop what was logged after global step `step` (after a resume), or all of it and an old result (step < 0)."""
        if self.main and step < 0:
            self._result.unlink(missing_ok=True)
        path = self._metrics
        if self.main and path.exists():
            kept = []
            for line in path.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a half line, left by a crash
                    if json.loads(line).get("step", 0) <= step:
                        kept.append(line + "\n")
            write_text(path, "".join(kept))

    def log(self, step: int, **values) -> None:
        """Append one JSON object to metrics.jsonl and one TensorBoard scalar per number. step counts from 0 over the run."""
        if not self.main:
            return
        record = {"step": step, **{k: _plain(v) for k, v in values.items()}}
        try:
            if self._jsonl is None:
                self._jsonl = open(self._metrics, "a", buffering=1)
            self._jsonl.write(json.dumps(record) + "\n")
            if self._tensorboard is None and self._events:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    from torch.utils.tensorboard import SummaryWriter  # takes a second to import: not at start
                self._tensorboard = SummaryWriter(self._events, purge_step=step)
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; checkpoints so far are whole") from None
        for key, value in record.items():
            if self._tensorboard is not None and key not in ("step", "epoch") and isinstance(value, (int, float)):
                self._tensorboard.add_scalar(key, value, step)

    def result(self, **values) -> None:
        """Write result.json (what was evaluated, on what, the numbers, the command) and the final `result:` line."""
        if self.main:
            values = {k: _plain(v) for k, v in values.items()}
            write_json(self._result, {"command": self.command, **environment(), **values})
            numbers = [f"{k} {v:.2f}" for k, v in values.items() if isinstance(v, float)]
            self.say(f"result: {', '.join(numbers)} ({self._result})")

    def say_replaced(self, loader) -> None:
        """With --skip-bad-images: how many pictures were replaced, on all ranks together. To be called on all of them."""
        paths = sorted({path for part in processes.gather_objects(loader.bad_images) for path in part})
        if paths:
            self.say(f"replaced {len(paths)} unreadable pictures, the first {printable(paths[0])}")

    def close(self) -> None:
        for handle in (self._jsonl, self._tensorboard):
            if handle is not None:
                handle.close()


def make_folder(folder: str | Path) -> str:
    """Make a run folder and its parents; UserError where that is not possible."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run folder {folder}: {error.strerror}") from None
    return str(folder)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step: a reader sees the old text or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:  # of a full disk the system does not name the file
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def _plain(value):
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    return round(value, 6) if isinstance(value, float) and math.isfinite(value) else value


def _wrap(words: list[str], width: int = 110) -> str:
    lines, line = [], ""
    for word in words:
        if line and len(line) + len(word) > width:
            lines, line = lines + [line], ""
        line += ("  " if line else "") + word
    return "\n         ".join(lines + [line])


# ------------------------------------------------------------------------------------------------------------- progress


class Progress:
    """Progress of one epoch: a live bar on a terminal, one line every `every` steps in a pipe; rank 0 only.

    `update(n, loss=..., acc=...)` takes 0-dim tensors, means over n rows, and only adds them up on their device. Every
    `every` steps, and at the end, they are read back once: `update` then returns the means since the last print (else
    None), over the rows of all ranks, which must make the same steps. That is also where a non-finite loss is found:
    UserError, on every rank and before anything of it could be saved.
    """

    def __init__(self, label: str, total: int, every: int = 10, start: int = 0, enabled: bool = True, extra: str = ""):
        self.label, self.total, self.every, self.extra = label, total, max(1, every), extra
        self.done, self.enabled = start, enabled
        self.sums: Tensor | None = None
        self.names: list[str] = []
        self.count = 0  # images since the last print
        self.epoch_sums, self.epoch_count = None, 0
        self.seen = 0  # images of this rank
        self.began = self.last = time.perf_counter()
        self.first, self.last_done = start, start
        self.bar = None
        if enabled and sys.stdout.isatty():
            self.bar = tqdm(total=total, initial=start, desc=label, dynamic_ncols=True, leave=False, file=sys.stdout)

    def update(self, n: int, **values: Tensor) -> dict | None:
        self.done += 1
        if values:
            now = torch.stack([v.detach().float() for v in values.values()]) * n
            self.names = list(values)
            self.sums = now if self.sums is None else self.sums + now
        self.count += n
        if self.bar is not None:
            self.bar.update(1)
        if (self.done - self.first) % self.every == 0 or self.done == self.total or self.done == self.first + 1:
            return self._show()
        return None

    def _show(self) -> dict:
        sums, rows = torch.zeros(0).double(), self.count
        if self.sums is not None:  # the only wait for the device
            *sums, rows = processes.sum_ranks(torch.cat([self.sums, self.sums.new_tensor([rows])])).tolist()
            sums = torch.tensor(sums, dtype=torch.float64)
        if not torch.isfinite(sums).all():
            raise UserError(
                f"{self.label}: the loss is not finite at step {self.done}; the last checkpoint is from before it. "
                "Lower --lr, raise the temperature, or try without --amp"
            )
        self.epoch_sums = sums if self.epoch_sums is None else self.epoch_sums + sums
        self.epoch_count += rows
        self.seen += self.count
        now = time.perf_counter()
        since, overall = sums / rows, self.epoch_sums / self.epoch_count
        seconds = (now - self.last) / (self.done - self.last_done)
        mean_seconds = (now - self.began) / (self.done - self.first)
        if self.enabled:
            parts = [f"Time {seconds:.3f} ({mean_seconds:.3f})"]
            parts += [f"{k} {a:.4g} ({b:.4g})" for k, a, b in zip(self.names, since.tolist(), overall.tolist())]
            if self.bar is not None:
                self.bar.set_postfix_str("  ".join(parts[1:] + [self.extra]))
            else:
                left = (self.total - self.done) * mean_seconds
                print(f"{self.label}[{self.done}/{self.total}]  " + "  ".join([*parts, self.extra, f"eta {clock(left)}"]),
                      flush=True)  # fmt: skip
        self.sums, self.count, self.last, self.last_done = None, 0, now, self.done
        return dict(zip(self.names, since.tolist()), seconds=seconds)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def close(self) -> dict:
        """End of the epoch (or of its part that was run): the means over it, and `images_per_second` over all ranks."""
        if self.count:
            self._show()
        if self.bar is not None:
            self.bar.close()
        elapsed = self.elapsed
        means = {} if self.epoch_sums is None else dict(zip(self.names, (self.epoch_sums / self.epoch_count).tolist()))
        return {**means, "images_per_second": self.seen * processes.world_size() / elapsed, "elapsed": elapsed}


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


# -------------------------------------------------------------------------------------------------------------- signals


REPEAT = processes.REPEAT


class StopSignal:
    """SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's --signal) ask for a checkpoint and a clean end at the next step.

    `stop.asked()` is the same on every rank. A further signal more than REPEAT seconds later acts as if this were not
    here; a sooner one is the same request again (a scheduler signals the whole process group, its leader passes it on).
    """

    def __init__(self):
        self.received, self.when = False, 0.0
        self.signals = processes.STOP_SIGNALS

    def __enter__(self):
        self.previous = {s: signal.getsignal(s) for s in self.signals}
        for s in self.signals:
            if self.previous[s] is not signal.SIG_IGN:
                signal.signal(s, self._receive)
        return self

    def __exit__(self, *exc):
        for s, handler in self.previous.items():
            signal.signal(s, handler)

    def _receive(self, signum, frame):
        now = time.monotonic()
        if not self.received:
            self.received, self.when = True, now
        elif now - self.when > REPEAT:
            for s in self.signals:
                signal.signal(s, self.previous[s])
            os.kill(os.getpid(), signum)

    def asked(self) -> bool:
        return processes.any_rank(self.received)


def refuse_to_overwrite(folder: str | Path, pattern: str, resume: str, overwrite: bool) -> None:
    """UsageError where a new run would write over the checkpoints of an earlier one."""
    found = sorted(Path(folder).glob(pattern))
    if found and not resume and not overwrite:
        raise UsageError(
            f"{folder} already holds {found[-1].name}: continue it with --resume auto, choose another folder, "
            "or pass --overwrite"
        )
