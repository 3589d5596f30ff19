"""Hand a backbone to other programs: `python tools/export.py CKPT --to torchvision|timm|detectron2|safetensors`.

Runs from any working directory and takes a run folder or a checkpoint of any layout that `common.checkpoint.backbone` knows;
the projection head or classifier stays behind. The last line it prints loads the file, strictly. What a program cannot
load is refused with the reason.
"""

import pickle
import re
import sys
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


import common  # isort: split

import torch
import torchvision

from common import UsageError, UserError, backbones, cli, files, printable
from runner import checkpoint, layouts

SUFFIX = {"torchvision": ".pth", "timm": ".pth", "detectron2": ".pkl", "safetensors": ".safetensors"}
ANYWAY = "--to safetensors takes the tensors as they are"


def main(argv=None) -> None:
    parser = cli.Parser(prog="export.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="pre-training or linear-evaluation checkpoint, or a run folder: its newest")
    parser.add_argument("--to", choices=list(SUFFIX), required=True)
    parser.add_argument("--out", default=None, help="file to write; default: beside the checkpoint, named after --to")
    parser.add_argument(
        "--ema", action="store_true", help="the key encoder of a checkpoint with model_ema, not the query"
    )
    parser.add_argument("--tower", default=None, help="of a checkpoint of several towers, the one to export (l_to_ab)")
    args = parser.parse_args(argv)
    path = find(Path(args.checkpoint))
    saved = checkpoint.load(path)
    if "classifier" in saved:
        raise UserError(
            f"{path} is a classifier without its network; export that: {saved.get('network', 'see its opt')}"
        )
    if args.ema and not isinstance(saved.get("model_ema"), dict):
        raise UsageError(f"{path} has no model_ema: omit --ema")
    state = layouts.backbone({"model": saved["model_ema"]} if args.ema else saved)
    names = layouts.towers(state)
    if args.tower not in names and (args.tower or names):
        choose = f"has the towers {' and '.join(names)}: choose one with" if names else "is one network: omit"
        if names and not args.tower:  # say first whether there is anything to choose
            recipe(layouts.one_tower(state, names[0]), saved, args.to, "")
        raise UsageError(f"this checkpoint {choose} --tower")
    state = layouts.one_tower(state, args.tower) if args.tower else layouts.without_head(state)
    out = Path(args.out or path.parent)
    if out.is_dir():  # a name that no run takes for its own checkpoint
        stem = re.split(r"\.pth|\.ckpt", path.name)[0]
        out /= "_".join([args.to, *filter(None, [args.tower]), stem]) + SUFFIX[args.to]
    line = recipe(state, saved, args.to, str(out))
    try:
        with files.replacing(out) as file:
            write(state, file, args.to)
    except (OSError, RuntimeError) as error:  # torch.save wraps what the disk says
        raise UserError(
            f"cannot write {out}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}"
        ) from None
    print(f"{path} -> {out}: {len(state)} tensors, {sum(v.numel() for v in state.values()) / 1e6:.2f} M numbers")
    print(f"to load it:\n{line}")


def find(path: Path) -> Path:
    """A checkpoint, or the newest of a run folder, or of the folders in it: of a pre-training where there is one."""
    if not path.is_dir():
        return path
    found = layouts.newest(path) or layouts.newest(path, ("checkpoint_robust_*.pth.tar", "*[0-9].pth"))
    found = found or layouts.newest_below(path)
    if found is None:
        raise UsageError(f"{printable(path)}: no checkpoint in this folder; give a run folder or a checkpoint file")
    return found


def recipe(state: dict, saved: dict, to: str, out: str) -> str:
    """The line of Python that loads the file, strictly. UserError with the reason where there is none."""
    if to == "safetensors":
        return f"from safetensors.torch import load_file; state = load_file({out!r})"
    name, model = like_torchvision(state, saved, to)
    first, changes = state.get("conv1.weight"), []
    resnet = isinstance(model, torchvision.models.ResNet)
    channels = first.shape[1] if resnet else 3
    if resnet and first.shape != model.conv1.weight.shape:
        small = first.shape[-1] == 3
        shape = f"{channels}, {len(first)}, " + ("3, 1, 1" if small else "7, 2, 3")
        changes += [f"model.conv1 = torch.nn.Conv2d({shape}, bias=False)"] * (small or to != "timm")
        changes += ["model.maxpool = torch.nn.Identity()"] * small
    if to == "detectron2":
        return detectron2_settings(state, name, changes, out)
    load = f"model.load_state_dict(torch.load({out!r}, weights_only=True))"
    if to == "timm":
        if not resnet:
            raise UserError(f"timm has other parameter names than torchvision for {name}; {ANYWAY}")
        own = f", in_chans={channels}" * (channels != 3)
        return "; ".join(
            ["import timm, torch", f"model = timm.create_model({name!r}, num_classes=0{own})", *changes, load]
        )
    extra = "aux_logits=False, init_weights=False" * (name in ("googlenet", "inception_v3"))
    model = f"model = torchvision.models.{name}({extra})"
    return "; ".join(["import torch, torchvision", model, "model.fc = torch.nn.Identity()", *changes, load])


def like_torchvision(state: dict, saved: dict, to: str):
    """(name, network on no device) of torchvision whose layers, the first convolution aside, are those of `state`.

    Counters that PyTorch before 0.4.1 did not have are added to `state`. UserError where there is none such.
    """
    if "conv_block_1.0.weight" in state:
        raise UserError(f"this is half an AlexNet with batch-norm: {to} has no network with its layers; {ANYWAY}")
    said = saved.get("arch")
    depths = [f"resnet{depth}" for depth in backbones.BLOCKS]
    depths += ["resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"]
    names = [said] if said in torchvision.models.list_models(module=torchvision.models) else depths
    reasons = []
    for name in names:
        with torch.device("meta"):
            model = backbones.build(name, 0)
        wanted = model.state_dict()
        if blocks(state) != blocks(wanted):
            continue
        counters = {k: torch.tensor(0) for k in wanted.keys() - state.keys() if k.endswith("num_batches_tracked")}
        differing = [k for k in wanted if k in state and k != "conv1.weight" and state[k].shape != wanted[k].shape]
        if not differing and (state.keys() | counters) == wanted.keys():
            state.update(counters)
            return name, model
        reasons.append(difference(state, wanted, name, differing))
    why = reasons[0] if reasons else f"its layers are not those of {' or '.join(names)}"
    raise UserError(f"{to} cannot load this network: {why}; {ANYWAY}")


def blocks(state: dict) -> set[str]:
    """Names of the parameters that depend on the number and kind of blocks alone, not on their width."""
    return {k for k in state if "downsample" not in k and not k.endswith("num_batches_tracked")}


def difference(state: dict, wanted: dict, name: str, differing: list[str]) -> str:
    key = (differing or sorted(state.keys() ^ wanted.keys()))[0]
    what = f"{key} is {tuple(state[key].shape) if key in state else 'not there'}, unlike that of {name}"
    if key.startswith("layer") and key in state and key in wanted and len(state[key]) != len(wanted[key]):
        what = f"its stages are {len(state[key]) / len(wanted[key]):g} times as wide as those of {name}"
    channels = state["conv1.weight"].shape[1] if "conv1.weight" in state else 3
    plural = "s" * (channels > 1)
    return what + f", and its first convolution takes {channels} channel{plural} instead of 3" * (channels != 3)


def detectron2_settings(state: dict, name: str, changes: list, out: str) -> str:
    """Lines of a detectron2 configuration, joined; the pixel statistics are ImageNet's, as the networks here have them."""
    depth = re.search(r"\d+", name)
    if not name.startswith(("resnet", "resnext", "wide_resnet")) or changes:
        raise UserError(
            f"detectron2 cannot load this network: its ResNets have a 7x7 first convolution on RGB; {ANYWAY}"
        )
    settings = [f"WEIGHTS = {out!r}", f"RESNETS.DEPTH = {depth.group()}"]
    if "layer1.0.conv3.weight" in state:  # the stride of a bottleneck is on its 3x3 convolution
        width, per_group = state["layer1.0.conv2.weight"].shape[:2]
        settings += ["RESNETS.STRIDE_IN_1X1 = False"]
        settings += [f"RESNETS.NUM_GROUPS = {width // per_group}"] * (width != per_group)
        settings += [f"RESNETS.WIDTH_PER_GROUP = {per_group}"] * (per_group != 64)
    else:
        settings += ["RESNETS.RES2_OUT_CHANNELS = 64"]
    settings += ["PIXEL_MEAN = [123.675, 116.28, 103.53]", "PIXEL_STD = [58.395, 57.12, 57.375]"]
    return "; ".join([*(f"cfg.MODEL.{s}" for s in settings), 'cfg.INPUT.FORMAT = "RGB"'])


def write(state: dict, file: BinaryIO, to: str) -> None:
    state = {k: v.contiguous() for k, v in state.items()}
    if to == "safetensors":
        from safetensors.torch import save

        file.write(save(state))
    elif to == "detectron2":  # a pickle of NumPy arrays; its own loader adds what is missing
        model = {detectron2_name(k): v.numpy() for k, v in state.items() if not k.endswith("num_batches_tracked")}
        pickle.dump({"model": model, "__author__": "contrastive pre-training", "matching_heuristics": True}, file)
    else:  # timm's ResNets have torchvision's parameter names and accept the same file
        torch.save(state, file)


def detectron2_name(key: str) -> str:
    """layer1.0.downsample.1.weight -> res2.0.shortcut.norm.weight; conv1.weight -> stem.conv1.weight."""
    if not key.startswith("layer"):
        key = "stem." + key
    key = re.sub(r"^layer(\d)", lambda m: f"res{int(m.group(1)) + 1}", key)
    key = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", key)
    return key.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")


if __name__ == "__main__":
    cli.run(main)
