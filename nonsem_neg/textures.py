"""Texture pictures and the photographs they were made from: which is whose."""

from __future__ import annotations

import os
from pathlib import Path

from common import UsageError, printable
from common.sets import TORCHVISION_SETS, FolderSet, few, pictures_below

PATCH_PREFIXES = ("texture1_", "texture2_")  # temporary patches that an interrupted texture synthesis leaves behind


def original_root_of(texture_root: str | Path) -> Path:
    """The published naming convention: the originals' path is the textures' path without any '-texture'."""
    text = str(texture_root)
    if "-texture" not in text:
        raise UsageError(f"{text}: no '-texture' in the path to derive the originals' folder from: name both folders")
    return Path(text.replace("-texture", ""))


def check_roots(data_root: str | Path, texture_root: str | Path, dataset: str) -> None:
    """UsageError where these cannot be paired: no class folders, or one folder twice: pictures as their own textures."""
    if dataset in ("packed", *TORCHVISION_SETS):
        raise UsageError(
            f"--robust texture does not support --dataset {dataset}: pictures and textures are paired by the names of their "
            "files: give both as trees of class folders"
        )
    for below in ("", "train"):
        if _same(os.path.join(data_root, below), os.path.join(texture_root, below)):
            raise UsageError(
                f"the textures in {printable(texture_root)} are the pictures in {printable(data_root)}, one and the same "
                "folder: name the tree of their textures with --texture-root"
            )


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one is not there: what it lacks is said later
        return os.path.realpath(one) == os.path.realpath(other)


def pair_by_path(
    texture_set: FolderSet, original_root: str | Path, *, unmatched_listing: str | Path | None = None
) -> tuple[FolderSet, FolderSet]:
    """(originals, textures), row by row the same picture: same class folder, same stem, any extension.

    original_root   the originals' data folder (its split is the texture set's, as in .../train) or the class tree.
    unmatched_listing  file that receives one line per texture without an original and per original without a texture.
    Left-over patch files among the textures are ignored; originals that have no texture are left out; both are counted
    in `notes` of the returned originals. Raises UsageError where a texture has no original.
    """
    original_root = Path(original_root)
    below = original_root / Path(texture_set.root).name
    tree = below if below.is_dir() else original_root
    if not tree.is_dir():
        raise UsageError(f"{tree}: no such folder; it should hold the originals of {texture_set.root}")

    originals: dict[str, str] = {}
    labels: dict[str, int] = {}
    for label, class_name in enumerate(texture_set.classes):
        for path in pictures_below(tree, class_name):
            stem = os.path.splitext(path)[0]
            if stem in originals:
                raise UsageError(f"{tree}: {few([originals[stem], path])} share one name: keep one of them")
            originals[stem], labels[stem] = path, label

    rows, stems, lonely, patches = [], [], [], 0
    for row, path in enumerate(texture_set.paths):
        relative = os.path.relpath(path, texture_set.root)
        stem = os.path.splitext(relative)[0]
        if os.path.basename(path).startswith(PATCH_PREFIXES):
            patches += 1
        elif stem in originals:
            rows.append(row)
            stems.append(stem)
        else:
            lonely.append(relative)
    without_texture = sorted(set(originals) - set(stems))
    if unmatched_listing is not None:
        lines = [f"texture without original: {p}" for p in lonely]
        lines += [f"original without texture: {originals[s]}" for s in without_texture]
        listing = "".join(line + "\n" for line in lines)
        Path(unmatched_listing).write_text(listing, encoding="utf-8", errors="backslashreplace")
    if not rows:
        raise UsageError(
            f"{texture_set.root}: none of its {len(texture_set) - patches} textures has its original in {tree} "
            f"(same class folder and name){f'; first: {few(lonely, 3)}' if lonely else ''}"
        )
    if lonely:
        where = f"; full list in {unmatched_listing}" if unmatched_listing is not None else ""
        raise UsageError(
            f"{tree}: {len(lonely)} of {len(lonely) + len(rows)} originals missing: "
            f"{few(lonely, 3)}{where}; add them or remove these textures"
        )

    original_set = FolderSet([originals[s] for s in stems], [labels[s] for s in stems], texture_set.classes, tree)
    if patches:
        note = f"{texture_set.root}: {patches} left-over patch files (texture1_*, texture2_*) ignored"
        original_set.notes.append(note)
    if without_texture:
        original_set.notes.append(f"{tree}: {len(without_texture)} pictures without a texture left out")
    return original_set, texture_set.select(rows)
