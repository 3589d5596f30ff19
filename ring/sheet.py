"""Draw the candidates inside, in and beyond the rings of eight training pictures (--show-ring)."""

from __future__ import annotations

import torch
from torch import Tensor

from common import UsageError, augment, figures, files, inputs, launch, options, sets
from ring.monitor import no_ring
from ring.views import last_operation

ANCHORS = 8  # the number of pictures whose ring is drawn
OF_EACH = 3  # the number of candidates drawn of each part of their neighbourhood
PARTS = {
    "anchor": "black",
    "cut out (inside)": "tab:red",
    "the ring": "tab:green",
    "beyond": "tab:blue",
}


@torch.no_grad()
def show_ring(job, method, pictures: sets.PictureSet) -> None:
    """Draw the neighbourhoods of eight training pictures and write them to --show-ring.

    Candidates are the bank rows of the checkpoint that --resume names, with the threshold of its
    step. With MoCo the bank of its queries stands for the queue; with CMC the anchor's lightness is
    compared with the bank of colours. Raises UsageError where there is no checkpoint.
    """
    args = job.args
    if job.saved is None:
        raise UsageError(
            f"--show-ring: there is no checkpoint in {job.folder} yet; train first, or name one "
            "with --resume"
        )
    with job.saved.within():
        method.load_state_dict(job.saved)
        threshold = method.policy(int(job.saved.get("global_step", 0)))
    bank = method.banks[-1]._bank
    try:
        inner, outer = method.rule.ranks(threshold, len(bank), args.batch_size)
    except ValueError as error:
        raise no_ring(args, error) from None
    anchors = torch.linspace(0, len(pictures) - 1, ANCHORS).long()
    plain = augment.ResizeCenterCrop(args.input_res, args.input_res)
    seen = _views(job, pictures, anchors, augment.Compose(plain, last_operation(args)))
    method.network.eval()
    projections = method.project(seen.contiguous(memory_format=torch.channels_last))
    query = projections[:, : bank.shape[1]]
    similarity, rows = (query @ bank.T).sort(1, descending=True)
    ranks = shown_ranks(inner, outer, len(bank))
    parts = [part for part, of_part in ranks.items() for _ in of_part]
    places = [rank for of_part in ranks.values() for rank in of_part]
    columns = rows[:, places].cpu()
    both = torch.cat([anchors[:, None], columns], 1)
    images = _views(job, pictures, both.flatten(), augment.Compose(plain))
    if job.process.is_main:
        labels = pictures.targets[anchors]
        _draw(
            args.show_ring,
            images.unflatten(0, both.shape).cpu(),
            parts,
            captions=[
                [f"{row[rank]:.3f}  #{rank}" for rank in places] for row in similarity.tolist()
            ],
            same=pictures.targets[columns] == labels[:, None],
            names=[pictures.classes[label] if label >= 0 else "" for label in labels.tolist()],
            title=f"{args.method}, {args.negatives}: ranks {inner} to {outer} of {len(bank)}; "
            f"{job.saved.path}",
        )
        print(f"eight pictures and their rings are drawn in {args.show_ring}")


def shown_ranks(inner: int, outer: int, n: int) -> dict[str, list[int]]:
    """Return the ranks that are drawn of each part of a neighbourhood.

    They are the last three inside; the first, a middle and the last of the ring; and those beyond.
    """

    def spread(part: range) -> list[int]:
        if not part:
            return []
        steps = range(OF_EACH)
        return sorted({part[round(i * (len(part) - 1) / (OF_EACH - 1))] for i in steps})

    inside = list(range(inner)[-OF_EACH:])
    return {
        "cut out (inside)": inside,
        "the ring": spread(range(inner, outer)),
        "beyond": spread(range(outer, n)),
    }


def _views(job, pictures: sets.PictureSet, rows: Tensor, view: augment.Compose) -> Tensor:
    """Return these pictures of the set under `view`, in one batch."""
    alone = launch.Process(device=job.process.device)
    chosen = pictures.select(rows)
    loader = inputs.evaluation_loader(job.args, alone, chosen, view, len(rows), workers=0)
    (images,), *_ = next(iter(loader))
    return images


def _draw(
    path: str,
    images: Tensor,
    parts: list[str],
    captions: list[list[str]],
    same: Tensor,
    names: list[str],
    title: str,
) -> None:
    """Draw a row for each anchor, which comes first; a thick frame marks the anchor's class.

    images (anchors, 1 + columns, 3, S, S) in [0, 1]. parts: part of the neighbourhood, for every
    column. same (anchors, columns): whether the class is the anchor's. names: the anchors' classes.
    """
    from matplotlib.figure import Figure  # imported here, as it takes half a second

    rows, columns = images.shape[:2]
    parts = ["anchor", *parts]
    size = (1.15 * columns + 0.8, 1.3 * rows + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    explanation = "similarity and rank; a thick frame marks the anchor's class"
    figure.suptitle(figures.plain(f"{title}\n{explanation}"), fontsize=9)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        for column in range(columns):
            axis = axes[row, column]
            part = parts[column]
            image = images[row, column].permute(1, 2, 0).clamp(0, 1)
            axis.imshow(image.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            is_same = column > 0 and bool(same[row, column - 1])
            for spine in axis.spines.values():
                spine.set(color=PARTS[part], linewidth=4 if is_same else 1)
            caption = captions[row][column - 1] if column else names[row]
            axis.set_xlabel(figures.plain(caption), fontsize=7, labelpad=2)
            if row == 0 and (column == 0 or part != parts[column - 1]):
                axis.set_title(part, fontsize=9, color=PARTS[part], loc="left")
    files.write_figure(figure, path, "show-ring")
