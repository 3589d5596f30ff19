"""Write checkpoints that survive a crash, and read them without running code."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from common import UsageError, UserError, files, printable
from runner import papers
from runner.trunks import name_of

ALLOWED = [
    argparse.Namespace,
    # Lightning 1 stores the state of a callback under its class, which is not needed here.
    (dict, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    # A score beside the weights may be a NumPy scalar.
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    *(np.dtype, *{type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + "?efd"}),
]
ABOUT = "negatives.about"  # key in the metadata of a safetensors file: `Saved.about` as JSON
KEPT = files.ROOT / "results/weights"  # networks that are found by their name
DEPTH = 20  # most levels of nested containers; a checkpoint has four or five


def save(path: str | Path, payload: dict) -> Path:
    """Write `payload` to `path` completely or not at all. Raises UserError if the disk refuses."""
    path = Path(path)
    try:
        with files.replacing(path) as file:
            torch.save(payload, file)
    except (OSError, RuntimeError) as error:
        cause = error  # torch.save raises its own error if it cannot close its archive
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        kept = " (the earlier file is untouched)" if path.exists() else ""
        raise UserError(
            f"cannot save {path}: {cause.strerror or _first_line(cause)}{kept}; "
            "free some space and continue with --resume auto"
        ) from None
    return path


def load(path: str | Path) -> dict:
    """Read a checkpoint, ours or the authors', to the CPU and as data only.

    A Namespace in it becomes a dict. Raises UsageError if the file does not exist, and UserError if
    it is truncated, damaged, not a checkpoint, or contains code.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder: give a checkpoint file in it")
    if not path.is_file():
        siblings = sorted(sibling.name for sibling in path.parent.glob("*.pth*"))
        hint = f"; {path.parent} has {', '.join(siblings[-4:])}" if siblings else ""
        if not hint and path.name == str(path) and not path.suffix:
            names = sorted(kept.stem for kept in KEPT.glob("*.safetensors"))
            hint = f"; results/weights has {', '.join(names)}"
        raise UsageError(f"no checkpoint at {path}{hint}")
    try:
        loaded = _copied(_read(path))
    except Exception as error:  # damaged bytes can make torch raise anything
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"cannot read {path}: {error.strerror.lower()}") from None
        code = re.search(r"(?:GLOBAL|Unsupported class)\s+`?([\w.]+)", str(error))
        if code:
            raise UserError(
                f"{path} contains code ({code[1]}), not only tensors and numbers: it is refused; "
                "if you trust it, keep its weights alone where that package is installed, by "
                f"torch.save(torch.load({str(path)!r}, weights_only=False)['state_dict'], NEW), "
                "where state_dict is the key of its weights"
            ) from None
        cause = _first_line(error)
        if cause.startswith("Weights only load failed"):  # torch then suggests an unsafe load
            cause = "it does not hold tensors and numbers alone"
        raise UserError(f"{path} is truncated or not a checkpoint ({cause})") from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a checkpoint")
    return loaded


def _read(path: Path):
    """Load `path` by torch or safetensors, with tensors mapped from the file."""
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "{}"))
            return {**about, **{name: file.get_tensor(name) for name in file.keys()}}
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        is_archive = file.read(4) == b"PK\3\4"
        if is_archive:
            archive = zipfile.ZipFile(file)
            if damaged := archive.testzip():
                raise ValueError(f"its part {damaged} is damaged")
            if any(part.compress_type for part in archive.infolist()):
                raise ValueError("it is compressed")  # and cannot be mapped
        # torch accepts only file names in UTF-8.
        name = str(path) if printable(path) == str(path) else f"/dev/fd/{file.fileno()}"
        with torch.serialization.safe_globals(ALLOWED):
            # Without mapping, torch trusts the size of a storage and reads past the end of the
            # file.
            return torch.load(name, map_location="cpu", weights_only=True, mmap=is_archive)


def _copied(value, depth: int = 0):
    """Copy `value` into plain containers, with tensors in memory and a Namespace as a dict.

    A NumPy scalar becomes a number. Raises ValueError if it is nested too deeply or a tensor claims
    more than the file holds.
    """
    if depth > DEPTH:
        raise ValueError(f"it is nested more than {DEPTH} times")
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return {key: _copied(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item, depth + 1) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        is_here = value.layout == torch.strided and value.device.type == "cpu"
        if not is_here or value.nbytes > value.untyped_storage().nbytes():
            raise ValueError(f"a tensor {tuple(value.shape)} lacks some of its numbers")
        return value.detach().clone()
    return value


@contextlib.contextmanager
def in_one_line(subject: Callable[[], str]) -> Iterator[None]:
    """Turn any error in the block into one UserError with `subject()` and the cause."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"{subject()} cannot be used ({cause})") from error


class Saved(dict):
    """The content of the checkpoint at `path`.

    Asking for a missing key raises a UserError that says which script wrote the file.
    `within` turns any other error with the content into one line.
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
            origin = f"it was written by {self.script}"
        raise UserError(f"{self.path} has no {key}: {origin}")

    def within(self) -> contextlib.AbstractContextManager:
        """Turn any error in the block into one UserError with file, key and cause."""
        return in_one_line(lambda: f"{self.path}: its {self.key}")

    @property
    def paper(self) -> papers.Paper | None:
        """The paper whose script, or whose authors' code, wrote this file."""
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
        declared = papers.find().values()
        return next((p for p in declared if re.search(p.signs, names, re.MULTILINE)), None)

    @property
    def script(self) -> str:
        """The script that wrote this file, or its counterpart for an authors' file."""
        paper = self.paper
        return super().get("script") or (paper.pretraining if paper else "")

    def about(self) -> dict:
        """Return what tells how the network was trained and what pictures it takes, for JSON."""
        about = {key: value for key, value in self.items() if key in ("opt", "args")}
        return about | ({"script": self.script} if self.script else {})

    def how_far(self) -> dict:
        """Return the progress of the pre-training in this file, or behind this classifier."""
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
    """Load `state` into `module` completely or not at all.

    path: the file that a UserError names. allowed_missing: prefixes of names that may be absent
    from `state`, such as those of a newly trained head; the step counters of batch-norm may be
    absent too (PyTorch before 0.4.1). flag: the flag that selects the architecture, for the hint.
    """
    own = module.state_dict()
    problem = misfit(own, state, allowed_missing)
    if problem:
        raise UserError(f"{path} does not fit this model ({problem}){hint(own, state, flag)}")
    for name in own.keys() & state.keys():
        if not state[name].isfinite().all():
            raise UserError(f"{path}: {name} is not finite")
    module.load_state_dict(state, strict=False)


def check_memory(state: dict, own: dict, path: str) -> None:
    """Raise UserError unless the memory of `path` has the buffers `own`, with finite values."""
    if state.keys() != own.keys():
        held = ", ".join(state)
        raise UserError(f"{path} is of another method (its memory holds {held})")
    for name, value in state.items():
        if not value.isfinite().all():
            raise UserError(f"{path} is damaged: {name} of its memory is not finite")


def hint(own: dict, state: dict, flag: str) -> str:
    """Return how the networks in `state` and `own` differ, and the flag that selects one."""
    found, expected = (name_of(tensors) or "another network" for tensors in (state, own))
    if found != expected:
        way_out = f"; choose it with {flag}" if flag else ""
        return f": it holds {found}, and this run has {expected}{way_out}"
    kernels = ([v for v in tensors.values() if v.dim() == 4] for tensors in (state, own))
    channels, wanted = (stem[0].shape[1] if stem else 0 for stem in kernels)
    if channels != wanted:
        return f": its network takes {channels} channels, and this one {wanted}"
    return ""


def misfit(own: dict, state: dict, allowed_missing: tuple[str, ...] = ()) -> str:
    """Describe why the tensors `state` do not fit the tensors `own`, or return ""."""
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
            saved_shape, own_shape = tuple(state[name].shape), tuple(own[name].shape)
            parts.append(f"{name} is {saved_shape}, expected {own_shape}")
            break
    return "; ".join(parts)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Saved) -> None:
    """Load the learning rate and every parameter's state; keep the optimizer's other settings.

    `optimizer.load_state_dict` accepts tensors of any shape, and a fused optimizer would then write
    past their end, so shapes are compared. Raises UserError if they differ, or if the state
    is one of SGD and the optimizer is Adam, or the other way round.
    """
    groups = saved["optimizer"]["param_groups"]
    state = saved["optimizer"]["state"]
    own_groups = optimizer.state_dict()["param_groups"]
    kind, own_kind = ("Adam" if "betas" in g[0] else "SGD" for g in (groups, own_groups))
    if kind != own_kind:
        raise UserError(
            f"{saved.path} was trained with {kind}, and this run has {own_kind}: choose the same "
            "optimizer, or start another run"
        )
    unfit = f"{saved.path}: the state of its optimizer does not fit this network"
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in own_groups]:
        raise UserError(f"{unfit} (the number of parameters differs)")
    # The rate is set again before every step, but a file may be saved before that.
    merged = [
        own | {"params": group["params"], "lr": group["lr"]}
        for own, group in zip(own_groups, groups)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": merged})
    for param, values in optimizer.state.items():
        for key in values.keys() - {"step"}:
            if values[key] is None:  # as torch writes the momentum before the first step
                continue
            if values[key].shape != param.shape:
                raise UserError(f"{unfit} (the shapes of parameters differ)")
            # A fused optimizer needs the memory layout of the parameter.
            values[key] = torch.empty_like(param).copy_(values[key])


def fingerprint(state: dict[str, Tensor]) -> str:
    """Return a digest of names, types and values that does not depend on the device."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        values = value.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]
