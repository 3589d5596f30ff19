"""--config: the settings files of mhw32/contrastive-ring-public (config/pretrain/*/*.json at fb3e1c2), as flags.

Every key of those files is known. What has no effect there has none here, and is named once; what the published code
ignored by mistake (`exponential_anneal`, a false `dynamic_inner`, `logsumexp_inner` or `self_negative`) counts here. Missing
keys and null mean the default. A key that is not known is an error: it would be a setting that is silently not made.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Iterator

from common import UsageError
from ring import thresholds

FLAGS = {  # key: flag
    "exp_base": "exp_base", "exp_name": "exp_name", "seed": "seed", "data_loader_workers": "workers",
    "num_epochs": "epochs", "shuffle_bn": "shuffle_bn", "data_params.root": "root", "data_params.dataset": "dataset",
    "model_params.out_dim": "out_dim", "model_params.resnet_version": "resnet_version",
    "model_params.conv3x3": "conv3x3", "loss_params.k": "k", "loss_params.t": "t", "loss_params.m": "m",
    "loss_params.thres_outer": "thres_outer", "loss_params.thres_inner": "thres_inner",
    "loss_params.dynamic_inner": "dynamic_inner", "loss_params.neighbor_views": "neighbor_views",
    "loss_params.logsumexp_inner": "logsumexp_inner", "loss_params.self_negative": "self_negative",
    "loss_params.max_anneal_epoch": "max_anneal_epoch", "optim_params.batch_size": "batch_size",
    "optim_params.learning_rate": "learning_rate", "optim_params.momentum": "momentum",
    "optim_params.weight_decay": "weight_decay",
}  # fmt: skip
CHOICES = {  # key of a switch: what it chooses where it is true. Of several, the first one here, as published
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
METHODS = {"NCE": "ir", "MoCo": "moco", "CMC": "cmc"}  # CMC: this project's own, named like the others
LOSSES = {f"{m}{n}": (METHODS[m], n.lower() or "all") for m in METHODS for n in ("", "Ball", "Ring")}
SYSTEMS = {f"Pretrain{name}System": method for name, method in METHODS.items()}
DEAD = {
    "cuda", "gpu_device", "validate", "copy_checkpoint_freq", "continue_from_checkpoint", "distributed_backend",
    "model_params.projection_head", "optim_params.validate_freq", "optim_params.patience", "optim_params.num_view_update",
}  # fmt: skip
OTHERS = ("system", "loss_params.loss", "optim_params.scheduler")


def parse(parser, argv) -> argparse.Namespace:
    """The flags of the command line, and below them those of the file that --config or the first argument names.

    What is typed beats the file, and so does --demo. UsageError for a file that cannot be read, or says what is not known.
    """
    args = parser.parse_args(argv)
    if path := args.config or args.file:
        values, dead = read(path, parser)
        parser.set_defaults(**values)
        args = parser.parse_args(argv)
        if dead:
            print(f"warning: {path}: without effect, as in the published code: {', '.join(dead)}", file=sys.stderr)
    del args.config, args.file
    _take_gpu_device(args)
    return args


def read(path: str, parser) -> tuple[dict, list[str]]:
    """({destination of a flag: value}, the keys without effect) of a settings file."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror.lower()}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--config {path}: not a text file") from None
    except json.JSONDecodeError as error:
        raise UsageError(
            f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg.lower()}"
        ) from None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: settings are an object {{...}}, not a {type(content).__name__}")
    items = dict(_flat(content))
    known = {*FLAGS, *CHOICES, *DEAD, *OTHERS}
    for key in items:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            raise UsageError(f"{path}: unknown key {key}" + (f"; did you mean {close[0]}?" if close else ""))
    set_keys = {key: value for key, value in items.items() if value is not None}
    values = {}
    for key, flag in FLAGS.items():
        if key in set_keys:
            action = parser._option_string_actions[parser._spelling(f"--{flag}")]
            values[action.dest] = _value(path, key, set_keys[key], action, parser)
    for key, (flag, choice) in CHOICES.items():
        if key in set_keys and _switch(path, key, set_keys[key]):
            values.setdefault(flag, choice)
    if "loss_params.loss" in set_keys:
        values |= zip(("method", "negatives"), _one_of(path, "loss_params.loss", set_keys, LOSSES))
    if "system" in set_keys:
        method = _one_of(path, "system", set_keys, SYSTEMS)
        if values.setdefault("method", method) != method:
            raise UsageError(
                f"{path}: system {set_keys['system']} and loss {set_keys['loss_params.loss']} do not go together"
            )
    if "optim_params.scheduler" in items:  # null: none, as published
        schedulers = {"MoCoLRScheduler": "MoCoLRScheduler", None: "none"}
        values["scheduler"] = _one_of(path, "optim_params.scheduler", items, schedulers)
    return values, sorted(DEAD & items.keys())


def _flat(content: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _switch(path: str, key: str, value) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{path}: {key} is true or false, not {json.dumps(value)}")
    return value


def _one_of(path: str, key: str, values: dict, choices: dict):
    value = values[key]
    if not isinstance(value, (str, type(None))) or value not in choices:
        raise UsageError(f"{path}: {key} {json.dumps(value)}: there are {', '.join(str(c) for c in choices if c)}")
    return choices[value]


def _value(path: str, key: str, value, action: argparse.Action, parser):
    """The value as the flag would have it: the same type, choices and bounds."""
    if action.nargs == 0:
        return _switch(path, key, value)
    if isinstance(value, (bool, list, dict)):
        raise UsageError(f"{path}: {key} is a number or a text, not {json.dumps(value)}")
    try:
        return parser._get_values(action, [str(value)])
    except argparse.ArgumentError as error:
        raise UsageError(f"{path}: {key}: {error.message}") from None


def _take_gpu_device(args) -> None:
    """--gpu-device as the other flags say it."""
    given = args.gpu_device
    if given == "cpu":
        args.device = "cpu"
    elif given is not None and args.device != "cpu":
        if not given.isdecimal():
            raise UsageError(f"--gpu-device {given}: a number, or cpu; several GPUs: --multiprocessing-distributed")
        args.gpu = int(given)


def check(args) -> None:
    """Combinations of flags that mean nothing, or that nothing could be learned with: UsageError."""
    of = {"ball_bank_size": "ir", "view": "cmc", "shuffle_bn": "moco"}
    for flag in of.keys() & args.typed:
        if of[flag] != args.method:
            raise UsageError(f"--{flag.replace('_', '-')} belongs to --method {of[flag]}, or omit it")
    if args.all_ring and args.method == "moco":
        raise UsageError("--all-ring: MoCo always compares with the whole ring; omit it")
    least = args.thres_outer if args.anneal == "constant" else thresholds.END
    if args.negatives == "ring" and args.thres_inner >= (1 if args.dynamic_inner else least):
        what = "1, all of the ball" if args.dynamic_inner else f"the outer threshold {least}"
        raise UsageError(
            f"--thres-inner {args.thres_inner} must be less than {what}: nothing would be left in the ring"
        )
    if args.neighbor_views and (args.negatives == "all" or args.thres_inner == 0):
        raise UsageError("--neighbor-views needs an inner cut: --negatives ring (or ball) and a --thres-inner above 0")
    if args.anneal != "constant" and args.negatives == "all":
        raise UsageError(f"--anneal {args.anneal}: with --negatives all there is no threshold; omit one of the two")
    if args.anneal == "accuracy" and (args.knn_every or not args.nn_every):
        raise UsageError("--anneal accuracy follows --nn-every 1, without --knn-every, before which epochs are kept")
    if args.method == "moco" and args.k % args.batch_size:
        raise UsageError(f"--k {args.k}: a queue must be a multiple of the global batch {args.batch_size}")
