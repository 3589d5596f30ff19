"""Colour conversion of training pictures: scikit-image one by one, cmc/colour.py on a batch.

    python benchmarks/colour_skimage.py                  # one core for each side, 224 and 32 pixels
    python benchmarks/colour_skimage.py --cores 2        # two processes there, two threads here

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

AIM = 10  # times as fast
AIMED_AT = ("Lab", "YCbCr")
BATCH = {224: 16, 32: 256}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about = "sides of the pictures, pixels"
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 32], help=about)
    about = "pictures per call (default 16 at 224, 256 at 32)"
    parser.add_argument("--batch", type=int, help=about)
    about = "threads here, processes of scikit-image there"
    parser.add_argument("--cores", type=int, default=1, help=about)
    about = "processes of each side, one after the other"
    parser.add_argument("--repeats", type=int, default=3, help=about)
    about = "seconds that passed, or of processor time"
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help=about)
    about = "timed conversions of a batch in each process"
    parser.add_argument("--calls", type=int, default=20, help=about)
    return parser.parse_args(argv)


def seconds_per_call(functions, calls: int, clock: str) -> np.ndarray:
    """Return the best seconds of each function; every round calls each once."""
    now = CLOCKS[clock]
    best = np.full(len(functions), np.inf)
    for call in range(calls + 2):
        for i, function in enumerate(functions):
            start = now()
            function()
            if call >= 2:  # the first two rounds are warm-up
                best[i] = min(best[i], now() - start)
    return best


def skimage_side(size, batch, calls, threads, clock, barrier, answer) -> None:
    """Put {space: (seconds of the conversion, seconds to the network's input)} on `answer`.

    They are per picture.
    """
    from skimage import color

    torch.set_num_threads(threads)
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8))
    times = {}
    for space in colour.SPACES:
        convert = getattr(color, f"rgb2{space.lower()}")
        mean = torch.tensor(colour.MEAN[space], dtype=torch.float64)[:, None, None]
        std = torch.tensor(colour.STD[space], dtype=torch.float64)[:, None, None]

        def conversion(convert=convert):
            for picture in pictures:
                convert(picture)

        def network_input(convert=convert, mean=mean, std=std):
            converted = [torch.from_numpy(convert(picture)) for picture in pictures]
            views = [x.permute(2, 0, 1).sub(mean).div_(std) for x in converted]
            return torch.stack(views).float()

        barrier.wait()  # all processes of this side at the same work
        times[space] = seconds_per_call((conversion, network_input), calls, clock) / batch
    answer.put(times)


def our_side(size, batch, calls, threads, clock, barrier, answer) -> None:
    """Put {space: (seconds from floats to the network's input, seconds from uint8)} on `answer`.

    They are per picture.
    """
    torch.set_num_threads(threads)
    codes = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    floats = codes.float().div_(255)
    times = {}
    for space in colour.SPACES:
        views = colour.Views(colour.default_views(space))

        def alone(views=views):
            return views.apply(floats, {})

        def from_codes(views=views):
            return views.apply(codes.float().div_(255), {})

        times[space] = seconds_per_call((alone, from_codes), calls, clock) / batch
    answer.put(times)


def measure(side, processes: int, *arguments) -> dict[str, np.ndarray]:
    """Return {space: seconds per picture} of one repeat, of all its fresh processes together."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    answer = context.Queue()
    inputs = (*arguments, barrier, answer)
    started = [context.Process(target=side, args=inputs, daemon=True) for _ in range(processes)]
    for process in started:
        process.start()
    answers = [answer.get(timeout=600) for _ in started]
    for process in started:
        process.join()
    return {
        space: 1 / sum(1 / np.array(seconds[space]) for seconds in answers) for space in answers[0]
    }


def best_of(repeats: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return the least seconds of all repeats."""
    return {space: np.min([repeat[space] for repeat in repeats], 0) for space in repeats[0]}


def compare(size: int, args) -> bool:
    """Measure both sides at one size, print them, and return whether the aim is met."""
    batch = args.batch or BATCH.get(size, 32)
    theirs, ours = [], []
    for _ in range(args.repeats):
        common = (size, batch, args.calls)
        theirs.append(measure(skimage_side, args.cores, *common, 1, args.clock))
        ours.append(measure(our_side, 1, *common, args.cores, args.clock))
    print(f"\n{size}x{size} pixels, {batch} pictures a call, microseconds per picture")
    names = f"{'skimage':>10s}{'sk. input':>10s}{'ours':>10s}{'from uint8':>11s}"
    print(f"{'':8s}{names}   how many times as fast:")
    print(f"{'':8s}{'':41s}   conversion / input / from uint8")
    is_met = True
    for space in colour.SPACES:
        convert, to_input = best_of(theirs)[space]
        alone, from_codes = best_of(ours)[space]
        columns = [f"{1e6 * x:10.1f}" for x in (convert, to_input, alone)]
        ratios = (
            f"{convert / alone:10.1f} / {to_input / alone:5.1f} / {to_input / from_codes:10.1f}"
        )
        low = space in AIMED_AT and to_input / alone < AIM
        is_met = is_met and not low
        remark = "   below the aim" if low else ""
        print(f"{space:8s}{''.join(columns)}{1e6 * from_codes:11.1f}   {ratios}{remark}")
    return is_met


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        import skimage
    except ImportError:
        reason = "this comparison needs scikit-image: pip install -r requirements-dev.txt"
        raise SystemExit(reason) from None
    print(
        f"torch {torch.__version__}  scikit-image {skimage.__version__}  {args.cores} core(s) for "
        f"each side, {args.clock} time"
    )
    results = [compare(size, args) for size in args.sizes]
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
