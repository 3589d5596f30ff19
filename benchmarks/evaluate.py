"""What tools/evaluate.py costs beside the embedding, and the memory of its k-NN, on 50,000 and 10,000 pictures of 32 pixels.

    python benchmarks/evaluate.py                       # a share of generated pictures embedded, features drawn at random
    python benchmarks/evaluate.py --data CIFAR_TREE     # the tool itself on a tree with train/ and val/

ResNet-18 with random weights and its usual stem (the 3x3 stem takes fourteen times as long to embed), two views, 60 epochs of
12 rates, three shares of the labels: the tool's defaults.
Without --data a twentieth of the pictures is generated and embedded, and the seconds are multiplied; everything else is what
the tool does with features (N, 512), here random ones.

Aims: everything but the embedding takes under 30 % of it; k-NN of 50,000 x 10,000 needs under 500 MB beside the features (by
the peak of a process of its own). The exit code is the number of aims missed.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.side_by_side import generate, in_a_process
from common import augment, backbones, launch, metrics
from common.options import plain_view
from tools import evaluate

TRAIN, VAL, DIM, CLASSES, PARTS = 50_000, 10_000, 512, 10, 20
SHARE, MEGABYTES = 0.3, 500


def random_features(count: int, seed: int) -> torch.Tensor:
    """(count, DIM): not negative, as after a ReLU; made in place."""
    return torch.empty(count, DIM).normal_(generator=torch.Generator().manual_seed(seed)).clamp_(min=0)


def memory_of_knn() -> dict:
    bank, val = random_features(TRAIN, 0), random_features(VAL, 1)
    targets = torch.arange(TRAIN) % CLASSES
    metrics.knn(bank[:999], targets[:999], val[:99], targets[:99], CLASSES)  # loads what it loads
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    metrics.knn(bank, targets, val, targets[:VAL], CLASSES, chunk_elements=evaluate.KNN_ELEMENTS)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"megabytes": (after - before) * 1024 / 1e6, "seconds": time.perf_counter() - began}


def network(folder: str) -> str:
    torch.manual_seed(0)
    path = os.path.join(folder, "net.pth")
    torch.save(backbones.build("resnet18", 0).state_dict(), path)
    return path


def the_tool(tree: str, folder: str) -> tuple[float, dict]:
    """Seconds of the embedding, and of everything else, as tools/evaluate.py tells them."""
    out = os.path.join(folder, "evaluation")
    evaluate.main([network(folder), tree, "--input-res", "32", "--out", out, "--device", "cpu"])
    result = json.loads(Path(out, "result.json").read_text())
    return result["embedding_seconds"], result["seconds"]


def in_parts(folder: str) -> tuple[float, dict]:
    """The same from a share of the pictures and from random features."""
    tree = generate(Path(folder) / "pictures", TRAIN // PARTS)
    flags = [network(folder), str(tree), "--input-res", "32", "--device", "cpu"]
    args, process = evaluate.parse_args(flags), launch.Process()
    backbone, operations, _ = evaluate.open_backbone(args.checkpoint, process.device)
    pictures = evaluate.options.open_split(args, "train")
    crop, flip = augment.RandomResizedCrop(args.input_res), augment.RandomHorizontalFlip()
    began = time.perf_counter()
    views = augment.Compose(crop, flip, *operations)
    evaluate.embed_split(args, process, pictures, views, backbone, args.views, "views")
    middle = time.perf_counter()
    evaluate.embed_split(args, process, pictures, plain_view(args, *operations), backbone, 1, "as it is")
    end = time.perf_counter()
    embedding = PARTS * (middle - began + (1 + VAL / TRAIN) * (end - middle))
    seen = torch.stack([random_features(TRAIN, seed) for seed in range(args.views)])
    targets = torch.arange(TRAIN) % CLASSES
    bank, val = random_features(TRAIN, 10), random_features(VAL, 11)
    result, _ = evaluate.judge(args, seen, targets, bank, val, targets[:VAL], CLASSES)
    return embedding, result["seconds"]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", help="tree with train/CLASS/* and val/CLASS/* of 32-pixel pictures (CIFAR-10 as files)"
    )
    parser.add_argument("--knn", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.knn:
        print(json.dumps(memory_of_knn()))
        return 0
    found = in_a_process(__file__, "--knn")
    with tempfile.TemporaryDirectory() as folder:
        embedding, others = the_tool(args.data, folder) if args.data else in_parts(folder)
    total = sum(others.values())
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"\n{threads}; " + (args.data or f"embedding measured on 1/{PARTS} of generated pictures and multiplied"))
    print(f"embedding        {embedding:7.1f} s")
    for what, seconds in others.items():
        print(f"{what:16} {seconds:7.1f} s  {seconds / embedding:6.1%}")
    print(f"all but embedding {total:6.1f} s  {total / embedding:6.1%} of it, aim under {SHARE:.0%}")
    print(f"k-NN of {TRAIN} x {VAL}: {found['megabytes']:.0f} MB beside the features, aim under {MEGABYTES}")
    return int(total >= SHARE * embedding) + int(found["megabytes"] >= MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
