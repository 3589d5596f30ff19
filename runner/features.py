"""Compute features of a frozen network, from fresh views or from views embedded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from common import UserError, collectives, data, metrics
from runner.progress import Progress

CACHE_BYTES = 32 << 30  # larger caches are refused, since memory would run out an hour later

Embed = Callable[[Tensor], Tensor]  # images (N, 3, S, S) on the device -> features (N, ...)


@torch.no_grad()
def embed_images(embed: Embed, images: Tensor) -> Tensor:
    """Return the features of images (N, 3, S, S) in float32."""
    return embed(images.contiguous(memory_format=torch.channels_last)).float()


class FreshViews:
    """Iterate over the features of a loader's batches; every epoch has new views."""

    def __init__(self, embed: Embed, loader: data.Loader):
        self.embed = embed
        self.loader = loader
        self.set_epoch = loader.set_epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for (images,), target, index in self.loader:
            yield embed_images(self.embed, images), target, index


class CachedViews:
    """Iterate over features of several augmented views of this rank's pictures, one view per epoch.

    loader: yields rows in order (shuffle=False, drop_last=False); `set_epoch` draws other views.
    views: number of views. The order of an epoch is drawn from its number, the seed and the rank.
    until(batches): yields the batches, and may end the embedding early by an exception. flag: the
    flag that asked for it. remedy: what to do about features of more than CACHE_BYTES, which raise
    UserError.
    """

    def __init__(
        self,
        embed: Embed,
        loader: data.Loader,
        views: int,
        seed: int,
        print_freq: int,
        show: bool,
        until: Callable = iter,
        flag: str = "--cache-views",
        remedy: str = "omit the flag, or choose a layer with fewer",
    ):
        kept = []
        for view in range(views):
            loader.set_epoch(view)
            label = f"Embedding view {view + 1} of {views}: "
            progress = Progress(label, len(loader), print_freq, enabled=show)
            feats, targets = [], []
            for feat, target, _ in until(FreshViews(embed, loader)):
                self._check_size(feat, len(loader) * views, f"{flag} {views}", remedy)
                feats.append(feat)
                targets.append(target)
                progress.update(len(target))
            progress.close()
            kept.append(torch.cat(feats))
        self.features = torch.stack(kept)  # (views, n, ...)
        self.targets = torch.cat(targets)  # (n,)
        # Every rank uses the same number of rows per epoch, so that all take the same steps.
        self.rows = min(collectives.gather_objects(len(self.targets)))
        self.batch = loader.batch_size
        self.seed = seed
        self.epoch = 0
        self.start = 0

    @staticmethod
    def _check_size(feat: Tensor, batches: int, flag: str, remedy: str) -> None:
        needed = 4 * feat.numel() * batches
        if needed > CACHE_BYTES:
            raise UserError(
                f"{flag}: features of {feat[0].numel()} numbers need {needed >> 30} GB of memory; "
                f"{remedy}"
            )

    def __len__(self) -> int:
        return -(-self.rows // self.batch)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch = epoch
        self.start = start_step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        seed = self.seed + 1_000_003 * self.epoch + collectives.rank()
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.targets), generator=generator)[: self.rows]
        order = order.to(self.targets.device)  # once an epoch, since a step must not wait
        features = self.features[self.epoch % len(self.features)]
        for rows in order.split(self.batch)[self.start :]:
            yield features[rows], self.targets[rows], rows


@torch.no_grad()
def validate(classifier: Callable[[Tensor], Tensor], batches) -> tuple[float, float, float]:
    """Return top-1 and top-5 accuracy in percent and the mean cross-entropy over all ranks.

    batches: an iterable of (features, targets, index).
    """
    sums = []
    for feats, target, _ in batches:
        logits = classifier(feats)
        top1, top5 = metrics.accuracy(logits, target, (1, 5))
        loss = cross_entropy(logits, target)
        values = torch.stack([top1, top5, loss, torch.ones_like(loss)])
        sums.append(values.double() * len(target))
    top1, top5, loss, rows = collectives.summed(torch.stack(sums).sum(0)).tolist()
    return top1 / rows, top5 / rows, loss / rows
