"""One footing: every place that prints the k-NN of a network prints the same number."""

import json
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from conftest import inside, says_no
from papers import CASES
from torch.nn import functional as F

from common import UserError, augment, backbones, launch, metrics, nce, schedule
from common.files import ROOT
from common.pictures import ArraySet
from feature_transform import views
from runner import layouts, loop
from tools import claim_records, evaluate, export, flags

pytestmark = pytest.mark.usefixtures("slim")

# one of each script that trains
FAMILIES = {
    "cmc nce": "common",
    "moco": "common",
    "patch": "published",
    "debiased": "common",
    "transformed moco": "common",
    "ring ir": "common",
    "ring cmc": "published",
}


def accuracies(path) -> list[float]:
    """Return the k-NN accuracies of a run's records."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record["knn_acc1"] for record in records if "knn_acc1" in record]


@pytest.mark.parametrize("name", FAMILIES)
def test_three_places_print_one_k_nn(module_folder, name):
    """The monitor during training, the linear evaluation, and tools/evaluate.py."""
    case = CASES[name]
    with inside(module_folder):
        more = ["--epochs", "1", "--knn-every", "1", "--knn-k", "20", "--footing", FAMILIES[name]]
        case.module.main(case.run_in(name, *more))
        (log,) = (module_folder / name).rglob("metrics.jsonl")
        (monitor,) = accuracies(log)
        record = json.loads(log.read_text().splitlines()[0])
        assert 0.1 < record["feature_spread"] < 1.1
        assert -1 < record["negative_similarity"] < 1
        assert ("nonsem_similarity" in record) == (name == "patch")
        small = ["--demo", "--knn-k", "20", "--epochs", "1", "--device", "cpu"]
        evaluate.main([name, *small, "--views", "1", "--out", f"{name} judged"])
        judged = json.loads((module_folder / f"{name} judged" / "result.json").read_text())
        assert judged["knn_acc1"] == pytest.approx(monitor, abs=1e-4)
        if case.linear is None:
            return
        case.evaluation.main(case.linear_of(name, f"{name} linear", "--knn-k", "20"))
        if name == "moco":  # its evaluation has the view of the footing, whatever is typed
            with pytest.raises(UserError, match="--footing common, .* own view: omit --aug"):
                case.evaluation.main(case.linear_of(name, "none", "--aug", "NULL"))
    (result,) = (module_folder / f"{name} linear").rglob("result.json")
    assert json.loads(result.read_text())["knn_acc1"] == pytest.approx(monitor, abs=1e-4)


# -------------------------------------------------------------------------------- --preset compare

COMPARED = ("cmc nce", "moco", "patch", "debiased", "transformed moco", "ring moco")
MOCOS = {  # {Case: (query network, key network, queue, flags without negatives of its own)}
    "moco": ("network", "key_network", "memory.memory", ""),
    "patch": ("network.encoder_q", "network.encoder_k", "network.queue", "--robust none"),
    "transformed moco": ("network", "network_ema", "memory.memory", "--no-mixnorm"),
    "ring moco": ("network", "system.model_k", "system.queue", "--negatives all"),
}
OWN = {"debiased": {"temperature", "queue", "negatives-k", "ema"}}  # of the method


def shared_options(args, parser) -> dict:
    """Return {common spelling: value} of the flags that all train scripts take."""
    found = {}
    for name in (*flags.COMMON, "footing", "dataset", "input-res", "small-stem", "bn-splits"):
        action = flags.flags_of(parser).get(name)
        if action is not None and name not in ("out", "queue", "ema"):
            found[name] = getattr(args, action.dest)
    return found


def test_presets_differ_in_nothing_but_the_method():
    recorded = {}
    for name in COMPARED:
        module = CASES[name].module
        script = CASES[name].script.replace(".", "/") + ".py"
        args = module.parse_args(["--preset", "compare", "--data", "DATA"])
        recorded[name] = shared_options(args, flags.parser_of(script))
        at = loop.At(15, 0.5, 0)
        recorded[name]["rate"] = module.learning_rate(args, at)
        if name != "cmc nce":  # whose views are colours
            recipe = getattr(module, "recipe", views.recipe)  # that of the script or of its folder
            recorded[name]["recipe"] = repr(recipe(args))
    first = recorded["moco"]
    assert first["footing"] == "common" and first["rate"] == pytest.approx(0.06 * 0.853553)
    for name, values in recorded.items():
        differing = {key for key in values if values[key] != first[key]}
        assert differing == OWN.get(name, set()) & values.keys(), name


COLOURS = {"cmc nce": "", "ring moco": "--method cmc", "transformed moco": "--modal CMC"}


@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_cropped_and_flipped_alone(name):
    module = CASES[name].module
    args = module.parse_args(["--preset", "compare", "--data", "DATA", *COLOURS[name].split()])
    recipe = getattr(module, "recipe", views.recipe)(args)
    flip, *rest = recipe.ops
    assert recipe.geometry.scale == (0.08, 1.0)
    assert type(flip) is augment.RandomHorizontalFlip
    assert not any(isinstance(op, augment.ColorJitter | augment.RandomGrayscale) for op in rest)


@pytest.mark.parametrize("name, flag", [("patch", "mlp"), ("transformed moco", "head")])
def test_the_footing_has_its_head(name, flag):
    parse = CASES[name].module.parse_args
    published, common = (
        getattr(parse(["--data", "DATA", "--footing", kind]), flag)
        for kind in ("published", "common")
    )
    assert (published, common) in ((False, True), ("linear", "mlp"))


def test_a_method_keeps_the_temperature_of_the_footing():
    parse = CASES["transformed moco"].module.parse_args
    words = ["--data", "DATA", "--method", "MoCov2"]
    assert parse(words).nce_t == 0.2
    assert parse([*words, "--preset", "compare"]).nce_t == 0.1


WITHOUT_EFFECT = {  # {Case: a flag of what the footing decides}
    "cmc nce": "--lr_decay_epochs 5",
    "moco": "--aug NULL",
    "patch": "--cos",
    "debiased": "--cosine",
    "transformed moco": "--aug A",
    "ring moco": "--scheduler none",
}


@pytest.mark.parametrize("name", COMPARED)
def test_what_the_footing_decides_is_refused(name, capsys):
    parse = CASES[name].module.parse_args
    words = WITHOUT_EFFECT[name]
    typed = f"--data DATA {words}".split()
    parse([*typed, "--footing", "published"])
    flag = words.split()[0].replace("_", "-")
    message = f"{flag} has no effect with --footing common"
    says_no(parse, [*typed, "--footing", "common"], message, capsys)
    says_no(parse, [*typed, "--preset", "compare"], message, capsys)


STUDY = claim_records.papers(ROOT / "docs" / "compare.json")["compare"]
(SETTING,) = STUDY["scales"].values()


def words(step: int, run: str) -> list[str]:
    """Return a command of the study for one of its runs at toy size, on the built-in pictures."""
    values = {"flags": SETTING["runs"][run], "seed": "0", "name": run}
    command = claim_records.fill(SETTING["steps"][step]["command"], values)
    command = command.replace("data/compare", "data/demo").removeprefix("python ")
    return f"{command} --device cpu {SETTING['steps'][step]['toy']}".split()


@pytest.mark.usefixtures("full_width")
@pytest.mark.parametrize("run", SETTING["runs"])
def test_the_study_of_the_page_at_toy_size(workspace, run):
    """The study's commands, then the paper's own evaluation and the export of the small network."""
    script, *flags_of_run = words(0, run)
    module = script.removesuffix(".py").replace("/", ".")
    case = next(case for case in CASES.values() if case.script == module)
    case.module.main([*flags_of_run, "--overwrite"])
    options = json.loads(Path("runs/compare", run, "config.json").read_text())["options"]
    assert options["footing"] == "common" and options["preset"] == "compare"
    assert backbones.SMALL in options.values()
    evaluate.main(words(1, run)[1:])
    judged = json.loads(Path("runs/compare", f"{run}-evaluation", "result.json").read_text())
    assert judged.keys() >= set(SETTING["numbers"])
    export.main(
        [f"runs/compare/{run}", *"--to safetensors --bfloat16 --out kept.safetensors".split()]
    )
    whole, kept = (
        evaluate.open_backbone(file, torch.device("cpu"))
        for file in (f"runs/compare/{run}", "kept.safetensors")
    )
    assert repr(whole[1]) == repr(kept[1]) and kept[3]["input_res"] == 32  # what pictures it takes
    pictures = torch.rand(8, sum(whole[0].channels), 32, 32)
    rounded = whole[0].bfloat16().float()
    assert torch.equal(kept[0](pictures), rounded(pictures))
    case.evaluation.main(case.linear_of(f"runs/compare/{run}", "linear"))
    (result,) = Path("linear").rglob("result.json")
    accuracy = json.loads(result.read_text())["knn_acc1"]
    assert accuracy == pytest.approx(judged["knn_acc1"], abs=1e-4)


def first_losses(name: str, pictures, batch) -> list[float]:
    """Return the losses of two steps of a script's MoCo from drawn weights and a drawn queue."""
    module = CASES[name].module
    query, key, queue, own = MOCOS[name]
    words = "--preset compare --data DATA --device cpu --seed 0 -b 32 --queue 64"
    args = module.parse_args([*words.split(), *own.split()])
    method = module.build_method(args, pictures, 5, launch.Process())
    query, key, queue = (attrgetter(path)(method) for path in (query, key, queue))
    draw = torch.Generator()
    with torch.no_grad():
        for network in (query, key):  # which begin as the same network
            draw.manual_seed(1)
            for value in network.parameters():
                value.copy_(0.05 * torch.randn(value.shape, generator=draw))
        rows = F.normalize(torch.randn(64, 128, generator=draw), dim=1)
        queue.copy_(rows if queue.shape == rows.shape else rows.T)
    for generator in method.generators.values():
        generator.manual_seed(3)
    schedule.set_lr(method.optimizer, 0.06)
    steps = [method.step(batch) for _ in range(2)]
    return [float(step["loss"]) for step in steps]


def test_four_mocos_take_the_same_steps():
    pictures = ArraySet(torch.zeros(160, 3, 32, 32, dtype=torch.uint8), [0] * 160, ["a"])
    draw = torch.Generator().manual_seed(0)
    pair = [torch.randn(32, 3, 32, 32, generator=draw) for _ in range(2)]
    batch = loop.Batch(pair, torch.zeros(32).long(), torch.arange(32), loop.At(0, 0.0, 0))
    first, *others = (first_losses(name, pictures, batch) for name in MOCOS)
    assert first[0] != first[1]
    for losses in others:
        assert losses == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize("name", COMPARED)
def test_a_run_starts_from_the_backbone_of_another(workspace, name):
    start = backbones.build(backbones.SMALL, 0).state_dict()
    for value in start.values():
        value += 1  # unlike any fresh one
    torch.save(start, "start.pth")
    module = CASES[name].module
    words = "--preset compare --data DATA --device cpu --seed 0 -b 32 --init start.pth"
    args = module.parse_args(words.split())
    pictures = ArraySet(torch.zeros(160, 3, 32, 32, dtype=torch.uint8), [0] * 160, ["a"])
    if name == "cmc nce":
        with pytest.raises(UserError, match="--init start.pth: its network does not fit this one"):
            module.build_method(args, pictures, 5, launch.Process())
        return
    larger = module.parse_args([*words.split(), "--arch", "resnet18"])
    with pytest.raises(UserError, match="it holds resnet18-small.*; choose it with --arch"):
        module.build_method(larger, pictures, 5, launch.Process())
    method = module.build_method(args, pictures, 5, launch.Process())
    own = layouts.without_head(layouts.backbone(method.state_dict()))
    assert own.keys() == layouts.without_head(start).keys()
    assert all(torch.equal(value, start[key]) for key, value in own.items())
    if name in MOCOS:
        query, key = (attrgetter(path)(method) for path in MOCOS[name][:2])
        pairs = zip(query.parameters(), key.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("model", ["resnet18-small", "alexnet --small-stem"])
def test_towers_start_without_the_heads_of_others(workspace, model):
    module = CASES["cmc nce"].module
    pictures = ArraySet(torch.zeros(80, 3, 32, 32, dtype=torch.uint8), [0] * 80, ["a"])
    words = f"--data DATA --dataset folder --input-res 32 --device cpu --arch {model}".split()

    def method(*more):
        args = module.parse_args([*words, *more])
        return module.build_method(args, pictures, 5, launch.Process())

    first = method("--seed", "0")
    with torch.no_grad():
        for value in first.network.parameters():
            value += 1
    torch.save(first.state_dict(), "first.pth")
    first = first.network.state_dict()
    footings = ["published"] if "alexnet" in model else ["published", "common"]  # another head
    for footing in footings:
        begun = method("--seed", "0", "--footing", footing, "--init", "first.pth")
        own = begun.network.state_dict()
        kept = layouts.without_head(own)
        assert len(kept) < len(own) and all(torch.equal(kept[name], first[name]) for name in kept)
        assert all(torch.all(own[name] < 1) for name in own.keys() - kept.keys())  # fresh


# --------------------------------------------------------------------------------- --preset photos


@pytest.mark.parametrize("name", COMPARED)
def test_a_preset_fits_45_pictures_of_ones_own(name, demo_set, workspace, capsys):
    """Pictures without classes, one epoch, with the preset alone."""
    own = workspace / "photos"
    own.mkdir()
    for number, path in enumerate(sorted((demo_set / "train").rglob("*.png"))[:45]):
        (own / f"{number}.png").symlink_to(path)
    flags = "--preset photos --data photos --device cpu --seed 0 --epochs 1 --out run"
    CASES[name].module.main(flags.split())
    said = capsys.readouterr().out
    assert "images=45" in said and "done: 1 epochs" in said and "warning" not in said
    (log,) = (workspace / "run").rglob("metrics.jsonl")
    assert json.loads(log.read_text().splitlines()[-1])["epoch"] == 0


# ----------------------------------------------------------------------------- nothing is learnt


def test_spread():
    rows = F.normalize(torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    assert float(metrics.spread(rows)) == pytest.approx(1, abs=0.01)
    assert float(metrics.spread(rows[:1].expand(8, -1))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "name, remedy, collapsed",
    [
        ("insdis softmax", "a lower learning rate", False),
        ("transformed moco", "to begin later (--mix_start_epoch)", True),
    ],
)
def test_an_epoch_in_which_nothing_is_learnt_is_one_warning(
    workspace, monkeypatch, capsys, name, remedy, collapsed
):
    case = CASES[name]
    if collapsed:
        monkeypatch.setattr(metrics, "spread", lambda features: torch.tensor(0.03))
        finding = "the features have collapsed (their spread is 0.030 of 1)"
    else:
        monkeypatch.setattr(nce, "equal_loss", lambda k: 0.01)
        finding = "is above that of equal scores, 0.010"
    case.module.main(case.run_in("run", "--epochs", "3"))
    said = capsys.readouterr().out
    assert said.count("so the network learns nothing; usual remedies are " + remedy) == 1
    assert "warning: epoch 2: " in said and finding in said
