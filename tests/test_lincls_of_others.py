"""nonsem_neg/main_lincls.py evaluates the single ResNet of any paper without -a."""

import json
from pathlib import Path

import pytest
import torch
from papers import CASES

from common import UserError, cli, launch
from nonsem_neg import main_lincls
from runner import checkpoint, layouts

NETWORKS = ("moco", "insdis nce", "patch", "debiased", "transformed moco", "transformed pirl")
NETWORKS += ("ring ir", "ring moco")
COLOURS = ("cmc nce", "ring cmc", "transformed cmc")
HERE = launch.Process()


def pretraining(name: str, *flags: str):
    """Write the file that a pre-training begins with to run/last.ckpt; return method and loader."""
    case = CASES[name]
    args = case.module.parse_args(case.run_in("run", "-b", "16", "-j", "0", *flags))
    loader = case.module.build_loader(args, HERE)
    method = case.module.build_method(args, loader.dataset, len(loader), HERE)
    content = {"script": case.paper.pretraining, "epoch": 1, "opt": cli.flags(args)}
    if case.paper.folder == "nonsem_neg":
        content |= {"args": content.pop("opt"), "arch": args.arch}
    Path("run").mkdir(exist_ok=True)
    torch.save({**content, **method.state_dict()}, "run/last.ckpt")
    return method, loader


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("small", [True, False], ids=["small", "published"])
def test_network_size_and_normalisation_are_those_of_the_run(name, small, workspace):
    flags = ["--arch", "resnet18-small", "--footing", "common"] if small else ["--arch", "resnet18"]
    torch.manual_seed(0)
    method, loader = pretraining(name, *flags)
    args = main_lincls.parse_args(["data/demo", "--pretrained", "run", "--device", "cpu"])
    saved, args = main_lincls.read(args)
    assert args.input_res == loader.views[0].geometry.size == 32
    assert args.arch == flags[1]
    for train in (True, False):
        assert main_lincls.recipe(args, saved, train).ops[-1] == loader.views[0].ops[-1]
    network, _ = main_lincls.build_network(saved, args, 10, HERE)
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        method.network.eval()
        torch.testing.assert_close(main_lincls.embed(network, images, args), method.embed(images))


def test_a_classifier_on_another_papers_network(workspace, capsys):
    """It is trained, resumed and evaluated with what the pre-training says."""
    pretraining("debiased", "--arch", "resnet18-small")
    flags = ["data/demo", "--device", "cpu", "-j", "0", "-b", "64", "--lr", ".1", "--epochs"]
    main_lincls.main([*flags, "1", "--pretrained", "run", "--out", "linear"])
    main_lincls.main([*flags, "2", "--resume", "auto", "--out", "linear"])
    assert "Normalize(mean=(0.4914, 0.4822, 0.4465)" in capsys.readouterr().out
    result = json.loads(Path("linear/result.json").read_text())
    assert result["pretrained"] == "run/last.ckpt" and result["linear_epochs"] == 2
    (path,) = layouts.by_age("linear", ("checkpoint_robust_*",))
    saved = checkpoint.Saved(path)
    assert saved["pretrained_args"]["tau_plus"] == 0.1
    (normalize,), _ = layouts.colours(saved, [])
    assert normalize.mean == (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize("name", COLOURS)
def test_the_towers_of_colours_are_refused_with_a_pointer(name, workspace):
    pretraining(name, "--arch", "resnet18v1" if name.startswith("cmc") else "resnet18")
    way_out = f"evaluate it with {CASES[name].paper.evaluation}"
    with pytest.raises(UserError, match=way_out):
        main_lincls.main(["data/demo", "--pretrained", "run", "--device", "cpu"])


def test_a_width_that_torchvision_does_not_have_is_refused_with_a_pointer(workspace):
    pretraining("transformed moco", "--arch", "resnet18x2")
    why = "resnet18x2, which torchvision lacks: evaluate it with feature_transform/main_linear"
    with pytest.raises(UserError, match=why):
        main_lincls.main(["data/demo", "--pretrained", "run", "--device", "cpu"])
