"""Checkpoints: no crash breaks one that is being written, and reading one never runs code."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from common import UsageError, UserError, backbones, files, printable
from runner import papers

# Lightning 1 files the state of a callback under its class, which is not needed here.
LIGHTNING = [(dict, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]
DEPTH = 20  # of containers in containers that are followed; a checkpoint has four or five


def save(path: str | Path, payload: dict) -> Path:
    """Write `payload` to `path`, everything or nothing. Raises UserError where the disk refuses."""
    path = Path(path)
    try:
        with files.replacing(path) as file:
            torch.save(payload, file)
    except (OSError, RuntimeError) as error:
        cause = error  # torch.save raises its own error where it cannot close its archive
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        kept = " (the file from before is untouched)" if path.exists() else ""
        raise UserError(
            f"cannot save {path}: {cause.strerror or _first_line(cause)}{kept}; "
            "free some space and continue with --resume auto"
        ) from None
    return path


def load(path: str | Path) -> dict:
    """Read a checkpoint, ours or the authors', as data only and to the CPU; code in it is refused.

    A Namespace in it comes as a dict. Raises UsageError where there is no such file, and UserError
    where it is truncated, damaged or no checkpoint, or contains code.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a checkpoint file in it")
    if not path.is_file():
        siblings = sorted(sibling.name for sibling in path.parent.glob("*.pth*"))
        there = f"; in {path.parent} there are {', '.join(siblings[-4:])}" if siblings else ""
        raise UsageError(f"no checkpoint at {path}{there}")
    try:
        loaded = _copied(_read(path))
    except Exception as error:  # torch raises whatever a byte leads it to
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"cannot read {path}: {error.strerror.lower()}") from None
        code = re.search(r"(?:GLOBAL|Unsupported class)\s+`?([\w.]+)", str(error))
        if code:
            raise UserError(
                f"{path} contains code ({code[1]}), not only tensors and numbers: refused"
            ) from None
        cause = _first_line(error)
        if cause.startswith("Weights only load failed"):  # torch goes on to advise against safety
            cause = "it does not hold tensors and numbers alone"
        raise UserError(f"{path} is truncated or not a checkpoint ({cause})") from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a checkpoint")
    return loaded


def _read(path: Path):
    """Return what torch reads from `path`, its tensors mapped from the file."""
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        is_archive = file.read(4) == b"PK\3\4"
        if is_archive:
            archive = zipfile.ZipFile(file)
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is not what was written")
            if any(part.compress_type for part in archive.infolist()):
                raise ValueError("it is compressed")  # its numbers could not be mapped
        # torch takes names in UTF-8 only.
        name = str(path) if printable(path) == str(path) else f"/dev/fd/{file.fileno()}"
        with torch.serialization.safe_globals([argparse.Namespace, *LIGHTNING]):
            # Mapped: torch would else believe a storage's size and read past the end of the file.
            return torch.load(name, map_location="cpu", weights_only=True, mmap=is_archive)


def _copied(value, depth: int = 0):
    """Return `value` in plain containers, its tensors in memory, a Namespace as a dict.

    Raises ValueError where it is nested without end, or a tensor claims more than the file holds.
    """
    if depth > DEPTH:
        raise ValueError(f"nested more than {DEPTH} times")
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _copied(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item, depth + 1) for item in value]
    if isinstance(value, Tensor):
        is_here = value.layout == torch.strided and value.device.type == "cpu"
        if not is_here or value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor {tuple(value.shape)} has not all the numbers that it needs")
        return value.detach().clone()
    return value


@contextlib.contextmanager
def in_one_line(subject: Callable[[], str]) -> Iterator[None]:
    """Raise one UserError for anything that goes wrong in the block: what it was, and the cause."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"{subject()} cannot be used ({cause})") from error


class Saved(dict):
    """The content of the checkpoint at `path`.

    Asking for a key that it lacks raises a UserError that says which script wrote the file.
    `within` turns whatever else goes wrong with the content into one line.
    """

    def __init__(self, path: str | Path):
        super().__init__(load(path))
        self.path = str(path)
        self.key = ""  # the key that was last asked for

    def __getitem__(self, key):
        self.key = key
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.key = key
        return super().get(key, default)

    def __missing__(self, key):
        origin = "it is not a checkpoint of this script"
        if self.paper:
            origin = f"it is of {self.script}"
        raise UserError(f"{self.path} has no {key}: {origin}")

    def within(self) -> contextlib.AbstractContextManager:
        """Raise one UserError for anything that goes wrong in the block: file, key and cause."""
        return in_one_line(lambda: f"{self.path}: its {self.key}")

    @property
    def paper(self) -> papers.Paper | None:
        """The paper whose script wrote this file, or whose authors' files look like it."""
        script = super().get("script")
        if isinstance(script, str):
            return papers.of_script(script)
        inside = [
            f"{key}.{name}"
            for key in ("model", "state_dict", "contrast", "opt")
            if isinstance(super(Saved, self).get(key), dict)
            for name in super(Saved, self).get(key)
        ]
        names = "\n".join([*self, *inside])
        known = papers.find().values()
        return next((p for p in known if re.search(p.signs, names, re.MULTILINE)), None)

    @property
    def script(self) -> str:
        """The script that wrote this file, or for an authors' file the one that would."""
        paper = self.paper
        return super().get("script") or (paper.pretraining if paper else "")

    def how_far(self) -> dict:
        """Return how far the pre-training in this file, or behind this classifier, had come."""
        behind = "pretrained_" if "pretrained_epoch" in self else ""
        flags = self.get(f"{behind}args") or self.get("opt") or {}
        return {
            "backbone_epochs": self.get(f"{behind}epoch"),
            "backbone_step": self.get(f"{behind}step", 0),
            "backbone_epochs_asked": flags.get("epochs"),
        }


def load_into(
    module: nn.Module,
    state: dict[str, Tensor],
    path: str,
    allowed_missing: tuple[str, ...] = (),
    flag: str = "",
) -> None:
    """Load `state` into `module`, everything or nothing.

    path: the file that a UserError names. allowed_missing: prefixes of names that may be absent
    from `state`, such as those of a head that is trained afresh; the step counters of batch-norm
    may be absent, too (PyTorch before 0.4.1). flag: the one that chooses the architecture.
    """
    own = module.state_dict()
    problem = _misfit(own, state, allowed_missing)
    if problem:
        name = backbones.name_of(state)
        hint = f"add {flag} {name}" if flag and name else "is it of another architecture?"
        raise UserError(f"{path} does not fit this model ({problem}): {hint}")
    for name in own.keys() & state.keys():
        if not state[name].isfinite().all():
            raise UserError(f"{path}: {name} is not finite")
    module.load_state_dict(state, strict=False)


def _misfit(own: dict, state: dict, allowed_missing: tuple[str, ...]) -> str:
    """Return in words what of `state` does not fit `own`, or nothing."""
    optional = (*allowed_missing,)
    missing = [k for k in own if k not in state and not k.startswith(optional)]
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    parts = []
    if missing:
        parts.append(f"missing {missing[0]} and {len(missing) - 1} more")
    if unexpected:
        parts.append(f"unexpected {unexpected[0][:80]} and {len(unexpected) - 1} more")
    for name in own:
        if name in state and state[name].shape != own[name].shape:
            there, here = tuple(state[name].shape), tuple(own[name].shape)
            parts.append(f"{name} is {there}, expected {here}")
            break
    return "; ".join(parts)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Saved) -> None:
    """Load the state of every parameter; learning rate, momentum and so on stay as they are.

    `optimizer.load_state_dict` takes tensors of any shape, and a fused optimizer would then work
    past their end, so shapes are compared first. Raises UserError where they differ.
    """
    groups = saved["optimizer"]["param_groups"]
    state = saved["optimizer"]["state"]
    own_groups = optimizer.state_dict()["param_groups"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    ids = [number for group in groups for number in group["params"]]
    fits = [len(g["params"]) for g in groups] == [len(g["params"]) for g in own_groups]
    kept = {}
    for number, param in zip(ids, params):
        values = {k: v for k, v in state.get(number, {}).items() if v is not None}
        if values:
            kept[number] = values
        fits &= all(
            torch.as_tensor(v).shape == param.shape for k, v in values.items() if k != "step"
        )
    if not fits:
        raise UserError(
            f"{saved.path}: its optimizer is not one of this network's parameters "
            "(their number or their shapes differ)"
        )
    merged = [own | {"params": group["params"]} for own, group in zip(own_groups, groups)]
    optimizer.load_state_dict({"state": kept, "param_groups": merged})
    for param, values in optimizer.state.items():
        for key, value in values.items():
            # In another memory layout than its parameter's it would be applied in the wrong order.
            if isinstance(value, Tensor) and value.shape == param.shape:
                values[key] = torch.empty_like(param).copy_(value)


def fingerprint(state: dict[str, Tensor]) -> str:
    """Return a digest that is the same for the same names, types and values, on whatever device."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        values = value.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
