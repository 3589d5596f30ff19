"""Feature transformation: the published commands, run names, learning rates, bad flags."""

import math

import pytest
from conftest import says_no

from common import cli
from feature_transform import main_contrast as script
from feature_transform import recipes, views
from runner import loop


def parsed(text: str = ""):
    return script.parse_args(["--data_folder", "x", *text.split()])


COMMAND = (
    "--method MoCov2 --cosine --mixnorm --mixnorm_target posneg --sep_alpha --pos_alpha 2.0 "
    "--neg_alpha 1.6 --mask_distribution beta --expolation_mask --epochs 200 --input_res 224 "
    "--batch_size 256 --learning_rate 0.03 --dataset imagenet100 --imagenet100path list.txt "
    "--multiprocessing-distributed --world-size 1 --rank 0 --save_score"
)
NAME = (
    "MoCov2_resnet50_RGB_Jig_False_moco_aug_B_mlp_0.2_cosine_alpha0.999_ncet0.2_ncek65536"
    "_mixnorm_targetposneg_postnormFalse_"
    "distribeta_expolationTrue_pos2.0_neg1.6_epoch200_bs256_lr0.03"
)


def test_the_published_command_and_run_names(capsys):
    args = parsed(COMMAND)
    assert recipes.run_name(args) == NAME and args.class_list == "list.txt" and args.save_score
    assert args.folder == f"./runs/feature_transform/{NAME}" and capsys.readouterr().err == ""
    assert recipes.run_name(
        parsed(COMMAND.replace("--mask_dis", "--dim_mask neg --mask_dis"))
    ).endswith("neg1.6_dimneg_epoch200_bs256_lr0.03")
    tail = "_moco_aug_A_linear_0.07_alpha0.999_ncet0.07_ncek65536"
    others = {
        "": f"Customize_resnet50_RGB_Jig_False{tail}_baseline_epoch200_bs256_lr0.03",
        "--method MoCo --mixnorm --exp_iter 3": f"MoCo_resnet50_RGB_Jig_False{tail}"
        "_mixnorm_targetneg_postnormFalse_distribeta_"
        "alpha2.0_epoch200_bs256_lr0.03_iter3",
        "--method MoCo --mixnorm --mixnorm_target pos --mask_distribution uniform --postmix_norm "
        "--norm_target both "
        "--neg_query original --mix_start_epoch 4": f"MoCo_resnet50_RGB_Jig_False{tail}"
        "_mixnorm_targetpos_postnormTrue_"
        "distriuniform_expolationFalse_normboth_queryoriginal_start4_epoch200_bs256_lr0.03",
        "--method PIRL --amp --batch_size 512": "PIRL_resnet50_RGB_Jig_True_bank"
        "_aug_A_linear_0.07_amp_O2_warm_alpha0.999_"
        "ncet0.07_ncek65536_baseline_epoch200_bs512_lr0.03",
    }
    for flags, name in others.items():
        assert recipes.run_name(parsed(flags)) == name
    assert parsed("--method MoCo --seed 3").folder.endswith("_lr0.03_seed_3")


def test_the_classes_of_imagenet100_in_a_tree_of_more_are_chosen(demo_set, tmp_path, monkeypatch):
    (tmp_path / "list").write_text(
        "\n".join(sorted(path.name for path in (demo_set / "train").iterdir())[:2])
    )
    monkeypatch.setattr(views, "CLASS_LIST", tmp_path / "list")
    for flags, found in (
        ("", str(tmp_path / "list")),
        ("--dataset imagenet", None),
        ("--imagenet100path other", "other"),
    ):
        args = parsed(f"--data_folder {demo_set} {flags}")
        assert views.choose_classes(args).class_list == found
        assert args.class_list == ("other" if found == "other" else None)


def test_a_start_after_the_last_epoch_is_said(capsys):
    parsed("--preset photos --epochs 66")
    assert "--mix_start_epoch 66 of --epochs 66: no feature" in capsys.readouterr().err
    parsed("--preset photos --epochs 67")
    parsed("--no-mixnorm --epochs 1")
    assert capsys.readouterr().err == ""


def test_what_is_typed_beats_a_method_and_is_said_once(capsys):
    args = parsed("--method InfoMin --nce_t 0.3 --no-jigsaw --mem moco")
    assert (args.modal, args.jigsaw, args.mem, args.aug, args.head, args.nce_t) == (
        "RGB",
        False,
        "moco",
        "D",
        "mlp",
        0.3,
    )
    said = capsys.readouterr().err
    assert (
        said == "note: these flags win over --method InfoMin: --jigsaw False (True), "
        "--nce_t 0.3 (0.15)\n"
    )
    assert parsed("--preset photos --method MoCov2").nce_t == 0.1
    assert capsys.readouterr().err == ""
    assert parsed("--method CMCv2 --custom_head 2mlp_bn").head == "2mlp_bn"
    assert (
        parsed("--preset ft --method MoCo").expolation_mask
        and not parsed("--preset ft --no-mixnorm").mixnorm
    )
    assert not parsed("--preset ft --mixnorm_target neg").expolation_mask
    assert (
        parsed("--moco-m 0.9").alpha == 0.9
        and parsed("--extrapolation_mask --mixnorm --mixnorm_target pos").expolation_mask
    )


def test_published_flags_without_effect_are_taken(capsys):
    parsed(
        "--crop .3 --aug_linear NULL --feature_mix --mix_ratio .5 --time_mix --only_mix "
        "--mix_alpha 1"
    )
    assert capsys.readouterr().err.count("note: these flags have no effect: ") == 1


def rate(args, epoch: int, part: float = 0.0) -> float:
    """Return the learning rate at `part` of epoch `epoch`, from 1 as the paper's code counts."""
    return script.learning_rate(args, loop.At(epoch - 1, part, 0))


def test_learning_rates_as_published():
    args = parsed("--epochs 100 --learning_rate 0.1 --cosine")
    low = 0.1 * 0.1**3
    for epoch in (1, 50, 100):
        wanted = low + (0.1 - low) * (1 + math.cos(math.pi * epoch / 100)) / 2
        assert rate(args, epoch, 0.5) == pytest.approx(wanted)
    rates = [rate(parsed(), epoch) for epoch in (1, 120, 121, 161)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.0003])
    warm = parsed("--batch_size 512 --learning_rate .06")
    assert rate(warm, 1) == pytest.approx(0.01)
    assert rate(warm, 3, 0.5) == pytest.approx(0.035) and rate(warm, 6) == 0.06
    assert not parsed("--batch_size 512 --no-warm").warm and not parsed().warm
    args = cli.replace(args, warm=True)
    assert rate(args, 5, 1.0) == pytest.approx(rate(args, 6) + 0.00027, abs=2e-5)


BAD = {
    "no data": ([], "no data: give --data_folder"),
    "no positives": (
        ["--mixnorm", "--expolation_mask"],
        "--expolation_mask moves positives apart, and --mixnorm_target neg",
    ),
    "no transformation": (["--mixnorm_target", "pos"], "--mixnorm_target belongs to --mixnorm"),
    "no reach": (
        ["--preset", "ft", "--no-expolation_mask", "--pos_reach", ".5"],
        "--pos_reach belongs to --expolation_mask",
    ),
    "no reach of negatives": (
        ["--preset", "ft", "--mixnorm_target", "neg", "--pos_reach", ".5"],
        "--pos_reach has no effect with --mixnorm_target neg",
    ),
    "no other query": (
        ["--preset", "ft", "--mixnorm_target", "neg", "--neg_query", "original"],
        "--neg_query has no effect with --mixnorm_target neg",
    ),
    "a side that stays": (
        ["--preset", "ft", "--mixnorm_target", "pos", "--postmix_norm", "--norm_target", "neg"],
        "with --mixnorm_target pos those features keep unit length",
    ),
    "augmentation of the common footing": (
        ["--preset", "compare", "--method", "CMC", "--aug", "E"],
        "--aug has no effect with --footing common",
    ),
    "one alpha": (["--mixnorm", "--pos_alpha", "3"], "--pos_alpha belongs to --sep_alpha"),
    "three alphas": (
        ["--mixnorm", "--sep_alpha", "--beta_alpha", "3"],
        "--beta_alpha: --sep_alpha takes",
    ),
    "uniform": (
        ["--mixnorm", "--mask_distribution", "uniform", "--beta_alpha", "3"],
        "uniform has no --beta_alpha",
    ),
    "no norm": (["--mixnorm", "--norm_target", "pos"], "--norm_target belongs to --postmix_norm"),
    "not mixed": (
        ["--mixnorm", "--dim_mask", "pos"],
        "--dim_mask pos: with --mixnorm_target neg those are not transformed",
    ),
    "no jigsaw": (["--beta", ".3"], "--beta belongs to --jigsaw"),
    "a bank's": (["--nce_m", ".3"], "--nce_m belongs to a bank, --mem bank"),
    "a queue's": (
        ["--method", "InsDis", "--alpha", ".9"],
        "--alpha belongs to a queue, --mem moco",
    ),
    "short queue": (
        ["--nce_k", "64"],
        "--nce_k 64: a queue must hold at least a global batch of keys (256)",
    ),
    "a network": (
        ["--arch", "resnest50"],
        "resnest50: torchvision has no split-attention networks",
    ),
    "a method": (["--method", "MoCov3"], "argument --method: invalid choice"),
    "a number": (["--mixnorm", "--pos_alpha", "0"], "argument --pos_alpha: 0 must be above 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, capsys):
    flags, message = BAD[case]
    says_no(
        script.parse_args, [*flags, *["--data_folder", "x"] * (case != "no data")], message, capsys
    )
