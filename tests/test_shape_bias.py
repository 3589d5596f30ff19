"""tools/shape_bias.py: names, the mapping to 16 categories, shares by hand, and what cannot be told."""

import pytest
import torch

from common import UsageError
from tools.shape_bias import CueConflict, cues_of, entry_level


def folder_of(tmp_path, *names):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return str(tmp_path)


def test_names_as_published_and_class_folders():
    assert cues_of("cat/cat4-chair2.png") == cues_of("x/0007_cat4-chair2.JPEG") == ("cat", "chair")
    assert cues_of("cat-chair/007.png") == cues_of("cat-chair.png") == ("cat", "chair")
    assert (
        cues_of("cat/cat4.png") is None and cues_of("disc/disc_0007-star.png") is None and cues_of("a-b-c.png") is None
    )


def test_the_16_categories():
    known = entry_level()
    assert len(known) == 16 and list(known) == sorted(known) and len(known["dog"]) == 109 and len(known["bird"]) == 49
    every = [wnid for ids in known.values() for wnid in ids]
    assert len(every) == len(set(every)) == 207 and all(len(wnid) == 9 for wnid in every)


def test_shares_by_hand(tmp_path):
    """Ten pictures, of which one is in no conflict: 5 answers of shape, 2 of texture, 2 of neither."""
    names = [f"a/a{i}-b{i}.png" for i in range(5)] + [f"b/b{i}-c{i}.png" for i in range(4)] + ["c/c1-c2.png"]
    cues = CueConflict(folder_of(tmp_path, *names), ["c", "b", "a"])
    assert cues.categories == ["a", "b", "c"] and cues.columns == [[2], [1], [0]] and len(cues.dataset) == 9
    assert cues.dataset.targets.tolist() == [0] * 5 + [1] * 4 and cues.textures.tolist() == [1] * 5 + [2] * 4
    answers = torch.tensor([0, 0, 0, 1, 2, 1, 1, 2, 0])
    logits = torch.eye(3)[2 - answers]  # in the order of the classifier's classes
    (decisions,) = cues.judge(torch.cat([logits, torch.full((9, 2), 99.0)], 1))  # and two outputs that are no class
    assert decisions.tolist() == answers.tolist()
    found = cues.values(torch.arange(9), decisions)
    assert found == {
        "shape_bias": pytest.approx(100 * 5 / 7), "cue_shape": pytest.approx(100 * 5 / 9),
        "cue_texture": pytest.approx(100 * 2 / 9),
    }  # fmt: skip
    order = torch.tensor([3, 8, 0, 1, 2, 4, 5, 6, 7])
    assert cues.values(order.float(), decisions[order].float()) == found
    assert cues.values(torch.arange(5), torch.full((5,), 2)) == {
        "cue_shape": 0,
        "cue_texture": 0,
    }  # no share of nothing


def test_imagenet_classes_are_averaged_and_missing_ones_left_out(tmp_path):
    cat, dog, truck = (entry_level()[c] for c in ("cat", "dog", "truck"))
    names = [
        "cat/cat1-dog2.png",
        "dog/dog1-cat1.png",
        "dog/dog2-knife1.png",
        "oven/oven1-cat1.png",
        "dog/dog1-truck9.png",
    ]
    classes = [dog[5], cat[0], "n00000001", dog[100], truck[0]]
    cues = CueConflict(folder_of(tmp_path, *names), classes)
    assert cues.without == ["knife", "oven"] and cues.categories == ["cat", "dog", "truck"]
    assert cues.columns == [[1], [0, 3], [4]]
    assert [p.rpartition("/")[2] for p in cues.dataset.paths] == ["cat1-dog2.png", "dog1-cat1.png", "dog1-truck9.png"]
    assert cues.note == "3 of 5 pictures, 3 of 5 categories; no class for knife, oven"
    # two dogs of .35 each beat a cat of .3; .35 and 0 do not, whose sum is more than .3 and whose mean is less
    probabilities = torch.tensor([[0.35, 0.3, 0.2, 0.35, 0.0], [0.35, 0.3, 0.35, 0.0, 0.0], [0.0, 0.1, 0.8, 0.0, 0.1]])
    (found,) = cues.judge((probabilities + 1e-9).log())
    assert found.tolist() == [1, 0, 0]  # the first of equals


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat/cat1-dog2.png", "cat/what.png"], "1 of 2 pictures do not tell shape and texture .*: cat/what.png"),
        (
            ["knife/knife1-oven2.png"],
            r"no picture whose shape and texture \(knife, oven\) are both classes .*\(cat, dog\)",
        ),
        (["cat/cat1-cat2.png"], "no picture has the shape of one category and the texture of another"),
        (["cat/cat1-dog2.txt"], "no pictures in it; expected .*SHAPE1-TEXTURE1.png"),
    ],
)
def test_folders_that_do_not_fit(tmp_path, names, message):
    with pytest.raises(UsageError, match=message) as told:
        CueConflict(folder_of(tmp_path, *names), ["cat", "dog"])
    assert str(told.value).isprintable()
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        CueConflict("nowhere", ["cat", "dog"])
