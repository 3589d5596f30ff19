"""Make the texture twins of a tree of pictures, for the negatives of `--robust texture`.

    python preprocess/imagenet_texture_syn.py --imagenet_path A --imagenet_t_path A-texture
    python preprocess/imagenet_texture_syn.py --imagenet_path A --sheet look.png  # preview 20

For every picture A/train/<class>/<name>.JPEG it makes a texture B/train/<class>/<name>.png of 224 x
224 pixels from two patches of 96 x 96 of the picture: the centre and a random one (Ge et al.,
arXiv:2110.14189). Training pairs the two trees by class and name; if B is named like A
with "-texture" appended, training finds B by itself.

A picture with a side below 224 is enlarged to 224 first, because its patches would otherwise hold
the whole object. (The published script takes 96 pixels of any picture, as --patch 96 does here.)
With --size below 224 all lengths shrink in proportion: --size 32 makes 32-pixel textures from
patches of 14 pixels. Engines:

mrs     multiresolution stochastic synthesis, the method of the published textures and closest to
        their look: every pixel is an exact copy of one of the patches (preprocess/texture_mrs.py).
        It has the original's settings, but compares only the most promising candidates in full;
        --shortlist 0 compares all, as the original does, and takes twice the time.
quilt   image quilting: blocks of the patches joined along their best seams
        (preprocess/texture_quilt.py). It is tens of times as fast, but keeps larger pieces of the
        picture.
embark  the program that made the published textures, if installed:
        https://github.com/EmbarkStudios/texture-synthesis

A texture depends only on the picture, its path below A, --seed and the engine's settings: reruns,
any number of --workers, any --shard and, on the CPU, any --batch give the same file. (On a GPU
another --batch may round sums differently.) Existing textures are kept, so the same command
continues where it stopped. B/textures.json holds the settings, B/failures.txt the pictures that
failed. EXIF orientation is ignored, as in training. The last possible place of the random patch can
be drawn here, unlike in the published script.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import shutil
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from common import UsageError, UserError, cli, clock, launch, printable, sets
from preprocess import demo, workers
from preprocess.texture_engines import (
    BATCH,
    BINARY,
    ENGINES,
    PATCH,
    PER_START,
    Settings,
    find_binary,
)
from preprocess.texture_jobs import Done, Job, do, in_threads
from preprocess.texture_options import (
    add_data_arguments,
    add_run_arguments,
    add_texture_arguments,
    settings_of,
    with_sizes,
)
from preprocess.texture_sheet import make_sheet
from preprocess.texture_tree import check_out, list_jobs, missing_of, open_splits, settle

LOOKED_AT = 20  # pictures whose size is checked before the work
ON_SHEET = 20  # most pictures on a sheet
PRESETS = {
    "demo": {
        "imagenet_path": "data/demo",
        "imagenet_t_path": "runs/demo-texture",
        "engine": "quilt",
        "limit": 40,
        "workers": 1,
    }
}


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    add_data_arguments(parser.add_argument_group("data"))
    add_texture_arguments(parser)
    add_run_arguments(parser.add_argument_group("run"))
    args = parser.parse_args(argv)
    if not args.imagenet_path or not (args.imagenet_t_path or args.sheet):
        raise UsageError(
            "give --imagenet_path A (train/CLASS/*) and --imagenet_t_path B (a tree to make), "
            "or --demo"
        )
    if args.overwrite and args.shard[1] > 1:
        raise UsageError(
            "--overwrite with --shard: a part would make those of the other machines again; "
            "remove B, or name another folder"
        )
    return with_sizes(args)


def finish(args, settings: Settings, device: str, splits: list[sets.FolderSet]) -> None:
    """Write the missing textures in B and print the result.

    Raises OSError if writing fails, UserError if pictures failed.
    """
    out = Path(args.imagenet_t_path)
    out.mkdir(parents=True, exist_ok=True)
    since = settle(out, settings.recorded(), args.overwrite)
    jobs, failures = list_jobs(Path(args.imagenet_path), splits, out)
    jobs = jobs[: args.limit][args.shard[0] - 1 :: args.shard[1]]
    todo = missing_of(jobs, since)
    count = args.workers or workers.default_workers(len(todo), PER_START[settings.engine])
    place = workers.count_processes(count)
    if device == "cuda":
        place = f"on the GPU, {count} threads"
    print(
        f"textures of {args.imagenet_path} by {settings.engine}: {len(jobs)} pictures, "
        f"{len(jobs) - len(todo)} exist; {place}",
        flush=True,
    )
    _warn_of_small([job.source for job in todo], settings)
    done, seconds = _do_all(args, settings, device, todo, count)
    failures |= {one.name: one.failure for one in done if one.failure}
    listing = workers.list_failures(out, "failures", args.shard, failures)
    new = sum(not one.failure for one in done)
    rate = f", {new / seconds:.2f}/s" if new else ""
    print(
        f"result: {len(jobs) - len(todo) + new} of {len(jobs)} textures in {out}; "
        f"{new} made now, in {clock(seconds)}{rate}"
    )
    if failures:
        name, reason = sorted(failures.items())[0]
        raise UserError(
            f"{len(failures)} pictures failed, listed in {listing}; "
            f"the first: {printable(name)}: {reason}"
        )


def _do_all(
    args, settings: Settings, device: str, todo: list[Job], count: int
) -> tuple[list[Done], float]:
    """Make the textures; return their outcomes and the time in seconds.

    count: number of processes, or of threads on a GPU. Raises Interrupted on Ctrl-C and SIGTERM.
    """
    size = args.batch or BATCH[device][settings.engine]
    batches = [todo[i : i + size] for i in range(0, len(todo), size)]
    if device == "cuda":
        work = in_threads(settings, batches, device, count)
    else:
        work = workers.in_processes(
            functools.partial(do, settings),
            batches,
            min(count, max(1, len(batches))),
            names=lambda jobs: [job.name for job in jobs],
        )
    bar = workers.Rate("textures", len(todo), "pictures")
    done: list[Done] = []
    try:
        with _sigterm_as_ctrl_c():
            for outcomes in work:
                done += outcomes
                bar.add(len(outcomes))
    except KeyboardInterrupt:
        hint = workers.continue_hint("--overwrite", args.overwrite)
        raise workers.Interrupted(f"stopped; written files are complete, and {hint}") from None
    finally:
        work.close()
        bar.close()
    return done, max(bar.seconds, 1e-6)


def _warn_of_small(paths: list[str], settings: Settings) -> None:
    """Warn if one of some evenly spaced pictures is smaller than the published patches."""
    for path in paths[:: max(1, len(paths) // LOOKED_AT)]:
        with contextlib.suppress(Exception), Image.open(workers.read(path)) as image:
            side = min(image.size)
            if side < PATCH:
                print(
                    f"warning: pictures below {PATCH} pixels, such as {printable(path)} "
                    f"({image.width} x {image.height}): a patch is "
                    f"{settings.patch / settings.scale(side):.0f} of its pixels, and textures of "
                    "so few may show pieces of the object: look at some with --sheet FILE.png",
                    file=sys.stderr,
                    flush=True,
                )
                return


@contextlib.contextmanager
def _sigterm_as_ctrl_c():
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def draw_sheet(args, splits: list[sets.FolderSet], device: str) -> None:
    """Write the sheet of --sheet: evenly spaced pictures and their textures by every engine."""
    jobs, _ = list_jobs(Path(args.imagenet_path), splits, Path("unused"))
    jobs = jobs[: args.limit]
    count = min(ON_SHEET, len(jobs))
    jobs = [jobs[i * len(jobs) // count] for i in range(count)]
    _warn_of_small([job.source for job in jobs], settings_of(args))
    names = [name for name in ENGINES if name != "embark" or shutil.which(BINARY)]
    engines = {name: settings_of(args, name) for name in names}
    shown = make_sheet(args.sheet, jobs, engines, device)
    print(f"result: {shown} pictures with textures by {', '.join(names)} in {Path(args.sheet)}")


def device_of(args) -> str:
    """Return "cpu" or "cuda". Raises UsageError for --device cuda without a GPU."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: there is no GPU: omit the flag, or give --device cpu")
    if args.device == "cpu" or not torch.cuda.is_available():
        return "cpu"
    if args.engine == "embark" and not args.sheet:
        return "cpu"
    return "cuda"


def main(argv=None) -> None:
    args = parse_args(argv)
    device = device_of(args)
    if args.engine == "embark" and not args.sheet:
        find_binary()
    if args.demo:
        demo.ensure_for(cli.replace(args, data=args.imagenet_path), launch.Process())
    splits = open_splits(args.imagenet_path, args.splits, args.class_list)
    if args.imagenet_t_path:
        check_out(Path(args.imagenet_t_path), Path(args.imagenet_path), splits)
    threads = torch.get_num_threads()
    # one thread in this process too, so that textures do not depend on the number of cores
    torch.set_num_threads(1)
    try:
        if args.sheet:
            draw_sheet(args, splits, device)
        else:
            finish(args, settings_of(args), device, splits)
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "; free some space and run the same command again to continue"
        place = error.filename or args.imagenet_t_path
        raise UserError(f"{place}: {error.strerror or error}{hint}") from None
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    cli.run(main)
