"""Hand a backbone to other programs: `python tools/export.py CKPT --to torchvision|timm|detectron2|safetensors`.

Runs from any working directory and takes a checkpoint of any layout that `common.checkpoint.backbone` knows; the projection
head or classifier stays behind.
"""

import pickle
import re
import sys
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import early

early.answer(__name__)  # a mistyped flag, --help and Ctrl-C, before torch is imported

import torch

from common import UsageError, UserError, checkpoint, cli

SUFFIX = {"torchvision": ".pth", "timm": ".pth", "detectron2": ".pkl", "safetensors": ".safetensors"}


def main(argv=None) -> None:
    parser = cli.Parser(prog="export.py", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="pre-training or linear-evaluation checkpoint")
    parser.add_argument("--to", choices=list(SUFFIX), required=True)
    parser.add_argument("--out", default=None, help="file to write; default: beside the checkpoint, named after --to")
    parser.add_argument("--tower", default=None, help="of a two-tower checkpoint, the tower to export (e.g. l_to_ab)")
    args = parser.parse_args(argv)
    state = checkpoint.without_head(one_tower(checkpoint.backbone(checkpoint.load(args.checkpoint)), args.tower))
    state = {k: v.contiguous() for k, v in state.items()}
    out = Path(args.out or str(Path(args.checkpoint)).split(".pth")[0] + f"_{args.to}{SUFFIX[args.to]}")
    try:
        with checkpoint.replacing(out) as file:
            write(state, file, args.to)
    except (OSError, RuntimeError) as error:  # torch.save wraps what the disk says
        raise UserError(
            f"cannot write {out}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}"
        ) from None
    print(f"{out}: {len(state)} tensors, {sum(v.numel() for v in state.values()) / 1e6:.2f} M numbers")


def one_tower(state: dict, tower: str | None) -> dict:
    towers = sorted({k.partition(".")[0] for k in state if re.match(r"\w+\.(conv1|conv_block_1)\.", k)})
    if not towers:
        return state
    if tower not in towers:
        raise UsageError(f"this checkpoint has the towers {' and '.join(towers)}: choose one with --tower")
    return {k.removeprefix(f"{tower}."): v for k, v in state.items() if k.startswith(f"{tower}.")}


def write(state: dict, file: BinaryIO, to: str) -> None:
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
