"""Checkpoints: written so that a crash never breaks one, read so that a downloaded one cannot run code.

The scripts decide what goes in (the authors' keys first, extra keys for exact resume); this module moves it safely, and
finds the backbone in every layout that the five papers' code has written.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from common import UsageError, UserError

# Lightning 1 files the state of a callback under its class, which is not needed here: a plain type stands for it.
LIGHTNING = [(dict, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "wb", **how):
    """An open file that takes the place of `path` when the block is done: `with replacing(path) as file: file.write(...)`.

    It is written beside it, synced, then renamed. Whatever goes wrong (a full disk, an error in the block, a lost machine),
    `path` is afterwards the old file or the whole new one. Folders are made. An OSError names `path`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, mode, **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        with contextlib.suppress(OSError):  # make the rename itself last; not every file system can
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):  # of a full disk the system does not name the file
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def save(path: str | Path, payload: dict) -> Path:
    """Write `payload` to `path`, everything or nothing. Raises UserError where the disk refuses."""
    path = Path(path)
    try:
        with replacing(path) as file:
            torch.save(payload, file)
    except (OSError, RuntimeError) as error:
        refused = error  # the system's is below another one where torch.save could not close its archive
        while refused is not None and not isinstance(refused, OSError):
            refused = refused.__context__
        if refused is None:
            raise
        why = refused.strerror or _first_line(refused)
        kept = " (the file from before is untouched)" if path.exists() else ""
        raise UserError(f"cannot save {path}: {why}{kept}; free some space and continue with --resume auto") from None
    return path


def load(path: str | Path) -> dict:
    """Read a checkpoint, ours or the authors', as data only, to the CPU: a file that contains code is refused.

    Raises UsageError: no such file; UserError: truncated, no checkpoint at all, or with code in it.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a checkpoint file in it")
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*.pth*"))
        there = f"; in {path.parent} there are {', '.join(siblings[-4:])}" if siblings else ""
        raise UsageError(f"no checkpoint at {path}{there}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *LIGHTNING]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"(?:GLOBAL|Unsupported class)\s+`?([\w.]+)", str(error))
        if code:
            raise UserError(f"{path} contains code ({code.group(1)}), not only tensors and numbers: refused") from None
        raise UserError(f"{path} is truncated or not a checkpoint") from None
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path} is truncated or not a checkpoint ({_first_line(error)})") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a checkpoint")
    for key in ("args", "opt"):  # the options are a dict here, a Namespace in published files
        if isinstance(loaded.get(key), argparse.Namespace):
            loaded[key] = vars(loaded[key])
    return loaded


class Saved(dict):
    """What the checkpoint at `path` holds; asking for a key that it lacks is a UserError that names both."""

    def __init__(self, path: str | Path):
        super().__init__(load(path))
        self.path = str(path)

    def __missing__(self, key):
        raise UserError(f"{self.path} has no {key}: not a checkpoint of this script")


def load_into(module: nn.Module, state: dict[str, Tensor], what: str, allowed_missing: tuple[str, ...] = ()) -> None:
    """Load `state` into `module`, everything or nothing; `what` names the file in the one-line UserError.

    allowed_missing: prefixes of keys that may be absent from `state` (a head that is trained afresh). The counters of
    batch-norm may be absent, too: PyTorch before 0.4.1 had none.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state and not k.startswith(allowed_missing)]
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in own]
    parts = [f"missing {missing[0]} and {len(missing) - 1} more"] if missing else []
    parts += [f"unexpected {extra[0]} and {len(extra) - 1} more"] if extra else []
    shapes = [(k, tuple(state[k].shape), tuple(own[k].shape)) for k in own if k in state]
    parts += [f"{k} is {found}, expected {wanted}" for k, found, wanted in shapes if found != wanted][:1]
    if parts:
        raise UserError(f"{what} does not fit this model ({'; '.join(parts)}): is it of another architecture?")
    module.load_state_dict(state, strict=False)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, what: str) -> None:
    """As `optimizer.load_state_dict`, which takes tensors of any shape: a fused optimizer would then work past their end.

    Raises UserError, with nothing loaded, where the state is not of these parameters.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    try:
        fits = [len(group["params"]) for group in state["param_groups"]] == [len(group) for group in groups]
        params = dict(zip((i for group in state["param_groups"] for i in group["params"]), sum(groups, [])))
        for i, values in state["state"].items():
            tensors = {k: v for k, v in values.items() if isinstance(v, Tensor) and k != "step"}
            fits = fits and all(v.shape == params[i].shape and v.is_floating_point() for v in tensors.values())
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(
            f"{what}: its optimizer is not one of this network's parameters (other shapes or numbers of them)"
        )
    optimizer.load_state_dict(state)
    for param, values in optimizer.state.items():
        for key, value in values.items():  # a buffer in another memory layout would be applied in the wrong order
            if isinstance(value, Tensor) and value.shape == param.shape:
                values[key] = torch.empty_like(param).copy_(value)


def fingerprint(state: dict[str, Tensor]) -> str:
    """The same for the same names, types and values, on whatever device: tells if two files hold the same network."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def add_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in state.items()}


def strip_prefix(state: dict[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Take `prefix` off the keys that carry it; other keys stay as they are."""
    return {k.removeprefix(prefix): v for k, v in state.items()}


PRETRAINING = (
    "checkpoint_[0-9]*.pth.tar", "checkpoint_last.pth.tar", "ckpt_epoch_*.pth", "current.pth", "epoch=*.ckpt", "last.ckpt",
)  # fmt: skip


def newest(folder: str | Path, patterns: tuple[str, ...] = PRETRAINING) -> Path | None:
    """The most recently written whole checkpoint of a run folder, or None."""
    found = [p for pattern in patterns for p in Path(folder).glob(pattern)]
    return max(found, key=lambda p: (p.stat().st_mtime_ns, p.name), default=None)


def newest_below(folder: str | Path) -> Path | None:
    """As `newest`, of a run folder or of a folder of run folders."""
    found = [newest(f) for f in (folder, *sorted(e.path for e in os.scandir(folder) if e.is_dir()))]
    return max((p for p in found if p), key=lambda p: p.stat().st_mtime_ns, default=None)


# Where published code keeps the network that is evaluated, most specific first: (prefix, names of its children). An
# nn.Sequential of torchvision's children numbers them: those are the names behind the numbers.
_LAYOUTS = [
    ("encoder_q.", None),  # MoCo and the code derived from it; key encoder beside it as encoder_k.
    # a Lightning module around a Sequential trunk; key encoder as model_k.
    ("model.features.", {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}),
    # a Sequential trunk f, without a max-pool, and a head g
    ("f.", {"0": "conv1", "1": "bn1", "3": "layer1", "4": "layer2", "5": "layer3", "6": "layer4"}),
    ("encoder.", None),  # a network or two towers called encoder, its heads beside it
]


def backbone(checkpoint: dict) -> dict[str, Tensor]:
    """The (query) network inside a checkpoint of any of the papers' layouts, with torchvision's parameter names.

    Takes what `load` returned. `module.` is dropped wherever data parallel wrappers put it. A bare state dict of a
    torchvision network passes through. Two towers keep their names (`l_to_ab.conv1.weight`, `encoder1.conv1.weight`).
    Raises UserError where no network is found.
    """
    state = next((checkpoint[k] for k in ("state_dict", "model") if isinstance(checkpoint.get(k), dict)), checkpoint)
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    state = {re.sub(r"(^|\.)module\.", r"\1", k): v for k, v in state.items()}
    for prefix, children in _LAYOUTS:
        inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if not inside or children and not {k.partition(".")[0] for k in inside} <= children.keys():
            continue
        if children:
            inside = {f"{children[n]}.{rest}": v for k, v in inside.items() for n, _, rest in [k.partition(".")]}
        return inside
    if towers := {k: v for k, v in state.items() if k.startswith(("encoder1.", "encoder2."))}:
        return towers
    if "conv1.weight" in state or any(k.startswith(("features.", "conv_proj", "patch_embed")) for k in state):
        return state
    some = ", ".join(list(state)[:3]) or "no tensors at all"
    raise UserError(f"found no backbone in this checkpoint (it has {some})")


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the parameters of the projection head or classifier (`fc.`, `classifier.`, `head.`, `heads.`)."""
    return {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier.", "head.", "heads."))}


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
