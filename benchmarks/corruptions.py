"""Compare the processor time of 75 corrupted variants of a picture with that of corrupt-tta alone.

    python benchmarks/corruptions.py --data /data/imagenet-100     # default: generated pictures

Both sides take the same pictures (224 pixels, resized and cropped) and seeds, in turn. The ten
corruptions whose strengths are the package's must give the same pixels. Ends with 1 if ours is not
--at-least times as fast.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import photographs
from preprocess import corruptions, make_corruptions

OTHER_STRENGTHS = set(corruptions.OWN) - {"zoom_blur"}  # than the package's


def variants(picture: np.ndarray) -> tuple[float, dict]:
    """Return the seconds of processor time and the variants by (corruption, severity)."""
    began = time.process_time()
    made = {
        (name, severity): corruptions.corrupt(picture, name, severity, (0,))
        for name in corruptions.CORRUPTIONS
        for severity in range(1, 6)
    }
    return time.process_time() - began, made


def compare(picture: np.ndarray) -> tuple[float, float]:
    """Return the seconds of corrupt-tta alone and of ours, having compared the pixels."""
    with mock.patch.dict(corruptions.OWN, clear=True):
        theirs, expected = variants(picture)
    ours, made = variants(picture)
    for key, pixels in made.items():
        assert key[0] in OTHER_STRENGTHS or np.array_equal(expected[key], pixels), key
    return theirs, ours


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="TREE", help=photographs.ABOUT)
    parser.add_argument("--pictures", type=int, default=8, help="pictures (default 8)")
    about = "aim: times faster (default 2)"
    parser.add_argument("--at-least", type=float, default=2.0, help=about)
    args = parser.parse_args(argv)
    with photographs.tree(args.data) as (tree, _):
        files = sorted(p for p in tree.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
        files = files[: args.pictures]
        pictures = [make_corruptions.read_picture(str(path), 224) for path in files]
    variants(pictures[0])  # imports
    times = []
    for number, picture in enumerate(pictures):
        theirs, ours = compare(picture)
        times.append((theirs, ours))
        print(f"  picture {number + 1}: corrupt-tta {theirs:.2f} s, here {ours:.2f} s", flush=True)
    theirs, ours = (statistics.median(side) for side in zip(*times))
    ratio = statistics.median(a / b for a, b in times)
    print(
        f"75 variants of a picture: corrupt-tta {theirs:.2f} s of processor time, here "
        f"{ours:.2f} s, {ratio:.2f} times faster (aim {args.at_least})"
    )
    return int(ratio < args.at_least)


if __name__ == "__main__":
    sys.exit(main())
