"""The flags of the pre-training of MoCo and InsDis, and what follows from them."""

import pytest
from conftest import says_no

from moco_insdis import flags
from moco_insdis import train_moco_ins as script
from runner import loop


def parsed(*words):
    return script.parse_args(["--data_folder", "x", *" ".join(words).split()])


def test_run_names_are_the_published_ones():
    other = (
        "--nce_k 4096 --dataset imagenet --aug NULL --amp --opt_level O1 --warm --model resnet50x2"
    )
    published = {
        "--softmax": "InsDis_softmax_16384_resnet50_lr_0.03_decay_0.0001_bsz_128_crop_0.2_aug_CJ",
        "--softmax --moco": "MoCo0.999_softmax_16384_resnet50_lr_0.03_decay_0.0001_bsz_128_crop_0.2"
        "_aug_CJ",
        other: "InsDis_nce_4096_resnet50x2_lr_0.03_decay_0.0001_bsz_128_crop_0.08_warm_amp_O1"
        "_aug_NULL",
    }
    for words, name in published.items():
        assert flags.run_name(parsed(words)) == name
    assert flags.run_name(parsed("--nce_z oneshot")).startswith("InsDis_nce_oneshot_16384_")


def test_what_follows_from_other_flags():
    bare = parsed()
    assert (bare.model, bare.dataset) == ("resnet50", "imagenet100")
    assert (bare.nce_k, bare.nce_t, bare.alpha) == (16384, 0.07, 0.999)
    common = parsed("--moco --arch resnet18 --queue 999 --temperature .2 --ema .9 --out here")
    assert (common.model, common.nce_k, common.nce_t) == ("resnet18", 999, 0.2)
    assert (common.alpha, common.model_path) == (0.9, "here")
    assert bare.crop == 0.2 and parsed("--dataset imagenet").crop == 0.08
    assert parsed("--dataset imagenet --crop .3").crop == 0.3
    assert parsed("--footing common").crop == 0.08  # its own view
    assert bare.bn_splits == 1 and parsed("--moco").bn_splits == 4
    assert parsed("--moco --bn-splits 2").bn_splits == 2
    assert parsed("--preset small").softmax and not parsed("--preset small --nce_z oneshot").softmax
    assert not parsed("--preset small --no-softmax").softmax and bare.workers == 18


def test_learning_rates():
    times = [loop.At(epoch, 0.5, 0) for epoch in (0, 119, 120, 160, 200)]
    rates = [script.learning_rate(parsed(), at) for at in times]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.0003, 0.00003])
    times = [loop.At(0, 0.0, 0), loop.At(4, 0.5, 0), loop.At(5, 0.0, 0), loop.At(10, 0.0, 0)]
    rates = [script.learning_rate(parsed("--warm"), at) for at in times]
    assert rates == pytest.approx([0.01, 0.028, 0.03, 0.03])
    longer = parsed("--warm --epochs 501")
    assert script.learning_rate(longer, loop.At(5, 0.0, 0)) == pytest.approx(0.02)


def test_augmentation_as_published():
    view = script.recipe(parsed())
    names = [type(op).__name__ for op in (view.geometry, *view.ops)]
    assert names[:3] == ["RandomResizedCrop", "RandomGrayscale", "ColorJitter"]
    assert names[3:] == ["RandomHorizontalFlip", "Normalize"]
    names = [type(op).__name__ for op in script.recipe(parsed("--aug NULL")).ops]
    assert names == ["RandomHorizontalFlip", "Normalize"]


BAD = {
    "short queue": ("--moco --nce_k 64", "--nce_k 64: a queue must hold at least"),
    "no Z": ("--softmax --nce_z ema", "--nce_z ema: InfoNCE"),
    "MoCo's": ("--alpha 0.99", "--alpha belongs to MoCo"),
    "InsDis's": ("--moco --exclude-self", "--exclude-self belongs to InsDis"),
    "its own batch-norm": ("--moco --syncBN", "--syncBN belongs to InsDis"),
    "its own memory": ("--moco --nce_m 0.4", "--nce-m belongs to InsDis"),
    "joined and split": (
        "--syncBN --bn-splits 2",
        "--syncBN takes batch-norm statistics over all processes",
    ),
    "apex for nothing": ("--amp-backend apex", "--amp-backend apex needs --amp"),
    "milestones": ("--lr_decay_epochs 1,x", "--lr-decay-epochs '1,x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, capsys):
    flags, words = BAD[case]
    says_no(script.parse_args, ["--data_folder", "x", *flags.split()], words, capsys)


def test_no_data(capsys):
    says_no(script.parse_args, [], "no data: give --data_folder", capsys)


@pytest.mark.parametrize(
    "flags",
    [
        "--aug RA",
        "--model resnet50v1",
        "--nce_t 0",
        "--crop 1.5",
        "--crop 0",
        "--nce_k 0",
        "--weight_decay -1",
        "--seed 99999999999999999999",
    ],
)
def test_refused_values(flags, capsys):
    says_no(script.parse_args, ["--data_folder", "x", *flags.split()], flags.split()[0], capsys)
