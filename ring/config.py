"""Read settings files in the published format (--config) as flags.

The format is that of config/pretrain/*/*.json of mhw32/contrastive-ring-public at fb3e1c2. Every
key of those files is known. One warning names the keys without effect here, most of which have none
there either. Settings that the published code ignores by mistake (`exponential_anneal`, a false
`dynamic_inner`, `logsumexp_inner` or `self_negative`) have an effect here. A missing key or null
means the default. An unknown key is an error, as its setting would silently be ignored.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterator

from common import UsageError

FLAGS = {  # {key: flag}
    "exp_base": "exp_base",
    "exp_name": "exp_name",
    "seed": "seed",
    "data_loader_workers": "workers",
    "num_epochs": "epochs",
    "shuffle_bn": "shuffle_bn",
    "data_params.root": "root",
    "data_params.dataset": "dataset",
    "model_params.out_dim": "out_dim",
    "model_params.resnet_version": "resnet_version",
    "model_params.conv3x3": "conv3x3",
    "loss_params.k": "k",
    "loss_params.t": "t",
    "loss_params.m": "m",
    "loss_params.thres_outer": "thres_outer",
    "loss_params.thres_inner": "thres_inner",
    "loss_params.dynamic_inner": "dynamic_inner",
    "loss_params.neighbor_views": "neighbor_views",
    "loss_params.logsumexp_inner": "logsumexp_inner",
    "loss_params.self_negative": "self_negative",
    "loss_params.max_anneal_epoch": "max_anneal_epoch",
    "optim_params.batch_size": "batch_size",
    "optim_params.learning_rate": "learning_rate",
    "optim_params.momentum": "momentum",
    "optim_params.weight_decay": "weight_decay",
}
CHOICES = {  # {key of a switch: (flag, value where it is true)}; the first true one wins
    "data_params.mocov2_transforms": ("augmentation", "mocov2"),
    "data_params.mocov2_32x32_transforms": ("augmentation", "mocov2_32x32"),
    "data_params.mocov2_64x64_transforms": ("augmentation", "mocov2_64x64"),
    "data_params.mocov2_96x96_transforms": ("augmentation", "mocov2_96x96"),
    "loss_params.adaptive_anneal_on_loss": ("anneal", "loss"),
    "loss_params.adaptive_anneal_on_acc": ("anneal", "accuracy"),
    "loss_params.linear_anneal": ("anneal", "linear"),
    "loss_params.step_anneal": ("anneal", "step"),
    "loss_params.exponential_decay_anneal": ("anneal", "exponential"),
    "loss_params.exponential_anneal": ("anneal", "exponential"),
}
METHODS = {"NCE": "ir", "MoCo": "moco", "CMC": "cmc"}  # CMC, which is not published, is by analogy
LOSSES = {
    f"{name}{negatives}": (method, negatives.lower() or "all")
    for name, method in METHODS.items()
    for negatives in ("", "Ball", "Ring")
}
SYSTEMS = {f"Pretrain{name}System": method for name, method in METHODS.items()}
SCHEDULERS = {"MoCoLRScheduler": "MoCoLRScheduler", None: "none"}
DEAD = {
    "cuda",
    "gpu_device",
    "validate",
    "copy_checkpoint_freq",
    "continue_from_checkpoint",
    "distributed_backend",
    "model_params.projection_head",
    "optim_params.validate_freq",
    "optim_params.patience",
    "optim_params.num_view_update",
}
OTHERS = ("system", "loss_params.loss", "optim_params.scheduler")

Pairs = tuple[tuple[str, object], ...]  # an object of JSON, in which a key may be repeated


def parse(parser, argv) -> argparse.Namespace:
    """Return the flags of the command line and of the settings file that it names.

    The file is that of --config or the first argument. Typed flags win over it, and so does --demo.
    Raises UsageError for a file that cannot be read or has an unknown key or value.
    """
    args = parser.parse_args(argv)
    path = args.config or args.file
    if path:
        values, dead = read(path, parser)
        if _typed_over(args, values, "method"):
            values.pop("m", None)  # a row's momentum in one method, the key network's in another
        if _typed_over(args, values, "method", "negatives", "anneal"):
            values.pop("exp_name", None)
        parser.set_defaults(**values)
        args = parser.parse_args(argv)
        if dead:
            names = ", ".join(dead)
            print(f"warning: {path}: these keys have no effect here: {names}", file=sys.stderr)
    del args.config, args.file
    _take_gpu_device(args)
    return args


def _typed_over(args, values: dict, *names: str) -> bool:
    """Return whether a typed flag differs from the file's value, or the file has none."""
    return any(name in args.typed and getattr(args, name) != values.get(name) for name in names)


def read(path: str, parser) -> tuple[dict, list[str]]:
    """Return ({destination of a flag: value}, the keys without effect) of a settings file."""
    items = {}
    keys = {*FLAGS, *CHOICES, *DEAD, *OTHERS}
    pairs = list(_flat(_load(path)))
    if ("system", "TransferSystem") in pairs:
        raise UsageError(
            f"{path} has the settings of a transfer evaluation: give the checkpoint to "
            "ring/eval_ring.py with --model_path CHECKPOINT --protocol released"
        )
    for key, value in pairs:
        if key not in keys:
            close = difflib.get_close_matches(key, keys, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UsageError(f"{path}: unknown key {key}{hint}")
        if key in items:
            raise UsageError(f"{path}: {key} is given twice; keep one of the two")
        items[key] = value
    given = {key: value for key, value in items.items() if value is not None}
    values = {}
    for key, flag in FLAGS.items():
        if key in given:
            action = parser._option_string_actions[parser._spelling(f"--{flag}")]
            values[action.dest] = _value(path, key, given[key], action, parser)
    for key, (flag, choice) in CHOICES.items():
        if key in given and _switch(path, key, given[key]):
            values.setdefault(flag, choice)
    if "loss_params.loss" in given:
        method, negatives = _one_of(path, "loss_params.loss", given, LOSSES)
        values.update(method=method, negatives=negatives)
    if "system" in given:
        method = _one_of(path, "system", given, SYSTEMS)
        if values.setdefault("method", method) != method:
            raise UsageError(
                f"{path}: system {given['system']} and loss {given['loss_params.loss']} are of "
                "different methods"
            )
    if "optim_params.scheduler" in items:  # null: none, as published
        values["scheduler"] = _one_of(path, "optim_params.scheduler", items, SCHEDULERS)
    return values, sorted(DEAD & items.keys())


def _load(path: str) -> Pairs:
    """Return the object in a settings file. Raises UsageError where there is none."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file, object_pairs_hook=tuple)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror.lower()}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--config {path}: not a text file") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"{path}: not JSON at {place}: {error.msg.lower()}") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets in brackets
        raise UsageError(f"{path}: settings that Python does not read: {error}") from None
    if not isinstance(content, tuple):
        kind = type(content).__name__
        raise UsageError(f"{path}: settings must be an object {{...}}, not a {kind}")
    return content


def _flat(content: Pairs, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (key, value) of an object and the objects in it, with keys such as "loss_params.k"."""
    for key, value in content:
        if isinstance(value, tuple):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _switch(path: str, key: str, value) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{path}: {key} must be true or false, not {json.dumps(value)}")
    return value


def _one_of(path: str, key: str, values: dict, choices: dict):
    value = values[key]
    if not isinstance(value, (str, type(None))) or value not in choices:
        names = ", ".join(str(choice) for choice in choices if choice)
        raise UsageError(f"{path}: {key} {json.dumps(value)} must be one of {names}")
    return choices[value]


def _value(path: str, key: str, value, action: argparse.Action, parser):
    """Return a value, converted and checked as the flag's own values are."""
    if action.nargs == 0:
        return _switch(path, key, value)
    if isinstance(value, (bool, list)):
        raise UsageError(f"{path}: {key} must be a number or a text, not {json.dumps(value)}")
    if not str(value).isprintable():  # a null byte or half a character, which no path can have
        raise UsageError(f"{path}: {key} has a character that cannot be printed")
    try:
        return parser._get_values(action, [str(value)])
    except argparse.ArgumentError as error:
        raise UsageError(f"{path}: {key}: {error.message}") from None


def _take_gpu_device(args) -> None:
    """Turn --gpu-device into the flags that all scripts have."""
    given = args.gpu_device
    if given == "cpu":
        args.device = "cpu"
    elif given is not None and args.device != "cpu":
        if not given.isdecimal():
            raise UsageError(
                f"--gpu-device {given} must be a number or cpu; for several GPUs give "
                "--multiprocessing-distributed"
            )
        args.gpu = int(given)
