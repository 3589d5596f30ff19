"""All benchmarks in turn: `make bench`. --data and --photos give real pictures; without them they are generated."""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", help="tree with train/CLASS/* of 32-pixel pictures (CIFAR-10 as files)"
    )
    parser.add_argument("--photos", help="tree with train/CLASS/* of full-size photographs")
    args = parser.parse_args()
    jobs = [
        ["pretrain_lightly.py", *(["--data", args.data] if args.data else [])],
        ["network_alone.py", *(["--data", args.data] if args.data else [])],
        ["decode_jpeg.py", *(["--data", args.photos] if args.photos else [])],
        ["augment_kornia.py"],
        ["augment_kornia.py", "--size", "224", "--batch", "32"],
        ["nce_step.py"],
        ["nce_step.py", "--n", "1281167", "--sides", "ours"],
        ["ring_selection.py"],
        ["feature_transform.py"],
        ["colour_skimage.py"],
        ["debiased_loss.py"],
        ["debiased_lightly.py", *(["--data", args.data] if args.data else [])],
        ["check_images.py", *(["--data", args.photos] if args.photos else [])],
        ["evaluate.py"],
        ["pack.py", *(["--data", args.photos] if args.photos else [])],
        ["corruptions.py", *(["--data", args.photos] if args.photos else [])],
        ["textures.py", *(["--data", args.photos] if args.photos else [])],
    ]
    missed = []
    for job in jobs:
        print(f"\n$ python benchmarks/{' '.join(job)}", flush=True)
        if subprocess.run([sys.executable, str(HERE / job[0]), *job[1:]]).returncode:
            missed.append(" ".join(job))
    print("\nall aims met" if not missed else f"\nmissed their aim or failed: {'; '.join(missed)}")
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
