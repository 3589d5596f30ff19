"""preprocess/make_corruptions.py: its tree, the same bytes from reruns and shards, bad input."""

import errno
import functools
import json
import math
import os
import time

import numpy as np
import pytest
from conftest import run_script
from PIL import Image

from common import UsageError, UserError
from preprocess import corruption_tree, corruptions, make_corruptions, workers
from tools import robustness, robustness_sets

package = pytest.importorskip("corrupt_tta.corruptions")

SCRIPT = "preprocess/make_corruptions.py"
FEW = ["--corruptions", "gaussian_noise", "impulse_noise", "contrast", "--severities", "1", "5"]


def photo(seed=0, size=(40, 32), mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC).convert(mode)


def save(path, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    photo(seed, **options).save(path)
    return path


def files(folder):
    """{path: content} of the pictures below a folder."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.suffix in (".png", ".JPEG", ".jpg")
    }


def make(tree, out, *flags, size=0, format="png"):
    make_corruptions.main(
        [str(tree), str(out), "--workers", "1", "--size", str(size), "--format", format, *flags]
    )


@pytest.fixture
def tree(tmp_path):
    for i in range(3):
        save(tmp_path / "set" / "val" / "bird" / f"b{i}.JPEG", seed=i)
    save(tmp_path / "set" / "val" / "fish" / "f.png", seed=9)
    save(tmp_path / "set" / "train" / "bird" / "t.png", seed=10)
    return tmp_path / "set"


def test_layout_is_what_the_evaluation_reads(tree, tmp_path, capsys):
    out = tmp_path / "C"
    make(tree, out, "--limit", "1", "--severities", "2", size=32)
    names = sorted(p.name for p in out.iterdir())
    assert names == sorted([*robustness.CORRUPTIONS, "corruptions.json"])
    assert set(files(out)) == {
        f"{c}/2/{p}" for c in corruptions.CORRUPTIONS for p in ("bird/b0.png", "fish/f.png")
    }
    for path in out.rglob("*.png"):
        with Image.open(path) as picture:
            assert (picture.size, picture.mode, picture.format) == ((32, 32), "RGB", "PNG")
    settings = json.loads((out / "corruptions.json").read_text())["settings"]
    assert settings == {"format": make_corruptions.FORMAT, "seed": 0, "size": 32, "files": "png"}

    class Args:
        corruption, extra_corruptions = out, False

    opened, answer, group = robustness_sets.open_corruptions(Args, ["bird", "fish"])
    assert len(opened) == 30 and len(answer) == 15 and group.bincount().tolist() == [2] * 15
    assert "result: 30 of 30 files" in capsys.readouterr().out


def test_pictures_are_corrupted_as_the_package_does_it(tree, tmp_path):
    out = tmp_path / "C"
    make(
        tree, out, "--corruptions", "contrast", "pixelate", "--severities", "4"
    )  # no draw of chance in these
    for name in ("contrast", "pixelate"):
        source = np.asarray(Image.open(tree / "val" / "fish" / "f.png"))
        expected = np.clip(
            np.rint(np.asarray(getattr(package, name)(source, 4), dtype=float)), 0, 255
        )
        assert np.array_equal(np.asarray(Image.open(out / name / "4" / "fish" / "f.png")), expected)


def test_default_geometry_and_jpeg_quality_are_imagenet_cs(tmp_path):
    save(tmp_path / "val" / "a" / "wide.jpg", size=(640, 400))
    make(
        tmp_path / "val",
        tmp_path / "C",
        "--corruptions",
        "brightness",
        "--severities",
        "1",
        size=224,
        format="jpeg",
    )
    with Image.open(tmp_path / "C" / "brightness" / "1" / "a" / "wide.jpg") as output:
        assert output.size == (224, 224) and output.format == "JPEG"
        again = tmp_path / "reference.jpg"
        photo().save(again, quality=85)
        with Image.open(again) as reference:
            assert output.quantization == reference.quantization
    # shorter side 400 -> 256, then the centre: torchvision's Resize(256), CenterCrop(224)
    from torchvision import transforms

    with Image.open(tmp_path / "val" / "a" / "wide.jpg") as source:
        expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(
            source.convert("RGB")
        )
    assert np.array_equal(
        make_corruptions.read_picture(tmp_path / "val" / "a" / "wide.jpg", 224),
        np.asarray(expected),
    )


def slow_streak(pixels, radius, sigma, angle):
    """Blur (H, W) or (H, W, C) pixel by pixel as ImageMagick does, without rounding."""
    length = 2 * math.ceil(radius) + 1
    weights = [
        math.exp(-i * i / (2 * sigma * sigma)) / (math.sqrt(2 * math.pi) * sigma)
        for i in range(length)
    ]
    across, along = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    steps = [(math.ceil(i * along - 0.5), math.ceil(i * across - 0.5)) for i in range(length)]
    (height, width), blurred = pixels.shape[:2], np.zeros(pixels.shape)
    for y in range(height):
        for x in range(width):
            for weight, (dy, dx) in zip(weights, steps):
                there = (
                    min(max(y + dy, 0), height - 1),
                    min(max(x + dx, 0), width - 1),
                )  # the edge goes on
                blurred[y, x] += weight / sum(weights) * pixels[there]
    return blurred


@pytest.mark.parametrize(
    ("severity", "expected"), [(1, 1.9), (2, 3.1), (3, 4.9), (4, 6.9), (5, 8.7)]
)
def test_motion_blur_has_imagemagicks_strength(severity, expected):
    radius, sigma = corruptions.MOTION[severity - 1]
    weights = corruptions.motion_kernel(radius, sigma)
    i = np.arange(2 * radius + 1)
    formula = np.exp(-(i**2) / (2 * sigma**2)) / (np.sqrt(2 * np.pi) * sigma)
    assert np.allclose(weights, formula / formula.sum())

    def deviation(weights, places):
        mean = (weights * places).sum() / weights.sum()
        return math.sqrt((weights * (places - mean) ** 2).sum() / weights.sum())

    assert deviation(weights, i) == pytest.approx(expected, abs=0.06)
    dot = np.zeros(
        (101, 101, 3), np.uint8
    )  # and so has what becomes of one point, from end to end of all three channels
    dot[50, 50] = 255
    for angle in (0, 45, -31):
        output = corruptions.streak(dot, radius, sigma, angle)[..., 1]
        y, x = np.mgrid[:101, :101]
        along = x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle))
        assert deviation(output, along) == pytest.approx(
            expected, rel=0.07
        )  # the tail is cut where it rounds to 0
        assert output.sum() == pytest.approx(255, abs=10)


@pytest.mark.parametrize("angle", [0, 17, 45, -45, -90, -133.3])
def test_streaks_are_those_of_a_slow_loop(angle):
    for pixels in (
        np.asarray(photo(3, size=(23, 17))),
        np.asarray(photo(4, size=(12, 30), mode="L")),
    ):
        output = corruptions.streak(pixels, 10, 4, angle)
        assert (
            output.shape == pixels.shape
            and np.abs(output - slow_streak(pixels, 10, 4, angle)).max() <= 0.5 + 1e-6
        )


@pytest.mark.parametrize("name", ["motion_blur", "zoom_blur", "snow", "fog", "elastic_transform"])
def test_own_corruptions_are_the_packages_with_imagenet_cs_constants(name, monkeypatch):
    """The package's function, its one deviating part replaced, against the one written here."""
    plasma, decays = package.plasma_fractal, [2, 2, 1.7, 1.5, 1.4]

    def blur(img, radius, sigma, angle):  # ImageNet-C blurs pictures of 8 bits
        levels = np.floor(np.clip(img, 0, 1) * 255 + 1e-4).astype(np.uint8)
        return corruptions.streak(levels.squeeze(), radius, sigma, angle) / 255

    monkeypatch.setattr(package, "cv2_motion_blur", blur)
    monkeypatch.setattr(corruptions, "ELASTIC_UNIT", 224)  # the package's; ImageNet-C's is 244
    picture = np.asarray(photo(3, size=(232, 225)))
    for severity, decay in enumerate(decays, 1):
        monkeypatch.setattr(package, "plasma_fractal", functools.partial(plasma, wibbledecay=decay))
        with monkeypatch.context() as patch:
            patch.delitem(corruptions.OWN, name)
            expected = corruptions.corrupt(picture, name, severity, (1, 2))
        with monkeypatch.context() as patch:
            patch.setattr(package, "plasma_fractal", plasma)
            ours = corruptions.corrupt(picture, name, severity, (1, 2))
        assert np.abs(ours.astype(int) - expected).max() <= (
            name != "zoom_blur"
        )  # zoom blur: to the bit
        assert not np.array_equal(ours, picture)


def test_fog_grows_rougher_and_ripples_are_in_units_of_244():
    grey = np.full((224, 224, 3), 128, np.uint8)
    clouds = [corruptions.corrupt(grey, "fog", s, (0,))[..., 0].astype(float) for s in (1, 3, 5)]
    rough = [np.abs(np.diff(c)).mean() / c.std() for c in clouds]
    assert rough[0] < rough[1] < rough[2]
    assert corruptions.ELASTIC_UNIT == 244


def test_glass_blur_copies_pixels_as_imagenet_c_does():
    """The published loop, with its assignment through two views."""
    from skimage.filters import gaussian

    picture = np.asarray(photo(3, size=(33, 24)))
    for severity, (sigma, far, rounds) in enumerate(corruptions.GLASS, 1):
        np.random.seed(severity)
        output = corruptions.glass_blur(picture, severity)
        np.random.seed(severity)
        x = np.uint8(gaussian(picture / 255.0, sigma=sigma, channel_axis=-1) * 255)
        for _ in range(rounds):
            rows, columns = range(24 - far, far, -1), range(33 - far, far, -1)
            right, down = np.random.randint(-far, far, (2, len(rows), len(columns)))
            for i, h in enumerate(rows):
                for j, w in enumerate(columns):
                    there = h + down[i, j], w + right[i, j]
                    x[h, w], x[there] = x[there], x[h, w]
        assert np.array_equal(
            output, np.clip(gaussian(x / 255.0, sigma=sigma, channel_axis=-1), 0, 1) * 255
        )


def test_tiny_pictures_and_narrow_ones():
    for size in ((1, 1), (2, 300), (300, 2), (5, 5)):
        picture = np.asarray(photo(1, size=size))
        for name in corruptions.OWN:
            assert corruptions.corrupt(picture, name, 5, (0,)).shape == picture.shape


def test_reruns_workers_shards_and_order_give_the_same_bytes(tree, tmp_path):
    make(tree, tmp_path / "one", *FEW)
    reference = files(tmp_path / "one")
    assert len(reference) == 4 * 3 * 2 and len(set(reference.values())) == len(reference)
    for part in ("3/3", "1/3", "2/3"):
        make(tree, tmp_path / "shards", *FEW, "--shard", part)
    assert files(tmp_path / "shards") == reference
    make(tree, tmp_path / "steps", *FEW[:-2], "5", "--limit", "1")
    make(tree / "val", tmp_path / "steps", *FEW)  # val/ itself, and only what is missing
    assert files(tmp_path / "steps") == reference
    make_corruptions.main(
        [str(tree), str(tmp_path / "two"), *FEW, "--no-resize", "--format", "png", "--workers", "2"]
    )
    assert files(tmp_path / "two") == reference
    make(tree, tmp_path / "seed", *FEW, "--seed", "1")
    differ = {
        name for name, content in files(tmp_path / "seed").items() if content != reference[name]
    }
    assert differ == {name for name in reference if "noise" in name}  # contrast draws nothing


def test_same_picture_under_another_name_gets_other_noise(tmp_path):
    for name in ("a/x.png", "a/y.png", "b/x.png"):
        save(tmp_path / "val" / name)
    make(
        tmp_path,
        tmp_path / "C",
        "--corruptions",
        "impulse_noise",
        "shot_noise",
        "--severities",
        "3",
    )
    assert len(set(files(tmp_path / "C").values())) == 6


def test_resumes_where_it_was_stopped_and_leaves_what_is_there(tree, tmp_path, capsys):
    out = tmp_path / "C"
    make(tree, out, *FEW)
    reference = files(out)
    lost, kept = (
        out / "contrast" / "5" / "bird" / "b1.png",
        out / "contrast" / "5" / "bird" / "b2.png",
    )
    lost.unlink()
    kept.write_bytes(b"mine")
    old, fresh = (
        lost.with_name(".host-1.partial"),
        lost.with_name(".host-2.partial"),
    )  # of a killed and of a running process
    for partial in (old, fresh):
        partial.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    make(tree, out, *FEW)
    assert "24 files, 23 exist" in (text := capsys.readouterr().out) and "1 made now" in text
    assert lost.read_bytes() == reference["contrast/5/bird/b1.png"] and kept.read_bytes() == b"mine"
    assert not old.exists() and fresh.exists()


def test_full_disk_stops_cleanly_and_can_be_resumed(tree, tmp_path, monkeypatch):
    make(tree, tmp_path / "whole", *FEW)
    replace, written = os.replace, []

    def full_after_five(source, target):
        if str(target).endswith(".png"):
            if len(written) == 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_after_five)
        with pytest.raises(
            UserError, match=r"\.png: No space left on device; free some space and run the same"
        ) as stop:
            make(tree, tmp_path / "C", *FEW)
    assert stop.value.code == 1 and len(files(tmp_path / "C")) == 5
    assert not list((tmp_path / "C").rglob("*.partial"))
    make(tree, tmp_path / "C", *FEW)
    assert files(tmp_path / "C") == files(tmp_path / "whole")


def test_unreadable_pictures_are_skipped_listed_and_exit_with_1(tree, tmp_path):
    out = tmp_path / "C"
    (tree / "val" / "bird" / "b1.JPEG").write_bytes(b"")
    whole = (tree / "val" / "fish" / "f.png").read_bytes()
    (tree / "val" / "fish" / "f.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UserError,
        match=r"2 of 4 pictures failed, listed in .*failed\.txt; the first: bird/b1.JPEG: not a p",
    ) as stop:
        make(tree, out, *FEW)
    assert stop.value.code == 1 and len(files(out)) == 2 * 6
    lines = (out / "failed.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["bird/b1.JPEG", "fish/f.png"]
    save(tree / "val" / "bird" / "b1.JPEG", seed=1)
    (tree / "val" / "fish" / "f.png").write_bytes(whole)
    make(tree, out, *FEW)  # repaired: only these are made, and the list is gone
    assert len(files(out)) == 4 * 6 and not (out / "failed.txt").exists()


def test_only_regular_files_are_read(tree, tmp_path):
    """A FIFO would be waited for. `workers.read` sees to what became one after the listing."""
    bird = tree / "val" / "bird"
    os.mkfifo(bird / "pipe.png")
    (bird / "zero.jpg").symlink_to("/dev/zero")
    (bird / "linked.png").symlink_to(tree / "val" / "fish" / "f.png")
    flags = ["--size", "0", "--format", "png", "--workers", "1"]
    run_script(SCRIPT, tree, tmp_path / "C", *FEW, *flags, timeout=240)
    output = {name.split("/", 2)[2] for name in files(tmp_path / "C")}
    assert output == {"bird/b0.png", "bird/b1.png", "bird/b2.png", "bird/linked.png", "fish/f.png"}
    for name in ("pipe.png", "zero.jpg"):
        with pytest.raises(OSError, match="not a regular file"):
            make_corruptions.read_picture(str(bird / name), 0)


def test_a_picture_too_large_for_the_memory_is_named(tree, tmp_path, monkeypatch):
    def read(path, read=workers.read):
        if path.endswith("b1.JPEG"):
            raise MemoryError
        return read(path)

    monkeypatch.setattr(workers, "read", read)
    with pytest.raises(
        UserError, match="1 of 4 pictures failed.* bird/b1.JPEG: too large for the memory"
    ):
        make(tree, tmp_path / "C", *FEW)
    assert len(files(tmp_path / "C")) == 3 * 6

    def corrupt(picture, name, severity, key, corrupt=corruptions.corrupt):
        if name == "contrast" and severity == 5:
            raise MemoryError
        return corrupt(picture, name, severity, key)

    monkeypatch.setattr(make_corruptions, "corrupt", corrupt)
    with pytest.raises(UserError, match="bird/b0.JPEG: contrast 5: too large for the memory"):
        make(tree, tmp_path / "D", *FEW)


def test_a_worker_that_dies_names_what_it_worked_on():
    with pytest.raises(
        UserError,
        match=r"worker process died .*while it worked on picture 3(, picture 3)?; try again",
    ):
        list(workers.in_processes(os._exit, [3, 3], 2, names=lambda job: [f"picture {job}"]))


def test_a_picture_too_small_for_one_corruption_gets_the_others(tmp_path):
    save(tmp_path / "val" / "a" / "dot.png", size=(3, 3))
    with pytest.raises(UserError, match="1 of 1 pictures failed.*dot.png: pixelate 5: "):
        make(
            tmp_path,
            tmp_path / "C",
            "--corruptions",
            "pixelate",
            "contrast",
            "--severities",
            "1",
            "5",
        )
    assert set(files(tmp_path / "C")) == {
        "pixelate/1/a/dot.png",
        "contrast/1/a/dot.png",
        "contrast/5/a/dot.png",
    }


def test_odd_names_kinds_and_nesting(tmp_path):
    names = ["a b.JPEG", 'it\'s "so".jpg', "größe.png", "more/x.webp", os.fsdecode(b"\xff.png")]
    for i, name in enumerate(list(names)):
        try:
            save(
                tmp_path / "val" / "my class" / name,
                seed=i,
                **({"mode": "CMYK"} if name == "a b.JPEG" else {}),
            )
        except OSError:  # some file systems take UTF-8 only
            names.remove(name)
    save(tmp_path / "val" / "my class" / "grey.jpg", mode="L")
    make(tmp_path, tmp_path / "C", "--corruptions", "fog", "--severities", "1", format="jpeg")
    output = {
        os.path.relpath(p, tmp_path / "C/fog/1/my class")
        for p in (tmp_path / "C").rglob("*")
        if p.is_file()
    }
    expected = {os.path.splitext(n)[0] + ".JPEG" for n in names if not n.endswith("jpg")} | {
        'it\'s "so".jpg',
        "grey.jpg",
    }
    assert output == expected | {"../../../corruptions.json"}


def test_names_that_would_collide_are_kept_apart():
    sources = ["a/x.JPEG", "a/x.png", "a/y.bmp", "a/y.webp", "a/z.tif", "b/x.png"]
    names = corruption_tree.target_names(sources, "jpeg")
    assert names == {
        "a/x.JPEG": "a/x.JPEG",
        "a/x.png": "a/x.png.JPEG",
        "a/y.bmp": "a/y.bmp.JPEG",
        "a/y.webp": "a/y.webp.JPEG",
        "a/z.tif": "a/z.JPEG",
        "b/x.png": "b/x.JPEG",
    }
    names = corruption_tree.target_names(sources, "png")
    assert (
        names["a/x.png"] == "a/x.png"
        and names["a/x.JPEG"] == "a/x.JPEG.png"
        and len(set(names.values())) == 6
    )
    with pytest.raises(UsageError, match="two pictures would both become a/x.png.JPEG"):
        corruption_tree.target_names(["a/x.JPEG", "a/x.png", "a/x.png.JPEG"], "jpeg")


def test_val_of_a_root_or_the_folder_itself(tree, tmp_path):
    assert corruption_tree.source_folder(str(tree)) == tree / "val"
    assert corruption_tree.source_folder(str(tree / "train")) == tree / "train"
    (tree / "val").rename(tree / "test")
    assert corruption_tree.source_folder(str(tree)) == tree / "test"
    save(tmp_path / "vehicles" / "train" / "t.png")  # a class called train
    save(tmp_path / "vehicles" / "car" / "c.png")
    assert corruption_tree.source_folder(str(tmp_path / "vehicles")) == tmp_path / "vehicles"


def test_class_list(tree, tmp_path):
    (tmp_path / "list.txt").write_text("fish\n")
    make(tree, tmp_path / "C", *FEW, "--class-list", str(tmp_path / "list.txt"))
    assert {name.split("/")[2] for name in files(tmp_path / "C")} == {"fish"}
    (tmp_path / "list.txt").write_text("fish\nn00000000\n")
    with pytest.raises(UsageError, match="no such class folder in .*n00000000"):
        make(tree, tmp_path / "D", "--class-list", str(tmp_path / "list.txt"))
    assert not (tmp_path / "D").exists()


def test_bad_input_is_one_line_and_harms_nothing(tree, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    (tmp_path / "only-train").mkdir()
    (tree / "train").rename(tmp_path / "only-train" / "train")
    (tmp_path / "link").symlink_to(tree / "val")
    make(tree, tmp_path / "begun", *FEW)
    before = sorted(map(str, tmp_path.rglob("*")))
    cases = [
        ([tree], "give TREE .* and OUT"),
        ([tmp_path / "absent", tmp_path / "C"], "absent: no such folder"),
        ([tmp_path / "only-train", tmp_path / "C"], "only-train has no val/ folder"),
        ([tree, tree / "val" / "C"], "lies in the folder of the pictures"),
        ([tree, tmp_path / "link" / "C"], "lies in the folder of the pictures"),
        ([tree / "val", tree / "val"], "lies in the folder of the pictures"),
        ([tree, tmp_path / "mine"], "mine is not empty and was not made by this script"),
        ([tree, tree.parent], "is not empty and was not made by this script"),
        ([tree, tmp_path / "mine" / "thesis.txt"], "is a file, not a folder"),
        ([tree, tmp_path / "begun", "--seed", "4"], "was begun with seed 0, not 4: give the same"),
        ([tree, tmp_path / "begun", "--size", "64"], "was begun with size 0, not 64"),
    ]
    for flags, message in cases:
        with pytest.raises(UsageError, match=message) as stop:
            make_corruptions.main(
                [
                    *map(str, flags),
                    *(["--no-resize"] if "--size" not in flags else []),
                    *FEW,
                    "--format",
                    "png",
                ]
            )
        assert "\n" not in str(stop.value)
    for flag, value in (
        ("--shard", "0/2"),
        ("--shard", "3/2"),
        ("--shard", "half"),
        ("--severities", "6"),
        ("--size", "-1"),
        ("--corruptions", "rain"),
        ("--format", "gif"),
    ):
        with pytest.raises(SystemExit) as stop:
            make_corruptions.main([str(tree), str(tmp_path / "C"), flag, value])
        error = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and error.startswith(f"error: argument {flag}")
            and len(error.splitlines()) == 1
        )
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_the_output_cannot_lie_in_a_class_of_a_tree_of_links(tree, tmp_path):
    (tmp_path / "links" / "val").mkdir(parents=True)
    (tmp_path / "links" / "val" / "bird").symlink_to(tree / "val" / "bird")
    with pytest.raises(UsageError, match="lies in the folder of the pictures .*links/val/bird"):
        make(tmp_path / "links", tree / "val" / "bird" / "out", *FEW)
    assert not (tree / "val" / "bird" / "out").exists()


def test_note_on_other_versions_and_damaged_settings(tree, tmp_path, capsys):
    make(tree, tmp_path / "C", *FEW)
    file = tmp_path / "C" / "corruptions.json"
    content = json.loads(file.read_text())
    content["versions"]["numpy"] = "1.0"
    file.write_text(json.dumps(content))
    make(tree, tmp_path / "C", *FEW)
    assert "was begun with other versions of numpy;" in capsys.readouterr().out
    tree = tree.rename(tmp_path / "moved")
    make(tree, tmp_path / "C", *FEW)
    assert f"was begun with the pictures of {tmp_path / 'set'}" in capsys.readouterr().out
    file.write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        make(tree, tmp_path / "C", *FEW)


def test_as_a_program_from_elsewhere(tree, tmp_path):
    (tree / "val" / "fish" / "f.png").write_bytes(b"")
    done = run_script(
        SCRIPT,
        "set",
        "C",
        "--no_resize",
        "--corruptions",
        "contrast",
        "--severities",
        "1",
        cwd=tmp_path,
    )
    assert done.returncode == 1 and "result: 3 of 4 files in C" in done.stdout
    said = done.stderr.splitlines()[-1]  # on a slow machine a line of progress comes before
    assert (
        said == "error: 1 of 4 pictures failed, listed in C/failed.txt; "
        "the first: fish/f.png: not a picture"
    )


def test_demo(workspace, capsys):
    make_corruptions.main(["--demo", "-j", "1", "--corruptions", "contrast", "fog"])
    assert "result: 40 of 40 files in runs/try-corruptions" in capsys.readouterr().out


def test_ctrl_c_is_one_line_and_the_rest_follows(tree, tmp_path, monkeypatch):
    corrupt, output = make_corruptions.corrupt, []

    def until_the_eighth(*arguments):
        if len(output) == 7:
            raise KeyboardInterrupt
        output.append(arguments)
        return corrupt(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(make_corruptions, "corrupt", until_the_eighth)
        with pytest.raises(UserError, match="interrupted; written files are complete") as stop:
            make(tree, tmp_path / "C", *FEW)
    assert stop.value.code == 130 and len(files(tmp_path / "C")) == 7
    make(tree, tmp_path / "C", *FEW)
    assert len(files(tmp_path / "C")) == 24


def test_16_bits_are_scaled_not_cut(tmp_path):
    grey = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "16.png")
    answer = make_corruptions.read_picture(str(tmp_path / "16.png"), 0)
    assert (answer == (grey >> 8)[..., None]).all()
