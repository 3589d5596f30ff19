"""Shape or texture? Pictures with the shape of one category and the texture of another, and which of the two is answered.

Geirhos et al., ICLR 2019, arXiv:1811.12231: of the answers that name either of the two, the share that names the shape. The
pictures are called SHAPE1-TEXTURE1.png (their set: cue-conflict/cat/cat4-chair2.png, 16 categories); where a file is not
called so, its folder may be. A picture whose shape and texture are of one category has no conflict and is left out.

A classifier of ImageNet classes (WordNet ids) answers with the category whose classes have the highest mean probability, as
published; one whose classes have the names of the categories is taken by its word. Of a classifier that has none of the
classes of a category (ImageNet-100 has 7 of the 16) the pictures with that category, as shape or texture, are left out.
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
    """{category: WordNet ids of its ImageNet-1k classes}, the 16 of Geirhos et al."""
    lines = (Path(__file__).parent / "entry_level.txt").read_text().splitlines()
    words = [line.split() for line in lines if not line.startswith("#")]
    return {category: tuple(ids) for category, *ids in words}


def cues_of(path: str) -> tuple[str, str] | None:
    """(shape, texture) that a picture's name tells, else its folder's; None: neither does."""
    path = Path(path)
    found = CUES.fullmatch(path.stem) or CUES.fullmatch(path.parent.name)
    return found.groups() if found else None


class CueConflict:
    """The pictures of `folder` in conflict whose two categories have a class of the classifier.

    dataset: sets.FolderSet, targets are the shapes, classes are `categories`. textures (n,): like its targets. columns: the
    classes of every category. without: categories that have no class. note: what was left out, in words.
    Raises UsageError for a folder or names that do not fit.
    """

    def __init__(self, folder: str, classes: list[str]):
        if not Path(folder).is_dir():
            raise UsageError(f"{folder}: no such folder")
        paths = sets.pictures_below(folder)
        if not paths:
            raise UsageError(f"{folder}: no pictures in it; expected {folder}/CLASS/SHAPE1-TEXTURE1.png")
        cues = [cues_of(path) for path in paths]
        if None in cues:
            named = f"{cues.count(None)} of {len(paths)} pictures do not tell shape and texture"
            first = printable(paths[cues.index(None)])
            raise UsageError(f"{folder}: {named} by a name such as cat4-chair2.png: {first}")
        place = {name: number for number, name in enumerate(classes)}
        every = sorted({category for pair in cues for category in pair})
        wanted = {c: (c,) if c in place else entry_level().get(c, ()) for c in every}
        found = {c: [place[name] for name in names if name in place] for c, names in wanted.items()}
        self.categories, self.without = [c for c in every if found[c]], [c for c in every if not found[c]]
        self.columns, self.outputs = [found[c] for c in self.categories], len(classes)
        conflict = any(shape != texture for shape, texture in cues)
        number = {c: n for n, c in enumerate(self.categories)}
        rows = [i for i, (s, t) in enumerate(cues) if s != t and s in number and t in number]
        if not conflict:
            raise UsageError(f"{folder}: no picture has the shape of one category and the texture of another")
        if not rows:
            shown, theirs = (printable(sets.few(names)) for names in (every, classes))
            raise UsageError(
                f"{folder}: no picture whose shape and texture ({shown}) are both classes of the classifier ({theirs})"
            )
        shapes, self.textures = ([number[cues[i][cue]] for i in rows] for cue in (0, 1))
        self.textures = torch.tensor(self.textures)
        self.dataset = sets.FolderSet([paths[i] for i in rows], shapes, self.categories, folder)
        self.note = f"{len(rows)} of {len(paths)} pictures, {len(self.categories)} of {len(every)} categories"
        if self.without:
            self.note += f"; no class for {', '.join(self.without)}"

    def judge(self, logits: Tensor, _=None) -> tuple[Tensor]:
        """The category (N,) of logits (N, C or more): the highest mean probability of its classes, the first of equals."""
        probabilities = logits[:, : self.outputs].float().softmax(1)
        return (torch.stack([probabilities[:, columns].mean(1) for columns in self.columns], 1).argmax(1),)

    def values(self, rows: Tensor, decisions: Tensor) -> dict[str, float]:
        """Of the answers `decisions` (n,) to the pictures `rows` (n,), in percent: `shape_bias`, left out where no answer
        names either cue; `cue_shape` and `cue_texture`, the accuracies."""
        cues = self.dataset.targets[rows.long()], self.textures[rows.long()]
        shape, texture = (100 * (decisions == cue).double().mean().item() for cue in cues)
        share = {"shape_bias": round(100 * shape / (shape + texture), 6)} if shape + texture else {}
        return share | {"cue_shape": round(shape, 6), "cue_texture": round(texture, 6)}
