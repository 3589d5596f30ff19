"""Run all benchmarks in turn: `make bench`. Pictures are generated unless flags name real ones."""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PLAIN = (
    "augment_kornia.py",
    "augment_kornia.py --size 224 --batch 32",
    "small_maps.py",
    "operations.py",
    "nce_step.py",
    "nce_step.py --n 1281167 --sides ours",
    "ring_selection.py",
    "feature_transform.py",
    "colour_skimage.py",
    "losses.py",
    "evaluate.py",
)
OF_SMALL_PICTURES = ("pretrain_lightly.py", "network_alone.py", "debiased_lightly.py")
OF_PHOTOGRAPHS = ("decode_jpeg.py", "check_images.py", "pack.py", "corruptions.py", "textures.py")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    about = "tree with train/CLASS/* of 32-pixel pictures (CIFAR-10 as files)"
    parser.add_argument("--data", help=about)
    about = "tree with train/CLASS/* of full-size photographs"
    parser.add_argument("--photos", help=about)
    args = parser.parse_args(argv)
    jobs = [job.split() for job in PLAIN]
    for scripts, tree in ((OF_SMALL_PICTURES, args.data), (OF_PHOTOGRAPHS, args.photos)):
        jobs += [[script, "--data", tree] if tree else [script] for script in scripts]
    missed = []
    for job in jobs:
        print(f"\n$ python benchmarks/{' '.join(job)}", flush=True)
        if subprocess.run([sys.executable, str(HERE / job[0]), *job[1:]]).returncode:
            missed.append(" ".join(job))
    print(f"\nmissed their aim or failed: {'; '.join(missed)}" if missed else "\nall aims met")
    return len(missed)


if __name__ == "__main__":
    sys.exit(main())
