#!/usr/bin/env python
"""Tell how long a pre-training takes and how much memory it needs, from a few measured steps.

Put this before the flags of any train script. No data set is needed:

    python tools/cost.py moco_insdis/train_moco_ins.py --moco --softmax --pictures 126689
    python tools/cost.py cmc/train_CMC.py --preset compare --pictures 50000 --device cpu

The script's own loader and method take the steps, on generated pictures, on the device at hand.
They make their views, but decode no files; evaluations and checkpoints are not included either.
Peak memory is measured: on a GPU what torch allocated, on a CPU the resident set of the process
with Python and torch. The sizes of tensors are listed besides; they are the same on any device. The
hours and the size of a checkpoint are computed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from common import UsageError, cli, inputs, launch, printable
from runner import papers, resume
from runner.folder import environment
from tools.trial import Trial, generated, timed

IMAGENET100 = 126_689  # training pictures
BUSY = 0.8  # share of a processor below which other programs seem to run
LONGEST = 48  # hours, above which days are given as well
NO_GPU = "no GPU was measured: it needs these tensors, and room for its kernels to work in"


def parse_args(argv=None):
    """Return the flags of this tool, and in `flags` those of the script."""
    parser = cli.Parser(
        prog="cost.py",
        description=__doc__.splitlines()[0],
        usage="%(prog)s SCRIPT [flags of the script] [--pictures N] [--steps N]",
    )
    about = "a train script as FOLDER/SCRIPT.py; its flags may follow"
    parser.add_argument("script", metavar="SCRIPT", help=about)
    about = "training pictures; default: those of ImageNet-100"
    parser.add_argument("--pictures", type=cli.positive_int, default=IMAGENET100, help=about)
    about = "measured steps, after a warm-up"
    parser.add_argument("--steps", type=cli.positive_int, default=10, help=about)
    args, flags = parser.parse_known_args(argv)
    args.script = "/".join(Path(args.script).resolve().parts[-2:])
    scripts = [paper.pretraining for paper in papers.find().values()]
    if args.script not in scripts:
        raise UsageError(f"{printable(args.script)} is no train script: {', '.join(scripts)}")
    args.flags = flags
    return cli.freeze(args)


def module_of(script: str) -> ModuleType:
    """Import FOLDER/SCRIPT.py."""
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


# ------------------------------------------------------------------------------------------ memory


def size(tensors: Iterable) -> int:
    """Return the bytes of the memory behind these tensors, shared memory once."""
    storages = [x.untyped_storage() for x in tensors if isinstance(x, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def tensors_of(method) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights of a method, and its other tensors: queues, banks, running statistics."""
    own = vars(method).values()
    modules = [value for value in own if isinstance(value, nn.Module)]
    weights = [x for module in modules for x in module.parameters()]
    others = [x for module in modules for x in module.buffers()]
    return weights, others + [value for value in own if isinstance(value, Tensor)]


def parts_of(trial: Trial) -> dict[str, int]:
    """Take a step and return the bytes of a method's tensors by what they are for."""
    weights, others = tensors_of(trial.method)
    kept = Kept([*weights, *others])
    precision = trial.method.precision
    with mock.patch.object(precision, "autocast", kept.inside(precision.autocast)):
        trial.step()
    return {
        "weights": size(weights),
        "gradients": size(x for x in weights if x.requires_grad),
        "optimizer": size(tree_leaves(trial.method.optimizer.state_dict()["state"])),
        "buffers (queue or bank)": size(others),
        "activations of the encoder": kept.bytes,
    }


class Kept:
    """Add up the bytes that autograd keeps of an encoder for its backward pass.

    known: tensors that are counted elsewhere, such as weights.
    """

    def __init__(self, known: Iterable[Tensor]):
        self.seen = {x.untyped_storage().data_ptr() for x in known}
        self.bytes = 0

    def keep(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return x.detach()  # x itself would hold the graph that holds it

    def inside(self, context: Callable) -> Callable:
        """Return `context` with the count; scripts open it around their encoders alone."""

        @contextlib.contextmanager
        def counted():
            with context(), saved_tensors_hooks(self.keep, lambda x: x):
                yield

        return counted


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that torch allocated on a GPU, or that this process held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def checkpoint_size(script: str, trial: Trial) -> int:
    """Return the bytes of the tensors in a checkpoint of the run."""
    files = resume.Files(script)
    state = resume.state_of(trial.method, files, trial.args, resume.Position(), [])
    return size(tree_leaves(state))


def in_words(count: int) -> str:
    """Describe a number of bytes: 1.50 GiB, 12.0 MiB."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB"


# ------------------------------------------------------------------------------------------ report


def duration(seconds: float) -> str:
    """Describe the length of a run in hours, and in days where it is long."""
    hours = seconds / 3600
    if hours > LONGEST:
        return f"{hours:,.0f} h ({hours / 24:,.0f} days)"
    return f"{hours:.1f} h" if hours >= 1 else f"{seconds / 60:.1f} min"


def time_lines(own, args, seconds: float, share: float) -> list[str]:
    """Return what the step and the whole run take.

    seconds: of one step. share: of the time of its threads that this process had, at most 1.
    """
    whole = args.epochs * (own.pictures // args.batch_size) * seconds
    lines = [
        f"step     {seconds:.3g} s, {args.batch_size / seconds:.4g} images/s",
        f"run      {own.pictures:,} pictures, {args.epochs} epochs: {duration(whole)}, computed "
        f"from {own.steps} steps of {seconds:.3g} s; decoding not included: see docs/data.md",
    ]
    if share < BUSY:
        lines.append(
            f"         its threads had {share:.0%} of their time: where other programs took the "
            f"rest, {duration(whole * share)} on a quiet machine"
        )
    return lines


def memory_lines(device: torch.device, parts: dict[str, int]) -> list[str]:
    """Return the peak and its parts."""
    peak = in_words(peak_memory(device))
    is_gpu = device.type == "cuda"
    measured = "allocated by torch" if is_gpu else "resident set of this process"
    listed = ", ".join(f"{name} {in_words(count)}" for name, count in parts.items())
    lines = [
        f"memory   {peak} at most, measured: {measured}",
        f"tensors  {in_words(sum(parts.values()))}: {listed}",
    ]
    if not is_gpu:
        lines.append(f"         {NO_GPU}")
    return lines


def measure(own, args, process: launch.Process) -> None:
    """Take the steps and print what they tell. own: flags of this tool; args: of the script."""
    if process.world_size > 1:
        raise UsageError(
            "this measures one process: omit --multiprocessing-distributed and --nproc"
        )
    if own.pictures < args.batch_size:
        raise UsageError(f"--pictures {own.pictures} are fewer than a batch, {args.batch_size}")
    device = process.device
    torch.manual_seed(args.seed)
    torch.backends.cudnn.benchmark = True  # as in a run
    side = inputs.eval_resize(args.input_res)
    pictures = generated(args.batch_size, side, device)
    trial = Trial(module_of(own.script), args, process, pictures, own.pictures)
    print(
        f"{own.script}: {type(trial.method).__name__}, {args.input_res} pixels, batch "
        f"{args.batch_size}, {trial.method.precision}\n"
        f"device   {device}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"this machine has {environment()['device']}",
        flush=True,
    )
    trial.step()  # so that the optimizer has its state
    parts = parts_of(trial)
    began = time.process_time()
    seconds = timed(trial.step, own.steps, device) / own.steps
    share = 1.0  # a GPU computes while the process waits
    if device.type == "cpu":
        worked = time.process_time() - began
        share = worked / (own.steps * seconds * torch.get_num_threads())
    saved = in_words(checkpoint_size(own.script, trial))
    held = in_words(own.pictures * 3 * side**2)
    print(
        *time_lines(own, args, seconds, share),
        *memory_lines(device, parts),
        f"pictures {held} more where --data-device keeps them on the device (computed)",
        f"disk     {saved} for a checkpoint (computed)",
        sep="\n",
    )


def main(argv=None) -> None:
    own = parse_args(argv)
    flags = ["--data", "generated", *own.flags, "--data-device", "device"]
    args = module_of(own.script).parse_args(flags)
    args = cli.replace(args, seed=args.seed or 0)
    launch.start(functools.partial(measure, own), args)


if __name__ == "__main__":
    cli.run(main)
