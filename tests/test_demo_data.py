"""The built-in data set: its files, the same every time, and what they say of the class."""

import argparse
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script
from PIL import Image

from common import UsageError, UserError, launch
from preprocess import demo, demo_pictures, demo_shapes, demo_textures, demo_writer, make_demo
from preprocess.corruptions import CORRUPTIONS, corrupt
from tools import shape_bias

SCRIPT = "preprocess/make_demo.py"
SMALL = {
    "size": 48,
    "train_per_class": 6,
    "val_per_class": 2,
    "corruption_per_class": 1,
    "severities": (2, 4),
}
TINY = {"size": 32, "train_per_class": 2, "val_per_class": 1, "severities": ()}


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "demo"
    counts = demo.make(out, **SMALL, texture=True, workers=1, progress=False)
    return out, counts


def test_counts_and_layout(small):
    out, counts = small
    shifted = dict.fromkeys(demo_pictures.SHIFTED, 20)
    assert counts == {"train": 60, "val": 20, "corruption": 15 * 2 * 10, **shifted, "texture": 60}
    assert {name: len(list((out / name).rglob("*.png"))) for name in demo_writer.SETS} == {
        name: counts[name] for name in demo_writer.SETS
    }
    for name in ("train", "val", *demo_pictures.SHIFTED, "corruption/fog/4"):
        assert sorted(p.name for p in (out / name).iterdir()) == list(demo_shapes.CLASSES)
    assert sorted(p.name for p in (out / "corruption").iterdir()) == sorted(CORRUPTIONS)
    assert sorted(p.name for p in (out / "corruption" / "snow").iterdir()) == ["2", "4"]
    # a texture twin for each train picture, under the same name below OUT-texture
    twin = out.with_name("demo-texture")
    assert set(files(twin)) == {f"train/{name}" for name in files(out / "train")}
    for path in [*out.rglob("*.png"), *twin.rglob("*.png")]:
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == ((48, 48), "RGB"), path
    content = json.loads((out / "demo.json").read_text())
    assert content["counts"] == counts and content["settings"]["seed"] == 0
    assert content["bytes"]["val"] == sum(map(len, files(out / "val").values()))
    assert not list(out.glob("*.partial"))


def test_every_picture_is_different(small):
    out, counts = small
    for name in ("train", "val", *demo_pictures.SHIFTED):
        assert len(set(files(out / name).values())) == counts[name]
    assert not set(files(out / "train").values()) & set(files(out / "val").values())


def test_same_seed_same_bytes_with_other_workers_another_seed_other_pictures(small, tmp_path):
    out, _ = small
    demo.make(tmp_path / "again", **SMALL, texture=True, workers=2, progress=False)
    assert files(tmp_path / "again") == files(
        out
    )  # all fifteen corruptions too, impulse noise among them
    assert files(tmp_path / "again-texture") == files(out.with_name("demo-texture"))
    demo.make(tmp_path / "other", **TINY, seed=1, workers=1, progress=False)
    assert not np.array_equal(
        demo_pictures.render(0, "val", 0, 0, 32), demo_pictures.render(1, "val", 0, 0, 32)
    )
    assert (tmp_path / "other/val/disc/disc_0000.png").is_file() and not (
        tmp_path / "other/corruption"
    ).exists()


def test_more_pictures_leave_the_first_ones_as_they_were(small, tmp_path):
    out, _ = small
    demo.make(
        tmp_path / "more",
        **{**SMALL, "train_per_class": 7, "severities": ()},
        workers=1,
        progress=False,
    )
    assert files(out / "train").items() < files(tmp_path / "more" / "train").items()


@pytest.mark.parametrize("split", ["train", "val"])
def test_textures_go_with_the_class_nine_times_in_ten(split):
    drawn = [demo_pictures.spec(0, split, c, i) for c in range(10) for i in range(120)]
    shape = np.array([s.fg.kind == demo_shapes.SHAPE_TEXTURE[s.shape] for s in drawn])
    ground = np.array([s.bg.kind == demo_shapes.GROUND_TEXTURE[s.shape] for s in drawn])
    # 1200 draws: the standard deviation of a share of 0.9 is 0.009
    assert abs(shape.mean() - 0.9) < 0.03 and abs(ground.mean() - 0.9) < 0.03
    assert abs((shape & ground).mean() - 0.81) < 0.04  # drawn independently of each other
    other = {s.fg.kind for s in drawn if s.fg.kind != demo_shapes.SHAPE_TEXTURE[s.shape]}
    assert other == set(range(10))


def test_stylized_pictures_have_the_shape_of_val_and_the_textures_of_another_class(small):
    out, _ = small
    for c in range(10):
        own = {demo_shapes.SHAPE_TEXTURE[c], demo_shapes.GROUND_TEXTURE[c]}
        styles = set()
        for i in range(40):
            val, styled = (
                demo_pictures.spec(0, "val", c, i),
                demo_pictures.spec(0, "stylized", c, i),
            )
            assert not own & {styled.fg.kind, styled.bg.kind}
            other = styled.texture_class
            assert other != c
            assert styled.fg.kind == demo_shapes.SHAPE_TEXTURE[other]
            assert styled.bg.kind == demo_shapes.GROUND_TEXTURE[other]
            assert (styled.shape, styled.centre, styled.radius, styled.angle) == (
                c,
                val.centre,
                val.radius,
                val.angle,
            )
            styles.add(other)
        assert len(styles) >= 6
    # the file name tells the other class, for a count of shape against texture answers
    for i, path in enumerate(sorted((out / "stylized" / "disc").iterdir())):
        styled = demo_pictures.spec(0, "stylized", demo_shapes.CLASSES.index("disc"), i)
        assert path.name == f"disc_{i:04d}-{demo_shapes.CLASSES[styled.texture_class]}.png"


def test_cue_conflict_has_every_shape_in_the_textures_of_all_other_classes_in_turn(small):
    out, _ = small
    for c in range(10):
        other = [demo_pictures.spec(0, demo_pictures.CUES, c, i) for i in range(14)]
        assert all(s.fg.kind == demo_shapes.SHAPE_TEXTURE[s.texture_class] for s in other)
        assert sorted(s.texture_class for s in other) == sorted(2 * demo_shapes.others(c))
        assert [s.centre for s in other] == [
            demo_pictures.spec(0, "val", c, i).centre for i in range(14)
        ]
    cues = shape_bias.CueConflict(str(out / demo_pictures.CUES), demo_shapes.CLASSES)
    assert len(cues.dataset) == 20 and cues.categories == list(demo_shapes.CLASSES)
    for path, shape, texture in zip(cues.dataset.paths, cues.dataset.targets, cues.textures):
        drawn = demo_pictures.spec(
            0, demo_pictures.CUES, shape := int(shape), int(re.search(r"(\d+)-", path)[1])
        )
        assert (
            drawn.texture_class == texture and Path(path).parent.name == demo_shapes.CLASSES[shape]
        )


def test_sketch_is_black_on_white_and_rendition_is_flat():
    for c in range(10):
        sketch = demo_pictures.render(0, "sketch", c, 0, 64)
        assert (sketch[..., 0] == sketch[..., 1]).all() and (sketch[..., 0] == sketch[..., 2]).all()
        assert np.median(sketch) == 255 and sketch.min() < 40
        cartoon = demo_pictures.render(0, "rendition", c, 0, 64).reshape(-1, 3)
        _, counts = np.unique(cartoon, axis=0, return_counts=True)
        assert np.sort(counts)[-3:].sum() > 0.7 * len(
            cartoon
        )  # shape, ground, ink; the rest is their soft edges


def test_mean_colour_does_not_tell_the_class():
    def describe(split, n):
        pictures = (
            np.stack(
                [demo_pictures.render(0, split, c, i, 32) for c in range(10) for i in range(n)]
            )
            / 255.0
        )
        return pictures.mean((1, 2)), np.repeat(np.arange(10), n)

    train, train_class = describe("train", 60)
    val, val_class = describe("val", 40)
    centres = np.stack([train[train_class == c].mean(0) for c in range(10)])
    nearest = np.linalg.norm(val[:, None] - centres, axis=2).argmin(1)
    neighbour = train_class[np.linalg.norm(val[:, None] - train, axis=2).argmin(1)]
    # Chance is 0.1; 400 pictures give it a standard deviation of 0.015. The nearest neighbour finds
    # a little more: textures differ in how much of a surface their lines cover, and colours are
    # nearly grey (0.146 with 2,000 against 500).
    assert (nearest == val_class).mean() < 0.16 and (neighbour == val_class).mean() < 0.19


def test_shapes_differ_and_textures_survive_halving():
    """Masks of classes differ in many pixels; a texture reduced to 32 pixels keeps its contrast."""
    masks = {}
    for c in range(10):
        spec = demo_shapes.Spec(c, (0.5, 0.5), 0.4, 0.0, np.zeros((4, 3)), None, None, c)
        masks[c] = demo_shapes.mask_of(demo_shapes.outlines_of(spec, 64), 64)
        assert 0.1 < masks[c].mean() < 0.55
    assert min(np.abs(masks[a] - masks[b]).mean() for a in range(10) for b in range(a)) > 0.02
    for kind in range(10):
        texture = demo_textures.TextureSpec(
            kind, 0.115, 10.0, (0.3, 0.7), 0
        )  # the finest that is drawn
        pattern = demo_textures.pattern(texture, 64)
        half = pattern.reshape(32, 2, 32, 2).mean((1, 3))
        assert 0.2 < pattern.mean() < 0.8 and half.std() > 0.5 * pattern.std() > 0.15


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_corruption_changes_the_picture_and_grows(name):
    # Severities 1 and 2 of ImageNet-C's elastic_transform warp the whole picture; 3 to 5 ripple it
    # more and more, on top of a random shift that does not grow: more pictures, to see the one
    # above the other.
    lowest, n = (3, 40) if name == "elastic_transform" else (1, 6)
    pictures = [demo_pictures.render(0, "val", i % 10, i, 48) for i in range(n)]

    def change(severity):
        corrupted = [corrupt(p, name, severity, (0, i)) for i, p in enumerate(pictures)]
        assert all(x.shape == p.shape and x.dtype == np.uint8 for x, p in zip(corrupted, pictures))
        return np.mean([np.abs(x.astype(float) - p).mean() for x, p in zip(corrupted, pictures)])

    weak, strong = change(lowest), change(5)
    assert weak > 2 and strong > 1.04 * weak


def test_corrupting_is_repeatable_and_leaves_the_global_generators_alone():
    from corrupt_tta import corruptions

    picture, random_noise = demo_pictures.render(0, "val", 3, 0, 48), corruptions.random_noise
    np.random.seed(7)
    expected = np.random.random(3)
    np.random.seed(7)
    for name in ("impulse_noise", "gaussian_noise", "frost"):
        first, again, other = (corrupt(picture, name, 3, (0, 3, key)) for key in (0, 0, 1))
        assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(np.random.random(3), expected)
    assert corruptions.random_noise is random_noise


def test_complete_set_is_reused_and_interrupted_one_redone(tmp_path):
    out = tmp_path / "demo"
    assert demo.ensure(out, **TINY, workers=1, progress=False) == out
    output, stamp = files(out), (out / "demo.json").stat().st_mtime_ns
    picture = out / "train" / "disc" / "disc_0000.png"
    picture.write_bytes(b"")
    demo.ensure(out, **TINY, progress=False)  # told complete by demo.json: nothing is made
    assert picture.read_bytes() == b"" and (out / "demo.json").stat().st_mtime_ns == stamp

    # as an interruption leaves it: some pictures, the marker, no demo.json
    os.replace(out / "demo.json", out / "demo.json.partial")
    (out / "val" / "disc" / "left_over.png").write_bytes(b"")
    demo.ensure(out, **TINY, workers=1, progress=False)
    assert files(out) == output and demo.read(out)["counts"]["train"] == 20


def test_a_set_gets_the_textures_that_a_later_script_needs(tmp_path):
    out = tmp_path / "demo"
    demo.make(out, **TINY, workers=1, progress=False)
    output = files(out)
    for is_demo in (False, True):
        args = argparse.Namespace(demo=is_demo, data=str(out))
        demo.ensure_for(args, launch.Process(), texture=True)
        assert demo.read(out)["settings"]["texture"] == is_demo
        assert files(out) == output
    assert set(files(tmp_path / "demo-texture")) == {f for f in output if f.startswith("train")}


def test_other_settings_are_refused_by_ensure_and_replaced_by_make(tmp_path):
    out = tmp_path / "demo"
    demo.make(out, **TINY, workers=1, progress=False)
    with pytest.raises(UsageError, match="train_per_class 2 not 3.*--force"):
        demo.ensure(out, **{**TINY, "train_per_class": 3}, progress=False)
    with pytest.raises(UsageError, match="texture False not True"):
        demo.ensure(out, **TINY, texture=True, progress=False)
    demo.make(out, **TINY, texture=True, workers=1, progress=False)
    assert any((tmp_path / "demo-texture" / "train").iterdir())
    demo.make(out, **TINY, workers=1, progress=False)  # these textures are of other pictures now
    assert not (tmp_path / "demo-texture" / "train").exists()
    demo.make(out, **TINY, texture=True, workers=1, progress=False)
    demo.ensure(out, **TINY, progress=False)  # twins do not disturb
    assert (tmp_path / "demo-texture" / "demo.json").is_file()


def test_full_disk_is_one_line_and_leaves_an_unfinished_set(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "demo"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match=r"\.png: No space left on device; free some space"):
            demo.make(out, **TINY, workers=1, progress=False)
    assert demo.read(out) is None
    demo.ensure(out, **TINY, workers=1, progress=False)
    assert demo.read(out)["counts"]["train"] == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"severities": (0, 3)}, "--severities 0 3: a severity must be 1, 2, 3, 4 or 5"),
        (
            {"severities": (1,), "corruption_per_class": 9},
            "--corruption-per-class 9 must be between 1 and",
        ),
        ({"train_per_class": 0}, "--train-per-class 0 must be at least 1"),
        ({"size": 8}, "--size 8 must be at least 32"),
        ({"seed": -1}, "--seed -1 must be at least 0"),
        ({"workers": 0}, "--workers 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_work(tmp_path, change, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        demo.make(tmp_path / "demo", **{**TINY, **change}, progress=False)
    assert not (tmp_path / "demo").exists()


TINY_FLAGS = ["--train-per-class", "2", "--val_per_class", "1", "--size", "32"]


def test_command_line_from_elsewhere(tmp_path, capsys):
    flags = [*TINY_FLAGS, "--severities"]
    done = run_script(SCRIPT, "demo", *flags, "--texture", "--sheet", "s/sheet.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("demo data: making 90 files in demo")
    assert re.search(r"^train +20 ", done.stdout, re.M) and "result: 90 files" in done.stdout
    with Image.open(tmp_path / "s" / "sheet.png") as sheet:
        assert sheet.width > 320 and sheet.height > 7 * 32
    make_demo.main([str(tmp_path / "demo"), *flags])  # found complete, with its twins
    again = capsys.readouterr()
    assert again.err == "" and "result: 90 files" in again.out


def test_two_processes_that_want_the_same_set_make_it_once(tmp_path):
    command = [sys.executable, str(ROOT / SCRIPT), "demo", *TINY_FLAGS, "--severities"]
    both = [
        subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=240)[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sum("making 70 files" in text for text in errors) == 1
    assert len(files(tmp_path / "demo")) == 70


def test_command_line_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    cases = [
        (["mine", "--force"], 2, "mine is neither empty nor a demo data set"),
        (["file"], 2, "file is neither empty nor a demo data set"),
        (["file/demo"], 1, "Not a directory"),
        (["new", "--severities", "7"], 2, "--severities 7"),
    ]
    for args, code, message in cases:
        with pytest.raises(UserError, match=message) as told:
            make_demo.main(args)
        assert told.value.code == code and len(str(told.value).splitlines()) == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "mine", "thesis.txt"]


def _workers_of(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="looks up child processes in /proc"
)
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_command_leaves_no_process_and_can_be_repeated(tmp_path, sent):
    command = [sys.executable, str(ROOT / SCRIPT), "demo", "--workers", "2", "--severities"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "demo").glob("*/*/*.png")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        workers = _workers_of(process.pid)
        assert len(workers) >= 2
        process.send_signal(sent)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    if sent == signal.SIGINT:
        assert process.returncode == 130 and errors.splitlines()[-1].startswith("interrupted")
        assert "Traceback" not in errors
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}/fd").exists() for pid in workers):
        assert time.monotonic() < deadline, "worker processes outlive the command"
        time.sleep(0.05)
    assert not (tmp_path / "demo" / "demo.json").exists()
    assert (tmp_path / "demo" / "demo.json.partial").exists()
    make_demo.main([str(tmp_path / "demo"), *TINY_FLAGS, "--severities", "--workers", "1"])
    assert demo.read(tmp_path / "demo")["counts"]["train"] == 20
