"""Textures per second of the engines of preprocess/imagenet_texture_syn.py, and their memory.

    python benchmarks/textures.py --data /data/imagenet-100     # default: generated pictures

Each engine makes 224-pixel textures as the command does, from reading the file to writing the PNG,
in --workers processes of one thread. Processes are started and have made a texture before the clock
runs. "mrs, all in full" is --shortlist 0, the comparisons of the original. Beside the rate by the
clock stands the processor time per picture: on a machine that does other work too, only the latter
says what free cores would give. On a GPU the engine alone is measured, in batches of --batch.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import photographs
from common.sets import open_tree
from preprocess import texture_engines, texture_mrs, texture_quilt
from preprocess import texture_jobs as syn


class Side(NamedTuple):
    name: str
    settings: syn.Settings
    pictures: int  # per process, at the default --steps
    aim: float | None  # textures per second on two cores


def _settings(engine: str, **mrs) -> syn.Settings:
    return syn.Settings(engine, 224, 96, 0, texture_mrs.Options(**mrs), texture_quilt.Options())


SIDES = [
    Side("quilt", _settings("quilt"), 40, 20.0),
    Side("mrs", _settings("mrs"), 4, 1.0),
    Side("mrs, all in full", _settings("mrs", shortlist=0), 2, None),
]
AIM_GPU = 50.0  # textures per second of mrs


class Share(NamedTuple):
    seconds: float  # by the clock
    cores: float  # of processor time
    mebibytes: float


def _work(side: Side, jobs: list[syn.Job], ready, answer) -> None:
    """Make this process's share of the textures; put a `Share` on `answer`."""
    torch.set_num_threads(1)
    syn.do(side.settings, jobs[:1])
    ready.wait()
    began, cores = time.perf_counter(), time.process_time()
    size = texture_engines.BATCH["cpu"][side.settings.engine]
    for start in range(0, len(jobs), size):
        failed = [
            done for done in syn.do(side.settings, jobs[start : start + size]) if done.failure
        ]
        if failed:
            raise SystemExit(f"{failed[0].name}: {failed[0].failure}")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    answer.put(Share(time.perf_counter() - began, time.process_time() - cores, memory))


def measure(
    side: Side, paths: list[str], workers: int, steps: int, folder: Path
) -> tuple[float, float, float]:
    """Return textures per second, processor seconds per texture, and MiB of all processes."""
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(workers)
    answer = context.SimpleQueue()
    count = side.pictures * steps
    jobs = [
        syn.Job(paths[i % len(paths)], str(i), str(folder / f"{i}.png"))
        for i in range(count * workers)
    ]
    processes = [
        context.Process(target=_work, args=(side, jobs[i::workers], ready, answer))
        for i in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"{side.name}: ended with status {process.exitcode}")
    shares = [answer.get() for _ in processes]
    rate = count * workers / max(share.seconds for share in shares)
    return rate, sum(s.cores for s in shares) / len(jobs), sum(s.mebibytes for s in shares)


def measure_gpu(side: Side, paths: list[str], batch: int, steps: int) -> tuple[float, float]:
    """Return textures per second of the engine alone, and MiB of GPU memory."""
    jobs = [syn.Job(paths[i % len(paths)], str(i), "") for i in range(batch)]
    loaded = [syn.load(side.settings, job) for job in jobs]
    torch.cuda.reset_peak_memory_stats()
    syn.synthesise(side.settings, "cuda", loaded)
    began = time.perf_counter()
    for _ in range(steps):
        # It ends with a copy to the CPU, so that nothing is left in work.
        syn.synthesise(side.settings, "cuda", loaded)
    rate = batch * steps / (time.perf_counter() - began)
    return rate, torch.cuda.max_memory_allocated() / 2**20


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="TREE", help=photographs.ABOUT)
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    about = "use the first so many of the pictures (default 100)"
    parser.add_argument("--pictures", type=int, default=100, help=about)
    about = "rounds of 40 quilts, 4 mrs and 2 in full per process (default 3)"
    parser.add_argument("--steps", type=int, default=3, help=about)
    parser.add_argument("--batch", type=int, default=64, help="on a GPU (default 64)")
    return parser.parse_args(argv)


def compare(args: argparse.Namespace, tree: Path, title: str, folder: Path) -> int:
    """Measure all engines, print them, and return the exit code. folder: of the textures."""
    paths = open_tree(tree).paths[: args.pictures]
    patches = "textures of 224 x 224 from two patches of 96 x 96"
    print(f"{title}: {len(paths)} pictures, {patches}; torch {torch.__version__}")
    print(
        f"\n{args.workers} processes{'textures/s':>22}{'processor s each':>20}"
        f"{'aim on two cores':>20}{'ratio':>8}{'peak memory, MiB':>20}"
    )
    ratios = {}
    by_cores = {}
    for side in SIDES:
        rate, cores, memory = measure(side, paths, args.workers, args.steps, folder)
        shown = "-"
        if side.aim:
            ratios[side.name] = rate / side.aim
            by_cores[side.name] = args.workers / cores / side.aim
            shown = f"{rate / side.aim:.2f}"
        print(
            f"  {side.name:<16}{rate:>14.2f}{cores:>20.3f}{side.aim or '-':>20}{shown:>8}"
            f"{memory:>20.0f}",
            flush=True,
        )
    if torch.cuda.is_available():
        card = f"{torch.cuda.get_device_name()}, batch {args.batch}"
        print(f"\n{card}     textures/s     GPU memory, MiB")
        for side in SIDES:
            rate, memory = measure_gpu(side, paths, args.batch, args.steps)
            print(f"  {side.name:<16}{rate:>14.1f}{memory:>20.0f}", flush=True)
            if side.name == "mrs":
                ratios["mrs on the GPU"] = rate / AIM_GPU
    print("peak memory: of all processes; pages that they share are counted repeatedly")
    free = ", ".join(f"{name} {ratio:.2f}" for name, ratio in by_cores.items())
    print(f"ratio if the cores had been free ({args.workers} / processor seconds / aim): {free}")
    to_aim = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    print(f"\nresult: ratio {to_aim} (to the aim; wanted: 1)")
    return 0 if min(ratios.values()) >= 1 else 1


def main(argv=None) -> int:
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, photographs.tree(args.data) as (tree, title):
        return compare(args, tree, title, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
