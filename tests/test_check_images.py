"""preprocess/check_images.py: what it finds in one picture, in a tree, and with which exit code."""

import json
import os
import re
import shutil
import struct
from unittest import mock

import numpy as np
import pytest
import tifffile
from conftest import run_script
from PIL import Image

from common import UsageError, UserError, crops, sets
from preprocess import check_images, check_picture, imagenet100_lists, workers

SCRIPT = "preprocess/check_images.py"


def photo(seed=0, size=(60, 48), mode="RGB"):
    """Smooth colours: a picture whose JPEG is long enough to cut."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).convert(mode)


def save(path, seed=0, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or photo(seed)).save(path, **options)
    return path


@pytest.fixture
def tree(tmp_path):
    """A sound root: 2 classes x 3 train pictures, 2 classes x 2 val pictures, all different."""
    for split, offset, n in (("train", 0, 3), ("val", 100, 2)):
        for c, name in enumerate(("bird", "fish")):
            for i in range(n):
                save(tmp_path / "set" / split / name / f"{name}_{i}.JPEG", seed=offset + 10 * c + i)
    return tmp_path / "set"


def check(tree, capsys, *flags):
    """Exit code, the table, and the JSON file's content."""
    file = tree.parent / "report.json"
    code = 0
    try:
        check_images.main([str(tree), "--json", str(file), "--workers", "1", *flags])
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().out, json.loads(file.read_text())


def answer(report, kind):
    return sorted((f["split"], f["path"]) for f in report["findings"] if f["kind"] == kind)


def kinds(path, **options):
    return {kind for kind, _ in check_picture.examine(str(path), **options).findings}


# -------------------------------------------------------------------------------------- one picture


def test_a_sound_picture_has_no_finding(tmp_path):
    for name, options in (
        ("a.JPEG", {}),
        ("b.png", {}),
        ("c.webp", {}),
        ("d.bmp", {}),
        ("e.ppm", {}),
        ("f.tif", {}),
    ):
        path = save(tmp_path / name, **options)
        seen = check_picture.examine(str(path))
        assert seen.findings == [] and (seen.width, seen.height) == (60, 48), name
        assert seen.bytes == path.stat().st_size and len(seen.digest) == 16


@pytest.mark.parametrize(
    ("mode", "name", "kind"),
    [
        ("L", "a.jpg", "grey"),
        ("CMYK", "a.jpg", "CMYK"),
        ("P", "a.png", "palette"),
        ("RGBA", "a.png", "alpha"),
        ("LA", "a.png", "alpha"),
        ("1", "a.png", "grey"),
        ("I;16", "a.png", "16-bit"),
    ],
)
def test_colour_modes_are_notes(tmp_path, mode, name, kind):
    if mode == "I;16":
        image = Image.fromarray((16 * np.arange(64 * 64)).astype(np.uint16).reshape(64, 64))
    else:
        image = photo(mode="RGBA").convert("LA") if mode == "LA" else photo(mode=mode)
    assert kinds(save(tmp_path / name, image=image)) == {kind}
    assert check_images.KINDS[kind][0] == check_images.NOTE


def test_16_bit_colour_png_is_told_though_pillow_opens_it_as_rgb(tmp_path):
    import zlib

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    rows = b"".join(b"\0" + os.urandom(40 * 6) for _ in range(40))
    (tmp_path / "deep.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    assert kinds(tmp_path / "deep.png") == {"16-bit"}


def test_values_of_deep_pictures_are_told(tmp_path):
    for name, top, read, kinds_found in (
        ("full.png", 65535, 255, {"16-bit"}),
        ("of12.png", 4095, 15, {"16-bit", "dark"}),
        ("of8.png", 255, 0, {"16-bit", "dark"}),
    ):
        values = np.linspace(9, top, 4096).astype(np.uint16).reshape(64, 64)
        path = save(tmp_path / name, image=Image.fromarray(values))
        findings = dict(check_picture.examine(str(path)).findings)
        assert set(findings) == kinds_found
        assert findings["16-bit"] == f"PNG I;16, read as 0 to {read} of 255"
    assert kinds(save(tmp_path / "float.tif", image=photo(mode="F"))) == {"float"}


def test_16_bit_colour_tiff_is_told_and_libtiff_is_silent(tmp_path, capfd):
    values = np.full((40, 40, 3), 255, dtype=np.uint16)
    tifffile.imwrite(tmp_path / "deep.tif", values, photometric="rgb", compression="zlib")
    assert kinds(tmp_path / "deep.tif") == {"16-bit", "dark"}
    whole = (tmp_path / "deep.tif").read_bytes()
    (tmp_path / "deep.tif").write_bytes(whole[:8] + bytes(9) + whole[17:])  # in the pixels
    assert kinds(tmp_path / "deep.tif") == {"truncated"}
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("shape", [(40, 40, 13), (40, 40)])
def test_a_kind_that_pillow_does_not_read_is_named(tmp_path, shape):
    path = tmp_path / "train" / "a" / "bands.tif"
    path.parent.mkdir(parents=True)
    tifffile.imwrite(path, np.zeros(shape, dtype=np.float64))
    ((kind, detail),) = check_picture.examine(str(path)).findings
    assert kind == "truncated" and "of a kind that Pillow does not read" in detail
    opened = sets.open_set(tmp_path, "train")
    with pytest.raises(sets.BadPicture, match="of a kind that Pillow does not read"):
        opened.open(0)


def test_a_picture_too_large_is_told(tmp_path, monkeypatch):
    path = str(save(tmp_path / "a.png"))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        ((kind, detail),) = check_picture.examine(path).findings
        assert kind == "too large" and "2880 pixels" in detail

    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ):
        monkeypatch.setattr(check_picture, "_decode", mock.Mock(side_effect=error))
        assert (
            kinds(path) == {"too large"}
            and check_images.KINDS["too large"][0] == check_images.ERROR
        )


def test_extension_rotation_frames_size(tmp_path):
    png = save(tmp_path / "really.png")
    os.replace(png, tmp_path / "named.JPEG")  # ImageNet has one of these
    assert check_picture.examine(str(tmp_path / "named.JPEG")).findings == [
        ("wrong extension", "PNG data")
    ]
    exif = Image.Exif()
    exif[0x0112] = 6
    assert kinds(save(tmp_path / "turned.jpg", exif=exif)) == {"EXIF rotation"}
    exif[0x0112] = 1
    assert kinds(save(tmp_path / "upright.jpg", exif=exif)) == set()
    frames = [photo(i) for i in range(3)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    assert kinds(tmp_path / "moving.webp") == {"animated"}
    small = save(tmp_path / "small.png", image=photo(size=(40, 31)))
    assert kinds(small) == {"tiny"} and kinds(small, min_side=31) == set()


def test_damaged_files_are_told_as_what_they_are(tmp_path, capfd):
    whole = save(tmp_path / "whole.jpg", image=photo(size=(300, 200))).read_bytes()
    png = save(tmp_path / "whole.png", image=photo(size=(300, 200))).read_bytes()
    cases = {
        "empty.jpg": (b"", ("unreadable", "empty file")),
        "text.jpg": (b"not a picture at all", ("unreadable", "not a picture")),
        "html.png": (b"<html>403 Forbidden</html>", ("unreadable", "not a picture")),
        "half.jpg": (
            whole[: len(whole) // 2],
            ("truncated", f"JPEG ends early, after {len(whole) // 2} bytes"),
        ),
        "almost.jpg": (whole[:-2], ("truncated", f"JPEG ends early, after {len(whole) - 2} bytes")),
        "half.png": (png[: len(png) // 2], ("truncated", None)),
        "start.jpg": (whole[:100], ("truncated", f"{check_picture.UNKNOWN_KIND}; 100 bytes")),
        "start.png": (png[:20], ("truncated", f"{check_picture.UNKNOWN_KIND}; 20 bytes")),
    }
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_bytes(content)
        ((kind, detail),) = check_picture.examine(str(tmp_path / name)).findings
        assert kind == expected[0] and detail == (expected[1] or detail), name
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert check_picture.examine(str(tmp_path / "broken.jpg")).findings == [
        ("unreadable", "broken link")
    ]
    assert check_picture.examine(str(tmp_path)).findings == [("unreadable", "is a directory")]
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(crops.decode_jpeg is None, reason="this torchvision has no JPEG decoder")
def test_damage_inside_a_jpeg_is_seen_though_it_decodes(tmp_path, capfd):
    whole = save(tmp_path / "whole.jpg", image=photo(size=(300, 200)), quality=95).read_bytes()
    hurt = whole[: len(whole) // 2] + whole[len(whole) // 2 + 500 :]
    for name in ("hurt.jpg", "again.jpg"):
        (tmp_path / name).write_bytes(hurt)
        ((kind, detail),) = check_picture.examine(str(tmp_path / name)).findings
        assert kind == "damaged" and detail.count("JPEG") == 1
        assert kinds(tmp_path / "whole.jpg") == set()  # nothing is left over from the one before
    assert capfd.readouterr().err == ""  # libjpeg's words went into the finding


def test_what_it_passes_the_loader_reads_and_what_it_refuses_the_loader_refuses(tmp_path):
    whole = save(tmp_path / "a" / "0.jpg", image=photo(size=(300, 200))).read_bytes()
    png = save(tmp_path / "a" / "1.png").read_bytes()
    contents = [
        whole,
        png,
        b"",
        b"x",
        whole[:-2],
        whole[:200],
        png[:-20],
        png[: len(png) // 2],
        whole + b"tail",
    ]
    for mode, name in (("CMYK", "9.jpg"), ("L", "10.jpg"), ("P", "11.png"), ("RGBA", "12.png")):
        contents.append(save(tmp_path / "a" / name, image=photo(mode=mode)).read_bytes())
    for i, content in enumerate(contents):
        (tmp_path / "a" / f"{i}.jpg").write_bytes(content)
    opened = sets.open_tree(tmp_path)
    verdicts = []
    for row in range(len(opened)):
        try:
            assert crops.decoded(opened, row, opened.open(row)).shape[0] == 3
            readable = True
        except UserError:
            readable = False
        errors = [
            k for k in kinds(opened.path(row)) if check_images.KINDS[k][0] == check_images.ERROR
        ]
        assert readable == (not errors), opened.path(row)
        verdicts.append(readable)
    assert True in verdicts and verdicts.count(False) >= 5


# ----------------------------------------------------------------------------------------- the tree


def test_a_sound_tree_passes(tree, capsys):
    code, out, report = check(tree, capsys)
    assert code == 0 and "result: nothing breaks training; 10 pictures opened" in out
    assert report["imagenet100"] is None and "ImageNet-100" not in out
    assert (
        report["errors"] == 0
        and report["findings"] == []
        and report["checked"] == report["pictures"] == 10
    )
    train = report["splits"]["train"]
    assert train["per_class"] == {"bird": 3, "fish": 3} and train["per_class_min_median_max"] == [
        3,
        3,
        3,
    ]
    assert train["width_min_median_max"] == [60, 60, 60] and train["height_min_median_max"] == [
        48,
        48,
        48,
    ]
    size = sum(p.stat().st_size for p in (tree / "train").rglob("*.JPEG"))
    assert train["bytes"] == size


def test_everything_that_breaks_training_is_found_and_exits_with_1(tree, capsys):
    (tree / "train" / "bird" / "bird_0.JPEG").write_bytes(b"")
    whole = (tree / "val" / "fish" / "fish_0.JPEG").read_bytes()
    (tree / "val" / "fish" / "fish_0.JPEG").write_bytes(whole[: len(whole) // 2])
    (tree / "train" / ".ipynb_checkpoints").mkdir()
    save(tree / "val" / "cat" / "cat_0.png", seed=300)
    code, out, report = check(tree, capsys)
    assert code == 1 and "result: 5 things break training" in out and report["errors"] == 5
    assert answer(report, "unreadable") == [("train", "bird/bird_0.JPEG")]
    assert answer(report, "truncated") == [("val", "fish/fish_0.JPEG")]
    assert answer(report, "empty class") == [("train", ".ipynb_checkpoints")]
    assert answer(report, "class mismatch") == [("train", "cat"), ("val", ".ipynb_checkpoints")]
    assert (
        "train/bird/bird_0.JPEG: empty file" in out and "not in train/, 1 pictures in val/" in out
    )


@pytest.mark.parametrize("breakage", ["unreadable", "empty class", "class mismatch"])
def test_each_alone_is_enough_for_exit_code_1(tree, capsys, breakage):
    if breakage == "unreadable":
        (tree / "val" / "bird" / "x.png").write_bytes(b"?")
    else:
        for split in ("train", "val")[: 2 if breakage == "empty class" else 1]:
            (tree / split / "cat").mkdir()
        if breakage == "class mismatch":
            save(tree / "train" / "cat" / "cat.png", seed=300)
    code, _, report = check(tree, capsys)
    assert code == 1 and set(report["counts"]) - {"few"} == {breakage}


def test_leaks_and_duplicates_are_told_apart_and_do_not_change_the_exit_code(tree, capsys):
    def copy(source, target):
        (tree / target).write_bytes((tree / source).read_bytes())

    copy("train/bird/bird_0.JPEG", "val/bird/from_train.JPEG")
    copy("train/fish/fish_1.JPEG", "train/fish/twice.JPEG")
    copy("val/bird/bird_1.JPEG", "val/fish/other_label.JPEG")
    code, out, report = check(tree, capsys)
    assert code == 0
    assert answer(report, "leak") == [("val", "bird/from_train.JPEG")] and "LEAK" in out
    assert answer(report, "duplicate") == [("train", "fish/twice.JPEG")]
    assert answer(report, "two classes") == [("val", "fish/other_label.JPEG")]
    assert report["same_content"] == [
        ["train/bird/bird_0.JPEG", "val/bird/from_train.JPEG"],
        ["train/fish/fish_1.JPEG", "train/fish/twice.JPEG"],
        ["val/bird/bird_1.JPEG", "val/fish/other_label.JPEG"],
    ]


def test_counts_strays_and_nesting(tree, capsys):
    for i in range(7):
        save(tree / "train" / "cat" / f"cat_{i}.png", seed=400 + i)
        save(tree / "train" / "bird" / "more" / f"{i}.png", seed=500 + i)
        save(tree / "train" / "dog" / f"dog_{i}.png", seed=600 + i)
        save(tree / "train" / "fox" / f"fox_{i}.png", seed=700 + i)
        save(tree / "train" / "many" / f"{2 * i}.png", seed=800 + i)
        save(tree / "train" / "many" / f"{2 * i + 1}.png", seed=900 + i)
    save(tree / "train" / "many" / "last.png", seed=1000)
    for i, name in enumerate(("cat", "dog", "fox", "many")):
        save(tree / "val" / name / "v.png", seed=1100 + i)
        save(tree / "val" / name / "w.png", seed=1200 + i)
    (tree / "train" / "bird" / "list.txt").write_text("x")
    (tree / "train" / "bird" / "anim.gif").write_text("x")
    save(tree / "train" / "stray.png", seed=1300)
    save(tree / "train" / "fish" / "fish_0.png", seed=1301)
    _, out, report = check(tree, capsys)
    assert answer(report, "few") == []  # 3 fish and one more: 4 of a median of 7
    assert answer(report, "many") == [("train", "many")]  # 15 > 2 x 7
    assert answer(report, "not read") == [("train", "bird/anim.gif"), ("train", "bird/list.txt")]
    assert answer(report, "outside") == [("train", "stray.png")]
    assert answer(report, "nested") == [("train", "bird")]
    assert answer(report, "same name") == [
        ("train", "fish/fish_0.JPEG"),
        ("train", "fish/fish_0.png"),
    ]
    assert (
        report["splits"]["train"]["per_class"]["bird"] == 10
    )  # nested ones count, as for the loader
    (tree / "train" / "fish" / "fish_0.png").unlink()
    assert answer(check(tree, capsys)[2], "few") == [("train", "fish")]  # 3 of a median of 7


def test_one_split_a_single_folder_and_a_class_called_train(tree, tmp_path, capsys):
    code, _, report = check(tree / "val", capsys)
    assert code == 0 and list(report["splits"]) == ["val"] and report["checked"] == 4
    save(tmp_path / "vehicles" / "train" / "t.png", seed=1)  # a class, as it has no folders in it
    save(tmp_path / "vehicles" / "car" / "c.png", seed=2)
    code, _, report = check(tmp_path / "vehicles", capsys)
    assert code == 0 and report["splits"]["vehicles"]["per_class"] == {"car": 1, "train": 1}
    (tree / "val").rename(tree / "test")
    assert check(tree, capsys)[2]["splits"]["val"]["folder"].endswith("test")


def test_pipes_and_links_in_circles_are_told_and_not_opened(tree, capsys):
    bird = tree / "train" / "bird"
    os.mkfifo(bird / "pipe.png")
    (bird / "up").symlink_to("..")
    (tree / "train" / "all").symlink_to(tree)
    (tree / "train" / "fish" / "twin").symlink_to(tree / "val" / "fish")  # a folder elsewhere
    code, out, report = check(tree, capsys)
    assert code == 0 and answer(report, "not a file") == [
        ("train", p) for p in ("all", "bird/pipe.png", "bird/up")
    ]
    assert report["splits"]["train"]["per_class"] == {"bird": 3, "fish": 5}
    assert "link to a folder it lies in, ignored" in out


def test_pictures_without_classes_are_checked_for_pre_training(tree, tmp_path, capsys):
    root = tmp_path / "photos"
    for folder in (root, root / "train"):
        good, bad = save(folder / "a.png", seed=1), save(folder / "b.png", seed=2)
        bad.write_bytes(b"x")
        code, out, report = check(root, capsys)
        assert code == 1 and [f["kind"] for f in report["findings"]] == ["unlabelled", "unreadable"]
        assert [split["classes"] for split in report["splits"].values()] == [0] and report[
            "checked"
        ] == 2
        assert "no class folders: for pre-training only" in out
        bad.unlink()
        assert check(root, capsys)[0] == 0
        good.unlink()
    save(root / "train" / "a.png", seed=1)
    (root / "val").symlink_to(tree / "val")
    code, _, report = check(root, capsys)  # labels in val/ are no reason not to train without them
    assert code == 0 and answer(report, "unlabelled") == [("train", "train")]
    assert report["splits"]["val"]["classes"] > 0


def test_a_flat_val_is_reported_although_test_has_class_folders(tree, capsys):
    (tree / "val").rename(tree / "test")
    save(tree / "val" / "a.png", seed=1)  # the loader prefers val/
    code, _, report = check(tree, capsys)
    assert code == 1 and answer(report, "no classes") == [("val", "val")]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_class_folders_is_reported(tree, capsys, split):
    for folder in list((tree / split).iterdir()):
        shutil.rmtree(folder)
    code, out, report = check(tree, capsys)
    assert code == 1 and answer(report, "no classes") == [(split, split)] and "it is empty" in out
    assert not answer(report, "class mismatch")
    save(tree / split / "ILSVRC2012_val_00000001.JPEG", seed=1)
    code, out, report = check(tree, capsys)
    if split == "train":
        assert code == 0 and "no class folders: for pre-training only" in out
    else:
        assert code == 1 and "1 pictures lie in it directly" in out


def test_class_list_and_limit(tree, tmp_path, capsys):
    (tree / "train" / "a b").mkdir()
    save(tree / "train" / "a b" / "x.png", seed=77)
    (tmp_path / "spaces.txt").write_text("a b\n")
    code, _, report = check(tree / "train", capsys, "--class-list", str(tmp_path / "spaces.txt"))
    assert report["splits"]["train"]["per_class"] == {"a b": 1}
    shutil.rmtree(tree / "train" / "a b")
    (tree / "train" / "empty").mkdir()
    (tmp_path / "list.txt").write_text("bird a songbird\n")
    code, _, report = check(tree, capsys, "--class-list", str(tmp_path / "list.txt"))
    assert (
        code == 0
        and report["splits"]["train"]["per_class"] == {"bird": 3}
        and report["checked"] == 5
    )
    code, out, report = check(tree, capsys, "--limit", "4")
    assert (
        code == 1
        and report["checked"] == 4
        and report["pictures"] == 10
        and "4 of 10 pictures" in out
    )


def test_processes_find_the_same_and_names_of_all_kinds_are_told(tree, tmp_path, capsys):
    odd = [
        "a b.JPEG",
        'it\'s "quoted".JPEG',
        "überaus.JPEG",
        "new\nline.JPEG",
        os.fsdecode(b"not-utf8-\xff.JPEG"),
    ]
    for i, name in enumerate(odd):
        try:
            save(tree / "train" / "bird" / name, seed=700 + i)
        except OSError:  # some file systems take UTF-8 only
            continue
        (tree / "val" / "bird" / name).write_bytes(b"")
    _, _, alone = check(tree, capsys)
    code, out, report = check(tree, capsys, "--workers", "2", "--examples", "20")
    assert code == 1 and "val/bird/überaus.JPEG: empty file" in out and "new\\nline" in out
    assert sorted(map(str, report["findings"])) == sorted(map(str, alone["findings"]))
    assert report["splits"] == alone["splits"] and report["counts"]["unreadable"] >= 4


def test_which_imagenet100(tmp_path, capsys):
    lists = imagenet100_lists.imagenet100_lists()
    assert (
        list(lists)[0] == "CMC"
        and len(lists) == 8
        and {len(ids) for ids in lists.values()} == {100}
    )
    assert len(set(lists.values())) == 8  # no two are the same list
    assert len(lists["PODNet"] & lists["Kaggle"]) == 69 and not lists["PODNet"] & lists["iCaRL"]

    said = imagenet100_lists.compare_with_lists
    for name, ids in lists.items():
        answer = said(ids)
        assert (
            answer["list"] == name
            and answer["compared_with"] == "CMC"
            and answer["in_both"] == len(ids & lists["CMC"])
        )
    assert "the list of CMC (also of solo-learn" in imagenet100_lists.in_words(said(lists["CMC"]))
    line = imagenet100_lists.in_words(said(lists["Kaggle"]))
    assert re.fullmatch(
        r"ImageNet-100: the list of Kaggle; compared with that of CMC: 8 classes are in both; "
        r"extra n01440764, n01443537, n01484850, ... \(92 in all\); "
        r"missing n\d{8}, n\d{8}, n\d{8}, ... \(92 in all\)",
        line,
    )
    first, *rest = sorted(lists["SCAN"])
    answer = said({"n00000001", *rest})
    assert answer["list"] is None and (answer["extra"], answer["missing"]) == (
        ["n00000001"],
        [first],
    )
    assert (
        "not a known list, and SCAN's is the nearest; "
        "compared with that of SCAN: 99 classes are in both" in imagenet100_lists.in_words(answer)
    )
    answer = said({"n00000001", "n00000002", first})
    assert (answer["list"], answer["compared_with"], len(answer["missing"])) == (
        None,
        "CMC",
        100 - answer["in_both"],
    )
    for nothing in ({first}, {first, "dog"}, [f"n{i:08d}" for i in range(1000)], {""}):
        assert said(nothing) is None

    for name in sorted(lists["CMC"])[:2]:
        save(tmp_path / "set" / name / "a.png", seed=int(name[1:]))
    (tmp_path / "set" / "n00000003").mkdir()  # a folder without pictures is no class
    _, out, report = check(tmp_path / "set", capsys)
    message = "not a known list; compared with that of CMC: 2 classes are in both; missing n"
    assert f"ImageNet-100: {message}" in out
    assert report["imagenet100"]["in_both"] == 2 and len(report["imagenet100"]["missing"]) == 98


def test_rate_in_plain_lines(capsys, monkeypatch):
    bar = workers.Rate("checking", 100, "pictures")
    monkeypatch.setattr(workers.time, "monotonic", lambda: bar.started + 2)
    bar.add(50)
    assert "checking: 50/100 pictures, 25/s, 0:0" in capsys.readouterr().err


# --------------------------------------------------------------------------------- the command line


def test_bad_input_is_one_line(tree, tmp_path):
    (tmp_path / "list.txt").write_text("bird\nn00000000\n")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("")
    cases = [
        ([], "no TREE to check"),
        (["absent"], "absent: no such folder"),
        (["file"], "file: is a file, not a folder"),
        (["nothing"], "nothing: no class folders in it"),
        ([tree, "--class-list", "list.txt"], "no such class folder in"),
        ([tree, "--json", "nowhere/report.json"], "--json nowhere/report.json: no such folder"),
        ([tree, "--limit", "0"], "0 is not a whole number above 0"),
    ]
    for flags, message in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            with pytest.raises((UserError, SystemExit)) as stopped:
                check_images.main([*map(str, flags), *(["-j", "1"] if flags else [])])
        if isinstance(stopped.value, UserError):
            assert message in str(stopped.value) and "\n" not in str(stopped.value)
        assert stopped.value.code == 2, flags


def test_as_a_program_from_elsewhere(tree, tmp_path):
    (tree / "train" / "bird" / "bird_0.JPEG").write_bytes(b"")
    done = run_script(SCRIPT, "set", "--min_side", "50", cwd=tmp_path)
    assert done.returncode == 1 and "rror" not in done.stderr
    assert (
        "1 thing breaks training" in done.stdout and "a side shorter than --min-side" in done.stdout
    )


def test_demo(workspace, capsys):
    check_images.main(["--demo", "-j", "1"])
    assert "nothing breaks training; 200 pictures" in capsys.readouterr().out


def test_a_class_list_without_classes_is_refused(tree, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("# none yet\n")
    with pytest.raises(UsageError, match="list.txt: the file names no class"):
        check(tree, capsys, "--class-list", str(tmp_path / "list.txt"))
