"""Make the texture twin of a tree of pictures: the texture negatives of `--robust texture`.

    python preprocess/imagenet_texture_syn.py --imagenet_path IMAGENET100 --imagenet_t_path IMAGENET100-texture
    python preprocess/imagenet_texture_syn.py --imagenet_path IMAGENET100 --sheet look.png     # look at 20 first

For every picture A/train/<class>/<name>.JPEG a texture B/train/<class>/<name>.png of 224 x 224 pixels, made of two of its
patches of 96 x 96: the centre and a random one (Ge et al., arXiv:2110.14189). Training pairs the two trees by class and name;
call B what A is called plus "-texture", and it finds A by itself.

A picture with a side below 224 is enlarged to it first: patches and blocks keep their proportion to it, else they would hold
the whole object. (The published script takes 96 pixels of any picture; --patch 96 does so here.) With --size below 224
everything is that much smaller: --size 32 makes textures of 32-pixel pictures pixel by pixel, from patches of 14. Engines:

mrs     multiresolution stochastic synthesis, the method of the published textures and closest to their look: every pixel is
        an exact copy of one of the patches (preprocess/texture_mrs.py). The original's settings, but only the most promising
        candidates are compared in full; --shortlist 0 compares all as the original does, at twice the time.
quilt   image quilting: blocks of the patches joined along their best seams (preprocess/texture_quilt.py). Tens of times as
        fast; larger pieces of the picture stay as they are.
embark  the program that made the published textures, https://github.com/EmbarkStudios/texture-synthesis, if it is installed.

A texture depends on the picture, its path below A, --seed and the engine's settings only: reruns, any number of --workers, any
--shard and, on the CPU, any --batch give the same file. (On a GPU another --batch may round sums differently.) Textures
that are there are kept, so the same command goes on where it was stopped. B/textures.json holds the settings,
B/failures.txt the pictures that failed. EXIF orientation is ignored, as in training; the last legal place of the random
patch, which the published script never drew, is drawn here.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import json
import multiprocessing
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from common import UsageError, UserError, cli, crops, launch, printable, sets
from runner.progress import clock
from common.sets import SPLIT_NAMES
from preprocess import demo, texture_mrs, texture_quilt, workers

FORMAT = 1  # raise it when the same settings give other textures
ENGINES = ("mrs", "quilt", "embark")
BINARY, SOURCE = "texture-synthesis", "https://github.com/EmbarkStudios/texture-synthesis"
BATCH = {"cpu": {"mrs": 1, "quilt": 8, "embark": 1}, "cuda": {"mrs": 64, "quilt": 64, "embark": 1}}
PER_START = {"mrs": 2, "quilt": 50, "embark": 1}  # pictures made in the time that a process takes to start
SIDE, PATCH, BLOCK, OVERLAP = 224, 96, 34, 6  # of pictures and textures, and of what textures are made of, as published
LOSSLESS_EFFORT = 3  # zlib level of the PNG files
PRESETS = {
    "demo": dict(imagenet_path="data/demo", imagenet_t_path="runs/demo-texture", engine="quilt", limit=40, workers=1)
}


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    g.add_argument("--imagenet_path", metavar="A", help="tree of pictures: train/CLASS/*, val/CLASS/*")
    g.add_argument("--imagenet_t_path", metavar="B", help="tree to make, or one that an earlier run began")
    g.add_argument("--splits", nargs="+", choices=("train", "val"), help="(default: those that A has)")
    g.add_argument("--class-list", metavar="FILE", help="these class folders only, one name a line")
    g.add_argument("--limit", type=cli.positive_int, metavar="N", help="only the first N pictures, for a look")
    g.add_argument(
        "--sheet",
        metavar="PNG",
        help="make no tree, but a contact sheet of up to 20 pictures, evenly taken, "
        "each beside its textures (mrs, quilt, and embark where it is installed)",
    )
    g.add_argument("--overwrite", action="store_true", help="make textures that are there again")
    g = parser.add_argument_group("texture")
    g.add_argument("--engine", choices=ENGINES, default="mrs")
    g.add_argument("--size", type=cli.positive_int, default=224, help="side of the textures, pixels")
    about = f"side of the two patches, pixels of the picture as it is (default {PATCH} of {SIDE}, in proportion)"
    g.add_argument("--patch", type=cli.positive_int, metavar="P", help=about)
    g.add_argument("--seed", type=cli.count, default=0)
    mrs = texture_mrs.Options()
    g = parser.add_argument_group("texture, engines mrs and embark")
    g.add_argument("--k-neighs", type=cli.positive_int, default=mrs.k_neighs, help="neighbours of a pixel compared")
    g.add_argument("--m-rand", type=cli.count, default=mrs.m_rand, help="random candidates of a pixel")
    g.add_argument("--cauchy", type=cli.positive, default=mrs.cauchy, help="dispersion of the cost")
    g.add_argument("--backtrack-pct", type=_open_fraction, default=mrs.backtrack_pct, help="growth of the stages")
    g.add_argument("--backtrack-stages", type=cli.count, default=mrs.backtrack_stages, help="stages before the last")
    g = parser.add_argument_group("texture, engine mrs")
    g.add_argument(
        "--shortlist",
        type=cli.count,
        default=mrs.shortlist,
        metavar="N",
        help="candidates compared on all neighbours; 0: all of them, as the original, slower",
    )
    g.add_argument(
        "--glance",
        type=cli.positive_int,
        default=mrs.glance,
        metavar="N",
        help="nearest neighbours on which that shortlist is chosen",
    )
    g = parser.add_argument_group("texture, engine quilt")
    about = f"pixels (default {BLOCK} for patches of {PATCH}, in proportion)"
    g.add_argument("--block", type=cli.positive_int, metavar="P", help="side of a block, " + about)
    about = f"pixels (default {OVERLAP} for blocks of {BLOCK}, in proportion)"
    g.add_argument("--overlap", type=cli.positive_int, metavar="P", help="overlap of blocks, " + about)
    g = parser.add_argument_group("run")
    g.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU where there is one")
    g.add_argument(
        "-j",
        "--workers",
        type=cli.positive_int,
        metavar="N",
        help="processes of one thread each (one per core); on a GPU: reading and writing threads",
    )
    g.add_argument("--batch", type=cli.positive_int, metavar="N", help="pictures at a time (GPU 64; mrs 1, quilt 8)")
    g.add_argument(
        "--shard",
        type=workers.shard,
        default=(1, 1),
        metavar="I/N",
        help="do part I of N, 1/N to N/N: one per machine (default 1/1)",
    )
    args = parser.parse_args(argv)
    if not args.imagenet_path or not (args.imagenet_t_path or args.sheet):
        raise UsageError("give --imagenet_path A (train/CLASS/*) and --imagenet_t_path B (a tree to make), or --demo")
    args.in_proportion = args.patch is None
    if args.in_proportion:
        args.patch = max(2, round(PATCH * min(args.size, SIDE) / SIDE))
    if args.block is None:
        args.block = max(min(2, args.patch), round(BLOCK * args.patch / PATCH))
    if args.overlap is None:
        args.overlap = max(1, round(OVERLAP * args.block / BLOCK))
    if args.patch < args.block and (args.engine == "quilt" or args.sheet):
        raise UsageError(f"--patch {args.patch} is smaller than a block: --block is {args.block}")
    if 2 * args.overlap > args.block:
        raise UsageError(f"--overlap {args.overlap} is more than half of --block {args.block}")
    return args


def _open_fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise ValueError
    return value


_open_fraction.__name__ = "number between 0 and 1"


# --------------------------------------------------------------------------------------------------------------- engines


@dataclass(frozen=True)
class Settings:
    """What a texture depends on besides its picture and seed."""

    engine: str
    size: int
    patch: int  # side, pixels of a picture that was enlarged or reduced: see `scale`
    seed: int
    mrs: texture_mrs.Options
    quilt: texture_quilt.Options
    in_proportion: bool = False

    def scale(self, side: int) -> float:
        """By how much a picture with this shorter side is enlarged before patches are cut, pixels.

        In proportion: as if it had at least 224 pixels, and the texture were made at 224 and then reduced to a smaller
        `size`. Else only as much as a patch needs.
        """
        if self.in_proportion:
            return max(min(self.size, SIDE) / min(side, SIDE), self.patch / side)
        return max(1.0, self.patch / side)

    def recorded(self) -> dict:
        """The part of it that matters to the engine, for B/textures.json."""
        own = asdict(self.quilt if self.engine == "quilt" else self.mrs)
        if self.engine == "embark":
            del own["shortlist"], own["glance"]
        common = {name: getattr(self, name) for name in ("engine", "size", "patch", "seed")}
        return {"format": FORMAT, **common, **own, **({"in_proportion": True} if self.in_proportion else {})}


class EngineError(Exception):
    """The outside program failed on a picture."""


@functools.cache
def engine_of(settings: Settings, device: str):
    """Function (patches uint8 (B, 2, 3, P, P), seeds int64 (B,), both on the CPU) -> textures uint8 (B, 3, S, S) there."""
    if settings.engine == "embark":
        return functools.partial(_embark, settings)
    if settings.engine == "quilt":
        synthesise = functools.partial(texture_quilt.synthesise, options=settings.quilt, size=settings.size)
    else:
        schedule = texture_mrs.Schedule(settings.mrs, settings.size, settings.patch, seed=settings.seed).to(device)
        synthesise = functools.partial(texture_mrs.synthesise, schedule=schedule)

    def engine(patches, seeds):
        with torch.inference_mode():
            return synthesise(patches.to(device), seeds.to(device)).cpu()

    return engine


def find_binary() -> str:
    binary = shutil.which(BINARY)
    if binary is None:
        raise UsageError(f"--engine embark needs {BINARY} on PATH: build it from {SOURCE}, or use --engine mrs")
    return binary


def embark_command(binary: str, settings: Settings, seed: int, out: str, examples: list[str]) -> list[str]:
    """Its options are global and stand before `generate`. Only with one thread does it repeat itself."""
    s = settings.mrs
    return [
        binary,
        "--out-size",
        str(settings.size),
        "--threads",
        "1",
        "--seed",
        str(seed),
        "--no-progress",
        "--k-neighs",
        str(s.k_neighs),
        "--m-rand",
        str(s.m_rand),
        "--cauchy",
        str(s.cauchy),
        "--backtrack-pct",
        str(s.backtrack_pct),
        "--backtrack-stages",
        str(s.backtrack_stages),
        "--out",
        out,
        "generate",
        *examples,
    ]


def _embark(settings: Settings, patches: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    binary, made = find_binary(), []
    for examples, seed in zip(patches, seeds.tolist()):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "texture.png")
            names = [os.path.join(folder, f"patch{i}.png") for i in range(len(examples))]
            for name, example in zip(names, examples):
                Image.fromarray(example.permute(1, 2, 0).numpy()).save(name)
            command = embark_command(binary, settings, seed, out, names)
            # A session of its own: Ctrl-C is for this program, which lets the picture in work be finished.
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            if done.returncode or not os.path.exists(out):
                last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
                raise EngineError(f"{BINARY} ended with {done.returncode}: {last}")
            with Image.open(out) as image:
                made.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(made)


# ----------------------------------------------------------------------------------------------------------- one picture


class Job(NamedTuple):
    source: str  # full path
    name: str  # path below A, with /
    target: str  # full path


class Done(NamedTuple):
    name: str
    failure: str  # '' where all went well


def draws_of(name: str, seed: int) -> tuple[int, int, int]:
    """(seed of the engine, two numbers that place the random patch) of the picture with this path below A."""
    digest = hashlib.blake2b(b"%d/%s" % (seed, os.fsencode(name)), digest_size=24).digest()
    a, b, c = (int.from_bytes(digest[i : i + 8], "big") for i in (0, 8, 16))
    return a >> 2, b, c  # an int64, and one that fits


def read_rgb(path: str) -> Image.Image:
    """The picture as RGB of 8 bits. Raises whatever Pillow raises on damaged files."""
    return crops.as_rgb(Image.open(workers.read(path)))


def patches_of(picture: Image.Image, patch: int, down: int, right: int, scale: float | None = None) -> torch.Tensor:
    """uint8 (2, 3, patch, patch): the centre, and the patch at down and right modulo the places there are.

    scale: by how much the picture is enlarged first (only what the patches need of it); by default as much as they need.
    """
    scale = max(1.0, patch / min(picture.size)) if scale is None else scale
    width, height = (max(patch, round(side * scale)) for side in picture.size)
    places = [((width - patch) // 2, (height - patch) // 2), (right % (width - patch + 1), down % (height - patch + 1))]
    cut = []
    for left, top in places:
        if scale == 1:
            part = picture.crop((left, top, left + patch, top + patch))
        else:
            across, along = picture.width / width, picture.height / height
            box = (
                left * across,
                top * along,
                min((left + patch) * across, picture.width),
                min((top + patch) * along, picture.height),
            )
            part = picture.resize((patch, patch), Image.Resampling.BICUBIC, box=box)
        cut.append(np.asarray(part))
    return torch.from_numpy(np.stack(cut)).permute(0, 3, 1, 2)


def load(settings: Settings, job: Job) -> tuple[torch.Tensor, int] | Done:
    """(patches, seed) of a picture, or what went wrong."""
    seed, down, right = draws_of(job.name, settings.seed)
    try:
        picture = read_rgb(job.source)
        return patches_of(picture, settings.patch, down, right, settings.scale(min(picture.size))), seed
    except Exception as error:  # Pillow's plug-ins raise a dozen types on damaged files
        return Done(job.name, workers.reason(error))


def save(job: Job, texture: torch.Tensor) -> Done:
    encoded = BytesIO()
    Image.fromarray(texture.permute(1, 2, 0).contiguous().numpy()).save(encoded, "PNG", compress_level=LOSSLESS_EFFORT)
    try:
        workers.write(job.target, encoded.getbuffer())
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return Done(job.name, workers.reason(error))
        raise
    return Done(job.name, "")


def synthesise(settings: Settings, device: str, loaded: list) -> list[torch.Tensor | Exception]:
    """Textures of [(patches, seed), ...], or in the place of a texture why there is none."""
    if not loaded:
        return []
    patches, seeds = torch.stack([patches for patches, _ in loaded]), torch.tensor([seed for _, seed in loaded])
    try:
        return list(engine_of(settings, device)(patches, seeds))
    except EngineError as error:
        return [error] if len(loaded) == 1 else [synthesise(settings, device, [one])[0] for one in loaded]


def do(settings: Settings, jobs: list[Job]) -> list[Done]:
    """Make the textures of some pictures on the CPU. Raises OSError where writing fails."""
    if multiprocessing.parent_process() is not None:  # a batch system signals all processes: the parent sees to it
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    found = [load(settings, job) for job in jobs]
    return _finish(jobs, found, synthesise(settings, "cpu", [f for f in found if not isinstance(f, Done)]), save)


def _finish(jobs, found, textures, store) -> list:
    """store(job, texture) of what was made, and a Done for what was not, in the order of the jobs."""
    textures, done = iter(textures), []
    for job, what in zip(jobs, found):
        texture = None if isinstance(what, Done) else next(textures)
        if texture is None:
            done.append(what)
        else:
            failed = isinstance(texture, Exception)
            done.append(Done(job.name, str(texture)) if failed else store(job, texture))
    return done


def in_threads(settings: Settings, batches: list[list[Job]], device: str, threads: int) -> Iterator[list[Done]]:
    """As `do` of each batch, for a GPU: threads read the next batch and write the last one while this one is made."""
    with ThreadPoolExecutor(threads) as pool:
        reading = writing = []
        try:
            for jobs, following in zip(batches, [*batches[1:], []]):
                found = [f.result() for f in reading or [pool.submit(load, settings, job) for job in jobs]]
                reading = [pool.submit(load, settings, job) for job in following]
                textures = synthesise(settings, device, [f for f in found if not isinstance(f, Done)])
                yield _written(writing)
                writing = _finish(jobs, found, textures, functools.partial(pool.submit, save))
            yield _written(writing)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _written(waiting: list) -> list[Done]:
    return [w if isinstance(w, Done) else w.result() for w in waiting]


# -------------------------------------------------------------------------------------------------------------- the tree


def open_splits(args) -> list[sets.FolderSet]:
    """The sets of pictures that the flags name. Raises UsageError."""
    root = Path(args.imagenet_path)
    splits = args.splits
    if splits is None:
        there = {"train": (root / "train").is_dir(), "val": any((root / name).is_dir() for name in SPLIT_NAMES["val"])}
        splits = [name for name, is_there in there.items() if is_there] or ["train"]  # the latter says what is wrong
    return [sets.open_tree(sets.split_folder(root, split), class_list=args.class_list) for split in splits]


def check_out(out: Path, root: Path, splits: list[sets.FolderSet]) -> None:
    """UsageError where the trees would mix, or B holds something else."""
    real = Path(os.path.realpath(out))
    holds = [Path(s.root) for s in splits if real in Path(os.path.realpath(s.root)).parents]
    for folder in filter(None, (workers.lies_in(out, root, workers.split_folders(root)), *holds)):
        raise UsageError(
            f"--imagenet_t_path {out} and the pictures in {folder} lie one in the other: "
            f"name a folder beside it, such as {os.path.normpath(root)}-texture"
        )
    workers.check_own(out, "textures.json")


def settle(out: Path, settings: dict, overwrite: bool) -> int:
    """Write B/textures.json, or compare with the one that is there. Raises UsageError.

    Returns the time (st_mtime_ns) before which a texture is to be made again: 0 without --overwrite. It is in the file,
    so that an interrupted --overwrite is gone on with, and never leaves textures of two kinds that pass for finished.
    """
    file = out / "textures.json"
    versions = {"torch": torch.__version__, "numpy": np.__version__, "pillow": Image.__version__}
    record = {"settings": settings, "versions": versions}
    if overwrite:
        workers.write(str(file), (json.dumps(record, indent=2) + "\n").encode())
        record["since"] = file.stat().st_mtime_ns  # of the clock that the textures get their times from
    if overwrite or not file.exists():
        workers.write(str(file), (json.dumps(record, indent=2) + "\n").encode())
        return record.get("since", 0)
    try:
        before = json.loads(file.read_text())
        old, since = before["settings"], int(before.get("since", 0))
        differ = [
            f"{k} {old.get(k)}, not {settings.get(k)}"
            for k in sorted({*old, *settings})
            if old.get(k) != settings.get(k)
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{file}: damaged; give --overwrite, or name another folder") from None
    if differ:
        way_out = "give the same, --overwrite, or another folder"
        raise UsageError(f"{out}: was begun with {'; '.join(differ)}: {way_out}")
    return since


def list_jobs(root: Path, splits: list[sets.FolderSet], out: Path) -> tuple[list[Job], dict[str, str]]:
    """(jobs of all pictures, {name: reason} of those whose texture would get the name of another's)."""
    jobs, twins = [], {}
    for split in splits:
        below = Path(split.root).name
        for path in split.paths:
            name = f"{below}/{os.path.relpath(path, split.root)}".replace(os.sep, "/")
            job = Job(path, name, os.path.join(out, os.path.splitext(name)[0] + ".png"))
            twins.setdefault(job.target, []).append(job)
    failures = {}
    for same in twins.values():
        if len(same) == 1:
            jobs += same
        for job in same if len(same) > 1 else ():
            others = ", ".join(os.path.basename(other.name) for other in same if other is not job)
            failures[job.name] = f"would share its texture's name with {others}: keep one of them, or rename"
    return jobs, failures


def missing_of(jobs: list[Job], since: int) -> list[Job]:
    """The jobs whose texture is not there, or is from before `since`. Makes the folders; each is listed once, and rid of
    what a killed process left in it."""
    there: dict[str, set[str]] = {}
    for folder in dict.fromkeys(os.path.dirname(job.target) for job in jobs):
        os.makedirs(folder, exist_ok=True)
        there[folder] = set()
        for entry in os.scandir(folder):
            if workers.unfinished(entry.name):
                workers.remove_stale(entry.path)
            elif not since or entry.stat().st_mtime_ns >= since:
                there[folder].add(entry.name)
    split = [(job, *os.path.split(job.target)) for job in jobs]
    return [job for job, folder, name in split if name not in there[folder]]


def finish(args, settings: Settings, device: str, splits: list[sets.FolderSet]) -> None:
    """Write what is missing in B and report. Raises OSError, UserError; exits with 1 where pictures failed."""
    out = Path(args.imagenet_t_path)
    out.mkdir(parents=True, exist_ok=True)
    since = settle(out, settings.recorded(), args.overwrite)
    jobs, failures = list_jobs(Path(args.imagenet_path), splits, out)
    jobs = jobs[: args.limit][args.shard[0] - 1 :: args.shard[1]]
    todo = missing_of(jobs, since)
    size = args.batch or BATCH[device][settings.engine]
    batches = [todo[i : i + size] for i in range(0, len(todo), size)]
    processes = args.workers or workers.default_workers(len(todo), PER_START[settings.engine])
    where = f"on the GPU, {processes} threads" if device == "cuda" else f"{processes} process{'es' * (processes > 1)}"
    print(
        f"textures of {args.imagenet_path} by {settings.engine}: {len(jobs)} pictures, {len(jobs) - len(todo)} are there; "
        f"{where}",
        flush=True,
    )
    _warn_of_small([job.source for job in todo], settings)
    if device == "cuda":
        work = in_threads(settings, batches, device, processes)
    else:
        count = min(processes, max(1, len(batches)))
        make = functools.partial(do, settings)
        work = workers.in_processes(make, batches, count, names=lambda jobs: [job.name for job in jobs])

    bar, made = workers.Rate("textures", len(todo), "pictures"), 0
    try:
        with _sigterm_as_ctrl_c():
            for done in work:
                made += sum(not d.failure for d in done)
                failures |= {d.name: d.failure for d in done if d.failure}
                bar.add(len(done))
    except KeyboardInterrupt:
        raise workers.Interrupted(
            f"stopped; what is written is whole, and {workers.again('--overwrite', args.overwrite)}"
        ) from None
    finally:
        work.close()
        bar.close()
    listing = workers.list_failures(out, "failures", args.shard, failures)
    seconds = max(bar.seconds, 1e-6)
    print(
        f"result: {len(jobs) - len(todo) + made} of {len(jobs)} textures in {out}; {made} made now, in "
        f"{clock(seconds)}" + (f", {made / seconds:.2f}/s" if made else "")
    )
    if failures:
        name, reason = sorted(failures.items())[0]
        raise UserError(f"{len(failures)} pictures failed, listed in {listing}; the first: {printable(name)}: {reason}")


def _warn_of_small(paths: list[str], settings: Settings, looked_at: int = 20) -> None:
    """Say so where one of some pictures, evenly taken, is smaller than the published patches."""
    for path in paths[:: max(1, len(paths) // looked_at)]:
        with contextlib.suppress(Exception), Image.open(workers.read(path)) as image:
            if (side := min(image.size)) < PATCH:
                print(
                    f"warning: pictures below {PATCH} pixels, such as {printable(path)} ({image.width} x {image.height}): "
                    f"a patch is {settings.patch / settings.scale(side):.0f} of its pixels, and textures of so few may "
                    "show pieces of the object: look at some with --sheet FILE.png",
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


# ------------------------------------------------------------------------------------------------------------ look at it


def make_sheet(args, splits: list[sets.FolderSet], device: str, most: int = 20, columns: int = 4) -> None:
    """Write a contact sheet: pictures (their centre square) beside their textures of each engine."""
    jobs, _ = list_jobs(Path(args.imagenet_path), splits, Path("unused"))
    jobs = jobs[: args.limit]
    jobs = [jobs[i * len(jobs) // min(most, len(jobs))] for i in range(min(most, len(jobs)))]
    _warn_of_small([job.source for job in jobs], settings_of(args))
    engines = [e for e in ENGINES if e != "embark" or shutil.which(BINARY)]
    shown = []
    for job in jobs:
        loaded = load(settings_of(args), job)
        if isinstance(loaded, Done):
            print(f"left out: {job.name}: {loaded.failure}", file=sys.stderr)
            continue
        picture = read_rgb(job.source)
        side, (width, height) = min(picture.size), picture.size
        left, top = (width - side) // 2, (height - side) // 2
        row = [picture.resize((args.size, args.size), box=(left, top, left + side, top + side))]
        for engine in engines:
            texture = synthesise(settings_of(args, engine), device, [loaded])[0]
            if isinstance(texture, Exception):
                raise UserError(str(texture))
            row.append(Image.fromarray(texture.permute(1, 2, 0).numpy()))
        shown.append(row)
    if not shown:
        raise UserError("none of these pictures can be read")
    columns = min(columns, len(shown))
    gap, head = 8, 14
    wide = args.size * (1 + len(engines)) + gap
    sheet = Image.new("RGB", (wide * columns - gap, head + args.size * -(-len(shown) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for column in range(columns):
        for i, title in enumerate(("picture", *engines)):
            pen.text((wide * column + args.size * i + 2, 1), title, fill="black")
    for i, row in enumerate(shown):
        for j, image in enumerate(row):
            sheet.paste(image, (wide * (i % columns) + args.size * j, head + args.size * (i // columns)))
    path, encoded = Path(args.sheet), BytesIO()
    sheet.save(encoded, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    workers.write(str(path), encoded.getbuffer())
    print(f"result: {len(shown)} pictures with textures by {', '.join(engines)} in {path}")


# ------------------------------------------------------------------------------------------------------------------ main


def settings_of(args, engine: str | None = None) -> Settings:
    mrs = {name: getattr(args, name) for name in texture_mrs.Options.__dataclass_fields__}
    return Settings(
        engine or args.engine,
        args.size,
        args.patch,
        args.seed,
        texture_mrs.Options(**mrs),
        texture_quilt.Options(block=args.block, overlap=args.overlap),
        args.in_proportion,
    )


def device_of(args) -> str:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is at hand: leave it out, or --device cpu")
    on_cpu = args.device == "cpu" or not torch.cuda.is_available() or (args.engine == "embark" and not args.sheet)
    return "cpu" if on_cpu else "cuda"


def main(argv=None) -> None:
    args = parse_args(argv)
    device = device_of(args)
    if args.engine == "embark" and not args.sheet:
        find_binary()
    if args.demo:
        args.data = args.imagenet_path
        demo.ensure_for(args, launch.Process(device=torch.device("cpu")))
    splits = open_splits(args)
    if args.imagenet_t_path:
        check_out(Path(args.imagenet_t_path), Path(args.imagenet_path), splits)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in this process, too: textures shall not depend on the number of cores
    try:
        if args.sheet:
            make_sheet(args, splits, device)
        else:
            finish(args, settings_of(args), device, splits)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; free some space and run the same command again: it goes on" if full else ""
        raise UserError(f"{error.filename or args.imagenet_t_path}: {error.strerror or error}{hint}") from None
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    cli.run(main)
