"""Choose the content and file name of every built-in picture, and draw it."""

from pathlib import Path

import numpy as np

from preprocess import demo_shapes
from preprocess.corruptions import CORRUPTIONS, corrupt
from preprocess.demo_shapes import CLASSES
from preprocess.demo_textures import texture_twin

CUES = "cue-conflict"
SHIFTED = ("sketch", "stylized", "rendition", CUES)  # each has one picture per val picture
# separates the random draws of pictures with the same seed, class and index
STREAMS = {"train": 0, "val": 1, "sketch": 2, "stylized": 3, "texture": 5, CUES: 6}
Job = tuple[str, int, int]  # (kind, class number, index)


def _rng(seed: int, stream: str, *key: int) -> np.random.Generator:
    return np.random.default_rng([seed, STREAMS[stream], *key])


def spec(seed: int, split: str, shape: int, index: int) -> demo_shapes.Spec:
    """Return the content of picture `index` of class number `shape`, without rendering it."""
    source = "train" if split == "train" else "val"
    drawn = demo_shapes.draw(_rng(seed, source, shape, index), shape)
    if split == CUES:  # the textures take turns, so that all are equally frequent
        others = demo_shapes.others(shape)
        other = others[(shape + index) % len(others)]
        return demo_shapes.restyle(drawn, _rng(seed, split, shape, index), other)
    if split == "stylized":
        return demo_shapes.restyle(drawn, _rng(seed, split, shape, index))
    return drawn


def file_name(drawn: demo_shapes.Spec, split: str, index: int) -> str:
    """Return a file name such as `disc_0007.png`, with the class of a foreign texture if any.

    With textures of the star: `disc_0007-star.png` in stylized, `disc7-star7.png` in cue-conflict.
    """
    name = CLASSES[drawn.shape]
    texture = CLASSES[drawn.texture_class]
    if split == CUES:
        return f"{name}{index}-{texture}{index}.png"
    style = f"-{texture}" if split == "stylized" else ""
    return f"{name}_{index:04d}{style}.png"


def render(seed: int, split: str, shape: int, index: int, size: int) -> np.ndarray:
    """Draw picture `index` of class number `shape`: (size, size, 3) uint8.

    split: train, val or a set of SHIFTED.
    """
    drawn = spec(seed, split, shape, index)
    if split == "sketch":
        return demo_shapes.render_sketch(drawn, size, _rng(seed, "sketch", shape, index))
    if split == "rendition":
        return demo_shapes.render_rendition(drawn, size)
    return demo_shapes.render_textured(drawn, size)


def make_pictures(job: Job, out: Path, twin: Path | None, settings: dict):
    """Yield (set, path, picture) of every picture made from one train or val picture.

    job: its kind is train, val or corruption. twin: folder of the texture tree, or None.
    """
    kind, shape, index = job
    seed = settings["seed"]
    size = settings["size"]
    name = CLASSES[shape]
    if kind == "corruption":
        file = file_name(spec(seed, "val", shape, index), "val", index)
        clean = render(seed, "val", shape, index, size)
        for corruption in CORRUPTIONS:
            for severity in settings["severities"]:
                path = out / "corruption" / corruption / str(severity) / name / file
                yield kind, path, corrupt(clean, corruption, severity, (seed, shape, index))
    elif kind == "val":
        for split in ("val", *SHIFTED):
            file = file_name(spec(seed, split, shape, index), split, index)
            yield split, out / split / name / file, render(seed, split, shape, index, size)
    else:
        file = file_name(spec(seed, "train", shape, index), "train", index)
        picture = render(seed, "train", shape, index, size)
        yield "train", out / "train" / name / file, picture
        if settings["texture"]:
            texture = texture_twin(picture, _rng(seed, "texture", shape, index))
            yield "texture", twin / "train" / name / file, texture
