"""Find the checkpoint to resume from, check that it fits this run, and restore the state."""

from __future__ import annotations

import hashlib
import operator
import os
import random
import re
from dataclasses import dataclass

import torch

from common import UserError, cli, collectives, launch, printable
from runner import checkpoint, layouts


@dataclass(frozen=True)
class Files:
    """The files in a script's run folder, and the flags that identify a run.

    script: `__file__` of the script, whose name is saved in every checkpoint.
    last: file name of the newest state, saved every --last-every epochs and after a signal.
    numbered: file name of the states kept every --save-freq epochs, with {} for the epoch.
    patterns: files that --resume auto looks for and a new run must not overwrite; default: these.
    flags: key of the flags in the authors' files.
    first: number of the first epoch in names and lines, as the published script counts.
    start: complete epochs that a new run counts as done.
    same: flags that must not differ from the checkpoint when a run resumes.
    by_epoch: log one record per epoch instead of one per progress line.
    events: TensorBoard events: True (in the folder), False, or the folder to write them to.
    suffix: added to config.json and so on if another kind of run shares the folder.
    """

    script: str
    last: str = ""
    numbered: str = ""
    patterns: tuple[str, ...] = ()
    flags: str = "opt"
    first: int = 1
    start: int = 0
    same: tuple[str, ...] = ("dataset",)
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
    """The position of a run: complete epochs, steps of the next epoch, steps in all."""

    done: int = 0
    step: int = 0
    global_step: int = 0


def state_of(method, files: Files, args, position: Position, draws: list[dict]) -> dict:
    """Return the content of a checkpoint: the authors' keys and what an exact resume needs.

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
        state["amp"] = method.precision.enabled or method.precision.apex is not None
    return state


def check_weights(optimizer: torch.optim.Optimizer, when: str) -> None:
    """Raise UserError if a weight is not finite, before it is saved. when: names the moment."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    weights = [param.detach() for param in params if param.requires_grad]
    if not torch.nn.utils.get_total_norm(weights).isfinite():
        raise UserError(
            f"the weights are not finite in {when}; the last checkpoint is older than that. Lower "
            "the learning rate, raise the temperature, or try without --amp"
        )


def find(args, folder: str, files: Files) -> tuple[checkpoint.Saved | None, list[str]]:
    """Return the checkpoint that --resume names, or None, and lines to print about it.

    --resume auto skips a broken file for an older one. Raises UserError if the file belongs to
    another run.
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
            remarks.append(f"note: {error}; continuing from {paths[number + 1]}")
            continue
        with saved.within():
            _check_same(saved, args, files)
        return saved, remarks
    return None, remarks


def _check_same(saved: checkpoint.Saved, args, files: Files) -> None:
    """Raise UserError if another script wrote it, or a flag that identifies the run differs."""
    script = saved.get("script", files.script)
    if script != files.script:
        raise UserError(
            f"{saved.path} was written by {printable(str(script))[:80]}: "
            f"--resume takes only checkpoints of {files.script}"
        )
    names = files.same
    if args.resume == "auto" and "seed" in args.typed:  # which was found, not named
        names = (*names, "seed")
    then = saved.get(files.flags) or {}
    for name in names:
        now = getattr(args, name, None)
        if name in then and comparable(then[name]) != comparable(now):
            was, here = (
                "the default" if value in (None, "") else value
                for value in map(comparable, (then[name], now))
            )
            way_out = "use the same" if was == "the default" else f"add --{name} {was}"
            raise UserError(
                f"{saved.path} was trained with --{name} {was}, this run has {here}: "
                f"{way_out}, or start another run"
            )


def settle(args, saved: checkpoint.Saved | None, files: Files):
    """Return `args` with the seed: typed, of the checkpoint, the default, or drawn, in this order.

    --amp auto becomes what was chosen when the run began. Python's generator and torch's are
    seeded.
    """
    if args.amp == "auto" and saved is not None and "amp" in saved:
        args = cli.replace(args, amp=bool(saved["amp"]))
    seed = args.seed
    if saved is not None and "seed" not in args.typed:
        seed = (saved.get(files.flags) or {}).get("seed", seed)
    if seed is None:
        seed = collectives.agree(random.SystemRandom().choice(cli.DRAWN))
    random.seed(seed)
    torch.manual_seed(seed)  # equal weights on every rank; views are drawn by the loader
    return cli.replace(args, seed=seed)


def position(saved: checkpoint.Saved, steps: int) -> Position:
    """Return the position at which the run stopped. steps: steps per epoch of this run.

    A position after all steps of an epoch means that only its evaluation is left. Raises UserError
    if the numbers in the checkpoint do not fit together or this run has other epochs.
    """
    done = operator.index(saved["epoch"])
    step = operator.index(saved.get("step", 0))
    steps_then = operator.index(saved.get("steps", steps))
    is_whole = step == steps_then
    if 0 < step < steps_then and steps_then != steps:
        raise UserError(
            f"{saved.path} stopped at step {step} of an epoch of {steps_then} steps, here it has "
            f"{steps}: resume with the same batch size and pictures, or from a checkpoint of a "
            "complete epoch"
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
    """Raise UserError if the checkpoint was trained on other pictures.

    data: {"pictures": their number, "classes": number of classes, "names": digest of class names}.
    """
    then = saved.get("data", data)
    if then != data:
        was, here = (f"{d['pictures']} pictures of {d['classes']} classes" for d in (then, data))
        raise UserError(
            f"{saved.path} was trained on {was}, here there are {here}, or other classes: "
            "give the same data"
        )


def differing_flags(saved: checkpoint.Saved, args, files: Files) -> list[str]:
    """Return a note about compared flags that differ from the checkpoint, or []."""
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
    return [printable(f"note: these flags differ from the checkpoint: {listed}")]


def restore_draws(saved: checkpoint.Saved, generators: dict, process: launch.Process) -> list[str]:
    """Restore the generators. Returns notes about those that cannot continue exactly."""
    if "generators" not in saved:
        return []
    remarks = []
    states = saved["generators"]
    if len(states) != process.world_size:
        remarks.append(
            f"note: {process.world_size} processes continue a run of {len(states)}, "
            "so random draws differ"
        )
    mine = states[process.rank % len(states)]
    for name, generator in {**generators, "torch": torch.default_generator}.items():
        if name not in mine:
            continue
        if len(mine[name]) == len(generator.get_state()):
            generator.set_state(mine[name])
        elif len(mine[name]) in (16, len(torch.get_rng_state())):  # of a GPU, of a CPU
            remarks.append("note: the run began on another kind of device, so random draws differ")
        else:
            raise ValueError(f"{name} is not the state of a random generator")
    return remarks


def digest_of(names: list[str]) -> str:
    """Return a digest of class names, by which a checkpoint knows its data set."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def restore_scaler(saved: checkpoint.Saved, method) -> None:
    """Restore the scale of float16 gradients, if this run and the checkpoint have one."""
    scaler = getattr(getattr(method, "precision", None), "scaler", None)
    if scaler is not None and scaler.is_enabled() and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])


def comparable(value):
    """Return a flag's value in a form that can be compared.

    Published scripts keep "120,160,200" as a list and name class folders after a data set, and a
    path can be spelled in two ways.
    """
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if value in ("imagenet", "imagenet100"):
        return "folder"
    if isinstance(value, str) and "/" in value:
        return os.path.normpath(value)
    return value
