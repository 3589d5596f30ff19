"""Conditional negatives against the published code's own numbers.

tests/golden/README.md, sections 4 and 5, says where they come from.
"""

import pytest
import torch
import torch.nn.functional as F
from test_backbones import Golden, filled
from test_debiased_golden import Operations
from torch._subclasses.fake_tensor import FakeTensorMode
from vectors import close, keys, names, published_keys, read

from common import UserError, backbones
from ring import memories, monitor, negatives, networks, thresholds
from ring.negatives import Comparison, Rule, conditional_loss
from runner import layouts

BLOCKS = [
    10**9,
    4000,
    0,
]  # HALF: all anchors at once; some scored, fewer compared; one after the other


@pytest.fixture(params=BLOCKS, ids=["one block", "some anchors", "an anchor at a time"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(negatives, "HALF", request.param)


def rule_and_ranks(kind: str, config: list, n: int, ball_of: int | None = None):
    """A row of `configs` as the rule it means, and its ranks among n candidates."""
    outer, inner, *switches = config
    rule = Rule(kind, inner, *map(bool, switches), ball_of_batch=ball_of is not None)
    try:
        return rule, rule.ranks(outer, n, ball_of or n)
    except ValueError:  # an empty ring, which has a loss all the same
        cut = rule.inside(int(outer * n), n) if kind == "ring" else 0
        return rule, (cut, cut)


@pytest.mark.parametrize("name", names("ring_moco*"))
def test_moco(name, blocks):
    g, kind = read(name), name.split("_")[1].removeprefix("moco") or "all"
    for i, config in enumerate(
        g["configs"].tolist() if "configs" in g else [[1.0, 0.0, 1, 0, 1, 1]]
    ):
        x, y = (g[key].clone().requires_grad_() for key in ("outputs1", "outputs2"))
        query, key = (F.normalize(v, dim=1) for v in (x, y))
        rule, ranks = rule_and_ranks(kind, config, len(g["queue"]))
        comparison = Comparison(rule, ranks, g["t"])
        loss = conditional_loss(query, (query * key).sum(1), g["queue"], comparison)
        loss.backward()
        close(loss.detach(), g["loss"][i], atol=1e-6)
        close(x.grad, g["grad_outputs1"][i], rtol=2e-4)
        close(y.grad, g["grad_outputs2"][i], rtol=2e-4)


@pytest.mark.parametrize("name", names("ring_nce*"))
def test_memory_bank(name, blocks):
    """IR. The stored draws are looked up among the candidates that are selected here.

    The published ball is a share of the batch.
    """
    g, kind = read(name), name.split("_")[1].removeprefix("nce") or "all"
    ball_of = len(g["outputs"]) if kind == "ball" else None
    for i, draws in enumerate(g["negative_row"].long()):
        config = g["configs"][i].tolist() if "configs" in g else [1.0, 0.0, 1, 0, 1, 1]
        x = g["outputs"].clone().requires_grad_()
        query = F.normalize(x, dim=1)
        rule, ranks = rule_and_ranks(kind, config, len(g["bank"]), ball_of)
        rows = draws[:, : int(g["noise_count"][i])]
        assert rows.shape[1] == g["k"] - rule.self_negative
        found = negatives.select(query.detach() @ g["bank"].T, *ranks).rows
        at = (found[:, None, :] == rows[:, :, None]).float().argmax(2)
        assert torch.equal(found.gather(1, at), rows)
        if kind == "ring" and ranks != (0, len(g["bank"])):  # in the published order, too
            assert torch.equal(at, g["noise_index"][i, :, : rows.shape[1]].long())
        positive = (query * g["bank"][g["indices"]]).sum(1)
        loss = conditional_loss(query, positive, g["bank"], Comparison(rule, ranks, g["t"], at))
        loss.backward()
        close(loss.detach(), g["loss"][i], atol=1e-6)
        close(x.grad, g["grad_outputs"][i], rtol=2e-4)


def test_bank_update():
    g = read("ring_nce")
    for m, rows, after in zip(g["m_values"], g["updated_new_data_memory"], g["bank_after_update"]):
        bank = memories.MemoryBank(*g["bank"].shape, m.item())
        close(bank._bank.norm(dim=1), torch.ones(len(g["bank"])))  # from the start
        bank._bank.copy_(g["bank"])
        bank.update(F.normalize(g["outputs"], dim=1), g["indices"])
        close(bank._bank[g["indices"]], rows)
        close(bank._bank, after)


def test_policies_at_every_step():
    g = read("ring_policies")
    length, odd = g["max_anneal_step"], g["odd_anneal_step"]
    made = {
        "constant": thresholds.Constant(0.3),
        "linear": thresholds.build("linear", 0.5, length),
        "linear_odd": thresholds.build("linear", 0.5, odd),
        "linear_alt": thresholds.Linear(0.8, length, 0.2),
        "step": thresholds.build("step", 0.5, length),
        "step_odd": thresholds.build("step", 0.5, odd),
        "step_alt": thresholds.Step(0.8, length, 0.2),
        "expdecay": thresholds.build("exponential", 0.5, length),
        "expdecay_odd": thresholds.build("exponential", 0.5, odd),
        "expdecay_alt": thresholds.Exponential(0.8, length, 0.2, 0.03),
    }
    for name, policy in made.items():
        found = torch.tensor([policy(step) for step in range(len(g[name]))], dtype=torch.float64)
        close(found, g[name], rtol=1e-9, atol=1e-12)
        assert policy(10**9) == pytest.approx(
            g[name][-1].item()
        )  # the tables end, the formulas do not


def test_adaptive_policies_and_their_history():
    g = read("ring_policies")

    def loss():
        return thresholds.build("loss", 0.5, 1)

    def accuracy():
        return thresholds.build("accuracy", 0.5, 1)

    def wave():
        return thresholds.Adaptive(0.5, 0.04, 4, True, 0.35, 0.6)

    for metric, trace, make in (
        ("adaptive_metric", "adaptive_loss_trace", loss),
        ("adaptive_metric_flat", "adaptive_loss_flat_trace", loss),
        ("adaptive_metric", "adaptive_acc_trace", accuracy),
        ("adaptive_metric_flat", "adaptive_acc_flat_trace", accuracy),
        ("adaptive_wave_metric", "adaptive_wave_trace", wave),
    ):
        found, half, policy = [], len(g[metric]) // 2, make()
        for i, value in enumerate(g[metric].tolist()):
            if i == half:  # a resume in the middle
                state, policy = policy.state_dict(), make()
                policy.load_state_dict(state)
            policy.record(value)
            found.append(policy(0))
        close(torch.tensor(found, dtype=torch.float64), g[trace], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("conv3x3", [False, True])
@torch.no_grad()
def test_network_values_and_names(conv3x3):
    golden = Golden(
        "ring_backbone_resnet18_conv3x3" if conv3x3 else "ring_backbone_resnet18",
        keys="ring_nce_system",
    )
    golden.keys = [entry for entry in golden.keys if entry[0].startswith("model.")]
    if not conv3x3:
        golden.keys[0][1] = [64, 3, 7, 7]
    network = filled(lambda: networks.build_network("resnet18", 128, conv3x3))
    golden.check_keys(network, "model.", lambda name: name)
    x = golden.input()
    golden.check("h", backbones.feature(network, x, 6))
    golden.check("z", network(x))
    again = networks.of_checkpoint(
        {"state_dict": layouts.add_prefix(network.state_dict(), "model.")}
    )
    assert torch.equal(again.eval()(x), network(x))
    with pytest.raises(UserError, match="holds no network of ring/train_ring.py"):
        networks.of_checkpoint({"state_dict": {"encoder.weight": torch.zeros(1)}})


# --------------------------------------------------------------------------------------- properties


def scores(b=7, n=90, seed=0):
    return torch.randn(b, n, generator=torch.Generator().manual_seed(seed))


def test_the_ring_is_what_a_full_sort_says():
    x = scores()
    order = x.argsort(1, descending=True)
    for inner, outer in ((0, 90), (0, 1), (0, 30), (5, 30), (29, 30), (40, 90)):
        ring = negatives.select(x, inner, outer)
        assert torch.equal(ring.rows.sort(1).values, order[:, inner:outer].sort(1).values)
        assert torch.equal(ring.inner_rows, order[:, :inner])
        assert torch.equal(ring.scores, x.gather(1, ring.rows)) and torch.equal(
            ring.inner, x.gather(1, ring.inner_rows)
        )
        if outer - inner < 90:
            assert (ring.scores.diff(dim=1) <= 0).all()  # nearest first


def unit(b, d, seed):
    return F.normalize(torch.randn(b, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_switched_off_it_is_info_nce():
    query, key, queue = unit(5, 8, 0), unit(5, 8, 1), unit(40, 8, 2)
    positive = (query * key).sum(1)
    logits = torch.cat([positive[:, None], query @ queue.T], 1) / 0.2
    plain = F.cross_entropy(logits, torch.zeros(5, dtype=torch.long))

    def loss(rule, ranks):
        return conditional_loss(query, positive, queue, Comparison(rule, ranks, 0.2))

    for rule in (Rule("all"), Rule("ball"), Rule("ring", 0.0)):
        close(loss(rule, rule.ranks(1.0, 40, 5)), plain)
    ball, ring = Rule("ball"), Rule("ring", 0.0)
    assert ball.ranks(0.3, 40, 5) == ring.ranks(0.3, 40, 5) == (0, 12)
    assert loss(ball, (0, 12)) == loss(ring, (0, 12)) != plain


def test_equal_scores_give_the_logarithm_of_their_number():
    query, bank = torch.ones(3, 1), torch.ones(50, 1)
    loss = conditional_loss(query, torch.ones(3), bank, Comparison(Rule(), (2, 12), 0.1))
    close(loss, torch.tensor(11.0).log())


@pytest.mark.parametrize("ranks, draws", [((3, 3), None), ((2, 9), 0)], ids=["ring", "draws"])
def test_nothing_to_compare_with_gives_no_loss(ranks, draws):
    query = unit(5, 8, 0).requires_grad_()
    if draws is not None:
        draws = torch.zeros(5, draws, dtype=torch.long)
    positive = (query * unit(5, 8, 1)).sum(1)
    loss = conditional_loss(query, positive, unit(40, 8, 2), Comparison(Rule(), ranks, 0.1, draws))
    loss.backward()
    assert loss == 0 and not query.grad.any()


def test_draws_are_the_ranks_of_the_ring():
    generator = torch.Generator().manual_seed(0)
    drawn = negatives.draw(300, 40, (5, 12), generator)
    assert drawn.shape == (300, 40) and sorted(drawn.unique().tolist()) == list(range(7))


def test_an_empty_ring_says_its_numbers():
    numbers = "of 40 candidates, outer threshold 0.02 and inner 0.1 leave the ranks 0 to 0"
    with pytest.raises(ValueError, match=numbers):
        Rule().ranks(0.02, 40, 8)
    assert Rule("ball", ball_of_batch=True).ranks(0.5, 40, 8) == (0, 4)


def test_cuda_gets_one_block_and_products_with_the_whole_bank(monkeypatch):
    with FakeTensorMode():
        query, bank = (torch.zeros(n, 128, device="cuda:0") for n in (256, 50_000))
        draws = torch.zeros(256, 4095, dtype=torch.long, device="cuda:0")
        comparison = Comparison(Rule(), (500, 5000), 0.1, draws)
        assert len(list(negatives._scored(query, bank, comparison))) == 1
        with Operations() as seen:
            negatives._weighted_rows(bank, draws, draws.float())
        assert not any("embedding" in name for name, _ in seen.found)
    rows, weights = torch.randint(40, (5, 12), generator=torch.Generator()), unit(5, 12, 0)
    sums = []
    for dense_from in (0, 10**9):
        monkeypatch.setattr(negatives, "DENSE_FROM", dense_from)
        sums.append(negatives._weighted_rows(unit(40, 8, 1), rows, weights))
    close(*sums)


def test_description_counts_classes_where_they_are_known():
    bank = scores(3, 6)
    ring = negatives.Ring(
        bank[:, :1], bank[:, 1:4], torch.tensor([[0], [1], [5]]), torch.tensor([[1, 2, 3]] * 3)
    )
    found = monitor.description(
        ring, 0.5, torch.tensor([0, 1, -1]), torch.tensor([0, 0, 1, -1, 0, 0])
    )
    assert found["ring_inner_own_class"] == 0.5  # one of two; the third anchor has no class
    assert (
        found["ring_own_class"] == 0.5
    )  # 0: one of two; 1: one of two; the picture without a class does not count
    close(found["ring_lowest"], bank[:, 1:4].min(1).values.mean() * 0.5)
    close(found["ring_highest"], bank[:, 1:4].max(1).values.mean() * 0.5)
    assert "ring_own_class" not in monitor.description(ring, 0.5)


def test_system_of_moco_has_the_published_names():
    g = {key: shape for key, shape, _ in published_keys("ring_moco_system")}
    system = memories.KeyQueue(*g["queue"])
    system.model = networks.build_network("resnet18", g["model.l2.weight"][0], True)
    system.memory_bank = memories.MemoryBank(*g["memory_bank._bank"], 0)
    system.model_k = networks.build_network("resnet18", g["model.l2.weight"][0], True)
    assert keys(system.state_dict()) == published_keys("ring_moco_system")
