"""Make the built-in data set: ten shapes, with textures of the class in train and val only.

    OUT/train/<shape>/         textures of its class with probability 0.9 (shape and ground each)
    OUT/val/<shape>/           drawn the same way, other pictures
    OUT/corruption/<corruption>/<severity>/<shape>/
                               the first val pictures under the 15 ImageNet-C corruptions
    OUT/sketch/<shape>/        the val pictures as outlines, black on white, drawn by hand
    OUT/stylized/<shape>/      the val pictures with both textures of another class (in the name)
    OUT/rendition/<shape>/     the val pictures as flat cartoons without texture
    OUT/cue-conflict/<shape>/  the val shapes in the textures of every other class in turn, named
                               SHAPE-TEXTURE as the set of Geirhos et al. is: disc7-star7.png
    OUT-texture/train/<shape>/ on request, the texture of each train picture without the shape

`OUT/demo.json` is written last; a folder that has it is complete. Every picture depends only on the
seed and its place in the set, so the files are the same for any number of worker processes. Colours
are nearly grey and reveal next to nothing about the class.
"""

import errno
import functools
import os
from pathlib import Path

from common import UsageError, UserError, collectives, files, launch
from common.files import only_writer
from preprocess.demo_writer import (
    FORMAT,
    MARK,
    UNFINISHED,
    clear,
    make_folders,
    make_set,
)
from preprocess.workers import is_empty

DEFAULTS = {
    "seed": 0,
    "size": 64,  # side of the pictures in pixels
    "train_per_class": 300,
    "val_per_class": 50,  # also of sketch, stylized, rendition and cue-conflict
    "severities": (3,),  # of the corruptions, out of 1 to 5; (): no corrupted pictures
    "corruption_per_class": 10,  # number of corrupted val pictures per class
    "texture": False,  # also make the tree OUT-texture
}
LEAST = {"seed": 0, "size": 32, "train_per_class": 1, "val_per_class": 1}


def _is_ours(folder: Path) -> bool:
    """Return whether `folder` is a demo folder (complete or not), empty, or missing."""
    if any((folder / name).is_file() for name in (MARK, UNFINISHED)):
        return True
    return not folder.exists() or is_empty(folder)


def _checked(settings: dict) -> dict:
    """Return all settings that decide the pictures. Raises UsageError.

    settings: replace those of DEFAULTS.
    """
    settings = {**DEFAULTS, **settings}
    for name, least in LEAST.items():
        if settings[name] < least:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} {settings[name]} must be at least {least}")
    severities = sorted(set(settings["severities"]))
    if not set(severities) <= {1, 2, 3, 4, 5}:
        words = " ".join(map(str, settings["severities"]))
        raise UsageError(f"--severities {words}: a severity must be 1, 2, 3, 4 or 5")
    corrupted = settings["corruption_per_class"]
    if severities and not 1 <= corrupted <= settings["val_per_class"]:
        raise UsageError(
            f"--corruption-per-class {corrupted} must be between 1 and "
            f"--val-per-class {settings['val_per_class']}"
        )
    return {
        **settings,
        "severities": severities,
        "corruption_per_class": corrupted if severities else 0,
        "texture": bool(settings["texture"]),
    }


def read(out: str | Path) -> dict | None:
    """Return the content of OUT/demo.json, or None if the demo data set is not complete."""
    try:
        content = files.read_json(Path(out) / MARK)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    parts = ("settings", "counts", "bytes")
    return content if all(isinstance(content.get(part), dict) for part in parts) else None


def make(
    out: str | Path, *, workers: int | None = None, progress: bool = True, **settings
) -> dict[str, int]:
    """Make the data set in folder `out`, replacing an earlier demo data set.

    Returns the number of files per set. settings: any of DEFAULTS. workers: number of
    processes, by default one per core. progress: report on standard error. Raises UsageError for an
    invalid setting or a folder that holds other files, UserError if it cannot write.
    """
    content = _make(Path(out), _checked(settings), workers, progress, lambda: False)
    return content["counts"]


def ensure(
    out: str | Path, *, workers: int | None = None, progress: bool = True, **settings
) -> Path:
    """Make the data set as `make` does, unless `out` is complete with these settings.

    An incomplete set is made again. Raises UsageError if a complete set has other settings, since
    it may be in use.
    """
    out = Path(out)
    settings = _checked(settings)
    is_complete = functools.partial(_is_complete, out, settings)
    if not is_complete():
        _make(out, settings, workers, progress, is_complete)
    return out


def _is_complete(out: Path, settings: dict) -> bool:
    """Return whether `out` is complete with these settings. Raises UsageError if they differ."""
    content = read(out)
    if content is None:
        return False
    have = content["settings"]
    want = settings
    if have.get("texture"):  # texture twins do no harm if they were not asked for
        want = {**settings, "texture": True}
    if content.get("format") == FORMAT and have == want:
        return True
    differences = [
        f"{name} {have.get(name)} not {value}"
        for name, value in want.items()
        if have.get(name) != value
    ]
    raise UsageError(
        f"{out} holds a demo data set made with other settings "
        f"({', '.join(differences) or 'by another version'}): "
        "name another folder, or replace it with preprocess/make_demo.py --force"
    )


def _make(out: Path, settings: dict, workers: int | None, progress: bool, is_complete) -> dict:
    """Lock the folder, then make the set unless `is_complete()`.

    Returns the content of demo.json.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers} must be at least 1")
    twin = Path(f"{os.path.abspath(out)}-texture")
    folders = [out, twin] if settings["texture"] else [out]
    stale = [twin] if read(twin) and twin not in folders else []  # of the pictures that go
    for folder in folders:
        if not _is_ours(folder):
            raise UsageError(
                f"{folder} is neither empty nor a demo data set: name a new or empty folder"
            )
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        with only_writer(out, wait=True):  # several programs may want the same pictures at once
            if is_complete():
                return read(out)
            clear(folders + stale)
            make_folders(out, twin, settings)
            content = make_set(out, twin, settings, workers, progress)
            for folder in reversed(folders):  # OUT's own last
                files.write_json(folder / MARK, content)
                (folder / UNFINISHED).unlink()
            return content
    except OSError as error:
        hint = "name another folder"
        if error.errno == errno.ENOSPC:
            hint = "free some space or name another folder"
        raise UserError(f"{error.filename or out}: {error.strerror or error}; {hint}") from None


def ensure_for(args, process: launch.Process, texture: bool = False) -> None:
    """With --demo, make the built-in pictures at DATA unless a complete set of any size exists.

    texture: whether their textures are needed; a set without them is made again with the same
    pictures.
    """
    if args.demo and process.is_main:
        content = read(args.data)
        if content is None:
            ensure(args.data, texture=texture)
        elif texture and not content["settings"].get("texture"):
            make(args.data, **content["settings"] | {"texture": True})
    collectives.barrier()
