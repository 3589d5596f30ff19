"""Draw the candidates inside, in and beyond the rings of eight training pictures (--show-ring)."""

from __future__ import annotations

import torch
from torch import Tensor

from common import UsageError, augment, cli, figures, inputs, launch, sets
from common.files import write_figure
from ring.monitor import no_ring
from ring.views import last_operation
from runner import checkpoint, loop, pretrained, resume

ANCHORS = 8  # the number of pictures whose ring is drawn
OF_EACH = 3  # the number of candidates drawn of each part of their neighbourhood
PARTS = {
    "anchor": "black",
    "cut out (inside)": "tab:red",
    "the ring": "tab:green",
    "beyond": "tab:blue",
}


def take_flags_of_run(parser: cli.Parser, argv: list[str] | None) -> None:
    """Make the flags of the run that --resume names the defaults of --show-ring.

    Flags that say where a run is kept and what it runs on are not taken.
    """
    args = parser.parse_args(argv)
    if args.show_ring and args.resume not in ("", "auto"):
        saved = checkpoint.Saved(file_of(args))
        with saved.within():
            then = saved.get("opt") or {}
            parser.set_defaults(**{name: then[name] for name in args.compared & then.keys()})


def file_of(args) -> str:
    """Return the checkpoint that --resume names, also by its folder; without --resume "auto"."""
    return pretrained.file_at(args.resume or "auto", "--resume", "name the folder of a run")


@torch.no_grad()
def show_ring(args, process: launch.Process, files: loop.Files, loader, build_method) -> None:
    """Draw the neighbourhoods of eight training pictures and write them to --show-ring.

    Candidates are the bank rows of the checkpoint that --resume names, with the threshold of its
    step. With MoCo the bank of its queries stands for the queue; with CMC the anchor's lightness is
    compared with the bank of colours. loader, build_method: those of the training. The run folder
    is only read, so that a run can be drawn while it trains. Raises UsageError where there is no
    checkpoint.
    """
    args = cli.replace(args, resume=file_of(args))
    saved, _ = resume.find(args, args.folder, files)
    if saved is None:
        raise UsageError(
            f"--show-ring: there is no checkpoint in {args.folder} yet; train first, or name a run "
            "folder with --resume"
        )
    pictures = loader.dataset
    method = build_method(resume.settle(args, saved, files), pictures, len(loader), process)
    with saved.within():
        method.load_state_dict(saved)
        threshold = method.policy(int(saved.get("global_step", 0)))
    bank = method.banks[-1]._bank
    try:
        inner, outer = method.rule.ranks(threshold, len(bank), args.batch_size)
    except ValueError as error:
        raise no_ring(args, error) from None
    anchors = torch.linspace(0, len(pictures) - 1, ANCHORS).long()
    plain = augment.ResizeCenterCrop(args.input_res, args.input_res)
    seen = _views(args, process, pictures, anchors, augment.Compose(plain, last_operation(args)))
    method.network.eval()
    projections = method.project(seen.contiguous(memory_format=torch.channels_last))
    query = projections[:, : bank.shape[1]]
    similarity, rows = (query @ bank.T).sort(1, descending=True)
    ranks = shown_ranks(inner, outer, len(bank))
    parts = [part for part, of_part in ranks.items() for _ in of_part]
    places = [rank for of_part in ranks.values() for rank in of_part]
    columns = rows[:, places].cpu()
    both = torch.cat([anchors[:, None], columns], 1)
    images = _views(args, process, pictures, both.flatten(), augment.Compose(plain))
    if process.is_main:
        for note in resume.differing_flags(saved, args, files):
            print(note)
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
            f"{saved.path}",
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


def _views(args, process, pictures: sets.PictureSet, rows: Tensor, view: augment.Compose) -> Tensor:
    """Return these pictures of the set under `view`, in one batch."""
    alone = launch.Process(device=process.device)
    chosen = pictures.select(rows)
    loader = inputs.evaluation_loader(args, alone, chosen, view, len(rows), workers=0)
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
    write_figure(figure, path)
