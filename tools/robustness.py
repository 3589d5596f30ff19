#!/usr/bin/env python
"""The robustness row of a classifier of any paper: clean, corrupted, sketch, stylized, rendition accuracy, and shape bias.

Table 1 of Ge et al. (NeurIPS 2021, arXiv:2110.14189), whose nonsem_neg/eval_robustness.py this is, and the share of shape
decisions of Geirhos et al. (arXiv:1811.12231); the protocol of each set
is in nonsem_neg/README.md. Every set is optional; pictures are mapped to classes by folder name (WordNet id):

    python tools/robustness.py IMAGENET100 --classifier runs/cmc-linear --ckpt_path runs/cmc-row --corruption IMAGENET-C
    python tools/robustness.py --demo

All paths are looked at before the first picture. result.json grows with every set (and every corruption): what was stopped
goes on with the same command. A folder holds the result of one classifier.

A paper takes part by one line in FAMILIES and a function in its linear evaluation,

    reopen(saved, network, input_res, process, precision) -> (logits, colours, facts), or None

None: the checkpoint `saved` is of another script. network: path of the pre-trained network, for files that hold a classifier
alone. input_res: side of the input in pixels, or None for that of the linear evaluation. logits: images on the device ->
float32 (N, C). colours: operations after resize and centre crop. facts: input_res, outputs (C), arch, label (None: the
folder of the network), resize (the shorter side before that crop, where it is not in proportion to 256 for 224), and of the
pre-training epochs, seed, path (pretrained), settings (what two seeds of one experiment have in common), digest (of its
network where that is another file).
"""

import contextlib
import csv
import importlib
import json
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

from pathlib import Path

import torch

from common import UsageError, UserError, augment, cli, files, launch, options, printable, sets
from runner import checkpoint, layouts
from runner.progress import Progress
from runner.folder import Run, environment
from runner.signals import StopSignal
from common.precision import Precision
from preprocess import demo
from preprocess.corruptions import CORRUPTIONS
from tools import shape_bias

FAMILIES = {  # linear evaluation: its files of the last epoch, and of the best on val
    "nonsem_neg/main_lincls.py": ("checkpoint_robust_*.pth.tar", "model_best_*.pth.tar"),
    "ring/eval_ring.py": ("current.pth", "best.pth"),
    "cmc/LinearProbing.py": ("current.pth", "*_layer[0-9].pth"),
    "moco_insdis/eval_moco_ins.py": ("current.pth", "*_layer[0-9].pth"),
    "debiased/linear.py": ("current.pth", "model_best.pth"),
    "feature_transform/main_linear.py": ("current.pth", "best.pth"),
}
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SETS = ("clean", "corruption", "sketch", "stylized", "rendition", "cue_conflict")
COLUMNS = {
    name: (name, f"{name}_masked", f"{name}_extra") for name in SETS
}  # in result.json; the first is in the table
COLUMNS["cue_conflict"] = ("shape_bias", "cue_shape", "cue_texture")
PRESETS = {
    "demo": dict(
        data="data/demo", classifier="runs/try-lincls", corruption="data/demo/corruption", sketch="data/demo/sketch",
        stylized="data/demo/stylized", rendition="data/demo/rendition", cue_conflict="data/demo/cue-conflict",
        ckpt_path="runs/try-robustness", workers=2,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data (each set is optional)")
    g.add_argument("data", nargs="?", help="data set root with val/CLASS/*: the clean column")
    about = "ImageNet-C layout: CORRUPTION/SEVERITY/CLASS/*; accuracy is the mean over all corruptions and severities"
    g.add_argument("--corruption", metavar="DIR", help=about)
    g.add_argument("--sketch", metavar="DIR", help="ImageNet-Sketch: CLASS/*")
    g.add_argument("--stylized", metavar="DIR", help="Stylized-ImageNet validation pictures: CLASS/*")
    g.add_argument("--rendition", metavar="DIR", help="ImageNet-R: CLASS/*")
    about = "pictures named SHAPE1-TEXTURE1: the share of answers that name the shape (tools/shape_bias.py)"
    g.add_argument("--cue-conflict", metavar="DIR", help=about)
    g.add_argument("--extra-corruptions", action="store_true", help="also " + ", ".join(EXTRA_CORRUPTIONS))
    about = (
        "were the corrupted, stylized and cue-conflict pictures resized and centre-cropped before (as ImageNet-C is)? then "
        "they are not resized again; auto: yes if they are 224 x 224"
    )
    g.add_argument("--precropped", choices=["auto", "yes", "no"], default="auto", help=about)
    options.add_data_arguments(g)

    g = parser.add_argument_group("model")
    about = f"checkpoint of {', '.join(map(os.path.basename, FAMILIES))}, or its run folder: the last epoch"
    g.add_argument("--classifier", default="", metavar="PATH", help=about)
    g.add_argument("--best", action="store_true", help="of a run folder take the best epoch on val instead of the last")
    about = "pre-trained network of a classifier that is a file of its own; default: where it was then"
    g.add_argument("--network", default="", metavar="PATH", help=about)
    g.add_argument("-a", "--arch", help="torchvision network; default: what the checkpoint says")

    g = parser.add_argument_group("run")
    g.add_argument("-b", "--batch-size", type=cli.positive_int, default=256, help="global batch over all processes")
    g.add_argument("--ckpt_path", default="./ckpts/robustness", help="run folder: result.json, corruption.csv")
    about = "evaluate all sets anew, also in the folder of another classifier, whose result is lost"
    g.add_argument("--overwrite", action="store_true", help=about)
    g.add_argument("--label", help="name of the row in the table; default: from the pre-training flags")
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)
    if not args.classifier:
        raise UsageError("no classifier: give --classifier CHECKPOINT of a linear evaluation, or --demo")
    if not any((args.data, *(getattr(args, name) for name in SETS[1:]))):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in SETS[1:])
        raise UsageError(f"nothing to evaluate on: give DATA (clean) or some of {flags}")
    return args


def read_classifier(args) -> checkpoint.Saved:
    path = args.classifier
    if args.demo and "classifier" not in args.typed and not os.path.exists(path):
        raise UsageError(f"{path}: nothing to evaluate yet; run nonsem_neg/main_lincls.py --demo first")
    if os.path.isdir(path):
        patterns = tuple(dict.fromkeys(pattern[args.best] for pattern in FAMILIES.values()))
        depths = [[below + pattern for pattern in patterns] for below in ("", "*/", "*/*/")]
        found = next(filter(None, (layouts.newest(path, depth) for depth in depths)), None)
        if found is None:
            raise UsageError(
                f"--classifier {path}: no {' or '.join(patterns)} in this folder; run a linear evaluation first"
            )
        path = found
    saved = checkpoint.Saved(path)
    if args.arch:
        saved.setdefault("arch", args.arch)
    return saved


def reopen(saved, args, process: launch.Process, precision):
    """(logits, colours, facts) of a classifier of whatever paper: see the top of this module."""
    own = saved.get("script")  # published files do not say
    network = args.network or saved.get("network") or str(saved.get("opt", {}).get("model_path", ""))
    if "classifier" in saved and not os.path.exists(network):
        raise UsageError(f"{saved.path} is a classifier on {network}, which is not there: give it with --network")
    input_res = args.input_res if "input_res" in args.typed else None
    made = None
    for script in FAMILIES if own is None else [s for s in FAMILIES if s == own]:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        try:
            made = module.reopen(saved, network, input_res, process, precision)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            what = printable(" ".join(str(error).split())[:100])
            raise UserError(
                f"{saved.path}: not a whole checkpoint of {script} ({type(error).__name__}: {what})"
            ) from error
        if made:
            break
    else:
        if own is not None and own not in FAMILIES:
            raise UserError(f"{saved.path} is of {printable(own)[:80]}: this evaluates those of {', '.join(FAMILIES)}")
        raise UserError(
            f"{saved.path} holds no classifier of {', '.join(FAMILIES)}: give a checkpoint of a linear evaluation, "
            "not of pre-training"
        )
    facts = made[2]
    if args.arch and facts["arch"] != args.arch:
        raise UserError(f"{saved.path} is of --arch {facts['arch']}, not {args.arch}")
    if "classifier" in saved and saved.get("digest", facts.get("digest")) != facts.get("digest"):
        raise UserError(f"{saved.path} is a classifier on another network than {network}: give that with --network")
    args.arch, args.input_res = facts["arch"], facts["input_res"]
    args.resize = facts.pop("resize", options.eval_resize(args.input_res))
    return made


def class_names(saved, args) -> list[str]:
    """Class folder names in label order: from the checkpoint, else (an authors' file) from the clean set or a list."""
    if "classes" in saved:
        return saved["classes"]
    if args.data:
        return options.open_split(args, "val").classes
    if args.class_list:
        return sets.read_class_list(args.class_list)
    raise UsageError(f"{saved.path} does not name its classes: give DATA (the clean set) or --class-list as well")


def open_by_class(folder: str, classes: list[str]) -> sets.FolderSet:
    """The pictures of those class folders that the classifier knows; other folders (ImageNet has 1000) are left out."""
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: no such folder")
    present = [name for name in classes if os.path.isdir(os.path.join(folder, name))]
    if not present:
        raise UsageError(
            f"{folder}: none of the {len(classes)} class folders of the classifier ({printable(classes[0])}, ...) is in it"
        )
    return sets.open_tree(folder, class_list=present, classes=classes, subset=True)


def open_clean(args, classes: list[str]) -> sets.PictureSet:
    if args.dataset in ("packed", *sets.TORCHVISION_SETS):
        return options.open_split(args, "val", classes=classes)
    return open_by_class(str(sets.split_folder(args.data, "val")), classes)


def open_corruptions(args, classes) -> tuple[sets.FolderSet, list[tuple[str, int]], torch.Tensor]:
    """All corrupted pictures as one set, the (corruption, severity) folders found, and the folder number of each picture."""
    root = Path(args.corruption)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    wanted = CORRUPTIONS + (EXTRA_CORRUPTIONS if args.extra_corruptions else ())
    there = [name for name in wanted if (root / name).is_dir()]
    found = [(name, int(s.name)) for name in there for s in sorted((root / name).iterdir()) if s.name.isdigit()]
    if not found:
        raise UsageError(f"{root}: not the ImageNet-C layout: expected folders such as {root}/gaussian_noise/1/CLASS")
    parts = [open_by_class(str(root / name / str(severity)), classes) for name, severity in found]
    group = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
    paths = [os.path.relpath(path, root) for part in parts for path in part.paths]
    targets = [int(t) for part in parts for t in part.targets]
    return sets.FolderSet(paths, targets, classes, root), found, group


def open_sets(args, classes: list[str]) -> dict:
    """{name: (where, set, what else its evaluation needs)} of all sets given, so that a wrong path is found at once."""
    opened = {}
    for name in SETS:
        if not (where := args.data if name == "clean" else getattr(args, name)):
            continue
        if name == "corruption":
            dataset, folders, group = open_corruptions(args, classes)
            if not any(c in CORRUPTIONS for c, _ in folders):
                raise UsageError(f"{where}: none of the 15 corruptions of the published number is in it")
            opened[name] = where, dataset, (folders, group)
        elif name == "cue_conflict":
            cues = shape_bias.CueConflict(where, classes)
            opened[name] = where, cues.dataset, cues
        else:
            opened[name] = where, open_clean(args, classes) if name == "clean" else open_by_class(where, classes), None
    return opened


def geometry(args, dataset, cropped_before: bool) -> augment.ResizeCenterCrop:
    """Resize and centre crop, or for pictures that have been through that already, nothing (at 224 pixels)."""
    if cropped_before:
        size = dataset.open(0).size
        if args.precropped == "yes" or (args.precropped == "auto" and size == (224, 224)):
            return augment.ResizeCenterCrop(None if args.input_res == 224 else args.input_res, args.input_res)
    return augment.ResizeCenterCrop(args.resize, args.input_res)


class Stopped(Exception):
    """By a signal, on all ranks."""


@torch.no_grad()
def answers(judge, logits, colours, dataset, args, process, stop, label, log, cropped_before=False):
    """Rows of the pictures looked at, in order, and what judge(logits (B, C), target (B,)) -> tensors (B,) says of each.

    Tensors (len(dataset),) on the CPU. Raises Stopped where `stop` was asked for.
    """
    view = augment.Compose(geometry(args, dataset, cropped_before), *colours)
    batch = max(1, args.batch_size // process.world_size)
    loader = options.make_loader(args, process, dataset, (view,), batch, seed=0, shuffle=False, drop_last=False)
    progress = Progress(f"{label}: ", len(loader), 25, enabled=log.main and len(loader) > 25)
    parts = []
    steps, batches = max(launch.gather_objects(len(loader))), iter(loader)  # ranks may have one more than others
    try:
        for _ in range(steps):
            if stop.asked():
                raise Stopped
            if (found := next(batches, None)) is None:
                continue
            (images,), target, index = found
            scores = logits(images.contiguous(memory_format=torch.channels_last))
            parts.append((index, *judge(scores, target)))
            progress.update(len(target))
    finally:
        progress.close()
        loader.close()
    log.say_replaced(loader)
    rows, *judged = (launch.gather_ragged(torch.cat(x).float()) for x in zip(*parts))
    order = rows.double().argsort()  # ranks hold interleaved shares
    return [x[order].cpu() for x in (rows, *judged)]


def score(logits, colours, dataset, args, process, stop, label, log, cropped_before=False):
    """For every picture, 1 where the argmax is its class: over all classes, and over those that the set has (masked).

    Two float tensors (len(dataset),) on the CPU. Raises what `answers` does.
    """
    absent = torch.ones(len(dataset.classes), dtype=torch.bool)
    absent[dataset.targets.unique()] = False
    absent = absent.to(process.device)

    def judge(scores, target):
        scores = scores[:, : len(absent)]  # published heads have 1000 outputs whatever the number of classes
        return scores.argmax(1) == target, scores.masked_fill(absent, -torch.inf).argmax(1) == target

    return answers(judge, logits, colours, dataset, args, process, stop, label, log, cropped_before)[1:]


def percent(x: torch.Tensor) -> float:
    return round(100 * x.mean().item(), 6)


class Result:
    """result.json of one classifier, written again whenever a set is done.

    values: numbers by column. sets: {name: where it is and how it was looked at}; of the corruptions also the accuracy of
    each folder. pending: sets that were asked for and are not done.
    """

    def __init__(self, log: Run, path: Path, about: dict, before: dict, wanted: dict[str, dict]):
        self.log, self.path, self.about, self.wanted = log, path, about, wanted
        columns = {column for name in SETS for column in COLUMNS[name]}
        self.values = {k: v for k, v in before.items() if k in columns and isinstance(v, float)}
        self.notes, self.sets = dict(before.get("notes", {})), dict(before.get("sets", {}))
        stopped = before.get("pending", [])
        for name, how in wanted.items():  # of a run that was stopped what is done is kept; a whole one is made again
            if not stopped or self.looked_at(self.sets.get(name, {})) != self.looked_at(how):
                self.sets.pop(name, None)
        self.pending = [name for name in wanted if name not in self.sets or name in stopped]
        self.environment = {"command": log.command, **environment()}

    @staticmethod
    def looked_at(how: dict) -> dict:
        """What must be equal for a set to be the same: its folder however it is spelled, not how far it had come."""
        return {k: v for k, v in how.items() if k != "folders"} | {
            "folder": os.path.realpath(str(how.get("folder", "")))
        }

    def missing(self) -> list[str]:
        """Sets of which nothing is known."""
        return [name for name in SETS if not self.values.keys() & set(COLUMNS[name])]

    def told(self, name: str) -> str:
        """The number of a set that has one, in words."""
        if name != "cue_conflict":
            return f"{self.values[name]:.2f} %"
        share, shape, texture = map(self.values.get, COLUMNS[name])
        share = "no answer names shape or texture" if share is None else f"shape bias {share:.2f} %"
        return f"{share} (shape {shape:.2f} %, texture {texture:.2f} %)"

    def everything(self) -> dict:
        return {
            **self.about,
            "missing": self.missing(),
            "pending": self.pending,
            "notes": self.notes,
            "sets": self.sets,
            **self.values,
        }

    def keep(self, name: str, values: dict | None = None, note: str = "", **more) -> None:
        """What was found so far of a set; values: all of it."""
        self.sets[name] = self.wanted[name] | more
        if values is not None:
            self.values = {k: v for k, v in self.values.items() if k not in COLUMNS[name]} | values
            self.notes = {k: v for k, v in self.notes.items() if k != name} | ({name: note} if note else {})
            self.pending = [p for p in self.pending if p != name]
        if self.log.main:
            files.write_json(self.path, self.environment | self.everything())

    def stopped(self, name: str) -> str:
        folders = len(self.sets.get(name, {}).get("folders", {}))
        kept = [n for n in self.wanted if n not in self.pending] + [f"{folders} folders of {name}"] * bool(folders)
        lost = f"what was looked at of {name}{' beyond them' * bool(folders)} is lost"
        kept = f"{', '.join(kept)} kept in {self.path}, {lost}" if kept else f"nothing is kept, {lost}"
        return f"stopped by a signal in {name}: {kept}; the same command goes on from there"


def earlier(path: Path, saved, digest: str, args) -> dict:
    """What a result.json has of this classifier. UsageError where it is of another one, or of another kind of run."""
    if args.overwrite or not path.exists():
        return {}
    way_out = "choose another --ckpt_path, or lose it with --overwrite"
    try:
        old = json.loads(path.read_text())
        evaluated = old["evaluated"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path} is not a result of this evaluation: {way_out}") from None
    if old.get("digest") == digest:
        whole = isinstance(old.get("sets"), dict) and isinstance(old.get("notes"), dict)
        whole = (
            whole and isinstance(old.get("pending"), list) and all(isinstance(v, dict) for v in old["sets"].values())
        )
        return old if whole else {}
    own = args.demo and "ckpt_path" not in args.typed  # the demo may write over its own folder
    if not own and os.path.realpath(str(evaluated)) != os.path.realpath(saved.path):
        raise UsageError(f"{path} is of another classifier ({printable(str(evaluated))}): {way_out}")
    return {}


def worker(args, process: launch.Process) -> None:
    own_cues = Path(args.data or "") / demo.CUES == Path(args.cue_conflict or "")
    demo.ensure_for(args, process, cues=own_cues)
    with StopSignal() as stop, contextlib.ExitStack() as held:
        saved, precision = read_classifier(args), Precision(args.amp, process.device)
        logits, colours, facts = reopen(saved, args, process, precision)
        classes = class_names(saved, args)
        if facts["outputs"] < len(classes):
            raise UserError(f"{saved.path} tells {facts['outputs']} classes apart, here there are {len(classes)}")
        opened = open_sets(args, classes)

        folder = Path(args.ckpt_path)
        shared = any(folder.glob("*.pth*"))  # with a training, whose records stay as they are
        suffix = "-robustness" * shared
        if process.is_main and not shared:
            held.enter_context(files.only_writer(folder))
        weights = {k: v for k, v in (saved.get("classifier") or saved["state_dict"]).items() if torch.is_tensor(v)}
        digest = checkpoint.fingerprint(weights) + facts.pop("digest", "")
        before = launch.agree(earlier(path := folder / f"result{suffix}.json", saved, digest, args))
        log = Run(folder, args, process, tensorboard=False, suffix=suffix)
        held.callback(log.close)
        log.derived(classifier=saved.path, classes=len(classes), precision=str(precision))

        how = dict(input_res=args.input_res, precropped=args.precropped, precision=str(precision), dataset=args.dataset)
        wanted = {n: {"folder": w, "pictures": len(d), **how} for n, (w, d, _) in opened.items()}
        own_label = facts.pop("label") or Path(facts["pretrained"]).resolve().parent.name
        about = dict(table="nonsem_neg/published.json", label=args.label or own_label, evaluated=saved.path)
        about |= dict(digest=digest, data=args.data, precision=str(precision), **facts)
        result = Result(log, path, about, before, wanted)

        def look_at(dataset, label: str, cropped_before: bool = False):
            return score(logits, colours, dataset, args, process, stop, label, log, cropped_before)

        name = "the first set"
        try:
            for name in SETS:
                if name not in opened:
                    kept = f"{result.told(name)} from before" if name not in result.missing() else "left out"
                    log.say(f"{name}: not given, {kept}")
                    continue
                _, dataset, more = opened[name]
                if name not in result.pending:
                    log.say(f"{name}: {result.told(name)}, kept from the evaluation that was stopped")
                elif name == "corruption":
                    corruption_row(look_at, dataset, *more, result, log)
                elif name == "cue_conflict":
                    how = logits, colours, dataset, args, process, stop, name, log, True
                    result.keep(name, more.values(*answers(more.judge, *how)), more.note)
                    log.say(f"{name}: {result.told(name)} of {more.note}")
                else:
                    right, masked = look_at(dataset, name, name == "stylized")
                    values, present, note = {name: percent(right)}, len(dataset.targets.unique()), ""
                    if present < len(classes):
                        values[f"{name}_masked"] = percent(masked)
                        note = f"{present} of {len(classes)} classes: {name} is {len(classes)}-way, {name}_masked {present}-way"
                    result.keep(name, values, note)
                    also = f", masked {percent(masked):.2f} %" if len(values) > 1 else ""
                    log.say(f"{name}: {values[name]:.2f} % of {len(dataset)} pictures{also}{f' ({note})' * bool(note)}")
        except Stopped:
            log.say(result.stopped(name))
            raise SystemExit(128 + max(launch.gather_objects(stop.received))) from None
        log.result(**result.everything())


def corruption_row(look_at, dataset, folders, group, result: Result, log: Run) -> None:
    """One corruption after the other, all severities of it at once; the mean over the folders, as published."""
    done = dict(result.sets.get("corruption", {}).get("folders", {}))
    names = [f"{corruption}/{severity}" for corruption, severity in folders]
    for corruption in dict.fromkeys(c for c, _ in folders):
        mine = [i for i, (c, _) in enumerate(folders) if c == corruption]
        if not all(names[i] in done for i in mine):
            rows = torch.isin(group, torch.tensor(mine)).nonzero().flatten()
            right, _ = look_at(dataset.select(rows), f"corruption {corruption}", True)
            done |= {names[i]: percent(right[group[rows] == i]) for i in mine}
            result.keep("corruption", folders=done)
        found = [done[names[i]] for i in mine]
        log.say(f"corruption {corruption}: {statistics.mean(found):.2f} % of {len(mine)} severities")
    published = [done[n] for n, (c, _) in zip(names, folders) if c in CORRUPTIONS]
    extra = [done[n] for n, (c, _) in zip(names, folders) if c in EXTRA_CORRUPTIONS]
    values = {"corruption": statistics.mean(published)}
    if extra:  # not in the published number
        values["corruption_extra"] = statistics.mean(extra)
    missing = [c for c in CORRUPTIONS if c not in {n for n, _ in folders}]
    note = (
        f"mean over {len(published)} of 75 folders"
        + (f"; missing {', '.join(missing)}" if missing else "")
        + (f"; corruption_extra {values['corruption_extra']:.2f} over {len(extra)} of 20" if extra else "")
    )
    if log.main:
        write_csv(log.folder / "corruption.csv", folders, [done[n] for n in names])
    result.keep("corruption", values, note, folders=done)
    log.say(f"corruption: {values['corruption']:.2f} % of {len(dataset)} pictures ({note})")


def write_csv(path: Path, folders, accuracies) -> None:
    """One line per corruption and severity, then the mean of each corruption."""
    with files.replacing(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["corruption", "severity", "acc1"])
        for (name, severity), accuracy in zip(folders, accuracies):
            out.writerow([name, severity, f"{accuracy:.3f}"])
        for name in dict.fromkeys(n for n, _ in folders):
            mine = [a for (n, _), a in zip(folders, accuracies) if n == name]
            out.writerow([name, "mean", f"{sum(mine) / len(mine):.3f}"])


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
