"""Write the pictures of the built-in data set, in several processes."""

import contextlib
import functools
import io
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from common import printable
from preprocess import demo_shapes
from preprocess.corruptions import CORRUPTIONS
from preprocess.demo_pictures import SHIFTED, Job, make_pictures
from preprocess.demo_shapes import CLASSES
from preprocess.demo_textures import TEXTURE_NAMES
from preprocess.workers import Rate, count_processes, default_workers, in_processes

FORMAT = 3  # increase it if the same settings give other pictures
SETS = ("train", "val", "corruption", *SHIFTED)
PER_CLASS = {
    "corruption": "corruption_per_class",
    "val": "val_per_class",
    "train": "train_per_class",
}
CHUNKS = {"corruption": 1, "val": 10, "train": 25}  # pictures per job; the slow kinds first
MOST_WORKERS = 16
MARK = "demo.json"
UNFINISHED = "demo.json.partial"


def _write(path: Path, picture: np.ndarray) -> int:
    """Write one PNG and return its size in bytes.

    Pictures are written in place, because the set counts as unfinished until all are complete.
    """
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "PNG")
    try:
        path.write_bytes(encoded.getbuffer())
    except OSError as error:  # a failed write does not name its file
        raise OSError(error.errno, error.strerror, str(path)) from None
    return encoded.tell()


def write_all(
    jobs: list[Job], out: Path, twin: Path | None, settings: dict
) -> list[tuple[str, int]]:
    """Write the pictures of some jobs, and return (set, bytes) of every file."""
    return [
        (name, _write(path, picture))
        for job in jobs
        for name, path, picture in make_pictures(job, out, twin, settings)
    ]


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in ("numpy", "pillow", "corrupt-tta", "scikit-image", "opencv-python"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def clear(folders: list[Path]) -> None:
    """Mark the folders as unfinished demo sets until demo.json is written, and empty them."""
    for folder in folders:
        (folder / UNFINISHED).touch()
        (folder / MARK).unlink(missing_ok=True)
        for name in SETS:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)


def make_folders(out: Path, twin: Path, settings: dict) -> None:
    """Make the class folders of all sets."""
    trees = [out / name for name in ("train", "val", *SHIFTED)]
    for name in CORRUPTIONS:
        trees += [out / "corruption" / name / str(level) for level in settings["severities"]]
    if settings["texture"]:
        trees.append(twin / "train")
    for tree in trees:
        for name in CLASSES:
            (tree / name).mkdir(parents=True)


def make_set(out: Path, twin: Path, settings: dict, workers: int | None, progress: bool) -> dict:
    """Write all pictures and return the content of demo.json."""
    chunks = _chunks(settings)
    count = _count_files(settings)
    if workers is None:
        workers = min(MOST_WORKERS, default_workers(count, 500))
    if progress:
        print(
            f"demo data: making {count} files in {printable(out)}, {count_processes(workers)}",
            file=sys.stderr,
            flush=True,
        )
    names = [*SETS, "texture"] if settings["texture"] else list(SETS)
    counts = dict.fromkeys(names, 0)
    sizes = dict.fromkeys(names, 0)
    do = functools.partial(write_all, out=out, twin=twin, settings=settings)
    bar = Rate("demo data", count, "files", enabled=progress)
    try:
        for written in in_processes(do, chunks, workers):
            for name, size in written:
                counts[name] += 1
                sizes[name] += size
            bar.add(len(written))
    finally:
        bar.close()
    textures = {
        name: {
            "shape": TEXTURE_NAMES[demo_shapes.SHAPE_TEXTURE[label]],
            "ground": TEXTURE_NAMES[demo_shapes.GROUND_TEXTURE[label]],
        }
        for label, name in enumerate(CLASSES)
    }
    return {
        "format": FORMAT,
        "settings": settings,
        "counts": counts,
        "bytes": sizes,
        "seconds": round(bar.seconds, 1),
        "workers": workers,
        "textures": textures,
        "versions": _versions(),
    }


def _chunks(settings: dict) -> list[list[Job]]:
    """Return the jobs in chunks, the slow ones first, so that the processes end together."""
    chunks = []
    for kind, length in CHUNKS.items():
        indices = range(settings[PER_CLASS[kind]])
        jobs = [(kind, shape, index) for shape in range(len(CLASSES)) for index in indices]
        chunks += [jobs[start : start + length] for start in range(0, len(jobs), length)]
    return chunks


def _count_files(settings: dict) -> int:
    corrupted = settings["corruption_per_class"] * len(CORRUPTIONS) * len(settings["severities"])
    val = settings["val_per_class"] * (1 + len(SHIFTED))
    train = settings["train_per_class"] * (2 if settings["texture"] else 1)
    return len(CLASSES) * (corrupted + val + train)
