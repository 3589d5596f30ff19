"""Object detection on pictures in the layout of Pascal VOC: what is in them, batches of them, AP, and a sheet to look at.

ROOT/Annotations/ID.xml     the objects of a picture: name, bndbox (1-based, inclusive), difficult
ROOT/ImageSets/Main/SPLIT.txt   IDs, one a line (what follows an ID is not looked at)
ROOT/JPEGImages/ID.jpg
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch
from faster_coco_eval.core import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.ops import box_iou

from common import UsageError, UserError, files, printable, sets
from common.data import quiet_worker

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CORNERS = ("xmin", "ymin", "xmax", "ymax")
RECALLS = 10  # of COCO's 101 recalls every tenth: the eleven of VOC 2007
DETECTIONS = 100  # of a picture at most


def class_names(text: str) -> list[str]:
    """Those of --classes: "a,b", or a file of one a line; VOC's where it is empty."""
    if os.path.isfile(text):
        text = ",".join(Path(text).read_text(errors="replace").splitlines())
    names = [name.strip() for name in text.split(",") if name.strip()] or list(CLASSES)
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--classes: {twice[0]} is there twice")
    return names


class Objects(NamedTuple):
    """Of one picture: boxes (n, 4) float32 (x1, y1, x2, y2) in pixels, from 0 at the left and upper edge to width and height;
    labels (n,) from 1, for 0 is the background; difficult (n,): VOC does not count whether they are found."""

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


class Pictures:
    """The pictures of the splits `(root, split)` in order, and their objects. classes: names in label order.

    Raises UsageError for a folder that is not VOC's or a split without pictures, UserError for an annotation that is broken.
    """

    def __init__(self, places: Sequence[tuple[str, str]], classes: Sequence[str]):
        self.classes, self.notes, self.paths, self.objects, self.sizes = list(classes), [], [], [], []
        for root, split in places:
            self._open(Path(root), split)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, row: int) -> str:
        return self.paths[row]

    def _open(self, root: Path, split: str) -> None:
        for part, what in (("Annotations", "*.xml"), ("ImageSets/Main", "*.txt"), ("JPEGImages", "*.jpg")):
            if not (root / part).is_dir():
                inside = [p for p in (*sorted(root.glob("VOC*")), *sorted(root.glob("*/VOC*"))) if p.is_dir()]
                hint = f"; give the folders in it, such as {inside[0]}" if inside else ""
                raise UsageError(f"{root}: no {part}/{what} in it, as Pascal VOC has{hint}")
        names = root / "ImageSets" / "Main" / f"{split}.txt"
        try:
            ids = [line.split()[0] for line in names.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            known = [p.stem for p in sorted(names.parent.glob("*.txt")) if "_" not in p.stem]
            why = getattr(error, "strerror", None) or "not a text file"
            raise UsageError(f"{names}: {why}; the splits there are {sets.few(known) or 'none'}") from None
        if not ids:
            raise UsageError(f"{names}: a split without pictures; expected one picture's name a line")
        pictures = {p.stem: p for p in sorted((root / "JPEGImages").iterdir())}
        for name in ids:
            if name not in pictures:
                raise UsageError(f"{names} names {printable(name)}, and there is no {root / 'JPEGImages' / name}.jpg")
            self.paths.append(str(pictures[name]))
            size, objects = read_annotation(root / "Annotations" / f"{name}.xml", self.paths[-1], self.classes)
            self.sizes.append(size)
            self.objects.append(objects)

    def decode(self, row: int, flip: bool = False) -> tuple[Tensor, Objects]:
        """The picture (3, H, W) uint8 and its objects, mirrored or not. UserError where it cannot be read."""
        try:
            with Image.open(self.paths[row]) as picture:
                pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read the picture {self.paths[row]}: {str(error)[:100]}") from None
        width, (boxes, labels, difficult) = pixels.shape[2], self.objects[row]
        if (width, pixels.shape[1]) != self.sizes[row]:
            there = "{} x {}".format(*self.sizes[row])
            raise UserError(
                f"{self.paths[row]} is {width} x {pixels.shape[1]} pixels, of {there} in its annotation: another picture?"
            )
        if flip:
            pixels, boxes = (
                pixels.flip(2),
                torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), 1),
            )
        return pixels, Objects(boxes, labels, difficult)


def read_annotation(path: Path, picture: str, classes: Sequence[str]) -> tuple[tuple[int, int], Objects]:
    """((width, height), objects) of an annotation; the size is the picture's where it does not say one.

    The corner of VOC's box is a pixel from 1 and belongs to it, so 1 is subtracted from the left and upper one. Boxes that
    begin at 0, or end one pixel late, are cut to the picture. UserError for what is broken, unknown or outside.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror.lower()}") from None
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path}: not a whole XML file ({error})") from None
    try:
        size = tuple(int(float(root.findtext(f"size/{side}"))) for side in ("width", "height"))
    except (TypeError, ValueError, OverflowError):
        size = (0, 0)
    if min(size) < 1:
        try:
            with Image.open(picture) as image:
                size = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read the picture {picture}: {str(error)[:100]}") from None
    boxes, labels, difficult = [], [], []
    for thing in root.iterfind("object"):
        name = (thing.findtext("name") or "").strip()
        if name not in classes:
            raise UserError(
                f"{path} has an object of class {name!r}: known are {sets.few(classes)}; say others with --classes"
            )
        try:
            box = [float(thing.findtext(f"bndbox/{corner}")) for corner in CORNERS]
            difficult.append(bool(int(thing.findtext("difficult") or 0)))
        except (TypeError, ValueError):
            raise UserError(f"{path}: its {name} has no bndbox of four numbers ({', '.join(CORNERS)})") from None
        left, top, right, bottom = box[0] - 1, box[1] - 1, *box[2:]
        shown = ", ".join(f"{key} {value:g}" for key, value in zip(CORNERS, box))
        if not (left >= -1 and top >= -1 and right <= size[0] + 1 and bottom <= size[1] + 1):
            raise UserError(
                f"{path}: the box of its {name} ({shown}) is outside the picture of {size[0]} x {size[1]} pixels"
            )
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])
        if not (right > left and bottom > top):
            raise UserError(f"{path}: the box of its {name} ({shown}) has no size")
        boxes.append((left, top, right, bottom))
        labels.append(list(classes).index(name) + 1)
    flags = torch.tensor(difficult, dtype=torch.bool)
    return size, Objects(torch.tensor(boxes).reshape(-1, 4).float(), torch.tensor(labels, dtype=torch.int64), flags)


# ------------------------------------------------------------------------------------------------------------- batches


class View(NamedTuple):
    """How a picture reaches the network: mirrored with probability `flip`, its shorter side one of `min_size` (drawn), its
    longer one at most `max_size` pixels."""

    flip: float
    min_size: tuple[int, ...]
    max_size: int


class Loader:
    """Batches for `loop.Job`: (pictures, objects, rows), on the device; pictures (3, H, W) in [0, 1] of different sizes.

    An endless stream: all pictures in an order drawn from `seed`, then all in another one. Step i of the run takes the
    `batch_size` of each rank that come next, whatever the run was stopped at. An "epoch" of the job is `part` steps.
    """

    mode, bad_images, view_seconds = "host", (), 0.0  # what the job asks of a loader

    def __init__(
        self, pictures: Pictures, view: View, steps: int, part: int, batch_size: int, seed: int, process, workers: int
    ):
        self.dataset, self.views, self.steps, self.part, self.batch_size = pictures, (view,), steps, part, batch_size
        self.seed, self.process, self.workers, self.wait_seconds, self.passes = seed, process, workers, 0.0, {}
        self.set_epoch(1)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.first, self.start = (epoch - 1) * self.part, start

    def __len__(self) -> int:
        return min(self.part, self.steps - self.first)

    def plan(self, step: int) -> list[tuple[int, bool]]:
        """(row, mirrored) of this rank's pictures at global step `step` (from 0)."""
        n, ranks, planned = len(self.dataset), self.process.world_size, []
        for i in range(self.batch_size):
            round_, place = divmod((step * self.batch_size + i) * ranks + self.process.rank, n)
            if round_ not in self.passes:
                generator = torch.Generator().manual_seed(self.seed + 1_000_003 * round_)
                flips = torch.rand(n, generator=generator) < self.views[0].flip
                self.passes = {
                    **dict([*self.passes.items()][-1:]),
                    round_: (torch.randperm(n, generator=generator), flips),
                }
            order, flips = self.passes[round_]
            planned.append((int(order[place]), bool(flips[place])))
        return planned

    def __iter__(self) -> Iterator[tuple[list[Tensor], list[Objects], Tensor]]:
        plans = [self.plan(step) for step in range(self.first + self.start, self.first + len(self))]
        batches = decoded(self.dataset, plans, self.workers, self.process.device)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch


class _Decoded:
    """What a worker does: a row of the plan to a picture, or to the error that says why not."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __getitem__(self, planned: tuple[int, bool]):
        try:
            return planned[0], *self.pictures.decode(*planned)
        except UserError as error:
            return error


def decoded(pictures: Pictures, plans: list, workers: int, device) -> Iterator:
    """(pictures, objects, rows) of every list of (row, mirrored) in `plans`, in order."""
    own = torch.Generator()  # a loader draws a number for its workers; it is not to be the run's
    how = dict(batch_sampler=plans, collate_fn=list, num_workers=workers, worker_init_fn=quiet_worker, generator=own)
    for items in DataLoader(_Decoded(pictures), **how):
        for item in items:
            if isinstance(item, UserError):
                raise item
        rows, images, objects = zip(*items)
        images = [image.to(device, non_blocking=True).float().div_(255) for image in images]
        yield images, [Objects(*(x.to(device) for x in thing)) for thing in objects], torch.tensor(rows)


# ------------------------------------------------------------------------------------------------------------------ AP


class _Evaluation(COCOeval_faster):
    """COCO's evaluation with VOC's difficult objects: they need not be found, and any number of detections may lie on one
    without being false. COCO has that for crowds, where however it divides the intersection by the detection alone; here the
    overlap is intersection over union for all."""

    boxes: dict  # (picture, class): (detections in order of their scores, objects)

    def computeIoU(self, picture: int, kind: int):
        found, there = self.boxes.get((picture, kind), ((), ()))
        return box_iou(found, there).numpy() if len(found) and len(there) else []


def average_precision(pictures: Pictures, found: dict[int, dict[str, Tensor]]) -> dict:
    """AP (mean over IoU .5 to .95), AP50, AP75, each also a mean over the classes that have objects, in percent.

    found: {row of `pictures`: boxes (n, 4), labels (n,), scores (n,)}, on the CPU. At most 100 detections of a class in a
    picture count. Precision is interpolated at COCO's 101 recalls; AP50_11: at the eleven of VOC 2007, as PascalVOC's and
    detectron2's evaluation of that year. classes: {name: AP50}. UserError where there is nothing to find.
    """
    classes, truth, detections, boxes = pictures.classes, [], [], {}
    for row, objects in enumerate(pictures.objects):
        out = found[row]
        order = out["scores"].sort(descending=True, stable=True).indices
        for kind in torch.cat((out["labels"], objects.labels)).unique().tolist():
            mine = order[out["labels"][order] == kind][:DETECTIONS]
            there = objects.labels == kind
            boxes[row, kind] = out["boxes"][mine].double(), objects.boxes[there].double()
            about = dict(image_id=row, category_id=kind)
            for box, crowd in zip(objects.boxes[there].tolist(), objects.difficult[there].tolist()):
                truth.append({**about, "id": len(truth) + 1, "bbox": box, "area": 1.0, "iscrowd": int(crowd)})
            for box, score in zip(out["boxes"][mine].tolist(), out["scores"][mine].tolist()):
                detections.append({**about, "id": len(detections) + 1, "bbox": box, "area": 1.0, "score": score})
    if all(thing["iscrowd"] for thing in truth):
        raise UserError("the test pictures have no objects, or difficult ones only: there is nothing to find")
    kinds = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
    there, here = (COCO() for _ in range(2))
    for index, things in ((there, truth), (here, detections)):
        index.dataset = {
            "images": [{"id": row} for row in range(len(pictures))],
            "annotations": things,
            "categories": kinds,
        }
        index.createIndex()
    evaluation = _Evaluation(there, here, "bbox")
    evaluation.boxes = boxes
    evaluation.params.maxDets, evaluation.params.areaRng, evaluation.params.areaRngLbl = (
        [DETECTIONS],
        [[0, 1e10]],
        ["all"],
    )
    evaluation.evaluate()
    evaluation.accumulate()
    precision = (
        100 * evaluation.eval["precision"][:, :, :, 0, 0]
    )  # IoU x recall x class; below 0: a class without objects
    precision = precision[:, :, precision[0, 0] >= 0]
    names = [
        name for i, name in enumerate(classes, 1) if any(t["category_id"] == i and not t["iscrowd"] for t in truth)
    ]
    values = {"AP": precision.mean(), "AP50": precision[0].mean(), "AP75": precision[5].mean()}
    values["AP50_11"] = precision[0, ::RECALLS].mean()
    by_class = {name: round(float(ap), 3) for name, ap in zip(names, precision[0].mean(0), strict=True)}
    return {name: float(value) for name, value in values.items()} | {"classes": by_class}


# --------------------------------------------------------------------------------------------------------------- sheet


def draw(path: str, pictures: Pictures, found: dict[int, dict[str, Tensor]], least: float = 0.5) -> None:
    """Write the first pictures with what is in them (dashed; dotted: difficult) and what was found with a score of at least
    `least` (solid, with class and score), as PNG. UsageError where `path` cannot be written."""
    from matplotlib.figure import Figure  # half a second to import: not at start
    from matplotlib.patches import Rectangle

    rows = sorted(found)[:8]
    figure = Figure(figsize=(12, 3.2 * -(-len(rows) // 4)), layout="constrained")
    axes = figure.subplots(-(-len(rows) // 4), 4, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, row in zip(axes, rows):
        pixels, objects = pictures.decode(row)
        axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(os.path.basename(pictures.paths[row]), fontsize=8)

        def box(corners, axis=axis, **style):
            left, top, right, bottom = (v - 0.5 for v in corners)
            axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))
            return left, top

        for corners, difficult in zip(objects.boxes.tolist(), objects.difficult.tolist()):
            box(corners, color="black", lw=2.6)
            box(corners, color="white", lw=1.6, ls=":" if difficult else "--")
        out = found[row]
        for i in (out["scores"] >= least).nonzero().flatten().tolist():
            left, top = box(out["boxes"][i].tolist(), color="tab:orange", lw=1.8)
            name = f"{pictures.classes[out['labels'][i] - 1]} {out['scores'][i]:.2f}".replace(" 0.", " .")
            label = dict(boxstyle="square,pad=0.15", fc="tab:orange", ec="none")
            axis.text(left, top, name, fontsize=7, va="bottom", bbox=label, clip_on=True)
    try:
        with files.replacing(path) as file:
            figure.savefig(file, format="png", dpi=100)
    except OSError as error:
        raise UsageError(f"--show {path}: {error.strerror or error}") from None
