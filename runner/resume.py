"""Which checkpoint a run goes on from, whether it is one of this run, and putting it back."""

from __future__ import annotations

import operator
import os
import random
import re
from dataclasses import dataclass

import torch

from common import UserError, cli, launch, printable
from runner import checkpoint, layouts

PICTURES = ("dataset", "class_list")  # flags that say which pictures a run is trained on


@dataclass(frozen=True)
class Files:
    """What a script writes into its run folder, and what makes another run of it.

    script: `__file__` of the script, whose name goes into every checkpoint.
    last: file name of the newest state, saved after every epoch and where a signal stops the run.
    numbered: file name of the states that are kept every --save-freq epochs, {} for the epoch.
    patterns: what --resume auto looks for and a new run must not write over; default: those two.
    flags: key under which the authors' files keep the flags.
    first: number of the first epoch in names, lines and records, as the published script counts.
    same: flags that make another run where they differ.
    by_epoch: log one record per epoch instead of one per progress line.
    events: TensorBoard events: True (in the folder), False, or the folder to write them to.
    suffix: added to config.json and so on where another kind of run has the same folder.
    """

    script: str
    last: str = ""
    numbered: str = ""
    patterns: tuple[str, ...] = ()
    flags: str = "opt"
    first: int = 1
    same: tuple[str, ...] = PICTURES
    by_epoch: bool = False
    events: bool | str = True
    suffix: str = ""

    def __post_init__(self):
        if not self.patterns:
            both = (self.last, re.sub(r"{.*}", "[0-9]*", self.numbered))
            object.__setattr__(self, "patterns", tuple(name for name in both if name))
        name = "/".join(os.path.abspath(self.script).split(os.sep)[-2:])
        object.__setattr__(self, "script", name)


@dataclass
class Position:
    """Where a run is: complete epochs, steps of the next one, steps in all."""

    done: int = 0
    step: int = 0
    global_step: int = 0


def state_of(method, files: Files, args, position: Position, draws: list[dict]) -> dict:
    """Return what a checkpoint holds: the authors' keys, and what an exact resume needs besides.

    draws: the states of the generators of every rank.
    """
    state = {
        files.flags: cli.flags(args),
        "script": files.script,
        "epoch": position.done,
        "step": position.step,
        "global_step": position.global_step,
        "generators": draws,
        "optimizer": method.optimizer.state_dict(),
        **method.state_dict(),
    }
    if hasattr(method, "precision"):
        state["scaler"] = method.precision.scaler.state_dict()
    return state


def check_weights(optimizer: torch.optim.Optimizer, when: str) -> None:
    """Raise UserError where a weight is not finite, before it could be saved. when: in words."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    weights = [param.detach() for param in params if param.requires_grad]
    if not torch.nn.utils.get_total_norm(weights).isfinite():
        raise UserError(
            f"the weights are not finite in {when}; the last checkpoint is from before it. Lower "
            "the learning rate, raise the temperature, or try without --amp"
        )


def find(args, folder: str, files: Files) -> tuple[checkpoint.Saved | None, list[str]]:
    """Return the checkpoint that --resume names, None for none, and lines to print about it.

    With --resume auto a broken file is passed over for an older one. Raises UserError where the
    file is of another run.
    """
    remarks = []
    paths = [args.resume] if args.resume else []
    if args.resume == "auto":
        paths = layouts.by_age(folder, files.patterns)
    for number, path in enumerate(paths):
        try:
            saved = checkpoint.Saved(path)
        except UserError as error:
            if number + 1 == len(paths):
                raise
            remarks.append(f"note: {error}; going on from {paths[number + 1]}")
            continue
        with saved.within():
            _check_same(saved, args, files)
        return saved, remarks
    return None, remarks


def _check_same(saved: checkpoint.Saved, args, files: Files) -> None:
    """Raise UserError where a flag that makes another run differs from the checkpoint's."""
    names = files.same
    if args.resume == "auto" and "seed" in args.typed:  # a run that was found, not named
        names = (*names, "seed")
    then = saved.get(files.flags) or {}
    for name in names:
        now = getattr(args, name, None)
        if name in then and comparable(then[name]) != comparable(now):
            was = comparable(then[name]) or "the default"
            here = comparable(now) or "the default"
            way_out = f"add --{name} {was}" if then[name] else "give the same"
            raise UserError(
                f"{saved.path} is of --{name} {was}, this run of {here}: "
                f"{way_out}, or start another run"
            )


def settle_seed(args, saved: checkpoint.Saved | None, files: Files):
    """Return `args` with the seed of the run: typed, that of the run that goes on, or a drawn one.

    Everything that torch's and Python's own generators draw afterwards follows from it.
    """
    seed = args.seed
    if seed is None and saved is not None:
        seed = (saved.get(files.flags) or {}).get("seed")
    if seed is None:
        seed = launch.agree(random.SystemRandom().randrange(2**31))
    random.seed(seed)
    torch.manual_seed(seed)  # equal weights on every rank; what a rank draws alone is its loader's
    return cli.replace(args, seed=seed)


def position(saved: checkpoint.Saved, steps: int) -> Position:
    """Return where the run stopped; steps: of an epoch of this run. Raises UserError.

    After all steps of an epoch what is left is the evaluation of that epoch.
    """
    done = operator.index(saved["epoch"])
    step = operator.index(saved.get("step", 0))
    steps_then = operator.index(saved.get("steps", steps))
    is_whole = step == steps_then
    if 0 < step < steps_then and steps_then != steps:
        raise UserError(
            f"{saved.path} stopped at step {step} of an epoch of {steps_then} steps, here it has "
            f"{steps}: resume with the batch size and pictures of then, or from a checkpoint of a "
            "whole epoch"
        )
    step = steps if is_whole and step else step
    global_step = operator.index(saved.get("global_step", done * steps + step))
    if not 0 <= step <= steps_then or done < 0 or global_step < done + min(step, 1):
        raise UserError(
            f"{saved.path}: epoch {done}, step {step} of {steps_then} and {global_step} steps in "
            "all do not fit together"
        )
    return Position(done, step, global_step)


def check_pictures(saved: checkpoint.Saved, data: dict) -> None:
    """Raise UserError where the run that goes on was trained on other pictures.

    data: {"pictures", "classes", "names"}: their number, that of the classes, a digest of these.
    """
    then = saved.get("data", data)
    if then != data:
        there, here = (f"{d['pictures']} pictures of {d['classes']} classes" for d in (then, data))
        raise UserError(
            f"{saved.path} was trained on {there}, here there are {here}, or other classes: "
            "give the same data"
        )


def differing_flags(saved: checkpoint.Saved, args, files: Files) -> list[str]:
    """Return a note on flags of the method and the data that differ from the run that goes on."""
    then = saved.get(files.flags) or {}
    now = cli.flags(args)
    names = sorted(args.compared & now.keys() & then.keys(), key=lambda n: (n == "epochs", n))
    differing = [
        f"{name}={now[name]} (was {then[name]})"
        for name in names
        if comparable(now[name]) != comparable(then[name])
    ]
    if not differing:
        return []
    listed = ", ".join(differing)
    return [printable(f"note: unlike the run that wrote the checkpoint: {listed}")]


def restore_draws(saved: checkpoint.Saved, generators: dict, process: launch.Process) -> list[str]:
    """Put every generator where it stopped. Returns notes on those that draw something else."""
    if "generators" not in saved:
        return []
    remarks = []
    states = saved["generators"]
    if len(states) != process.world_size:
        remarks.append(
            f"note: {process.world_size} processes go on where there were {len(states)}: "
            "other draws"
        )
    mine = states[process.rank % len(states)]
    for name, generator in {**generators, "torch": torch.default_generator}.items():
        if name not in mine:
            continue
        if len(mine[name]) == len(generator.get_state()):
            generator.set_state(mine[name])
        elif len(mine[name]) in (16, len(torch.get_rng_state())):  # of a GPU, of a CPU
            remarks.append("note: the run began on another kind of device: other draws")
        else:
            raise ValueError(f"no state of a random generator: {name}")
    return remarks


def restore_scaler(saved: checkpoint.Saved, method) -> None:
    """Put the scale of float16 gradients back where this run and the one before have one."""
    scaler = getattr(getattr(method, "precision", None), "scaler", None)
    if scaler is not None and scaler.is_enabled() and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])


def comparable(value):
    """Return a flag's value as it is compared.

    Published scripts keep "120,160,200" as a list and call class folders by the name of a data set,
    and a path can be spelled in two ways.
    """
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if value in ("imagenet", "imagenet100"):
        return "folder"
    if isinstance(value, str) and "/" in value:
        return os.path.normpath(value)
    return value
