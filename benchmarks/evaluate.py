"""Measure how long tools/evaluate.py takes beside the embedding, and the memory of its k-NN.

    python benchmarks/evaluate.py                       # a share of generated pictures is embedded
    python benchmarks/evaluate.py --data CIFAR_TREE     # the tool on a tree with train/ and val/

On 50,000 and 10,000 pictures of 32 pixels; ResNet-18 with random weights and its usual stem (the
3x3 stem takes fourteen times as long to embed), two views, 60 epochs of 12 rates, three shares of
the labels: the tool's defaults. Without --data a twentieth of the pictures is generated and
embedded, and the seconds are multiplied; everything else is what the tool does with features (N,
512), here random ones.

Aims: everything but the embedding takes under 30 % of it; k-NN of 50,000 x 10,000 needs under 500
MB beside the features (by the peak of a process of its own). The exit code is the number of aims
missed.
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
from common import augment, backbones, inputs, launch, metrics
from tools import evaluate, probes

TRAIN = 50_000
VAL = 10_000
DIM = 512
CLASSES = 10
PARTS = 20  # one of them is embedded
SHARE = 0.3
MEGABYTES = 500


def random_features(count: int, seed: int) -> torch.Tensor:
    """Return (count, DIM) numbers that are not negative, as after a ReLU; made in place."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(count, DIM).normal_(generator=generator).clamp_(min=0)


def memory_of_knn() -> dict:
    """Return the megabytes and seconds of a k-NN beside its features."""
    bank = random_features(TRAIN, 0)
    val = random_features(VAL, 1)
    targets = torch.arange(TRAIN) % CLASSES
    metrics.knn(bank[:999], targets[:999], val[:99], targets[:99], CLASSES)  # loads what it loads
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    chunk = probes.KNN_ELEMENTS
    metrics.knn(bank, targets, val, targets[:VAL], CLASSES, chunk_elements=chunk)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"megabytes": (after - before) * 1024 / 1e6, "seconds": seconds}


def network(folder: str) -> str:
    """Write a ResNet-18 of random weights; return the file."""
    torch.manual_seed(0)
    path = os.path.join(folder, "net.pth")
    torch.save(backbones.build("resnet18", 0).state_dict(), path)
    return path


def whole(tree: str, folder: str) -> tuple[float, dict[str, float]]:
    """Return the seconds of the embedding, and of everything else, as the tool tells them."""
    out = os.path.join(folder, "evaluation")
    evaluate.main([network(folder), tree, "--input-res", "32", "--out", out, "--device", "cpu"])
    result = json.loads(Path(out, "result.json").read_text())
    return result["embedding_seconds"], result["seconds"]


def in_parts(folder: str) -> tuple[float, dict[str, float]]:
    """Return the same from a share of the pictures and from random features."""
    tree = generate(Path(folder) / "pictures", TRAIN // PARTS)
    flags = [network(folder), str(tree), "--input-res", "32", "--device", "cpu"]
    args = evaluate.parse_args(flags)
    process = launch.Process()
    backbone, operations, *_ = evaluate.open_backbone(args.checkpoint, process.device)
    pictures = inputs.open_split(args, "train")
    crop = augment.RandomResizedCrop(args.input_res)
    view = augment.Compose(crop, augment.RandomHorizontalFlip(), *operations)
    began = time.perf_counter()
    evaluate.embed_split(args, process, pictures, view, backbone, args.views, "views")
    middle = time.perf_counter()
    plain = inputs.plain_view(args, *operations)
    evaluate.embed_split(args, process, pictures, plain, backbone, 1, "as it is")
    end = time.perf_counter()
    embedding = PARTS * (middle - began + (1 + VAL / TRAIN) * (end - middle))
    seen = torch.stack([random_features(TRAIN, seed) for seed in range(args.views)])
    targets = torch.arange(TRAIN) % CLASSES
    bank = random_features(TRAIN, 10)
    val = random_features(VAL, 11)
    result, _ = probes.judge(args, seen, targets, bank, val, targets[:VAL], CLASSES)
    return embedding, result["seconds"]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    about = "tree with train/CLASS/* and val/CLASS/* of 32-pixel pictures (CIFAR-10 as files)"
    parser.add_argument("--data", help=about)
    parser.add_argument("--knn", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.knn:
        print(json.dumps(memory_of_knn()))
        return 0
    knn = in_a_process(__file__, "--knn")
    with tempfile.TemporaryDirectory() as folder:
        embedding, others = whole(args.data, folder) if args.data else in_parts(folder)
    total = sum(others.values())
    name = args.data or f"embedding measured on 1/{PARTS} of generated pictures and multiplied"
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    print(f"\n{threads}, torch {torch.__version__}; {name}")
    print(f"embedding        {embedding:7.1f} s")
    for part, seconds in others.items():
        print(f"{part:16} {seconds:7.1f} s  {seconds / embedding:6.1%}")
    share = f"{total / embedding:6.1%} of it, aim under {SHARE:.0%}"
    print(f"all but embedding {total:6.1f} s  {share}")
    memory = f"{knn['megabytes']:.0f} MB beside the features, aim under {MEGABYTES}"
    print(f"k-NN of {TRAIN} x {VAL}: {memory}")
    return int(total >= SHARE * embedding) + int(knn["megabytes"] >= MEGABYTES)


if __name__ == "__main__":
    sys.exit(main())
