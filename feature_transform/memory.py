"""The memories that a query is compared with, and its logits: a queue of keys, or a memory bank.

Positives, negatives, and the names and shapes of the buffers are those of memory/ of
DTennant/CL-Visualizing-Feature-Transformation at c53d1be, and so of PyContrast. It differs from
that code in these ways: a memory is written after the backward pass, from the features of all
ranks; every memory can be transformed; the pointer of a queue can be saved.

Features of two modalities are side by side, (B, 2 D). Each modality is compared with the memory of
the other one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import memory, nce
from feature_transform import transform
from feature_transform.transform import NOTHING, Draws, Rule

Logits = list[Tensor]  # (B, 1 + K) for each modality, the positive in column 0


def info_nce(logits: Logits) -> Tensor:
    """Return the InfoNCE loss in nats: cross-entropy of column 0, summed over the modalities.

    logits: (B, 1 + K) for each modality, the positive in column 0. The loss is the mean over B.
    Check: equal logits of one modality give log(1 + K).
    """
    return sum(nce.info_nce(one) for one in logits)


def hits(logits: Logits) -> Tensor:
    """Return the percentage of positives with the highest score, mean over modalities."""
    shares = [(one[:, 0] > one[:, 1:].amax(1)).float().mean() * 100 for one in logits]
    return sum(shares) / len(shares)


class Memory(nn.Module):
    """Unit rows in the buffer `memory` (n, dim), or in `memory_1` and `memory_2` of two modalities.

    Before training they have random directions.
    """

    def __init__(self, modalities: int, n: int, dim: int, temperature: float):
        super().__init__()
        self.n = n
        self.dim = dim
        self.temperature = temperature
        self.names = ["memory"]
        if modalities > 1:
            self.names = [f"memory_{number + 1}" for number in range(modalities)]
        for name in self.names:
            self.register_buffer(name, F.normalize(torch.randn(n, dim), dim=1))
        # Storage of the transformed rows, which are computed anew at every step.
        self.scratch: list[Tensor | None] = [None] * modalities

    def rows(self) -> list[Tensor]:
        """Return the memory that each modality is compared with: of two, that of the other one."""
        return [nce.at_least_float32(getattr(self, name)) for name in reversed(self.names)]

    def as_rows(self, features: Tensor) -> Tensor:
        """Return features in the precision of `rows`: float32, unless the memory is float64."""
        return features.to(self.rows()[0].dtype)

    def candidates(self, rule: Rule) -> int:
        """Return the number of rows that become negatives, each with a coefficient and partner."""
        return self.n

    def draw(self, rule: Rule | None, pairs: int, generator: torch.Generator) -> list[Draws]:
        """Draw the random numbers of a step for each modality; NOTHING without a rule.

        pairs, generator: as in `Rule.draw`.
        """
        if rule is None:
            return [NOTHING] * len(self.names)
        count = self.candidates(rule)
        return [rule.draw(pairs, self.dim, count, generator) for _ in self.names]

    def mixed(self, number: int, rule: Rule, draws: Draws) -> Tensor:
        """Return the transformed rows that modality `number` is compared with.

        They are one copy of its memory, whose storage is kept for the next step.
        """
        rows = self.rows()[number]
        if draws.negative is not None and self.scratch[number] is None:
            self.scratch[number] = torch.empty_like(rows)
        return transform.negatives(
            rows,
            draws.negative,
            draws.order,
            normalise="neg" in rule.normalise,
            out=self.scratch[number],
        )


class KeyQueue(Memory):
    """The queue of MoCo: the last n keys, first in, first out.

    `pointer` is the row to be written next; the authors' files lack it.
    """

    def __init__(self, modalities: int, n: int, dim: int, temperature: float):
        super().__init__(modalities, n, dim, temperature)
        self.register_buffer("pointer", torch.tensor(0), persistent=False)

    def forward(
        self, queries: Sequence[Tensor], key: Tensor, rule: Rule | None, draws: list[Draws]
    ) -> list[Logits]:
        """Return [q'.k', q'.queue'] / T of every query (B, V D) with the key (B, V D).

        V is the number of modalities. The queries (of the picture, and of its jigsaw) share the
        draws and the transformed queue. The logits are float32 also under autocast. With a rule, a
        second call must wait for the backward pass of the first.
        """
        if rule is None:
            rule = Rule(None, None)
        with torch.autocast(key.device.type, enabled=False):
            queries = [self.as_rows(query) for query in queries]
            return self.logits(queries, self.as_rows(key), rule, draws)

    def logits(self, queries: list[Tensor], key: Tensor, rule: Rule, draws: list[Draws]):
        """Return the result of `forward` for features in the precision of `rows`."""
        logits: list[Logits] = [[] for _ in queries]
        for number, own in enumerate(key.split(self.dim, 1)[::-1]):
            rows = self.mixed(number, rule, draws[number])
            for query, of_query in zip(queries, logits):
                part = query.split(self.dim, 1)[number]
                coefficient = draws[number].positive
                moved, positive = transform.pair(part, own, coefficient, "pos" in rule.normalise)
                asked = part if rule.original_query else moved
                columns = ((moved * positive).sum(1, keepdim=True), asked @ rows.T)
                of_query.append(torch.cat(columns, 1).div_(self.temperature))
        return logits

    def enqueue(self, keys: Tensor) -> None:
        """Write the untransformed keys (B, V D) of all ranks over the oldest rows."""
        start = self.pointer.clone()
        for name, part in zip(self.names, keys.split(self.dim, 1)):
            self.pointer.copy_(start)
            memory.enqueue(getattr(self, name), self.pointer, part)


class MemoryBank(Memory):
    """The bank of InsDis, CMC and PIRL: a row for each of n training pictures, at its number.

    k: number of drawn rows, the negatives of a query. momentum: m in the update of a row to
    unit(m row + (1 - m) feature).
    """

    def __init__(
        self, modalities: int, n: int, dim: int, temperature: float, k: int, momentum: float
    ):
        super().__init__(modalities, n, dim, temperature)
        self.k = k
        self.momentum = momentum

    def candidates(self, rule: Rule) -> int:
        """Return k, or n where the whole bank is mixed.

        The drawn rows of a query are mixed with each other, so that a score is a mixture of two
        scores. That is impossible with a coefficient for each number, or with negatives of unit
        length; then the whole bank is mixed, like a queue.
        """
        return self.n if self.is_mixed_whole(rule) else self.k

    def is_mixed_whole(self, rule: Rule) -> bool:
        if rule.negatives is None:
            return False
        return rule.negatives == "element" or "neg" in rule.normalise

    def forward(
        self, queries: Sequence[Tensor], rows: Tensor, rule: Rule | None, draws: list[Draws]
    ) -> list[Logits]:
        """Return [x'.w0', x'.w1', ...] / T of every query (B, V D) with the drawn rows.

        rows (B, K + 1): drawn by `common.memory.draw_rows`; the positive w0 is the picture's own
        row. The queries (of the picture, and of its jigsaw) share the draws. The logits are float32
        also under autocast. With a rule, a second call must wait for the backward pass of the
        first.
        """
        logits: list[Logits] = [[] for _ in queries]
        for number, bank in enumerate(self.rows()):
            mixed = bank
            if rule is not None and self.is_mixed_whole(rule):
                mixed = self.mixed(number, rule, draws[number])
            for query, of_query in zip(queries, logits):
                part = self.as_rows(query).split(self.dim, 1)[number]
                if rule is None:
                    scores = memory.bank_scores(part, bank, rows)
                else:
                    scores = self.scores(part, bank, mixed, rows, rule, draws[number])
                of_query.append(scores.div_(self.temperature))
        return logits

    def scores(
        self, query: Tensor, bank: Tensor, mixed: Tensor, rows: Tensor, rule: Rule, draws: Draws
    ) -> Tensor:
        """Return the transformed scores (B, 1 + K) of one modality's query (B, D).

        mixed: the bank that the negatives are drawn from.
        """
        own = bank[rows[:, 0]]
        moved, positive = transform.pair(query, own, draws.positive, "pos" in rule.normalise)
        asked = query if rule.original_query else moved
        negatives = memory.bank_scores(asked, mixed, rows[:, 1:])
        if draws.negative is not None and not self.is_mixed_whole(rule):
            negatives = torch.lerp(negatives[:, draws.order], negatives, draws.negative.view(-1))
        return torch.cat([(moved * positive).sum(1, keepdim=True), negatives], 1)

    def update(self, feat: Tensor, index: Tensor) -> None:
        """Update the rows `index` (B,) with the untransformed features (B, V D) of all ranks."""
        for name, part in zip(self.names, feat.split(self.dim, 1)):
            memory.update_rows(getattr(self, name), index, part, self.momentum)
