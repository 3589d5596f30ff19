"""tools/evaluate.py: its numbers on features with known answers, its networks, its errors."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cmc import colour, networks
from common import UsageError, UserError, augment, backbones, sets
from runner import layouts
from tools import evaluate, probes

CPU = torch.device("cpu")


def blobs(n, classes=3, dim=8, spread=0.1, seed=0):
    """Return features (n, dim) around one corner for each class, and their targets."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % classes
    noise = spread * torch.randn(n, dim, generator=generator)
    return F.one_hot(targets, dim).float() + noise, targets


def train(features, targets, rows, rates):
    generator = torch.Generator().manual_seed(1)
    return probes.train_linear(features[None], targets, rows, 3, 4, 16, generator, rates)


def test_classifiers_of_all_rates_are_those_trained_one_by_one():
    features, targets = blobs(60, spread=0.8)
    features = features.double()  # so that the order of sums does not show
    rows = torch.arange(50)
    weight, bias = train(features, targets, rows, probes.RATES)
    for number in (0, 5, 11):
        alone, alone_bias = train(features, targets, rows, probes.RATES[number : number + 1])
        torch.testing.assert_close(alone[0], weight[number])
        torch.testing.assert_close(alone_bias[0], bias[number])


def test_a_classifier_is_that_of_autograd_and_sgd():
    features, targets = blobs(60, spread=0.8)
    features = features.double()
    rows = torch.arange(50)
    rate = probes.RATES[11]
    weight, bias = train(features, targets, rows, (rate,))
    linear = torch.nn.Linear(8, 3).double()
    torch.nn.init.zeros_(linear.weight)
    torch.nn.init.zeros_(linear.bias)
    sgd = torch.optim.SGD(linear.parameters(), lr=1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    orders = [rows[torch.randperm(50, generator=generator)] for _ in range(4)]
    for step, batch in enumerate(batch for order in orders for batch in order.split(16)):
        sgd.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / 16))
        sgd.zero_grad()
        F.cross_entropy(linear(features[batch]), targets[batch]).backward()
        sgd.step()
    torch.testing.assert_close(weight[0].T, linear.weight.detach(), rtol=1e-3, atol=1e-4)
    hits = (linear(features).argmax(1) == targets).float().mean()
    accuracies = probes.accuracies(features, targets, weight, bias)
    assert accuracies == pytest.approx([100 * float(hits)])


def test_what_is_kept_back_and_fewer_labels_take_from_every_class():
    targets = torch.tensor([0] * 40 + [1] * 10 + [2] * 2)
    generator = torch.Generator().manual_seed(0)
    rows, kept = probes.keep_back(targets, 0.1, generator)
    assert sorted([*rows.tolist(), *kept.tolist()]) == list(range(52))
    assert targets[kept].bincount().tolist() == [4, 1, 1]
    fewer = probes.fewer_labels(rows, targets, 0.1, generator)
    assert targets[fewer].bincount().tolist() == [4, 1, 1]
    assert set(fewer.tolist()) <= set(rows.tolist())


def test_geometry_of_features():
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(300, 5, generator=generator), dim=1)
    assert probes.alignment(z, 3 * z) == pytest.approx(0, abs=1e-6)
    assert probes.alignment(z, -z) == pytest.approx(4)
    assert probes.uniformity(z[:1].repeat(20, 1)) == pytest.approx(0, abs=1e-5)
    pairs = torch.pdist(z.double()).square().mul(-2).exp().mean().log()
    assert probes.uniformity(2 * z, chunk=64) == pytest.approx(float(pairs), abs=1e-5)
    assert probes.rankme(torch.eye(7).repeat(9, 1)) == pytest.approx(7, rel=1e-4)
    assert probes.rankme(torch.ones(2000, 512)) == pytest.approx(1, abs=2e-3)
    low = torch.randn(5000, 10, generator=generator) @ torch.randn(10, 256, generator=generator)
    low = low + 5 * torch.randn(256, generator=generator)
    shares = torch.linalg.svdvals(low.double())
    shares = shares / shares.sum() + 1e-7  # as in the paper's Eq. (2)
    rank = float(torch.special.entr(shares).sum().exp())
    assert probes.rankme(low) == pytest.approx(rank, rel=1e-4)
    positive, negative = probes.scores(z, z, generator)
    assert positive.min() > 0.999 and abs(negative.mean()) < 0.1


SHAPES = (
    {"depth": 18},
    {"depth": 50, "width": 0.5},
    {"depth": 18, "small_stem": True, "width": 0.25},
)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_network_of_every_width_and_stem(tmp_path, shape):
    net = backbones.WidthResNet(dim=0, **shape)
    path = str(tmp_path / "net.pth")
    for prefix in ("", "module.encoder_q."):
        torch.save({"state_dict": layouts.add_prefix(net.state_dict(), prefix)}, path)
        network, _, origin, _ = evaluate.open_backbone(path, CPU)
        assert origin["arch"].startswith(f"resnet{shape['depth']}")
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(network(x), net.eval()(x), rtol=1e-4, atol=1e-4)
        net.train()


def test_a_network_has_torchvisions_name_whatever_the_file_says(tmp_path):
    arch = "resnext50_32x4d"
    path = str(tmp_path / "net.pth")
    torch.save({"state_dict": backbones.build(arch, 0).state_dict(), "arch": "resnet50"}, path)
    assert evaluate.open_backbone(path, CPU)[2]["arch"] == arch


def test_both_towers_of_cmc(tmp_path):
    net = networks.build_network("resnet18v1", colour.default_views("Lab"), 128, False).eval()
    state = layouts.add_prefix(net.state_dict(), "encoder.")
    torch.save({"model": state, "opt": {"view": "Lab"}}, tmp_path / "cmc.pth")
    network, (views,), origin, flags = evaluate.open_backbone(str(tmp_path / "cmc.pth"), CPU)
    x = views.apply(torch.rand(2, 3, 32, 32), {})
    features = torch.cat(backbones.feature(net, x, 6), 1).detach()
    torch.testing.assert_close(network(x), features, rtol=1e-4, atol=1e-4)
    assert origin["towers"] == 2 and origin["arch"] == "resnet18x0.5"
    assert flags == {"view": "Lab"}


def test_a_run_of_the_script(workspace, capsys, monkeypatch):
    draw = probes.draw_scores

    def draw_last(path, *drawn):
        assert (workspace / path).with_name("result.json").exists()
        draw(path, *drawn)

    monkeypatch.setattr(probes, "draw_scores", draw_last)
    torch.manual_seed(0)
    torch.save(backbones.build("resnet18", 0).state_dict(), "net.pth")
    flags = ["net.pth", "--demo", "--views", "1", "--epochs", "2", "--device", "cpu"]
    shifted = ["--rendition", "data/demo/val", "--corruption", "data/demo/corruption"]
    evaluate.main([*flags, *shifted])
    said = capsys.readouterr().out
    result = json.loads((workspace / "runs/try-evaluation/result.json").read_text())
    assert "linear, 10% of the labels" in said
    assert result["acc1"] == result["linear_100"] and 0 < result["knn_acc1"] <= 100
    assert len(result["linear"]["1%"]["val"]) == len(probes.RATES)
    # val under another name
    assert result["rendition"] == result["acc1"]
    assert result["rendition_knn"] == result["knn_acc1"]
    assert 0 < result["corruption"] < 100 and "corruption" in said
    assert result["pretrained"] == "net.pth" and result["label"] == "net"
    assert ("lies below k-NN" in said) == (result["acc1"] < result["knn_acc1"] - 0.5)
    ends = (probes.RATES[0], probes.RATES[-1])
    shares = [share for share, linear in result["linear"].items() if linear["rate"] in ends]
    assert ("the best rate is an end of those tried" in said) == bool(shares)
    assert all(share in said for share in shares)
    assert (workspace / "runs/try-evaluation/scores.png").stat().st_size > 5000


def test_untrained_weights_are_the_floor(workspace):
    torch.save(backbones.build("resnet18", 0).state_dict(), "net.pth")
    network = evaluate.open_backbone("net.pth", CPU)[0]
    images = torch.randn(2, 3, 32, 32)
    given, first, again, other = (
        net(images) for net in (network, *(evaluate.untrained(network, seed) for seed in (0, 0, 1)))
    )
    assert torch.equal(first, again) and first.shape == given.shape
    assert not torch.allclose(first, given) and not torch.allclose(first, other)
    evaluate.main("net.pth --demo --untrained --views 1 --epochs 1 --device cpu".split())
    result = json.loads((workspace / "runs/try-evaluation/result.json").read_text())
    assert (result["arch"], result["pretrained"]) == ("resnet18", "random weights")


def test_the_input_is_as_large_as_in_the_pretraining(workspace):
    state = layouts.add_prefix(backbones.build("resnet18", 0).state_dict(), "module.encoder_q.")
    saved = {"state_dict": state, "args": {"input_res": 24}, "arch": "resnet18"}
    torch.save(saved, "net.pth")
    small = ["--views", "1", "--epochs", "1", "--device", "cpu", "-j", "0"]
    for flags, size in (([], 24), (["--input-res", "16"], 16)):
        evaluate.main(["net.pth", "data/demo", "--out", "out", *small, *flags])
        config = json.loads((workspace / "out/config.json").read_text())
        assert config["options"]["input_res"] == size


def refuse(error, match, out, *arguments) -> None:
    """Evaluate: one line is raised, and what lies in `out` stays as it was."""
    before = {path.name: path.read_text() for path in out.iterdir()}
    flags = [*map(str, arguments), "--device", "cpu", "--out", str(out)]
    with pytest.raises(error, match=match) as refused:
        evaluate.main(flags)
    assert str(refused.value).isprintable()
    assert {path.name: path.read_text() for path in out.iterdir()} == before


def test_the_folder_of_another_network_or_of_a_training_is_left_alone(demo_set, tmp_path):
    network = tmp_path / "net.pth"
    torch.save(backbones.build("resnet18", 0).state_dict(), network)
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text(json.dumps({"pretrained": "other.pth"}))
    refuse(UsageError, "out holds the evaluation of other.pth: choose", out, network, demo_set)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "config.json").write_text("{}")
    network.rename(tmp_path / "train" / "current.pth")
    with pytest.raises(UsageError, match="train is the folder of a training"):
        flags = ["--out", str(tmp_path / "train"), "--device", "cpu"]
        evaluate.main([str(tmp_path / "train"), str(demo_set), *flags])
    assert (tmp_path / "train" / "config.json").read_text() == "{}"


def test_bad_input(demo_set, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.json", "result.json"):  # of an earlier evaluation
        (out / name).write_text("{}")
    files = {
        "a.pth": {"state_dict": {"fc.weight": torch.ones(2, 2)}},
        "b.pth": {"classifier": {"weight": torch.ones(2, 2)}},
        "c.pth": {"state_dict": {"features.0.weight": torch.ones(2, 3, 3, 3)}},
        "d.pth": backbones.build("resnet18", 0).state_dict(),
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    refuse(UsageError, "no data: give DATA", out, "x.pth")
    refuse(UserError, "found no backbone in .*a.pth", out, tmp_path / "a.pth", demo_set)
    without = "is a classifier without its network"
    refuse(UserError, without, out, tmp_path / "b.pth", demo_set)
    refuse(UserError, "holds no ResNet", out, tmp_path / "c.pth", demo_set)
    half = tmp_path / "half"
    (half / "train").mkdir(parents=True)
    kinds = sorted((demo_set / "train").iterdir())
    for name, kind in zip(("cat", "dog"), kinds):
        (half / "train" / name).symlink_to(kind)
    refuse(UsageError, "half.* no val", out, tmp_path / "d.pth", half)


class SmallCifar100:
    """Stands for torchvision.datasets.CIFAR100, with two pictures of each class."""

    classes = [f"c{number}" for number in range(100)]

    def __init__(self, root, train, download):
        self.targets = [*range(100), *range(100)]
        noise = torch.Generator().manual_seed(int(train))
        pixels = torch.randint(0, 256, (200, 32, 32, 3), generator=noise)
        self.data = pixels.to(torch.uint8).numpy()


def test_cifar100_is_judged_by_its_hundred_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(sets.tv_datasets, "CIFAR100", SmallCifar100)
    torch.save(backbones.small_resnet(0).state_dict(), tmp_path / "net.pth")
    flags = "--dataset cifar100 --input-res 32 --epochs 1 --views 1 --workers 0 --knn-k 5"
    out = tmp_path / "out"
    evaluate.main([str(tmp_path / "net.pth"), str(tmp_path), *flags.split(), "--out", str(out)])
    result = json.loads((out / "result.json").read_text())
    assert result["classes"] == 100 and result["protocol"] == probes.PROTOCOL
    assert result["knn_acc5"] >= result["knn_acc1"]


def test_pictures_that_are_cropped_already_are_not_cropped_again(tmp_path):
    plain = augment.Compose(augment.ResizeCenterCrop(256, 224))
    pictures = {}
    for side in (224, 300):
        (tmp_path / f"{side}/cat").mkdir(parents=True)
        Image.new("RGB", (side, side)).save(tmp_path / f"{side}/cat/1.png")
        pictures[side] = sets.open_tree(tmp_path / str(side))

    def resize(name, side):
        return evaluate.view_of(name, pictures[side], plain).geometry.resize

    assert resize("corruption", 224) is None and resize("stylized", 224) is None
    assert resize("clean", 224) == resize("corruption", 300) == resize("rendition", 224) == 256
