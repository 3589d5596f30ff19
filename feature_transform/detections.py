"""The test of a detector: its detections, their average precision, and a sheet of pictures."""

from __future__ import annotations

import os

import torch
from faster_coco_eval.core import COCO
from faster_coco_eval.core.faster_eval_api import COCOeval_faster
from torch import Tensor
from torchvision.ops import box_iou

from common import UserError, collectives, figures, files, inputs
from feature_transform import voc_batches
from feature_transform.voc import Pictures
from runner import loop
from runner.progress import Progress
from runner.signals import until_stopped

RECALLS = 10  # every tenth of COCO's 101 recalls is one of the eleven of VOC 2007
DETECTIONS = 100  # the most that count of a class in a picture
Found = dict[int, dict[str, Tensor]]  # {row: boxes (n, 4), labels (n,), scores (n,)} on the CPU


@torch.no_grad()
def detect(job: loop.Job, pictures: Pictures, view: voc_batches.View) -> Found:
    """Return the boxes, labels and scores of all `pictures` under `view`, on every rank.

    With `pictures.skip_bad` those that cannot be read are left out.
    """
    args, process = job.args, job.process
    network = job.method.network.eval()
    collectives.broadcast_buffers(network)
    network.transform.min_size = view.min_size
    rows = range(process.rank, len(pictures), process.world_size)
    size = max(1, args.batch_size // process.world_size)
    plans = [[(row, False) for row in rows[i : i + size]] for i in range(0, len(rows), size)]
    progress = Progress("Test: ", len(plans), args.print_freq, enabled=job.log.main)
    workers = inputs.reading_workers(args)
    batches = voc_batches.decoded(pictures, plans, workers, process.device)
    found = {}
    for images, _, places in until_stopped(batches, job, "the test, which is made again"):
        with job.method.precision.autocast():
            outputs = network(images)
        for row, out in zip(places.tolist(), outputs):
            found[row] = {
                "boxes": out["boxes"].float().cpu(),
                "labels": out["labels"].cpu(),
                "scores": out["scores"].float().cpu(),
            }
        progress.bar.update(1)
    progress.close()
    for part in collectives.gather_objects(found):
        found |= part
    if len(found) < len(pictures):
        left_out = len(pictures) - len(found)
        job.warn(
            f"{left_out} of the {len(pictures)} test pictures cannot be read, and do not count"
        )
    return found


class _Evaluation(COCOeval_faster):
    """COCO's evaluation with VOC's difficult objects.

    Difficult objects need not be found, and any number of detections may lie on one without being
    false. COCO treats crowds like that, but divides the intersection by the detection's area there;
    here the overlap is intersection over union for all objects.
    """

    boxes: dict  # (picture, class): (detections in order of their scores, objects)

    def computeIoU(self, picture: int, kind: int):
        detections, objects = self.boxes.get((picture, kind), ((), ()))
        if not len(detections) or not len(objects):
            return []
        return box_iou(detections, objects).numpy()


class _Tables:
    """The rows of COCO's two tables: annotations of objects, and detections."""

    def __init__(self, pictures: Pictures, found: Found):
        self.pictures = pictures
        self.objects: list[dict] = []
        self.detections: list[dict] = []
        self.boxes = {}
        for row in sorted(found):
            kinds = found[row]["labels"].tolist() + pictures.objects[row].labels.tolist()
            for kind in sorted(set(kinds)):
                self._add(row, kind, found[row])

    def _add(self, row: int, kind: int, found: dict[str, Tensor]) -> None:
        """Add the objects and detections of class `kind` in picture `row`."""
        order = found["scores"].sort(descending=True, stable=True).indices
        mine = order[found["labels"][order] == kind][:DETECTIONS]
        objects = self.pictures.objects[row]
        there = objects.labels == kind
        self.boxes[row, kind] = (found["boxes"][mine].double(), objects.boxes[there].double())
        place = {"image_id": row, "category_id": kind, "area": 1.0}
        boxes = objects.boxes[there].tolist()
        for box, difficult in zip(boxes, objects.difficult[there].tolist()):
            number = len(self.objects) + 1
            self.objects.append({**place, "id": number, "bbox": box, "iscrowd": int(difficult)})
        for box, score in zip(found["boxes"][mine].tolist(), found["scores"][mine].tolist()):
            number = len(self.detections) + 1
            self.detections.append({**place, "id": number, "bbox": box, "score": score})

    def coco(self, annotations: list[dict]) -> COCO:
        """Return an index of one of the tables."""
        index = COCO()
        names = enumerate(self.pictures.classes, 1)
        index.dataset = {
            "images": [{"id": row} for row in range(len(self.pictures))],
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in names],
        }
        index.createIndex()
        return index


def average_precision(pictures: Pictures, found: Found) -> dict:
    """Return AP (mean over IoU .5 to .95), AP50 and AP75 in percent, and AP50 by class.

    Each is a mean over the classes that have objects. At most 100 detections of a class in a
    picture count. Precision is interpolated at COCO's 101 recalls, for AP_11, AP50_11 and AP75_11
    at the eleven of VOC 2007, as in detectron2's evaluation of that year. The entry `classes` is
    {name: AP50}.
    Raises UserError where the test pictures have no objects to find.
    """
    tables = _Tables(pictures, found)
    if all(thing["iscrowd"] for thing in tables.objects):
        raise UserError(
            "the test pictures have no objects, or difficult ones only, so AP is undefined"
        )
    objects, detections = tables.coco(tables.objects), tables.coco(tables.detections)
    evaluation = _Evaluation(objects, detections, "bbox")
    evaluation.boxes = tables.boxes
    evaluation.params.maxDets = [DETECTIONS]
    evaluation.params.areaRng = [[0, 1e10]]
    evaluation.params.areaRngLbl = ["all"]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = 100 * evaluation.eval["precision"][:, :, :, 0, 0]  # IoU x recall x class
    precision = precision[:, :, precision[0, 0] >= 0]  # below 0: a class without objects
    counted = {thing["category_id"] for thing in tables.objects if not thing["iscrowd"]}
    names = [name for number, name in enumerate(pictures.classes, 1) if number in counted]
    by_class = zip(names, precision[0].mean(0), strict=True)
    return {
        "AP": float(precision.mean()),
        "AP50": float(precision[0].mean()),
        "AP75": float(precision[5].mean()),
        "AP_11": float(precision[:, ::RECALLS].mean()),
        "AP50_11": float(precision[0, ::RECALLS].mean()),
        "AP75_11": float(precision[5, ::RECALLS].mean()),
        "classes": {name: round(float(ap), 3) for name, ap in by_class},
    }


def draw(path: str, pictures: Pictures, found: Found, least: float = 0.5) -> None:
    """Draw the first pictures with their objects and the detections in them, and a caption.

    Objects are dashed, difficult ones dotted; detections with a score of at least `least` are solid
    and carry class and score. Raises UsageError where `path` cannot be written.
    """
    from matplotlib.figure import Figure  # imported here, as it takes half a second

    rows = sorted(found)[:8]
    lines = -(-len(rows) // 4)
    figure = Figure(figsize=(12, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, 4, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, row in zip(axes, rows):
        _draw_picture(axis, pictures, row, found[row], least)
    count = sum(int((found[row]["scores"] >= least).sum()) for row in rows)
    caption = f"solid: detections ({count}) with a score of {least:g} or more"
    if not count:
        caption = f"no detection has a score of {least:g} or more"
    figure.suptitle(f"dashed: objects, dotted: difficult ones; {caption}", fontsize=9)
    files.write_figure(figure, path, dpi=100)


def _draw_picture(axis, pictures: Pictures, row: int, found: dict, least: float) -> None:
    """Draw one picture of the sheet."""
    pixels, objects = pictures.decode(row)
    axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set_title(figures.plain(os.path.basename(pictures.paths[row])), fontsize=8)
    for corners, difficult in zip(objects.boxes.tolist(), objects.difficult.tolist()):
        _draw_box(axis, corners, color="black", lw=2.6)
        _draw_box(axis, corners, color="white", lw=1.6, ls=":" if difficult else "--")
    for i in (found["scores"] >= least).nonzero().flatten().tolist():
        corners = found["boxes"][i].tolist()
        _draw_box(axis, corners, color="tab:orange", lw=1.8)
        score = f"{found['scores'][i]:.2f}".removeprefix("0")
        name = figures.plain(f"{pictures.classes[found['labels'][i] - 1]} {score}")
        frame = {"boxstyle": "square,pad=0.15", "fc": "tab:orange", "ec": "none"}
        left, top = corners[0] - 0.5, corners[1] - 0.5
        axis.text(left, top, name, fontsize=7, va="bottom", bbox=frame, clip_on=True)


def _draw_box(axis, corners: list[float], **style) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = (value - 0.5 for value in corners)
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))
