"""Colour conversion of training pictures: scikit-image picture by picture, and cmc/colour.py on a
batch.

    python benchmarks/colour_skimage.py                  # one core for each side, 224 and 32 pixels
    python benchmarks/colour_skimage.py --cores 2        # two processes of scikit-image, two threads here

skimage        skimage.color.rgb2SPACE on a uint8 picture, giving float64: what each loader worker
               of the published CMC code does.
skimage input  the same as far as the network's input: channels first, (x - mean) / std in float64,
               stacked to a batch, float32.
ours           cmc.colour on a batch of float RGB, as the crop before it in a recipe leaves it, to
               the normalised float32 input. Two times: alone, and with the step from uint8 to
               floats in [0, 1], which a recipe has at no cost.

Each repeat of a side is a fresh process per core (ours: one process, as many threads), and a time
is the best of all calls of all repeats, per picture: other load on the machine only ever adds to
it. --clock cpu counts the seconds that the processors spent on a side instead of those that passed:
the one to use on a busy machine. Ends with 1 if Lab or YCbCr to the network's input is less than 10
times as fast as scikit-image's.
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from cmc import colour

AIM, AIMED_AT = 10, ("Lab", "YCbCr")
BATCH = {224: 16, 32: 256}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[224, 32], help="sides of the pictures, pixels"
    )
    parser.add_argument(
        "--batch", type=int, default=None, help="pictures per call (default 16 at 224, 256 at 32)"
    )
    parser.add_argument(
        "--cores", type=int, default=1, help="threads here, processes of scikit-image there"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="processes of each side, one after the other"
    )
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="seconds that passed, or of processor time",
    )
    parser.add_argument(
        "--calls", type=int, default=20, help="timed conversions of a batch in each process"
    )
    return parser.parse_args(argv)


def seconds_per_call(functions, calls: int, clock: str) -> np.ndarray:
    """Best seconds of each function; every round calls each once."""
    best, now = np.full(len(functions), np.inf), CLOCKS[clock]
    for call in range(calls + 2):
        for i, function in enumerate(functions):
            start = now()
            function()
            if call >= 2:  # the first two rounds are warm-up
                best[i] = min(best[i], now() - start)
    return best


def skimage_side(
    size: int, batch: int, calls: int, threads: int, clock: str, barrier, answer
) -> None:
    """Puts {space:

    (seconds of the conversion, seconds to the network's input)} per picture on `answer`.
    """
    from skimage import color

    torch.set_num_threads(threads)
    pictures = list(
        np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    )
    times = {}
    for space in colour.SPACES:
        convert = getattr(color, f"rgb2{space.lower()}")
        mean, std = (
            torch.tensor(c[space], dtype=torch.float64)[:, None, None]
            for c in (colour.MEAN, colour.STD)
        )

        def conversion(convert=convert):
            for picture in pictures:
                convert(picture)

        def network_input(convert=convert, mean=mean, std=std):
            views = [
                torch.from_numpy(convert(p)).permute(2, 0, 1).sub(mean).div_(std) for p in pictures
            ]
            return torch.stack(views).float()

        barrier.wait()  # all processes of this side at the same work
        times[space] = seconds_per_call((conversion, network_input), calls, clock) / batch
    answer.put(times)


def our_side(size: int, batch: int, calls: int, threads: int, clock: str, barrier, answer) -> None:
    """Puts {space:

    (seconds from floats to the network's input, seconds from uint8)} per picture on `answer`.
    """
    torch.set_num_threads(threads)
    codes = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    floats = codes.float().div_(255)
    times = {}
    for space in colour.SPACES:
        op = colour.Views(colour.default_views(space))

        def alone(op=op):
            return op.apply(floats, {})

        def from_codes(op=op):
            return op.apply(codes.float().div_(255), {})

        times[space] = seconds_per_call((alone, from_codes), calls, clock) / batch
    answer.put(times)


def measure(side, processes: int, *arguments) -> dict[str, np.ndarray]:
    """One repeat in fresh processes: {space: seconds per picture}, of all processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, answer = context.Barrier(processes), context.Queue()
    started = [
        context.Process(target=side, args=(*arguments, barrier, answer), daemon=True)
        for _ in range(processes)
    ]
    for process in started:
        process.start()
    answers = [answer.get(timeout=600) for _ in started]
    for process in started:
        process.join()
    return {space: 1 / sum(1 / np.array(a[space]) for a in answers) for space in answers[0]}


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        import skimage
    except ImportError:
        raise SystemExit(
            "this comparison needs scikit-image: pip install -r requirements-dev.txt"
        ) from None
    print(
        f"torch {torch.__version__}  scikit-image {skimage.__version__}  {args.cores} core(s) for each side, "
        f"{args.clock} time"
    )
    missed = 0
    for size in args.sizes:
        batch = args.batch or BATCH.get(size, 32)
        theirs, ours = {}, {}
        for _ in range(args.repeats):
            for best, made in (
                (theirs, measure(skimage_side, args.cores, size, batch, args.calls, 1, args.clock)),
                (ours, measure(our_side, 1, size, batch, args.calls, args.cores, args.clock)),
            ):
                best.update({k: np.minimum(best.get(k, np.inf), v) for k, v in made.items()})
        print(f"\n{size}x{size} pixels, {batch} pictures a call, microseconds per picture")
        print(
            f"{'':8s}{'skimage':>10s}{'sk. input':>10s}{'ours':>10s}{'from uint8':>11s}   how many times as fast:"
        )
        print(f"{'':8s}{'':41s}   conversion / input / from uint8")
        for space in colour.SPACES:
            (convert, to_input), (alone, from_codes) = theirs[space], ours[space]
            ratios = convert / alone, to_input / alone, to_input / from_codes
            low = space in AIMED_AT and ratios[1] < AIM
            missed += low
            micro = [1e6 * seconds for seconds in (convert, to_input, alone, from_codes)]
            print(
                f"{space:8s}{micro[0]:10.1f}{micro[1]:10.1f}{micro[2]:10.1f}{micro[3]:11.1f}   "
                f"{ratios[0]:10.1f} / {ratios[1]:5.1f} / {ratios[2]:10.1f}{'   below the aim' if low else ''}"
            )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
