"""What surrounds a training loop: the command line, the run folder, progress, seeds and signals."""

from __future__ import annotations

import argparse
import contextlib
import difflib
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

from common import UsageError, UserError, launch, printable

ROOT = Path(__file__).resolve().parent.parent
tqdm.set_lock(threading.RLock())  # one process of a job prints; the lock that tqdm makes is one between processes

# --------------------------------------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse with what every script here promises.

    - each long flag is taken with dashes and with underscores;
    - a wrong flag or value is one line on stderr and exit code 2;
    - `presets` ({name: {flag: value}}) are defaults only: whatever is typed on the command line wins. The flag `--demo`
      selects the preset "demo", `--preset NAME` another one; the demo wins over that where both set a flag.
    """

    def __init__(self, *args, presets: dict[str, dict] | None = None, **kwargs):
        super().__init__(*args, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)
        self.presets = presets or {}
        self._refused: dict[str, str] = {}
        named = [name for name in self.presets if name != "demo"]
        if named:
            self.add_argument(
                "--preset", choices=named, default=None, help="set the flags of a recipe; what is typed wins"
            )
        if "demo" in self.presets:
            self.add_argument("--demo", action="store_true", help="built-in data and a small setting; minutes on a CPU")

    def refuse(self, flag: str, reason: str) -> None:
        """A published flag that does nothing there and is not taken here: typing it is an error that says why."""
        self.add_argument(f"--{flag}", nargs="?", const=True, default=None, dest=f"_{flag}", help=argparse.SUPPRESS)
        self._refused[f"_{flag}"] = reason

    def parse_args(self, args=None, namespace=None):
        argv = [self._spelling(a) for a in (sys.argv[1:] if args is None else list(args))]
        published = {a.dest: a.default for a in self._actions}
        for name in _wanted_presets(self, argv):
            self.set_defaults(**self.presets[name])
        try:
            parsed = super().parse_args(argv, namespace)
        finally:
            self.set_defaults(**published)
        typed = super().parse_args(argv, argparse.Namespace(**{a.dest: _UNSET for a in self._actions}))
        for dest, reason in self._refused.items():
            if getattr(parsed, dest) is not None:
                self.error(f"--{dest[1:]} {reason}; leave it away")
        parsed._published = published
        parsed._typed = sorted(k for k, v in vars(typed).items() if v is not _UNSET)
        return parsed

    def _spelling(self, token: str) -> str:
        if not token.startswith("--") or token == "--":
            return token
        flag, equals, value = token.partition("=")
        if flag not in self._option_string_actions:
            for other in (flag[2:].replace("_", "-"), flag[2:].replace("-", "_")):
                if f"--{other}" in self._option_string_actions:
                    return f"--{other}{equals}{value}"
        return token

    def error(self, message: str):
        if message.startswith("unrecognized arguments"):
            flag = message.split()[2].partition("=")[0]
            close = difflib.get_close_matches(flag, [o for o in self._option_string_actions if o.startswith("--")], 1)
            message += f"; did you mean {close[0]}?" if close else ""
        self.exit(2, f"error: {message} (--help lists every flag)\n")


class _Unset:
    def __repr__(self):
        return "unset"


_UNSET = _Unset()


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action):
        if any(action.default is plain for plain in (None, False, True)) or not str(action.default):
            return action.help
        if "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _wanted_presets(parser: Parser, argv: list[str]) -> list[str]:
    if not parser.presets:
        return []
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first_look.add_argument("--preset")
    first_look.add_argument("--demo", action="store_true")
    try:
        found, _ = first_look.parse_known_args(argv)
    except SystemExit:  # `--preset` without a value: the real parser says so
        return []
    wanted = [found.preset] if found.preset in parser.presets else []
    return wanted + (["demo"] if found.demo and "demo" in parser.presets else [])


OnOff = argparse.BooleanOptionalAction


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^63 - 1")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def cli(main) -> None:
    """Run `main()` as a program: an error that the user can put right becomes one line on stderr and its exit code."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; a checkpoint that was written before is whole", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `script | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        told = launch.in_one_line(error)
        if told is None:
            raise
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))):  # let rank 0 say what all ranks have to say
            time.sleep(2)
        print(f"error: {told[0]}", file=sys.stderr, flush=True)
        sys.exit(told[1])


# ------------------------------------------------------------------------------------------------------------ precision


def add_precision_arguments(group) -> None:
    """--amp and, where published commands carry them, the flags of NVIDIA apex."""
    group.add_argument("--amp", action="store_true", help="autocast of the encoder: bfloat16, or float16 on old GPUs")
    group.add_argument("--opt-level", choices=["O1", "O2"], default="O2",
                       help="apex's level; with torch's own --amp both mean autocast with float32 weights")  # fmt: skip
    group.add_argument("--amp-backend", choices=["torch", "apex"], default="torch", help="who does --amp")


def check_precision_arguments(args) -> None:
    """UsageError for --amp-backend without --amp. (A lone --opt-level is passed over, as the published scripts do.)"""
    if "amp_backend" in args._typed and not args.amp:
        raise UsageError(f"--amp-backend {args.amp_backend} belongs to --amp; add that, or leave it away")


class Precision:
    """Mixed precision by torch.autocast: bfloat16 where the hardware has it, else (on CUDA) float16 with a scaler.

    Only encoders belong inside `autocast()`; logits, losses and memories are float32. `scaler` does nothing unless float16.
    Off by default: that is what was published, and on the CPU measured here (AVX-512 with bfloat16 instructions, ResNet-18
    at 32 pixels, channels last) float32 was 9 to 12 % faster than bfloat16 autocast (RESULTS.md).

    backend "apex": NVIDIA apex does it at `opt_level`, where an apex is installed that still has `amp` (upstream removed it
    in 2025; the `apex` on PyPI is another project). Raises UserError where it is not.
    """

    def __init__(self, amp: bool, device: torch.device, backend: str = "torch", opt_level: str = "O2"):
        half = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
        self.device_type, self.enabled = device.type, amp and backend == "torch"
        self.dtype = torch.float16 if half else torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.enabled and half)
        self.apex, self.opt_level = _import_apex() if amp and backend == "apex" else None, opt_level

    def prepare(self, model, optimizer):
        """(model, optimizer) as the backend wants them: unchanged, or wrapped by apex. Before any parallel wrapper."""
        if self.apex is None:
            return model, optimizer
        return self.apex.initialize(model, optimizer, opt_level=self.opt_level)

    def autocast(self):
        return torch.autocast(self.device_type, self.dtype, enabled=self.enabled)

    def step(self, loss: Tensor, optimizer) -> None:
        """Fresh gradients of `loss`, and one step of the optimizer."""
        optimizer.zero_grad(set_to_none=True)
        if self.apex is not None:
            with self.apex.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
            optimizer.step()
            return
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    def __str__(self):
        if self.apex is not None:
            return f"apex {self.opt_level}"
        return str(self.dtype).removeprefix("torch.") + " autocast" if self.enabled else "float32"


def _import_apex():
    try:
        from apex import amp
    except ImportError:
        raise UserError(
            "--amp-backend apex: no NVIDIA apex with `amp` is installed (upstream removed amp in 2025, and the apex of the "
            "package index is another project); leave the flag away to use torch's own autocast"
        ) from None
    if not hasattr(amp, "scale_loss"):
        raise UserError("--amp-backend apex: the installed `apex` is not NVIDIA's; leave the flag away")
    return amp


# ---------------------------------------------------------------------------------------------------------------- seeds


def settle_seed(seed: int | None) -> int:
    """The seed to use: the given one, else one drawn here, the same on every rank. It is printed and recorded."""
    return launch.agree(random.SystemRandom().randrange(2**31) if seed is None else seed)


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


def options(args) -> dict:
    """The flags as a plain dict (no private entries), for config.json and checkpoints."""
    return {k: v for k, v in vars(args).items() if not k.startswith("_")}


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
        self, folder: str | Path, args, process: launch.Process, tensorboard: bool | str = True, suffix: str = ""
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
                      "started": datetime.now().isoformat(timespec="seconds"), "options": options(args)}  # fmt: skip
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
        shown = [f"{'*' if v != default.get(k, v) else ''}{k}={v}" for k, v in sorted(options(args).items())]
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
        paths = sorted({path for part in launch.gather_objects(loader.bad_images) for path in part})
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
            *sums, rows = launch.sum_ranks(torch.cat([self.sums, self.sums.new_tensor([rows])])).tolist()
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
        return {**means, "images_per_second": self.seen * launch.world_size() / elapsed, "elapsed": elapsed}


def clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


# -------------------------------------------------------------------------------------------------------------- signals


REPEAT = launch.REPEAT


class StopSignal:
    """SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's --signal) ask for a checkpoint and a clean end at the next step.

    `stop.asked()` is the same on every rank. A further signal more than REPEAT seconds later acts as if this were not
    here; a sooner one is the same request again (a scheduler signals the whole process group, its leader passes it on).
    """

    def __init__(self):
        self.received, self.when = False, 0.0
        self.signals = launch.STOP_SIGNALS

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
        return launch.any_rank(self.received)


def refuse_to_overwrite(folder: str | Path, pattern: str, resume: str, overwrite: bool) -> None:
    """UsageError where a new run would write over the checkpoints of an earlier one."""
    found = sorted(Path(folder).glob(pattern))
    if found and not resume and not overwrite:
        raise UsageError(
            f"{folder} already holds {found[-1].name}: continue it with --resume auto, choose another folder, "
            "or pass --overwrite"
        )
