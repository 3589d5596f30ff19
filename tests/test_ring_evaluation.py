"""Evaluation of the ring's networks: published files, protocols, nearest neighbours, transfer."""

import argparse
import csv
import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conftest import equal, fake_stl10, inside, links_to, says_no, stopped_at
from PIL import Image
from vectors import published_keys

from cmc import colour
from common import UsageError, UserError, backbones, data, launch, sets
from ring import eval_ring, nearest, networks, released, transfer
from runner import checkpoint, layouts, pretrained, resume

SMALL = "--device cpu --input-res 16 --epochs 2 --batch-size 64 -j 2 --seed 0".split()
SMALL += "--dataset folder --root DATA".split()


def lightning(path, keys: str, rows: int, **more) -> None:
    """A checkpoint as Lightning 1.1 wrote them: its callback's class is a key."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback
    torch.manual_seed(0)
    state = {}
    for name, shape, kind in published_keys(keys):
        shape = [rows, *shape[1:]] if name == "memory_bank._bank" else shape
        drawn = (
            torch.randn(shape) * 0.05 if "float" in kind else torch.zeros(shape, dtype=torch.int64)
        )
        state[name] = (
            drawn.abs() + 0.5
            if name.endswith(("running_var", "bn1.weight", "bn2.weight"))
            else drawn
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        saved = {
            "epoch": 200,
            "global_step": 39000,
            "pytorch-lightning_version": "1.1.8",
            "state_dict": state,
        }
        saved |= {
            "callbacks": {callback: {"monitor": None, "dirpath": "x"}},
            "optimizer_states": [],
            "lr_schedulers": [],
        }
        torch.save(saved | more, path)


@pytest.fixture(scope="module")
def folder(demo_set, tmp_path_factory):
    """Published networks of IR and MoCo in experiments of theirs, one of CMC in ours."""
    folder = links_to(demo_set, tmp_path_factory.mktemp("ring-eval"))
    (folder / "DATA").symlink_to(demo_set)
    (folder / "BIRDS").symlink_to(demo_set)
    for name, keys in (("ir", "ring_nce_system"), ("moco", "ring_moco_system")):
        lightning(folder / name / "checkpoints" / "epoch=199-step=38999.ckpt", keys, 160)
        settings = {"data_params": {"mocov2_32x32_transforms": True, "dataset": None}}
        (folder / name / "config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    network = networks.build_network("resnet18", 128, True, colour.default_views("Lab"))
    state = layouts.add_prefix(network.state_dict(), "model.")
    for bank in ("memory_bank_l", "memory_bank_ab"):
        state[f"{bank}._bank"] = torch.nn.functional.normalize(torch.randn(160, 128), dim=1)
    opt = dict(
        method="cmc",
        view="Lab",
        negatives="ring",
        augmentation="mocov2_32x32",
        dataset="folder",
        input_res=32,
    )
    (folder / "cmc").mkdir()
    torch.save({"opt": opt, "epoch": 3, "state_dict": state}, folder / "cmc" / "current.pth")
    return folder


@pytest.fixture
def workspace(folder):
    with inside(folder):
        yield folder


def evaluate(network, out, *flags) -> dict:
    """result.json of every data set, by its name."""
    eval_ring.main([*SMALL, "--model_path", str(network), "--save_path", str(out), *flags])
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/*/result*.json")}


def test_folds_of_stl10(workspace, tmp_path, monkeypatch):
    """Each fold trains a classifier and votes in the k-NN beside it; both numbers are means."""
    fake_stl10(monkeypatch, tmp_path / "stl")
    flags = ["--dataset", "stl10", "--root", str(tmp_path / "stl"), "--stl10-folds", "-b", "4"]
    found = evaluate("ir", tmp_path / "out", *flags, "--cache-views", "1", "--knn-k", "20")
    of_folds = [*(tmp_path / "out").glob("*/stl10/fold-*/result.json")]
    assert len(of_folds) == 2 and len(found["stl10"]["acc1_of_folds"]) == 2
    results = [json.loads(path.read_text()) for path in of_folds]
    (mean,) = (tmp_path / "out").glob("*/stl10/result.json")
    for key in ("acc1", "knn_acc1"):
        average = sum(result[key] for result in results) / 2
        assert json.loads(mean.read_text())[key] == pytest.approx(average)


@pytest.mark.parametrize("name, label", [("ir", None), ("moco", None), ("cmc", "CMC ring")])
def test_a_checkpoint_is_evaluated(workspace, tmp_path, capsys, name, label):
    """Published IR and MoCo, our CMC: linear, k-NN and the bank, as the checkpoint says."""
    found = evaluate(name, tmp_path, "--cache-views", "1")["own"]
    assert (tmp_path / f"{name}_standard_seed_0" / "own" / "current.pth").is_file()
    assert found["method"] == name and found["arch"] == "resnet18" and found["linear_epochs"] == 2
    assert found["label"] == label or label is None
    assert {"acc1", "acc1_best", "knn_acc1", "bank_acc1"} <= found.keys() and 0 <= found[
        "bank_acc1"
    ] <= 100
    said = capsys.readouterr().out
    width = 1024 if name == "cmc" else 512
    saved = checkpoint.load(tmp_path / f"{name}_standard_seed_0" / "own" / "current.pth")
    assert saved["classifier"]["weight"].shape == (10, width)
    assert (
        "| data set | classes | train | val | linear, last epoch | best | k-NN | 1-NN in the bank |"
        in said
    )
    assert f"| own | 10 | 160 | 40 | {found['acc1']:.2f} |" in said
    # of IR and MoCo it is in the config.json of their experiment
    assert saved["opt"]["augmentation"] == "mocov2_32x32" and saved["script"] == "ring/eval_ring.py"


def test_features_are_those_of_the_published_network(workspace):
    """The pooled feature, and for CMC both towers' side by side."""
    saved, args = eval_ring.read(eval_ring.parse_args([*SMALL, "--model_path", "ir"]))
    assert (args.method, args.augmentation) == ("ir", "mocov2_32x32")
    network = networks.of_checkpoint(saved).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reference = backbones.build("resnet18", 0, small_stem=True).eval()
    checkpoint.load_into(reference, layouts.without_head(layouts.backbone(saved)), "reference")
    torch.testing.assert_close(eval_ring.embed(network, images, args), reference(images))
    towers = networks.build_network("resnet18", 128, True, colour.default_views("Lab")).eval()
    both = eval_ring.embed(towers, images, args)
    one = eval_ring.embed(towers.towers()[1], images[:, 1:], args)
    assert both.shape == (2, 1024) and torch.equal(both[:, 512:], one)


def test_the_protocols_differ_as_they_say(workspace, tmp_path):
    """Released: training mode, so that the statistics move; views of the pre-training; its rate."""
    standard, theirs = (
        eval_ring.parse_args([*SMALL, "--model_path", "ir", "--protocol", p])
        for p in released.PROTOCOLS
    )
    assert (standard.learning_rate, standard.weight_decay, standard.milestones) == (
        0.5,
        0.0,
        [1, 2],
    )
    assert (theirs.learning_rate, theirs.weight_decay, theirs.milestones) == (0.01, 1e-5, [])
    standard, theirs = (eval_ring.read(args)[1] for args in (standard, theirs))
    assert "GaussianBlur" in repr(eval_ring.recipe(theirs, None, True))
    assert "GaussianBlur" not in repr(eval_ring.recipe(standard, None, True))
    plain = [repr(eval_ring.recipe(args, None, False)) for args in (standard, theirs)]
    assert plain[0] == plain[1]
    moved = {}
    for protocol in released.PROTOCOLS:
        evaluate("ir", tmp_path, "--protocol", protocol, "--epochs", "1")
        saved = checkpoint.load(tmp_path / f"ir_{protocol}_seed_0" / "own" / "current.pth")
        moved[protocol] = saved.get("statistics")
    assert moved["standard"] is None
    before = networks.of_checkpoint(checkpoint_of("ir")).state_dict()
    running = [k for k in moved["released"] if k.endswith("running_mean")]
    assert running and not any(torch.equal(moved["released"][k], before[k]) for k in running)


def checkpoint_of(name):
    return pretrained.read(name, "--model_path", "ring/train_ring.py")


def test_a_network_that_changes_voids_the_result(workspace):
    """Both protocols look after the parameters, the standard one after the statistics as well."""
    args = eval_ring.parse_args([*SMALL, "--model_path", "ir"])
    for spec, caught in ((eval_ring.SPEC, True), (eval_ring.RELEASED, False)):
        network, classifier = eval_ring.build_network(
            checkpoint_of("ir"), args, 10, launch.Process()
        )
        kind = spec.method or eval_ring.linear.Classifier
        method = kind(spec, args, launch.Process(), network, classifier, None, {})
        network.features[1].running_mean += 1
        if caught:
            with pytest.raises(UserError, match="running_mean changed"):
                method.check_frozen()
        else:
            method.check_frozen()
        network.features[0].weight.data += 1
        with pytest.raises(UserError, match="changed during linear evaluation"):
            method.check_frozen()


def test_a_resume_equals_an_uninterrupted_run(workspace, tmp_path):
    """In the middle of the second data set, with the protocol that has more to go on with."""
    flags = ["--protocol", "released", "--lr", "0.1", "--transfer", "birds=BIRDS"]
    whole = evaluate("ir", tmp_path / "whole", *flags)
    with stopped_at(
        12
    ):  # neighbours 3 batches, two epochs of 2 + 1; then neighbours 2, and the first step
        evaluate("ir", tmp_path / "parts", *flags)
    (half,) = (tmp_path / "parts").glob("*/birds/current.pth")
    assert (checkpoint.load(half)["epoch"], checkpoint.load(half)["step"]) == (0, 1)
    assert (
        not (half.parent / "result.json").exists()
        and (half.parent.parent / "own" / "result.json").exists()
    )
    parts = evaluate("ir", tmp_path / "parts", *flags, "--resume", "auto")
    assert parts.keys() == whole.keys() == {"own", "birds"}
    for name in whole:
        a, b = (
            checkpoint.load(tmp_path / f / "ir_released_seed_0" / name / "current.pth")
            for f in ("whole", "parts")
        )
        assert (
            a["statistics"]
            and equal(a["classifier"], b["classifier"])
            and equal(a["statistics"], b["statistics"])
        )
        assert all(
            whole[name][key] == parts[name][key] for key in ("acc1", "acc1_best", "knn_acc1")
        )
    fewer = ["--protocol", "released", "--resume", "auto"]  # not all of the data sets of then
    assert evaluate("ir", tmp_path / "parts", *fewer)["own"]["acc1"] == whole["own"]["acc1"]
    path = tmp_path / "parts" / "ir_released_seed_0" / "own" / "current.pth"
    state, mean = checkpoint.load(path), "features.1.running_mean"
    short = state["statistics"] | {mean: torch.zeros(3)}
    for key, value, message in (
        ("statistics", None, "lacks the batch-norm statistics of its network"),
        ("statistics", short, rf"does not fit this model \({mean} is \(3,\), expected"),
        ("neighbours", {"knn_acc1": "high"}, "its neighbours cannot be used"),
    ):
        torch.save(state | {key: value}, path)
        with pytest.raises(UserError, match=f"current.pth.*{message}"):
            evaluate("ir", tmp_path / "parts", *fewer)


def test_a_checkpoint_without_some_of_its_flags(workspace, tmp_path):
    """What flags do not tell, tensors do."""
    state = checkpoint.load("moco/checkpoints/epoch=199-step=38999.ckpt")["state_dict"]
    state |= {"memory_bank._bank": torch.tensor(0.0)}
    torch.save({"state_dict": state, "opt": {"seed": 1}}, tmp_path / "a.ckpt")
    assert (
        evaluate(tmp_path / "a.ckpt", tmp_path / "out", "--nn-only", "--dataset", "folder")["own"][
            "method"
        ]
        == "moco"
    )


# ------------------------------------------------------------------------------- nearest neighbours


def test_the_nearest_row_of_a_bank():
    """Unlabelled rows are passed over, of two banks the similarities are added."""
    generator = torch.Generator().manual_seed(0)
    banks = [
        torch.nn.functional.normalize(torch.randn(50, 8, generator=generator), dim=1)
        for _ in range(2)
    ]
    labels, targets = torch.arange(50) % 7, torch.arange(30) % 7
    labels[::5] = -1
    z = torch.randn(30, 16, generator=generator)
    hits = 0
    for row, target in zip(z, targets):
        scores = [
            banks[0][i] @ row[:8] / row[:8].norm() + banks[1][i] @ row[8:] / row[8:].norm()
            for i in range(50)
        ]
        best = max((i for i in range(50) if labels[i] >= 0), key=lambda i: scores[i])
        hits += int(labels[best] == target)
    assert nearest.in_bank(z, banks, labels, targets, 7) == pytest.approx(hits / 30 * 100)
    own = banks[0][:30] * 3  # a row finds itself, whatever its length
    assert nearest.in_bank(own, banks[:1], torch.arange(50), torch.arange(30), 50) == 100


def test_which_pictures_a_bank_is_of():
    pictures = sets.ArraySet(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), [0, 1, 1, 0], ["a", "b"])
    saved = {"state_dict": {"memory_bank._bank": torch.ones(6, 2), "queue": torch.ones(3, 2)}}
    found, labels, note = nearest.banks(saved, pictures, "stl10")
    assert len(found) == 1 and labels.tolist() == [0, 1, 1, 0, -1, -1] and not note
    assert nearest.banks(saved, pictures, "folder")[0] == []
    assert "has 6 rows and train/ 4 pictures" in nearest.banks(saved, pictures, "folder")[2]
    assert "has no memory bank" in nearest.banks({"state_dict": {}}, pictures, "folder")[2]
    saved = {"state_dict": {"memory_bank._bank": torch.ones(4, 2)}, "opt": {"dataset": "packed"}}
    own = {"names": resume.digest_of(["a", "b"])}
    assert nearest.banks(saved | {"data": own}, pictures, "folder")[0]
    for other in ({"data": {"names": "0"}}, {"opt": {"dataset": "cifar10_2views"}}):
        assert nearest.banks(saved | other, pictures, "folder")[0] == []


def test_neighbours_do_not_write_over_a_result(workspace, tmp_path):
    first = evaluate("ir", tmp_path / "out", "--nn-only")
    with pytest.raises(UsageError, match="already holds result-nn.json"):
        evaluate("ir", tmp_path / "out", "--nn-only")
    assert (
        evaluate("ir", tmp_path / "out", "--nn-only", "--overwrite")["own"]["knn_acc1"]
        == first["own"]["knn_acc1"]
    )


def test_neighbours_only(workspace, tmp_path, capsys):
    found = evaluate("ir", tmp_path, "--nn-only", "--knn-k", "5")["own"]
    assert {"knn_acc1", "bank_acc1"} <= found.keys() and "acc1" not in found
    assert (
        not list(tmp_path.glob("*/own/*.pth"))
        and "| own | 10 | 160 | 40 |" in capsys.readouterr().out
    )


# ----------------------------------------------------------------------------------------- transfer


def picture(path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (20 + seed % 3, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def make_dtd(root):
    base = root / "dtd" / "dtd"
    for split, numbers in (("train", (0, 1)), ("val", (2,)), ("test", (3,))):
        names = [f"{c}/{c}_{n}.jpg" for c in ("banded", "woven") for n in numbers]
        (base / "labels").mkdir(parents=True, exist_ok=True)
        (base / "labels" / f"{split}1.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            picture(base / "images" / name, i)
    return 6, 2, ["banded", "woven"]


def make_aircraft(root):
    base = root / "fgvc-aircraft-2013b" / "data"
    base.mkdir(parents=True)
    (base / "variants.txt").write_text("707-320\nA340-300\n")
    for split, numbers in (("trainval", "12"), ("test", "3")):
        (base / f"images_variant_{split}.txt").write_text(
            "".join(
                f"000{n}{c} {v}\n" for n in numbers for c, v in enumerate(("707-320", "A340-300"))
            )
        )
        for n in numbers:
            for c in range(2):
                picture(base / "images" / f"000{n}{c}.jpg", c)
    return 4, 2, ["707-320", "A340-300"]


def make_gtsrb(root):
    base = root / "gtsrb"
    for c in range(43):
        picture(base / "GTSRB" / "Training" / f"{c:05d}" / "00000_00000.ppm", c)
    with open(base / "GT-final_test.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerows([["Filename", "ClassId"], ["00000.ppm", 16], ["00001.ppm", 1]])
    for n in range(2):
        picture(base / "GTSRB" / "Final_Test" / "Images" / f"0000{n}.ppm", n)
    return 43, 2, [f"{c:02d}" for c in range(43)]


def make_pets(root):
    base = root / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for split, number in (("trainval", 1), ("test", 2)):
        (base / "annotations" / f"{split}.txt").write_text(
            f"Abyssinian_{number} 1 1 1\nboxer_{number} 2 2 1\n"
        )
        for i, name in enumerate(("Abyssinian", "boxer")):
            picture(base / "images" / f"{name}_{number}.jpg", i)
    return 2, 2, ["Abyssinian", "Boxer"]


def make_food(root):
    base = root / "food-101"
    (base / "meta").mkdir(parents=True)
    for split, number in (("train", 1), ("test", 2)):
        content = {c: [f"{c}/{number}"] for c in ("apple_pie", "waffles")}
        (base / "meta" / f"{split}.json").write_text(json.dumps(content))
        for i, c in enumerate(content):
            picture(base / "images" / c / f"{number}.jpg", i)
    return 2, 2, ["apple_pie", "waffles"]


def make_omniglot(root):
    for part, alphabet in (("background", "Greek"), ("evaluation", "Tibetan")):
        for character in ("character01", "character02"):
            for writer in (1, 16, 17, 20):
                picture(
                    root
                    / "omniglot-py"
                    / f"images_{part}"
                    / alphabet
                    / character
                    / f"0709_{writer:02d}.png",
                    writer,
                )
        (root / "omniglot-py" / f"images_{part}.zip").write_bytes(b"")
    names = [f"{a}/character0{c}" for a in ("Greek", "Tibetan") for c in (1, 2)]
    return 8, 8, names


def make_svhn(root):
    scipy_io = pytest.importorskip("scipy.io")
    for split, n in (("train", 3), ("test", 2)):
        pixels = np.zeros((32, 32, 3, n), dtype=np.uint8)
        scipy_io.savemat(
            root / f"{split}_32x32.mat", {"X": pixels, "y": np.array([[10], [1], [2]][:n])}
        )
    return 3, 2, [str(d) for d in range(10)]


def make_flowers(root):
    scipy_io = pytest.importorskip("scipy.io")
    base = root / "flowers-102"
    for n in range(1, 5):
        picture(base / "jpg" / f"image_{n:05d}.jpg", n)
    scipy_io.savemat(base / "imagelabels.mat", {"labels": np.array([[1, 102, 1, 102]])})
    # lists of two, as one number would be read as no list
    scipy_io.savemat(base / "setid.mat", {"trnid": [[1, 2]], "valid": [[3, 4]], "tstid": [[3, 4]]})
    return 4, 2, None


MAKERS = {
    "DTD": make_dtd,
    "FGVCAircraft": make_aircraft,
    "GTSRB": make_gtsrb,
    "OxfordIIITPet": make_pets,
    "Food101": make_food,
    "Omniglot": make_omniglot,
    "SVHN": make_svhn,
    "Flowers102": make_flowers,
}


@pytest.mark.parametrize("name", MAKERS)
def test_torchvision_sets_are_read(name, tmp_path, monkeypatch):
    """Tiny sets in torchvision's layout: numbers, label order, files, no picture on both sides."""
    for module in ("omniglot", "svhn", "flowers102"):  # their sums are those of the real files
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, *_: True)
    train, test, classes = MAKERS[name](tmp_path)
    both = transfer.open_both(name, str(tmp_path))
    assert (len(both[0]), len(both[1])) == (train, test) and both[0].classes == both[1].classes
    assert classes is None or both[0].classes == classes
    for pictures in both:
        assert 0 <= pictures.targets.min() and pictures.targets.max() < len(pictures.classes)
        how = dict(seed=0, device=torch.device("cpu"), shuffle=False, drop_last=False)
        loader = data.Loader(pictures, (eval_ring.recipe(views(), None, False),), 4, **how)
        assert sum(len(target) for _, target, _ in loader) == len(pictures)
    if name == "GTSRB":
        assert both[1].targets.tolist() == [16, 1]
    if name == "SVHN":
        assert both[0].targets.tolist() == [0, 1, 2]
    if name == "Flowers102":
        assert both[0].targets.tolist() == [0, 101, 0, 101]
    if name != "SVHN":
        assert name == "Flowers102" or not set(both[0].paths) & set(both[1].paths)
    if name == "Omniglot":
        assert {path[-6:-4] for path in both[0].paths} == {"01", "16"} and {
            p[-6:-4] for p in both[1].paths
        } == {
            "17",
            "20",
        }
        assert both[0].targets.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def views():
    return argparse.Namespace(
        method="ir",
        protocol="standard",
        augmentation="mocov2_32x32",
        input_res=16,
        eval_resize=None,
        view="Lab",
    )


def test_transfer_to_several_sets_in_one_table(workspace, tmp_path, capsys):
    """Class folders and a torchvision set; every result lies in its folder, and in a table."""
    make_dtd(tmp_path / "tv")
    flags = [
        "--transfer",
        "birds=BIRDS",
        "DTD",
        "--transfer-root",
        str(tmp_path / "tv"),
        "--cache-views",
        "1",
    ]
    found = evaluate("ir", tmp_path / "out", *flags)
    assert found.keys() == {"own", "birds", "DTD"}
    rows = json.loads((tmp_path / "out" / "ir_standard_seed_0" / "table.json").read_text())["rows"]
    assert [row["data"] for row in rows] == ["own", "birds", "DTD"] and [
        row["classes"] for row in rows
    ] == [10, 10, 2]
    for row in rows:
        assert row["acc1"] == pytest.approx(found[row["data"]]["acc1"], abs=1e-5)
        assert ("bank_acc1" in row) == (row["data"] == "own")
    assert "| DTD | 2 | 6 | 2 |" in capsys.readouterr().out
    assert (
        found["birds"]["knn_acc1"] == found["own"]["knn_acc1"]
    )  # the same pictures under another name
    with pytest.raises(UsageError, match="already holds current.pth"):
        evaluate("ir", tmp_path / "out", *flags)


@pytest.mark.parametrize("words, message", [
    (["DTDD"], "--transfer DTDD: no such folder, and no data set of that name; there are DTD"),
    (["nowhere"], "no data set of that name; there are FGVCAircraft, DTD, GTSRB"),
    (["birds=NOWHERE"], "NOWHERE: no such folder"),
    (["DTD", "DTD=elsewhere"], "--transfer DTD comes twice"),
    (["a/b=BIRDS"], "becomes a folder, so give one word"), (["data"], "data has no train/ folder"),
])  # fmt: skip
def test_names_and_paths_are_checked_first(workspace, words, message, capsys):
    says_no(
        eval_ring.parse_args, [*SMALL, "--model_path", "ir", "--transfer", *words], message, capsys
    )


@pytest.mark.parametrize("flags, message", [
    (["--protocol", "released", "--cache-views", "1"], "--cache-views: with --protocol released"),
    (["--transfer", "birds=BIRDS", "--resume", "x.pth"], "x.pth: with --transfer only auto"),
    (["--protocol", "theirs"], "invalid choice"),
    (["--transfer", "BIRDS", "--model_path="], "no such file"),
])  # fmt: skip
def test_flags_that_do_not_go_together(workspace, flags, message, capsys):
    if "--model_path=" in flags:
        with pytest.raises(UserError, match="no checkpoint|folder"):
            eval_ring.main([*SMALL, *flags])
        return
    says_no(eval_ring.parse_args, [*SMALL, "--model_path", "ir", *flags], message, capsys)


def test_what_is_missing_is_said(workspace, tmp_path, capsys, monkeypatch):
    says_no(eval_ring.parse_args, ["--model_path", "ir"], "no data: give --root", capsys)
    says_no(eval_ring.parse_args, ["--root", "DATA"], "no network: give --model_path", capsys)
    with pytest.raises(UserError, match="run ring/train_ring.py --demo first"):
        eval_ring.main(["--demo", "--device", "cpu"])
    from torchvision.datasets import dtd

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(dtd, "download_and_extract_archive", refuse)
    flags = ["--transfer", "DTD", "birds=BIRDS", "--transfer-root", str(tmp_path / "tv")]
    with pytest.raises(
        UserError,
        match=r"DTD is not in .* could not be downloaded \(no route to host\): fetch it where",
    ):
        evaluate("ir", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()  # nothing was begun
    with pytest.raises(UserError, match="found no backbone in .*other.pth"):
        torch.save({"epoch": 1}, tmp_path / "other.pth")
        evaluate(tmp_path / "other.pth", tmp_path / "out")


def test_the_demo(workspace, monkeypatch, capsys):
    """--demo finds the newest run of train_ring.py --demo."""
    (workspace / "runs" / "try-ring").mkdir(parents=True, exist_ok=True)
    (workspace / "runs" / "try-ring" / "pretrain_cmc_ring_folder").symlink_to(workspace / "cmc")
    eval_ring.main(
        ["--demo", "--device", "cpu", "--epochs", "1", "--cache-views", "1", "--input-res", "16"]
    )
    (done,) = (workspace / "runs" / "try-ring-linear").glob("*/own/result.json")
    assert done.parent.parent.name == "pretrain_cmc_ring_folder_standard"
    assert json.loads(done.read_text())["label"] == "CMC ring"
    shutil.rmtree(workspace / "runs" / "try-ring")  # other tests have no demo run
    assert "result: " in capsys.readouterr().out
