"""Processor time of the 75 corrupted variants of a picture: by corrupt-tta alone, and by preprocess/corruptions.py.

    python benchmarks/corruptions.py --data /data/imagenet-100     # or without --data: generated pictures

Both sides take the same pictures (224 pixels, resized and cropped) and seeds, in turn. The ten corruptions whose strengths
are the package's must give the same pixels. Ends with 1 if our way is not --at-least times as fast.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.decode_jpeg import generate
from preprocess import corruptions, make_corruptions


def variants(picture: np.ndarray) -> tuple[float, dict]:
    began = time.process_time()
    made = {
        (name, severity): corruptions.corrupt(picture, name, severity, (0,))
        for name in corruptions.CORRUPTIONS
        for severity in range(1, 6)
    }
    return time.process_time() - began, made


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="TREE", help="JPEG files in class folders, or the folder above with train/")
    parser.add_argument("--pictures", type=int, default=8, help="pictures (default 8)")
    parser.add_argument("--at-least", type=float, default=2.0, help="aim: times faster (default 2)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(args.data) if args.data else generate(Path(temporary))
        files = sorted(p for p in tree.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[: args.pictures]
        pictures = [make_corruptions.read_picture(str(path), 224) for path in files]
    own = set(corruptions.OWN) - {"zoom_blur"}  # other strengths than the package's
    variants(pictures[0])  # imports
    plain, faster = [], []
    for i, picture in enumerate(pictures):
        with mock.patch.dict(corruptions.OWN, clear=True):
            seconds, expected = variants(picture)
        plain.append(seconds)
        seconds, made = variants(picture)
        faster.append(seconds)
        assert all(np.array_equal(expected[key], made[key]) for key in made if key[0] not in own)
        print(f"  picture {i + 1}: corrupt-tta {plain[-1]:.2f} s, here {faster[-1]:.2f} s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(plain, faster))
    print(
        f"75 variants of a picture: corrupt-tta {statistics.median(plain):.2f} s of processor time, here "
        f"{statistics.median(faster):.2f} s, {ratio:.2f} times faster (aim {args.at_least})"
    )
    return int(ratio < args.at_least)


if __name__ == "__main__":
    sys.exit(main())
