"""Metrics against slow loops and closed forms; learning rates against numbers by hand."""

import math

import pytest
import torch
import vectors

from common import UsageError
from common.metrics import accuracy, knn, neighbours_used, score_statistics
from common.schedule import cosine, parse_milestones, set_lr, step, warmup
from runner.knn import embedded


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- accuracy ----------------------------------------------------------------------------------


def test_accuracy_by_hand():
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 1, 2, 3], [0, 3, 2, 1], [1, 0, 2, 3]])
    top1, top2, top4 = accuracy(logits, torch.tensor([0, 2, 0, 3]), topk=(1, 2, 4))
    assert (top1.item(), top2.item(), top4.item()) == (50.0, 75.0, 100.0)


def test_accuracy_slow_loop():
    logits = torch.randn(64, 10, generator=generator())
    target = torch.randint(10, (64,), generator=generator(1))
    for k, value in zip((1, 3, 5), accuracy(logits, target, (1, 3, 5))):
        hits = sum(
            int(t) in sorted(range(10), key=lambda c: -row[c])[:k]
            for row, t in zip(logits.tolist(), target)
        )
        assert value.dim() == 0
        assert value.item() == pytest.approx(100 * hits / 64)


def test_accuracy_with_fewer_classes_than_k_and_without_rows():
    assert accuracy(torch.zeros(3, 2), torch.tensor([0, 1, 1]))[1].item() == 100.0
    assert [a.item() for a in accuracy(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))] == [
        0.0,
        0.0,
    ]


# --- scores ------------------------------------------------------------------------------------


def slow_statistics(similarities, temperature):
    """Five numbers of one query in double precision: the positive comes first."""
    positive, *negatives = similarities.double().tolist()
    n, mean = (
        len(negatives),
        math.fsum(negatives) / max(len(negatives), 1) if negatives else math.nan,
    )
    variance = math.fsum((x - mean) ** 2 for x in negatives) / (n - 1) if n > 1 else math.nan
    exponential = math.fsum(math.exp(x / temperature) for x in negatives) / n if n else math.nan
    return [mean, variance, positive, exponential, math.exp(positive / temperature)]


@pytest.mark.parametrize("name", vectors.names("ft_base"))
def test_scores_of_the_published_code(name):
    v = vectors.read(name)
    for logits, score in zip(v["logits"], v["score"]):
        found = score_statistics(logits[:, 0], logits[:, 1:], v["T"])
        vectors.close(found[:, :3], score[:, :3], rtol=1e-3, atol=1e-3)  # theirs are in float16
        vectors.close(found[:, 3:], score[:, 3:])
        slow = torch.tensor([slow_statistics(row * v["T"], v["T"]) for row in logits])
        torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_scores_slow_loop(temperature):
    """Similar negatives (variance 1e-8, mean .9) keep what a difference of squares would lose."""
    for spread in (0.3, 1e-4):
        similarities = 0.9 - spread * torch.rand(6, 300, generator=generator())
        logits = (similarities / temperature).requires_grad_()
        found = score_statistics(logits[:, 0], logits[:, 1:], temperature)
        slow = torch.tensor([slow_statistics(row * temperature, temperature) for row in logits])
        assert found.dtype == torch.float32 and not found.requires_grad
        torch.testing.assert_close(found, slow, rtol=2e-4, atol=0)
    half = score_statistics(logits[:, 0].bfloat16(), logits[:, 1:].bfloat16(), temperature)
    assert half.dtype == torch.float32 and half.isfinite().all()


def test_scores_of_some_candidates():
    logits = 5 * torch.randn(4, 9, generator=generator())
    logits[:, 1] = 1000  # no negative of any: its exponential, infinity, must not come in
    mask = torch.rand(4, 8, generator=generator(1)) < 0.6
    mask[:, 0], mask[2], mask[3] = False, False, torch.arange(8) == 5
    found = score_statistics(logits[:, 0], logits[:, 1:], 0.2, mask)
    assert 1 < mask[0].sum() < 7
    for row, own, keep in zip(found, logits, mask):
        slow = torch.tensor(slow_statistics(torch.cat((own[:1], own[1:][keep])) * 0.2, 0.2))
        torch.testing.assert_close(row, slow, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert (
        found[2].isnan().tolist() == [True, True, False, True, False]
        and found[3].isnan().sum() == 1
    )
    every = torch.ones_like(mask)
    plain, masked = (
        score_statistics(logits[:, 0], logits[:, 1:] / 99, 0.2, m) for m in (None, every)
    )
    torch.testing.assert_close(plain, masked)


# --- features of a data set --------------------------------------------------------------------


def loader(batches=3, size=4):
    for b in range(batches):
        x = torch.full((size, 3, 2, 2), float(b))
        yield [x, -x], torch.full((size,), b), torch.arange(b * size, (b + 1) * size)


def test_features_of_a_data_set():
    weight = torch.nn.Parameter(torch.ones(3, 5))
    features, targets = embedded(lambda x: (x.mean((2, 3)) @ weight).bfloat16(), loader())
    assert (
        features.shape == (12, 5) and features.dtype == torch.float32 and not features.requires_grad
    )
    assert features[:, 0].tolist() == [0.0] * 4 + [3.0] * 4 + [6.0] * 4
    assert targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4


# --- k-NN --------------------------------------------------------------------------------------


def slow_knn(bank, bank_targets, features, targets, classes, k, temperature):
    """Wu et al., Sec. 3.4, one picture and one neighbour at a time, in double precision."""
    hits1 = hits5 = count = 0
    rows = [(b, int(t)) for b, t in zip(bank.double(), bank_targets) if t >= 0]
    for f, target in zip(features.double(), targets.tolist()):
        if target < 0:
            continue
        nearest = sorted(
            ((float(f @ b / (f.norm() * b.norm())), t) for b, t in rows), reverse=True
        )[:k]
        score = [0.0] * classes
        for similarity, t in nearest:
            score[t] += math.exp(similarity / temperature)
        ranked = sorted(range(classes), key=lambda c: (-score[c], c))
        count += 1
        hits1 += ranked[0] == target
        hits5 += target in ranked[:5] and score[target] > 0
    return 100 * hits1 / count, 100 * hits5 / count


@pytest.mark.parametrize(
    "k, temperature", [(1, 0.07), (5, 0.07), (20, 0.5), (200, 0.07), (10, 0.01)]
)
@pytest.mark.parametrize("chunk_elements", [1, 333, 2**26])
def test_knn_slow_loop(k, temperature, chunk_elements):
    g = generator()
    bank, features = torch.randn(90, 6, generator=g), torch.randn(37, 6, generator=g)
    bank_targets, targets = (torch.randint(-1, 8, (n,), generator=g) for n in (90, 37))
    assert (bank_targets == -1).any() and (targets == -1).any()
    result = knn(
        bank, bank_targets, features, targets, 8, k, temperature, chunk_elements=chunk_elements
    )
    expected = slow_knn(bank, bank_targets, features, targets, 8, k, temperature)
    assert [r.item() for r in result] == pytest.approx(expected)


def test_knn_weights_by_hand():
    """One neighbour at similarity 1 wins against two at 0.8 while T is below .2 / log 2."""
    bank = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6]])
    args = (bank, torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]]), torch.tensor([0]), 2, 3)
    turning = 0.2 / math.log(2)
    assert knn(*args, turning * 0.99)[0].item() == 100.0
    assert knn(*args, turning * 1.01)[0].item() == 0.0
    assert (
        knn(*args[:5], 1, 100.0)[0].item() == 100.0
    )  # one neighbour: the temperature is irrelevant


def test_knn_of_a_set_against_itself_and_extreme_temperatures():
    bank = torch.randn(50, 16, generator=generator())
    targets = torch.arange(50) % 10
    assert [x.item() for x in knn(bank, targets, 3 * bank, targets, 10, k=1)] == [100.0, 100.0]
    assert (
        knn(bank, targets, bank.bfloat16(), targets, 10, k=50, temperature=1e-4)[0].item() == 100.0
    )


def test_a_class_without_votes_is_never_right():
    rows = torch.arange(10)
    accuracies = knn(torch.eye(10), rows, torch.eye(10).roll(1, 0), rows, 10, k=1)
    assert [x.item() for x in accuracies] == [0.0, 0.0]
    # Far neighbours vote with a weight that single precision rounds to 0.
    accuracies = knn(torch.eye(4), rows[:4], torch.eye(4), rows[:4].roll(1), 4, temperature=1e-4)
    assert [x.item() for x in accuracies] == [0.0, 100.0]


def test_no_more_neighbours_vote_than_have_labels():
    assert neighbours_used(5000, torch.tensor([0, -1, 2])) == 2
    assert neighbours_used(1, torch.tensor([0, -1, 2])) == 1


def test_knn_top5_of_three_classes():
    g = generator()
    x = torch.randn(30, 4, generator=g)
    targets = torch.arange(30) % 3
    assert (
        knn(x, targets, torch.randn(9, 4, generator=g), torch.arange(9) % 3, 3)[1].item() == 100.0
    )


@pytest.mark.parametrize("side", ["bank", "query"])
def test_knn_without_labels(side):
    x, labels, none = torch.randn(4, 3), torch.zeros(4, dtype=torch.long), torch.full((4,), -1)
    with pytest.raises(ValueError, match=f"labelled {side} rows"):
        knn(x, none if side == "bank" else labels, x, none if side == "query" else labels, 2)


@pytest.mark.gpu
def test_gpu_agrees_and_never_waits():
    g = generator()
    bank, features = torch.randn(500, 32, generator=g), torch.randn(100, 32, generator=g)
    bank_targets, targets = (
        torch.randint(10, (500,), generator=g),
        torch.randint(10, (100,), generator=g),
    )
    here = knn(bank, bank_targets, features, targets, 10, 20)
    there = knn(bank.cuda(), bank_targets, features, targets, 10, 20)
    assert [x.item() for x in there] == pytest.approx([x.item() for x in here])
    logits, target = features.cuda(), targets.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = accuracy(logits, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert 0 < values[0].item() <= values[1].item() < 100


# --- learning rates ----------------------------------------------------------------------------


def test_cosine_by_hand():
    assert [cosine(0.4, t, 120) for t in (0, 40, 60, 80, 120)] == pytest.approx(
        [0.4, 0.3, 0.2, 0.1, 0.0], abs=1e-15
    )
    assert [cosine(1.0, t, 2, floor=0.2) for t in (0, 1, 2)] == pytest.approx([1.0, 0.6, 0.2])
    assert cosine(1.0, 3, 2, floor=0.2) == pytest.approx(0.2) and cosine(1.0, -1, 2) == 1.0
    assert cosine(1.0, 0.5, 1) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="total"):
        cosine(1.0, 0, 0)


def test_step_by_hand():
    for epoch, lr in {119: 0.03, 120: 0.003, 159: 0.003, 160: 0.0003}.items():
        assert step(0.03, epoch, (160, 120)) == pytest.approx(lr, rel=1e-12)
    assert step(0.1, 50, (30, 40, 50), rate=0.2) == pytest.approx(0.0008)
    assert step(0.1, 10**6, ()) == 0.1


def test_warmup_by_hand():
    assert [warmup(0.4, t, 10) for t in (0, 1, 5, 10, 11)] == pytest.approx(
        [0.0, 0.04, 0.2, 0.4, 0.4]
    )
    assert [warmup(0.4, t, 10, start=0.1) for t in (0, 5)] == pytest.approx([0.1, 0.25])
    assert warmup(0.4, 0, 0) == 0.4


def test_set_lr_reaches_every_group():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 2.0)]
    optimizer = torch.optim.SGD(groups)
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("120,160", (120, 160)),
        (" 160, 120 ", (120, 160)),
        ("", ()),
        ("30", (30,)),
        ([136, 166], (136, 166)),
        ([], ()),
    ],
)
def test_parse_milestones(text, expected):
    assert parse_milestones(text) == expected


@pytest.mark.parametrize("text", ["120;160", "120,,160", "a", "1.5", "-1,3", "30,30", ","])
def test_parse_milestones_says_what_is_wrong(text):
    with pytest.raises(UsageError) as error:
        parse_milestones(text, flag="--schedule")
    assert (
        "--schedule" in str(error.value)
        and text in str(error.value)
        and "120,160,200" in str(error.value)
    )
    assert error.value.code == 2
