"""Training a classifier on frozen features: embed every picture once (or batch by batch), then batches of features.

`embed` is the script's: it maps a batch of images on the device to float32 features and knows the layer and the precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from common import UserError, launch, metrics, run
from common.data import Loader

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
        self.rows = min(launch.gather_objects(len(self.targets)))

    def steps(self, batch: int) -> int:
        return -(-self.rows // batch)

    def batches(self, epoch: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(features, targets) of one epoch over the view whose turn it is, in an order drawn from the seed."""
        generator = torch.Generator().manual_seed(seed + 1_000_003 * epoch + launch.rank())
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
    top1, top5, loss, n = launch.sum_ranks(torch.stack(sums).sum(0)).tolist()
    return top1 / n, top5 / n, loss / n
