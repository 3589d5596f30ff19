"""Checkpoints: written so that a crash never breaks one, read so that a downloaded one cannot run code.

The scripts decide what goes in (the authors' keys first, extra keys for exact resume); this module moves it safely, and
finds the backbone in every layout that the five papers' code has written.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import pickletools
import re
import secrets
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from common import UsageError, UserError, backbones, printable

try:
    import fcntl
except ImportError:  # Windows: neither folders nor files are held there
    fcntl = None

# Lightning 1 files the state of a callback under its class, which is not needed here: a plain type stands for it.
LIGHTNING = [(dict, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "wb", **how):
    """An open file that takes the place of `path` when the block is done: `with replacing(path) as file: file.write(...)`.

    It is written beside it, synced, then renamed. Whatever goes wrong (a full disk, an error in the block, a lost machine),
    `path` is afterwards the old file or the whole new one, also where two write it at once. Folders are made. An OSError
    names `path`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.partial")  # this writer's own
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, mode.replace("w", "x"), **how) as file:
            with contextlib.suppress(OSError, AttributeError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells `sweep` that it has a writer
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


def sweep(folder: str | Path) -> None:
    """Remove the partial files in `folder` whose writers are gone, where the file system can tell."""
    for partial in Path(folder).glob(".*.partial"):
        with contextlib.suppress(OSError, AttributeError):
            if partial.is_file():
                with open(partial, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    partial.unlink()


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

    It comes in plain dicts, lists and tensors. Raises UsageError: no such file; UserError, whatever the file holds:
    truncated, damaged, no checkpoint at all, with code in it, or with tensors larger than it.
    """
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a checkpoint file in it")
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*.pth*"))
        there = f"; in {path.parent} there are {', '.join(siblings[-4:])}" if siblings else ""
        raise UsageError(f"no checkpoint at {path}{there}")
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zipped = file.read(4) == b"PK\3\4"
            if zipped:
                archive = zipfile.ZipFile(file)
                if any(part.compress_type for part in archive.infolist()):
                    raise UserError("is compressed, not a checkpoint")
                if damaged := archive.testzip():  # torch does not look at the checksums
                    raise UserError(f"is damaged: {damaged} is not what was written")
            name = str(path) if printable(path) == str(path) else f"/dev/fd/{file.fileno()}"  # torch takes UTF-8 only
            with torch.serialization.safe_globals([argparse.Namespace, *LIGHTNING]):
                # Mapped: otherwise torch believes a storage's size, and would read past the end of one that is shorter.
                loaded = torch.load(name, map_location="cpu", weights_only=True, mmap=zipped)
            loaded = _as_data(loaded, room=4 * path.stat().st_size)
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except Exception as error:  # torch raises whatever a byte leads it to
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"cannot read {path}: {error.strerror.lower()}") from None
        code = re.search(r"(?:GLOBAL|Unsupported class)\s+`?([\w.]+)", str(error))
        if code := code[1] if code else _global_of_pickle(path):
            raise UserError(f"{path} contains code ({code}), not only tensors and numbers: refused") from None
        raise UserError(f"{path} is truncated or not a checkpoint ({_first_line(error)})") from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UserError(f"{path} holds {_found(loaded)}, not a checkpoint")
    return loaded


def _as_data(loaded, room: int):
    """A copy in plain containers, a Namespace as a dict. UserError where tensors need more than `room` bytes in all: a
    storage of one number can claim any shape."""
    copies = {}

    def copy(value, name: str):
        nonlocal room
        if id(value) in copies:
            return copies[id(value)]
        if isinstance(value, Tensor):
            plain = Tensor.detach(value)
            dense = plain.layout is torch.strided and plain.device.type == "cpu" and not plain.is_quantized
            room -= plain.numel() * plain.element_size() if dense else 0
            if not dense or plain.is_complex() or room < 0:
                raise UserError(f"is refused: {name[1:]} is {_found(plain)}, expected real numbers that are all there")
            made = plain.clone()
        elif isinstance(value, (dict, argparse.Namespace)):
            items = dict.items(vars(value) if isinstance(value, argparse.Namespace) else value)
            made = {key: copy(item, f"{name}.{key}"[:200]) for key, item in items}
        elif isinstance(value, (list, tuple)):
            made = [copy(item, f"{name}.{i}"[:200]) for i, item in enumerate(value)]
        else:
            return value
        copies[id(value)] = made
        return made

    return copy(loaded, "")


def _global_of_pickle(path: Path) -> str | None:
    """What a raw pickle of a protocol that torch does not read calls or builds."""
    words = []
    with contextlib.suppress(Exception), open(path, "rb") as file:
        for code, argument, _ in pickletools.genops(file):
            if code.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
                return argument.replace(" ", ".") if argument else ".".join(words[-2:])
            words += [argument] if isinstance(argument, str) else []
    return None


def _found(value) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value[:60] if isinstance(value, str) else value)[:80]
    return f"a {type(value).__name__}"


def _is_whole(value, most: int = 2**53) -> bool:
    return type(value) is int and 0 <= value <= most


def _is_number(value) -> bool:
    return type(value) in (int, float) or isinstance(value, Tensor) and value.numel() == 1


def _is_text(value) -> bool:
    return type(value) is str


def _is_state(value) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.dim() == 1


def _is_flag(value) -> bool:
    return all(v is None or type(v) in (bool, int, float, str) for v in (value if type(value) is list else [value]))


def _all(kind: type, test: Callable) -> Callable:
    """A test of a list's items, of which there must be some, or of a dict's values, whose keys must be text."""
    if kind is list:
        return lambda value: type(value) is list and len(value) > 0 and all(map(test, value))
    return lambda value: type(value) is dict and all(type(k) is str and test(v) for k, v in value.items())


_FIELDS = [  # what scripts rely on in a checkpoint: names, in words, test; what else there is, they do not look at
    ("epoch step steps global_step z_updates pretrained_epoch pretrained_step best_epoch", "a whole number", _is_whole),
    ("acc1 acc5", "a number", _is_number),
    ("best_acc1", "a percentage", lambda value: _is_number(value) and -1 <= float(value) <= 100),
    ("arch network digest pretrained script", "text", _is_text),
    ("args opt", "flags by name", _all(dict, _is_flag)),
    ("pretrained_args", "flags by name", lambda value: value is None or _all(dict, _is_flag)(value)),
    ("state_dict model model_ema contrast classifier statistics", "tensors by name", _all(dict, torch.is_tensor)),
    (
        "queue scaler neighbours",
        "numbers by name",
        _all(dict, lambda value: _is_number(value) and abs(float(value)) < 2**53),
    ),
    ("classes", "a list of names", _all(list, _is_text)),
    (
        "data",
        "the numbers of pictures and classes",
        lambda v: _all(dict, _is_flag)(v) and {"pictures", "classes"} <= v.keys(),
    ),
    ("generators", "random states by name for every process", _all(list, _all(dict, _is_state))),
    ("optimizer", "a state by name", lambda value: type(value) is dict),
]
_FLAGS = [  # of the flags those that are acted upon
    ("seed", "a whole number", lambda value: value is None or _is_whole(value, 2**63 - 1)),
    ("input_res", "1 to 4096", lambda value: _is_whole(value, 4096) and value > 0),
    ("epochs", "a whole number", _is_whole),
    ("model arch view", "text", _is_text),
    ("views", "text", lambda value: value is None or _is_text(value)),
]


_FAMILIES = [  # what is only in one script's pre-trainings, that script, and the one that evaluates them
    (r"opt\.negatives$|state_dict\.model\.", "ring/train_ring.py", "ring/eval_ring.py"),
    (r"opt\.tau_plus$|(^|\.)(module\.)?f\.0\.", "debiased/main.py", "debiased/linear.py"),
    (r"opt\.view$|l_to_ab\.", "cmc/train_CMC.py", "cmc/LinearProbing.py"),
    (
        r"opt\.mixnorm$|^model\.module\.(encoder|head)",
        "feature_transform/main_contrast.py",
        "feature_transform/main_linear.py",
    ),
    (r"opt\.moco$|contrast\.memory$", "moco_insdis/train_moco_ins.py", "moco_insdis/eval_moco_ins.py"),
    (r"encoder_q\.", "nonsem_neg/moco_non_sem_neg.py", "nonsem_neg/main_lincls.py"),
]


class Saved(dict):
    """What the checkpoint at `path` holds, every field of the kind that the scripts rely on.

    Raises UserError, besides those of `load`, that names the file, the field, what is there and what was expected; so does
    asking for a key that it lacks.
    """

    def __init__(self, path: str | Path):
        super().__init__(load(path))
        self.path = str(path)
        self.check(self, _FIELDS)
        for key in ("args", "opt", "pretrained_args"):
            self.check(self.get(key) or {}, _FLAGS, f"{key}.")

    def check(self, values: dict, fields: list[tuple[str, str, Callable]], where: str = "") -> None:
        for name, words, test in ((name, words, test) for names, words, test in fields for name in names.split()):
            if name in values and not test(values[name]):
                self.refuse(where + name, values[name], words)

    def refuse(self, field: str, value, expected: str):
        raise UserError(f"{self.path}: {field} is {_found(value)}, expected {expected}")

    def __missing__(self, key):
        written_by = f"it is of {self.family[0]}" if self.family else "not a checkpoint of this script"
        raise UserError(f"{self.path} has no {key}: {written_by}")

    @property
    def family(self) -> tuple[str, str] | None:
        """The scripts that write and that evaluate a pre-training like this one, as far as its layout tells."""
        inside = [f"{key}.{name}" for key in ("model", "state_dict", "contrast", "opt") for name in self.get(key, {})]
        names = "\n".join([*self, *inside])
        return next((scripts for sign, *scripts in _FAMILIES if re.search(sign, names, re.MULTILINE)), None)

    def how_far(self) -> dict:
        """How far the pre-training had come that is in this file, or behind this classifier; for result.json."""
        behind = "pretrained_" if "pretrained_epoch" in self else ""
        flags = self.get(f"{behind}args", self.get("opt")) or {}
        done = dict(backbone_epochs=self.get(f"{behind}epoch"), backbone_step=self.get(f"{behind}step", 0))
        return done | dict(backbone_epochs_asked=flags.get("epochs"))


def load_into(
    module: nn.Module, state: dict[str, Tensor], what: str, allowed_missing: tuple[str, ...] = (), flag: str = ""
) -> None:
    """Load `state` into `module`, everything or nothing; `what` names the file in the one-line UserError.

    allowed_missing: prefixes of keys that may be absent from `state` (a head that is trained afresh). The counters of
    batch-norm may be absent, too: PyTorch before 0.4.1 had none. flag: which chooses the architecture.
    """
    own = module.state_dict()
    missing = [k for k in own if k not in state and not k.startswith(allowed_missing)]
    missing = [k for k in missing if not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in own]
    parts = [f"missing {missing[0]} and {len(missing) - 1} more"] if missing else []
    parts += [f"unexpected {extra[0][:80]} and {len(extra) - 1} more"] if extra else []
    both = [(k, state[k], own[k]) for k in own if k in state]
    shapes = [(k, tuple(found.shape), tuple(wanted.shape)) for k, found, wanted in both]
    parts += [f"{k} is {found}, expected {wanted}" for k, found, wanted in shapes if found != wanted][:1]
    if parts:
        name = backbones.name_of(state)
        hint = f"add {flag} {name}" if flag and name else "is it of another architecture?"
        raise UserError(f"{what} does not fit this model ({'; '.join(parts)}): {hint}")
    for k, found, wanted in both:
        if found.is_floating_point() != wanted.is_floating_point():
            raise UserError(f"{what}: {k} is {_found(found)}, expected {wanted.dtype}")
        if not found.isfinite().all():
            raise UserError(f"{what}: {k} is not finite")
    module.load_state_dict(state, strict=False)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Saved) -> None:
    """The state of every parameter from `saved`; learning rate, momentum and so on stay as they are.

    As `optimizer.load_state_dict`, which takes tensors of any shape: a fused optimizer would then work past their end.
    Raises UserError, with nothing loaded, where the state is not of these parameters.
    """
    own = [group | {"params": len(group["params"])} for group in optimizer.state_dict()["param_groups"]]
    params, fits = [p for group in optimizer.param_groups for p in group["params"]], False
    with contextlib.suppress(Exception):  # whatever its structure
        groups = saved["optimizer"]["param_groups"]
        ids = [i for group in groups for i in group["params"]]
        found = {i: {k: v for k, v in kept.items() if v is not None} for i, kept in saved["optimizer"]["state"].items()}
        kinds = {frozenset(found.get(i, ())) for i, p in zip(ids, params) if p.requires_grad}  # each was updated
        keeps = any(group.get("momentum") or "betas" in group for group in groups)
        right = [[len(group["params"]) for group in groups] == [group["params"] for group in own]]
        right += [found.keys() <= {*ids}, len({*ids}) == len(ids), len(kinds) == 1, bool(max(kinds)) >= bool(keeps)]
        for i, p in zip(ids, params):
            for key, value in found.get(i, {}).items():  # of Adam an older PyTorch counts the steps in an integer
                value, size = (
                    torch.as_tensor(value).float() if key == "step" else value,
                    () if key == "step" else p.shape,
                )
                right += [value.shape == size, value.is_floating_point(), bool(value.isfinite().all())]
                right += [key != "step" or value >= 0]
        fits = all(right)
    if not fits:
        why = "other shapes, kinds or numbers of them"
        raise UserError(f"{saved.path}: its optimizer is not one of this network's parameters ({why})")
    groups = [mine | {"params": group["params"]} for mine, group in zip(own, groups)]
    optimizer.load_state_dict({"state": found, "param_groups": groups})
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


def by_age(folder: str | Path, patterns: tuple[str, ...] = PRETRAINING) -> list[Path]:
    """The checkpoints of a run folder, the most recently written first; a link that leads nowhere is none."""
    found = [p for pattern in patterns for p in Path(folder).glob(pattern) if os.path.isfile(p)]
    return sorted(found, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)


def newest(folder: str | Path, patterns: tuple[str, ...] = PRETRAINING) -> Path | None:
    """The most recently written checkpoint of a run folder, or None."""
    return next(iter(by_age(folder, patterns)), None)


def newest_below(folder: str | Path) -> Path | None:
    """As `newest`, of a run folder or of a folder of run folders."""
    folders = [folder, *sorted(e.path for e in os.scandir(folder) if os.path.isdir(e.path))]
    return max((p for p in map(newest, folders) if p), key=lambda p: p.stat().st_mtime_ns, default=None)


_SEQUENTIAL = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}

# Where published code keeps the network that is evaluated, most specific first: (prefix, names of its children). An
# nn.Sequential of torchvision's children numbers them: those are the names behind the numbers.
_LAYOUTS = [
    ("encoder_q.", None),  # MoCo and the code derived from it; key encoder beside it as encoder_k.
    # a Lightning module around a Sequential trunk; key encoder as model_k.
    ("model.features.", _SEQUENTIAL),
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
    parts = [(re.fullmatch(r"model\.(\w+)\.features\.(\d+)\.(.+)", k), v) for k, v in state.items()]
    if towers := {f"{m[1]}.{_SEQUENTIAL[m[2]]}.{m[3]}": v for m, v in parts if m and m[2] in _SEQUENTIAL}:
        return towers
    if "conv1.weight" in state or any(k.startswith(("features.", "conv_proj", "patch_embed")) for k in state):
        return state
    some = ", ".join(name[:80] for name in list(state)[:3]) or "no tensors at all"
    raise UserError(f"found no backbone in {getattr(checkpoint, 'path', 'this checkpoint')} (it has {some})")


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the parameters of the projection head or classifier (`fc.`, `classifier.`, `head.`, `heads.`)."""
    return {k: v for k, v in state.items() if not k.startswith(("fc.", "classifier.", "head.", "heads."))}


def towers(state: dict[str, Tensor]) -> list[str]:
    """The names of the networks in what `backbone` returned, sorted; of a single one none."""
    return sorted({k.partition(".")[0] for k in state if re.match(r"\w+\.(conv1|conv_block_1)\.", k)})


def one_tower(state: dict[str, Tensor], tower: str) -> dict[str, Tensor]:
    return without_head({k.removeprefix(f"{tower}."): v for k, v in state.items() if k.startswith(f"{tower}.")})


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
