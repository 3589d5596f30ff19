"""The pre-training script of feature transformation: draws, presets, run names, exact resume, scores, bad input."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import as_published, equal, inside, says_no, stopped_at

from common import UserError, launch, metrics
from runner import checkpoint
from feature_transform import main_contrast as script
from feature_transform import recipes, transform, views
from feature_transform.memory import KeyQueue, MemoryBank
from feature_transform.transform import LEVELS, NOTHING, Draws, Rule
from moco_insdis import contrast as plain

pytestmark = pytest.mark.usefixtures("slim")

DEMO = "--demo --device cpu --model_path run".split()
TINY = [*DEMO, *"--epochs 2 --batch_size 32 --nce_k 40 --name tiny --print_freq 2".split()]
EXTRA = "--mixnorm_target posneg --dim_mask both --neg_query original --postmix_norm --norm_target both".split()
PUBLISHED = ("model", "model_ema", "contrast", "optimizer", "epoch")


def train(*flags) -> dict:
    """Run the script; its newest checkpoint."""
    script.main([*TINY, *map(str, flags)])
    return checkpoint.load(f"{script.parse_args([*TINY, *map(str, flags)]).folder}/current.pth")


def parsed(text: str = ""):
    return script.parse_args(["--data_folder", "x", *text.split()])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape, seed: int = 0):
    return F.normalize(torch.randn(*shape, generator=generator(seed)), dim=-1)


# ------------------------------------------------------------------------------------------------------------- draws


def largest_distance(drawn, true) -> float:
    """Kolmogorov and Smirnov's, of two samples."""
    both = torch.cat([drawn, true]).sort().values
    below = [torch.searchsorted(x.sort().values, both, right=True) / len(x) for x in (drawn, true)]
    return (below[0] - below[1]).abs().max().item()


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0, 1.6, 2.0, 40.0])
def test_coefficients_are_beta_distributed(alpha):
    n = 200_000
    torch.manual_seed(0)
    true = torch.distributions.Beta(torch.tensor(alpha).double(), torch.tensor(alpha).double()).sample((n,)).float()
    drawn = transform.coefficients((n // 4, 4), "beta", alpha, generator()).view(-1)
    assert largest_distance(drawn, true) < 2 * math.sqrt(2 / n)  # chance of more: 0.0007
    assert largest_distance(transform.coefficients((n,), "uniform", alpha, generator()), true) < 0.01 or alpha != 1


def test_the_table_is_within_its_step_of_the_true_distribution():
    wanted = (torch.arange(LEVELS) + 0.5) / LEVELS
    closed = {0.5: lambda x: 2 / math.pi * x.sqrt().asin(), 1.0: lambda x: x, 2.0: lambda x: 3 * x**2 - 2 * x**3}
    for alpha, cdf in closed.items():
        table = transform.beta_quantiles(alpha, torch.device("cpu")).double()
        assert (cdf(table) - wanted)[: LEVELS // 2].abs().max() < 1e-7  # the step is 1.5e-5
        torch.testing.assert_close(table + table.flip(0), torch.ones(LEVELS).double(), rtol=0, atol=2**-24)
        assert table.mean().item() == pytest.approx(0.5, abs=1e-7)


@pytest.mark.parametrize("mask, shapes", [
    ("none", [(), ()]), ("pos", [(5, 8), ()]), ("neg", [(), (7, 8)]), ("both", [(5, 8), (7, 8)]), ("sample", [(5, 1), (7, 1)]),
])  # fmt: skip
def test_shapes_of_the_coefficients(mask, shapes):
    rule = Rule.of(parsed(f"--mixnorm --mixnorm_target posneg --expolation_mask --dim_mask {mask}"))
    drawn = rule.draw(5, 8, 7, generator())
    assert [tuple(x.shape) for x in drawn[:2]] == shapes
    assert ((drawn.positive >= 1) & (drawn.positive <= 2)).all() and (
        (drawn.negative >= 0) & (drawn.negative <= 1)
    ).all()
    assert sorted(drawn.order.tolist()) == list(range(7))
    assert equal(rule.draw(5, 8, 7, generator()), drawn) and not equal(rule.draw(5, 8, 7, generator(1)), drawn)


def test_sides_and_parameters_of_the_rule():
    rule = Rule.of(parsed("--mixnorm --mixnorm_target pos --beta_alpha 3"))
    assert rule == Rule("element", None, False, "beta", 3.0, 3.0) and rule.draw(2, 3, 4, generator())[1:] == (
        None,
        None,
    )
    rule = Rule.of(parsed("--mixnorm --sep_alpha --pos_alpha 3 --postmix_norm --norm_target both --neg_query original"))
    assert rule == Rule(None, "element", False, "beta", 3.0, 1.6, ("pos", "neg"), True)
    shapes = {  # published: where --dim_mask is not given
        "--sep_alpha": "scalar", "": "element", "--sep_alpha --mask_distribution uniform": "element", "--preset ft": "scalar",
        "--dim_mask none": "scalar", "--sep_alpha --dim_mask both": "element",
    }  # fmt: skip
    for flags, shape in shapes.items():
        found = Rule.of(parsed(f"--mixnorm --mixnorm_target posneg {flags}"))
        assert (found.positives, found.negatives) == (shape, shape), flags
    assert Rule.of(parsed()) is None and rule.draw(2, 3, 4, generator()).positive is None


# ---------------------------------------------------------------------------------------------------- transformation


def test_a_scalar_pair_follows_the_closed_form():
    q, k = unit(6, 16), unit(6, 16, seed=1)
    similarity = (q * k).sum(1)
    for m in (0.0, 0.3, 1.0, 1.5, 2.0):
        moved, positive = transform.pair(q, k, torch.tensor(m))
        torch.testing.assert_close((moved * positive).sum(1), similarity + 2 * m * (1 - m) * (1 - similarity))
    moved, positive = transform.pair(q, k, torch.tensor(1.5), normalise=True)
    torch.testing.assert_close(moved.norm(dim=1), torch.ones(6))
    assert ((moved * positive).sum(1) < similarity).all()  # further apart


@pytest.mark.parametrize("shape", [(), (9, 1), (9, 4)])
def test_negatives_are_mixed_in_place_of_a_copy(shape):
    rows, order, m = unit(9, 4), torch.randperm(9, generator=generator()), torch.rand(shape, generator=generator())
    before, out = rows.clone(), torch.empty(9, 4)
    made = transform.negatives(rows, m, order, out=out)
    assert made.data_ptr() == out.data_ptr() and torch.equal(rows, before)
    torch.testing.assert_close(made, m * rows + (1 - m) * rows[order])
    longer = transform.negatives(rows, m, order, normalise=True)
    torch.testing.assert_close(longer, F.normalize(m * rows + (1 - m) * rows[order], dim=1))


@pytest.mark.parametrize("modalities", [1, 2])
def test_a_coefficient_of_one_is_moco(modalities):
    queue = KeyQueue(modalities, 12, 8, 0.2)
    query, key = torch.cat([unit(5, 8, seed=i) for i in range(modalities)], 1), unit(5, 8 * modalities, seed=7)
    one = Draws(torch.tensor(1.0), torch.tensor(1.0), torch.randperm(12, generator=generator()))
    [mixed] = queue([query], key, Rule(), [one] * modalities)
    [bare] = queue([query], key, None, [NOTHING] * modalities)
    assert all(map(torch.equal, mixed, bare)) and len(mixed) == modalities


@pytest.mark.parametrize("rule", [
    Rule(), Rule(None, "sample"), Rule("sample", None), Rule("element", "element"), Rule(original_query=True),
    Rule(normalise=("pos", "neg")), Rule("scalar", "element", False, normalise=("neg",)),
])  # fmt: skip
@pytest.mark.parametrize("modalities", [1, 2])
def test_a_bank_is_transformed_as_its_drawn_rows_would_be(rule, modalities):
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
            negatives = (F.normalize(mixed, dim=1) if "neg" in rule.normalise else mixed)[rows[:, 1:]]
        asked = x if rule.original_query else moved
        wanted = (
            torch.cat([(moved * positive).sum(1, keepdim=True), torch.einsum("bd,bkd->bk", asked, negatives)], 1) / 0.2
        )
        torch.testing.assert_close(out, wanted)
        (slope,) = torch.autograd.grad(out.exp().sum(), query, retain_graph=True)
        torch.testing.assert_close(slope, torch.autograd.grad(wanted.exp().sum(), query, retain_graph=True)[0])


def test_a_bank_without_mixing_is_insdis():
    bank, other = MemoryBank(1, 20, 8, 0.2, 6, 0.5), plain.MemoryBank(20, 8, 6, 0.2, 0.5, True, "ema")
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


# ------------------------------------------------------------------------------------------------------------- flags

COMMAND = (
    "--method MoCov2 --cosine --mixnorm --mixnorm_target posneg --sep_alpha --pos_alpha 2.0 --neg_alpha 1.6 "
    "--mask_distribution beta --expolation_mask --epochs 200 --input_res 224 --batch_size 256 --learning_rate 0.03 "
    "--dataset imagenet100 --imagenet100path list.txt --multiprocessing-distributed --world-size 1 --rank 0 --save_score"
)
NAME = (
    "MoCov2_resnet50_RGB_Jig_False_moco_aug_B_mlp_0.2_cosine_alpha0.999_ncet0.2_ncek65536_mixnorm_targetposneg_postnormFalse_"
    "distribeta_expolationTrue_pos2.0_neg1.6_epoch200_bs256_lr0.03"
)


def test_the_published_command_and_run_names(capsys):
    args = parsed(COMMAND)
    assert recipes.run_name(args) == NAME and args.class_list == "list.txt" and args.save_score
    assert args.folder == f"./runs/feature_transform/{NAME}" and capsys.readouterr().err == ""
    assert recipes.run_name(parsed(COMMAND.replace("--mask_dis", "--dim_mask neg --mask_dis"))).endswith(
        "neg1.6_dimneg_epoch200_bs256_lr0.03"
    )
    tail = "_moco_aug_A_linear_0.07_alpha0.999_ncet0.07_ncek65536"
    others = {
        "": f"Customize_resnet50_RGB_Jig_False{tail}_baseline_epoch200_bs256_lr0.03",
        "--method MoCo --mixnorm --exp_iter 3": f"MoCo_resnet50_RGB_Jig_False{tail}_mixnorm_targetneg_postnormFalse_distribeta_"
        "alpha2.0_epoch200_bs256_lr0.03_iter3",
        "--method MoCo --mixnorm --mixnorm_target pos --mask_distribution uniform --postmix_norm --norm_target both "
        "--neg_query original --mix_start_epoch 4": f"MoCo_resnet50_RGB_Jig_False{tail}_mixnorm_targetpos_postnormTrue_"
        "distriuniform_expolationFalse_normboth_queryoriginal_start4_epoch200_bs256_lr0.03",
        "--method PIRL --amp --batch_size 512": "PIRL_resnet50_RGB_Jig_True_bank_aug_A_linear_0.07_amp_O2_warm_alpha0.999_"
        "ncet0.07_ncek65536_baseline_epoch200_bs512_lr0.03",
    }
    for flags, name in others.items():
        assert recipes.run_name(parsed(flags)) == name
    assert parsed("--method MoCo --seed 3").folder.endswith("_lr0.03_seed_3")


def test_the_classes_of_imagenet100_in_a_tree_of_more_are_chosen(demo_set, tmp_path, monkeypatch):
    (tmp_path / "list").write_text("\n".join(sorted(path.name for path in (demo_set / "train").iterdir())[:2]))
    monkeypatch.setattr(views, "CLASS_LIST", tmp_path / "list")
    monkeypatch.setattr(script.loop, "Job", lambda args, *rest, **how: pytest.fail(f"of {args.class_list}"))
    for flags, found in (("", tmp_path / "list"), ("--dataset imagenet", None), ("--imagenet100path other", "other")):
        with pytest.raises(pytest.fail.Exception, match=f"^of {found}$"):
            script.worker(parsed(f"--data_folder {demo_set} {flags}"), launch.Process())


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
    assert said == "note: what is typed beats --method InfoMin: --jigsaw False (True), --nce_t 0.3 (0.15)\n"
    assert parsed("--method CMCv2 --custom_head 2mlp_bn").head == "2mlp_bn"
    assert parsed("--preset ft --method MoCo").expolation_mask and not parsed("--preset ft --no-mixnorm").mixnorm
    assert not parsed("--preset ft --mixnorm_target neg").expolation_mask
    assert (
        parsed("--moco-m 0.9").alpha == 0.9
        and parsed("--extrapolation_mask --mixnorm --mixnorm_target pos").expolation_mask
    )


def test_published_flags_without_effect_are_taken(capsys):
    parsed("--crop .3 --aug_linear NULL --feature_mix --mix_ratio .5 --time_mix --only_mix --mix_alpha 1")
    assert capsys.readouterr().err.count("without effect, as in the published code") == 1


def test_learning_rates_as_published():
    args = parsed("--epochs 100 --learning_rate 0.1 --cosine")
    low = 0.1 * 0.1**3
    for epoch in (1, 50, 100):
        wanted = low + (0.1 - low) * (1 + math.cos(math.pi * epoch / 100)) / 2
        assert script.learning_rate(args, epoch, 0.5) == pytest.approx(wanted)
    steps = parsed()
    rates = [script.learning_rate(steps, epoch, 0.0) for epoch in (1, 120, 121, 161)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.0003])
    warm = parsed("--batch_size 512 --learning_rate .06")
    assert script.learning_rate(warm, 1, 0.0) == pytest.approx(0.01)
    assert script.learning_rate(warm, 3, 0.5) == pytest.approx(0.035) and script.learning_rate(warm, 6, 0.0) == 0.06
    assert not parsed("--batch_size 512 --no-warm").warm and not parsed().warm
    args.warm = True
    assert script.learning_rate(args, 5, 1.0) == pytest.approx(script.learning_rate(args, 6, 0) + 0.00027, abs=2e-5)


BAD = {
    "no data": ([], "no data: give --data_folder"),
    "no positives": (["--mixnorm", "--expolation_mask"], "--expolation_mask moves positives apart, and --mixnorm_target neg"),
    "no transformation": (["--mixnorm_target", "pos"], "--mixnorm_target belongs to --mixnorm"),
    "one alpha": (["--mixnorm", "--pos_alpha", "3"], "--pos_alpha belongs to --sep_alpha"),
    "three alphas": (["--mixnorm", "--sep_alpha", "--beta_alpha", "3"], "--beta_alpha: with --sep_alpha there are"),
    "uniform": (["--mixnorm", "--mask_distribution", "uniform", "--beta_alpha", "3"], "uniform has no --beta_alpha"),
    "no norm": (["--mixnorm", "--norm_target", "pos"], "--norm_target belongs to --postmix_norm"),
    "not mixed": (["--mixnorm", "--dim_mask", "pos"], "--dim_mask pos: with --mixnorm_target neg those are not mixed"),
    "no jigsaw": (["--beta", ".3"], "--beta belongs to --jigsaw"),
    "a bank's": (["--nce_m", ".3"], "--nce_m belongs to a bank: --mem bank"),
    "a queue's": (["--method", "InsDis", "--alpha", ".9"], "--alpha belongs to a queue: --mem moco"),
    "short queue": (["--nce_k", "64"], "--nce_k 64: a queue must hold at least a global batch of keys (256)"),
    "a network": (["--arch", "resnest50"], "resnest50: torchvision has no split-attention networks"),
    "a method": (["--method", "MoCov3"], "argument --method: invalid choice"),
    "a number": (["--mixnorm", "--pos_alpha", "0"], "argument --pos_alpha: 0 must be above 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, capsys):
    flags, message = BAD[case]
    says_no(script.parse_args, [*flags, *["--data_folder", "x"] * (case != "no data")], message, capsys)


# ---------------------------------------------------------------------------------------------------------- the script


def made(*flags):
    """(method, loader) as the script makes them, in the folder of the pictures."""
    args = script.parse_args([*DEMO, *"-b 8 --nce_k 24 --bn-splits 2 --feat_dim 16".split(), *flags])
    torch.manual_seed(args.seed)
    loader = script.build_loader(args, launch.Process())
    method = (script.MoCo if args.mem == "moco" else script.Bank)(args, len(loader.dataset), launch.Process())
    return method, loader


def two_steps(*flags, epoch: int = 1):
    method, loader = made(*flags)
    loader.set_epoch(1)
    found = [method.step(seen, index, epoch) for (seen, _, index), _ in zip(loader, range(2))]
    return method, [step["loss"] for step in found]


@pytest.mark.parametrize("name", [name for name in recipes.METHODS if name != "Customize"])
def test_every_method_learns_and_has_scores(name, module_folder):
    with inside(module_folder):
        method, losses = two_steps("--method", name, "--learning_rate", "1e-3")  # one has no unit vectors
    two = method.modalities == 2
    assert all(loss.isfinite() for loss in losses) and method.scores.shape == (8, 5)
    assert method.scores[:, :3].isfinite().all()
    assert [name for name, _ in method.memory.named_buffers() if "memory" in name] == (
        ["memory_1", "memory_2"] if two else ["memory"]
    )
    assert all(p.grad is not None and p.grad.any() for p in method.encoder.parameters() if p.dim() > 1)
    state = method.state_dict()
    assert all(key.startswith(("module.encoder", "module.head")) for key in state["model"])
    assert ("model_ema" in state) == ("queue" in state) == (method.args.mem == "moco")
    assert any("jig" in key for key in state["model"]) == method.args.jigsaw


@pytest.mark.parametrize("flags", [["--method", "MoCo"], ["--method", "InsDis"]], ids=["queue", "bank"])
def test_before_it_begins_nothing_is_transformed(flags, module_folder):
    with inside(module_folder):
        (never, never_losses), (bare, bare_losses), (mixed, mixed_losses) = (
            two_steps(*flags, *more) for more in (["--mix_start_epoch", "1"], ["--no-mixnorm"], [])
        )
    assert equal(never.state_dict(), bare.state_dict()) and equal(never_losses, bare_losses)
    assert not equal(mixed.state_dict(), bare.state_dict()) and not equal(mixed_losses, bare_losses)


def test_the_key_encoder_follows_after_the_step_and_the_queue_holds_original_keys(module_folder):
    with inside(module_folder):
        method, loader = made("--alpha", "0.9")
    before = {k: v.clone() for k, v in method.encoder_ema.named_parameters()}
    encode = method.encode_keys
    keys = []
    method.encode_keys = lambda images: keys.append(encode(images)) or keys[-1]
    seen, _, index = next(iter(loader))
    method.step(seen, index, 1)
    for (name, key), query in zip(method.encoder_ema.named_parameters(), method.encoder.parameters()):
        torch.testing.assert_close(key, 0.9 * before[name] + 0.1 * query.detach(), msg=name)
    assert torch.equal(method.memory.memory[:8], keys[0][1]) and method.memory.pointer == 8
    assert torch.equal(keys[0][0], keys[0][1])  # one process: its rows are all rows


def test_scores_of_two_modalities_are_their_mean(module_folder):
    with inside(module_folder):
        method, _ = made("--method", "CMCv2")
    logits = [torch.randn(8, 25, generator=generator(i)) for i in range(2)]
    wanted = [metrics.score_statistics(out[:, 0], out[:, 1:], method.args.nce_t) for out in logits]
    torch.testing.assert_close(method.statistics(logits), (wanted[0] + wanted[1]) / 2)


@pytest.fixture(scope="module")
def whole(module_folder) -> dict:
    """The run that nothing has interrupted: transformed from the second epoch on, in every way."""
    with inside(module_folder):
        return train("--name", "whole", "--mix_start_epoch", 1, "--knn-every", 2, *EXTRA)


def test_a_run_leaves_what_is_published(whole, module_folder):
    folder = module_folder / "run" / "whole"
    assert {p.name for p in folder.glob("*.pth")} == {"ckpt_epoch_2.pth", "current.pth"}
    assert whole.keys() >= {*PUBLISHED, "opt"} and whole["queue"]["pointer"] == 10 * 32 % 40
    assert "module.head.2.bias" in whole["model"] and "head.2.bias" in whole["model_ema"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "epoch", "loss", "contrast_acc1", "learning_rate"} <= records[0].keys()
    assert any("knn_acc1" in r for r in records)
    for epoch in (1, 2):
        scores = np.load(folder / "scores" / f"score_{epoch:03d}.npy", allow_pickle=False)
        assert scores.shape == (5, 32, 5) and scores.dtype == np.float32 and np.isfinite(scores).all()
        np.testing.assert_allclose(scores[..., 4], np.exp(scores[..., 2] / 0.2), rtol=1e-4)


@pytest.mark.parametrize("stop_at", [3, 7])
def test_resume_is_bit_exact(whole, workspace, stop_at):
    flags = ["--mix_start_epoch", 1, "--knn-every", 2, *EXTRA]
    with stopped_at(stop_at):
        train(*flags)
    resumed = train(*flags, "--resume", "auto")
    assert whole.keys() == resumed.keys()
    for key in whole.keys() - {"opt", "scaler"}:
        assert equal(whole[key], resumed[key]), key


def test_a_published_checkpoint_resumes(whole, workspace, capsys):
    theirs = as_published(
        {**whole, "epoch": 1}, PUBLISHED, arch="resnet18", mem="moco", modal="RGB", head="mlp", nce_k=40
    )
    torch.save(theirs, "theirs.pth")
    resumed = train("--resume", "theirs.pth")
    assert resumed["epoch"] == 2 and resumed["queue"]["pointer"] == 5 * 32 % 40  # from 0, as there
    assert checkpoint.Saved("theirs.pth").family == [
        "feature_transform/main_contrast.py",
        "feature_transform/main_linear.py",
    ]


def test_views_are_shown(workspace, capsys):
    for name, more in (("a.png", []), ("b.png", ["--method", "CMC", "--jigsaw"])):
        script.main([*TINY, *more, "--show-views", name])
        assert (workspace / name).read_bytes().startswith(b"\x89PNG")
    assert not (workspace / "run").exists()


def test_bad_checkpoints(whole, workspace):
    def fails(match, *flags):
        with pytest.raises(UserError, match=match) as caught:
            train("--resume", "whole.pth", *flags)
        assert "\n" not in str(caught.value)

    saved = {**whole, "epoch": 1}
    torch.save(saved, "whole.pth")
    fails("was made with --nce_k 40, this run has 80", "--nce_k", 80)
    fails("is of --mem moco, this run of bank: add --mem moco", "--method", "InsDis")
    fails("is of --head mlp, this run of linear: add --head mlp", "--head", "linear")
    fails("is of --modal RGB, this run of CMC", "--method", "CMCv2")
    fails("does not fit", "--feat_dim", 64)
    torch.save({**saved, "contrast": {"memory_1": torch.zeros(40, 128)}}, "whole.pth")
    fails("is of another method: its memory holds memory_1")
    for queue in ({"pointer": 40}, {}):
        torch.save({**saved, "queue": queue}, "whole.pth")
        fails("expected a pointer below 40")
    torch.save({**saved, "queue": {"pointer": 0}, "opt": {}, "model_ema": None}, "whole.pth")
    fails("model_ema is None, expected tensors by name")
    torch.save({k: v for k, v in saved.items() if k not in ("opt", "model_ema")}, "whole.pth")
    fails("is of --mem bank, this run of moco: add --mem bank")
    assert not (workspace / "run" / "tiny" / "current.pth").exists()
