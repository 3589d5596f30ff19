"""The CIFAR-10 notebook of MoCo's authors as a preset, and what came with it.

That is the symmetric loss, averaged batch-norm statistics, and a run that ends before its schedule.
"""

import json
import math

import pytest
import torch
from conftest import Net, equal
from torch import nn
from torch.nn import functional as F

from common import UsageError, augment, batchnorm, inputs, launch
from nonsem_neg import main_lincls, views
from nonsem_neg import moco_non_sem_neg as script
from nonsem_neg.moco import MoCo
from runner import checkpoint, layouts, loop

PRESET = "--preset moco-cifar --dataset folder".split()
TINY = "--input-res 8 -b 32 --moco-k 64 --bn-splits 2 -j 0 --seed 1 -p 2".split()
pytestmark = pytest.mark.usefixtures("slim")


def test_the_preset_is_the_notebook():
    args = script.parse_args(["CIFAR", "--preset", "moco-cifar"])
    assert (args.dataset, args.arch, args.input_res) == ("cifar10", "resnet18", 32)
    assert args.small_stem and not args.mlp
    assert (args.batch_size, args.lr, args.epochs) == (512, 0.06, 200)
    assert (args.momentum, args.weight_decay) == (0.9, 5e-4)
    assert (args.moco_k, args.moco_m, args.moco_t) == (4096, 0.99, 0.1)
    assert (args.bn_splits, args.bn_running) == (8, "mean")
    assert (args.robust, args.num_nonsem, args.symmetric) == ("none", 0, False)
    assert (args.knn_every, args.knn_k, args.knn_t, args.knn_on) == (1, 200, 0.1, "output")
    rates = [script.learning_rate(args, loop.At(epoch, 0.5, 0)) for epoch in (0, 99, 199)]
    assert rates == pytest.approx([0.03 * (1 + math.cos(math.pi / 200)), 0.03, 0], abs=1e-12)
    plain = script.parse_args(["CIFAR", "--cos"])
    assert script.learning_rate(plain, loop.At(0, 0.5, 0)) == plain.lr
    assert (plain.aug, plain.knn_on) == ("v1", "feature")
    assert script.parse_args(["CIFAR", "--aug-plus"]).aug == "v2"

    recipe = script.recipe(args)
    crop, (flip, jitter, grey, normal) = recipe.geometry, recipe.ops
    assert crop.scale == (0.08, 1.0) and isinstance(flip, augment.RandomHorizontalFlip)
    assert (jitter.p, grey.p, normal) == (0.8, 0.2, views.CIFAR)
    assert normal.mean == (0.4914, 0.4822, 0.4465) and normal.std == (0.2023, 0.1994, 0.2010)
    assert inputs.plain_view(args).geometry == augment.ResizeCenterCrop(32, 32)  # as it is
    assert inputs.plain_view(plain).geometry == augment.ResizeCenterCrop(256, 224)
    typed = script.parse_args(["CIFAR", "--preset", "moco-cifar", "--eval-resize", "37"])
    assert inputs.plain_view(typed).geometry == augment.ResizeCenterCrop(37, 32)


def test_keys_of_a_symmetric_step_fit_the_queue(capsys):
    with pytest.raises(
        UsageError, match="--moco-k 64 must be a multiple of twice the global batch 64"
    ):
        script.parse_args(
            ["DATA", "--moco-k", "64", "-b", "64", "--symmetric", "--input-res", "64"]
        )


def test_symmetric_is_both_directions_against_one_queue():
    def model(symmetric):
        torch.manual_seed(0)
        made = MoCo(
            Net, dim=8, queue_size=32, momentum=0.5, temperature=0.2, alpha=2.0, symmetric=symmetric
        )
        with torch.no_grad():  # so that an update of the key encoder changes it
            made.encoder_q.conv.weight.add_(0.1)
        return made

    one, two, t, u = torch.randn(
        2 + 2 * 2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(5)
    ).split([1, 1, 2, 2])
    one, two, t, u = (
        one[0],
        two[0],
        t.transpose(0, 1),
        u.transpose(0, 1),
    )  # two views, two negatives of each
    both, plain = model(True), model(False)
    logits, keys = both(one, two, (t, u), torch.Generator().manual_seed(1))
    there, keys_two = plain(one, two, t, torch.Generator().manual_seed(1))
    plain.momentum = 1.0  # the key encoder moves once a step
    back, keys_one = plain(two, one, u, torch.Generator().manual_seed(1))
    torch.testing.assert_close(logits, torch.cat([there, back]))
    torch.testing.assert_close(keys, torch.cat([keys_one, keys_two]))
    assert equal(dict(both.encoder_k.named_parameters()), dict(plain.encoder_k.named_parameters()))
    before = both.queue.clone()
    both.enqueue(keys)
    assert torch.equal(both.queue[:, :8], keys.T) and torch.equal(both.queue[:, 8:], before[:, 8:])
    assert both.queue_ptr.item() == 8


@pytest.mark.parametrize("flags", [[], ["--robust", "patch", "--patch-ratio", "2", "4"]])
def test_a_symmetric_step_of_the_script_is_the_sum_of_both_losses(flags):
    args = script.parse_args(["DATA", *PRESET, *TINY, "--symmetric", *flags])
    method = script.NonSemantic(args, launch.Process())
    seen = []
    method.network.register_forward_hook(lambda network, images, output: seen.append(output))
    views = list(torch.randn(2, 32, 3, 8, 8))
    out = method.step(loop.Batch(views, None, torch.arange(32), loop.At(0, 0.0, 0)))
    (logits, keys), labels = seen[0], torch.zeros(32, dtype=torch.long)
    assert logits.shape == (64, 1 + 64 + bool(flags)) and keys.shape == (64, 128)
    torch.testing.assert_close(
        out["loss"], F.cross_entropy(logits[:32], labels) + F.cross_entropy(logits[32:], labels)
    )


@pytest.mark.parametrize("running", ["first", "mean"])
@pytest.mark.parametrize("way", ["in turn", "as channels", "as a compiler is given them"])
def test_statistics_of_groups(running, way, monkeypatch):
    monkeypatch.setattr(batchnorm, "is_wide", lambda x: way == "as channels")
    x = torch.randn(2, 8, 4, 5, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    network = batchnorm.split(nn.Sequential(nn.BatchNorm2d(4, momentum=0.3)), 2, running)
    norm = network[0]
    forward = norm._at_once if "compiler" in way else network
    expected, alone = torch.stack([torch.zeros(4), torch.ones(4)]), nn.BatchNorm2d(4, momentum=0.3)
    for images in x:
        groups = []
        for part in images.chunk(2):
            alone.running_mean.copy_(expected[0]), alone.running_var.copy_(expected[1])
            groups.append((alone(part), torch.stack([alone.running_mean, alone.running_var])))
        kept = [stats for _, stats in groups]
        expected = sum(kept) / 2 if running == "mean" else kept[0]
        own = forward(images)
        torch.testing.assert_close(own, torch.cat([out for out, _ in groups]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.stack([norm.running_mean, norm.running_var]), expected)
    assert norm.num_batches_tracked == 2
    assert norm.state_dict().keys() == alone.state_dict().keys()
    norm.eval()
    torch.testing.assert_close(norm(x[0, :1]), F.batch_norm(x[0, :1], *expected))


def test_a_run_that_stops_early_goes_on_exactly_and_evaluations_see_its_colours(workspace, capsys):
    flags = ["data/demo", *PRESET, *TINY, "--epochs", "2", "--symmetric"]
    script.main([*flags, "--ckpt_path", "whole"])
    script.main([*flags, "--ckpt_path", "parts", "--stop-after", "1"])
    message = "stopped by --stop-after 1 after epoch 0; continue with --resume auto"
    assert message in capsys.readouterr().out
    last = json.loads((workspace / "parts/metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] == 0 and last["knn_acc1"] > 0
    script.main([*flags, "--ckpt_path", "parts", "--resume", "auto", "--stop-after", "2"])
    said = capsys.readouterr().out
    assert "done: 2 epochs" in said and "flags differ" not in said
    whole, parts = (
        checkpoint.load(workspace / run / "checkpoint_last.pth.tar") for run in ("whole", "parts")
    )
    assert equal(whole["state_dict"], parts["state_dict"])
    assert equal(whole["optimizer"], parts["optimizer"])

    saved = checkpoint.Saved(str(workspace / "parts/checkpoint_last.pth.tar"))
    args = main_lincls.parse_args(["data/demo", "--pretrained", "parts", "--input-res", "8"])
    assert main_lincls.recipe(args, saved, train=True).ops[-1] is views.CIFAR
    assert main_lincls.recipe(args, saved, train=False).ops[-1] is views.CIFAR
    state = layouts.backbone(saved)
    assert layouts.open_trunks(saved, state, "parts")[0][0].mean == views.CIFAR.mean
    del saved["args"]
    assert main_lincls.recipe(args, saved, train=True).ops[-1] is views.IMAGENET
    assert layouts.open_trunks(saved, state, "parts")[0][0].mean == views.IMAGENET.mean
