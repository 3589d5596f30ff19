"""Images per second of debiased pre-training on the CPU or one GPU: this project, and lightly's SimCLR with its own loader.

    python benchmarks/debiased_lightly.py --data CIFAR_TREE       # or without --data: generated 32-pixel pictures

ResNet-18 (standard stem), 32 pixels, batch 256, float32 on both sides.
ours          debiased/main.py, its own loop and loader, with the published augmentation (blur included) and Adam.
lightly       the pieces of its SimCLR example, from its public package: SimCLRTransform without blur, LightlyDataset, a
              DataLoader with workers, SimCLRProjectionHead, NTXentLoss, SGD; its workers persist over epochs.
floor         "ours" on fixed views: no loading, no augmentation. What is left is the network.

Sides alternate; each repeat is a process of its own, warm before the clock runs. Ends with 1 if a ratio misses its aim.
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

from benchmarks.network_alone import SCRIPTS, measure
from benchmarks.side_by_side import add_arguments, alternate, peak, pictures, seconds

SIDES = ("ours", "lightly", "floor")
BATCH = 256


def ours(tree: str, steps: int, workers: int, side: str) -> dict:
    module, flag, flags = SCRIPTS["debiased"]
    return measure(module, [*flag, tree, *flags.split(), "-j", str(workers)], steps, side == "floor")


def lightly(tree: str, steps: int, workers: int) -> dict:
    import torchvision
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
    head = SimCLRProjectionHead(512, 512, 128)
    model = torch.nn.Sequential(backbone, torch.nn.Flatten(), head).to(device)
    began = time.perf_counter()
    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
    dataset = LightlyDataset(os.path.join(tree, "train"), transform=transform)
    loading = time.perf_counter() - began
    how = dict(shuffle=True, drop_last=True, num_workers=workers, persistent_workers=workers > 0)
    loader = torch.utils.data.DataLoader(dataset, BATCH, **how)
    criterion, optimizer = NTXentLoss(), torch.optim.SGD(model.parameters(), lr=0.06)

    def step(batch):
        z0, z1 = (model(view.to(device)) for view in batch[0])
        loss = criterion(z0, z1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"rate": BATCH * steps / seconds(step, loader, steps, device), "loading": loading}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--workers", type=int, default=2, help="loader processes of lightly; decoding threads here")
    parser.add_argument("--at-least", type=float, default=1.5, help="aim: times lightly")
    parser.add_argument("--floor-at-least", type=float, default=0.92, help="aim: of the network alone")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.side:
        how = args.data, args.steps, args.workers
        found = lightly(*how) if args.side == "lightly" else ours(*how, args.side)
        print(json.dumps({**found, "peak": peak()}))
        return 0

    with pictures(args) as tree:
        results = alternate(__file__, SIDES, tree, args)
    missed = 0
    for side, aim in (("lightly", args.at_least), ("floor", args.floor_at_least)):
        ratios = [a["rate"] / b["rate"] for a, b in zip(results["ours"], results[side])]
        ratio = statistics.median(ratios)
        print(f"ratio of ours to {side} {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), aim {aim}")
        missed |= ratio < aim
    views = statistics.median(f["views"] for f in results["ours"])
    print(f"views and waiting {views:.1%} of a step")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
