"""preprocess/subset.py: the first pictures of each class, the same every time, and refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

from common import UsageError, sets
from preprocess import subset


def tree(root, split: str, names: list[str]):
    for name in names:
        (root / split / name).parent.mkdir(parents=True, exist_ok=True)
        (root / split / name).touch()


def listed(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/*"))


def test_links_to_the_first_pictures_of_a_tree(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "CIFAR", "train", ["cat/2.png", "cat/1.png", "cat/3.png", "dog/5.png"])
    tree(tmp_path / "CIFAR", "train", ["dog/4.png", "dog/note.txt"])
    tree(tmp_path / "CIFAR", "test", ["cat/9.png"])
    for _ in range(2):  # the second time it keeps all
        subset.main(["CIFAR", "SMALL", "--per-class", "2"])
        assert "result: 4 train pictures linked in SMALL" in capsys.readouterr().out
    small = tmp_path / "SMALL"
    assert listed(small / "train") == ["cat/1.png", "cat/2.png", "dog/4.png", "dog/5.png"]
    assert (small / "val/cat/9.png").is_file() and (small / "train/cat/1.png").is_file()
    with pytest.raises(UsageError, match="train/cat holds other files, such as 2.png: choose"):
        subset.main(["CIFAR", "SMALL", "--per-class", "1"])
    with pytest.raises(UsageError, match="--per-class 3: .*train/dog has 2 pictures"):
        subset.main(["CIFAR", "OTHER", "--per-class", "3"])
    assert not (tmp_path / "OTHER").exists()
    with pytest.raises(UsageError, match="no train/ folder"):
        subset.main(["CIFAR/test", "OTHER", "--per-class", "1"])
    with pytest.raises(UsageError, match="OUT CIFAR/train/few lies inside SOURCE CIFAR"):
        subset.main(["CIFAR", "CIFAR/train/few", "--per-class", "1"])


def test_writes_the_first_pictures_of_a_set_of_torchvision(tmp_path, capsys, monkeypatch):
    images = torch.arange(6 * 3 * 4 * 4, dtype=torch.uint8).reshape(6, 3, 4, 4)
    opened = sets.ArraySet(images, np.array([1, 0, 1, 1, 0, 0]), ["cat", "dog"])
    monkeypatch.setattr(sets, "open_set", lambda *_, **__: opened)
    for _ in range(2):
        out = str(tmp_path / "SMALL")
        subset.main(["data", out, "--per-class", "2", "--dataset", "cifar10"])
        assert "result: 4 train and 6 val pictures" in capsys.readouterr().out
    train = tmp_path / "SMALL/train"
    assert listed(train) == ["cat/00000.png", "cat/00001.png", "dog/00000.png", "dog/00001.png"]
    pixels = np.asarray(Image.open(train / "dog/00001.png"))
    assert np.array_equal(pixels, images[2].permute(1, 2, 0).numpy())
