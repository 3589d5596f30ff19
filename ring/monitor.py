"""Looking at a training with conditional negatives: 1-NN through the memory bank, and a picture of the ring."""

from __future__ import annotations

import torch
from torch import Tensor

from common import UsageError, augment, files, launch, metrics, options
from runner import checkpoint, knn
from ring.method import last_operation

ANCHORS, OF_EACH = 8, 3  # pictures whose ring is drawn; shown of each part of their neighbourhood
PARTS = {"anchor": "black", "cut out (inside)": "tab:red", "the ring": "tab:green", "beyond": "tab:blue"}


def adopt_published(saved: checkpoint.Saved | None) -> None:
    """A checkpoint that Lightning has written, as a run goes on from it: it holds a list of optimizers."""
    if saved is not None and "optimizer" not in saved:
        if type(found := saved.get("optimizer_states")) is list and found:
            saved["optimizer"] = found[0]


def warn(job, method, ranks: tuple[int, int]) -> None:
    """What is allowed and known to be less than what was meant. ranks: of the narrowest ring."""
    args, left = job.args, ranks[1] - ranks[0]
    unused = {"all": ("thres_outer", "thres_inner"), "ball": () if args.neighbor_views else ("thres_inner",)}
    for flag in args.typed.intersection(unused.get(args.negatives, ())):
        job.warn(f"--{flag.replace('_', '-')} does nothing with --negatives {args.negatives}")
    if args.method == "moco" and args.k >= method.n:
        job.warn(
            f"the queue (--k {args.k}) is as long as the data set ({method.n} images): a picture's own earlier keys are in it"
            + (
                ", which only an inner cut leaves out (--negatives ring)"
                if ranks[0] == 0
                else "; the inner cut is to leave them out"
            )
        )
    elif args.method != "moco" and not args.all_ring and left < args.k:
        job.warn(
            f"--k {args.k} draws more negatives than there are candidates ({left} at the narrowest): each again and again"
        )


# ----------------------------------------------------------------------------------------------------------- 1-NN


def val_loader(args, process: launch.Process, train_set, view: augment.Compose):
    """The pictures of `evaluate_nearest`; None where --nn-every is 0."""
    if not args.nn_every:
        return None
    if not train_set.classes:
        raise UsageError("--nn-every needs labels, and the data has none: give a labelled tree, or omit it")
    pictures = options.open_split(args, "val", classes=train_set.classes)
    how = dict(seed=0, shuffle=False, drop_last=False)
    return options.make_loader(args, process, pictures, (view,), knn.BATCH, **how)


def bank_accuracy(banks: list[Tensor], bank_targets: Tensor, feats: Tensor, targets: Tensor, classes: int) -> Tensor:
    """1-NN accuracy in percent (0-dim): a picture takes the class of the most similar bank row.

    banks: rows (n, D) of one view, or of each view of CMC, whose similarities add up; feats (B, V * D): unit features, view
    by view. Rows without a class (-1) are left out.
    """
    return metrics.knn(torch.cat(banks, 1), bank_targets, feats, targets, classes, k=1)[0]


@torch.no_grad()
def evaluate_nearest(job, method, loader) -> None:
    """1-NN of the projections of val/ through the bank, as published: printed, logged, and told to the outer threshold."""
    pictures = job.source.dataset
    launch.broadcast_buffers(method.encoder)
    method.encoder.eval()
    found = metrics.extract_features(lambda x: knn.embed_images(method.project, x), loader)
    feats, targets = map(launch.gather_ragged, found)
    method.encoder.train()
    banks = [method.bank(i)._bank for i in range(len(method.banks))]
    accuracy = float(bank_accuracy(banks, pictures.targets.to(feats.device), feats, targets, len(pictures.classes)))
    if job.args.anneal == "accuracy":
        method.policy.record(accuracy / 100)
    job.log.say(f"Epoch {job.epoch}: 1-NN through the bank on val: Acc@1 {accuracy:.2f}")
    job.log.log(job.global_step, epoch=job.epoch, nn_acc1=accuracy)


# ------------------------------------------------------------------------------------------------- the ring, drawn


@torch.no_grad()
def show_ring(job, method, pictures) -> None:
    """--show-ring: of eight training pictures those that are just inside the inner cut, in the ring and beyond it.

    From the bank of the checkpoint that --resume names, with the threshold of its step. With MoCo the bank that it keeps of
    its queries stands for the queue. CMC: lightness of the anchor against the bank of colours.
    """
    if job.saved is None:
        raise UsageError(f"--show-ring: no checkpoint in {job.folder} yet; train first, or name one with --resume")
    method.load_state_dict(job.saved)
    args, bank = job.args, method.bank(len(method.banks) - 1)._bank
    inner, outer = method.rule.ranks(method.policy(int(job.saved.get("global_step", 0))), len(bank), args.batch_size)
    anchors = torch.linspace(0, len(pictures) - 1, ANCHORS).long()
    view = augment.Compose(augment.ResizeCenterCrop(args.input_res, args.input_res))
    (seen,) = _views(job, pictures, anchors, augment.Compose(view.geometry, last_operation(args)))
    method.encoder.eval()
    query = method.project(seen.contiguous(memory_format=torch.channels_last))[:, : bank.shape[1]]
    similarity, rows = (query @ bank.T).sort(1, descending=True)
    ranks = _ranks(inner, outer, len(bank))
    shown = [(part, rank) for part, of_part in ranks.items() for rank in of_part]
    columns = rows[:, [rank for _, rank in shown]].cpu()
    (images,) = _views(job, pictures, torch.cat([anchors[:, None], columns], 1).flatten(), view)
    if job.process.is_main:
        images = images.unflatten(0, (len(anchors), -1)).cpu()
        texts = [
            [f"{s:.3f}  #{r}" for (_, r), s in zip(shown, row[[r for _, r in shown]].tolist())] for row in similarity
        ]
        same = pictures.targets[columns] == pictures.targets[anchors][:, None]
        names = [pictures.classes[t] if t >= 0 else "" for t in pictures.targets[anchors].tolist()]
        title = f"{args.method}, {args.negatives}: ranks {inner} to {outer} of {len(bank)}; {job.saved.path}"
        _draw(args.show_ring, images, [part for part, _ in shown], texts, same, names, title)
        print(f"eight pictures and their ring: {args.show_ring}")


def _ranks(inner: int, outer: int, n: int) -> dict[str, list[int]]:
    """Ranks to be shown of each part: the last ones inside, some over the ring, the first, a middle and the last beyond."""
    inside, ring, beyond = range(inner)[-OF_EACH:], range(inner, outer), range(outer, n)
    spread = [
        [part[round(i * (len(part) - 1) / (OF_EACH - 1))] for i in range(OF_EACH)] if part else []
        for part in (ring, beyond)
    ]
    return dict(zip(list(PARTS)[1:], (list(inside), *(sorted(set(part)) for part in spread))))


def _views(job, pictures, rows: Tensor, view: augment.Compose) -> list[Tensor]:
    """One batch: these rows of the set under `view`."""
    alone = launch.Process(device=job.process.device)
    how = dict(seed=0, shuffle=False, drop_last=False, workers=0)
    loader = options.make_loader(job.args, alone, pictures.select(rows), (view,), len(rows), **how)
    return next(iter(loader))[0]


def _draw(path: str, images: Tensor, parts: list[str], texts, same: Tensor, names: list[str], title: str) -> None:
    """images (anchors, 1 + columns, 3, S, S) in [0, 1]: the anchor first. A thick frame: of the anchor's class."""
    from matplotlib.figure import Figure  # half a second to import: not at start

    rows, columns = images.shape[:2]
    figure = Figure(figsize=(1.15 * columns + 0.8, 1.3 * rows + 0.9), layout="constrained")
    figure.suptitle(f"{title}\nsimilarity and rank; a thick frame: of the anchor's class", fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        for column in range(columns):
            axis, part = axes[row, column], ("anchor", *parts)[column]
            axis.imshow(images[row, column].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            thick = column > 0 and bool(same[row, column - 1])
            for spine in axis.spines.values():
                spine.set(color=PARTS[part], linewidth=4 if thick else 1)
            axis.set_xlabel(texts[row][column - 1] if column else names[row], fontsize=7, labelpad=2)
            if row == 0 and (column == 0 or part != ("anchor", *parts)[column - 1]):
                axis.set_title(part, fontsize=9, color=PARTS[part], loc="left")
    try:
        with files.replacing(path) as file:
            figure.savefig(file, format="png", dpi=110)
    except OSError as error:
        raise UsageError(f"--show-ring {path}: {error.strerror or error}") from None
