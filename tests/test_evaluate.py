"""tools/evaluate.py: its numbers on features whose answers are known, its networks, its errors."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from cmc import colour, networks
from common import UsageError, UserError, backbones
from runner import layouts
from tools import evaluate


def blobs(n, classes=3, dim=8, spread=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % classes
    return F.one_hot(targets, dim).float() + spread * torch.randn(n, dim, generator=generator), targets


def test_classifiers_of_all_rates_are_those_trained_one_by_one(monkeypatch):
    features, targets = blobs(60, spread=0.8)
    features = features.double()  # so that the order of sums does not show
    rows, rates = torch.arange(50), evaluate.RATES

    def train():
        return evaluate.train_linear(features[None], targets, rows, 3, 4, 16, torch.Generator().manual_seed(1))

    weight, bias = train()
    for number in (0, 5, 11):
        monkeypatch.setattr(evaluate, "RATES", rates[number : number + 1])
        alone, alone_bias = train()
        torch.testing.assert_close(alone[0], weight[number])
        torch.testing.assert_close(alone_bias[0], bias[number])
    linear = torch.nn.Linear(8, 3).double()  # the last of them once more, by autograd and torch's SGD
    torch.nn.init.zeros_(linear.weight), torch.nn.init.zeros_(linear.bias)
    sgd, generator = torch.optim.SGD(linear.parameters(), lr=1, momentum=0.9), torch.Generator().manual_seed(1)
    for step, some in enumerate(s for _ in range(4) for s in rows[torch.randperm(50, generator=generator)].split(16)):
        sgd.param_groups[0]["lr"] = rates[11] * 0.5 * (1 + math.cos(math.pi * step / 16))
        sgd.zero_grad()
        F.cross_entropy(linear(features[some]), targets[some]).backward()
        sgd.step()
    torch.testing.assert_close(alone[0].T, linear.weight.detach(), rtol=1e-3, atol=1e-4)
    found = evaluate.accuracies(features, targets, alone, alone_bias)
    assert found == pytest.approx([100 * float((linear(features).argmax(1) == targets).float().mean())])


def test_what_is_kept_back_and_fewer_labels_take_from_every_class():
    targets, generator = torch.tensor([0] * 40 + [1] * 10 + [2] * 2), torch.Generator().manual_seed(0)
    train, kept = evaluate.keep_back(targets, 0.1, generator)
    assert sorted([*train.tolist(), *kept.tolist()]) == list(range(52))
    assert targets[kept].bincount().tolist() == [4, 1, 1]
    some = evaluate.fewer_labels(train, targets, 0.1, generator)
    assert targets[some].bincount().tolist() == [4, 1, 1] and set(some.tolist()) <= set(train.tolist())


def test_geometry_of_features():
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(300, 5, generator=generator), dim=1)
    assert evaluate.alignment(z, 3 * z) == pytest.approx(0, abs=1e-6) and evaluate.alignment(z, -z) == pytest.approx(4)
    assert evaluate.uniformity(z[:1].repeat(20, 1)) == pytest.approx(0, abs=1e-5)
    pairs = torch.pdist(z.double()).square().mul(-2).exp().mean().log()
    assert evaluate.uniformity(2 * z, chunk=64) == pytest.approx(float(pairs), abs=1e-5)
    assert evaluate.rankme(torch.eye(7).repeat(9, 1)) == pytest.approx(7, rel=1e-4)
    assert evaluate.rankme(torch.ones(50, 7)) == pytest.approx(1, abs=1e-3)
    positive, negative = evaluate.scores(z, z, generator)
    assert positive.min() > 0.999 and abs(negative.mean()) < 0.1


def test_a_network_of_every_width_and_stem(tmp_path):
    for number, how in enumerate((dict(depth=18), dict(depth=50, width=0.5), dict(depth=18, small_stem=True, width=2))):
        net = backbones.WidthResNet(dim=0, **how)
        for prefix, key in (("", "state_dict"), ("module.encoder_q.", "state_dict")):
            torch.save({key: layouts.add_prefix(net.state_dict(), prefix)}, tmp_path / f"{number}.pth")
            found, _, facts = evaluate.open_backbone(str(tmp_path / f"{number}.pth"), torch.device("cpu"))
            assert facts["arch"].startswith(f"resnet{how['depth']}")
            x = torch.randn(2, 3, 32, 32)
            torch.testing.assert_close(found(x), net.eval()(x), rtol=1e-4, atol=1e-4)
            net.train()


def test_both_towers_of_cmc(tmp_path):
    net = networks.build_network("resnet18v1", colour.default_views("Lab"), 128, False).eval()
    torch.save(
        {"model": layouts.add_prefix(net.state_dict(), "encoder."), "opt": {"view": "Lab"}}, tmp_path / "cmc.pth"
    )
    found, (views,), facts = evaluate.open_backbone(str(tmp_path / "cmc.pth"), torch.device("cpu"))
    x = views.apply(torch.rand(2, 3, 32, 32), {})
    torch.testing.assert_close(found(x), torch.cat(backbones.feature(net, x, 6), 1).detach(), rtol=1e-4, atol=1e-4)
    assert facts["towers"] == 2 and facts["arch"] == "resnet18x0.5"


def test_a_run_of_the_script(demo_set, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(demo_set)
    torch.manual_seed(0)
    torch.save(backbones.build("resnet18", 0).state_dict(), "net.pth")
    evaluate.main(["net.pth", "--demo", "--views", "1", "--epochs", "2", "--device", "cpu"])
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "runs/try-evaluation/result.json").read_text())
    assert (
        "linear, 10% of the labels" in said and result["acc1"] == result["linear_100"] and 0 < result["knn_acc1"] <= 100
    )
    assert len(result["linear"]["1%"]["val"]) == len(evaluate.RATES) and result["pretrained"] == "net.pth"
    assert ("lies below k-NN" in said) == (result["acc1"] < result["knn_acc1"] - 0.5)
    ends = [
        name for name, found in result["linear"].items() if found["rate"] in (evaluate.RATES[0], evaluate.RATES[-1])
    ]
    assert ("the best rate is an end of those tried" in said) == bool(ends) and all(name in said for name in ends)
    assert (tmp_path / "runs/try-evaluation/scores.png").stat().st_size > 5000


def test_bad_input(demo_set, tmp_path):
    def fails(error, match, *arguments):
        with pytest.raises(error, match=match) as told:
            evaluate.main([*map(str, arguments), "--device", "cpu", "--out", str(tmp_path / "out")])
        assert str(told.value).isprintable() and files == {p.name: p.read_text() for p in (tmp_path / "out").iterdir()}

    (tmp_path / "out").mkdir()
    for name in ("config.json", "result.json"):  # of an earlier evaluation
        (tmp_path / "out" / name).write_text("{}")
    files = {p.name: p.read_text() for p in (tmp_path / "out").iterdir()}
    fails(UsageError, "no data: give DATA", "x.pth")
    torch.save({"state_dict": {"fc.weight": torch.ones(2, 2)}}, tmp_path / "a.pth")
    fails(UserError, "found no backbone in .*a.pth", tmp_path / "a.pth", demo_set)
    torch.save({"classifier": {"weight": torch.ones(2, 2)}}, tmp_path / "b.pth")
    fails(UserError, "is a classifier without its network", tmp_path / "b.pth", demo_set)
    torch.save({"state_dict": {"features.0.weight": torch.ones(2, 3, 3, 3)}}, tmp_path / "c.pth")
    fails(UserError, "holds no ResNet", tmp_path / "c.pth", demo_set)
    torch.save(backbones.build("resnet18", 0).state_dict(), tmp_path / "d.pth")
    (tmp_path / "half" / "train").mkdir(parents=True)
    (tmp_path / "half" / "train" / "cat").symlink_to(next(p for p in (demo_set / "train").iterdir()))
    (tmp_path / "half" / "train" / "dog").symlink_to(sorted((demo_set / "train").iterdir())[1])
    fails(UsageError, "half: .*val", tmp_path / "d.pth", tmp_path / "half")
