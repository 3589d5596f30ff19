#!/usr/bin/env python
"""Measure the robustness of a classifier of any paper: accuracy on shifted sets, and shape bias.

The columns are those of Table 1 of Ge et al. (NeurIPS 2021, arXiv:2110.14189): clean, corrupted,
sketch, stylized and rendition accuracy; and the share of shape decisions of Geirhos et al.
(arXiv:1811.12231). Every set is optional; pictures are mapped to classes by folder name (WordNet
id):

    python tools/robustness.py IMAGENET100 --classifier runs/linear --ckpt_path runs/row \\
        --corruption IMAGENET-C
    python tools/robustness.py --demo

All paths are checked before the first picture. result.json grows with every set (and every
corruption), so the same command continues after a stop. A folder holds the result of one
classifier. tools/reopen.py opens the classifier by the linear.Spec of its script.
"""

import contextlib
import os
import statistics
import sys
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from common import UsageError, UserError, augment, cli, collectives, files, inputs, launch, options
from common.precision import Precision
from preprocess import demo
from preprocess.corruptions import CORRUPTIONS
from runner import checkpoint, layouts, papers
from runner.folder import RunFolder
from runner.progress import Progress
from runner.signals import StopSignal
from tools.reopen import Classifier, reopen
from tools.robustness_result import Result, earlier, write_corruptions
from tools.robustness_sets import (
    EXTRA_CORRUPTIONS,
    SETS,
    add_set_arguments,
    class_names,
    geometry,
    open_sets,
)

TABLE = "published.json"  # in the folder of the paper whose table has these columns
PRESETS = {
    "demo": dict(
        data="data/demo", classifier="runs/try-lincls", corruption="data/demo/corruption",
        sketch="data/demo/sketch", stylized="data/demo/stylized", rendition="data/demo/rendition",
        cue_conflict="data/demo/cue-conflict", ckpt_path="runs/try-robustness", workers=2,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data (each set is optional)")
    g.add_argument("data", nargs="?", help="data set root with val/CLASS/*, for the clean column")
    add_set_arguments(g)
    text = "pictures named SHAPE1-TEXTURE1; gives the share of answers that name the shape"
    g.add_argument("--cue-conflict", metavar="DIR", help=text)
    text = "also evaluate " + ", ".join(EXTRA_CORRUPTIONS)
    g.add_argument("--extra-corruptions", action="store_true", help=text)
    g.add_argument(
        "--precropped",
        choices=["auto", "yes", "no"],
        default="auto",
        help="whether corrupted, stylized and cue-conflict pictures are already resized and cropped"
        " (as in ImageNet-C) and must not be resized again; auto: yes if they are 224 x 224",
    )
    options.add_data_arguments(g)

    g = parser.add_argument_group("model")
    text = "checkpoint of a linear evaluation of any paper, or its run folder (last epoch)"
    g.add_argument("--classifier", default="", metavar="PATH", help=text)
    text = "take the best epoch on val from a run folder instead of the last"
    g.add_argument("--best", action="store_true", help=text)
    text = "network of a classifier whose file holds no network; default: its recorded path"
    g.add_argument("--network", default="", metavar="PATH", help=text)
    text = "torchvision network; default: as in the checkpoint"
    g.add_argument("-a", "--arch", help=text)

    g = parser.add_argument_group("run")
    text = "global batch over all processes"
    g.add_argument("-b", "--batch-size", type=cli.positive_int, default=256, help=text)
    text = "run folder for result.json and corruption.csv"
    g.add_argument("--ckpt_path", "--out", default="./ckpts/robustness", help=text)
    text = "evaluate all sets again, even in the folder of another classifier"
    g.add_argument("--overwrite", action="store_true", help=text)
    text = "name of the row in the table; default: derived from the pre-training's flags"
    g.add_argument("--label", help=text)
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)
    if not args.classifier:
        raise UsageError(
            "there is no classifier: give --classifier CHECKPOINT of a linear evaluation"
        )
    if not any((args.data, *(getattr(args, name) for name in SETS[1:]))):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in SETS[1:])
        raise UsageError(f"there is nothing to evaluate on: give DATA (clean) or some of {flags}")
    return cli.freeze(args)


def read_classifier(args) -> checkpoint.Saved:
    """Read the checkpoint of the classifier; in a run folder, read the newest one."""
    path = args.classifier
    if args.demo and "classifier" not in args.typed and not os.path.exists(path):
        raise UsageError(f"{path}: nothing to evaluate yet; run its linear evaluation first")
    if os.path.isdir(path):
        declared = papers.find().values()
        names = [paper.best if args.best else paper.last for paper in declared]
        patterns = tuple(dict.fromkeys(names))
        newest = None
        for depth in ("", "*/", "*/*/"):
            newest = newest or layouts.newest(path, tuple(depth + name for name in patterns))
        if newest is None:
            raise UsageError(
                f"--classifier {path}: this folder has no {' or '.join(patterns)}; "
                "run a linear evaluation first"
            )
        path = newest
    saved = checkpoint.Saved(path)
    if args.arch:
        saved.setdefault("arch", args.arch)
    return saved


class Stopped(Exception):
    """Signal on all ranks that the evaluation was asked to stop."""


class Evaluation:
    """Evaluate one classifier on one set after another."""

    def __init__(self, args, process, classifier: Classifier, stop: StopSignal, log: RunFolder):
        self.args = args
        self.process = process
        self.classifier = classifier
        self.stop = stop
        self.log = log

    @torch.no_grad()
    def answers(self, pictures, judge, label: str, is_cropped: bool = False) -> list[torch.Tensor]:
        """Apply judge(logits (B, C), targets (B,)) to all n pictures of a set, in order.

        judge returns tensors (B,); the result is a list of float tensors (n,) on the CPU.
        is_cropped: see `geometry`. Raises Stopped after a signal to stop.
        """
        plain = self.classifier.view
        crop = geometry(self.args.precropped, plain.geometry, pictures, is_cropped)
        view = augment.Compose(crop, *plain.ops)
        batch = max(1, self.args.batch_size // self.process.world_size)
        loader = inputs.evaluation_loader(self.args, self.process, pictures, view, batch)
        is_long = self.log.main and len(loader) > 25
        progress = Progress(f"{label}: ", len(loader), 25, enabled=is_long)
        parts = []
        try:
            for batch in self._batches(loader):
                (images,), target, index = batch
                images = images.contiguous(memory_format=torch.channels_last)
                parts.append((index, *judge(self.classifier.logits(images), target)))
                progress.update(len(target))
        finally:
            progress.close()
            loader.close()
        self.log.say_replaced(loader)
        rows, *judged = (collectives.gather_ragged(torch.cat(part).float()) for part in zip(*parts))
        order = rows.double().argsort()  # ranks hold interleaved rows
        return [values[order].cpu() for values in judged]

    def _batches(self, loader):
        """Yield this rank's batches; all ranks make the same number of steps."""
        batches = iter(loader)
        for _ in range(max(collectives.gather_objects(len(loader)))):
            if self.stop.asked():
                raise Stopped
            batch = next(batches, None)
            if batch is not None:
                yield batch

    def score(self, pictures, label: str, is_cropped: bool = False) -> list[torch.Tensor]:
        """Return two float tensors (n,): 1 where the answer is right, else 0.

        In the first, answers are among all classes; in the second, "masked" one, they are among the
        classes of the set.
        """
        absent = torch.ones(len(pictures.classes), dtype=torch.bool)
        absent[pictures.targets.unique()] = False
        absent = absent.to(self.process.device)

        def judge(logits, target):
            logits = logits[:, : len(absent)]  # published heads have 1000 outputs
            masked = logits.masked_fill(absent, -torch.inf)
            return logits.argmax(1) == target, masked.argmax(1) == target

        return self.answers(pictures, judge, label, is_cropped)

    def evaluate(self, name: str, pictures, more, result: Result) -> None:
        """Evaluate one set and record its numbers. more: what `open_sets` returned with it."""
        if name == "corruption":
            return self.corruptions(pictures, *more, result)
        if name == "cue_conflict":
            judged = self.answers(pictures, more.judge, name, is_cropped=True)
            rows = torch.arange(len(pictures))
            result.keep(name, more.values(rows, *judged), more.note)
            return self.log.say(f"{name}: {result.in_words(name)} of {more.note}")
        right, masked = self.score(pictures, name, is_cropped=name == "stylized")
        values = {name: percent(right)}
        classes, present = len(pictures.classes), len(pictures.targets.unique())
        note = remark = ""
        if present < classes:
            values[f"{name}_masked"] = percent(masked)
            note = (
                f"{present} of {classes} classes: {name} is {classes}-way, "
                f"{name}_masked {present}-way"
            )
            remark = f", masked {percent(masked):.2f} % ({note})"
        result.keep(name, values, note)
        self.log.say(f"{name}: {values[name]:.2f} % of {len(pictures)} pictures{remark}")

    def corruptions(self, pictures, folders, group, result: Result) -> None:
        """Evaluate one corruption after another; record the mean over the folders, as published.

        folders: (corruption, severity) of each folder. group (n,): folder number of every picture.
        """
        accuracies = dict(result.sets.get("corruption", {}).get("folders", {}))
        names = [f"{corruption}/{severity}" for corruption, severity in folders]
        for corruption in dict.fromkeys(name for name, _ in folders):
            mine = [i for i, (name, _) in enumerate(folders) if name == corruption]
            if not all(names[i] in accuracies for i in mine):
                rows = torch.isin(group, torch.tensor(mine)).nonzero().flatten()
                label = f"corruption {corruption}"
                right, _ = self.score(pictures.select(rows), label, is_cropped=True)
                accuracies |= {names[i]: percent(right[group[rows] == i]) for i in mine}
                result.keep("corruption", folders=accuracies)
            mean = statistics.mean(accuracies[names[i]] for i in mine)
            self.log.say(f"corruption {corruption}: {mean:.2f} % over {len(mine)} severities")
        by_folder = [accuracies[name] for name in names]
        values, note = summary(folders, by_folder)
        if self.log.main:
            write_corruptions(self.log.folder / "corruption.csv", folders, by_folder)
        result.keep("corruption", values, note, folders=accuracies)
        mean = values["corruption"]
        self.log.say(f"corruption: {mean:.2f} % of {len(pictures)} pictures ({note})")


def summary(folders: list[tuple[str, int]], accuracies: list[float]) -> tuple[dict, str]:
    """Return the columns of the corruptions, and a note on the folders that they average."""
    pairs = [(name, accuracy) for (name, _), accuracy in zip(folders, accuracies)]
    published = [accuracy for name, accuracy in pairs if name in CORRUPTIONS]
    extra = [accuracy for name, accuracy in pairs if name in EXTRA_CORRUPTIONS]
    values = {"corruption": statistics.mean(published)}
    note = f"mean over {len(published)} of 75 folders"
    missing = [name for name in CORRUPTIONS if name not in dict(folders)]
    if missing:
        note += f"; missing {', '.join(missing)}"
    if extra:  # these do not enter the published number
        values["corruption_extra"] = statistics.mean(extra)
        note += f"; corruption_extra {values['corruption_extra']:.2f} over {len(extra)} of 20"
    return values, note


def percent(x: torch.Tensor) -> float:
    return round(100 * x.mean().item(), 6)


def published_table() -> str:
    """Return the path, relative to the root, of the published table with these columns."""
    path = next(path for path in files.ROOT.glob(f"*/{TABLE}") if '"sketch"' in path.read_text())
    return str(path.relative_to(files.ROOT))


def worker(args, process: launch.Process) -> None:
    demo.ensure_for(args, process)
    with StopSignal() as stop, contextlib.ExitStack() as context:
        saved = read_classifier(args)
        precision = Precision.of(args, process.device)
        side = args.input_res if "input_res" in args.typed else None
        classifier = reopen(saved, args.network, side, process, precision, args.eval_resize)
        arch = classifier.origin["arch"]
        if args.arch and arch != args.arch:
            raise UserError(f"{saved.path} was trained with --arch {arch}, not {args.arch}")
        classes = class_names(saved, args)
        if classifier.outputs < len(classes):
            raise UserError(
                f"{saved.path} distinguishes {classifier.outputs} classes, here there are "
                f"{len(classes)}"
            )
        opened = open_sets(args, classes)
        log, path, before = open_folder(args, process, saved, classifier, context)
        log.derived(classifier=saved.path, classes=len(classes), precision=str(precision))
        settings = {
            "input_res": classifier.view.geometry.size,
            "eval_resize": classifier.view.geometry.resize,
            "precropped": args.precropped,
            "precision": str(precision),
            "dataset": args.dataset,
        }
        wanted = {
            name: {"folder": place, "pictures": len(pictures), **settings}
            for name, (place, pictures, _) in opened.items()
        }
        origin = {
            **classifier.origin,
            "table": published_table(),
            "evaluated": saved.path,
            "digest": classifier.digest,
            "data": args.data,
            "precision": str(precision),
            "outputs": classifier.outputs,
            "input_res": settings["input_res"],
        }
        if args.label:
            origin["label"] = args.label
        result = Result(log, path, origin, before, wanted)
        evaluation = Evaluation(args, process, classifier, stop, log)
        evaluate_all(evaluation, opened, result)
        log.result(**result.everything())


def open_folder(args, process, saved, classifier: Classifier, context: contextlib.ExitStack):
    """Return the run folder's records, the path of result.json, and its content so far.

    If the folder belongs to a training run, its own records do not change.
    """
    folder = Path(args.ckpt_path)
    is_shared = any(folder.glob("*.pth*"))
    suffix = "-robustness" if is_shared else ""
    if process.is_main and not is_shared:
        context.enter_context(files.only_writer(folder))
    path = folder / f"result{suffix}.json"
    is_own = args.demo and "ckpt_path" not in args.typed
    before = earlier(path, saved.path, classifier.digest, args.overwrite, is_own)
    before = collectives.agree(before)
    log = RunFolder(folder, args, process, tensorboard=False, suffix=suffix)
    context.callback(log.close)
    return log, path, before


def evaluate_all(evaluation: Evaluation, opened: dict, result: Result) -> None:
    """Evaluate every given set that is not done; after a signal, report what is kept and exit."""
    log = evaluation.log
    name = "the first set"
    try:
        for name in SETS:
            if name not in opened:
                state = "left out"
                if name not in result.missing():
                    state = f"{result.in_words(name)} from an earlier evaluation"
                log.say(f"{name}: not given, {state}")
            elif name not in result.pending:
                kept = "kept from the stopped evaluation"
                log.say(f"{name}: {result.in_words(name)}, {kept}")
            else:
                _, pictures, more = opened[name]
                evaluation.evaluate(name, pictures, more, result)
    except Stopped:
        log.say(result.stopped(name))
        raise SystemExit(evaluation.stop.exit_code) from None


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
