"""The folder of a run, the progress of an epoch, and the signal to stop."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from datetime import datetime
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

from common import UsageError, UserError, checkpoint, cli, printable, processes
from common.checkpoint import fcntl
from common.processes import Process

ROOT = Path(__file__).resolve().parent.parent
tqdm.set_lock(threading.RLock())  # one process of a job prints; the lock that tqdm makes is one between processes


def environment() -> dict:
    """Versions, commit (with `-dirty` where tracked files differ; or `unknown`) and hardware, recorded with every run."""
    cuda, commit, cpu = torch.cuda.is_available(), "", ""
    with contextlib.suppress(OSError):
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    cpu = cpu or platform.processor() or platform.machine()
    return {
        "commit": commit or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else f"{cpu}, {os.cpu_count()} cores",
    }


def make_folder(folder: str | Path) -> str:
    """Make a folder and its parents; UserError where that is not possible."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {printable(folder)}: {error.strerror.lower()}") from None
    return str(folder)


def refuse_to_overwrite(folder: str | Path, pattern: str, resume: str, overwrite: bool) -> None:
    """UsageError where a new run would write over the checkpoints of an earlier one."""
    found = sorted(Path(folder).glob(pattern))
    if found and not resume and not overwrite:
        way_out = "continue it with --resume auto, choose another folder, or pass --overwrite"
        raise UsageError(f"{folder} already holds {found[-1].name}: {way_out}")


_held: list[int] = []  # the folders that this process holds


def _let_go() -> None:
    """In a forked child (a loader's worker): the folder is the parent's, and must be free when that is killed."""
    while _held:
        os.close(_held.pop())


if fcntl:
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def only_writer(folder: str | Path, wait: bool = False):
    """Make `folder` and hold it for this process, where the file system can: a process that ends, however, lets it go.

    UserError where another one holds it. wait: until that is done, instead.
    """
    make_folder(folder)
    if not fcntl:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(handle)
        who = ""
        with contextlib.suppress(OSError, ValueError, KeyError):
            newest = max(Path(folder).glob("config*.json"), key=os.path.getmtime)
            who = f" ({json.loads(newest.read_text())['process']})"
        way_out = "wait for it to end, or choose another folder"
        raise UserError(f"another process{who} is writing to {printable(folder)}: {way_out}") from None
    except OSError:  # a file system without locks
        pass
    _held.append(handle)
    try:
        yield
    finally:
        _held.remove(handle)
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


class Run:
    """A folder that holds one run: config.json, metrics.jsonl, TensorBoard events, checkpoints, result.json.

    folder: created with its parents. process: only rank 0 writes and prints; on other ranks every method is silent.
    suffix: of config<suffix>.json, metrics<suffix>.jsonl and result<suffix>.json, and the name of a folder for events, where
    a second kind of run shares the folder.
    tensorboard: False for none, True for events in the run folder, or the folder to write them to.
    keep: leave a config.json that is there as it is (of a run that has nothing left to do).
    """

    def __init__(
        self, folder: str | Path, args, process: Process, tensorboard: bool | str = True, suffix="", keep: bool = False
    ):
        self.folder, self.main = Path(folder), process.is_main
        self._config, self._result = self.folder / f"config{suffix}.json", self.folder / f"result{suffix}.json"
        self._metrics = self.folder / f"metrics{suffix}.jsonl"
        self._events = str(self.folder / suffix.lstrip("-")) if tensorboard is True else tensorboard
        self._tensorboard, self._jsonl = None, None
        self.command = shlex.join(["python", _from_root(sys.argv[0]), *sys.argv[1:]])
        if not self.main:
            return
        make_folder(self.folder)
        if isinstance(tensorboard, str):  # found to be read-only before the first step
            try:
                with tempfile.TemporaryFile(dir=make_folder(tensorboard)):
                    pass
            except (OSError, UserError) as error:
                raise UsageError(f"--tb_path: cannot write to {tensorboard}: {error}") from None
        self.config = {"command": self.command, **environment(), "world_size": process.world_size}
        self.config |= {"started": datetime.now().isoformat(timespec="seconds"), "options": cli.flags(args)}
        self.config["process"] = f"{os.getpid()} on {socket.gethostname()}"
        self.keep = keep and self._config.exists()
        try:
            if not self.keep:
                write_json(self._config, self.config)
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.folder}: {error.strerror}") from None
        config, kind = self.config, process.device.type
        threads = "" if kind == "cuda" else f" ({torch.get_num_threads()} threads)"
        versions = [f"{name} {config[name.lower()] or '-'}" for name in ("Python", "torch", "torchvision", "CUDA")]
        self.say(f"command  {self.command}\ncode     {', '.join([config['commit'], *versions])}")
        self.say(f"machine  {config['device']}; {kind} x {process.world_size}{threads}")
        options, typed = sorted(config["options"].items()), getattr(args, "typed", ())
        self.say(_wrap("options", [f"{'*' * (k in typed)}{k}={v}" for k, v in options]))
        self.say(f"         (* given on the command line)\nfolder   {self.folder}")

    def say(self, text: str) -> None:
        """Print a line, once per job."""
        if self.main:
            tqdm.write("\n".join(map(printable, text.split("\n"))), file=sys.stdout)
            sys.stdout.flush()

    def derived(self, **facts) -> None:
        """Echo and record facts that follow from the options and the data."""
        if self.main:
            if not self.keep:
                write_json(self._config, self.config | {"derived": facts})
            self.say(_wrap("derived", [f"{k}={v}" for k, v in facts.items()]))

    def rewind(self, step: int, again: bool = False) -> None:
        """Drop what was logged after global step `step` (after a resume), or all of it and an old result (step < 0).
        again: the evaluation at `step`, too."""
        if self.main and step < 0:
            self._result.unlink(missing_ok=True)
        if self.main and self._metrics.exists():
            try:
                lines = self._metrics.read_text(errors="replace").splitlines()
            except OSError as error:
                raise UserError(f"cannot read {self._metrics}: {error.strerror.lower()}") from None
            with checkpoint.replacing(self._metrics, "w") as file:
                for line in lines:
                    with contextlib.suppress(ValueError, AttributeError, TypeError):  # a half line, left by a crash
                        record = json.loads(line)
                        if record.get("step", 0) <= step - (again and "knn_acc1" in record):
                            file.write(line + "\n")

    def log(self, step: int, **values) -> None:
        """Append one JSON object to metrics.jsonl and one TensorBoard scalar per number. step counts from 0 over the run."""
        if not self.main:
            return
        record = {"step": step, **{k: _plain(v) for k, v in values.items()}}
        try:
            if self._jsonl is None:
                self._jsonl = open(self._metrics, "a", buffering=1)
            self._jsonl.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self._metrics}: {error.strerror}; checkpoints so far are whole") from None
        with self._or_without_events():
            if self._tensorboard is None and self._events:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    from torch.utils.tensorboard import SummaryWriter  # takes a second to import: not at start
                threading.excepthook = _without_events_thread
                self._tensorboard = SummaryWriter(self._events, purge_step=step)
            for key, value in record.items():
                if self._tensorboard is not None and key not in ("step", "epoch") and isinstance(value, (int, float)):
                    self._tensorboard.add_scalar(key, value, step)

    @contextlib.contextmanager
    def _or_without_events(self):
        """A folder of events that takes no more is said once, and the run goes on: metrics.jsonl has the same."""
        try:
            yield
        except (OSError, UnicodeError) as error:
            self.say(
                f"warning: no more TensorBoard events in {self._events}: {getattr(error, 'strerror', '') or error}"
            )
            self._events, self._tensorboard = False, None

    def result(self, **values) -> None:
        """Write result.json (what was evaluated, on what, the numbers, the command) and the final `result:` line."""
        if self.main:
            values = {k: _plain(v) for k, v in values.items()}
            write_json(self._result, {"command": self.command, **environment(), **values})
            numbers = [f"{k} {v:.2f}" for k, v in values.items() if isinstance(v, float)]
            self.say(f"result: {', '.join(numbers)} ({self._result})")

    def say_replaced(self, *loaders) -> None:
        """With --skip-bad-images: how many pictures were replaced, on all ranks together. To be called on all of them."""
        mine = {path for loader in loaders for path in loader.bad_images}
        paths = sorted(set().union(*processes.gather_objects(mine)))
        if paths:
            self.say(f"replaced {len(paths)} unreadable pictures, the first {printable(paths[0])}")

    def close(self) -> None:
        if self._jsonl is not None:
            self._jsonl.close()
        if self._tensorboard is not None:
            with self._or_without_events():
                self._tensorboard.close()


def _without_events_thread(args, otherwise=threading.excepthook) -> None:
    """The thread that writes events prints no traceback of its own: `Run` says what became of it."""
    if not (issubclass(args.exc_type, OSError) and type(args.thread).__module__.startswith("tensorboard.")):
        otherwise(args)


def _from_root(script: str) -> str:
    """A script of this project as it is called from the project's root."""
    path = Path(script).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else script


def write_json(path: Path, value: dict) -> None:
    """Replace a small file in one step: a reader sees the old one or the new one, never half of it."""
    with checkpoint.replacing(path, "w") as file:
        file.write(json.dumps(value, indent=2, default=str) + "\n")


def _plain(value):
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    return round(value, 6) if isinstance(value, float) and math.isfinite(value) else value


def _wrap(label: str, words: list[str], width: int = 110) -> str:
    lines, line = [], ""
    for word in words:
        if line and len(line) + len(word) > width:
            lines, line = lines + [line], ""
        line += ("  " if line else "") + word
    return f"{label:<9}" + "\n         ".join(lines + [line])


class Progress:
    """Progress of one epoch: a live bar on a terminal, one line every `every` steps in a pipe; rank 0 only.

    `update(n, loss=..., lr=...)` takes 0-dim tensors, means over n rows, and only adds them up on their device; plain
    numbers are shown as they are. At the first step, every `every` steps and at the last one the sums are read back:
    `update` then returns the means since the last time (else None), over the rows of all ranks, which must make the same
    steps, and after the last step `epoch_...`, those over the epoch. That is also where a non-finite value is found:
    UserError, on every rank and before anything of it could be saved.
    """

    def __init__(self, label: str, total: int, every: int = 10, start: int = 0, enabled: bool = True):
        self.label, self.total, self.every, self.enabled = label, total, max(1, every), enabled
        self.done = self.first = self.last_done = start
        self.sums: Tensor | None = None
        self.names, self.numbers, self.count = [], {}, 0  # count: rows since the last print
        self.epoch_sums, self.epoch_count = torch.zeros(0).double(), 0
        self.began = self.last = time.perf_counter()
        shown = dict(total=total, initial=start, desc=label, dynamic_ncols=True, leave=False, file=sys.stdout)
        self.bar = tqdm(**shown, disable=not (enabled and sys.stdout.isatty()))

    def update(self, n: int, **values: Tensor | float) -> dict | None:
        self.done, self.count = self.done + 1, self.count + n
        means = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        self.names, self.numbers = list(means), {k: v for k, v in values.items() if k not in means}
        if means:
            now = torch.stack([v.detach().float() for v in means.values()]) * n
            self.sums = now if self.sums is None else self.sums + now
        self.bar.update(1)
        if (self.done - self.first) % self.every and self.done not in (self.total, self.first + 1):
            return None
        return self._show()

    def _show(self) -> dict:
        sums, rows = torch.zeros(len(self.names)).double(), self.count
        if self.sums is not None:  # the only wait for the device
            *sums, rows = processes.sum_ranks(torch.cat([self.sums, self.sums.new_tensor([rows])])).tolist()
            sums = torch.tensor(sums, dtype=torch.float64)
        if not torch.isfinite(sums).all():
            raise UserError(
                f"{self.label}: the loss is not finite at step {self.done}; the last checkpoint is from before it. "
                "Lower the learning rate, raise the temperature, or try without --amp"
            )
        self.epoch_sums = self.epoch_sums + sums if len(self.epoch_sums) else sums
        self.epoch_count += rows
        now = time.perf_counter()
        since, means = (sums / rows).tolist(), self.means
        seconds = (now - self.last) / (self.done - self.last_done)
        mean_seconds = (now - self.began) / (self.done - self.first)
        if self.enabled:
            parts = [f"Time {seconds:.3f} ({mean_seconds:.3f})"]
            parts += [f"{k} {a:.4g} ({b:.4g})" for (k, b), a in zip(means.items(), since)]
            parts += [f"{k} {v:.3g}" for k, v in self.numbers.items()]
            self.bar.set_postfix_str("  ".join(parts[1:]))
            if self.bar.disable:
                left = f"eta {clock((self.total - self.done) * mean_seconds)}"
                print(f"{self.label}[{self.done}/{self.total}]  " + "  ".join([*parts, left]), flush=True)
        self.sums, self.count, self.last, self.last_done = None, 0, now, self.done
        whole = {f"epoch_{k}": v for k, v in means.items()} if self.done == self.total else {}
        return dict(zip(self.names, since)) | self.numbers | {"seconds_per_step": seconds} | whole

    @property
    def means(self) -> dict[str, float]:
        """Over what was shown of the epoch, all ranks together."""
        return dict(zip(self.names, (self.epoch_sums / max(self.epoch_count, 1)).tolist()))

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def close(self) -> dict[str, float]:
        """End of the epoch, or of its part that was run: the means over it."""
        if self.count:
            self._show()
        self.bar.close()
        return self.means


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class StopSignal:
    """SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 (Slurm's --signal) ask for a checkpoint and an end at the next step.

    `stop.asked()` is the same on every rank. A further signal more than REPEAT seconds later acts as if this were not
    here; a sooner one is the same request again (a scheduler signals the whole process group, its leader passes it on).
    """

    def __init__(self):
        self.received, self.when = 0, 0.0  # the signal's number; 0: none yet

    def __enter__(self):
        self.previous = {s: signal.getsignal(s) for s in processes.STOP_SIGNALS}
        for s, handler in self.previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(s, self._receive)
        return self

    def __exit__(self, *exc):
        for s, handler in self.previous.items():
            signal.signal(s, handler)

    def _receive(self, signum, frame):
        now = time.monotonic()
        if not self.received:
            self.received, self.when = signum, now
        elif now - self.when > processes.REPEAT:
            self.__exit__()
            os.kill(os.getpid(), signum)

    def asked(self) -> bool:
        return processes.any_rank(bool(self.received))
