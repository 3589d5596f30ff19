"""Pair texture pictures with the photographs that they were made from."""

from __future__ import annotations

import os
from pathlib import Path

from common import UsageError, collectives, files, printable
from common.sets import TORCHVISION_SETS, FolderSet, few, open_set, pictures_below
from nonsem_neg.negatives import pair_names, stem_of

PATCH_PREFIXES = ("texture1_", "texture2_")  # begin the files that an interrupted synthesis leaves


def original_root_of(texture_root: str | Path) -> Path:
    """Return the originals' path by the published convention: the textures' without '-texture'.

    Raises UsageError where the path has no '-texture'.
    """
    text = str(texture_root)
    if "-texture" not in text:
        raise UsageError(
            f"{text} has no '-texture', which is left out to find the originals' folder; name both "
            "folders (DATA and --texture-root)"
        )
    return Path(text.replace("-texture", ""))


def check_roots(data_root: str | Path, texture_root: str | Path, dataset: str) -> None:
    """Raise UsageError where two trees cannot be paired: no class folders, or the same folder."""
    if dataset in ("packed", *TORCHVISION_SETS):
        raise UsageError(
            f"--robust texture does not support --dataset {dataset}, as pictures and textures are "
            "paired by the names of their files: give both as trees of class folders"
        )
    for below in ("", "train"):
        if _same(os.path.join(data_root, below), os.path.join(texture_root, below)):
            raise UsageError(
                f"the textures in {printable(texture_root)} and the pictures in "
                f"{printable(data_root)} are the same folder: name the tree of textures with "
                "--texture-root"
            )


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them is missing, which is reported when it is opened
        return os.path.realpath(one) == os.path.realpath(other)


def open_pairs(args) -> tuple[FolderSet, FolderSet]:
    """Return (originals, textures), paired row by row; unmatched.txt lists the rest."""
    texture_set = open_set(args.texture_root, "train", class_list=args.class_list)
    listing = None
    if collectives.rank() == 0 and not args.show_views:
        os.makedirs(args.ckpt_path, exist_ok=True)
        listing = os.path.join(args.ckpt_path, "unmatched.txt")
    return pair_by_path(texture_set, args.data, unmatched_listing=listing)


def pair_by_path(
    texture_set: FolderSet,
    original_root: str | Path,
    *,
    unmatched_listing: str | Path | None = None,
) -> tuple[FolderSet, FolderSet]:
    """Return (originals, textures), paired row by row.

    A pair has the same class folder and the same stem; extensions may differ.
    original_root: the originals' data folder (its split is that of the texture set, as in
    .../train) or the class tree. unmatched_listing: a file that receives one line per texture
    without an original and per original without a texture.
    Left-over patch files among the textures are ignored, and originals without a texture are left
    out; the `notes` of the returned originals count both. Raises UsageError where a texture has no
    original.
    """
    original_root = Path(original_root)
    below = original_root / Path(texture_set.root).name
    tree = below if below.is_dir() else original_root
    if not tree.is_dir():
        raise UsageError(
            f"{tree}: no such folder; it should hold the originals of {texture_set.root}"
        )
    originals, labels = _originals(tree, texture_set.classes)
    textures = [os.path.relpath(path, texture_set.root) for path in texture_set.paths]
    kept = [row for row, name in enumerate(textures) if not _is_patch(name)]
    patches = len(textures) - len(kept)
    pairs, alone = pair_names([textures[row] for row in kept], originals)
    rows = [kept[texture] for texture, _ in pairs]
    lonely = [textures[kept[texture]] for texture in alone]
    paths = [originals[original] for _, original in pairs]
    targets = [labels[original] for _, original in pairs]
    without_texture = sorted({*originals} - {*paths}, key=stem_of)
    if unmatched_listing is not None:
        _list_unmatched(unmatched_listing, lonely, without_texture)
    _check_pairs(texture_set, tree, len(rows), lonely, unmatched_listing)

    original_set = FolderSet(paths, targets, texture_set.classes, tree)
    if patches:
        original_set.notes.append(
            f"{texture_set.root}: {patches} left-over patch files (texture1_*, texture2_*) ignored"
        )
    if without_texture:
        original_set.notes.append(
            f"{tree}: {len(without_texture)} pictures without a texture left out"
        )
    return original_set, texture_set.select(rows)


def _is_patch(name: str) -> bool:
    return os.path.basename(name).startswith(PATCH_PREFIXES)


def _originals(tree: Path, classes: list[str]) -> tuple[list[str], list[int]]:
    """Return paths and labels of the pictures below `tree`. Raises UsageError for equal stems."""
    labelled = {}
    stems = {}
    for label, class_name in enumerate(classes):
        for path in pictures_below(tree, class_name):
            first = stems.setdefault(stem_of(path), path)
            if first != path:
                both = few([first, path])
                raise UsageError(f"{tree}: {both} have the same name; keep one of them")
            labelled[path] = label
    return [*labelled], [*labelled.values()]


def _list_unmatched(path: str | Path, lonely: list[str], without_texture: list[str]) -> None:
    lines = [f"texture without original: {name}\n" for name in lonely]
    lines += [f"original without texture: {name}\n" for name in without_texture]
    with files.replacing(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(lines)


def _check_pairs(
    texture_set: FolderSet, tree: Path, pairs: int, lonely: list[str], listing: str | Path | None
) -> None:
    """Raise UsageError where there are no pairs, or where textures have no original (`lonely`)."""
    if not pairs:
        textures = len(lonely)
        first = f"; first: {few(lonely, 3)}" if lonely else ""
        raise UsageError(
            f"{texture_set.root}: none of its {textures} textures has an original in {tree} "
            f"(same class folder and name){first}"
        )
    if lonely:
        where = f"; full list in {listing}" if listing is not None else ""
        raise UsageError(
            f"{tree}: {len(lonely)} of {len(lonely) + pairs} originals missing: "
            f"{few(lonely, 3)}{where}; add them or remove these textures"
        )
