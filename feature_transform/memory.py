"""What is compared with: a queue of keys, or a bank with a row for each picture, of one modality or of two, and the logits.

Follows memory/ of DTennant/CL-Visualizing-Feature-Transformation at c53d1be (and so HobbitLong/PyContrast): names and shapes
of the buffers, what is compared with what. Differs: a memory is written after the backward pass, from the features of all
ranks; the feature transformation is there for every one of them; a queue's pointer is saved beside it.

Features of two modalities lie side by side, (B, 2 D). Each is compared with the memory of the other one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError
from runner import checkpoint
from common.memory import bank_scores
from feature_transform import transform
from feature_transform.transform import NOTHING, Draws, Rule

Logits = list[Tensor]  # (B, 1 + K) for each modality, the positive in column 0


class Memory(nn.Module):
    """`memory` (n, dim), or of two modalities `memory_1` and `memory_2`: unit vectors, at first in random directions."""

    def __init__(self, modalities: int, n: int, dim: int, temperature: float):
        super().__init__()
        self.n, self.dim, self.temperature = n, dim, temperature
        self.names = ["memory"] if modalities == 1 else [f"memory_{i + 1}" for i in range(modalities)]
        for name in self.names:
            self.register_buffer(name, F.normalize(torch.randn(n, dim), dim=1))
        self.scratch: list[Tensor | None] = [None] * modalities  # transformed rows, written anew at every step

    def rows(self) -> list[Tensor]:
        """The memory that each modality of a query is compared with: the other one's, where there are two."""
        return [getattr(self, name) for name in reversed(self.names)]

    def candidates(self, rule: Rule) -> int:
        """How many coefficients and which permutation the transformation of the negatives needs."""
        return self.n

    def draw(self, rule: Rule | None, b: int, generator: torch.Generator) -> list[Draws]:
        """What is drawn for a step, for each modality; NOTHING without a rule."""
        if rule is None:
            return [NOTHING] * len(self.names)
        return [rule.draw(b, self.dim, self.candidates(rule), generator) for _ in self.names]

    def mixed(self, number: int, rule: Rule, draws: Draws) -> Tensor:
        """All rows that modality `number` is compared with, transformed: one copy of them, kept for the next step."""
        rows = self.rows()[number]
        if draws.negative is not None and self.scratch[number] is None:
            self.scratch[number] = torch.empty_like(rows)
        return transform.negatives(rows, draws.negative, draws.order, "neg" in rule.normalise, out=self.scratch[number])

    def load(self, contrast: dict, path: str, hint: str) -> None:
        """Put back a checkpoint's rows; UserError, naming `path`, where there are other ones. hint: what gives another n."""
        if set(contrast) != set(self.names):
            raise UserError(f"{path} is of another method: its memory holds {', '.join(contrast)[:80] or 'nothing'}")
        rows = (*contrast[self.names[0]].shape, 0)[0]
        if rows != self.n:
            raise UserError(f"{path} was made with {hint.format(rows)}, this run has {self.n}")
        checkpoint.load_into(self, contrast, path, flag="--feat_dim")


class KeyQueue(Memory):
    """MoCo: the last n keys, first in, first out. `pointer`, the next row to be written, is not in the published file."""

    def __init__(self, modalities: int, n: int, dim: int, temperature: float):
        super().__init__(modalities, n, dim, temperature)
        self.register_buffer("pointer", torch.tensor(0), persistent=False)

    def forward(self, queries: Sequence[Tensor], key: Tensor, rule: Rule | None, draws: list[Draws]) -> list[Logits]:
        """[q'.k', q'.queue'] / T of every query (B, V D) and its key (B, V D), for each of V modalities.

        The queries (the picture, and its jigsaw) share the draws and the transformed queue.
        """
        found: list[Logits] = [[] for _ in queries]
        keys, rule = key.split(self.dim, 1)[::-1], rule or Rule(None, None)
        for number, (own, drawn) in enumerate(zip(keys, draws)):
            rows = self.mixed(number, rule, drawn)
            for query, logits in zip(queries, found):
                query = query.split(self.dim, 1)[number]
                moved, positive = transform.pair(query, own, drawn.positive, "pos" in rule.normalise)
                columns = (moved * positive).sum(1, keepdim=True), (query if rule.original_query else moved) @ rows.T
                logits.append(torch.cat(columns, 1).div_(self.temperature))
        return found

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write the untransformed keys (B, V D) of all ranks over the oldest rows. B need not divide n."""
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % self.n
        for name, feat in zip(self.names, keys.split(self.dim, 1)):
            getattr(self, name).index_copy_(0, rows, feat)
        self.pointer.add_(len(keys)).remainder_(self.n)

    def place(self, extra: dict | None, path: str) -> None:
        """The pointer of a checkpoint; None, as in a published file, is 0."""
        if extra is not None and not (extra.keys() == {"pointer"} and 0 <= extra["pointer"] < self.n):
            raise UserError(f"{path}: queue holds {extra}, expected a pointer below {self.n}")
        self.pointer.fill_(int(extra["pointer"]) if extra else 0)


class MemoryBank(Memory):
    """InsDis, CMC, PIRL: one row for each of n training pictures, addressed by its number; k drawn ones are negatives.

    momentum m: of a row, row <- unit(m row + (1 - m) feature).
    """

    def __init__(self, modalities: int, n: int, dim: int, temperature: float, k: int, momentum: float):
        super().__init__(modalities, n, dim, temperature)
        self.k, self.momentum = k, momentum

    def candidates(self, rule: Rule) -> int:
        """The drawn rows are mixed with each other, slot by slot, so that a score is a mixture of two scores. Where that is not
        so (a coefficient for each number, or rows of unit length) the whole bank is mixed, like a queue."""
        return self.n if self.whole(rule) else self.k

    def whole(self, rule: Rule) -> bool:
        return rule.negatives == "element" or rule.negatives is not None and "neg" in rule.normalise

    def forward(self, queries: Sequence[Tensor], rows: Tensor, rule: Rule | None, draws: list[Draws]) -> list[Logits]:
        """[x'.w0', x'.w1', ...] / T of every query (B, V D) against the drawn rows (B, K + 1) of `memory.draw_rows`.

        The positive w0 is the picture's own row. The queries (the picture, and its jigsaw) share the draws.
        """
        found: list[Logits] = [[] for _ in queries]
        for number, (bank, drawn) in enumerate(zip(self.rows(), draws)):
            mixed = self.mixed(number, rule, drawn) if rule and self.whole(rule) else bank
            for query, logits in zip(queries, found):
                query = query.split(self.dim, 1)[number]
                scores = self.scores(query, bank, mixed, rows, rule, drawn) if rule else bank_scores(query, bank, rows)
                logits.append(scores.div_(self.temperature))
        return found

    def scores(self, query: Tensor, bank: Tensor, mixed: Tensor, rows: Tensor, rule: Rule, draws: Draws) -> Tensor:
        """Of one modality, transformed: query (B, D) -> (B, 1 + K). mixed: the bank that the negatives come from."""
        moved, positive = transform.pair(query, bank[rows[:, 0]], draws.positive, "pos" in rule.normalise)
        found = bank_scores(query if rule.original_query else moved, mixed, rows[:, 1:])
        if draws.negative is not None and not self.whole(rule):
            found = torch.lerp(found[:, draws.order], found, draws.negative.view(-1))
        return torch.cat([(moved * positive).sum(1, keepdim=True), found], 1)

    @torch.no_grad()
    def update(self, feat: Tensor, index: Tensor) -> None:
        """Towards the untransformed features (B, V D) of the pictures (B,) of all ranks."""
        for name, part in zip(self.names, feat.split(self.dim, 1)):
            bank = getattr(self, name)
            mixed = self.momentum * bank[index] + (1 - self.momentum) * part
            bank.index_copy_(0, index, F.normalize(mixed, dim=1))
