"""Hand a backbone to other programs.

    python tools/export.py CKPT --to torchvision|timm|detectron2|safetensors

Runs from any working directory and takes a run folder or a checkpoint of any layout that
runner.layouts knows, also of other programs; the projection head or classifier stays behind. It
prints the size and the normalisation of the pictures that the network was trained on, and lastly
the line that loads the file, strictly. What a program cannot load is refused with the reason.
"""

import json
import pickle
import re
import sys
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import safetensors.torch
import torch
import torchvision

from common import UsageError, UserError, backbones, cli, files, printable
from runner import checkpoint, layouts, papers, pretrained
from runner.trunks import name_of
from tools import export_input

SUFFIX = {
    "torchvision": ".pth",
    "timm": ".pth",
    "detectron2": ".pkl",
    "safetensors": ".safetensors",
}
# Lines that build resnet18-small out of torchvision's parts; see backbones.small_resnet.
SMALL_RESNET = """\
import torch, torchvision
class Small(torchvision.models.ResNet):
    def _make_layer(self, block, planes, *rest, **more):
        if planes == 64:
            self.inplanes = {width}
            self.conv1 = torch.nn.Conv2d({channels}, {width}, 3, 2, 1, bias=False)
            self.bn1, self.maxpool = torch.nn.BatchNorm2d({width}), torch.nn.Identity()
        return super()._make_layer(block, planes * {width} // 64, *rest, **more)
model = Small(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2]); """


def parse_args(argv=None):
    parser = cli.Parser(prog="export.py", description=__doc__.splitlines()[0])
    about = "pre-training or linear-evaluation checkpoint, or a run folder: its newest"
    parser.add_argument("checkpoint", help=about)
    about = "program that is to load the file"
    parser.add_argument("--to", choices=list(SUFFIX), required=True, help=about)
    about = "file to write; default: beside the checkpoint, named after --to"
    parser.add_argument("--out", help=about)
    about = "the key encoder of a checkpoint with model_ema, not the query"
    parser.add_argument("--ema", action="store_true", help=about)
    about = "torchvision's name of the network; default: as its shapes or the checkpoint tell"
    parser.add_argument("--arch", help=about)
    about = "safetensors: numbers of 16 bits, in half the space"
    parser.add_argument("--bfloat16", action="store_true", help=about)
    about = "of a checkpoint of several towers, the one to export, as l_to_ab; safetensors: all"
    parser.add_argument("--tower", help=about)
    return cli.freeze(parser.parse_args(argv))


def main(argv=None) -> None:
    args = parse_args(argv)
    path = find(Path(args.checkpoint))
    saved = checkpoint.Saved(path)
    if "classifier" in saved:
        network = saved.get("network", "see its opt")
        raise UserError(f"{path} is a classifier without its network; export that: {network}")
    if args.bfloat16 and args.to != "safetensors":
        raise UsageError(f"--bfloat16 is for --to safetensors: --to {args.to} needs 32 bits")
    if args.ema and not isinstance(saved.get("model_ema"), dict):
        raise UsageError(f"{path} has no model_ema: omit --ema")
    if args.ema:
        saved["model"] = saved["model_ema"]
    with saved.within():
        inside = layouts.backbone(saved)
        state = choose_tower(inside, saved, args)
        out = output_file(args, path)
        if out.exists() and out.samefile(path):
            raise UsageError(f"--out {out} is the checkpoint itself: choose another file")
        trained_on = export_input.sentence(saved, layouts.towers(inside))
        line = recipe(state, saved, args, str(out))
    try:
        with files.replacing(out) as file:
            write(state, file, args, saved.about())
    except (OSError, RuntimeError) as error:  # torch.save wraps what the disk says
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write {out}: {reason}") from None
    millions = sum(value.numel() for value in state.values()) / 1e6
    print(f"{path} -> {out}: {len(state)} tensors, {millions:.2f} M numbers")
    print(f"its input: {trained_on}")
    print(f"to load it:\n{line}")


def find(path: Path) -> Path:
    """Return a checkpoint, or the newest of a run folder or of the run folders in it.

    path: may also be a name in results/weights. A pre-training's is preferred to a linear
    evaluation's. Raises UsageError where there is none.
    """
    if network := pretrained.kept(path):
        return Path(network)
    if not path.is_dir():
        return path
    declared = papers.find().values()
    evaluations = tuple(pattern for paper in declared for pattern in (paper.last, paper.best))
    newest = layouts.newest(path) or layouts.newest(path, evaluations) or layouts.newest_below(path)
    if newest is None:
        raise UsageError(
            f"{printable(path)}: no checkpoint in this folder; give a run folder or a "
            "checkpoint file"
        )
    return newest


def choose_tower(state: dict, saved: checkpoint.Saved, args) -> dict:
    """Return the parameters of the network, of several the one that --tower names, without a head.

    A safetensors file may hold all towers, with their names before the parameters'. Raises
    UsageError where --tower is missing or names none, and UserError where the program would load
    none of the towers.
    """
    names = layouts.towers(state)
    if args.tower in names:
        return layouts.one_tower(state, args.tower)
    if names and args.to == "safetensors" and not args.tower:
        return {
            f"{name}.{key}": value
            for name in names
            for key, value in layouts.one_tower(state, name).items()
        }
    if names and not args.tower:  # say first whether there is anything to choose
        recipe(layouts.one_tower(state, names[0]), saved, args, "")
    if names:
        towers = " and ".join(names)
        raise UsageError(f"this checkpoint has the towers {towers}: choose one with --tower")
    if args.tower:
        raise UsageError("this checkpoint is one network: omit --tower")
    return layouts.without_head(state)


def output_file(args, path: Path) -> Path:
    """Return the file to write: in a folder, a name that no run takes for its own checkpoint."""
    own = Path() if path.parent == checkpoint.KEPT else path.parent
    out = Path(args.out or own)
    if not out.is_dir():
        return out
    parts = [args.to, re.split(r"\.pth|\.ckpt|\.safetensors", path.name)[0]]
    if args.tower:
        parts.insert(1, args.tower)
    parts += [flag for flag in ("ema", "bfloat16") if getattr(args, flag)]
    return out / ("_".join(parts) + SUFFIX[args.to])


# ---------------------------------------------------------------------------------- how to load it


def recipe(state: dict, saved: checkpoint.Saved, args, out: str) -> str:
    """Return the line of Python, or for resnet18-small the lines, that load the file, strictly.

    Raises UserError with the reason where the program has no such network.
    """
    if args.to == "safetensors":
        return f"from safetensors.torch import load_file; state = load_file({out!r})"
    load = f"model.load_state_dict(torch.load({out!r}, weights_only=True))"
    if args.to == "torchvision" and name_without_width(state) == backbones.SMALL:
        width, channels = state["conv1.weight"].shape[:2]
        code = SMALL_RESNET.format(width=width, channels=channels)
        return f"{code}model.fc = torch.nn.Identity(); {load}"
    try:
        name, model = like_torchvision(state, saved, args)
        is_resnet = isinstance(model, torchvision.models.ResNet)
        changes = stem_changes(state["conv1.weight"], model, args.to) if is_resnet else []
        if args.to == "detectron2":
            settings = detectron2_settings(state, name, changes, out)
            mean, std = export_input.pixel_statistics(saved)
            pixels = [f"cfg.MODEL.PIXEL_MEAN = {mean}", f"cfg.MODEL.PIXEL_STD = {std}"]
            return "; ".join([*settings, *pixels, 'cfg.INPUT.FORMAT = "RGB"'])
        if args.to == "timm" and not is_resnet:
            raise Misfit(f"timm has other parameter names than torchvision for {name}")
    except Misfit as reason:
        raise UserError(
            f"{saved.path}: {args.to} cannot load this network: {reason}; "
            "--to safetensors takes the tensors as they are"
        ) from None
    if args.to == "timm":
        channels = state["conv1.weight"].shape[1]
        own = f", in_chans={channels}" if channels != 3 else ""
        model = f"model = timm.create_model({name!r}, num_classes=0{own})"
        return "; ".join(["import timm, torch", model, *changes, load])
    extra = ""
    if name in ("googlenet", "inception_v3"):
        extra = "aux_logits=False, init_weights=False"
    line = f"model = torchvision.models.{name}({extra})"
    no_head = f"model.{head_of(model)} = torch.nn.Identity()"
    return "; ".join(["import torch, torchvision", line, no_head, *changes, load])


class Misfit(Exception):
    """The reason why a program has no network with the layers of a checkpoint."""


def head_of(model: torch.nn.Module) -> str:
    """Return the name of a torchvision network's last layer or layers."""
    return next(head for head in ("fc", "classifier", "head", "heads") if hasattr(model, head))


def stem_changes(stem: torch.Tensor, model: torchvision.models.ResNet, to: str) -> list[str]:
    """Return the lines that give `model` a first convolution with the weights `stem`."""
    if stem.shape == model.conv1.weight.shape:
        return []
    width, channels, side, _ = stem.shape
    is_small = side == 3
    shape = f"{channels}, {width}, " + ("3, 1, 1" if is_small else "7, 2, 3")
    changes = []
    if is_small or to != "timm":  # timm sets the number of channels itself
        changes.append(f"model.conv1 = torch.nn.Conv2d({shape}, bias=False)")
    if is_small:
        changes.append("model.maxpool = torch.nn.Identity()")
    return changes


def like_torchvision(state: dict, saved: checkpoint.Saved, args) -> tuple[str, torch.nn.Module]:
    """Return (name, network on no device) of torchvision with the layers of `state`.

    The first convolution may differ. Counters that PyTorch before 0.4.1 did not have are added to
    `state`. Raises Misfit where there is none such.
    """
    if "conv_block_1.0.weight" in state:
        raise Misfit("this is half an AlexNet with batch-norm")
    name = args.arch or name_without_width(state) or saved.get("arch")
    if not name:
        raise Misfit("the file does not tell which it is: name it with --arch")
    if name == backbones.SMALL:
        raise Misfit(f"{name} is known here alone; --to torchvision prints lines that build it")
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise Misfit(f"torchvision has no {printable(str(name))}")
    with torch.device("meta"):
        model = backbones.build(name)
    setattr(model, head_of(model), torch.nn.Identity())
    wanted = model.state_dict()
    absent = [key for key in wanted.keys() - state.keys() if is_counter(key)]
    shared = [key for key in wanted if key in state and key != "conv1.weight"]
    differing = [key for key in shared if state[key].shape != wanted[key].shape]
    if differing or {*state, *absent} != {*wanted}:
        raise Misfit(difference(state, wanted, name, differing))
    state.update({key: torch.tensor(0) for key in absent})
    return name, model


def name_without_width(state: dict) -> str:
    """Return the name of a residual network as if its stages had the usual width, or ""."""
    return re.sub(r"x[\d.]+$", "", name_of(state) or "")


def is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def difference(state: dict, wanted: dict, name: str, differing: list[str]) -> str:
    """Return in words how `state` differs from torchvision's network `name`."""
    key = (differing or sorted(state.keys() ^ wanted.keys()))[0]
    shape = tuple(state[key].shape) if key in state else "not there"
    text = f"{key} is {shape}, unlike that of {name}"
    is_stage = key.startswith("layer") and key in state and key in wanted
    if is_stage and len(state[key]) != len(wanted[key]):
        factor = len(state[key]) / len(wanted[key])
        text = f"its stages are {factor:g} times as wide as those of {name}"
    channels = state["conv1.weight"].shape[1] if "conv1.weight" in state else 3
    if channels != 3:
        plural = "s" if channels > 1 else ""
        text += f", and its first convolution takes {channels} channel{plural} instead of 3"
    return text


def detectron2_settings(state: dict, name: str, changes: list[str], out: str) -> list[str]:
    """Return the lines of a detectron2 configuration that build the network and load the file."""
    depth = re.search(r"\d+", name)
    if not name.startswith(("resnet", "resnext", "wide_resnet")) or changes:
        raise Misfit("its ResNets have a 7x7 first convolution on RGB")
    settings = [f"WEIGHTS = {out!r}", f"RESNETS.DEPTH = {depth.group()}"]
    if "layer1.0.conv3.weight" in state:
        width, per_group = state["layer1.0.conv2.weight"].shape[:2]
        # The stride of a bottleneck is on its 3x3 convolution.
        settings.append("RESNETS.STRIDE_IN_1X1 = False")
        if width != per_group:
            settings.append(f"RESNETS.NUM_GROUPS = {width // per_group}")
        if per_group != 64:
            settings.append(f"RESNETS.WIDTH_PER_GROUP = {per_group}")
    else:
        settings.append("RESNETS.RES2_OUT_CHANNELS = 64")
    return [f"cfg.MODEL.{setting}" for setting in settings]


# ------------------------------------------------------------------------------------- the file


def write(state: dict, file: BinaryIO, args, about: dict) -> None:
    """Write the tensors in the format of a program; a safetensors file also holds `about`."""
    state = {key: value.contiguous() for key, value in state.items()}
    if args.to == "safetensors":
        if args.bfloat16:
            state = {key: in_16_bits(value) for key, value in state.items()}
        about = json.dumps(about, default=str)
        file.write(safetensors.torch.save(state, {checkpoint.ABOUT: about}))
    elif args.to == "detectron2":  # a pickle of float32 arrays; its own loader adds what is missing
        arrays = {
            detectron2_name(key): value.float().numpy()
            for key, value in state.items()
            if not is_counter(key)
        }
        content = {
            "model": arrays,
            "__author__": "contrastive pre-training",
            "matching_heuristics": True,
        }
        pickle.dump(content, file)
    else:  # timm's ResNets have torchvision's parameter names and accept the same file
        torch.save(state, file)


def in_16_bits(value: torch.Tensor) -> torch.Tensor:
    """Return real numbers in bfloat16, and others as they are."""
    return value.bfloat16() if value.is_floating_point() else value


def detectron2_name(key: str) -> str:
    """Return detectron2's name of a parameter.

    layer1.0.downsample.1.weight is res2.0.shortcut.norm.weight, conv1.weight is stem.conv1.weight.
    """
    if not key.startswith("layer"):
        key = "stem." + key
    key = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", key)
    key = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", key)
    return key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


if __name__ == "__main__":
    cli.run(main)
