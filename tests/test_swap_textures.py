"""A set whose textures are of another class: preprocess/swap_textures.py."""

import numpy as np
import pytest
from PIL import Image

from common import UsageError
from preprocess import swap_textures as swap


def edges(picture: np.ndarray) -> np.ndarray:
    """Return the standardised brightness of a picture, in which its shapes are seen."""
    grey = picture @ swap.LUMA
    return (grey - grey.mean()) / grey.std()


def disc_and_spots(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a bright disc on dark ground, and a red and blue texture: (side, side, 3) uint8."""
    y, x = np.mgrid[:side, :side] - side / 2
    disc = np.where((y**2 + x**2 < (side / 3) ** 2)[..., None], 220, 30)
    spots = np.random.default_rng(0).integers(0, 256, (8, 8))
    texture = spots.repeat(side // 8, 0).repeat(side // 8, 1)[..., None] * np.array([1, 0, 0.5])
    return np.broadcast_to(disc, (side, side, 3)).astype(np.uint8), texture.astype(np.uint8)


@pytest.mark.parametrize("side", [32, 96])
def test_shapes_stay_and_colours_are_the_textures(side):
    picture, texture = disc_and_spots(side)
    swapped = swap.transfer(picture, texture)
    assert swapped.shape == picture.shape and swapped.dtype == np.uint8
    assert (edges(swapped) * edges(picture)).mean() > 0.6  # correlation
    assert swapped[..., 1].max() == 0 and swapped[..., 0].std() > 10


def test_a_picture_made_of_itself_is_itself():
    _, picture = disc_and_spots(32)
    assert np.array_equal(swap.transfer(picture, picture), picture)


def test_sizes_may_differ():
    picture, texture = disc_and_spots(48)
    assert swap.transfer(picture[:40], texture[:20, :30]).shape == (40, 48, 3)
    assert swap.transfer(picture, texture[:3, :30]).shape == (48, 48, 3)  # a block has 6 pixels


def test_large_pictures_are_reduced(tmp_path):
    Image.new("RGB", (600, 400)).save(tmp_path / "large.png")
    assert swap.read_picture(str(tmp_path / "large.png")).shape == (256, 384, 3)


@pytest.fixture()
def tree(tmp_path):
    """A validation set of two classes, one blue and one red, of three pictures each."""
    for label, channel in (("sea", 2), ("rose", 0)):
        (tmp_path / "val" / label).mkdir(parents=True)
        for number in range(3):
            picture = np.zeros((16, 16, 3), np.uint8)
            picture[..., channel] = np.random.default_rng(number).integers(0, 256, (16, 16))
            Image.fromarray(picture).save(tmp_path / "val" / label / f"{number}.jpg", quality=100)
    return tmp_path


def test_the_set_keeps_classes_and_goes_on(tree, capsys):
    out = tree / "out"
    swap.main([str(tree), str(out), "-j", "1"])
    assert "6 of 6 pictures" in capsys.readouterr().out
    files = sorted(out.glob("*/*.png"))
    assert [file.parent.name for file in files] == ["rose"] * 3 + ["sea"] * 3
    for file in files:
        mean = np.asarray(Image.open(file)).mean((0, 1))
        assert mean.argmax() == (2 if file.parent.name == "rose" else 0)  # of the other class
    before = files[0].read_bytes()
    files[0].unlink()
    swap.main([str(tree), str(out), "-j", "1"])
    assert "1 made now" in capsys.readouterr().out and files[0].read_bytes() == before
    with pytest.raises(UsageError, match="begun with seed 0, not 1"):
        swap.main([str(tree), str(out), "-j", "1", "--seed", "1"])
    (tree / "val/rose/0.jpg").rename(tree / "val/rose/9.jpg")  # another list draws other textures
    with pytest.raises(UsageError, match="begun with pictures 6 with names .*, not 6 with names"):
        swap.main([str(tree), str(out), "-j", "1"])


def test_what_cannot_be_done_is_one_line(tree, capsys):
    (tree / "val/sea/0.jpg").write_bytes(b"no picture")
    with pytest.raises(swap.UserError, match="pictures failed.*not a picture"):
        swap.main([str(tree), str(tree / "out"), "-j", "1"])
    with pytest.raises(UsageError, match="no such folder"):
        swap.main([str(tree / "nothing"), str(tree / "out")])
    for file in (tree / "val/rose").iterdir():
        file.unlink()
    (tree / "val/rose").rmdir()
    with pytest.raises(UsageError, match="one class"):
        swap.main([str(tree), str(tree / "other"), "-j", "1"])
