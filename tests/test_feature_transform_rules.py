"""Feature transformation: the draws of the coefficients, and what they do to features."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import equal
from torch._subclasses.fake_tensor import FakeTensorMode

from feature_transform import main_contrast as script
from feature_transform import recipes, transform
from feature_transform.memory import KeyQueue, MemoryBank
from feature_transform.transform import LEVELS, NOTHING, Draws, Rule
from moco_insdis import contrast as plain


def parsed(text: str = ""):
    return script.parse_args(["--data_folder", "x", *text.split()])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed: int = 0):
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


# -------------------------------------------------------------------------------------------- draws


def largest_distance(drawn, true) -> float:
    """Kolmogorov and Smirnov's, of two samples."""
    both = torch.cat([drawn, true]).sort().values
    below = [torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (drawn, true)]
    return (below[0] - below[1]).abs().max().item()


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0, 1.6, 2.0, 40.0])
def test_coefficients_are_beta_distributed(alpha):
    n = 200_000
    torch.manual_seed(0)
    true = (
        torch.distributions.Beta(torch.tensor(alpha).double(), torch.tensor(alpha).double())
        .sample((n,))
        .float()
    )
    drawn = transform.coefficients((n // 4, 4), "beta", alpha, generator()).view(-1)
    assert largest_distance(drawn, true) < 2 * math.sqrt(2 / n)  # chance of more: 0.0007
    if alpha == 1:
        uniform = transform.coefficients((n,), "uniform", alpha, generator())
        assert largest_distance(uniform, true) < 0.01


def test_the_table_is_within_its_step_of_the_true_distribution():
    wanted = (torch.arange(LEVELS) + 0.5) / LEVELS
    closed = {
        0.5: lambda x: 2 / math.pi * x.sqrt().asin(),
        1.0: lambda x: x,
        2.0: lambda x: 3 * x**2 - 2 * x**3,
    }
    for alpha, cdf in closed.items():
        table = transform.beta_quantiles(alpha, torch.device("cpu")).double()
        assert (cdf(table) - wanted)[: LEVELS // 2].abs().max() < 1e-7  # the step is 1.5e-5
        torch.testing.assert_close(
            table + table.flip(0), torch.ones(LEVELS).double(), rtol=0, atol=2**-24
        )
        assert table.mean().item() == pytest.approx(0.5, abs=1e-7)


def test_tables_go_with_their_rule():
    """One that was drawn from without real numbers, or without gradients, leaves nothing behind."""
    with FakeTensorMode():
        Rule("sample", "sample").draw(5, 8, 7, generator())
    expected = Rule("sample", "sample").draw(5, 8, 7, generator())
    rule = Rule("sample", "sample")
    with torch.inference_mode():
        rule.draw(5, 8, 7, generator())
    assert equal(rule.draw(5, 8, 7, generator()), expected)
    assert len(rule.tables) == 2 and not any(x.is_inference() for x in rule.tables.values())


@pytest.mark.parametrize(
    "mask, shapes",
    [
        ("none", [(), ()]),
        ("pos", [(5, 8), ()]),
        ("neg", [(), (7, 8)]),
        ("both", [(5, 8), (7, 8)]),
        ("sample", [(5, 1), (7, 1)]),
    ],
)
def test_shapes_of_the_coefficients(mask, shapes):
    rule = recipes.rule(
        parsed(f"--mixnorm --mixnorm_target posneg --expolation_mask --dim_mask {mask}")
    )
    drawn = rule.draw(5, 8, 7, generator())
    assert [tuple(x.shape) for x in drawn[:2]] == shapes
    assert ((drawn.positive >= 1) & (drawn.positive <= 2)).all() and (
        (drawn.negative >= 0) & (drawn.negative <= 1)
    ).all()
    assert sorted(drawn.order.tolist()) == list(range(7))
    assert equal(rule.draw(5, 8, 7, generator()), drawn) and not equal(
        rule.draw(5, 8, 7, generator(1)), drawn
    )


def test_a_shorter_reach_moves_positives_less_far():
    flags = "--mixnorm --mixnorm_target posneg --expolation_mask --dim_mask both"
    published = recipes.rule(parsed(flags)).draw(5, 8, 7, generator())
    shorter = recipes.rule(parsed(f"{flags} --pos_reach .25")).draw(5, 8, 7, generator())
    torch.testing.assert_close(shorter.positive, 1 + (published.positive - 1) / 4)
    assert torch.equal(shorter.negative, published.negative)


def test_sides_and_parameters_of_the_rule():
    rule = recipes.rule(parsed("--mixnorm --mixnorm_target pos --beta_alpha 3"))
    assert rule == Rule("element", None, False, "beta", 3.0, 3.0) and rule.draw(
        2, 3, 4, generator()
    )[1:] == (
        None,
        None,
    )
    rule = recipes.rule(
        parsed(
            "--mixnorm --mixnorm_target posneg --dim_mask both --sep_alpha --pos_alpha 3 "
            "--postmix_norm --norm_target both --neg_query original"
        )
    )
    assert rule == Rule("element", "element", False, "beta", 3.0, 1.6, ("pos", "neg"), True)
    shapes = {  # published: where --dim_mask is not given
        "--sep_alpha": "scalar",
        "": "element",
        "--sep_alpha --mask_distribution uniform": "element",
        "--preset ft": "scalar",
        "--dim_mask none": "scalar",
        "--sep_alpha --dim_mask both": "element",
    }
    for flags, shape in shapes.items():
        found = recipes.rule(parsed(f"--mixnorm --mixnorm_target posneg {flags}"))
        assert (found.positives, found.negatives) == (shape, shape), flags
    assert recipes.rule(parsed()) is None
    assert Rule(None, "element").draw(2, 3, 4, generator()).positive is None


@pytest.mark.parametrize("extrapolate", [True, False])
@pytest.mark.parametrize("shape", ["scalar", "sample", "element"])
def test_coefficients_of_positives_and_of_negatives_are_their_own(shape, extrapolate):
    """Positives come from Beta(pos_alpha) and are drawn first; negatives from Beta(neg_alpha).

    Swapping the two parameters, or the order of the draws, changes these numbers.
    """
    rule = Rule(shape, shape, extrapolate, "beta", pos_alpha=20.0, neg_alpha=0.5)
    sizes = {"scalar": ((), ()), "sample": ((6, 1), (9, 1)), "element": ((6, 4), (9, 4))}[shape]
    drawn = rule.draw(6, 4, 9, generator())
    again = generator()
    positive = transform.coefficients(sizes[0], "beta", 20.0, again)
    negative = transform.coefficients(sizes[1], "beta", 0.5, again)
    torch.testing.assert_close(drawn.positive, positive + 1 if extrapolate else positive)
    torch.testing.assert_close(drawn.negative, negative)
    assert torch.equal(drawn.order, torch.randperm(9, generator=again))


def test_the_flags_give_each_side_its_own_distribution():
    """The variance of Beta(a, a) is 1 / (4 (2 a + 1)); --beta_alpha is that of both sides."""

    def variances(flags: str) -> list[float]:
        text = f"--mixnorm --mixnorm_target posneg --expolation_mask --dim_mask both {flags}"
        drawn = recipes.rule(parsed(text)).draw(500, 100, 500, generator())
        return [drawn.positive.var().item(), drawn.negative.var().item()]

    def of(alpha: float) -> float:
        return 1 / (4 * (2 * alpha + 1))

    separate = variances("--sep_alpha --pos_alpha 8 --neg_alpha 0.5")
    assert separate == pytest.approx([of(8), of(0.5)], rel=0.03)
    assert variances("--beta_alpha 4") == pytest.approx([of(4), of(4)], rel=0.03)
    assert variances("--sep_alpha") == pytest.approx([of(2), of(1.6)], rel=0.03)


@pytest.mark.parametrize("kind", [KeyQueue, MemoryBank])
def test_a_side_is_transformed_by_its_own_coefficients(kind):
    """The positive score follows the positives' coefficient alone, the others the negatives'."""
    size = (1, 12, 8, 0.2)
    memory = KeyQueue(*size) if kind is KeyQueue else MemoryBank(*size, 6, 0.5)
    query = unit(5, 8)
    other = unit(5, 8, seed=7)
    if kind is MemoryBank:
        other = torch.randint(12, (5, 7), generator=generator())
    order = torch.arange(12 if kind is KeyQueue else 6).flip(0)

    def scores(positive: float, negative: float):
        draws = Draws(torch.tensor(positive), torch.tensor(negative), order)
        [[out]] = memory([query], other, Rule(original_query=True), [draws])
        return out

    plain_scores, moved, mixed = scores(1.0, 1.0), scores(1.7, 1.0), scores(1.0, 0.3)
    assert torch.equal(moved[:, 1:], plain_scores[:, 1:])
    assert (moved[:, 0] < plain_scores[:, 0]).all()
    torch.testing.assert_close(mixed[:, 0], plain_scores[:, 0])
    kept = plain_scores[:, 1:]
    torch.testing.assert_close(mixed[:, 1:], 0.3 * kept + 0.7 * kept.flip(1))


def test_processes_share_the_draws_of_one():
    rule = Rule("element", "element")
    drawn = rule.draw(6, 4, 9, generator())
    halves = [drawn.part(number, 2) for number in range(2)]
    assert torch.equal(torch.cat([half.positive for half in halves]), drawn.positive)
    assert all(torch.equal(half.negative, drawn.negative) for half in halves)
    scalar = Rule().draw(6, 4, 9, generator())
    assert scalar.part(1, 2) == scalar and NOTHING.part(1, 2) == NOTHING


# ----------------------------------------------------------------------------------- transformation


def test_a_scalar_pair_follows_the_closed_form():
    q, k = unit(6, 16), unit(6, 16, seed=1)
    similarity = (q * k).sum(1)
    for m in (0.0, 0.3, 1.0, 1.5, 2.0):
        moved, positive = transform.pair(q, k, torch.tensor(m))
        torch.testing.assert_close(
            (moved * positive).sum(1), similarity + 2 * m * (1 - m) * (1 - similarity)
        )
    moved, positive = transform.pair(q, k, torch.tensor(1.5), normalise=True)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(6))
    assert ((moved * positive).sum(1) < similarity).all()  # further apart


def test_the_published_mixtures_have_62_percent_of_the_variance():
    """docs/feature_transform.md, "What mixed negatives do": the mean of b^2 + (1 - b)^2."""
    b = Rule(None, "sample").draw(1, 64, 200_000, generator()).negative
    assert float((b**2 + (1 - b) ** 2).mean()) == pytest.approx(0.62, abs=0.03)


@pytest.mark.parametrize("shape, unit", [("scalar", False), ("element", False), ("scalar", True)])
def test_scores_of_mixed_negatives_vary_as_the_page_says(shape, unit):
    """docs/feature_transform.md, "What mixed negatives do", for the coefficients of many steps."""
    draws = generator()
    rows = F.normalize(torch.randn(2048, 64, generator=draws), dim=1)
    query = F.normalize(torch.randn(64, generator=draws), dim=0)
    rule = Rule(None, shape, False)
    count = 500 if shape == "scalar" else 50  # of 64 coefficients a row
    steps = [rule.draw(1, 64, len(rows), draws) for _ in range(count)]
    mixed = [transform.negatives(rows, own.negative, own.order, unit) @ query for own in steps]
    share = torch.stack(mixed).var(1).mean() / (rows @ query).var()
    b = torch.stack([own.negative for own in steps])
    expected = 1.0 if unit else float((b**2 + (1 - b) ** 2).mean())
    assert float(share) == pytest.approx(expected, abs=0.03)


def test_view_correlation():
    pictures, *noise = torch.randn(3, 512, 64, generator=torch.Generator().manual_seed(0))
    query, key = (5 + pictures + 2 * own for own in noise)  # variances 1 in common, 4 apart
    expected = torch.corrcoef(
        torch.stack([(side - side.mean(0)).flatten() for side in (query, key)])
    )
    found = transform.view_correlation(query, key)
    torch.testing.assert_close(found, expected[0, 1])
    assert float(found) == pytest.approx(1 / 5, abs=0.02)
    assert float(transform.view_correlation(query, query)) == pytest.approx(1)
    collapsed = torch.ones(8, 64)
    assert float(transform.view_correlation(collapsed, collapsed)) == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("coefficient", [1.0, 1.25, 1.5, 2.0])
def test_nearly_equal_features_grow_as_the_page_says(coefficient, share):
    """docs/feature_transform.md, "When to begin": growth = m - (m^2 + (1 - m)^2)(1 - r)."""
    pairs, dim, small = 16, 64, 1e-4
    center = unit(dim, seed=3).double()

    def near(rows, seed):
        """Return deviations without a mean, at right angles to the center."""
        x = torch.randn(rows, dim, generator=generator(seed)).double()
        x -= x.mean(0)
        return x - (x @ center)[:, None] * center

    common, own, other = (near(pairs, seed) for seed in (4, 5, 6))
    a, b = share**0.5, (1 - share) ** 0.5
    u, v = a * common + b * own, a * common + b * other
    correlation = (u * v).sum() / u.square().sum()
    memory = KeyQueue(1, 32, dim, temperature=0.2).double()
    memory.memory.copy_(F.normalize(center + small * near(32, 7), dim=1))
    query = (center + small * u).requires_grad_()
    key = F.normalize(center + small * v, dim=1)
    draws = [Draws(positive=torch.tensor(coefficient).double())]
    (logits,) = memory([F.normalize(query, dim=1)], key, Rule(negatives=None), draws)
    F.cross_entropy(logits[0], torch.zeros(pairs).long(), reduction="sum").backward()
    descent = -(query.grad * u).sum() * memory.temperature * 33 / 32  # 32 negatives in 33 columns
    growth = descent / (small * u.square().sum())
    weight = coefficient**2 + (1 - coefficient) ** 2
    expected = coefficient - weight * (1 - correlation)
    torch.testing.assert_close(growth, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", [(), (9, 1), (9, 4)])
def test_negatives_are_mixed_in_place_of_a_copy(shape):
    rows, order, m = (
        unit(9, 4),
        torch.randperm(9, generator=generator()),
        torch.rand(shape, generator=generator()),
    )
    before, out = rows.clone(), torch.empty(9, 4)
    made = transform.negatives(rows, m, order, out=out)
    assert made.data_ptr() == out.data_ptr() and torch.equal(rows, before)
    torch.testing.assert_close(made, m * rows + (1 - m) * rows[order])
    longer = transform.negatives(rows, m, order, normalise=True)
    torch.testing.assert_close(longer, F.normalize(m * rows + (1 - m) * rows[order], dim=1))


@pytest.mark.parametrize("modalities", [1, 2])
def test_a_coefficient_of_one_is_moco(modalities):
    queue = KeyQueue(modalities, 12, 8, 0.2)
    query, key = (
        torch.cat([unit(5, 8, seed=i) for i in range(modalities)], 1),
        unit(5, 8 * modalities, seed=7),
    )
    one = Draws(torch.tensor(1.0), torch.tensor(1.0), torch.randperm(12, generator=generator()))
    [mixed] = queue([query], key, Rule(), [one] * modalities)
    [bare] = queue([query], key, None, [NOTHING] * modalities)
    assert all(map(torch.equal, mixed, bare)) and len(mixed) == modalities


@pytest.mark.parametrize(
    "rule",
    [
        Rule(),
        Rule(None, "sample"),
        Rule("sample", None),
        Rule("element", "element"),
        Rule(original_query=True),
        Rule(normalise=("pos", "neg")),
        Rule("scalar", "element", False, normalise=("neg",)),
    ],
)
@pytest.mark.parametrize("modalities", [1, 2])
def test_a_bank_is_transformed_as_its_drawn_rows_would_be(rule, modalities):
    torch.manual_seed(0)
    bank = MemoryBank(modalities, 20, 8, 0.2, 6, 0.5)
    query = torch.cat([unit(5, 8, seed=i) for i in range(modalities)], 1).requires_grad_()
    rows = torch.randint(20, (5, 7), generator=generator())
    draws = bank.draw(rule, 5, generator())
    [found] = bank([query], rows, rule, draws)
    for number, (out, drawn) in enumerate(zip(found, draws)):
        x, memory = query[:, 8 * number : 8 * number + 8], bank.rows()[number]
        assert memory is getattr(bank, bank.names[modalities - 1 - number])
        own, negatives, m = memory[rows[:, 0]], memory[rows[:, 1:]], drawn.negative
        moved, positive = transform.pair(x, own, drawn.positive, "pos" in rule.normalise)
        if m is not None and len(drawn.order) == 6:  # slot by slot
            negatives = m * negatives + (1 - m) * negatives[:, drawn.order]
        elif m is not None:
            mixed = m * memory + (1 - m) * memory[drawn.order]
            negatives = (F.normalize(mixed, dim=1) if "neg" in rule.normalise else mixed)[
                rows[:, 1:]
            ]
        asked = x if rule.original_query else moved
        wanted = (
            torch.cat(
                [
                    (moved * positive).sum(1, keepdim=True),
                    torch.einsum("bd,bkd->bk", asked, negatives),
                ],
                1,
            )
            / 0.2
        )
        torch.testing.assert_close(out, wanted)
        slopes = [
            torch.autograd.grad(scores.exp().sum(), query, retain_graph=True)[0]
            for scores in (out, wanted)
        ]
        torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-3)  # of up to a hundred


def test_a_bank_without_mixing_is_insdis():
    bank, other = (
        MemoryBank(1, 20, 8, 0.2, 6, 0.5),
        plain.MemoryBank(20, 8, 6, 0.2, 0.5, True, "ema"),
    )
    other.memory.copy_(bank.memory)
    query, rows = unit(5, 8), torch.randint(20, (5, 7), generator=generator())
    _, wanted = other(query, rows)
    one = Draws(torch.tensor(1.0), torch.tensor(1.0), torch.randperm(6, generator=generator()))
    for rule, draws in ((None, NOTHING), (Rule(None, None), NOTHING), (Rule(), one)):
        [[out]] = bank([query], rows, rule, [draws])
        torch.testing.assert_close(out, wanted)
    index = torch.tensor([3, 1, 4, 15, 9])
    bank.update(query, index)
    other.update(query, index)
    torch.testing.assert_close(bank.memory, other.memory)


@pytest.mark.parametrize("sides", ["both", "pos", ("query",), ["pos"]])
def test_a_rule_normalises_named_sides_alone(sides):
    with pytest.raises(ValueError, match="must be a tuple of 'pos' and 'neg'"):
        Rule(normalise=sides)
