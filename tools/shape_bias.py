"""Shape or texture? Judge pictures with the shape of one category and the texture of another.

Geirhos et al., ICLR 2019, arXiv:1811.12231: of the answers that name either of the two, the share
that names the shape. The pictures are called SHAPE1-TEXTURE1.png (their set has 16 categories and
names such as cue-conflict/cat/cat4-chair2.png); where a file is not called so, its folder may be. A
picture whose shape and texture are of one category has no conflict and is left out.

A classifier of ImageNet classes (WordNet ids) answers with the category whose classes have the
highest mean probability, as published; one whose classes have the names of the categories is taken
by its word. Of a classifier that has none of the classes of a category (ImageNet-100 has 7 of the
16) the pictures with that category, as shape or texture, are left out.
"""

import functools
import re
from pathlib import Path

import torch
from torch import Tensor

from common import UsageError, printable, sets

CUES = re.compile(r"(?:.*_)?([A-Za-z]+(?: [A-Za-z]+)*)\d*-([A-Za-z]+(?: [A-Za-z]+)*)\d*")


@functools.cache
def entry_level() -> dict[str, tuple[str, ...]]:
    """Return {category: WordNet ids of its ImageNet-1k classes}, the 16 of Geirhos et al."""
    lines = (Path(__file__).parent / "entry_level.txt").read_text().splitlines()
    words = [line.split() for line in lines if not line.startswith("#")]
    return {category: tuple(ids) for category, *ids in words}


def cues_of(path: str) -> tuple[str, str] | None:
    """Return (shape, texture) as a picture's name tells them, else its folder's, else None."""
    path = Path(path)
    match = CUES.fullmatch(path.stem) or CUES.fullmatch(path.parent.name)
    return match.groups() if match else None


def read_cues(folder: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the paths of the pictures of a folder, and (shape, texture) of each.

    Raises UsageError for a folder or names that do not fit.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{folder}: no such folder")
    paths = sets.pictures_below(folder)
    if not paths:
        raise UsageError(
            f"{folder}: no pictures in it; expected {folder}/CLASS/SHAPE1-TEXTURE1.png"
        )
    cues = [cues_of(path) for path in paths]
    if None in cues:
        first = printable(paths[cues.index(None)])
        raise UsageError(
            f"{folder}: {cues.count(None)} of {len(paths)} pictures do not tell shape and texture "
            f"by a name such as cat4-chair2.png: {first}"
        )
    if all(shape == texture for shape, texture in cues):
        raise UsageError(
            f"{folder}: no picture has the shape of one category and the texture of another"
        )
    return paths, cues


def columns_of(categories: list[str], classes: list[str]) -> dict[str, list[int]]:
    """Return {category: the numbers of its classes}, by its own name or by WordNet ids."""
    numbers = {name: number for number, name in enumerate(classes)}
    columns = {}
    for category in categories:
        names = (category,) if category in numbers else entry_level().get(category, ())
        columns[category] = [numbers[name] for name in names if name in numbers]
    return columns


class CueConflict:
    """The pictures of `folder` in conflict whose two categories have a class of the classifier.

    classes: names of the classifier's classes, in order.

    categories: those that have a class. columns: for each the numbers of its classes. without:
    categories that have none. outputs: number of classes. dataset: a picture set with the shapes as
    targets and the categories as classes. textures (n,): numbers of categories, like its targets.
    note: says what was left out.
    Raises UsageError for a folder or names that do not fit.
    """

    def __init__(self, folder: str, classes: list[str]):
        paths, cues = read_cues(folder)
        named = sorted({category for pair in cues for category in pair})
        columns = columns_of(named, classes)
        self.outputs = len(classes)
        self.categories = [category for category in named if columns[category]]
        self.without = [category for category in named if not columns[category]]
        self.columns = [columns[category] for category in self.categories]
        number = {category: place for place, category in enumerate(self.categories)}
        rows = [
            row
            for row, (shape, texture) in enumerate(cues)
            if shape != texture and shape in number and texture in number
        ]
        if not rows:
            theirs = printable(sets.few(classes))
            raise UsageError(
                f"{folder}: no picture whose shape and texture ({printable(sets.few(named))}) are "
                f"both classes of the classifier ({theirs})"
            )
        shapes = [number[cues[row][0]] for row in rows]
        self.textures = torch.tensor([number[cues[row][1]] for row in rows])
        kept = [paths[row] for row in rows]
        self.dataset = sets.FolderSet(kept, shapes, self.categories, folder)
        self.note = (
            f"{len(rows)} of {len(paths)} pictures, "
            f"{len(self.categories)} of {len(named)} categories"
        )
        if self.without:
            self.note += f"; no class for {', '.join(self.without)}"

    def judge(self, logits: Tensor, _=None) -> tuple[Tensor]:
        """Return the category (N,) that logits (N, outputs or more) answer, in a tuple.

        It is the one with the highest mean probability of its classes, the first of equals.
        """
        probabilities = logits[:, : self.outputs].float().softmax(1)
        means = [probabilities[:, columns].mean(1) for columns in self.columns]
        return (torch.stack(means, 1).argmax(1),)

    def values(self, rows: Tensor, decisions: Tensor) -> dict[str, float]:
        """Return what the answers `decisions` (n,) to the pictures `rows` (n,) say, in percent.

        `shape_bias` is left out where no answer names either cue; `cue_shape` and `cue_texture` are
        the accuracies.
        """
        rows = rows.long()
        shape = 100 * (decisions == self.dataset.targets[rows]).double().mean().item()
        texture = 100 * (decisions == self.textures[rows]).double().mean().item()
        numbers = {}
        if shape + texture:
            numbers["shape_bias"] = round(100 * shape / (shape + texture), 6)
        numbers["cue_shape"] = round(shape, 6)
        numbers["cue_texture"] = round(texture, 6)
        return numbers
