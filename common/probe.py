"""Looking at features that are not trained: a linear classifier on them, and k-NN while a network is being trained.

`embed` is the script's: it maps a batch of images on the device to float32 features and knows the layer and the precision.
Pictures are embedded once (`ViewCache`) or batch by batch (`embedded`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from common import UserError, metrics, options, processes, run
from common.augment import Compose
from common.data import Loader
from common.sets import PictureSet

KNN_BATCH = 256  # pictures per process
CACHE_BYTES = 32 << 30  # more than this is refused: the script would run out of memory an hour later

Batches = Iterable[tuple[Tensor, Tensor]]  # (features, targets)


def embedded(embed: Callable[[Tensor], Tensor], loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    """(features, targets) of every batch of a loader, computed as they are asked for."""
    for (images,), target, _ in loader:
        yield embed(images), target


class ViewCache:
    """Features of `views` augmented views of every picture of this rank, embedded once and gone through in turn.

    loader goes over its rows in order (shuffle=False, drop_last=False) and draws other views at every `set_epoch`.
    Raises UserError where the features would need more than CACHE_BYTES.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor], loader: Loader, views: int, print_freq: int, show: bool):
        kept = []
        for view in range(views):
            loader.set_epoch(view)
            label = f"Embedding view {view + 1} of {views}: "
            progress = run.Progress(label, len(loader), print_freq, enabled=show)
            feats, targets = [], []
            for feat, target in embedded(embed, loader):
                if not feats and not kept:
                    needed = 4 * feat[0].numel() * len(feat) * len(loader) * views
                    if needed > CACHE_BYTES:
                        raise UserError(
                            f"--cache-views {views}: features of {feat[0].numel()} numbers need {needed >> 30} GB of "
                            "memory; leave the flag away, or choose a layer with fewer"
                        )
                feats.append(feat)
                targets.append(target)
                progress.update(len(target))
            progress.close()
            kept.append(torch.cat(feats))
        self.features, self.targets = torch.stack(kept), torch.cat(targets)  # (views, n, ...), (n,)
        # As many rows per epoch as every rank has, so that all of them make the same number of steps.
        self.rows = min(processes.gather_objects(len(self.targets)))

    def steps(self, batch: int) -> int:
        return -(-self.rows // batch)

    def batches(self, epoch: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(features, targets) of one epoch over the view whose turn it is, in an order drawn from the seed."""
        generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch + processes.rank())
        order = torch.randperm(len(self.targets), generator=generator)[: self.rows]
        features = self.features[epoch % len(self.features)]
        for rows in order.split(batch):
            rows = rows.to(self.targets.device)
            yield features[rows], self.targets[rows]


@torch.no_grad()
def validate(classifier: Callable[[Tensor], Tensor], batches: Batches) -> tuple[float, float, float]:
    """(top-1, top-5) accuracy in percent and mean cross-entropy over (features, targets), all ranks together."""
    sums = []
    for feats, target in batches:
        logits = classifier(feats)
        top1, top5 = metrics.accuracy(logits, target, (1, 5))
        loss = torch.nn.functional.cross_entropy(logits, target)
        sums.append(torch.stack([top1, top5, loss, torch.ones_like(top1)]).double() * len(target))
    top1, top5, loss, n = processes.sum_ranks(torch.stack(sums).sum(0)).tolist()
    return top1 / n, top5 / n, loss / n


# ----------------------------------------------------------------------------------------------------------------- k-NN


def knn_loaders(args, process: processes.Process, train_set: PictureSet, view: Compose) -> tuple[Loader, Loader]:
    """The bank (the training pictures) and the queries (val/) of `evaluate_knn`; view: without anything random."""
    return tuple(
        options.make_loader(args, process, pictures, (view,), KNN_BATCH, seed=0, shuffle=False, drop_last=False)
        for pictures in (train_set, options.open_split(args, "val", classes=train_set.classes))
    )


def evaluate_knn(
    network: nn.Module, embed: Callable[[Tensor], Tensor], loaders: tuple[Loader, Loader], k: int, log: run.Run, epoch: int,
    step: int,
) -> None:  # fmt: skip
    """Weighted k-NN: the training pictures vote on those of val/. Prints and logs it for `epoch`, after global step `step`.

    network: in training mode, in evaluation mode while `embed` is called, with the batch-norm statistics of rank 0.
    """
    processes.broadcast_buffers(network)
    network.eval()
    (bank, bank_targets), (feats, targets) = (
        map(processes.gather_ragged, metrics.extract_features(embed, loader)) for loader in loaders
    )
    network.train()
    top1, top5 = map(float, metrics.knn(bank, bank_targets, feats, targets, len(loaders[0].dataset.classes), k=k))
    log.say(f"Epoch {epoch}: k-NN (k {k}) on val: Acc@1 {top1:.2f} Acc@5 {top5:.2f}")
    log.log(step, epoch=epoch, knn_acc1=top1, knn_acc5=top5)
