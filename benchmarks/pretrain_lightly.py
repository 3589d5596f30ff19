"""Images per second of MoCo-v2 pre-training on the CPU or one GPU: this project, and lightly with its own loader.

    python benchmarks/pretrain_lightly.py --data CIFAR_TREE       # or without --data: generated 32-pixel pictures

ResNet-18 (standard stem), 32 pixels, batch 256, queue 4096, MoCo-v2 augmentation and head on both sides.
ours          nonsem_neg/moco_non_sem_neg.py --robust none, its own loop and loader, with --bn-splits 1: the same network,
              batch-norm and precision (float32) as the other side. "default" has 8 batch-norm groups and shuffled keys,
              as MoCo on 8 GPUs; "bfloat16" is the default with --amp.
lightly       the pieces of its MoCo example, from its public package: MoCoV2Transform, LightlyDataset, a DataLoader with
              workers, MoCoProjectionHead, update_momentum, NTXentLoss with a memory bank. Plain batch-norm, float32, as in
              that example; its workers persist over epochs.
floor         "ours" on fixed views: no loading, no augmentation. What is left is the network (network_alone.py has all
              train scripts).

Sides alternate; each repeat is a process of its own (so its peak memory can be told), warm before the clock runs.
The once-per-run decoding of the pictures into memory is told apart. Ends with 1 if a ratio misses its aim.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.network_alone import measure
from benchmarks.side_by_side import add_arguments, alternate, peak, pictures, seconds

SIDES = {
    "ours": ["--bn-splits", "1"],
    "lightly": None,
    "default": [],
    "bfloat16": ["--amp"],
    "floor": ["--bn-splits", "1"],
}
BATCH, QUEUE = 256, 4096


def ours(tree: str, steps: int, workers: int, side: str) -> dict:
    flags = (
        f"-a resnet18 --input-res 32 -b {BATCH} --moco-k {QUEUE} --moco-t 0.2 --mlp --aug-plus --robust none --seed 0"
    )
    rest = f"-j {workers} --print-freq 1000000 --epochs 1".split()
    found = measure("nonsem_neg.moco_non_sem_neg", [tree, *flags.split(), *rest, *SIDES[side]], steps, side == "floor")
    return found | {"precision": "bfloat16 autocast" if side == "bfloat16" else "float32"}


def lightly(tree: str, steps: int, workers: int) -> dict:
    import copy

    import torchvision
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform
    from lightly.utils.scheduler import cosine_schedule

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(*list(torchvision.models.resnet18().children())[:-1]).to(device)
    head = MoCoProjectionHead(512, 512, 128).to(device)
    backbone_k, head_k = copy.deepcopy(backbone), copy.deepcopy(head)
    deactivate_requires_grad(backbone_k)
    deactivate_requires_grad(head_k)
    began = time.perf_counter()
    dataset = LightlyDataset(os.path.join(tree, "train"), transform=MoCoV2Transform(input_size=32))
    loading = time.perf_counter() - began
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0
    )
    criterion = NTXentLoss(memory_bank_size=(QUEUE, 128))
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.06)

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


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--workers", type=int, default=2, help="loader processes of lightly; decoding threads here")
    parser.add_argument("--at-least", type=float, default=1.8, help="aim: times lightly")
    parser.add_argument("--views-at-most", type=float, default=None, help="aim: share of a step; 0.12, on a GPU 0.02")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        found = (
            lightly(args.data, args.steps, args.workers)
            if args.side == "lightly"
            else ours(args.data, args.steps, args.workers, args.side)
        )
        print(json.dumps({**found, "peak": peak()}))
        return 0

    with pictures(args) as tree:
        results = alternate(__file__, SIDES, tree, args)
    ratios = [a["rate"] / b["rate"] for a, b in zip(results["ours"], results["lightly"])]
    ratio, views = statistics.median(ratios), statistics.median(f["views"] for f in results["ours"])
    aim = args.views_at_most or (0.02 if torch.cuda.is_available() else 0.12)
    for side in ("default", "bfloat16"):
        other = statistics.median(a["rate"] / b["rate"] for a, b in zip(results[side], results["lightly"]))
        print(f"ratio of {side} to lightly {other:.2f}")
    print(f"ratio of ours to lightly {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), aim {args.at_least}")
    print(f"share of a step that makes views (and waits for data): {views:.1%}, aim under {aim:.0%}")
    return int(ratio < args.at_least or views > aim)


if __name__ == "__main__":
    sys.exit(main())
