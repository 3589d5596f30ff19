"""Count what a step gives a device to do, and look where the time of a GPU goes.

    python benchmarks/operations.py                        # all train scripts, eager, on the CPU
    python benchmarks/operations.py --device cuda --tables tables.txt [--compile]

Counted are the operations of one step, and of making its views, that are no views of memory and no
empty tensors: in eager mode a GPU has about one launch for each, less what the host computes (the
draws of all views). On a CPU, too, batch-norm groups are normalised as on a GPU, and python -O
leaves out the checks that are made on a CPU alone. What torch.compile has fused is not seen:
compiled encoders count as nothing.

On a GPU a step that waits for it is an error (torch.cuda.set_sync_debug_mode), and --tables writes
the profiler's table of ten steps of every script. The exit code is 1 where a step waits.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import network_alone, side_by_side
from benchmarks.side_by_side import WARM
from common import batchnorm, convolution, launch
from runner.loop import At, Batch

SCRIPTS = network_alone.SCRIPTS | {
    "moco-cifar": ("nonsem_neg.moco_non_sem_neg", "--preset moco-cifar --dataset folder --seed 0")
}
PICTURES = 1024  # at least those of two steps
PROFILED = 10  # steps
ROWS = 20  # of a profiler's table
NOTHING = ("empty", "_unsafe_view", "as_strided", "profiler::")  # parts of names: no launch


class Counter(TorchDispatchMode):
    """Count the operations in a block that are no views of memory and no empty tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.name()
        is_nothing = operation.is_view or any(word in name for word in NOTHING)
        self.count += not is_nothing
        return operation(*args, **(kwargs or {}))


class Steps:
    """The steps of a train script without its run folder; `fetch` makes the views of the next."""

    def __init__(self, name: str, tree: str, args, device: torch.device):
        module, flags = SCRIPTS[name]
        script = importlib.import_module(module)
        more = ["--data", tree, *(["--compile"] if args.compile else [])]
        if args.batch:
            more += ["-b", str(args.batch)]
        own = script.parse_args([*flags.split(), *more])
        process = launch.Process(device=device)
        self.loader = script.build_loader(own, process)
        pictures = self.loader.dataset
        self.method = script.build_method(own, pictures, len(self.loader), process)
        self.batches = itertools.chain.from_iterable(self.loader for _ in itertools.count())
        for _ in range(WARM):
            self.step(self.fetch())

    def fetch(self) -> Batch:
        return Batch(*next(self.batches), At(0, 0.0, 0))

    def step(self, batch: Batch) -> None:
        self.method.step(batch)


@contextlib.contextmanager
def waiting_is_an_error(device: torch.device):
    """Raise RuntimeError where the block waits for a GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def table(steps: Steps, device: torch.device) -> str:
    """Return the profiler's table of some steps, the most expensive operations first."""
    activities = [ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
        order = "self_device_time_total"
    with profile(activities=activities) as seen:
        for _ in range(PROFILED):
            steps.step(steps.fetch())
        side_by_side.synchronize(device)
    return seen.key_averages().table(sort_by=order, row_limit=ROWS)


def measure(name: str, tree: str, args, device: torch.device) -> tuple[dict[str, int], str, str]:
    """Return the counts of a script, where it waits for a GPU (or ""), and its profiler's table."""
    steps = Steps(name, tree, args, device)
    with Counter() as views:
        batch = steps.fetch()
    with Counter() as operations:
        steps.step(batch)
    counts = {f"views, {name}": views.count, f"operations, {name}": operations.count}
    waits = ""
    try:
        with waiting_is_an_error(device):
            steps.step(steps.fetch())
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        waits = str(error).splitlines()[0]
    return counts, waits, table(steps, device) if args.tables else ""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--batch", type=int, help="pictures of a step; default: the script's own")
    parser.add_argument("--compile", action="store_true", help="torch.compile the encoders")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to compute")
    parser.add_argument("--tables", metavar="FILE", help="write the profiler's tables there")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    numbers, tables = {}, []
    waiting = 0
    wide = mock.patch.object(batchnorm, "is_wide", lambda x: not torch.compiler.is_compiling())
    plain = mock.patch.object(convolution, "FEW", 0)
    with tempfile.TemporaryDirectory() as folder, wide, plain:  # on a CPU as on a GPU
        tree = str(side_by_side.generate(Path(folder), PICTURES))
        for name in args.scripts:
            counts, waits, own_table = measure(name, tree, args, device)
            numbers |= counts
            waiting += bool(waits)
            tables.append(f"{name}\n{own_table}")
            said = ", ".join(f"{count} {key.partition(',')[0]}" for key, count in counts.items())
            print(f"{name:13} {said}{f'; WAITS: {waits}' if waits else ''}", flush=True)
    numbers["steps that wait"] = waiting
    if args.tables:
        Path(args.tables).write_text("\n".join(tables))
    if args.json:
        Path(args.json).write_text(json.dumps(numbers, indent=1) + "\n")
    return int(waiting > 0)


if __name__ == "__main__":
    sys.exit(main())
