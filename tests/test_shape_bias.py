"""tools/shape_bias.py: names, the 16 categories, shares by hand, and what cannot be told."""

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
    for name in ("cat/cat4.png", "disc/disc_0007-star.png", "a-b-c.png"):
        assert cues_of(name) is None


def test_the_16_categories():
    categories = entry_level()
    assert len(categories) == 16 and list(categories) == sorted(categories)
    assert len(categories["dog"]) == 109 and len(categories["bird"]) == 49
    wnids = [wnid for ids in categories.values() for wnid in ids]
    assert len(wnids) == len(set(wnids)) == 207 and all(len(wnid) == 9 for wnid in wnids)


def test_shares_by_hand(tmp_path):
    """Nine pictures in conflict: 5 answers of shape, 2 of texture, 2 of neither."""
    names = [f"a/a{i}-b{i}.png" for i in range(5)]
    names += [f"b/b{i}-c{i}.png" for i in range(4)]
    names.append("c/c1-c2.png")  # is in no conflict
    cues = CueConflict(folder_of(tmp_path, *names), ["c", "b", "a"])
    assert cues.categories == ["a", "b", "c"] and cues.columns == [[2], [1], [0]]
    assert cues.dataset.targets.tolist() == [0] * 5 + [1] * 4
    assert cues.textures.tolist() == [1] * 5 + [2] * 4
    answers = torch.tensor([0, 0, 0, 1, 2, 1, 1, 2, 0])
    logits = torch.eye(3)[2 - answers]  # in the order of the classifier's classes
    no_class = torch.full((9, 2), 99.0)  # two outputs that are no class
    (decisions,) = cues.judge(torch.cat([logits, no_class], 1))
    assert decisions.tolist() == answers.tolist()
    values = cues.values(torch.arange(9), decisions)
    assert values == {
        "shape_bias": pytest.approx(100 * 5 / 7),
        "cue_shape": pytest.approx(100 * 5 / 9),
        "cue_texture": pytest.approx(100 * 2 / 9),
    }
    order = torch.tensor([3, 8, 0, 1, 2, 4, 5, 6, 7])
    assert cues.values(order.float(), decisions[order].float()) == values
    neither = cues.values(torch.arange(5), torch.full((5,), 2))
    assert neither == {"cue_shape": 0, "cue_texture": 0}  # there is no share of nothing


def test_imagenet_classes_are_averaged_and_missing_ones_left_out(tmp_path):
    cat, dog, truck = (entry_level()[category] for category in ("cat", "dog", "truck"))
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
    kept = [path.rpartition("/")[2] for path in cues.dataset.paths]
    assert kept == ["cat1-dog2.png", "dog1-cat1.png", "dog1-truck9.png"]
    assert cues.note == "3 of 5 pictures, 3 of 5 categories; no class for knife, oven"
    probabilities = torch.tensor(
        [
            [0.35, 0.3, 0.2, 0.35, 0.0],  # two dogs of .35 each beat a cat of .3
            [0.35, 0.3, 0.35, 0.0, 0.0],  # .35 and 0 do not: a larger sum, a smaller mean
            [0.0, 0.1, 0.8, 0.0, 0.1],  # of equals the first
        ]
    )
    (decisions,) = cues.judge((probabilities + 1e-9).log())
    assert decisions.tolist() == [1, 0, 0]


WRONG = [
    (
        ["cat/cat1-dog2.png", "cat/what.png"],
        "1 of 2 pictures do not tell shape and texture .*: cat/what.png",
    ),
    (
        ["knife/knife1-oven2.png"],
        r"no picture whose shape and texture \(knife, oven\) are both classes .*\(cat, dog\)",
    ),
    (
        ["cat/cat1-cat2.png"],
        "no picture has the shape of one category and the texture of another",
    ),
    (["cat/cat1-dog2.txt"], "no pictures in it; expected .*SHAPE1-TEXTURE1.png"),
]


@pytest.mark.parametrize(("names", "message"), WRONG)
def test_folders_that_do_not_fit(tmp_path, names, message):
    with pytest.raises(UsageError, match=message) as refused:
        CueConflict(folder_of(tmp_path, *names), ["cat", "dog"])
    assert str(refused.value).isprintable()


def test_a_folder_that_is_not_there():
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        CueConflict("nowhere", ["cat", "dog"])
