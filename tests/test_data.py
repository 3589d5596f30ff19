"""Data sets and loaders: pictures on disk, errors of wrong folders, views decided by the seed."""

import contextlib
import multiprocessing
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import types
import urllib.error
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import functional as F

from cmc import LinearProbing, train_CMC
from cmc.colour import ToColour
from common import UsageError, UserError, crops, data, launch, resident, sets
from common.augment import (
    ColorJitter,
    Compose,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ResizeCenterCrop,
)
from common.crops import scale_boxes
from common.data import Loader
from common.pictures import as_rgb
from common.sets import ArraySet, FolderSet, open_set, open_tree
from debiased import main as debiased
from moco_insdis import eval_moco_ins, train_moco_ins
from nonsem_neg import main_lincls, moco_non_sem_neg
from nonsem_neg.textures import original_root_of, pair_by_path
from preprocess import pack
from ring import train_ring as ring
from tools import robustness

CROP = Compose(RandomResizedCrop(16, (0.2, 1.0)))
FULL = Compose(
    RandomResizedCrop(16, (0.2, 1.0)),
    ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
    RandomHorizontalFlip(),
)
EVAL = Compose(ResizeCenterCrop(18, 16))
ROOT = Path(__file__).resolve().parents[1]


def picture(seed, width=40, height=30):
    """A smooth colourful picture that no other seed gives."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def save(path, seed, **size):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **size).save(
        path, **({"quality": 95} if path.suffix.lower() in (".jpg", ".jpeg") else {})
    )
    return path


def make_tree(root, classes=("ant", "bee"), each=4, sizes=((40, 30),), suffix=".jpg"):
    seed = 0
    for name in classes:
        for i in range(each):
            width, height = sizes[seed % len(sizes)]
            save(root / name / f"p{i}{suffix}", seed, width=width, height=height)
            seed += 1
    return root


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """12 pictures of three sizes, opened."""
    root = tmp_path_factory.mktemp("mixed")
    make_tree(root / "train", each=6, sizes=((40, 30), (30, 44), (52, 24)))
    return open_set(root, "train")


@pytest.fixture(scope="module")
def equal(tmp_path_factory):
    """12 pictures of one size, opened."""
    root = tmp_path_factory.mktemp("equal")
    make_tree(root / "train", each=6)
    return open_set(root, "train")


loaders = []


@pytest.fixture(autouse=True)
def no_workers_left():
    """Close what an error still refers to: the garbage collector would take seconds to end it."""
    yield
    while loaders:
        loaders.pop().close()


def loader(dataset, views=(CROP, CROP), batch_size=4, **options):
    defaults = {"device": "cpu", "seed": 3, "workers": 0, "progress": False}
    loaders.append(Loader(dataset, views, batch_size, **defaults | options))
    return loaders[-1]


def epoch_of(the_loader, epoch=0, start_step=0):
    the_loader.set_epoch(epoch, start_step)
    return [(views, target, index) for views, target, index in the_loader]


def assert_same(a, b):
    assert len(a) == len(b)
    for (views_a, target_a, index_a), (views_b, target_b, index_b) in zip(a, b):
        assert torch.equal(index_a, index_b) and torch.equal(target_a, target_b)
        assert len(views_a) == len(views_b)
        for x, y in zip(views_a, views_b):
            assert torch.equal(x, y)


# ---------------------------------------------------------------------------------- opening folders


def test_same_classes_samples_and_order_as_torchvision(tmp_path):
    train = tmp_path / "train"
    make_tree(train, ("zebra", "Ant", "two words", "quo'te\"s", "fürst_日本"), each=1)
    for name in (
        "b.JPEG",
        "a.PNG",
        "c.Jpg",
        'it\'s "ü" 日.png',
        "sub/dir/x.jpg",
        "sub/y.png",
        "sub.jpg",
    ):
        save(train / "zebra" / name, 7)
    (train / "zebra" / "notes.txt").write_text("not a picture")
    (train / "loose.jpg").write_bytes(b"not in a class folder")
    ours, theirs = open_set(tmp_path, "train"), ImageFolder(train)
    assert ours.paths == [path for path, _ in theirs.samples]
    assert ours.targets.tolist() == theirs.targets and ours.targets.dtype == torch.int64
    assert ours.classes == theirs.classes
    assert len(ours) == 12 and ours.path(3) == ours.paths[3] and ours.name.endswith("/train")
    assert_same(epoch_of(loader(ours)), epoch_of(loader(ours)))  # and every name can be read


def test_only_regular_files_are_pictures(tmp_path, monkeypatch):
    train, elsewhere = (
        make_tree(tmp_path / "train", each=2),
        make_tree(tmp_path / "elsewhere", ("more",), each=2),
    )
    expected = open_tree(train).paths
    os.mkfifo(train / "ant" / "pipe.jpg")  # opening one waits for ever
    (train / "ant" / "to-a-pipe.jpg").symlink_to("pipe.jpg")
    (train / "ant" / "device.jpg").symlink_to("/dev/zero")
    monkeypatch.chdir(train / "bee")  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as talk:
        talk.bind("socket.jpg")
    (train / "ant" / "folder.jpg").mkdir()
    assert open_tree(train).paths == expected
    (train / "ant" / "p9.jpg").symlink_to(elsewhere / "more" / "p0.jpg")
    (train / "bee" / "sub").symlink_to(elsewhere)
    (train / "cow").symlink_to(elsewhere / "more")
    assert [os.path.relpath(path, train) for path in open_tree(train).paths] == [
        *(
            "ant/p0.jpg",
            "ant/p1.jpg",
            "ant/p9.jpg",
            "bee/p0.jpg",
            "bee/p1.jpg",
            "bee/sub/more/p0.jpg",
        ),
        *("bee/sub/more/p1.jpg", "cow/p0.jpg", "cow/p1.jpg"),
    ]
    assert len(epoch_of(loader(open_tree(train), (CROP,), 9))) == 1
    for name, target in (
        ("gone.jpg", "nowhere"),
        ("self.jpg", "self.jpg"),
    ):  # listed, and named when they are opened
        (train / "cow" / name).symlink_to(target)
        assert any(path.endswith(name) for path in open_tree(train).paths)
        with pytest.raises(UserError, match=f"{name}: (no such file|too many levels)"):
            epoch_of(loader(open_tree(train), (CROP,), 10))
        (train / "cow" / name).unlink()


def test_links_in_circles_are_not_followed(tmp_path):
    train = make_tree(tmp_path / "train", each=2)
    save(train / "ant" / "deep" / "er" / "x.jpg", 5)
    expected = open_tree(train).paths
    (train / "ant" / "up").symlink_to("..")
    (train / "ant" / "deep" / "er" / "up").symlink_to("../..")
    (train / "bee" / "self").symlink_to(".")
    (train / "bee" / "root").symlink_to("/")
    (train / "everything").symlink_to(tmp_path)  # no class
    (train / "itself").symlink_to("itself")
    assert open_tree(train).paths == expected and open_set(tmp_path, "train").classes == [
        "ant",
        "bee",
    ]
    other = make_tree(tmp_path / "other", ("a", "b"), each=1)
    (other / "a" / "to-b").symlink_to("../b")
    (other / "b" / "to-a").symlink_to("../a")
    assert [os.path.relpath(path, other) for path in open_tree(other).paths] == [
        "a/p0.jpg",
        "a/to-b/p0.jpg",
        "b/p0.jpg",
        "b/to-a/p0.jpg",
    ]  # each once on its way


@pytest.mark.parametrize("folder", ["val", "test", "validation"])
def test_val_accepts_the_usual_names(tmp_path, folder):
    make_tree(tmp_path / folder, each=1)
    assert open_set(tmp_path, "val").paths == open_set(tmp_path, "test").paths
    assert open_set(tmp_path, "val").root == str(tmp_path / folder)


def test_val_wins_over_test(tmp_path):
    make_tree(tmp_path / "test", each=1)
    make_tree(tmp_path / "val", each=2)
    assert len(open_set(tmp_path, "val")) == 4


def test_folder_errors_name_the_thing(tmp_path):
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        open_set(tmp_path / "nowhere", "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file: is a file, not a folder"):
        open_set(tmp_path / "file", "train")
    with pytest.raises(UsageError, match="no train/ folder: move class folders"):
        open_set(tmp_path, "train")

    make_tree(tmp_path / "flat", each=1)
    (tmp_path / "torchvision" / "cifar-10-batches-py").mkdir(parents=True)
    with pytest.raises(
        UsageError, match="no train/ folder, but cifar-10-batches-py/: add --dataset cifar10"
    ):
        open_set(tmp_path / "torchvision", "train")
    with pytest.raises(
        UsageError,
        match="no train/ folder: move class folders into it, or name the kind of .* with --dataset",
    ):
        open_set(tmp_path / "flat", "train")
    with pytest.raises(UsageError, match=r"no val/ folder \(nor test/, validation/\)"):
        open_set(tmp_path / "flat", "val")
    make_tree(tmp_path / "tree" / "train", each=1)
    with pytest.raises(UsageError, match=f"give its parent {tmp_path / 'tree'}$"):
        open_set(tmp_path / "tree" / "train", "train")

    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UsageError, match="no class folders in it; expected .*<class>"):
        open_set(tmp_path / "empty", "train")
    (tmp_path / "tree" / "train" / "cat").mkdir()
    with pytest.raises(
        UsageError,
        match="these class folders have no picture: cat; add pictures, remove the folder",
    ):
        open_set(tmp_path / "tree", "train")


def test_errors_are_one_line(tmp_path):
    make_tree(tmp_path / "flat", [f"c{i:02d}" for i in range(30)], each=1)
    with pytest.raises(UsageError) as error:
        open_set(tmp_path / "flat", "train")
    assert "\n" not in str(error.value) and error.value.code == 2
    for folder in (tmp_path / "flat").iterdir():
        (folder / "p0.jpg").unlink()
    with pytest.raises(UsageError, match=r"c00, c01, c02, c03, c04, ... \(30 in all\)") as error:
        open_tree(tmp_path / "flat")
    assert "\n" not in str(error.value)


def test_class_list(tmp_path):
    make_tree(tmp_path / "train", ("n3", "n1", "n2", "n4 x"), each=2)
    (tmp_path / "train" / "n9").mkdir()  # empty, but not asked for
    listing = tmp_path / "ids.txt"
    listing.write_text("# the subset\nn3\n\n n1 robin\nn4 x\n", encoding="utf-8")
    chosen = open_set(tmp_path, "train", class_list=listing)
    assert chosen.classes == ["n1", "n3", "n4 x"]  # sorted, whatever the order of the list
    assert chosen.targets.tolist() == [0, 0, 1, 1, 2, 2]
    listing.write_text("n1\n" + "".join(f"m{i}\n" for i in range(7)))
    with pytest.raises(
        UsageError,
        match=r"ids.txt: no such class folder in .*: m0, m1, m2, m3, m4, ... \(7 in all\)",
    ):
        open_set(tmp_path, "train", class_list=listing)
    listing.write_text("\n")
    with pytest.raises(UsageError, match="names no class"):
        open_set(tmp_path, "train", class_list=listing)
    listing.write_text("n1\nroot:$6$secret:19000:0:99999:7:::\n")
    with pytest.raises(UsageError, match="line 2 is not a name; expected one a line") as error:
        open_set(tmp_path, "train", class_list=listing)
    assert "secret" not in str(error.value)
    with pytest.raises(UsageError, match="--class-list .*none.txt: No such file"):
        open_set(tmp_path, "train", class_list=tmp_path / "none.txt")
    with pytest.raises(UsageError, match="cifar10 has none"):
        open_set(tmp_path, "train", dataset="cifar10", class_list=listing)


def test_val_takes_the_classes_of_train(tmp_path):
    make_tree(tmp_path / "train", ("ant", "bee"), each=1)
    make_tree(tmp_path / "val", ("bee", "cow", "ant"), each=1)
    train = open_set(tmp_path, "train")
    with pytest.raises(
        UsageError, match="val does not have the class folders of the training set: it also has cow"
    ):
        open_set(tmp_path, "val", classes=train.classes)
    (tmp_path / "ids.txt").write_text("ant\nbee\n")
    val = open_set(tmp_path, "val", classes=["bee", "ant"], class_list=tmp_path / "ids.txt")
    assert (
        [val.classes[t] for t in val.targets]
        == [Path(p).parent.name for p in val.paths]
        == ["ant", "bee"]
    )
    assert val.targets.tolist() == [1, 0]
    with pytest.raises(UsageError, match="it lacks dog, emu and also has cow"):
        open_set(tmp_path, "val", classes=["ant", "bee", "dog", "emu"])
    part = open_tree(tmp_path / "train", classes=["ant", "ape", "bee"], subset=True)
    assert part.targets.tolist() == [0, 2] and len(part.classes) == 3


def test_select_keeps_classes(mixed):
    part = mixed.select([7, 2])
    assert part.paths == [mixed.path(7), mixed.path(2)]
    assert part.targets.tolist() == [1, 0] and part.classes == mixed.classes


# --------------------------------------------------------------------------- torchvision's own sets


class FakeCifar:
    """Stands for torchvision.datasets.CIFAR10; root/"online" plays the network."""

    classes = [f"c{i}" for i in range(10)]
    url = "https://example.org/cifar.tar.gz"
    base_folder = "cifar-10-batches-py"

    def __init__(self, root, train, download):
        files = Path(root) / self.base_folder
        if download:
            if not (Path(root) / "online").exists():
                raise urllib.error.URLError("no network\nhere")
            files.mkdir()
        if not files.exists() or (Path(root) / "broken").exists():
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        n = 6 if train else 3
        generator = np.random.default_rng(train)
        self.data = generator.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        self.targets = list(range(n))


def test_cifar(tmp_path, monkeypatch):
    monkeypatch.setattr(sets.tv_datasets, "CIFAR10", FakeCifar)
    message = "could not be downloaded.*no network here.*put cifar-10-batches-py/ from https.* into"
    with pytest.raises(UserError, match=message) as error:
        open_set(tmp_path / "new", "train", dataset="cifar10")
    assert error.value.code == 1 and "\n" not in str(error.value)
    (tmp_path / "online").touch()
    assert len(open_set(tmp_path, "train", dataset="cifar10")) == 6
    (tmp_path / "online").unlink()  # it is stored now
    (tmp_path / "broken").touch()
    with pytest.raises(UserError, match="has files that are missing or differ from their checksum"):
        open_set(tmp_path, "train", dataset="cifar10")
    (tmp_path / "broken").unlink()
    val = open_set(tmp_path, "val", dataset="cifar10", classes=FakeCifar.classes)
    assert len(val) == 3 and val.images.shape == (3, 3, 32, 32) and val.name == "cifar10/val"
    expected = FakeCifar(tmp_path, False, False).data[1]
    assert np.array_equal(val.images[1].permute(1, 2, 0).numpy(), expected)
    with pytest.raises(UsageError, match="other classes than the training set"):
        open_set(tmp_path, "val", dataset="cifar10", classes=["a"])


@pytest.mark.parametrize("parse_args", [debiased.parse_args, ring.parse_args])
def test_a_tree_is_never_taken_for_a_set_to_download(tmp_path, parse_args):
    """The published default of --dataset is STL-10 or CIFAR-10."""
    data = ["--data", str(tmp_path)]
    is_set = parse_args(data).dataset
    assert is_set in ("stl10", "cifar10")
    (tmp_path / "train").mkdir()
    assert parse_args(data).dataset == "folder"
    assert parse_args([*data, "--dataset", "cifar100"]).dataset == "cifar100"
    (tmp_path / getattr(sets.tv_datasets, sets.TORCHVISION_SETS[is_set]).base_folder).mkdir()
    assert parse_args(data).dataset == is_set
    pictures = tmp_path / "pictures"
    save(pictures / "a.png", 1)
    assert parse_args(["--data", str(pictures)]).dataset == "folder"
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "train.json").touch()
    assert parse_args(["--data", str(tmp_path / "pack")]).dataset == "packed"


def test_stl10_splits(tmp_path, monkeypatch):
    class FakeStl:
        classes = ["x", "y"]

        def __init__(self, root, split, download):
            self.data, self.labels = np.zeros((2, 3, 96, 96), np.uint8), np.array([-1, 1])
            self.split = split
            seen.append(split)

    seen = []
    monkeypatch.setattr(sets.tv_datasets, "STL10", FakeStl)
    for split in ("train", "unlabeled", "train+unlabeled", "test", "val"):
        assert open_set(tmp_path, split, dataset="stl10").targets.tolist() == [-1, 1]
    assert seen == ["train", "unlabeled", "train+unlabeled", "test", "test"]


# ------------------------------------------------------------------------- pictures without classes


def unlabelled(root):
    return open_set(root, "train", unlabelled=True)


def test_pictures_without_classes(tmp_path):
    flat = make_tree(tmp_path / "flat", (".",), each=3)
    nested = make_tree(tmp_path / "nested", ("2019", "2020/may", "."), each=2)
    below = make_tree(tmp_path / "below" / "train", (".",), each=3).parent
    make_tree(below / "val", each=1)
    for root, count in ((flat, 3), (nested, 6), (below, 3), (below / "train", 3)):
        pictures = unlabelled(root)
        assert (
            len(pictures) == count
            and pictures.classes == []
            and pictures.targets.tolist() == [-1] * count
        )
        assert pictures.notes == [
            f"{pictures.root}: there is no train/CLASS/*, so its {count} pictures are used "
            "without labels"
        ]
        assert (
            "0 classes" in repr(loader(pictures))
            if count > 3
            else len(epoch_of(loader(pictures, batch_size=3))) == 1
        )
        with pytest.raises(UsageError, match="no train/ folder|no class folders"):
            open_set(root, "train")  # an evaluation wants classes
    (nested / "2019" / "up").symlink_to("..")
    assert len(unlabelled(nested)) == 6


def test_class_folders_keep_their_meaning(tmp_path):
    make_tree(tmp_path / "train", ("bee", "ant"), each=2)
    save(tmp_path / "train" / "loose.jpg", 1)
    save(tmp_path / "loose.jpg", 1)
    make_tree(tmp_path / "extra", each=1)
    ours, before = unlabelled(tmp_path), ImageFolder(tmp_path / "train")
    assert (
        ours.paths == [path for path, _ in before.samples]
        and ours.targets.tolist() == before.targets
    )
    assert ours.classes == ["ant", "bee"] and ours.notes == []
    (tmp_path / "ids.txt").write_text("bee\n")
    assert open_set(
        tmp_path, "train", unlabelled=True, class_list=tmp_path / "ids.txt"
    ).classes == ["bee"]


def test_what_could_be_meant_in_two_ways_is_asked(tmp_path):
    flat = make_tree(tmp_path / "flat", (".",), each=1)
    (tmp_path / "ids.txt").write_text("bee\n")
    with pytest.raises(UsageError, match="no train/ folder"):
        open_set(flat, "train", unlabelled=True, class_list=tmp_path / "ids.txt")
    vehicles = make_tree(tmp_path / "vehicles", ("car", "train"), each=1)
    with pytest.raises(
        UsageError,
        match="vehicles: train/ holds no class folders, but is beside car: give .*/train to use",
    ):
        unlabelled(vehicles)
    make_tree(tmp_path / "above" / "set" / "train", each=1)
    for options in ({}, {"unlabelled": True}):
        with pytest.raises(
            UsageError, match="above has no train/ folder, but set/train/: give .*above/set$"
        ):
            open_set(tmp_path / "above", "train", **options)
    make_tree(tmp_path / "evaluation" / "val", each=1)
    with pytest.raises(UsageError, match="no train/ folder: move class folders"):
        unlabelled(tmp_path / "evaluation")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UsageError, match="no class folders in it"):
        unlabelled(tmp_path / "empty")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    with pytest.raises(UsageError, match="no train/ folder: move"):
        unlabelled(tmp_path / "texts")
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train.json").write_text("")
    with pytest.raises(UsageError, match="add --dataset packed"):
        unlabelled(tmp_path / "packed")


FLAT_RUNS = {
    train_CMC: "--data_folder flat --preset small --model_path run -b 8 --nce_k 8 --save_freq 9",
    train_moco_ins: "--data_folder flat --preset small --moco --model_path run -b 8 --nce_k 8 "
    "--alpha 0.9",
    moco_non_sem_neg: "flat -a resnet18 --input-res 32 --ckpt_path run -b 8 --moco-k 8 "
    "--bn-splits 1",
}


@pytest.mark.parametrize("script", FLAT_RUNS, ids=lambda script: script.__name__.rpartition(".")[2])
@pytest.mark.usefixtures("slim_once")
def test_every_pre_training_takes_them(demo_set, tmp_path, monkeypatch, capsys, script):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flat").symlink_to(make_tree(tmp_path / "photos", (".", "deeper"), each=8))
    flags = [*FLAT_RUNS[script].split(), *"--epochs 1 --device cpu --seed 0 -j 0".split()]
    with pytest.raises(
        UsageError, match="--knn-every needs labels, but DATA has none: .*--knn-data"
    ):
        script.main([*flags, "--knn-every", "1"])
    with pytest.raises(UsageError, match="--knn-data x needs --knn-every"):
        script.parse_args([*flags, "--knn-data", "x"])
    capsys.readouterr()
    script.main([*flags, "--knn-every", "1", "--knn-k", "5", "--knn-data", str(demo_set)])
    said = capsys.readouterr().out
    assert (
        said.count(
            "note: flat: there is no train/CLASS/*, so its 16 pictures are used without labels"
        )
        == 1
    )
    assert "k-NN (k 5) on val" in said
    assert script.parse_args([*flags, "--dataset", "imagenet100"]).dataset == "imagenet100"


@pytest.mark.usefixtures("slim_once")
def test_evaluations_and_textures_want_classes(demo_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tree(tmp_path / "flat", (".",), each=8)
    make_tree(tmp_path / "flat-texture", (".",), each=8)
    flags = [
        "-a",
        "resnet18",
        "--input-res",
        "32",
        "--ckpt_path",
        "run",
        "--device",
        "cpu",
        "-j",
        "0",
    ]
    texture = [*flags, "--moco-k", "8", "-b", "8", "--bn-splits", "1", "--robust", "texture"]
    with pytest.raises(UsageError, match="flat-texture has no train/ folder: move"):
        moco_non_sem_neg.main(["flat-texture", *texture])
    with pytest.raises(
        UsageError, match="none of its .* textures has an original in .*flat .same class folder"
    ):
        moco_non_sem_neg.main(["flat", *texture, "--texture-root", str(demo_set)])
    moco_non_sem_neg.main(
        ["flat", *flags, "--epochs", "1", "--moco-k", "8", "-b", "8", "--bn-splits", "1"]
    )
    with pytest.raises(UsageError, match="flat has no train/ folder: move") as error:
        main_lincls.main(["flat", "--pretrained", "run", *flags[:-2], "--epochs", "1"])
    assert "\n" not in str(error.value)


def test_every_script_takes_imagenet100():
    for script, flags in (
        (train_CMC, ["--data_folder", "x"]),
        (LinearProbing, ["--data_folder", "x", "--model_path", "x"]),
        (train_moco_ins, ["--data_folder", "x"]),
        (eval_moco_ins, ["--data_folder", "x", "--model_path", "x"]),
        (moco_non_sem_neg, ["x"]),
        (main_lincls, ["x", "--pretrained", "x"]),
        (robustness, ["x", "--classifier", "x"]),
    ):
        args = script.parse_args([*flags, "--dataset", "imagenet100"])
        assert args.dataset == "imagenet100" and args.data == "x"


# ------------------------------------------------------------------------------------ reading files


def test_every_kind_of_file_reads_like_pil_loader(tmp_path):
    base, folder = picture(1), tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    base.save(folder / "rgb.jpg")
    base.convert("L").save(folder / "grey.jpg")
    base.convert("CMYK").save(folder / "cmyk.jpg")
    base.convert("P").save(folder / "palette.png")
    base.convert("RGBA").save(folder / "alpha.png")
    base.convert("1").save(folder / "bits.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees": ignored
    base.save(folder / "turned.jpg", exif=exif)
    pictures = open_set(tmp_path, "train")
    whole = Compose(ResizeCenterCrop(None, 30))
    [(views, _, index)] = epoch_of(
        loader(pictures, (whole,), 8, shuffle=False, drop_last=False, data_device="host")
    )
    for view, row in zip(views[0], index):
        expected = np.asarray(pil_loader(pictures.path(row)))[:, 5:35]
        assert np.array_equal((view * 255).round().byte().permute(1, 2, 0).numpy(), expected), (
            pictures.path(row)
        )


def png_of(values):
    """Write a PNG of 16 bits, (H, W, 3) colour or (H, W) grey; Pillow does not write all."""
    values = np.asarray(values).astype(">u2")
    height, width, kind = *values.shape[:2], 2 if values.ndim == 3 else 0
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b))
        for n, b in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("mode", ["host", "device"])
def test_16_bits_are_scaled_to_8(tmp_path, mode):
    folder, small = tmp_path / "train" / "a", np.asarray(picture(1, 30, 30).convert("L"))
    folder.mkdir(parents=True)
    deep = small.astype(np.uint16) * 256 + 255 - small  # the low byte says something else
    (folder / "colour.png").write_bytes(png_of(np.stack([deep] * 3, 2)))
    (folder / "grey.png").write_bytes(png_of(deep))
    (folder / "map.pgm").write_bytes(b"P5 30 30 65535\n" + deep.astype(">u2").tobytes())
    Image.fromarray(deep).save(folder / "little.tif")
    Image.frombytes("I;16B", (30, 30), deep.astype(">u2").tobytes()).save(folder / "motorola.tif")
    Image.fromarray(deep.astype(np.int32)).save(folder / "wide.tif")
    assert {Image.open(path).mode for path in folder.iterdir()} == {"RGB", "I;16", "I;16B", "I"}
    pictures, whole = open_set(tmp_path, "train"), Compose(ResizeCenterCrop(None, 30))
    options = {"shuffle": False, "drop_last": False, "data_device": mode}
    [(views, _, index)] = epoch_of(loader(pictures, (whole,), 8, **options))
    for view, row in zip(views[0], index):
        assert np.array_equal((view * 255).round().byte().numpy(), np.stack([small] * 3)), (
            pictures.path(row)
        )
    full = Image.fromarray(np.linspace(0, 65535, 1024).astype(np.uint16).reshape(32, 32))
    assert np.asarray(as_rgb(full)).mean() == 127.5
    assert np.asarray(full.convert("RGB")).mean() > 250  # Pillow
    assert not pictures.notes


@pytest.mark.parametrize("labelled", [True, False])
def test_pictures_left_out_by_their_suffix_are_counted(tmp_path, labelled, capsys):
    tree = tmp_path / "tree"
    folder = tree / "train" / "a" if labelled else tree / "train"
    for name in ("a.png", "b.png", "c.gif", "d.GIF", "e.jfif"):
        save(folder / name.replace("jfif", "jpg"), 1)
        (folder / name.replace("jfif", "jpg")).rename(folder / name)
    (folder / "notes.txt").write_text("no picture")
    opened = open_set(tree, "train", unlabelled=True)
    assert len(opened) == 2
    assert "3 files are left out by their suffix (2 .gif, 1 .jfif)" in opened.notes[-1]
    if labelled:
        pack.main([str(tree), str(tmp_path / "pack"), "--splits", "train", "--workers", "1"])
        assert "3 files are left out by their suffix" in capsys.readouterr().out


@pytest.mark.parametrize(
    "geometry",
    [
        RandomResizedCrop(16),
        ResizeCenterCrop(18, 16),
        ResizeCenterCrop(None, 36),
        ResizeCenterCrop(None, 21),
        ResizeCenterCrop(60, 64),
    ],
)
def test_host_crops_are_those_of_pillow(mixed, geometry):
    [(views, _, index)] = epoch_of(
        loader(mixed, (Compose(geometry),), 12, seed=5, data_device="host")
    )
    images = [mixed.open(row).convert("RGB") for row in index]
    heights, widths = torch.tensor([image.size[::-1] for image in images]).unbind(1)
    boxes = geometry.sample(heights, widths, crops.step_generator(5, 0, 0, 0, crops.CROPS))
    for view, image, box in zip(views[0], images, boxes):
        assert (view * 255 - pillow_crop(geometry, image, box.tolist())).abs().max() < 1.01


def pillow_crop(geometry, image, box):
    """uint8 (3, size, size): the same part of a picture as torchvision cuts it with Pillow."""
    top, left, height, width = box
    if isinstance(geometry, RandomResizedCrop):
        image = F.resized_crop(image, top, left, height, width, [geometry.size] * 2)
    else:
        image = image if geometry.resize is None else F.resize(image, geometry.resize)
        image = F.center_crop(image, geometry.size)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def bad_tree(root):
    """8 pictures, rows 1, 2, 3 and 7 of which cannot be read."""
    make_tree(root / "train")
    whole = (root / "train" / "ant" / "p1.jpg").read_bytes()
    (root / "train" / "ant" / "p1.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (root / "train" / "ant" / "p2.jpg").write_text("this is no picture")
    (root / "train" / "ant" / "p3.jpg").write_bytes(b"")
    (root / "train" / "bee" / "p3.jpg").write_bytes(whole[:300])
    return open_set(root, "train")


@pytest.mark.parametrize("mode", ["host", "device"])
def test_bad_pictures_are_named(tmp_path, mode):
    pictures = bad_tree(tmp_path)
    for row, name in ((1, "ant/p1.jpg"), (2, "ant/p2.jpg"), (3, "ant/p3.jpg"), (7, "bee/p3.jpg")):
        with pytest.raises(
            UserError, match=f"{name}: not a picture or truncated \\(--skip-bad-images"
        ) as error:
            epoch_of(loader(pictures.select([0, row, 4]), batch_size=3, data_device=mode))
        assert error.value.code == 1
    with pytest.raises(UserError, match="gone.jpg: no such file or directory"):
        gone = FolderSet(["ant/gone.jpg"], [0], ["ant"], pictures.root)
        epoch_of(loader(gone, batch_size=1, data_device=mode))


@pytest.mark.parametrize("mode", ["host", "device"])
def test_a_picture_too_large_is_named(tmp_path, mode, monkeypatch):
    make_tree(tmp_path / "train", each=3, suffix=".png")
    save(tmp_path / "train" / "bee" / "wide.png", 9, width=400, height=300)
    pictures = open_set(tmp_path, "train")
    options = {"batch_size": 7, "data_device": mode}
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
        with pytest.raises(
            UserError, match="bee/wide.png: more than 80,000 pixels, which Pillow refuses"
        ):
            epoch_of(loader(pictures, **options))
        skipping = loader(pictures, **options, skip_bad=True)
        epoch_of(skipping)
        assert skipping.bad_images == [str(tmp_path / "train" / "bee" / "wide.png")]


def test_a_lack_of_memory_is_not_a_bad_picture(tmp_path):
    """Skipping what fits at another time would change the data without a word."""
    make_tree(tmp_path / "train", each=1)
    pictures = open_set(tmp_path, "train")
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50, dtype=torch.uint8)  # what torchvision's decoder raises
    for cause in (MemoryError(), error.value):
        answer = pictures.bad_picture(0, cause)
        assert not isinstance(answer, sets.BadPicture) and "\n" not in str(answer)
        assert "ant/p0.jpg: the picture does not fit in memory: remove" in str(answer)


def test_bad_picture_in_a_worker_is_one_line(tmp_path):
    with pytest.raises(UserError) as error:
        epoch_of(loader(bad_tree(tmp_path), workers=2, data_device="host"))
    assert str(error.value).count("\n") == 0 and "truncated" in str(error.value)


def test_bad_pictures_are_replaced_and_counted(tmp_path):
    pictures = bad_tree(tmp_path)
    expected = [0, 4, 4, 4, 4, 5, 6, 0]  # the next readable row, around the end
    runs = []
    for options in (
        {"data_device": "host"},
        {"data_device": "host", "workers": 2},
        {"data_device": "device"},
    ):
        the_loader = loader(
            pictures, batch_size=3, shuffle=False, drop_last=False, skip_bad=True, **options
        )
        runs.append(epoch_of(the_loader))
        index = torch.cat([index for _, _, index in runs[-1]])
        target = torch.cat([target for _, target, _ in runs[-1]])
        assert index.tolist() == expected and torch.equal(target, pictures.targets[index])
        assert sorted(the_loader.bad_images) == [pictures.path(row) for row in (1, 2, 3, 7)]
        assert_same(runs[-1], epoch_of(the_loader))  # and the second time, when they are known
        assert len(the_loader.bad_images) == 4
    assert_same(runs[0], runs[1])
    for (host, *_), (device, *_) in zip(runs[0], runs[2]):
        assert max((a - b).abs().max() for a, b in zip(host, device)) < 2 / 255
    for mode in ("host", "device"):
        with pytest.raises(UserError, match="no readable picture"):
            epoch_of(
                loader(pictures.select([1, 2, 3]), batch_size=3, skip_bad=True, data_device=mode)
            )


def test_a_bad_twin_replaces_the_pair(tmp_path):
    pictures = bad_tree(tmp_path)
    good = open_set(make_tree(tmp_path / "good" / "train").parent, "train")
    for mode in ("host", "device"):
        the_loader = loader(
            good,
            (CROP,),
            8,
            partner=pictures,
            shuffle=False,
            drop_last=False,
            skip_bad=True,
            data_device=mode,
        )
        [(_, _, index)] = epoch_of(the_loader)
        assert index.tolist() == [0, 4, 4, 4, 4, 5, 6, 0]
        assert sorted(the_loader.bad_images) == [pictures.path(row) for row in (1, 2, 3, 7)]


# ----------------------------------------------------------------------------------- device or host


def test_mode_is_chosen_by_size(mixed, equal, monkeypatch):
    assert loader(equal).mode == "device" and loader(mixed).mode == "host"
    assert loader(equal, data_device="host").mode == "host"
    with pytest.raises(
        UsageError, match=r"ant/p1.jpg is 30x44, .*ant/p0.jpg is 40x30: .* --data-device host"
    ):
        loader(mixed, data_device="device")
    monkeypatch.setattr(resident, "CPU_BYTES", 12 * 3 * 40 * 30 - 1)
    assert loader(equal).mode == "host"


def test_odd_picture_found_late_falls_back_to_host(mixed, capsys):
    """Of a large set not all headers are read to choose the mode."""
    mixed = mixed.select([0, 1] + [0] * 1022)
    the_loader = loader(mixed, batch_size=512, progress=True)
    assert the_loader.mode == "host"
    out, err = capsys.readouterr()
    assert (
        out.count("\n") == 1 and "ant/p1.jpg" in out and err == ""
    )  # a job that is done at once has no bar
    assert loader(mixed).mode == "host"
    assert capsys.readouterr() == ("", "")  # another rank stays silent


def test_pictures_are_decoded_once_for_several_loaders(tmp_path):
    pictures = open_set(make_tree(tmp_path / "train").parent, "train")
    loader(pictures, data_device="device")
    for path in pictures.paths:
        os.unlink(path)
    assert len(epoch_of(loader(pictures, data_device="device", seed=8))) == 2


def test_host_and_device_give_the_same_views(equal):
    views = (CROP, Compose(RandomResizedCrop(24, (0.08, 0.5))), EVAL)
    host, device = (epoch_of(loader(equal, views, data_device=mode)) for mode in ("host", "device"))
    for (a, target_a, index_a), (b, target_b, index_b) in zip(host, device):
        assert torch.equal(index_a, index_b) and torch.equal(target_a, target_b)
        assert (
            [v.shape for v in a]
            == [v.shape for v in b]
            == [(4, 3, 16, 16), (4, 3, 24, 24), (4, 3, 16, 16)]
        )
        assert all(v.dtype == torch.float32 for v in a + b)
        assert max((x - y).abs().max() for x, y in zip(a, b)) < 2 / 255
        assert (a[0] - b[2]).abs().max() > 0.1  # the test pictures are not flat


def test_array_set(equal):
    images = torch.stack(
        [torch.from_numpy(np.asarray(equal.open(row).convert("RGB")).copy()) for row in range(12)]
    )
    array = ArraySet(images.permute(0, 3, 1, 2), equal.targets, equal.classes)
    assert_same(
        epoch_of(loader(array, (FULL, FULL))),
        epoch_of(loader(equal, (FULL, FULL), data_device="device")),
    )
    host = loader(array, (FULL, FULL), data_device="host", workers=2)
    assert_same(epoch_of(host), epoch_of(loader(equal, (FULL, FULL), data_device="host")))
    with pytest.raises(ValueError, match="uint8"):
        ArraySet(images.float(), equal.targets, equal.classes)


# ---------------------------------------------------------------------------------- reproducibility


def test_views_do_not_depend_on_workers_restart_or_global_state(mixed):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    here, workers = loader(mixed, (FULL, FULL)), loader(mixed, (FULL, FULL), workers=2)
    first = epoch_of(here)
    assert_same(first, epoch_of(workers))
    assert torch.equal(torch.get_rng_state(), before)
    second = epoch_of(here, epoch=1)
    torch.manual_seed(2)
    assert_same(second, epoch_of(workers, epoch=1))
    assert_same(
        second[1:], epoch_of(workers, epoch=1, start_step=1)
    )  # with the persistent workers of the epoch before
    for _ in workers:
        break  # leave in the middle of an epoch
    assert_same(first, epoch_of(workers))
    assert_same(second[2:], epoch_of(loader(mixed, (FULL, FULL)), epoch=1, start_step=2))
    assert not torch.equal(first[0][0][0], second[0][0][0])
    other = epoch_of(loader(mixed, (FULL, FULL), seed=4))
    assert not torch.equal(first[0][2], other[0][2]) or not torch.equal(
        first[0][0][0], other[0][0][0]
    )
    assert not torch.equal(first[0][0][0], first[0][0][1])  # two views, two crops
    workers.close()


def test_an_epoch_is_a_permutation_and_index_names_the_row(equal):
    the_loader = loader(equal, (EVAL,))
    rows = []
    for views, target, index in epoch_of(the_loader):
        rows += index.tolist()
        assert torch.equal(target, equal.targets[index])
        for view, row in zip(views[0], index.tolist()):
            alone = loader(equal.select([row]), (EVAL,), 1)
            assert (epoch_of(alone)[0][0][0][0] - view).abs().max() < 1e-6
    assert sorted(rows) == list(range(12)) and rows != sorted(rows)
    assert len(the_loader) == 3


@pytest.mark.parametrize("mode", ["host", "device"])
def test_colours_follow_the_crop(equal, mode):
    """With a colour operation in the recipe, the crops stay those of the plain recipe."""
    jittered = Compose(CROP.geometry, ColorJitter(brightness=(0.5, 0.5)))
    for (plain, *_), (dark, *_) in zip(
        epoch_of(loader(equal, data_device=mode)),
        epoch_of(loader(equal, (jittered, CROP), data_device=mode)),
    ):
        assert (plain[0] / 2 - dark[0]).abs().max() < 1e-5 and torch.equal(plain[1], dark[1])


# -------------------------------------------------------------------------------------------- ranks


def test_rank_slices_make_up_the_batch_of_one_process(mixed):
    one = epoch_of(loader(mixed, batch_size=4), epoch=5)
    two = [
        epoch_of(loader(mixed, batch_size=2, rank=rank, world_size=2), epoch=5) for rank in (0, 1)
    ]
    assert len(one) == len(two[0]) == len(two[1]) == 3
    for step, (_, _, index) in enumerate(one):
        assert torch.equal(index, torch.cat([two[0][step][2], two[1][step][2]]))


@pytest.mark.parametrize(
    "n, batch, world, expected", [(12, 5, 1, 3), (12, 5, 2, 2), (11, 5, 2, 1), (13, 2, 3, 2)]
)
def test_last_batch_is_shared_when_kept(equal, n, batch, world, expected):
    part = equal.select(list(range(12)) + [0]).select(range(n))
    loaders = [
        loader(part, (EVAL,), batch, rank=r, world_size=world, drop_last=False)
        for r in range(world)
    ]
    assert [len(x) for x in loaders] == [expected] * world
    rows = [len(index) for x in loaders for _, _, index in epoch_of(x)]
    assert min(rows) > 0 and sum(rows) == n - (
        n % (batch * world) if n % (batch * world) < world else 0
    )


@pytest.mark.parametrize("mode", ["host", "device"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_covers_every_row_once(equal, mode, world):
    part, seen = equal.select(range(11)), []
    for rank in range(world):
        the_loader = loader(
            part,
            (EVAL,),
            4,
            rank=rank,
            world_size=world,
            shuffle=False,
            drop_last=False,
            data_device=mode,
        )
        batches = epoch_of(the_loader)
        assert len(batches) == len(the_loader)
        mine = torch.cat([index for _, _, index in batches]).tolist()
        assert mine == list(range(rank, 11, world))
        seen += mine
    assert sorted(seen) == list(range(11))


def test_impossible_loaders_are_refused(equal):
    with pytest.raises(
        UsageError,
        match="12 pictures do not fill one batch of 16: .*, or --batch-size 8 .* --preset photos",
    ):
        loader(equal, batch_size=8, world_size=2)
    with pytest.raises(UsageError, match="no pictures"):
        loader(equal.select([]), drop_last=False)
    with pytest.raises(ValueError, match="partner set has 2 pictures"):
        loader(equal, partner=equal.select([0, 1]))


# -------------------------------------------------------------------------------------------- twins


@pytest.mark.parametrize("mode", ["host", "device"])
def test_the_twin_gets_the_parameters_of_view_0(equal, mode):
    for views, *_ in epoch_of(loader(equal, (FULL, FULL), partner=equal, data_device=mode)):
        assert (
            len(views) == 3
            and torch.equal(views[0], views[2])
            and not torch.equal(views[0], views[1])
        )


def test_the_twin_of_double_size_gets_the_same_part(mixed, tmp_path):
    for row in range(len(mixed)):
        twin = mixed.open(row).convert("RGB")
        twin = twin.resize((2 * twin.width, 2 * twin.height), Image.Resampling.BICUBIC)
        path = (
            tmp_path / "train" / Path(mixed.path(row)).relative_to(mixed.root).with_suffix(".png")
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        twin.save(path)
    wide = Compose(RandomResizedCrop(16, (0.5, 1.0)), RandomHorizontalFlip())
    for views, *_ in epoch_of(
        loader(mixed, (wide,), partner=open_set(tmp_path, "train"), workers=2)
    ):
        assert (views[0] - views[1]).abs().mean() < 0.02
        assert (views[0] - views[1].flip(-1)).abs().mean() > 0.05


def test_scaled_boxes():
    boxes = torch.tensor([[3, 5, 10, 20], [0, 0, 30, 40], [29, 39, 1, 1], [7, 11, 13, 17]])
    h, w = torch.full((4,), 30), torch.full((4,), 40)
    assert torch.equal(scale_boxes(boxes, h, w, h, w), boxes)
    assert torch.equal(scale_boxes(boxes, h, w, 2 * h, 2 * w), 2 * boxes)
    small = scale_boxes(boxes, h, w, torch.tensor([3, 3, 3, 7]), torch.tensor([4, 4, 4, 224]))
    assert small[2].tolist() == [2, 3, 1, 1] and small[1].tolist() == [0, 0, 3, 4]
    assert (small[:, 2:] >= 1).all() and small[3, 1] + small[3, 3] <= 224


def test_textures_pair_by_path(tmp_path):
    photos = make_tree(tmp_path / "in-100" / "train", each=3, suffix=".JPEG").parent
    save(photos / "train" / "bee" / "deep" / "it's 1.x.jpg", 50)
    textures = make_tree(tmp_path / "in-100-texture" / "train", each=2, suffix=".png").parent
    save(textures / "train" / "bee" / "deep" / "it's 1.x.png", 51)
    save(textures / "train" / "bee" / "texture1_p0.png", 52)
    save(textures / "train" / "bee" / "texture2_p0.png", 53)
    assert original_root_of(textures) == photos
    assert original_root_of("/a-texture/b-texture/train") == Path("/a/b/train")
    with pytest.raises(UsageError, match="has no '-texture'"):
        original_root_of(photos)

    listing = tmp_path / "unmatched.txt"
    texture_set = open_set(textures, "train")
    for root in (photos, photos / "train"):
        original, texture = pair_by_path(texture_set, root, unmatched_listing=listing)
        assert len(original) == len(texture) == 5
        assert original.classes == texture.classes and torch.equal(
            original.targets, texture.targets
        )
        for a, b in zip(original.paths, texture.paths):
            assert Path(a).relative_to(photos).with_suffix("") == Path(b).relative_to(
                textures
            ).with_suffix("")
    assert listing.read_text().splitlines() == [
        f"original without texture: {c}/p2.JPEG" for c in ("ant", "bee")
    ]
    assert (
        "2 left-over patch files" in original.notes[0]
        and "2 pictures without a texture" in original.notes[1]
    )

    save(textures / "train" / "ant" / "p77.png", 54)
    texture_set = open_set(textures, "train")
    with pytest.raises(
        UsageError, match=r"1 of 6 originals missing: ant/p77.png; full list in .*unmatched.txt"
    ):
        pair_by_path(texture_set, photos, unmatched_listing=listing)
    assert listing.read_text().splitlines()[0] == "texture without original: ant/p77.png"
    other = make_tree(tmp_path / "other", ("cow",), each=1)
    with pytest.raises(UsageError, match="none of its 6 textures has an original"):
        pair_by_path(texture_set, other)
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        pair_by_path(texture_set, tmp_path / "nowhere")
    save(photos / "train" / "ant" / "p0.png", 55)
    with pytest.raises(UsageError, match="ant/p0.JPEG, ant/p0.png have the same name"):
        pair_by_path(texture_set, photos)


# ------------------------------------------------------------------------------------------ workers


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="needs POSIX signals")
def test_workers_outlive_the_signals_of_a_job(mixed):
    """Ctrl-C and a scheduler's SIGTERM reach every process; the next batches must still come."""
    before = set(multiprocessing.active_children())
    the_loader = loader(mixed, batch_size=2, workers=2)
    batches = iter(the_loader)
    next(batches), next(batches)  # of each of the two: they are up
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
        os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 4
    the_loader.close()
    assert not workers & set(multiprocessing.active_children())


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="needs POSIX signals")
def test_a_killed_worker_is_one_line():
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore")
    line, code = launch.in_one_line(error)  # what cli.run prints
    assert "is killed by signal: Killed; the memory or /dev/shm may be too small" in line
    assert "\n" not in line and code == 1


def _hand_over_what_cannot_be_sent():
    data.quiet_worker(0)
    queue = multiprocessing.Queue()
    queue.put(lambda: None)
    time.sleep(60)


def test_a_worker_that_cannot_hand_over_a_batch_ends():
    """The main process would wait for ever for a batch that did not fit into /dev/shm."""
    worker = multiprocessing.get_context("fork").Process(target=_hand_over_what_cannot_be_sent)
    worker.start()
    worker.join(30)
    assert worker.exitcode == 1


def test_a_program_with_a_global_loader_ends(mixed):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from common.augment import Compose, RandomResizedCrop\n"
        "from common.data import Loader\nfrom common.sets import open_tree\n"
        "views = (Compose(RandomResizedCrop(8)),)\n"
        "pictures = open_tree(sys.argv[2])\n"
        "loader = Loader(pictures, views, 2, device='cpu', seed=0, workers=1)\n"
        "for batch in loader:\n    raise SystemExit('left in the middle')\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), mixed.root]
    done = subprocess.run(command, capture_output=True, timeout=240, text=True)
    assert (done.returncode, done.stderr.strip()) == (1, "left in the middle")


def test_a_gpu_waits_for_the_copies_that_it_uses(mixed, monkeypatch):
    expected = epoch_of(loader(mixed, (FULL,)))
    the_loader = loader(mixed, (FULL,))
    said = []

    @contextlib.contextmanager
    def stream(_):
        said.append("copy")
        yield
        said.append("copied")

    computation = types.SimpleNamespace(wait_stream=lambda other: said.append(f"wait {other}"))
    monkeypatch.setattr(the_loader, "_copies", "beside")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computation)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, by: said.append(f"kept {len(x)}"))
    assert_same(epoch_of(the_loader), expected)
    assert said == ["copy", "copied", "wait beside", "kept 4"] * 3


def test_a_loader_that_compiles_gives_the_same_views(mixed, monkeypatch):
    compiled = []

    def compile(apply):
        return lambda *given: compiled.append(given[0]) or apply(*given)

    monkeypatch.setattr(torch, "compile", compile)
    views = (FULL, CROP, Compose(RandomResizedCrop(8), ToColour("Lab")))
    assert_same(epoch_of(loader(mixed, views, compile=True)), epoch_of(loader(mixed, views)))
    assert FULL in compiled and views[2] not in compiled  # an operation of a paper's own


def test_times_are_counted(mixed):
    the_loader = loader(mixed, (FULL,))
    epoch_of(the_loader)
    assert the_loader.wait_seconds > 0 and the_loader.view_seconds > 0
    assert repr(the_loader) == f"{mixed.name}: 12 pictures, 2 classes, 0 workers"


@pytest.mark.gpu
def test_the_device_may_be_a_gpu(equal):
    expected = epoch_of(loader(equal, (FULL, FULL), partner=equal, data_device="device"))
    for mode, tolerance in (("device", 1e-4), ("host", 3 / 255)):
        the_loader = loader(
            equal,
            (FULL, FULL),
            partner=equal,
            data_device=mode,
            device="cuda",
            workers=2 if mode == "host" else 0,
        )
        for (a, target_a, index_a), (b, target_b, index_b) in zip(expected, epoch_of(the_loader)):
            assert all(t.is_cuda for t in (*b, target_b, index_b))
            assert torch.equal(index_a, index_b.cpu()) and torch.equal(target_a, target_b.cpu())
            assert max((x - y.cpu()).abs().mean() for x, y in zip(a, b)) < tolerance


def test_jpegs_decode_to_the_pixels_of_pillow_with_and_without_torchvision_io(
    tmp_path, monkeypatch
):
    folder = tmp_path / "train" / "a"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((106, 74)).save(folder / "0.jpg", quality=90)
    Image.fromarray(pixels[..., 0]).save(folder / "1.jpg", progressive=True)
    Image.fromarray(pixels).convert("CMYK").save(folder / "2.jpg")
    whole = (folder / "0.jpg").read_bytes()
    (folder / "3.jpg").write_bytes(whole[: len(whole) // 2])
    opened = open_tree(tmp_path / "train")
    for decoder in (crops.decode_jpeg, None):
        monkeypatch.setattr(crops, "decode_jpeg", decoder)
        for row in range(3):
            expected = np.array(Image.open(folder / f"{row}.jpg").convert("RGB"))
            assert np.array_equal(
                crops.decoded(opened, row, opened.open(row)).permute(1, 2, 0).numpy(), expected
            )
        with pytest.raises(UserError, match="3.jpg: not a picture or truncated"):
            crops.decoded(opened, 3, opened.open(3))
