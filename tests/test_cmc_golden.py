"""CMC's banks against the published code's numbers (tests/golden/README.md, section 1)."""

import math

import pytest
import torch
import torch.nn.functional as F
from vectors import close, keys, names, published_keys, read

from cmc import contrast
from common import memory as memory_module
from common.memory import draw_rows


@pytest.mark.parametrize("name", [*names("cmc_softmax*"), *names("cmc_nce*")])
@pytest.mark.parametrize("gather_from", [0, 10**9], ids=["rows fetched", "whole bank"])
def test_step_by_step(name, gather_from, monkeypatch):
    monkeypatch.setattr(memory_module, "GATHER_FROM", gather_from)
    monkeypatch.setattr(memory_module, "CHUNK_ROWS", 3)
    monkeypatch.setattr(
        memory_module, "CHUNK_BYTES", 0
    )  # three queries at a time: the last chunk is shorter
    g = read(name)
    size = g["n_data"], g["l"].shape[-1]
    settings = g["K"], g["T"], g["momentum"], bool(g["use_softmax"]), "oneshot"
    banks = contrast.MemoryBanks(*size, ("l", "ab"), *settings)
    close(banks.params, g["params_init"])
    banks.memory_l.copy_(g["memory_l_init"])
    banks.memory_ab.copy_(g["memory_ab_init"])
    for step in range(len(g["l"])):
        feats = [g[view][step].requires_grad_() for view in ("l", "ab")]
        losses, out = banks(feats, g["idx"][step])
        losses.sum().backward()
        banks.update(feats, g["y"][step])
        for i, view in enumerate(("l", "ab")):
            close(out[i].detach(), g[f"out_{view}"][step])
            close(losses[i].detach(), g[f"loss_{view}"][step], atol=1e-6)
            close(feats[i].grad, g[f"grad_{view}"][step], rtol=2e-4)
            close(banks.banks()[i], g[f"memory_{view}"][step])
        close(banks.params, g["params"][step], atol=0)
    if "Z" in g:
        close(banks.normaliser, g["Z"], atol=0)


def test_buffers_are_the_published_ones():
    banks = contrast.MemoryBanks(1000, 128, ("l", "ab"), 64, 0.07, 0.5, True, "ema")
    assert keys(banks.state_dict()) == published_keys("cmc_contrast")


def slow_full_graph(feats, banks, rows, temperature, softmax, n):
    """Return {(i, j): (loss, Z)} of ordered pairs, from the formulas, in float64.

    It goes through one picture and one negative at a time.
    """
    pairs = {}
    for i in range(len(feats)):
        for j in range(len(feats)):
            if i == j:
                continue
            scores = [
                [float(f @ banks[j][r]) / temperature for r in mine]
                for f, mine in zip(feats[i], rows)
            ]
            weights = [[math.exp(s) for s in line] for line in scores]
            z = n * sum(map(sum, weights)) / sum(map(len, weights))
            total = 0.0
            for line in weights:
                if softmax:
                    total -= math.log(line[0] / sum(line))
                    continue
                noise = (len(line) - 1) / n
                total -= math.log(line[0] / z / (line[0] / z + noise))
                total -= sum(math.log(noise / (w / z + noise)) for w in line[1:])
            pairs[i, j] = total / len(weights), z
    return pairs


@pytest.mark.parametrize("softmax", [True, False], ids=["softmax", "nce"])
def test_three_views_contrast_every_pair_both_ways(softmax):
    generator = torch.Generator().manual_seed(0)
    feats = [
        F.normalize(torch.randn(4, 8, generator=generator), dim=1).requires_grad_()
        for _ in range(3)
    ]
    banks = contrast.MemoryBanks(20, 8, ("L", "a", "b"), 6, 0.3, 0.5, softmax, "oneshot")
    assert list(banks.state_dict()) == ["params", "memory_L", "memory_a", "memory_b"]
    assert len(banks.params) == 3 + 6
    rows = draw_rows(torch.tensor([3, 0, 9, 19]), 20, 6, generator)
    before = [bank.clone() for bank in banks.banks()]
    losses, out = banks(feats, rows)
    exact = [[f.detach().double() for f in feats], [bank.double() for bank in before]]
    slow = slow_full_graph(*exact, rows, 0.3, softmax, 20)
    assert len(out) == len(slow) == 6
    for i in range(3):
        expected = sum(value for (anchor, _), (value, _) in slow.items() if anchor == i)
        assert losses[i].item() == pytest.approx(expected, rel=1e-4)
    if not softmax:
        assert banks.normaliser.tolist() == pytest.approx([z for _, z in slow.values()], rel=1e-4)
    losses.sum().backward()
    assert all(f.grad.abs().sum() > 0 for f in feats)
    assert all(torch.equal(a, b) for a, b in zip(before, banks.banks()))  # reading does not write
    banks.update(feats, rows[:, 0])
    for bank, old, feat in zip(banks.banks(), before, feats):
        close(bank[rows[:, 0]], F.normalize(0.5 * old[rows[:, 0]] + 0.5 * feat.detach(), dim=1))
        assert (bank == old).all(1).sum() == 16


def test_three_views_are_the_three_two_view_losses():
    generator = torch.Generator().manual_seed(1)
    feats = [F.normalize(torch.randn(4, 8, generator=generator), dim=1) for _ in range(3)]
    three = contrast.MemoryBanks(20, 8, "xyz", 6, 0.3, 0.5, True, "ema")
    rows = draw_rows(torch.arange(4), 20, 6, generator)
    total = 0
    for i, j in ((0, 1), (0, 2), (1, 2)):
        two = contrast.MemoryBanks(20, 8, ("l", "ab"), 6, 0.3, 0.5, True, "ema")
        two.memory_l.copy_(three.banks()[i])
        two.memory_ab.copy_(three.banks()[j])
        total += two([feats[i], feats[j]], rows)[0].sum()
    close(three(feats, rows)[0].sum(), total)
