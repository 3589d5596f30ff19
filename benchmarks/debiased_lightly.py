"""Images per second of debiased pre-training: this project, and lightly's SimCLR with its loader.

    python benchmarks/debiased_lightly.py --data CIFAR_TREE    # default: generated pictures

ResNet-18 (standard stem), 32 pixels, batch 256, float32 on both sides, on the CPU or one GPU.
ours          debiased/main.py, its own loop and loader, with the published augmentation (blur
              included) and Adam.
lightly       the pieces of its SimCLR example, from its public package: SimCLRTransform without
              blur, LightlyDataset, a DataLoader with workers, SimCLRProjectionHead, NTXentLoss,
              SGD; its workers persist over epochs.
floor         "ours" on fixed views: no loading, no augmentation. What is left is the network.

Sides alternate; each repeat is a process of its own, warm before the clock runs. Ends with 1 if a
ratio misses its aim.
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

from benchmarks import side_by_side
from benchmarks.network_alone import SCRIPTS, measure
from benchmarks.side_by_side import alternate, peak, pictures, ratios, seconds

SIDES = ("ours", "lightly", "floor")
BATCH = 256


def ours(tree: str, steps: int, workers: int, side: str) -> dict:
    """Return the result of a side of this project."""
    module, flags = SCRIPTS["debiased"]
    return measure(module, tree, [*flags.split(), "-j", str(workers)], steps, side == "floor")


def lightly(tree: str, steps: int, workers: int) -> dict:
    """Return the result of lightly's side."""
    import torchvision
    from lightly.data import LightlyDataset
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from lightly.transforms import SimCLRTransform

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layers = list(torchvision.models.resnet18().children())[:-1]
    head = SimCLRProjectionHead(512, 512, 128)
    model = torch.nn.Sequential(*layers, torch.nn.Flatten(), head).to(device)
    began = time.perf_counter()
    transform = SimCLRTransform(input_size=32, gaussian_blur=0.0)
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
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    def step(batch):
        z0, z1 = (model(view.to(device)) for view in batch[0])
        loss = criterion(z0, z1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"rate": BATCH * steps / seconds(step, loader, steps, device), "loading": loading}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    side_by_side.add_arguments(parser)
    about = "loader processes of lightly; decoding threads here"
    parser.add_argument("--workers", type=int, default=2, help=about)
    parser.add_argument("--at-least", type=float, default=1.5, help="aim: times lightly")
    about = "aim: of the network alone"
    parser.add_argument("--floor-at-least", type=float, default=0.92, help=about)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
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
    missed = False
    for side, aim in (("lightly", args.at_least), ("floor", args.floor_at_least)):
        own = ratios(results, "ours", side)
        ratio = statistics.median(own)
        spread = f"{min(own):.2f} to {max(own):.2f}"
        print(f"ratio of ours to {side} {ratio:.2f} ({spread}), aim {aim}")
        missed = missed or ratio < aim
    views = statistics.median(result["views"] for result in results["ours"])
    print(f"views and waiting {views:.1%} of a step")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
