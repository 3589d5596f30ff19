"""Transfer to detection: VOC annotations, AP worked out by hand, the detector, whole runs.

The detector stands on the networks of all papers. Runs are stopped, resumed and made by two
processes; bad input is one line.
"""

import hashlib
import json
import os
import signal

import numpy as np
import pytest
import torch
import torchvision

pytest.importorskip("faster_coco_eval")

from conftest import equal, run_script, says_no
from PIL import ExifTags, Image
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import FrozenBatchNorm2d

from cmc import colour
from cmc import networks as cmc_networks
from common import UsageError, UserError, backbones, launch
from common.files import LOCK
from debiased.networks import Network as DebiasedNetwork
from feature_transform import checkpoints, detections, detector, eval_detection, voc, voc_batches
from feature_transform import voc_annotations as annotations
from preprocess import demo_voc
from ring import networks as ring_networks
from runner import checkpoint, layouts, loop

pytestmark = pytest.mark.usefixtures("plain_convolutions")

VIEW = voc_batches.View(0.5, (48, 64), 64)
SMALL = "-b 2 --iterations 4 --checkpoint_every 3 --min-size 32 48 --test-size 48".split()
SMALL += "--fpn-channels 8 --rois 16 -j 0 -p 1".split()
RUN = [
    "--demo",
    "--pretrained",
    "none",
    "--device",
    "cpu",
    "--seed",
    "0",
    "--save_path",
    "runs",
    *SMALL,
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder with data/demo-voc: 6 pictures to train on, 3 to test."""
    folder = tmp_path_factory.mktemp("voc")
    demo_voc.ensure(folder / "data" / "demo-voc", trainval=6, test=3, size=64)
    torch.manual_seed(5)
    torch.save(torchvision.models.resnet18().state_dict(), folder / "bare.pth")
    return folder


@pytest.fixture
def inside(tree, monkeypatch):
    monkeypatch.chdir(tree)
    return tree


def write(root, objects="", size="<size><width>40</width><height>30</height></size>", split="a"):
    """A tree with one picture of 40 x 30 pixels whose annotation holds `objects`."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    pixels = torch.arange(3 * 30 * 40).reshape(3, 30, 40).to(torch.uint8)
    torchvision.io.write_png(pixels, str(root / "JPEGImages" / "a.png"))
    (root / "Annotations" / "a.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    (root / "ImageSets" / "Main" / "test.txt").write_text(f"{split}\n")
    return root


def thing(name, *box, difficult=None):
    corners = "".join(f"<{key}>{v}</{key}>" for key, v in zip(annotations.CORNERS, box))
    flag = "" if difficult is None else f"<difficult>{difficult}</difficult>"
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    return f"<object><name>{name}</name>{flag}<bndbox>{corners}</bndbox>{part}</object>"


# ----------------------------------------------------------------------------------------- pictures


def test_boxes_count_pixels_from_one_and_belong_to_them(tmp_path):
    objects = (
        thing("cat", 1, 1, 40, 30)
        + thing("dog", 3, 2, 3, 2, difficult=1)
        + thing("dog", 0, 0, 41, 30.5)
    )
    pictures = voc.Pictures(
        [(write(tmp_path, objects), "test"), (tmp_path, "test")], ("cat", "dog")
    )
    assert len(pictures) == 2 and not pictures.faults
    found = pictures.objects[0]
    assert found.boxes.tolist() == [[0, 0, 40, 30], [2, 1, 3, 2], [0, 0, 40, 30]]
    assert found.labels.tolist() == [1, 2, 2] and found.difficult.tolist() == [False, True, False]
    plain, _ = pictures.decode(0)
    mirrored, there = pictures.decode(0, flip=True)
    assert torch.equal(mirrored, plain.flip(2)) and there.boxes.tolist()[1] == [37, 1, 38, 2]
    assert torch.equal(plain[:, 1:2, 2:3], mirrored[:, 1:2, 37:38])
    without = write(tmp_path / "no-size", thing("cat", 1, 1, 40, 30), size="")
    assert len(voc.Pictures([(without, "test")], ("cat",))) == 1
    wrong = write(tmp_path / "wrong", size="<size><width>50</width><height>30</height></size>")
    (fault,) = voc.Pictures([(wrong, "test")], ("cat",)).faults
    assert "its size is 50 x 30, but " in fault and "a.png has 40 x 30 pixels when" in fault


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("has_size", [True, False])
def test_a_picture_is_turned_as_its_exif_tag_says(tmp_path, orientation, has_size):
    shown = Image.fromarray(np.arange(30 * 40, dtype=np.uint8).reshape(30, 40)).convert("RGB")
    stored = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[orientation]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    sizes = {} if has_size else {"size": ""}
    root = write(tmp_path, thing("cat", 2, 3, 40, 30), **sizes)
    picture = shown if stored is None else shown.transpose(stored)
    picture.save(root / "JPEGImages" / "a.png", exif=exif)
    pictures = voc.Pictures([(root, "test")], ("cat",))
    pixels, _ = pictures.decode(0)
    assert not pictures.faults
    assert torch.equal(pixels, torch.from_numpy(np.array(shown)).permute(2, 0, 1))


def test_annotations_in_a_namespace_are_read(tmp_path):
    root = write(tmp_path, thing("cat", 2, 3, 40, 30, difficult=1))
    path = root / "Annotations" / "a.xml"
    plain = annotations.read_annotation(path, "", (40, 30), ("cat",))
    path.write_text(path.read_text().replace("<annotation>", '<annotation xmlns="http://x/y">'))
    in_space = annotations.read_annotation(path, "", (40, 30), ("cat",))
    assert len(plain.labels) == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, in_space))


@pytest.mark.parametrize("objects", ["", thing("cat", 2, 3, 40, 30, difficult=1)])
def test_a_split_without_objects_that_count_is_refused(tmp_path, objects):
    pictures = voc.Pictures([(write(tmp_path, objects), "test")], ("cat",))
    with pytest.raises(UsageError, match="the 1 pictures of split test have no objects"):
        pictures.require_objects("test")
    path = write(tmp_path / "other", thing("cat", 2, 3, 40, 30))
    voc.Pictures([(path, "test")], ("cat",)).require_objects("test")


@pytest.mark.parametrize(
    "objects, message",
    [
        (
            thing("cow", 1, 1, 9, 9),
            "object of class 'cow', which is not one of cat, dog (name all classes with --classes)",
        ),
        (
            thing("cat", 5, 5, 60, 9),
            "the box of its cat (xmin 5, ymin 5, xmax 60, ymax 9) is outside the picture of "
            "40 x 30",
        ),
        (thing("cat", -5, 5, 6, 9), "is outside the picture"),
        (thing("cat", "nan", 5, 6, 9), "is outside the picture"),
        (
            thing("cat", 9, 5, 8, 9),
            "the box of its cat (xmin 9, ymin 5, xmax 8, ymax 9) has no size",
        ),
        (thing("cat", 9, 5, 12), "its cat has no bndbox of four numbers"),
        (thing("cat", 9, 5, 12, "x"), "its cat has no bndbox of four numbers"),
        ("<object>", "not a whole XML file"),
    ],
)
def test_a_broken_annotation_is_named(tmp_path, objects, message):
    (fault,) = voc.Pictures([(write(tmp_path, objects), "test")], ("cat", "dog")).faults
    assert fault.startswith(f"{tmp_path}/Annotations/a.xml: ") and message in fault


@pytest.mark.parametrize(
    "word, is_difficult",
    [("Unspecified", False), ("0.0", False), ("false", False), (" ", False), ("True", True)]
    + [("1.0", True), ("maybe", None)],
)
def test_the_words_for_difficult(tmp_path, word, is_difficult):
    tree = write(tmp_path, thing("cat", 1, 1, 9, 9, difficult=word))
    pictures = voc.Pictures([(tree, "test")], ("cat",))
    if is_difficult is None:
        assert "its cat has difficult 'maybe', which must be 0 or 1" in pictures.faults[0]
    else:
        assert pictures.objects[0].difficult.tolist() == [is_difficult]


@pytest.mark.parametrize("encoding", ["nosuch", "gb2312", "utf-32", "rot13", "punycode", "x" * 999])
def test_an_encoding_that_cannot_be_read_is_a_fault(tmp_path, encoding):
    tree = write(tmp_path)
    text = f'<?xml version="1.0" encoding="{encoding}"?><annotation>\u00fc</annotation>'
    (tree / "Annotations" / "a.xml").write_bytes(text.encode())
    (fault,) = voc.Pictures([(tree, "test")], ("cat",)).faults
    assert "a.xml: not a whole XML file in UTF-8 (" in fault


def test_names_in_a_split(tmp_path):
    """Names with suffixes, spaces and numbers after them, a byte order mark, files beside them."""
    tree = write(tmp_path, split="\ufeffa.jpg  1\nsea horse -1\nthe 1\nv1.2")
    for name in ("sea horse", "the 1", "the", "v1.2"):
        for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".png")):
            original = tree / folder / f"a{suffix}"
            (tree / folder / f"{name}{suffix}").write_bytes(original.read_bytes())
    for suffix in (".json", ".txt", ".gif", ".webp"):
        (tree / "JPEGImages" / f"a{suffix}").write_text("{}")
    Image.new("RGB", (40, 30)).save(tree / "JPEGImages" / "a.jpg")
    pictures = voc.Pictures([(tree, "test")], ("cat",))
    names = [os.path.basename(path) for path in pictures.paths]
    assert names == ["a.jpg", "sea horse.png", "the 1.png", "v1.2.png"] and not pictures.faults


def broken_tree(root):
    """A tree with one whole picture, a, and one of each fault; c cannot be decoded."""
    tree = write(root, thing("cat", 1, 1, 9, 9), split="a\nb\nc\nd\ne\nf")
    for name in "bcde":
        picture = (tree / "JPEGImages" / "a.png").read_bytes()
        (tree / "JPEGImages" / f"{name}.png").write_bytes(picture[: -30 if name == "c" else None])
        annotation = (tree / "Annotations" / "a.xml").read_text()
        (tree / "Annotations" / f"{name}.xml").write_text(annotation)
    objects = thing("Cat", 1, 1, 9, 9) + thing("cat", 1, 1, 99, 9)
    (tree / "Annotations" / "b.xml").write_text(f"<annotation>{objects}</annotation>")
    (tree / "Annotations" / "d.xml").unlink()
    (tree / "JPEGImages" / "e.png").write_text("no picture")
    return tree


def test_all_faults_are_in_one_report_or_left_out(tmp_path, capsys):
    tree = broken_tree(tmp_path)
    flags = f"--data_folder {tree} --split test --classes cat --pretrained none".split()
    with pytest.raises(UserError, match="4 pictures have faults, .* with --skip-bad-images"):
        voc.open_sets(eval_detection.parse_args(flags), is_main=True)
    faults = capsys.readouterr().err.splitlines()
    assert "b.xml: its class 'Cat' is written 'cat' in the list of classes; the box" in faults[0]
    assert "d.xml: no such file or directory" in faults[1] and "cannot read" in faults[2]
    assert "test.txt names f, which " in faults[3] and len(faults) == 4
    args = eval_detection.parse_args([*flags, "--skip-bad-images"])
    pictures, _ = voc.open_sets(args, is_main=True)
    assert capsys.readouterr().err.splitlines()[:4] == faults
    assert [os.path.basename(path) for path in pictures.paths] == ["a.png", "c.png"]
    loader = voc_batches.Loader(pictures, VIEW, (2, 2), 2, 0, launch.Process(), 0)
    assert [rows.tolist() for *_, rows in loader] == [[0, 0], [0, 0]]
    assert loader.bad_images == {pictures.paths[1]}
    found = {0: {"boxes": torch.tensor([[0.0, 0, 9, 9]]), "labels": torch.ones(1).long()}}
    found[0]["scores"] = torch.ones(1)
    assert detections.average_precision(pictures, found)["AP"] == 100


def test_a_tree_that_is_none(tmp_path):
    def no(root, message, split="test"):
        with pytest.raises(UsageError) as caught:
            voc.Pictures([(root, split)], ("cat",))
        assert message in str(caught.value)

    no(tmp_path / "x", "has no Annotations/*.xml, as Pascal VOC has")
    whole = write(tmp_path / "VOCdevkit" / "VOC2007", thing("cat", 1, 1, 9, 9))
    no(tmp_path / "VOCdevkit", f"give the folders in it, such as {whole}")
    no(whole, "the splits there are test", split="trainval")
    no(write(tmp_path / "b", split=""), "names no pictures")
    no(write(tmp_path / "twice", split="a 1\na -1"), "test.txt names a twice")
    half = tmp_path / "half" / "VOC2007" / "Annotations"
    half.mkdir(parents=True)
    with pytest.raises(UsageError, match="as Pascal VOC has$"):  # the folder in it is no tree
        voc.Pictures([(half.parent.parent, "test")], ("cat",))
    (whole / "JPEGImages" / "a.png").write_bytes(b"no picture")
    assert "cannot read the picture " in voc.Pictures([(whole, "test")], ("cat",)).faults[0]
    pictures = voc.Pictures([(broken_tree(tmp_path / "broken"), "test")], ("cat",))
    with pytest.raises(UserError, match="cannot read the picture .*c.png"):
        next(voc_batches.decoded(pictures, [[(1, False)]], 0, torch.device("cpu")))


def test_the_demo_set_is_the_same_every_time_and_its_boxes_are_tight(tree, tmp_path):
    again = demo_voc.ensure(tmp_path / "again", trainval=6, test=3, size=64)

    def digest(root):
        files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != LOCK)
        return [(p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]

    assert (
        digest(again) == digest(tree / "data" / "demo-voc") and len(digest(again)) == 9 + 9 + 2 + 1
    )
    drawn = [demo_voc.draw(0, i, 32) for i in range(12)]
    assert {name for _, objects in drawn for name, *_ in objects} == set(demo_voc.CLASSES)
    assert {difficult for _, objects in drawn for *_, difficult in objects} == {True, False}
    number = next(i for i, (_, objects) in enumerate(drawn) if len(objects) == 1)
    pixels, [(_, (left, top, right, bottom), _)] = demo_voc.draw(0, number, 64)
    outside = torch.tensor(pixels).float().mean(2)
    within = outside[top - 1 : bottom, left - 1 : right].clone()
    outside[top - 1 : bottom, left - 1 : right] = float("nan")
    level = outside[~outside.isnan()]  # shapes are lighter than the ground, or darker
    beyond = (within > level.max()) if within.mean() > level.mean() else (within < level.min())
    assert beyond[[0, -1]].any(1).all() and beyond[:, [0, -1]].any(0).all()
    with pytest.raises(UsageError, match="is not a demo data set"):
        demo_voc.ensure(write(tmp_path / "other"))
    (again / demo_voc.MARK).rename(again / demo_voc.UNFINISHED)  # as a crash leaves it
    (again / "JPEGImages" / "000002.jpg").write_bytes(b"")
    assert digest(demo_voc.ensure(again, trainval=6, test=3, size=64)) == digest(
        tree / "data" / "demo-voc"
    )


def test_steps_of_two_processes_share_the_pictures_of_one(inside):
    pictures = voc.Pictures([("data/demo-voc", "trainval")], demo_voc.CLASSES)

    def plans(ranks, batch, steps):
        loaders = [
            voc_batches.Loader(pictures, VIEW, (100, 4), batch, 0, launch.Process(r, ranks), 0)
            for r in range(ranks)
        ]
        return [sorted(pair for loader in loaders for pair in loader.plan(step)) for step in steps]

    one = plans(1, 4, range(12))
    assert one == plans(2, 2, range(12)) and one[5:] == plans(1, 4, range(5, 12))
    assert sorted(row for step in one[:3] for row, _ in step) == sorted(
        2 * [*range(6)]
    )  # two rounds
    assert {mirrored for step in one for _, mirrored in step} == {True, False}
    loader = voc_batches.Loader(pictures, VIEW, (10, 4), 4, 0, launch.Process(), 0)
    loader.set_epoch(3)
    assert len(loader) == 2 and [rows.tolist() for *_, rows in loader] == [
        [r for r, _ in loader.plan(s)] for s in (8, 9)
    ]


# ----------------------------------------------------------------------------------------------- AP


def evaluated(objects, seen_in, classes=("cat", "dog", "cow")):
    """Return average_precision of pictures with `objects` and detections `seen_in`.

    They are [(class, box, difficult)] and [(class, box, score)] of each picture.
    """
    pictures = voc.Pictures((), classes)
    found = {}
    for row, (things, seen) in enumerate(zip(objects, seen_in, strict=True)):
        pictures.paths.append(str(row))
        columns = [[classes.index(name) + 1, box, flag] for name, box, flag in things]
        labels, boxes, flags = zip(*columns) if columns else ((), (), ())
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        pictures.objects.append(
            voc.Objects(boxes, torch.tensor(labels).long(), torch.tensor(flags).bool())
        )
        labels, boxes, scores = (
            zip(*[(classes.index(n) + 1, b, s) for n, b, s in seen]) if seen else ((), (), ())
        )
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        found[row] = dict(
            labels=torch.tensor(labels).long(), boxes=boxes, scores=torch.tensor(scores)
        )
    return detections.average_precision(pictures, found)


A, B, C = (10, 10, 30, 50), (50, 10, 90, 50), (10, 60, 90, 90)


def test_ap_of_a_perfect_and_of_a_shifted_detector():
    objects = [[("cat", A, False), ("dog", B, False)], [("cat", C, False)]]
    perfect = [[(n, b, 0.9) for n, b, _ in things] for things in objects]
    right = evaluated(objects, perfect)
    assert right == dict(
        **dict.fromkeys(("AP", "AP50", "AP75", "AP_11", "AP50_11", "AP75_11"), 100.0),
        classes={"cat": 100.0, "dog": 100.0},
    )  # no cow
    # moved by a fifth of the width: intersection over union is .8 / 1.2 = .667, right at .5,
    # .55, .6 and .65
    shifted = [
        [(n, (b[0] + (b[2] - b[0]) / 5, b[1], b[2] + (b[2] - b[0]) / 5, b[3]), s) for n, b, s in p]
        for p in perfect
    ]
    moved = evaluated(objects, shifted)
    assert moved["AP50"] == 100 and moved["AP75"] == 0 and moved["AP"] == pytest.approx(40)
    swapped = [[({"cat": "dog", "dog": "cat"}[n], b, s) for n, b, s in p] for p in perfect]
    assert evaluated(objects, swapped)["AP50"] == 0 == evaluated(objects, [[], []])["AP"]


def test_ap_of_a_curve_worked_out_by_hand():
    objects = [[("cat", A, False), ("cat", B, False)], []]
    seen = [[("cat", A, 0.9), ("cat", B, 0.7)], [("cat", A, 0.8)]]
    # precision 1 to recall .5, then 2/3: 51 of 101 recalls and 6 of 11 are at most .5
    found = evaluated(objects, seen)
    assert found["AP50"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    assert found["AP50_11"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)
    twice = evaluated(
        [objects[0]], [[*seen[0], ("cat", (10, 10, 30, 49), 0.8)]]
    )  # the second on one object is false
    assert twice == found


def test_difficult_objects_are_ignored_as_in_voc():
    objects = [[("cat", A, False), ("cat", B, True)], []]
    only = evaluated(objects, [[("cat", A, 0.5)], []])
    assert only["AP"] == 100  # the difficult one need not be found
    twice = [("cat", B, 0.9), ("cat", (50, 10, 90, 49), 0.8), ("cat", A, 0.5)]
    assert evaluated(objects, [twice, []])["AP50"] == 100  # and any number may lie on it
    inside = [("cat", (50, 10, 65, 30), 0.9), ("cat", A, 0.5)]  # in it, but hardly overlapping
    assert evaluated(objects, [inside, []])["AP50"] == pytest.approx(50)
    with pytest.raises(UserError, match="so AP is undefined"):
        evaluated([[("cat", B, True)]], [[]])


def test_the_sheet_shows_what_is_there_and_what_was_found(inside, tmp_path):
    pictures = voc.Pictures([("data/demo-voc", "test")], demo_voc.CLASSES)

    def orange(score):
        found = {
            row: dict(boxes=o.boxes, labels=o.labels, scores=o.labels * 0 + score)
            for row, o in enumerate(pictures.objects)
        }
        detections.draw(tmp_path / "x.png", pictures, found)
        red, green, blue = torchvision.io.decode_image(str(tmp_path / "x.png"))[:3].int()
        return int(((red - 255).abs() + (green - 127).abs() + (blue - 14).abs() < 9).sum())

    assert orange(0.4) == 0 and orange(0.9) > 300
    with pytest.raises(OSError, match="x.png/y.png"):
        detections.draw(
            tmp_path / "x.png" / "y.png",
            pictures,
            {0: dict(boxes=[], labels=[], scores=torch.zeros(0))},
        )


# ----------------------------------------------------------------------------------------- networks


def build(saved, norm="frozen", **how):
    saved = saved if isinstance(saved, checkpoint.Saved) or saved is None else as_saved(saved)
    state = how.pop("state", None) or layouts.backbone(saved)
    return detector.build(
        saved, state, "the file", 2, VIEW, norm=norm, channels=8, rois=16, **how
    ).eval()


def as_saved(content):
    saved = checkpoint.Saved.__new__(checkpoint.Saved)
    dict.__init__(saved, content)
    saved.path = "the file"
    return saved


def test_it_is_the_detector_of_torchvision():
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18()
    ours = build(resnet.state_dict())
    theirs = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    body = _resnet_fpn_extractor(theirs, 5)
    body.fpn, body.out_channels = (
        torchvision.ops.FeaturePyramidNetwork([64, 128, 256, 512], 8, body.fpn.extra_blocks),
        8,
    )
    head = dict(box_head=TwoMLPHead(8 * 49, 32), box_predictor=FastRCNNPredictor(32, 3))
    model = FasterRCNN(body, min_size=64, max_size=64, **head).eval()
    model.load_state_dict(ours.state_dict())  # strictly: the same names
    images = [torch.rand(3, 60, 50), torch.rand(3, 40, 70)]
    for mine, its in zip(ours(images), model(images)):
        assert len(its["boxes"]) > 1
        torch.testing.assert_close(mine, its)


def maps_of(network, images):
    """The four maps of torchvision's or this project's ResNet."""
    return [backbones.feature(network, images, layer) for layer in (2, 3, 4, 5)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.resnet18(),
        lambda: torchvision.models.resnext50_32x4d(),
        lambda: backbones.build("resnet18", small_stem=True),
        lambda: backbones.WidthResNet(50, 3, 0.5),
    ],
    ids=["resnet18", "resnext50", "small stem", "half as wide"],
)
def test_the_shapes_tell_what_network_it_is(make):
    network, images = make().eval(), torch.rand(1, 3, 64, 64)
    saved = {
        "arch": "x",
        "state_dict": layouts.add_prefix(network.state_dict(), "module.encoder_q."),
    }
    body = build(saved).backbone.body
    for mine, its, channels in zip(body(images), maps_of(network, images), body.maps, strict=True):
        torch.testing.assert_close(mine, its)
        assert mine.shape[1] == channels


def test_one_network_of_every_paper_on_the_colours_it_was_trained_on():
    images = torch.rand(1, 3, 32, 32)
    resnet = torchvision.models.resnet18().eval()
    key = torchvision.models.resnet18().eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = (images - mean[:, None, None]) / std[:, None, None]
    ours = {"model": layouts.add_prefix(resnet.state_dict(), "module.encoder."), "opt": {}}
    ours["model"] |= {"module.head.0.weight": torch.zeros(2, 2)}
    ours["model_ema"] = layouts.add_prefix(key.state_dict(), "encoder.")
    network = build(ours)
    torch.testing.assert_close(network.transform.normalize(images[0]), normal[0])
    torch.testing.assert_close(network.backbone.body(normal), maps_of(resnet, normal))

    torch.manual_seed(1)
    debiased, ring = (
        DebiasedNetwork("resnet18", 16, True).eval(),
        ring_networks.build_network("resnet18", 16, True).eval(),
    )
    network = build(
        {
            "state_dict": layouts.add_prefix(debiased.state_dict(), "module."),
            "opt": {"tau_plus": 0.1},
        }
    )
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    torch.testing.assert_close(
        network.transform.normalize(images[0]),
        (images[0] - mean[:, None, None]) / std[:, None, None],
        rtol=1e-4,
        atol=1e-5,
    )
    assert torch.allclose(
        network.backbone.body(images)[3].mean((2, 3)), debiased.f(images).flatten(1), atol=1e-5
    )
    network = build({"state_dict": layouts.add_prefix(ring.state_dict(), "model."), "opt": {}})
    torch.testing.assert_close(network.backbone.body(images), maps_of(ring, images))


def test_the_towers_of_cmc_stand_side_by_side():
    images, views = torch.rand(2, 3, 64, 64), colour.default_views("YCbCr")
    towers = cmc_networks.build_network("resnet18v1", views, 128, False).eval()
    model = layouts.add_prefix(towers.state_dict(), "encoder.module.")
    network = build({"model": model, "opt": {"view": "YCbCr", "model": "resnet18v1"}})
    seen = colour.Views(tuple(views)).apply(images, {})
    torch.testing.assert_close(network.transform.normalize(images[0]), seen[0])
    maps = [torch.cat(backbones.feature(towers, seen, layer), 1) for layer in (2, 3, 4, 5)]
    body = network.backbone
    for i, expected in enumerate(maps):
        parts = [
            body.body[name](part)[i]
            for name, part in zip(body.names, seen.split(body.in_channels, 1))
        ]
        torch.testing.assert_close(torch.cat(parts, 1), expected)
    assert body(seen)["0"].shape == (2, 8, 16, 16) and network(list(images))
    with pytest.raises(
        UserError, match="does not say which channels its towers ab_to_l and l_to_ab look at"
    ):
        build({"model": model, "opt": {"view": "YCbCr", "views": "Y,Cb,Cr"}})

    published = {
        f"encoder{i}.{k}": v
        for i, side in ((1, "l_to_ab"), (2, "ab_to_l"))
        for k, v in getattr(towers, side).state_dict().items()
    }
    network = build({"model": published})
    ydbdr = colour.ToColour("YDbDr").apply(images[:1], {})[0]
    mean, std = torch.tensor([0.457, -0.082, -0.052]), torch.tensor([0.5, 1.331, 1.333])
    torch.testing.assert_close(
        network.transform.normalize(images[0]), (ydbdr - mean[:, None, None]) / std[:, None, None]
    )
    assert network.backbone.in_channels == [1, 2]


def test_what_is_no_resnet_is_refused(tmp_path):
    for state, message in (
        (
            torchvision.models.squeezenet1_1().state_dict(),
            "this must be a ResNet, but the file holds another network",
        ),
        (
            {"conv1.weight": torch.zeros(2, 3, 7, 7), "fc.weight": torch.zeros(2, 2)},
            "this must be a ResNet",
        ),
        (backbones.WidthResNet(18, 1).state_dict(), "the file takes 1 channels, 3 are expected"),
        (
            {**torchvision.models.resnet18().state_dict(), "layer4.1.bn2.bias": torch.zeros(3)},
            "does not fit",
        ),
    ):
        with pytest.raises(UserError, match=message):
            build(state)
    alexnet = cmc_networks.build_network(
        "alexnet", colour.default_views("Lab"), 128, False
    ).state_dict()
    with pytest.raises(UserError, match="this must be a ResNet"):
        build({"model": layouts.add_prefix(alexnet, "encoder."), "opt": {"view": "Lab"}})
    for content, flags, message in (
        (
            {"epoch": 1, "state_dict": {"x.weight": torch.zeros(2)}},
            [],
            "found no backbone in .*x.pth",
        ),
        ({"classifier": {"fc.weight": torch.zeros(2)}}, [], "is a classifier without its network"),
        (torchvision.models.resnet18().state_dict(), ["--use_ema"], "has no model_ema"),
    ):
        torch.save(content, tmp_path / "x.pth")
        args = eval_detection.parse_args(
            ["--data_folder", "x", "--pretrained", str(tmp_path / "x.pth"), *flags]
        )
        with pytest.raises(UserError, match=message):
            checkpoints.read_resnet(args)


# -------------------------------------------------------------------------------------------- a run


def state(name):
    return checkpoint.load(f"runs/{name}/current.pth")


def weights(saved):
    return {key: saved[key] for key in ("model", "optimizer", "generators", "global_step", "epoch")}


def stopped(monkeypatch, at: int) -> int:
    """The exit code of a run that gets a signal with its batch number `at`."""
    decoded = voc_batches.decoded

    def counted(*how):
        for number, batch in enumerate(decoded(*how), 1):
            if number == at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(voc_batches, "decoded", counted)
        with pytest.raises(SystemExit) as left:
            eval_detection.main([*RUN, "--name", "b"])
    return left.value.code


def test_a_run_that_was_stopped_goes_on_bit_by_bit(inside, monkeypatch, capsys):
    eval_detection.main([*RUN, "--name", "a", "--show", "sheet.png"])
    said = capsys.readouterr().out
    assert (
        "View(flip=0.5, min_size=(32, 48)" in said and "result: AP " in said and "sheet.png" in said
    )
    sheet = torchvision.io.decode_image("sheet.png")
    assert sheet.shape[0] in (3, 4) and sheet.float().std() > 10
    result = json.loads((inside / "runs/a/result.json").read_text())
    assert {"AP", "AP50", "AP75", "AP50_11", "classes", "command", "commit"} <= result.keys()
    assert (
        result["seed"] == 0
        and result["arch"] == "resnet18-FPN"
        and result["label"] == "random weights"
    )
    whole = state("a")
    assert (whole["global_step"], whole["epoch"]) == (4, 2)  # the second part is shorter
    records = [
        json.loads(line) for line in (inside / "runs/a/metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in records] == [1, 2, 3, 4] and all(0 < r["loss"] < 20 for r in records)
    parts = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
    assert records[0]["loss"] == pytest.approx(sum(records[0][part] for part in parts), abs=1e-5)

    assert stopped(monkeypatch, at=2) == 128 + signal.SIGTERM
    assert state("b")["step"] == 2 and not (inside / "runs/b/result.json").exists()
    torch.rand(7)  # the run's own draws are restored
    eval_detection.main([*RUN, "--name", "b", "--resume", "auto"])
    assert (
        equal(weights(state("b")), weights(whole))
        and "resumed runs/b/current.pth: epoch 0, step 2" in capsys.readouterr().out
    )
    again = json.loads((inside / "runs/b/result.json").read_text())
    assert {k: again[k] for k in ("AP", "AP50", "classes")} == {
        k: result[k] for k in ("AP", "AP50", "classes")
    }

    (inside / "runs/b/result.json").unlink()  # of a finished run the test is made again
    eval_detection.main([*RUN, "--name", "b", "--resume", "auto"])
    assert (
        "nothing is left to train" in capsys.readouterr().out
        and (inside / "runs/b/result.json").exists()
    )
    for flags, message in (
        (
            ["--classes", "disc,heart,square,star,cow"],
            "--classes data/demo-voc/classes.txt, this run has disc,heart",
        ),
        (["--iterations", "8"], "--iterations 4, this run has 8"),
        (["--norm", "plain"], "--norm sync, this run has plain"),
    ):
        with pytest.raises(UserError) as caught:
            eval_detection.main([*RUN, "--name", "b", "--resume", "auto", *flags])
        assert message in str(caught.value)
    torch.save(torchvision.models.resnet18().state_dict(), "other.pth")
    with pytest.raises(
        UserError, match="started from another network .none.: give that to --pretrained"
    ):
        eval_detection.main([*RUN, "--name", "b", "--resume", "auto", "--pretrained", "other.pth"])


def test_batch_norm_is_trained_or_frozen(inside, capsys):
    resnet = torch.load("bare.pth")
    eval_detection.main(
        [
            *RUN,
            "--pretrained",
            "bare.pth",
            "--norm",
            "frozen",
            "--name",
            "frozen",
            "--iterations",
            "1",
            "--test-split",
            "trainval",
        ]
    )
    assert "warning: 6 of the 6 test pictures are trained on" in capsys.readouterr().out
    model = state("frozen")["model"]
    for key, value in resnet.items():
        if ("bn" in key or "downsample.1" in key) and "num_batches" not in key:
            assert torch.equal(model[f"backbone.body.{key}"], value), key
    assert not torch.equal(model["backbone.body.conv1.weight"], resnet["conv1.weight"])
    assert "backbone.fpn.inner_blocks.0.1.weight" not in model
    saved = state("frozen")
    assert saved["network"] == "bare.pth" and saved["arch"] == "resnet18"
    eval_detection.main(
        [*RUN, "--pretrained", "bare.pth", "--amp", "--name", "trained", "--iterations", "1"]
    )
    assert "are trained on" not in capsys.readouterr().out
    model = state("trained")["model"]
    assert (
        model["backbone.body.bn1.num_batches_tracked"] == 1
        and "backbone.fpn.inner_blocks.0.1.weight" in model
    )
    groups = state("trained")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1e-4, 0] and len(
        groups[1]["params"]
    ) == 2 * (20 + 8)


def test_two_processes(inside):
    done = run_script(
        "feature_transform/eval_detection.py",
        *RUN,
        "--nproc",
        2,
        "--norm",
        "frozen",
        "--pretrained",
        "bare.pth",
        "--name",
        "two",
        cwd=inside,
    )
    assert done.returncode == 0, done.stderr
    assert "cpu x 2" in done.stdout and done.stdout.count("result: ") == 1
    saved = state("two")
    assert saved["global_step"] == 4 and len(saved["generators"]) == 2
    for flags, message in (
        (RUN, "--norm sync: PyTorch synchronises batch-norm between GPUs only"),
        ([*RUN, "--norm", "plain"], "--min-size 32"),
    ):
        with pytest.raises(UsageError, match=message):
            eval_detection.build_network(eval_detection.parse_args(flags), 4, launch.Process(0, 2))


def test_the_schedule_is_the_published_one_and_follows_the_batch(tmp_path, capsys):
    def parse(*flags):
        return eval_detection.parse_args(
            ["--data_folder", "VOC2007", "VOC2012", "--pretrained", "x", *flags]
        )

    args = parse()
    assert (args.batch_size, args.learning_rate, args.iterations, args.milestones) == (
        16,
        0.02,
        24000,
        (18000, 22000),
    )
    assert (
        args.min_size == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
        and args.test_size == 800
    )
    rates = [
        eval_detection.learning_rate(args, loop.At(0, 0.0, i))
        for i in (0, 50, 100, 17999, 18000, 22000)
    ]
    assert rates == pytest.approx([2e-5, 2e-5 + 0.5 * (0.02 - 2e-5), 0.02, 0.02, 0.002, 0.0002])
    args = parse("-b", "4")
    assert (args.learning_rate, args.iterations, args.milestones) == (0.005, 96000, (72000, 88000))
    args = parse("-b", "4", "--lr", "0.01", "--iterations", "10", "--steps", "")
    assert (args.learning_rate, args.iterations, args.milestones) == (0.01, 10, ())
    for flags, message in (
        ([], "no data: give --data_folder VOC2007 VOC2012"),
        (["--data_folder", "x"], "no network: give --pretrained CHECKPOINT, or --pretrained none"),
        (
            ["--data_folder", "x", "--pretrained", "none", "--norm", "frozen"],
            "--norm frozen needs a network",
        ),
        (
            ["--data_folder", "x", "--pretrained", "none", "--norm", "group"],
            "invalid choice: 'group'",
        ),
        (["--data_folder", "x", "--pretrained", "none", "--min-size", "0"], "0 must be at least 1"),
    ):
        says_no(eval_detection.parse_args, flags, message, capsys)
    assert voc.class_names("") == list(voc.CLASSES) and len(voc.CLASSES) == 20
    listed = tmp_path / "classes.txt"
    listed.write_text("# animals\ncat\n\n  # and\nsea horse\n")
    assert voc.class_names(str(listed)) == ["cat", "sea horse"]
    for missing in ("nosuch.txt", "no/such"):
        with pytest.raises(UsageError, match=f"--classes {missing}: no such file"):
            voc.class_names(missing)
    listed.write_text("cat\nroot:$6$secret:19000:0:99999:7:::\n")
    with pytest.raises(UsageError, match="line 2 is not a name") as error:
        voc.class_names(str(listed))
    assert "secret" not in str(error.value)
    with pytest.raises(UsageError, match="--classes: a comes twice"):
        voc.class_names("a, b,a")


def test_runs_and_kept_networks_have_folders_of_their_own():
    names = ("moco", "cmc-ycbcr", "/x/runs/a/current.pth", "/x/runs/b/current.pth", "none")
    found = [
        eval_detection.run_name(eval_detection.parse_args(["--data_folder", "x", *flags]))
        for flags in (
            *(["--pretrained", name] for name in names),
            ["--pretrained", "none", "--arch", "resnet18"],
        )
    ]
    heads = [name.partition("_norm_")[0] for name in found]
    assert heads == ["moco", "cmc-ycbcr", "a", "b", "scratch_resnet50", "scratch_resnet18"]
    with pytest.raises(UsageError, match="--arch: the checkpoint determines the network"):
        eval_detection.parse_args(
            ["--data_folder", "x", "--pretrained", "moco", "--arch", "resnet18"]
        )
