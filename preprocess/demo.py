"""The built-in data set: ten shapes whose textures go with the class in train and val, and do not in the shifted sets.

    OUT/train/<shape>/                              textures of its class with probability 0.9 (shape and ground each)
    OUT/val/<shape>/                                drawn the same way, other pictures
    OUT/corruption/<corruption>/<severity>/<shape>/ the first val pictures under the 15 ImageNet-C corruptions
    OUT/sketch/<shape>/                             the val pictures as outlines, black on white, drawn by hand
    OUT/stylized/<shape>/                           the val pictures with both textures of another class (in the name)
    OUT/rendition/<shape>/                          the val pictures as flat cartoons without texture
    OUT/cue-conflict/<shape>/                       the val shapes in the textures of every other class in turn, named
                                                    SHAPE-TEXTURE as the set of Geirhos et al. is: disc7-star7.png
    OUT-texture/train/<shape>/                      on request: for each train picture its texture without the shape

`OUT/demo.json` is written last; a folder that has it is complete. Every picture depends on the seed and its own place
in the set only, so the files are the same for any number of worker processes. Colours are nearly grey and say next to
nothing of the class.
"""

import contextlib
import errno
import functools
import io
import json
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from common import UsageError, UserError, launch
from common.files import replacing
from common.files import only_writer
from preprocess import demo_shapes
from preprocess.corruptions import CORRUPTIONS, corrupt
from preprocess.demo_shapes import CLASSES
from preprocess.workers import Rate, default_workers, in_processes

FORMAT = 2  # raise it when the same settings give other pictures
DEFAULTS = {
    "seed": 0,
    "size": 64,  # side of the pictures in pixels
    "train_per_class": 300,
    "val_per_class": 50,  # of sketch, stylized, rendition and cue-conflict, too
    "severities": (3,),  # of the corruptions, out of 1 to 5; (): no corrupted pictures
    "corruption_per_class": 10,  # that many of each class's val pictures are corrupted
    "texture": False,  # also make the tree OUT-texture
}
CUES = "cue-conflict"
SHIFTED = ("sketch", "stylized", "rendition", CUES)  # one picture each of every val picture
SETS = ("train", "val", "corruption", *SHIFTED)
_STREAMS = {"train": 0, "val": 1, "sketch": 2, "stylized": 3, "texture": 5, CUES: 6}
_MARK, _UNFINISHED = "demo.json", "demo.json.partial"


def _rng(seed, stream, *key):
    return np.random.default_rng([seed, _STREAMS[stream], *key])


def spec(seed, split, shape, index):
    """What is drawn in picture `index` of class number `shape` in a set: a `demo_shapes.Spec`. Draws no picture."""
    drawn = demo_shapes.draw(_rng(seed, "train" if split == "train" else "val", shape, index), shape)
    if split == CUES:  # the textures take turns, so that all of them are there equally often
        others = demo_shapes.others(shape)
        return demo_shapes.restyle(drawn, _rng(seed, split, shape, index), others[(shape + index) % len(others)])
    return demo_shapes.restyle(drawn, _rng(seed, split, shape, index)) if split == "stylized" else drawn


def file_name(drawn, split, index):
    """`disc_0007.png`; in the textures of the star `disc_0007-star.png` in stylized, `disc7-star7.png` in cue-conflict."""
    if split == CUES:
        return f"{CLASSES[drawn.shape]}{index}-{CLASSES[drawn.texture_class]}{index}.png"
    style = f"-{CLASSES[drawn.texture_class]}" if split == "stylized" else ""
    return f"{CLASSES[drawn.shape]}_{index:04d}{style}.png"


def render(seed, split, shape, index, size):
    """Picture `index` of class number `shape` in train, val or a set of SHIFTED: (size, size, 3) uint8."""
    drawn = spec(seed, split, shape, index)
    if split == "sketch":
        return demo_shapes.render_sketch(drawn, size, _rng(seed, "sketch", shape, index))
    if split == "rendition":
        return demo_shapes.render_rendition(drawn, size)
    return demo_shapes.render_textured(drawn, size)


# ---------------------------------------------------------------------------------------------------------------------
# Writing the set


def _write(path, picture):
    """Write one PNG; returns its size in bytes."""
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "PNG")
    try:
        path.write_bytes(encoded.getbuffer())
    except OSError as error:  # a failed write does not name its file
        raise OSError(error.errno, error.strerror, str(path)) from None
    return encoded.tell()


def _do(job, out, twin, settings):
    """One job: the pictures made from one train or val picture. Returns [(set, bytes), ...], one per file."""
    kind, shape, index = job
    seed, size, name = settings["seed"], settings["size"], CLASSES[shape]
    source = "train" if kind == "train" else "val"
    file = file_name(spec(seed, source, shape, index), source, index)
    written = []
    if kind == "corruption":
        clean = render(seed, "val", shape, index, size)
        for corruption in CORRUPTIONS:
            for severity in settings["severities"]:
                path = out / "corruption" / corruption / str(severity) / name / file
                written.append((kind, _write(path, corrupt(clean, corruption, severity, (seed, shape, index)))))
    elif kind in ("val", CUES):
        for split in ("val", *SHIFTED) if kind == "val" else (CUES,):
            path = out / split / name / file_name(spec(seed, split, shape, index), split, index)
            written.append((split, _write(path, render(seed, split, shape, index, size))))
    else:
        picture = render(seed, "train", shape, index, size)
        written.append(("train", _write(out / "train" / name / file, picture)))
        if settings["texture"]:
            texture = demo_shapes.texture_twin(picture, _rng(seed, "texture", shape, index))
            written.append(("texture", _write(twin / "train" / name / file, texture)))
    return written


def _do_all(jobs, **how):
    return [written for job in jobs for written in _do(job, **how)]


def _is_ours(folder):
    """True for a demo folder, complete or not, and for one that is empty or does not exist."""
    if any((folder / name).is_file() for name in (_MARK, _UNFINISHED)):
        return True
    if folder.exists() and not folder.is_dir():
        return False
    return not folder.exists() or not any(folder.iterdir())


def _versions():
    versions = {"python": sys.version.split()[0]}
    for package in ("numpy", "pillow", "corrupt-tta", "scikit-image", "opencv-python"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _checked(settings):
    """The settings that decide which pictures are made: DEFAULTS where nothing else is said. Raises UsageError."""
    unknown = set(settings) - set(DEFAULTS)
    if unknown:
        raise TypeError(f"no such setting of the demo data: {', '.join(sorted(unknown))}")
    settings = {**DEFAULTS, **settings}
    severities, corrupted, val = (settings[k] for k in ("severities", "corruption_per_class", "val_per_class"))
    for name, least in (("seed", 0), ("size", 32), ("train_per_class", 1), ("val_per_class", 1)):
        if settings[name] < least:
            raise UsageError(f"--{name.replace('_', '-')} {settings[name]} must be at least {least}")
    if not set(severities) <= {1, 2, 3, 4, 5}:
        raise UsageError(f"--severities {' '.join(map(str, severities))}: a severity is 1, 2, 3, 4 or 5")
    if severities and not 1 <= corrupted <= val:
        raise UsageError(f"--corruption-per-class {corrupted} must be between 1 and --val-per-class {val}")
    settings["severities"] = sorted(set(severities))
    settings["corruption_per_class"] = corrupted if severities else 0
    settings["texture"] = bool(settings["texture"])
    return settings


def read(out):
    """The content of OUT/demo.json, or None where there is no complete demo data set."""
    try:
        content = json.loads((Path(out) / _MARK).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) and "settings" in content else None


def make(out, *, workers=None, progress=True, **settings):
    """Make the data set in folder `out`, replacing a demo data set that is there. Returns the files per set.

    settings: any of DEFAULTS. workers: processes, by default one per core. progress: report on standard error.
    Raises UsageError for a setting that cannot work or a folder that holds other files, UserError if it cannot write.
    """
    return _make(Path(out), _checked(settings), workers, progress, lambda: False)["counts"]


def ensure(out, *, workers=None, progress=True, **settings):
    """As `make`, but at once where `out` is complete with these settings; an interrupted one is made again.

    Returns `out` as a Path. A complete data set with other settings is a UsageError: it may be in use.
    """
    out, settings = Path(out), _checked(settings)

    def is_complete():
        content = read(out)
        if content is None:
            return False
        have, want = content["settings"], settings
        if have.get("texture") and not want["texture"]:  # texture twins do not disturb those who did not ask for them
            want = {**settings, "texture": True}
        if content.get("format") == FORMAT and have == want:
            return True
        differ = ", ".join(f"{k} {have.get(k)} not {v}" for k, v in want.items() if have.get(k) != v)
        raise UsageError(
            f"{out}: holds a demo data set made with other settings ({differ or 'by another version'}): "
            "name another folder, or replace it with preprocess/make_demo.py --force"
        )

    if not is_complete():
        _make(out, settings, workers, progress, is_complete)
    add_cues(out)
    return out


def add_cues(out):
    """Add OUT/cue-conflict to a complete set of a version that had none; everything else of it stays as it is."""
    out = Path(out)
    if (content := read(out)) is None or CUES in content["counts"]:
        return
    try:
        with only_writer(out, wait=True):
            content = read(out)
            if content is None or CUES in content["counts"]:
                return
            shutil.rmtree(out / CUES, ignore_errors=True)  # of an interruption
            for name in CLASSES:
                (out / CUES / name).mkdir(parents=True)
            settings = content["settings"]
            jobs = [(CUES, shape, i) for shape in range(len(CLASSES)) for i in range(settings["val_per_class"])]
            sizes = [size for _, size in _do_all(jobs, out=out, twin=None, settings=settings)]
            content["counts"][CUES], content["bytes"][CUES] = len(sizes), sum(sizes)
            with replacing(out / _MARK, "w") as file:
                file.write(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        where = error.filename or out
        raise UserError(
            f"{where}: {error.strerror or error}; the set {CUES} is missing and could not be added"
        ) from None


def _make(out, settings, workers, progress, is_complete):
    """Make the set unless `is_complete()` once this process holds the folder. Returns the content of demo.json."""
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} must be at least 1")
    twin = Path(f"{os.path.abspath(out)}-texture")
    folders = [out, twin] if settings["texture"] else [out]
    for folder in folders:
        if not _is_ours(folder):
            raise UsageError(f"{folder}: is not empty and not a demo data set; name a new or empty folder")
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        with only_writer(out, wait=True):  # several programs may ask for the same pictures at once
            return read(out) if is_complete() else _make_locked(out, twin, folders, settings, workers, progress)
    except OSError as error:
        hint = "free some space or name another folder" if error.errno == errno.ENOSPC else "name another folder"
        raise UserError(f"{error.filename or out}: {error.strerror or error}; {hint}") from None


def _make_locked(out, twin, folders, settings, workers, progress):
    for folder in folders:
        (folder / _UNFINISHED).touch()  # from here until demo.json is written, the folder is known as an unfinished one
        (folder / _MARK).unlink(missing_ok=True)
        for name in SETS:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
    trees = [out / name for name in ("train", "val", *SHIFTED)]
    trees += [out / "corruption" / name / str(level) for name in CORRUPTIONS for level in settings["severities"]]
    trees += [twin / "train"] if settings["texture"] else []
    for tree in trees:
        for name in CLASSES:
            (tree / name).mkdir(parents=True)

    # The slow jobs first, so that the processes end together.
    per_class = {"corruption": "corruption_per_class", "val": "val_per_class", "train": "train_per_class"}
    jobs = {
        kind: [(kind, shape, index) for shape in range(len(CLASSES)) for index in range(settings[key])]
        for kind, key in per_class.items()
    }
    chunks = [
        jobs[kind][i : i + length]
        for kind, length in {"corruption": 1, "val": 10, "train": 25}.items()
        for i in range(0, len(jobs[kind]), length)
    ]
    files = len(jobs["corruption"]) * len(CORRUPTIONS) * len(settings["severities"])
    files += (1 + len(SHIFTED)) * len(jobs["val"]) + len(jobs["train"]) * (2 if settings["texture"] else 1)
    if workers is None:
        workers = min(16, default_workers(files, 500))
    if progress:
        print(f"demo data: making {files} files in {out} with {workers} process(es)", file=sys.stderr, flush=True)

    names = [name for name in (*SETS, "texture") if name != "texture" or settings["texture"]]
    counts, sizes = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    do = functools.partial(_do_all, out=out, twin=twin, settings=settings)
    bar = Rate("demo data", files, "files", enabled=progress)
    try:
        for written in in_processes(do, chunks, workers):
            for name, size in written:
                counts[name] += 1
                sizes[name] += size
            bar.add(len(written))
    finally:
        bar.close()
    content = {
        "format": FORMAT,
        "settings": settings,
        "counts": counts,
        "bytes": sizes,
        "seconds": round(bar.seconds, 1),
        "workers": workers,
        "textures": {
            name: {
                "shape": demo_shapes.TEXTURE_NAMES[demo_shapes.SHAPE_TEXTURE[i]],
                "ground": demo_shapes.TEXTURE_NAMES[demo_shapes.GROUND_TEXTURE[i]],
            }
            for i, name in enumerate(CLASSES)
        },
        "versions": _versions(),
    }
    for folder in reversed(folders):  # OUT's own last
        with replacing(folder / _MARK, "w") as file:
            file.write(json.dumps(content, indent=1) + "\n")
        (folder / _UNFINISHED).unlink()
    return content


def ensure_for(args, process: launch.Process, texture: bool = False, cues: bool = False) -> None:
    """With --demo: make the built-in pictures at DATA unless a whole set of them, of whatever size, is there.

    cues: cue-conflict, too, which an older set lacks.
    """
    if args.demo and process.is_main:
        content = read(args.data)
        if content is None or (texture and not content["settings"]["texture"]):
            ensure(args.data, texture=texture)
        if cues:
            add_cues(args.data)
    launch.barrier()
