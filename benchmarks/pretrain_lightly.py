"""Images per second of MoCo-v2 pre-training: this project, and lightly with its own loader.

    python benchmarks/pretrain_lightly.py --data CIFAR_TREE    # default: generated pictures

ResNet-18 (standard stem), 32 pixels, batch 256, queue 4096, MoCo-v2 augmentation and head on both
sides, on the CPU or one GPU.
ours          nonsem_neg/moco_non_sem_neg.py --robust none, its own loop and loader, with
              --bn-splits 1: the same network, batch-norm and precision (float32) as the other side.
              "default" has 8 batch-norm groups and shuffled keys, as MoCo on 8 GPUs; "bfloat16" is
              the default with --amp.
lightly       the pieces of its MoCo example, from its public package: MoCoV2Transform,
              LightlyDataset, a DataLoader with workers, MoCoProjectionHead, update_momentum,
              NTXentLoss with a memory bank. Plain batch-norm, float32, as in that example; its
              workers persist over epochs.
floor         "ours" on fixed views: no loading, no augmentation. What is left is the network
              (network_alone.py has all train scripts).

Sides alternate; each repeat is a process of its own (so its peak memory can be told), warm before
the clock runs. The once-per-run decoding of the pictures into memory is told apart. Ends with 1 if
a ratio misses its aim.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import side_by_side
from benchmarks.network_alone import measure
from benchmarks.side_by_side import alternate, peak, pictures, ratios, seconds

BATCH = 256
QUEUE = 4096
FLAGS = (
    f"-a resnet18 --input-res 32 -b {BATCH} --moco-k {QUEUE} --moco-t 0.2 --mlp --aug-plus "
    "--robust none --seed 0 --print-freq 1000000 --epochs 1"
)
SIDES = {  # further flags; None: of another program
    "ours": "--bn-splits 1",
    "lightly": None,
    "default": "",
    "bfloat16": "--amp",
    "floor": "--bn-splits 1",
}


def ours(tree: str, steps: int, workers: int, side: str) -> dict:
    """Return the result of a side of this project."""
    flags = f"{FLAGS} -j {workers} {SIDES[side]}".split()
    result = measure("nonsem_neg.moco_non_sem_neg", tree, flags, steps, side == "floor")
    result["precision"] = "bfloat16 autocast" if side == "bfloat16" else "float32"
    return result


def lightly(tree: str, steps: int, workers: int) -> dict:
    """Return the result of lightly's side."""
    import torchvision
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform
    from lightly.utils.scheduler import cosine_schedule

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layers = list(torchvision.models.resnet18().children())[:-1]
    backbone = torch.nn.Sequential(*layers).to(device)
    head = MoCoProjectionHead(512, 512, 128).to(device)
    backbone_k = copy.deepcopy(backbone)
    head_k = copy.deepcopy(head)
    deactivate_requires_grad(backbone_k)
    deactivate_requires_grad(head_k)
    began = time.perf_counter()
    transform = MoCoV2Transform(input_size=32)
    dataset = LightlyDataset(os.path.join(tree, "train"), transform=transform)
    loading = time.perf_counter() - began
    loader = torch.utils.data.DataLoader(
        dataset,
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    criterion = NTXentLoss(memory_bank_size=(QUEUE, 128))
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.06)

    def step(batch):
        (x_query, x_key), _, _ = batch
        m = cosine_schedule(0, 10, 0.996, 1)
        update_momentum(backbone, backbone_k, m=m)
        update_momentum(head, head_k, m=m)
        query = head(backbone(x_query.to(device)).flatten(start_dim=1))
        with torch.no_grad():
            key = head_k(backbone_k(x_key.to(device)).flatten(start_dim=1))
        loss = criterion(query, key)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"rate": BATCH * steps / seconds(step, loader, steps, device), "loading": loading}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    side_by_side.add_arguments(parser)
    about = "loader processes of lightly; decoding threads here"
    parser.add_argument("--workers", type=int, default=2, help=about)
    parser.add_argument("--at-least", type=float, default=1.8, help="aim: times lightly")
    about = "aim: share of a step; default .12, on a GPU .02"
    default = 0.02 if torch.cuda.is_available() else 0.12
    parser.add_argument("--views-at-most", type=float, default=default, help=about)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.side:
        measured = (args.data, args.steps, args.workers)
        if args.side == "lightly":
            result = lightly(*measured)
        else:
            result = ours(*measured, args.side)
        print(json.dumps({**result, "peak": peak()}))
        return 0
    with pictures(args) as tree:
        results = alternate(__file__, SIDES, tree, args)
    for side in ("default", "bfloat16"):
        ratio = statistics.median(ratios(results, side, "lightly"))
        print(f"ratio of {side} to lightly {ratio:.2f}")
    own = ratios(results, "ours", "lightly")
    ratio = statistics.median(own)
    views = statistics.median(result["views"] for result in results["ours"])
    spread = f"{min(own):.2f} to {max(own):.2f}"
    print(f"ratio of ours to lightly {ratio:.2f} ({spread}), aim {args.at_least}")
    aim = f"aim under {args.views_at_most:.0%}"
    print(f"share of a step that makes views (and waits for data): {views:.1%}, {aim}")
    return int(ratio < args.at_least or views > args.views_at_most)


if __name__ == "__main__":
    sys.exit(main())
