"""Packed sets: the right pixels whatever happened, and views and errors as of any other set."""

import contextlib
import json
import os
import pickle
import resource

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from common import UsageError, UserError, crops
from common.augment import (
    ColorJitter,
    Compose,
    RandomHorizontalFlip,
    RandomResizedCrop,
    ResizeCenterCrop,
)
from common.data import Loader
from common.sets import ArraySet, open_set
from nonsem_neg import main_lincls, moco_non_sem_neg
from preprocess import pack
from preprocess.pack_files import HEADER_BYTES, PackFiles, npy_header

SIDE = 18
VIEW = Compose(
    RandomResizedCrop(16, (0.2, 1.0)),
    ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
    RandomHorizontalFlip(),
)
EVAL = Compose(ResizeCenterCrop(SIDE, 16))


def picture(seed, width, height, mode="RGB"):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """train/ with 3 classes x 5 and val/ with 3 x 2.

    JPEG and PNG, grey and CMYK, upright, wide, and smaller than SIDE.
    """
    root = tmp_path_factory.mktemp("packed") / "tree"
    names = ["plain.jpg", "with space.JPEG", "quote'\"s.png", "Übung.jpeg", "p5.png"]
    kinds = [(40, 30, "RGB"), (30, 44, "L"), (52, 24, "RGB"), (31, 31, "CMYK"), (12, 10, "RGB")]
    for split, count in (("train", 5), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cow")):
            for i in range(count):
                folder = root / split / name
                folder.mkdir(parents=True, exist_ok=True)
                picture(len(split) * 100 + label * 10 + i, *kinds[i]).save(folder / names[i])
    return root


def run_pack(*words):
    pack.main([*map(str, words), *([] if "--workers" in words else ["--workers", "1"])])


@pytest.fixture(scope="module")
def packed(tree):
    run_pack(tree, tree.parent / "pack", "--side", SIDE)
    return tree.parent / "pack"


@pytest.fixture
def copy_of_tree(tree, tmp_path):
    """A tree of links to the pictures, to be broken."""
    for path in tree.rglob("*.*"):
        place = tmp_path / "tree" / path.relative_to(tree)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(path)
    return tmp_path / "tree"


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("[!.]*")}


def same_pack(one, two, split=""):
    """Assert that the files are equal, the listing but for where the pictures came from."""
    first = {name: data for name, data in files_of(one).items() if name.startswith(split)}
    second = {name: data for name, data in files_of(two).items() if name.startswith(split)}
    assert first.keys() == second.keys()
    for name in first:
        if name.endswith(".json"):
            listing, other = json.loads(first[name]), json.loads(second[name])
            assert listing | {"source": ""} == other | {"source": ""}, name
        else:
            assert first[name] == second[name], name


@pytest.fixture
def jobs_of_four(monkeypatch):
    monkeypatch.setattr(pack, "CHUNK", 4)


@contextlib.contextmanager
def interrupted_in_the_third_job():
    """Let Ctrl-C come when the third job of a packing starts."""
    jobs = []
    pack_rows = pack.pack_rows

    def interrupted(*arguments):
        jobs.append(arguments)
        if len(jobs) == 3:
            raise KeyboardInterrupt
        return pack_rows(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "pack_rows", interrupted)
        yield


def loader(dataset, views=(VIEW, VIEW), batch_size=5, **options):
    defaults = {"device": "cpu", "seed": 3, "workers": 0, "progress": False}
    return Loader(dataset, views, batch_size, **defaults | options)


def epoch_of(a_loader):
    a_loader.set_epoch(1)
    return [[*views, target, index] for views, target, index in a_loader]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ----------------------------------------------------------------------------------- what is packed


def test_pixels_are_the_central_squares_in_the_order_of_the_tree(tree, packed):
    for split in ("train", "val"):
        source = open_set(tree, split)
        pixels = np.load(packed / f"{split}.npy", mmap_mode="r")  # as any program can
        listing = json.loads((packed / f"{split}.json").read_text())
        assert pixels.shape == (len(source), SIDE, SIDE, 3) and pixels.dtype == np.uint8
        assert listing["classes"] == source.classes == ["ant", "bee", "cow"]
        assert listing["targets"] == source.targets.tolist()
        assert [os.path.join(source.root, f) for f in listing["files"]] == source.paths
        for row in range(len(source)):
            image = source.open(row).convert("RGB")
            published = TF.center_crop(TF.resize(image, SIDE), SIDE)
            assert np.abs(pixels[row].astype(int) - np.asarray(published)).max() <= 1, source.path(
                row
            )
    assert sorted(files_of(packed)) == ["train.json", "train.npy", "val.json", "val.npy"]


def test_evaluation_sees_what_it_sees_of_the_tree(tree, packed):
    sets = (open_set(packed, "val", dataset="packed"), open_set(tree, "val"))
    options = {"shuffle": False, "drop_last": False, "data_device": "host"}
    assert_same(*(epoch_of(loader(s, (EVAL,), 4, **options)) for s in sets))


def test_size_per_picture():
    assert len(npy_header(126_689, 256)) == HEADER_BYTES
    assert pack.size_text(126_689, 256) == "24.9 GB (23.2 GiB)"
    assert pack.size_text(126_689 + 5_000, 256) == "25.9 GB (24.1 GiB)"
    assert pack.size_text(1, 256) == f"{196_608 + HEADER_BYTES} bytes"


def test_a_second_run_changes_nothing(tree, packed, capsys):
    before = {p: p.stat().st_mtime_ns for p in packed.iterdir()}
    run_pack(tree, packed, "--side", SIDE)
    assert {p: p.stat().st_mtime_ns for p in packed.iterdir()} == before
    assert "packed already" in capsys.readouterr().out


def test_interrupted_at_any_point_it_is_the_same_pack(
    tree, packed, tmp_path, jobs_of_four, monkeypatch, capsys
):
    out = tmp_path / "pack"
    with interrupted_in_the_third_job(), pytest.raises(SystemExit) as ended:
        run_pack(tree, out, "--side", SIDE, "--splits", "train")
    assert ended.value.code == 130 and "continues from there" in capsys.readouterr().err
    files = PackFiles(out, "train")
    assert json.loads(files.marker.read_text())["done"] == 8 and not files.pixels.exists()
    with pytest.raises(
        UserError, match=rf"unfinished \(8 of 15.*preprocess/pack.py {tree} {out} --side {SIDE}"
    ):
        open_set(out, "train", dataset="packed")

    with open(files.partial, "ab") as file:  # written after the marker, then the machine went down
        file.write(b"?" * 15 * 3 * SIDE**2)
    run_pack(tree, out, "--side", SIDE, "--splits", "train", "--workers", 2)
    same_pack(out, packed, "train")

    files.listing.rename(
        files.listing.with_suffix(".hidden")
    )  # went down between the last two files
    hidden = json.loads(files.listing.with_suffix(".hidden").read_text())
    state = {"settings": hidden["settings"], "done": 15, "count": 15, "failed": [], "command": ""}
    files.marker.write_text(json.dumps(state))
    monkeypatch.setattr(pack, "pack_rows", lambda *_: pytest.fail("decoded again"))
    run_pack(tree, out, "--side", SIDE, "--splits", "train")
    files.listing.with_suffix(".hidden").unlink()
    same_pack(out, packed, "train")


def test_an_interrupted_force_goes_on_without_it(tree, packed, tmp_path, jobs_of_four, capsys):
    out = tmp_path / "pack"
    with interrupted_in_the_third_job(), pytest.raises(SystemExit):
        run_pack(tree, out, "--side", SIDE, "--splits", "train", "--force")
    message = "interrupted; the same command without --force continues from there"
    assert message in capsys.readouterr().err
    with pytest.raises(UserError, match=r"unfinished \(8 of 15") as told:
        open_set(out, "train", dataset="packed")
    assert "--force" not in str(told.value)
    run_pack(tree, out, "--side", SIDE, "--splits", "train")
    same_pack(out, packed, "train")


def test_the_output_cannot_lie_in_a_class_of_a_tree_of_links(tree, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "train").mkdir()
    name = next((tree / "train").iterdir()).name
    (tmp_path / "real").mkdir()
    (tmp_path / "links" / "train" / name).symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match="PACK .* lies inside the input"):
        run_pack(tmp_path / "links", tmp_path / "real" / "out", "--side", SIDE)
    assert not (tmp_path / "real" / "out").exists()


def test_full_disk_stops_cleanly_and_can_be_resumed(tree, packed, tmp_path, jobs_of_four):
    limits, out = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "pack"
    resource.setrlimit(resource.RLIMIT_FSIZE, (HEADER_BYTES + 9 * 3 * SIDE**2 + 100, limits[1]))
    try:
        with pytest.raises(
            UserError, match="cannot write to .*: file too large; the same command continues"
        ):
            run_pack(tree, out, "--side", SIDE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (out / "train.npy").exists() and not (out / "train.json").exists()
    run_pack(tree, out, "--side", SIDE)
    same_pack(out, packed)


def test_too_little_space_is_said_before_any_work(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: type("", (), {"free": 5000}))
    with pytest.raises(UserError, match="0.00 GB are free"):
        run_pack(tree, tmp_path / "pack", "--side", SIDE)
    assert not (tmp_path / "pack" / "train.npy.partial").exists()


def test_unreadable_pictures_are_left_out_and_listed(copy_of_tree, tmp_path, jobs_of_four):
    broken, gone = copy_of_tree / "train/bee/plain.jpg", copy_of_tree / "train/cow/p5.png"
    content = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(content[: len(content) // 2])
    gone.unlink()
    gone.symlink_to("nowhere.png")
    out = tmp_path / "pack"
    with pytest.raises(
        UserError, match="2 of 21 pictures could not be read.*train.failed.txt"
    ) as error:
        run_pack(copy_of_tree, out, "--side", SIDE)
    assert error.value.code == 1
    listed = (out / "train.failed.txt").read_text().splitlines()
    assert listed == [
        "bee/plain.jpg\tnot a picture or truncated",
        "cow/p5.png\tno such file or directory",
    ]
    source, opened = open_set(copy_of_tree, "train"), open_set(out, "train", dataset="packed")
    good = [row for row in range(15) if source.path(row) not in (str(broken), str(gone))]
    assert len(opened) == 13 and opened.targets.tolist() == source.targets[good].tolist()
    assert all(
        torch.equal(opened.open(i), pack.square(source, row, SIDE)) for i, row in enumerate(good)
    )
    assert "2 pictures could not be read" in opened.notes[0] and "bee/quote'\"s.png" in opened.path(
        6
    )
    with pytest.raises(UserError, match="2 of 21"):  # said again, as the pack still lacks them
        run_pack(copy_of_tree, out, "--side", SIDE)

    for path in (copy_of_tree / "val/ant").iterdir():
        path.unlink()
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no readable picture in 1 of 3 classes \(ant\)"):
        run_pack(copy_of_tree, out, "--side", SIDE, "--splits", "val", "--force")


def test_deep_large_and_special_files(copy_of_tree, tmp_path, monkeypatch):
    train, deep = (
        copy_of_tree / "train/ant",
        np.linspace(0, 65535, 900).astype(np.uint16).reshape(30, 30),
    )
    Image.fromarray(deep).save(train / "zz16.png")
    os.mkfifo(train / "zz17.png")
    (train / "zz18.png").symlink_to("zz17.png")
    picture(1, 500, 400).save(train / "zz19.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
        with pytest.raises(UserError, match="1 of 17 pictures could not be read"):
            run_pack(copy_of_tree, tmp_path / "pack", "--side", 30, "--splits", "train")
    opened = open_set(tmp_path / "pack", "train", dataset="packed")
    (row,) = [i for i in range(len(opened)) if "zz16.png" in opened.path(i)]
    assert np.array_equal(opened.open(row)[0].numpy(), deep >> 8)
    assert (
        tmp_path / "pack/train.failed.txt"
    ).read_text() == "ant/zz19.png\tmore than 120,000 pixels, which Pillow refuses\n"

    def full(image):
        raise MemoryError

    monkeypatch.setattr(crops, "as_rgb", full)
    with pytest.raises(UserError, match="the picture does not fit in memory: remove") as error:
        run_pack(copy_of_tree, tmp_path / "other", "--side", 30, "--splits", "train")
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    run_pack(copy_of_tree, tmp_path / "other", "--side", 30, "--splits", "train")  # goes on
    assert len(open_set(tmp_path / "other", "train", dataset="packed")) == 17


def test_a_name_that_is_not_utf8(tree, tmp_path):
    folder = os.fsencode(tmp_path / "t" / "train" / "a")
    os.makedirs(folder)
    with open(os.path.join(folder, b"caf\xe9.png"), "wb") as file:
        picture(0, 20, 20).save(file, "PNG")
    run_pack(tmp_path / "t", tmp_path / "p", "--side", 8, "--splits", "train")
    assert os.fsencode(open_set(tmp_path / "p", "train", dataset="packed").path(0)).endswith(
        b"(a/caf\xe9.png)"
    )


def test_what_is_in_the_way(tree, packed, tmp_path, monkeypatch):
    before = files_of(packed)
    with pytest.raises(
        UsageError, match="train.npy is a finished pack of other pictures or another side"
    ):
        run_pack(tree, packed, "--side", SIDE + 1)
    for out in (tree, tree / "train", tree / "new"):
        with pytest.raises(UsageError, match="lies inside the input"):
            run_pack(tree, out)
    (tmp_path / "link").symlink_to(tree)
    with pytest.raises(UsageError, match="lies inside the input"):
        run_pack(tree, tmp_path / "link" / "new")
    with pytest.raises(UsageError, match=r"no val/ folder.*\(--splits chooses"):
        (tmp_path / "half").mkdir()
        (tmp_path / "half" / "train").symlink_to(tree / "train")
        run_pack(tmp_path / "half", tmp_path / "out")
    with pack.only_writer(packed), pytest.raises(UserError, match="another process is writing"):
        run_pack(tree, packed, "--side", SIDE)
    assert files_of(packed) == before and not (tree / "new").exists()

    out = tmp_path / "pack"
    run_pack(tree, out, "--side", 8)
    run_pack(tree, out, "--side", SIDE, "--force")
    same_pack(out, packed)

    annotations = '{"images": [1, 2, 3]}'
    (out / "train.json").write_text(annotations)
    with pytest.raises(UsageError, match="train.json is not the list of a pack"):
        run_pack(tree, out, "--side", SIDE, "--force")
    assert (out / "train.json").read_text() == annotations


# --------------------------------------------------------------------------------------- reading it


def test_views_are_those_of_the_same_pictures_in_memory(packed):
    opened = open_set(packed, "train", dataset="packed")
    images = torch.from_numpy(np.load(packed / "train.npy")).permute(0, 3, 1, 2).contiguous()
    array = ArraySet(images, opened.targets, opened.classes)
    assert all(torch.equal(opened.open(i), images[i]) for i in range(len(opened)))
    assert np.array_equal(opened.open(3), images[3])
    device, host = (
        [epoch_of(loader(s, data_device=way)) for s in (opened, array)]
        for way in ("device", "host")
    )
    assert_same(*device)
    assert_same(*host)
    assert_same(epoch_of(loader(opened, data_device="host", workers=2)), host[0])
    for a, b in zip(device[0], host[0]):  # crops of host mode are rounded to uint8
        assert (
            torch.equal(a[3], b[3])
            and max((x - y).abs().max() for x, y in zip(a[:2], b[:2])) < 4 / 255
        )
    assert loader(opened).mode == "host"  # auto, on a CPU
    assert_same(
        epoch_of(loader(opened, partner=opened)),
        epoch_of(loader(array, partner=array, data_device="host")),
    )


def test_pictures_are_read_as_they_are_needed(tmp_path):
    side, count = 256, 4000
    files = PackFiles(tmp_path, "train")
    with open(files.pixels, "wb") as file:  # 786 MB with nothing in it: takes no space on the disk
        file.write(npy_header(count, side))
        file.truncate(HEADER_BYTES + count * 3 * side**2)
    names = [f"a/{i}.png" for i in range(count)]
    content = {
        "format": "packed pictures",
        "version": 1,
        "count": count,
        "side": side,
        "failed": [],
    }
    files.listing.write_text(
        json.dumps(content | {"classes": ["a"], "targets": [0] * count, "files": names})
    )

    def resident_bytes():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    opened = open_set(tmp_path, "train", dataset="packed")
    if os.path.exists("/proc/self/statm"):
        before = resident_bytes()
        loaders = [loader(opened, data_device=way) for way in ("device", "host")]
        for each in loaders:
            next(iter(each))
        assert resident_bytes() - before < 200e6
    copied = pickle.dumps(opened)
    assert len(copied) < 200_000
    assert torch.equal(pickle.loads(copied).open(3999), opened.open(3999))


def test_selections_keep_their_pictures(packed):
    opened = open_set(packed, "train", dataset="packed")
    part = opened.select([14, 3, 7]).select([2, 0])
    assert len(part) == 2 and part.targets.tolist() == [1, 2] and part.path(0) == opened.path(7)
    assert torch.equal(part[torch.tensor([1, 0])], opened[torch.tensor([14, 7])])
    assert torch.equal(part.open(1), opened.open(14))


def test_class_list_and_class_order(packed, tmp_path):
    listing = tmp_path / "ids.txt"
    listing.write_text("cow moo\nant\n")
    chosen = open_set(packed, "train", dataset="packed", class_list=listing)
    whole = open_set(packed, "train", dataset="packed")
    assert chosen.classes == ["ant", "cow"] and chosen.targets.tolist() == [0] * 5 + [1] * 5
    assert torch.equal(chosen.open(5), whole.open(10)) and chosen.path(5) == whole.path(10)
    for a, b in zip(*(epoch_of(loader(chosen, data_device=way)) for way in ("device", "host"))):
        assert (
            torch.equal(a[2], b[2])
            and torch.equal(a[3], b[3])
            and (a[0] - b[0]).abs().max() < 4 / 255
        )
    turned = open_set(packed, "val", dataset="packed", classes=["cow", "ant", "bee"])
    assert turned.classes == ["cow", "ant", "bee"] and turned.targets.tolist() == [1, 1, 2, 2, 0, 0]
    listing.write_text("cow\nyak\n")
    with pytest.raises(UsageError, match=r"ids.txt: no such class folder in .*pack: yak"):
        open_set(packed, "train", dataset="packed", class_list=listing)
    with pytest.raises(
        UsageError, match=r"\(val\) does not have the class.*lacks dog.*also has ant, bee, cow"
    ):
        open_set(packed, "val", dataset="packed", classes=["dog"])


def damaged(packed, folder, change):
    folder.mkdir()
    for name, content in files_of(packed).items():
        (folder / name).write_bytes(content)
    change(folder)
    return folder


@pytest.mark.parametrize(
    "change, code, message",
    [
        (
            lambda f: (f / "train.json").unlink(),
            2,
            "no packed train .*preprocess/pack.py TREE",
        ),
        (lambda f: (f / "train.json").write_text("{"), 1, "train.json is damaged"),
        (
            lambda f: (f / "train.json").write_text('{"format": "other"}'),
            1,
            "not a list of packed pictures",
        ),
        (lambda f: (f / "train.npy").unlink(), 1, "train.npy: no such file"),
        (
            lambda f: os.truncate(f / "train.npy", 5000),
            1,
            "train.json is damaged or does not belong to train.npy",
        ),
        (
            lambda f: [p.unlink() for p in f.glob("train*")],
            2,
            "no packed train ",
        ),
        (
            lambda f: [p.unlink() for p in f.iterdir()],
            2,
            "no packed train .*preprocess/pack.py TREE",
        ),
    ],
)
def test_damaged_packs(packed, tmp_path, change, code, message):
    with pytest.raises(UserError, match=message) as error:
        open_set(damaged(packed, tmp_path / "pack", change), "train", dataset="packed")
    assert error.value.code == code and "\n" not in str(error.value)


def test_a_tree_for_a_pack_and_a_pack_for_a_tree(tree, packed, tmp_path):
    with pytest.raises(UsageError, match="class folders, not a packed set: omit --dataset packed"):
        open_set(tree, "train", dataset="packed")
    with pytest.raises(UsageError, match="add --dataset packed"):
        open_set(packed, "train")
    with pytest.raises(UsageError, match="no such folder"):
        open_set(tmp_path / "none", "train", dataset="packed")


@pytest.mark.gpu
def test_resident_on_a_gpu(packed):
    opened = open_set(packed, "train", dataset="packed")
    on_gpu = loader(opened, device="cuda")
    assert on_gpu.mode == "device"
    for a, b in zip(epoch_of(on_gpu), epoch_of(loader(opened, data_device="device"))):
        assert all(torch.allclose(x.cpu().float(), y.float(), atol=1e-4) for x, y in zip(a, b))


# ----------------------------------------------------------------------------------------- training


def test_training_and_evaluation_run_on_a_packed_set(demo_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_pack(demo_set, "pack", "--side", 37)
    common = ["pack", "--dataset", "packed", "--device", "cpu", "--seed", "0", "-j", "0"]
    small = "-a resnet18 --input-res 32 --epochs 1 -b 80 --moco-k 80 --bn-splits 1 --mlp"
    small += " --knn-every 1 --knn-k 5"
    moco_non_sem_neg.main([*common, *small.split(), "--ckpt_path", "run"])
    records = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert any("loss" in r for r in records) and any("knn_acc1" in r for r in records)
    main_lincls.main(
        [*common, "--pretrained", "run", "--epochs", "1", "-b", "80", "--ckpt_path", "lincls"]
    )
    assert (tmp_path / "lincls/result.json").exists()
    with pytest.raises(
        UsageError, match="a packed set, not a tree of class folders: add --dataset packed"
    ):
        moco_non_sem_neg.main([*common[:1], *common[3:], *small.split(), "--ckpt_path", "other"])


def test_every_script_takes_a_packed_set():
    from tools import robustness

    words = ["DATA", "--dataset", "packed", "--pretrained", "x", "--classifier", "x"]
    assert moco_non_sem_neg.parse_args(words[:3]).dataset == "packed"
    assert main_lincls.parse_args(words[:5]).dataset == "packed"
    assert robustness.parse_args([*words[:3], *words[5:]]).dataset == "packed"
