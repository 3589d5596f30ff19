"""ImageNet-100 from ImageNet: the right classes, nothing half done, and every wrong input named."""

import errno
import os
import shutil
import subprocess

import pytest
from conftest import run_script
from PIL import Image
from torchvision.datasets import ImageFolder

from common import UsageError, UserError, cli, launch
from common.sets import open_set, open_tree, read_class_list
from preprocess import imagenet100_subset as subset
from preprocess import imagenet_splits

# WordNet ids that ImageNet-100 shares with ImageNet-R, and their places in the sorted list.
IN_IMAGENET_R = """
    n01820546:6 n01855672:7 n01983481:10 n02085620:13 n02086240:14 n02106550:26 n02108089:28
    n02113799:30 n02119022:34 n02123045:35 n02138441:36 n02483362:42 n02701002:44 n03424325:57
    n03494278:59 n03930630:74 n03947888:75 n07714571:93 n07753275:95
"""
IDS = read_class_list(imagenet_splits.CLASS_LIST)
OTHERS = ["n01440764", "n15075141"]  # classes of ImageNet, not of ImageNet-100


def small_picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), tuple(sum(map(ord, path.name)) * k % 256 for k in (3, 5, 7))).save(
        path
    )


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """102 classes with two train pictures and one val picture each."""
    root = tmp_path_factory.mktemp("imagenet") / "imagenet"
    for name in [*IDS, *OTHERS]:
        for i in range(2):
            small_picture(root / "train" / name / f"{name}_{i}.JPEG")
        small_picture(
            root
            / "val"
            / name
            / f"ILSVRC2012_val_{IDS.index(name) if name in IDS else 999:08d}.JPEG"
        )
    return root


@pytest.fixture
def few(imagenet, tmp_path):
    """An ImageNet of three classes, to be changed, and a list of two of them."""
    for split in ("train", "val"):
        for name in IDS[:3]:
            shutil.copytree(imagenet / split / name, tmp_path / "few" / split / name)
    (tmp_path / "ids.txt").write_text("\n".join(IDS[1::-1]))
    return tmp_path / "few"


@pytest.fixture
def flat(imagenet, tmp_path):
    """train/ in class folders, val/ flat: picture i is of class (7 i) mod 102; and the labels."""
    classes = [*IDS, *OTHERS]
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "train").symlink_to(imagenet / "train")
    for i in range(1, 206):
        small_picture(tmp_path / "flat" / "val" / f"ILSVRC2012_val_{i:08d}.JPEG")
    return tmp_path / "flat", [classes[7 * i % 102] for i in range(1, 50_001)]


def make(source, out, *flags):
    subset.main(["--imagenet_path", str(source), "--imagenet100_path", str(out), *map(str, flags)])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.JPEG"))}


# ----------------------------------------------------------------------------------------- the list


def test_the_list_is_the_published_one():
    lines = imagenet_splits.CLASS_LIST.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 100 and all(
        imagenet_splits.WORDNET_ID.fullmatch(line) for line in lines
    )
    assert lines[:3] == ["n02869837", "n01749939", "n02488291"] and sorted(lines) == IDS
    shared = dict(pair.split(":") for pair in IN_IMAGENET_R.split())
    assert len(shared) == 19 and {name: str(IDS.index(name)) for name in shared} == shared


# -------------------------------------------------------------------------------------------- links


def test_links_are_one_per_class_and_a_second_run_keeps_them(imagenet, tmp_path, capsys):
    make(imagenet, tmp_path / "out")
    said = capsys.readouterr()
    assert "train: 100 classes, 200 pictures (expected 126,689)" in said.out
    assert (
        "warning: train has 200 pictures, ImageNet-100 has 126,689; smallest classes: n01558993 2"
        in said.err
    )
    assert "warning: val has 100 pictures, ImageNet-100 has 5,000; not 50: n01558993 1" in said.err
    assert (
        f"(100 in all); all in {tmp_path / 'out-missing.txt'}" in said.err
        and IDS[7] not in said.err
    )
    assert (tmp_path / "out-missing.txt").read_text() == "".join(f"{name} 1\n" for name in IDS)
    for split in ("train", "val"):
        links = sorted((tmp_path / "out" / split).iterdir())
        assert [link.name for link in links] == IDS and all(
            os.path.isabs(os.readlink(link)) for link in links
        )
        assert ImageFolder(tmp_path / "out" / split).classes == IDS
        ours = open_set(tmp_path / "out", split)
        assert [os.path.relpath(p, ours.root) for p in ours.paths] == [
            os.path.relpath(p, imagenet / split)
            for p in open_tree(imagenet / split, class_list=IDS).paths
        ]
    before = {p: os.lstat(p).st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    make(imagenet, tmp_path / "out")
    assert {p: os.lstat(p).st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before


def test_no_warning_where_the_counts_are_right(imagenet, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subset, "EXPECTED", {"train": 200, "val": 100})
    (tmp_path / "out-missing.txt").write_text("of an earlier run")
    make(imagenet, tmp_path / "out")
    said = capsys.readouterr()
    assert not (tmp_path / "out-missing.txt").exists()
    assert "warning" not in said.err and "val: 100 classes, 100 pictures (expected 100)" in said.out


def test_links_follow_a_moved_imagenet_and_leave_others_alone(few, tmp_path):
    listed = ["--class_list", tmp_path / "ids.txt"]
    make(few, tmp_path / "out", *listed)
    moved = few.rename(tmp_path / "moved")
    assert not (tmp_path / "out/train" / IDS[0]).exists()
    make(moved, tmp_path / "out", *listed)
    assert os.readlink(tmp_path / "out/train" / IDS[0]) == str(moved / "train" / IDS[0])
    shutil.copytree(moved, tmp_path / "another")
    with pytest.raises(
        UsageError, match=f"{IDS[0]} is a link to .*moved.*: remove it, or choose another folder"
    ):
        make(tmp_path / "another", tmp_path / "out", *listed)


def test_a_class_that_is_already_a_folder_gets_links_to_its_pictures(few, tmp_path):
    listed, place = ["--class_list", tmp_path / "ids.txt"], tmp_path / "out/train" / IDS[0]
    place.mkdir(parents=True)
    shutil.copy(few / "train" / IDS[0] / f"{IDS[0]}_1.JPEG", place)
    make(few, tmp_path / "out", *listed)
    assert place.is_dir() and not place.is_symlink()
    assert [p.is_symlink() for p in sorted(place.iterdir())] == [True, False]
    assert contents(tmp_path / "out/train" / IDS[0]) == contents(few / "train" / IDS[0])


# --------------------------------------------------------------------------------------------- copy


def test_copy_is_whole_or_absent_and_goes_on(few, tmp_path, monkeypatch):
    (few / "train" / IDS[0] / "notes.txt").write_text("not a picture")
    listed, out, copyfile, calls = (
        ["--class_list", tmp_path / "ids.txt"],
        tmp_path / "out",
        shutil.copyfile,
        [],
    )

    def full_disk(source, target):
        calls.append(source)
        if len(calls) == 3:
            with open(source, "rb") as read, open(target, "wb") as write:
                write.write(read.read()[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), source)
        return copyfile(source, target)

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(
        UserError,
        match="cannot write to .*out: no space left on device.*the same command continues",
    ) as e:
        make(few, out, "--copy", "--workers", 1, *listed)
    assert e.value.code == 1
    source, there = contents(few), contents(out)
    assert len(there) == 2 and all(source[name] == content for name, content in there.items())
    assert not list(out.rglob(".partial"))

    calls[:] = [None] * 3
    make(few, out, "--copy", "--workers", 2, *listed)
    assert len(calls) == 3 + 6 - 2  # what was there was not copied again
    wanted = {name: content for name, content in source.items() if IDS[2] not in name}
    assert contents(out) == wanted and not any(p.is_symlink() for p in out.rglob("*"))
    assert not list(out.rglob("notes.txt"))
    make(few, out, "--copy", *listed)
    assert len(calls) == 7


def test_copy_after_links_does_not_write_into_imagenet(few, tmp_path):
    listed = ["--class_list", tmp_path / "ids.txt"]
    make(few, tmp_path / "out", *listed)
    before = {p: p.stat().st_mtime_ns for p in few.rglob("*")}
    make(few, tmp_path / "out", "--copy", *listed)
    assert {p: p.stat().st_mtime_ns for p in few.rglob("*")} == before
    assert not any(p.is_symlink() for p in (tmp_path / "out").rglob("*"))


def test_a_pipe_is_no_picture(few, flat, tmp_path):
    os.mkfifo(few / "train" / IDS[0] / "a.JPEG")
    os.mkfifo(flat[0] / "val" / "ILSVRC2012_val_00000777.JPEG")
    (tmp_path / "labels").write_text("\n".join(flat[1]))
    make(few, tmp_path / "out", "--copy", "--class_list", tmp_path / "ids.txt")
    make(flat[0], tmp_path / "out2", "--copy", "--val_labels", tmp_path / "labels")
    assert (
        len(open_set(tmp_path / "out", "train")) == 4
        and len(open_set(tmp_path / "out2", "val")) == 201
    )


def test_what_cannot_be_opened_is_listed(few, tmp_path, capsys):
    (few / "train" / IDS[0] / "gone.JPEG").symlink_to("nowhere")
    with pytest.raises(
        UserError, match="1 pictures could not be opened and were not copied"
    ) as error:
        make(few, tmp_path / "out", "--copy", "--class_list", tmp_path / "ids.txt")
    assert error.value.code == 1 and f"{IDS[0]}/gone.JPEG" in capsys.readouterr().err
    assert len(contents(tmp_path / "out")) == 6


def test_a_class_of_which_nothing_can_be_opened_is_listed_as_well(few, tmp_path, capsys):
    for picture in (few / "val" / IDS[0]).iterdir():
        picture.unlink()
        picture.symlink_to("nowhere")
    with pytest.raises(UserError, match="1 pictures could not be opened and were not copied"):
        make(few, tmp_path / "out", "--copy", "--class_list", tmp_path / "ids.txt")
    assert f"not copied: {few}/val/{IDS[0]}/" in capsys.readouterr().err


def test_a_linked_split_does_not_hide_that_the_output_lies_in_it(few, tmp_path):
    (few / "train").rename(tmp_path / "real-train")
    (few / "train").symlink_to(tmp_path / "real-train")
    with pytest.raises(UsageError, match="lies inside the input"):
        make(few, tmp_path / "real-train" / "out", "--class_list", tmp_path / "ids.txt")


def test_the_counts_of_a_pack_are_those_of_its_pictures(few, tmp_path, capsys):
    next((few / "train" / IDS[1]).iterdir()).write_bytes(b"not a picture")
    with pytest.raises(UserError, match="1 of 6 pictures could not be read"):
        make(
            few,
            tmp_path / "pack",
            "--pack",
            8,
            "--workers",
            1,
            "--class_list",
            tmp_path / "ids.txt",
        )
    assert f"train: 2 classes, 3 pictures in {tmp_path}/pack/train.npy" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--copy"]])
def test_odd_names(tmp_path, flags):
    names = [
        "with space.jpeg",
        'it\'s "quoted".jpg',
        "Übung 图.JPEG",
        "$(touch hacked);.png",
        "-rf.jpg",
    ]
    for split in ("train", "val"):
        for name in names:
            small_picture(tmp_path / "in" / split / "a class" / name)
    with open(os.fsencode(tmp_path / "in/train/a class") + b"/caf\xe9.JPEG", "wb") as file:
        file.write((tmp_path / "in/train/a class/-rf.jpg").read_bytes())
    (tmp_path / "ids.txt").write_text("a class\n")
    make(tmp_path / "in", tmp_path / "out", "--class_list", tmp_path / "ids.txt", *flags)
    there = open_set(tmp_path / "out", "train")
    assert there.classes == ["a class"]
    assert {os.path.basename(os.fsencode(p)) for p in there.paths} == {
        *map(os.fsencode, names),
        b"caf\xe9.JPEG",
    }
    assert not (tmp_path / "hacked").exists()


# --------------------------------------------------------------------------------------------- pack


def test_pack(imagenet, tmp_path, capsys):
    make(imagenet, tmp_path / "pack", "--pack", 8, "--workers", 1)
    packed, tree = (
        open_set(tmp_path / "pack", "train", dataset="packed"),
        open_tree(imagenet / "train", class_list=IDS),
    )
    assert (
        packed.classes == IDS
        and packed.targets.tolist() == tree.targets.tolist()
        and packed.size == (8, 8)
    )
    assert packed.path(150).endswith(f"({os.path.relpath(tree.path(150), tree.root)})")
    assert len(open_set(tmp_path / "pack", "val", dataset="packed", classes=IDS)) == 100
    assert "val: 100 classes, 100 pictures (expected 5,000)" in capsys.readouterr().out
    assert subset.parse_args("--imagenet_path a --imagenet100_path b --pack".split()).pack == 256


# ----------------------------------------------------------------------------------------- flat val


@pytest.mark.parametrize("form", ["ids", "kaggle", "pairs"])
@pytest.mark.parametrize("how", ["link", "copy", "pack"])
def test_flat_val(flat, tmp_path, form, how):
    (root, labels), file = flat, tmp_path / "labels"
    if form == "ids":
        file.write_text("\n".join(labels) + "\n")
    elif form == "kaggle":
        rows = [
            f"ILSVRC2012_val_{i:08d},{name} 85 1 499 272 " for i, name in enumerate(labels[:205], 1)
        ]
        file.write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]))
    else:
        file.write_text(
            "".join(f"val/ILSVRC2012_val_{i:08d}.JPEG {c}\n" for i, c in enumerate(labels[:205], 1))
        )
    flags = {"link": [], "copy": ["--copy"], "pack": ["--pack", "8", "--workers", "1"]}[how]
    make(root, tmp_path / "out", "--val_labels", file, *flags)
    val = open_set(tmp_path / "out", "val", dataset="packed" if how == "pack" else "folder")
    assert val.classes == IDS and len(val) == sum(name in IDS for name in labels[:205])
    for row in range(len(val)):
        number = int(val.path(row).rstrip(")").split("_")[-1].split(".")[0])
        assert labels[number - 1] == IDS[val.targets[row]]
        assert how == "pack" or os.path.islink(val.path(row)) == (how == "link")


def test_labels_are_found_beside_the_kaggle_archive(flat, tmp_path, capsys):
    root, labels = flat
    (tmp_path / "kaggle/ILSVRC/Data").mkdir(parents=True)
    root.rename(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC")
    rows = "".join(
        f"ILSVRC2012_val_{i:08d},{name} 1 1 2 2\n" for i, name in enumerate(labels[:205], 1)
    )
    (tmp_path / "kaggle/LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    make(tmp_path / "kaggle", tmp_path / "out")
    assert "kaggle/LOC_val_solution.csv" in capsys.readouterr().out
    assert open_set(tmp_path / "out", "val").classes == IDS


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "is flat, so its labels are needed: --val_labels FILE"),
        ("490\n361\n171\n", "development kit's numbers.*meta.mat"),
        ("n01440764\n" * 49_999, "49999 lines, but the list has 50000"),
        ("one\ntwo\nthree\n", "neither a WordNet id per line"),
        (
            "ILSVRC2012_val_00000001.JPEG 65\nILSVRC2012_val_00000002.JPEG 970\n",
            "neither a WordNet id per line",
        ),
        (
            "ILSVRC2012_val_00000001 n01440764\n",
            "no label for 204 pictures.*first ILSVRC2012_val_00000002",
        ),
        ("\xff\xfe", "not a text file"),
        ("n01440764\n" * 50_000, "no picture of 100 of the 100 classes"),
    ],
)
def test_labels_that_do_not_fit(flat, tmp_path, text, message):
    flags = []
    if text is not None:
        (tmp_path / "labels").write_bytes(text.encode("latin-1"))
        flags = ["--val_labels", tmp_path / "labels"]
    with pytest.raises(UserError, match=message) as error:
        make(flat[0], tmp_path / "out", *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--val_labels .*none: No such file"):
        make(flat[0], tmp_path / "out", "--val_labels", tmp_path / "none")


# ---------------------------------------------------------------------------------------- bad input


def test_missing_classes_are_all_listed_and_nothing_is_made(few, tmp_path, capsys):
    shutil.rmtree(few / "val" / IDS[1])
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: make(few, tmp_path / "out"))
    said = capsys.readouterr().err
    assert (
        ended.value.code == 1
        and said.startswith("error: missing class folders: ")
        and said.count("\n") == 1
    )
    assert "train lacks 97 of the 100: " + ", ".join(IDS[3:8]) + ", ... (97 in all); " in said
    assert (
        "val lacks 98 of the 100: " + ", ".join([IDS[1], *IDS[3:7]]) + ", ... (98 in all); all in "
        in said
    )
    listed = [
        os.path.relpath(line, few)
        for line in (tmp_path / "out-missing.txt").read_text().splitlines()
    ]
    assert listed == [*(f"train/{i}" for i in IDS[3:]), *(f"val/{i}" for i in (IDS[1], *IDS[3:]))]
    assert said.rstrip().endswith("out-missing.txt") and not (tmp_path / "out").exists()
    with pytest.raises(UserError) as error:
        make(few, tmp_path / "nowhere" / "out")
    assert ", ".join(IDS[3:]) in str(error.value)  # there is no file to write them to


def test_a_list_with_an_unknown_id(few, tmp_path):
    (tmp_path / "ids.txt").write_text(f"{IDS[0]} robin\nn99999999\nrobin\n")
    with pytest.raises(
        UsageError,
        match="--class_list .*ids.txt names.*train lacks 2 of the 3: n99999999, robin; .*val",
    ) as e:
        make(few, tmp_path / "out", "--class_list", tmp_path / "ids.txt")
    assert e.value.code == 2 and not (tmp_path / "out").exists()
    (tmp_path / "ids.txt").write_text("\n# nothing\n")
    with pytest.raises(UsageError, match="names no class"):
        make(few, tmp_path / "out", "--class_list", tmp_path / "ids.txt")
    with pytest.raises(UsageError, match="none.txt: No such file"):
        make(few, tmp_path / "out", "--class_list", tmp_path / "none.txt")


def test_places_that_cannot_be_written_to(few, tmp_path):
    listed = ["--class_list", tmp_path / "ids.txt"]
    before = sorted(few.rglob("*"))
    (tmp_path / "alias").symlink_to(few)
    for out in (
        few,
        few / "out",
        few / "train",
        tmp_path / "alias" / "out",
        few / ".." / "few" / "x",
    ):
        with pytest.raises(UsageError, match="lies inside the input"):
            make(few, out, *listed)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train").symlink_to(few / "train")
    with pytest.raises(UsageError, match="out/train lies inside the input"):
        make(few, tmp_path / "out", "--copy", *listed)
    (tmp_path / "out/train").unlink()
    (tmp_path / "out/train/disc").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"out/train holds 1 other class folders \(disc\)"):
        make(few, tmp_path / "out", *listed)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError) as error:
        make(few, tmp_path / "file", *listed)
    assert launch.in_one_line(error.value) == (f"{tmp_path / 'file'}: file exists", 1)
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        make(tmp_path / "nowhere", tmp_path / "out2", *listed)
    with pytest.raises(UsageError, match="--force needs --pack"):
        make(few, tmp_path / "out2", "--force")
    assert sorted(few.rglob("*")) == before


def test_it_runs_from_anywhere_under_either_spelling(few, tmp_path):
    done = run_script(
        "preprocess/imagenet100_subset.py",
        "--imagenet_path",
        "few",
        "--imagenet100-path",
        "out",
        "--class-list",
        "ids.txt",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len(contents(tmp_path / "out")) == 0 and len(open_set(tmp_path / "out", "train")) == 4
    listing = subprocess.run(
        ["ls", "-L", tmp_path / "out/train" / IDS[0]], capture_output=True, text=True
    )
    assert listing.stdout.split() == [f"{IDS[0]}_{i}.JPEG" for i in range(2)]
