"""Write the records of a run: config.json, metrics.jsonl, TensorBoard events, result.json."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import torch
import torchvision
from torch import Tensor
from tqdm import tqdm

from common import UsageError, cli, collectives, files, launch, printable
from runner import events


def environment() -> dict:
    """Return the versions, commit and hardware to record with a run.

    commit ends in `-dirty` if tracked files have changed, and is `unknown` without git.
    """
    has_cuda = torch.cuda.is_available()
    return {
        "commit": _commit() or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda if has_cuda else None,
        "device": torch.cuda.get_device_name() if has_cuda else _processor(),
    }


def _commit() -> str:
    command = ["git", "-C", str(files.ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def _processor() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    return f"{name}, {os.cpu_count()} cores"


def refuse_to_overwrite(
    folder: str | Path, pattern: str, resume: str = "", overwrite: bool = False
) -> None:
    """Raise UsageError if a new run would overwrite the checkpoints of an earlier one."""
    earlier = sorted(Path(folder).glob(pattern))
    if earlier and not resume and not overwrite:
        raise UsageError(
            f"{folder} already holds {earlier[-1].name}: continue it with --resume auto, "
            "choose another folder, or pass --overwrite"
        )


class RunFolder:
    """The records of one run. Only rank 0 writes and prints; other ranks may make the same calls.

    folder: created with its parents. args: the flags to record.
    tensorboard: False for no events, True for events in the folder, or the folder to write them to;
    if another run writes its events there, see `events.own_events`.
    suffix: added to the names config.json, metrics.jsonl and result.json if a second kind of run
    shares the folder; its events go into a folder of that name.
    keep: leave an existing config.json unchanged, for a run that has nothing left to do.
    """

    def __init__(
        self,
        folder: str | Path,
        args,
        process: launch.Process,
        tensorboard: bool | str = True,
        suffix: str = "",
        keep: bool = False,
    ):
        self.folder = Path(folder)
        self.main = process.is_main
        self.command = shlex.join(["python", _from_root(sys.argv[0]), *sys.argv[1:]])
        self._config_path = self.folder / f"config{suffix}.json"
        self._metrics_path = self.folder / f"metrics{suffix}.jsonl"
        self._result_path = self.folder / f"result{suffix}.json"
        self._events = None
        self._metrics = None
        if not self.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            place = self.folder / suffix.lstrip("-")
            if isinstance(tensorboard, str):
                place = events.own_events(tensorboard, f"{self.folder}{suffix}")
            self._events = events.Events(place, self.say)
        self._keep = keep and self._config_path.exists()
        self.config = {
            "command": self.command,
            **environment(),
            "world_size": process.world_size,
            "started": datetime.now().isoformat(timespec="seconds"),
            "options": cli.flags(args),
            "process": f"{os.getpid()} on {socket.gethostname()}",
        }
        self._write_config(self.config)
        self._echo(process, getattr(args, "typed", ()))

    def _write_config(self, config: dict) -> None:
        if not self._keep:
            files.write_json(self._config_path, config)

    def _echo(self, process: launch.Process, typed) -> None:
        """Print the command, code version, machine, options and folder of this run."""
        config = self.config
        names = ("Python", "torch", "torchvision", "CUDA")
        versions = [f"{name} {config[name.lower()] or '-'}" for name in names]
        kind = process.device.type
        threads = "" if kind == "cuda" else f" ({torch.get_num_threads()} threads)"
        self.say(f"command  {self.command}")
        self.say(f"code     {', '.join([config['commit'], *versions])}")
        self.say(f"machine  {config['device']}; {kind} x {process.world_size}{threads}")
        options = sorted(config["options"].items())
        words = [f"*{key}={value}" if key in typed else f"{key}={value}" for key, value in options]
        self.say(_wrap("options", words))
        self.say("         (* given on the command line)")
        self.say(f"folder   {self.folder}")

    def say(self, text: str) -> None:
        """Print text once per job."""
        if self.main:
            lines = [printable(line) for line in text.split("\n")]
            tqdm.write("\n".join(lines), file=sys.stdout)
            sys.stdout.flush()

    def derived(self, **values) -> None:
        """Print and record values that follow from the options and the data."""
        if self.main:
            self._write_config(self.config | {"derived": values})
            self.say(_wrap("derived", [f"{key}={value}" for key, value in values.items()]))

    def rewind(self, step: int, drop_evaluation: bool = False) -> None:
        """Remove records after global step `step`, because a resumed run logs them again.

        A negative step removes everything, including an old result.json. drop_evaluation: also
        remove the evaluations that were logged at `step` itself.
        """
        if not self.main:
            return
        if step < 0:
            self._result_path.unlink(missing_ok=True)
        if not self._metrics_path.exists():
            return
        lines = self._metrics_path.read_text(errors="replace").splitlines()
        with files.replacing(self._metrics_path, "w") as file:
            for line in lines:
                with contextlib.suppress(Exception):  # an incomplete line
                    record = json.loads(line)
                    is_evaluation = "seconds_per_step" not in record
                    last = step - 1 if drop_evaluation and is_evaluation else step
                    if record.get("step", 0) <= last:
                        file.write(line + "\n")

    def log(self, step: int, group: str = "train", **values) -> None:
        """Append a JSON object to metrics.jsonl, and each number to the TensorBoard events.

        step: optimizer steps of the run that are done, or complete epochs. group: of values whose
        name does not tell their group in TensorBoard, see `events.tag`.
        """
        if not self.main:
            return
        record = {"step": step, **{key: _plain(value) for key, value in values.items()}}
        if self._metrics is None:
            self._metrics = open(self._metrics_path, "a", buffering=1)
        self._metrics.write(json.dumps(record) + "\n")
        if self._events:
            self._events.add(step, record, group)

    def result(self, **values) -> None:
        """Write result.json, and print its path and its numbers as the final line."""
        if not self.main:
            return
        values = {key: _plain(value) for key, value in values.items()}
        content = {"command": self.command, **environment(), **values}
        files.write_json(self._result_path, content)
        numbers = [f"{k} {v:.2f}" for k, v in values.items() if isinstance(v, float)]
        self.say(f"result: {', '.join(numbers)} ({self._result_path})")

    def say_replaced(self, *loaders) -> None:
        """Print how many pictures --skip-bad-images has replaced. Every rank must call this."""
        mine = {path for loader in loaders for path in loader.bad_images}
        paths = sorted(set().union(*collectives.gather_objects(mine)))
        if paths:
            first = printable(paths[0])
            self.say(f"replaced {len(paths)} unreadable pictures, the first of them {first}")

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        if self._events:
            self._events.close()


def _from_root(script: str) -> str:
    """Return the path of a script relative to the project's root, if it lies there."""
    path = Path(script).resolve()
    if path.is_relative_to(files.ROOT):
        return str(path.relative_to(files.ROOT))
    return script


def _plain(value):
    """Convert a tensor to a number or a list, and round a float to six digits."""
    if isinstance(value, Tensor):
        value = value.item() if value.numel() == 1 else value.tolist()
    if isinstance(value, float) and math.isfinite(value):
        return round(value, 6)
    return value


def _wrap(label: str, words: list[str], width: int = 110) -> str:
    """Return `label` followed by the words, wrapped at `width` columns and indented."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f"  {word}" if lines[-1] else word
    return f"{label:<9}" + "\n         ".join(lines)
