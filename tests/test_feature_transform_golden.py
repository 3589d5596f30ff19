"""Feature transformation, queues and banks against the published code's own numbers.

tests/golden/README.md, section 8, says where these come from.
"""

import pytest
import torch
import torch.nn.functional as F
from vectors import close, keys, names, published_keys, read

from common import metrics
from feature_transform import transform
from feature_transform.memory import KeyQueue, MemoryBank
from feature_transform.transform import NOTHING, Draws, Rule

SIDES = {0: ("pos",), 1: ("neg",), 2: ("pos", "neg")}  # of mix_target


def cross_entropy(out):
    return F.cross_entropy(out, torch.zeros(len(out), dtype=torch.long))


def same_scores(out, found, temperature) -> None:
    columns = metrics.score_statistics(out[:, 0], out[:, 1:], temperature)
    close(columns[:, :3], found[:, :3], rtol=1e-3, atol=1e-3)
    close(columns[:, 3:], found[:, 3:])


def rule_of(g: dict) -> Rule:
    sides = SIDES[g["mix_target"]]
    normalise = ("pos",) if g["postmix_norm"] else ()
    return Rule(
        *("scalar" if side in sides else None for side in ("pos", "neg")), normalise=normalise
    )


def draws_of(g: dict, step: int) -> Draws:
    """The stored ones; as the code has it, 1 is added to those of the positives."""
    positive, negative = (
        g[name][step].float() if name in g else None for name in ("mask_pos", "mask_neg")
    )
    if positive is not None and g["expolation_mask"]:
        positive = positive + 1
    return Draws(positive, negative, g["perm"][step] if "perm" in g else None)


@pytest.mark.parametrize("name", [*names("ft_base*"), *names("ft_mix_*")])
def test_queue_step_by_step(name):
    g = read(name)
    mixed = "mix_target" in g
    queue = KeyQueue(1, g["K"], g["q"].shape[-1], g["T"])
    queue.memory.copy_(g["queue_init"])
    for step in range(len(g["q"])):
        q, k = g["q"][step].requires_grad_(), g["k"][step]
        rule, draws = (rule_of(g), draws_of(g, step)) if mixed else (None, NOTHING)
        [[out]] = queue([q], k, rule, [draws])
        close(out.detach(), g["logits"][step])
        same_scores(out, g["score"][step], g["T"])
        if "loss" in g:
            loss = cross_entropy(out)
            loss.backward()
            close(loss.detach(), g["loss"][step], atol=1e-6)
            close(q.grad, g["grad_q"][step], rtol=2e-4)
        stored = k
        if (
            "all_k_given" in g and not g["all_k_given"][step]
        ):  # published: then the transformed key is kept
            stored = transform.pair(q, k, draws.positive, "pos" in rule.normalise)[1]
        queue.enqueue(stored)
        close(queue.memory, g["queue_after"][step])
        if "index_after" in g:
            assert queue.pointer == g["index_after"][step]


@pytest.mark.parametrize("name", names("ft_cmcmoco*"))
def test_two_queues_crossed(name):
    g = read(name)
    queue = KeyQueue(2, g["K"], g["q1"].shape[-1], g["T"])
    queue.memory_1.copy_(g["queue1_init"])
    queue.memory_2.copy_(g["queue2_init"])
    for step in range(len(g["q1"])):
        q1, q2 = (g[f"q{i}"][step].requires_grad_() for i in (1, 2))
        key = torch.cat([g["k1"][step], g["k2"][step]], 1)
        [outs] = queue([torch.cat([q1, q2], 1)], key, None, [NOTHING] * 2)
        loss = sum(map(cross_entropy, outs))
        loss.backward()
        queue.enqueue(key)
        close(loss.detach(), g["loss"][step], atol=1e-6)
        for i, out, q in zip((1, 2), outs, (q1, q2)):
            close(out.detach(), g[f"logits{i}"][step])
            same_scores(out, g[f"score{i}"][step], g["T"])
            close(q.grad, g[f"grad_q{i}"][step], rtol=2e-4)
            close(getattr(queue, f"memory_{i}"), g[f"queue{i}_after"][step])


@pytest.mark.parametrize(
    "name", [*names("ft_bank_rgb*"), *(n for n in names("ft_bank_cmc*") if "mix" not in n)]
)
def test_bank_step_by_step(name):
    g = read(name)
    several = "x1" in g
    ends = ["1", "2"] if several else [""]  # of the names in the file
    bank_names = [f"memory_{end}" if several else "memory" for end in ends]
    bank = MemoryBank(
        len(ends), g["n_data"], g[f"x{ends[0]}"].shape[-1], g["T"], g["K"], g["momentum"]
    )
    for own in bank_names:
        getattr(bank, own).copy_(g[f"{own}_init"])
    for step in range(len(g["idx"])):
        feats = [g[f"x{end}"][step].requires_grad_() for end in ends]
        [outs] = bank([torch.cat(feats, 1)], g["idx"][step], None, [NOTHING] * len(ends))
        loss = sum(map(cross_entropy, outs))
        loss.backward()
        bank.update(torch.cat(feats, 1), g["y"][step])
        close(loss.detach(), g["loss"][step], atol=1e-6)
        for end, own, out, x in zip(ends, bank_names, outs, feats):
            close(out.detach(), g[f"logits{end}"][step])
            close(x.grad, g[f"grad_x{end}"][step], rtol=2e-4)
            close(getattr(bank, own), g[own][step])


@pytest.mark.parametrize("name", names("ft_bank_cmc_mix*"))
def test_the_mixture_of_two_banks_is_a_pair_of_drawn_rows(name):
    """The unused CMCMem_mix there transforms the drawn rows of two banks like query and key."""
    g = read(name)
    bank = MemoryBank(2, g["n_data"], g["x1"].shape[-1], g["T"], g["K"], g["momentum"])
    bank.memory_1.copy_(g["memory_1_init"])
    bank.memory_2.copy_(g["memory_2_init"])
    for step in range(len(g["idx"])):
        rows = g["idx"][step]
        x1, x2 = (g[f"x{i}"][step].requires_grad_() for i in (1, 2))
        w1, w2 = transform.pair(bank.memory_1[rows], bank.memory_2[rows], g["mask"][step])
        outs = [torch.einsum("bd,bjd->bj", x, w) / g["T"] for x, w in ((x1, w2), (x2, w1))]
        loss = sum(map(cross_entropy, outs))
        loss.backward()
        bank.update(torch.cat([x1, x2], 1), g["y"][step])
        close(loss.detach(), g["loss"][step], atol=1e-6)
        for i, out, x in zip((1, 2), outs, (x1, x2)):
            close(out.detach(), g[f"logits{i}"][step])
            close(x.grad, g[f"grad_x{i}"][step], rtol=2e-4)
            close(getattr(bank, f"memory_{i}"), g[f"memory_{i}"][step])


@pytest.mark.parametrize("name", ["rgb", "cmc", "bank_rgb", "bank_cmc"])
def test_buffers_are_the_published_ones(name):
    theirs = published_keys(f"ft_contrast_{name}")
    (_, (n, dim), _), modalities = theirs[0], len(theirs)
    size = (modalities, n, dim, 0.1)
    memory = MemoryBank(*size, 4, 0.5) if "bank" in name else KeyQueue(*size)
    assert keys(memory.state_dict()) == theirs
