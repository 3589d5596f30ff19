#!/usr/bin/env python
"""The robustness row of a classifier: clean, corrupted, sketch, stylized and rendition accuracy (Table 1 of the paper).

Ge et al. (NeurIPS 2021, arXiv:2110.14189) released no evaluation code; each set follows the protocol of its own authors
(docs in nonsem_neg/README.md). Every set is optional; pictures are mapped to classes by folder name (WordNet id):

    python nonsem_neg/eval_robustness.py IMAGENET100 --classifier ckpts/patch-lin/checkpoint_robust_0199.pth.tar \\
        --corruption IMAGENET-C --sketch IMAGENET-SKETCH --stylized STYLIZED --rendition IMAGENET-R
    python nonsem_neg/eval_robustness.py --demo
"""

import csv
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from pathlib import Path

import torch

from common import UsageError, UserError, augment, backbones, checkpoint, cli, options, processes, run, sets
from common.precision import Precision
from preprocess import demo

CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow", "frost",
    "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SETS = ("clean", "corruption", "sketch", "stylized", "rendition")
PRESETS = {
    "demo": dict(
        data="data/demo", classifier="runs/try-lincls", corruption="data/demo/corruption", sketch="data/demo/sketch",
        stylized="data/demo/stylized", rendition="data/demo/rendition", ckpt_path="runs/try-robustness", workers=2,
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
    g.add_argument("--extra-corruptions", action="store_true", help="also " + ", ".join(EXTRA_CORRUPTIONS))
    about = (
        "were the corrupted and stylized pictures resized and centre-cropped before (as ImageNet-C is)? then they are not "
        "resized again; auto: yes if they are 224 x 224"
    )
    g.add_argument("--precropped", choices=["auto", "yes", "no"], default="auto", help=about)
    options.add_data_arguments(g)

    g = parser.add_argument_group("model")
    about = "checkpoint of main_lincls.py, or its run folder: the last epoch"
    g.add_argument("--classifier", default="", metavar="PATH", help=about)
    g.add_argument("--best", action="store_true", help="of a run folder take the best epoch on val instead of the last")
    g.add_argument("-a", "--arch", help="torchvision network; default: what the checkpoint says")

    g = parser.add_argument_group("run")
    g.add_argument("-b", "--batch-size", type=cli.positive_int, default=256, help="global batch over all processes")
    g.add_argument("--ckpt_path", default="./ckpts/robustness", help="run folder: result.json, corruption.csv")
    g.add_argument("--label", help="name of the row in the table; default: from the pre-training flags")
    options.add_hardware_arguments(parser)
    args = parser.parse_args(argv)
    if not args.classifier:
        raise UsageError("no classifier: give --classifier CHECKPOINT (written by main_lincls.py), or --demo")
    if not any((args.data, args.corruption, args.sketch, args.stylized, args.rendition)):
        raise UsageError("nothing to evaluate on: give DATA (clean), --corruption, --sketch, --stylized or --rendition")
    return args


def read_classifier(args):
    path = args.classifier
    if args.demo and "classifier" not in args.typed and not os.path.exists(path):
        raise UsageError(f"{path}: nothing to evaluate yet; run nonsem_neg/main_lincls.py --demo first")
    if os.path.isdir(path):
        pattern = "model_best_*.pth.tar" if args.best else "checkpoint_robust_*.pth.tar"
        path = checkpoint.newest(path, (pattern,))
        if path is None:
            raise UsageError(f"--classifier {args.classifier}: no {pattern} in this folder; run main_lincls.py first")
    saved = checkpoint.Saved(path)
    if args.arch and saved.get("arch", args.arch) != args.arch:
        raise UserError(f"{path} is of --arch {saved['arch']}, not {args.arch}")
    args.arch = saved.get("arch", args.arch or "resnet50")
    if "input_res" not in args.typed:
        args.input_res = saved.get("args", {}).get("input_res", args.input_res)
    return saved


def class_names(saved, args) -> list[str]:
    """Class folder names in label order: from the checkpoint, else (an authors' file) from the clean set or a list."""
    if "classes" in saved:
        return saved["classes"]
    if args.data:
        return options.open_split(args, "val").classes
    if args.class_list:
        return sets.read_class_list(args.class_list)
    raise UsageError(f"{saved.path} does not name its classes: give DATA (the clean set) or --class-list as well")


def build_model(saved, arch: str, process: processes.Process) -> torch.nn.Module:
    state = checkpoint.backbone(saved)
    if "fc.weight" not in state or state["fc.weight"].ndim != 2 or "best_acc1" not in saved:
        raise UserError(f"{saved.path} holds no classifier: give a checkpoint of main_lincls.py, not of pre-training")
    small_stem = state["conv1.weight"].shape[-1] == 3
    model = backbones.build(arch, len(state["fc.weight"]), small_stem=small_stem)
    checkpoint.load_into(model, state, saved.path)
    return model.eval().to(process.device, memory_format=torch.channels_last)


def open_by_class(folder: str, classes: list[str]) -> sets.FolderSet:
    """The pictures of those class folders that the classifier knows; other folders (ImageNet has 1000) are left out."""
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: no such folder")
    present = [name for name in classes if os.path.isdir(os.path.join(folder, name))]
    if not present:
        raise UsageError(
            f"{folder}: none of the {len(classes)} class folders of the classifier ({classes[0]}, ...) is in it"
        )
    return sets.open_tree(folder, class_list=present, classes=classes, subset=True)


def open_clean(args, classes: list[str]) -> sets.PictureSet:
    if args.dataset != "folder":
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


def geometry(args, dataset, cropped_before: bool) -> augment.ResizeCenterCrop:
    """Resize and centre crop, or for pictures that have been through that already, nothing (at 224 pixels)."""
    if cropped_before:
        size = dataset.open(0).size
        if args.precropped == "yes" or (args.precropped == "auto" and size == (224, 224)):
            return augment.ResizeCenterCrop(None if args.input_res == 224 else args.input_res, args.input_res)
    return augment.ResizeCenterCrop(options.eval_resize(args.input_res), args.input_res)


def classify(model, images, precision) -> torch.Tensor:
    """Logits in float32, also where the backbone runs in autocast: as main_lincls.py trained and validated them."""
    with precision.autocast():
        feats = backbones.feature(model, images.contiguous(memory_format=torch.channels_last), 6)
    return model.fc(feats.float())


@torch.no_grad()
def score(
    model, dataset, args, process, precision, label, log, cropped_before=False
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every picture, 1 where the argmax is its class: over all classes, and over those that the set has (masked)."""
    normalize = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    view = augment.Compose(geometry(args, dataset, cropped_before), normalize)
    batch = max(1, args.batch_size // process.world_size)
    loader = options.make_loader(args, process, dataset, (view,), batch, seed=0, shuffle=False, drop_last=False)
    absent = torch.ones(len(dataset.classes), dtype=torch.bool)
    absent[dataset.targets.unique()] = False
    absent = absent.to(process.device)
    progress = run.Progress(f"{label}: ", len(loader), 25, enabled=log.main and len(loader) > 25)
    rows, right, right_masked = [], [], []
    for (images,), target, index in loader:
        # published heads have 1000 outputs whatever the number of classes
        logits = classify(model, images, precision)[:, : len(absent)]
        rows.append(index)
        right.append(logits.argmax(1) == target)
        right_masked.append(logits.masked_fill(absent, -torch.inf).argmax(1) == target)
        progress.update(len(target))
    progress.close()
    loader.close()
    log.say_replaced(loader)
    rows, right, right_masked = (processes.gather_ragged(torch.cat(x).float()) for x in (rows, right, right_masked))
    order = rows.double().argsort()  # ranks hold interleaved shares
    return right[order].cpu(), right_masked[order].cpu()


def percent(x: torch.Tensor) -> float:
    return 100 * x.mean().item()


def row_label(saved) -> str:
    """ "MoCo + patch (K 16384, alpha 2)" from the flags of the pre-training run, where the checkpoint has them."""
    a = saved.get("pretrained_args") or {}
    if not a:
        return Path(saved.path).parent.name
    kind = a.get("robust") if a.get("num_nonsem") else "none"
    details = [f"K {a['moco_k']}"]
    if kind != "none":
        details += [f"alpha {a['alpha']:g}"] + ([f"M {a['num_nonsem']}"] if a["num_nonsem"] > 1 else [])
    return f"MoCo{'' if kind == 'none' else ' + ' + kind} ({', '.join(details)})"


def settings(saved) -> dict:
    """What must be equal for two runs to be two seeds of one experiment."""
    a = saved.get("pretrained_args") or {}
    names = ("lr", "batch_size", "moco_m", "moco_t", "input_res", "mlp", "aug_plus", "cos", "patch_ratio", "small_stem")
    return {name: a[name] for name in names if name in a}


def worker(args, process: processes.Process) -> None:
    demo.ensure_for(args, process)
    saved = read_classifier(args)
    classes = class_names(saved, args)
    model = build_model(saved, args.arch, process)
    precision = Precision(args.amp, process.device)
    shared = any(Path(args.ckpt_path).glob("*.pth.tar"))  # with a training, whose records stay as they are
    log = run.Run(args.ckpt_path, args, process, tensorboard=False, suffix="-robustness" if shared else "")
    log.derived(classifier=saved.path, classes=len(classes), precision=str(precision))

    row, notes = {}, {}
    for name in SETS:
        folder = args.data if name == "clean" else getattr(args, name)
        if not folder:
            log.say(f"{name}: not given, left out")
            continue
        if name == "corruption":
            dataset, folders, group = open_corruptions(args, classes)
            right, _ = score(model, dataset, args, process, precision, name, log, cropped_before=True)
            per_folder = [percent(right[group == i]) for i in range(len(folders))]
            published = [a for a, (n, _) in zip(per_folder, folders) if n in CORRUPTIONS]
            extra = [a for a, (n, _) in zip(per_folder, folders) if n in EXTRA_CORRUPTIONS]
            if not published:
                raise UsageError(f"{args.corruption}: none of the 15 corruptions of the published number is in it")
            row[name] = statistics.mean(published)
            if extra:  # not in the published number
                row["corruption_extra"] = statistics.mean(extra)
            missing = [c for c in CORRUPTIONS if c not in {n for n, _ in folders}]
            notes[name] = (
                f"mean over {len(published)} of 75 folders"
                + (f"; missing {', '.join(missing)}" if missing else "")
                + (f"; corruption_extra {row['corruption_extra']:.2f} over {len(extra)} of 20" if extra else "")
            )
            if log.main:
                write_csv(log.folder / "corruption.csv", folders, per_folder)
        else:
            dataset = open_clean(args, classes) if name == "clean" else open_by_class(folder, classes)
            right, masked = score(model, dataset, args, process, precision, name, log, name == "stylized")
            row[name] = percent(right)
            present = len(dataset.targets.unique())
            if present < len(classes):
                row[f"{name}_masked"] = percent(masked)
                notes[name] = (
                    f"{present} of {len(classes)} classes: {name} is {len(classes)}-way, {name}_masked {present}-way"
                )
        masked = f", masked {row[name + '_masked']:.2f} %" if f"{name}_masked" in row else ""
        note = f" ({notes[name]})" if name in notes else ""
        log.say(f"{name}: {row[name]:.2f} % of {len(dataset)} pictures{masked}{note}")
    before = saved.get("pretrained_args") or {}
    about = dict(table="nonsem_neg/published.json", label=args.label or row_label(saved), evaluated=saved.path)
    about |= dict(
        data=args.data, pretrained=saved.get("pretrained"), epochs=saved.get("pretrained_epoch"), arch=args.arch
    )
    about |= dict(seed=before.get("seed"), precision=str(precision), settings=settings(saved)) | saved.how_far()
    log.result(**about, missing=[name for name in SETS if name not in row], notes=notes, **row)
    log.close()


def write_csv(path: Path, folders, accuracies) -> None:
    """One line per corruption and severity, then the mean of each corruption."""
    with checkpoint.replacing(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["corruption", "severity", "acc1"])
        for (name, severity), accuracy in zip(folders, accuracies):
            out.writerow([name, severity, f"{accuracy:.3f}"])
        for name in dict.fromkeys(n for n, _ in folders):
            mine = [a for (n, _), a in zip(folders, accuracies) if n == name]
            out.writerow([name, "mean", f"{sum(mine) / len(mine):.3f}"])


def main(argv=None) -> None:
    processes.launch(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
