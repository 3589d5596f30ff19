"""The theory of the ring by numbers: closed forms, and the bound at a small size."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, says_no

from ring import theory, theory_output

SMALL = "--dim 4 --rho 0.6 --k 4 64 --pool 512 --pairs 32 --repeats 40".split()
SMALL += "--outer 0.5 0.1 --inner 0 0.1 -p 40".split()


def options(*flags):
    return theory.parse_args([*SMALL, "--out", "unused", *flags])


def test_the_mutual_information_of_a_gaussian_pair():
    """From the determinants of the covariances, which is another way than the one in use."""
    for dim, rho in ((1, 0.5), (3, 0.9)):
        both = np.block([[np.eye(dim), rho * np.eye(dim)], [rho * np.eye(dim), np.eye(dim)]])
        assert theory.mutual_information(dim, rho) == pytest.approx(
            -0.5 * math.log(np.linalg.det(both))
        )


def test_the_critic_is_the_log_density_ratio():
    from torch.distributions import Normal

    generator = torch.Generator().manual_seed(0)
    x, y = theory.draw_pairs(50_000, 3, 0.7, generator)
    assert torch.corrcoef(torch.stack([x[:, 1], y[:, 1]]))[0, 1].item() == pytest.approx(
        0.7, abs=0.02
    )
    assert abs(torch.corrcoef(torch.stack([x[:, 1], y[:, 0]]))[0, 1].item()) < 0.02
    few = theory.critic(x[:5], y[:7], 0.7)
    given = Normal(0.7 * x[:5, None], math.sqrt(1 - 0.49)).log_prob(y[None, :7])
    torch.testing.assert_close(few, (given - Normal(0.0, 1.0).log_prob(y[None, :7])).sum(2))
    own = torch.cat(
        [theory.critic(a, b, 0.7).diagonal() for a, b in zip(x.split(500), y.split(500))]
    )
    assert own.mean().item() == pytest.approx(theory.mutual_information(3, 0.7), abs=0.05)


def test_the_estimate_is_log_k_minus_the_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    positive, negative = (
        torch.tensor([1.0, -2.0]),
        torch.tensor([[0.5], [0.25]]),
    )  # one candidate: every draw is that
    got = theory.estimates(positive, negative, [2, 5], generator)
    for row, k in enumerate((2, 5)):
        logits = torch.cat([positive[:, None], negative.expand(2, k - 1)], 1)
        loss = torch.nn.functional.cross_entropy(
            logits, torch.zeros(2, dtype=torch.long), reduction="none"
        )
        torch.testing.assert_close(got[row], math.log(k) - loss)
    torch.testing.assert_close(
        theory.estimates(positive, positive[:, None], [9], generator), torch.zeros(1, 2)
    )


def test_the_widest_ring_is_nce_and_a_ring_holds_the_ranks_it_says():
    scores = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    ranked = scores.sort(1, descending=True).values
    torch.testing.assert_close(
        theory.candidates(scores, 1.0, 0.0).sort(1, descending=True).values, ranked
    )
    torch.testing.assert_close(
        theory.candidates(scores, 0.5, 0.1).sort(1, descending=True).values, ranked[:, 5:50]
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("theory")
    theory.main([*SMALL, "--out", str(out)])
    return out, json.loads((out / "theory.json").read_text())


def test_what_the_paper_proves_holds_where_its_condition_does(found):
    """NCE and the balls are below mutual information; with the pair fixed a ring varies less."""
    rows = {(r["estimator"], r["k"]): r for r in found[1]["rows"]}
    assert len(rows) == 5 * 2
    for (name, k), row in rows.items():
        assert row["estimate"][1] < row["estimate"][0] < row["estimate"][2]
        if name == "NCE" or name.startswith("ball"):
            assert row["below_mi"] == "yes", (name, k)
        if name.startswith("ball"):
            assert row["below_nce"] == "yes", (name, k)
    row = rows["ring 0.1/0.1", 64]
    assert row["below_mi"] == row["below_nce"] == row["steadier_given_pair"] == "yes"
    assert row["above_mean"] > 0.5 > rows["ring 0.5/0.1", 64]["above_mean"]
    assert (
        rows["NCE", 4]["estimate"][0]
        < rows["NCE", 64]["estimate"][0]
        < found[1]["mutual_information"]
    )


def test_a_wide_ring_with_an_inner_cut_is_no_lower_bound():
    """Where the condition fails so does the bound: the normaliser is too small."""
    args = options("--dim", "8", "--rho", "0.7", "--outer", "0.5", "--k", "1024", "--pool", "2048")
    rows = {r["estimator"]: r for r in theory.compare(args, theory.simulate(args))}
    assert rows["ring 0.5/0.1"]["below_mi"] == rows["ring 0.5/0.1"]["below_nce"] == "no"
    assert rows["ball 0.5"]["below_mi"] == "yes"


def test_the_files_and_the_same_numbers_from_the_same_seed(found, tmp_path, capsys):
    out, known = found
    lines = (out / "theory.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 1 + len(known["rows"])
    assert (out / "theory.png").read_bytes()[:4] == b"\x89PNG"
    assert (
        known["command"].startswith("python ring/theory.py --dim 4")
        and known["options"]["repeats"] == 40
    )
    theory.main([*SMALL, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "theory.json").read_text())["rows"] == known["rows"]
    assert "result: mutual information 0.893; below it" in capsys.readouterr().out
    args = options("--seed", "1")
    assert theory.compare(args, theory.simulate(args))[0]["bias"][0] != known["rows"][0]["bias"][0]


def test_intervals():
    values = np.array([1.0, 2.0, 3.0, 6.0])
    mean, low, high = theory.interval(values)
    assert (mean, (high - low) / 2) == (3.0, pytest.approx(1.96 * values.std(ddof=1) / 2))
    assert theory.spread(values, np.full((1, 4), 0.25)) == pytest.approx(values.std())
    assert [theory.verdict(v, 0) for v in ((-1, -2, -0.5), (1, 0.5, 2), (0, -1, 1))] == [
        "yes",
        "no",
        "?",
    ]


@pytest.mark.parametrize("flags, message", [
    (["--rho", "1"], "0.999"), (["--k", "1"], "2"), (["--outer", "1.5"], "1"),
    (["--inner", "1"], "0.99"),
    (["--outer", "0.001"], "--outer 0.001 --inner 0.0: a pool of 512 has no candidate; raise"),
])  # fmt: skip
def test_wrong_values(flags, message, capsys):
    says_no(theory.parse_args, [*SMALL, "--out", "x", *flags], message, capsys)


def test_the_page_quotes_the_records():
    """Every estimate and ratio with its interval in the table is one of results/ring/theory."""
    text = (ROOT / "docs" / "ring.md").read_text().partition("## The theory in numbers")[2]
    recorded = json.loads((ROOT / "results" / "ring" / "theory" / "theory.json").read_text())
    table = theory_output.table(recorded["rows"])
    quoted = re.findall(r"-?\d+\.\d+ \(-?\d+\.\d+ to -?\d+\.\d+\)", text)
    assert len(quoted) >= 15 and not [value for value in quoted if value not in table]
    assert table in (ROOT / "results" / "ring" / "theory" / "theory.md").read_text()
