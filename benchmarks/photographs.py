"""The photographs that benchmarks of files share, or generated ones, and how rates are shown."""

import contextlib
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

GENERATED = "generated pictures (shapes and noise, not photographs)"
ABOUT = "class folders of JPEG files, or the folder above with train/; default: generated pictures"


def generate(folder: Path, count: int = 48) -> Path:
    """Write `count` JPEG files of about 470x400 pixels and 100 kB: shapes on a gradient, noise."""
    rng = np.random.default_rng(0)
    for i in range(count):
        width = int(rng.integers(420, 521))
        height = int(rng.integers(350, 451))
        corners = rng.integers(40, 216, (2, 2, 3), dtype=np.uint8)
        gradient = Image.fromarray(corners)
        picture = gradient.resize((width, height), Image.Resampling.BILINEAR)
        draw = ImageDraw.Draw(picture)
        for _ in range(40):
            x, y = rng.integers(0, width), rng.integers(0, height)
            w, h = rng.integers(5, 120, 2)
            shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
            shape((x, y, x + w, y + h), fill=tuple(int(c) for c in rng.integers(0, 256, 3)))
        noisy = np.asarray(picture) + rng.normal(0, 14, (height, width, 1))
        path = folder / f"class{i % 4}" / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=93)
    return folder


@contextlib.contextmanager
def tree(data: str | None) -> Iterator[tuple[Path, str]]:
    """Give (folder of class folders, its name): that of --data, or one of generated pictures."""
    if data is not None:
        folder = Path(data)
        has_train = (folder / "train").is_dir()
        yield folder / "train" if has_train else folder, data
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield generate(Path(temporary)), GENERATED


def spread(values: list[float]) -> str:
    """Return median and range of rates."""
    return f"{statistics.median(values):7.1f}  ({min(values):.1f} to {max(values):.1f})"
