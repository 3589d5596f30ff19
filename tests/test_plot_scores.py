"""Figures of scores: reading run folders, labels, what figures show, bad input.

The runs are made up.
"""

import json
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script, says_no
from notebooks import Notebook
from PIL import Image

from common import UsageError, UserError, files, launch
from feature_transform import plot_scores as script
from feature_transform import score_figures as figures
from feature_transform import score_files, score_labels

SHOWN = Namespace(start=1, smooth=1)


def keep(
    folder,
    epochs=(1, 2, 3),
    steps=4,
    batch=6,
    first=1,
    command="moco_insdis/train_moco_ins.py",
    rates=(),
    knn=None,
    method=None,
    draw=0,
    **options,
):
    """Make a run folder with scores of these epochs; return {number: (steps, batch, 5)}."""
    folder, generator, arrays = Path(folder), np.random.default_rng(draw), {}
    (folder / "scores").mkdir(parents=True)
    derived = {"steps_per_epoch": steps} | ({"method": method} if method else {})
    config = {
        "command": f"python {command} --x",
        "options": {"folder": str(folder), **options},
        "derived": derived,
    }
    (folder / "config.json").write_text(json.dumps(config))
    records = [
        {"step": steps * i + 1, "epoch": first + i, "learning_rate": rate}
        for i, rate in enumerate(rates or [1])
    ]
    records += [{"step": 9, "epoch": 9, "knn_acc1": knn}] if knn else []
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records) + '{"step": 7, "ha'
    )
    for number in epochs:
        arrays[number] = generator.uniform(0.01, 1, (steps, batch, 5)).astype(np.float32)
        np.save(folder / "scores" / f"score_{number:03d}.npy", arrays[number])
    return arrays


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one(folder="run") -> score_files.Run:
    (found,) = score_labels.read_runs([folder])
    return found


# ------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("first", [0, 1])
def test_curves_are_means_over_the_batch_in_the_order_of_the_files(first):
    """1000 comes after 999; a batch is shorter, a step has no scores, epochs have no file."""
    numbers = [first, first + 1, 999, 1000]
    arrays = keep("run", numbers, first=first)
    arrays[first][1, 4:] = np.nan
    arrays[first + 1][2] = np.nan
    arrays[999][0, 0, 4] = np.inf
    for number in numbers:
        np.save(f"run/scores/score_{number:03d}.npy", arrays[number])
    Path("run/scores/score_x.npy").touch()
    found = one()
    assert list(found.files) == [1, 2, 1000 - first, 1001 - first]
    assert found.starts == {
        1: 1,
        2: 5,
        1000 - first: 4 * (999 - first) + 1,
        1001 - first: 4 * (1000 - first) + 1,
    }
    for number, (epoch, start) in zip(numbers, found.starts.items()):
        for step in range(4):
            rows = np.array(
                [row for row in arrays[number][step] if np.isfinite(row[0])], np.float64
            )
            values = found.curves[found.iterations == start + step]
            assert (
                values.shape == (1, 5) or step == 3
            )  # where there is no line across, a point of nothing
            expected = np.full(5, np.nan)
            if len(rows):
                expected = rows.mean(0)[[1, 0, 2, 3, 4]]  # variance, mean, positive, exponentials
            np.testing.assert_allclose(values[0], np.where(np.isfinite(expected), expected, np.nan))
        finite = arrays[number][..., 2][np.isfinite(arrays[number][..., 2])]
        np.testing.assert_array_equal(found.queries(epoch, 2), finite)
    assert np.isnan(found.curves[found.iterations == 4 * (999 - first)]).all()


def test_files_of_the_authors_code():
    """Their folders have no config.json, their first three columns went through float16."""
    (Path("MoCov2_baseline") / "scores").mkdir(parents=True)
    scores = np.random.default_rng(0).random((3, 4, 5)).astype(np.float16).astype(np.float32)
    np.save("MoCov2_baseline/scores/score_001.npy", scores)
    found = one("MoCov2_baseline/scores")
    assert found.title == "MoCov2_baseline" and found.curves.shape == (3, 5) and found.drops == []


def test_learning_rate_drops_of_a_schedule_in_steps_alone():
    keep("steps", rates=(0.3, 0.3, 0.03, 0.03, 0.003), epochs=range(1, 6))
    keep("late", rates=(0.3, 0.3, 0.03, 0.03, 0.003), epochs=range(0, 5), first=0)
    keep("cosine", rates=(0.3, 0.28, 0.2, 0.1, 0.01))
    assert (one("steps").drops, one("late").drops, one("cosine").drops) == ([9, 17], [9, 17], [])


def test_final_accuracies():
    for name in ("below", "beside", "moved", "knn", "none", "two"):
        keep(f"all/runs/{name}", knn=40.25 if name != "none" else None)

    def result(folder, pretrained, acc1, **more):
        Path(folder).mkdir(parents=True, exist_ok=True)
        about = json.dumps({"acc1": acc1, "pretrained": pretrained, **more})
        Path(folder, "result.json").write_text(about)

    result("all/runs/below/linear", "all/runs/below/current.pth", 51.5)
    result("all/runs/beside-linear", str(Path("all/runs/beside/ckpt_epoch_3.pth").resolve()), 52.5)
    result("all/runs-linear/x", "elsewhere/moved/current.pth", 53.5)
    result("all/runs/another", "all/runs/notthere/current.pth", 99.0)
    result("all/runs/row", "all/runs/none/current.pth", None)
    Path("all/runs/broken").mkdir()
    Path("all/runs/broken/result.json").write_text("{")
    found = {r.folder.name: r.accuracy for r in score_labels.read_runs(["all"])}
    knn = ("k-NN", 40.25)
    expected = dict(
        below=("linear", 51.5),
        beside=("linear", 52.5),
        moved=("linear", 53.5),
        knn=knn,
        two=knn,
        none=None,
    )
    assert found == expected


LABELS = {
    "one setting": (
        [dict(alpha=0.99, lr=0.1, workers=2), dict(alpha=0.5, lr=0.1, workers=4)],
        ["alpha 0.99", "alpha 0.5"],
    ),
    "three": (
        [dict(alpha=0.99, mlp=True, seed=0), dict(alpha=0.5, mlp=False, seed=1)],
        ["alpha 0.99, mlp, seed 0", "alpha 0.5, no mlp, seed 1"],
    ),
    "the fewest that tell": (
        [dict(a=1, b=i // 2, c=i, d=i % 2, e=i > 2) for i in range(4)],
        [f"c {i}" for i in range(4)],
    ),
    "two of many": (
        [dict(a=i // 2, b=i % 2, c=i // 2 + 5, d=i % 2 + 7, e=i // 2) for i in range(4)],
        [f"a {i // 2}, b {i % 2}" for i in range(4)],
    ),
    "of one script": (
        [dict(method="MoCo", moco=True), dict(method="InsDis", moco=False)],
        ["MoCo", "InsDis"],
    ),
    "several scripts": (
        [
            dict(method="MoCo", alpha=0.9, lr=1),
            dict(method="MoCo", alpha=0.5, lr=1),
            dict(command="debiased/main.py", loss="debiased", lr=2),
        ],
        ["moco_insdis MoCo, alpha 0.9", "moco_insdis MoCo, alpha 0.5", "debiased"],
    ),
    "drawn seeds": (
        [dict(alpha=0.99, seed=1873628193), dict(alpha=0.5, seed=1273628193)],
        ["alpha 0.99", "alpha 0.5"],
    ),
    "a drawn and a typed seed": (
        [dict(seed=1873628193), dict(seed=20240101)],
        ["seed drawn", "seed 20240101"],
    ),
    "nothing differs": ([dict(lr=1), dict(lr=1)], ["moco_insdis (r0)", "moco_insdis (r1)"]),
    "long": (
        [dict(view="x" * 60 + "1"), dict(view="x" * 60 + "2")],
        [f"view {'x' * 17}…{'x' * 21}{i}" for i in (1, 2)],
    ),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(case):
    settings, expected = LABELS[case]
    for number, options in enumerate(settings):
        keep(f"r{number}", epochs=[1], **options)
    found = score_labels.read_runs(["."])
    assert [r.label for r in found] == expected
    assert max(map(len, expected)) <= score_labels.LONGEST
    assert [r.label for r in score_labels.read_runs(["."], list("abcd")[: len(found)])] == list(
        "abcd"
    )[: len(found)]


# ------------------------------------------------------------------------------------ what is drawn


def test_smoothing_slow_loop():
    values = np.random.default_rng(0).random(17)
    values[[0, 5, 6]] = np.nan
    for width in (1, 2, 3, 8, 40):
        slow = np.full(17, np.nan)
        for i in range(17):
            window = values[max(0, i - (width - 1) // 2) : i + width // 2 + 1]
            if np.isfinite(values[i]):
                slow[i] = np.nanmean(window)
        np.testing.assert_allclose(figures.smooth(values, width), slow)


@pytest.fixture
def three(here):
    """Different lengths and methods; the second has a schedule of its own."""
    keep("r/a", range(1, 8), alpha=0.999, rates=(1, 1, 1, 1, 0.1, 0.1, 0.1), knn=51.25)
    keep("r/b", range(1, 5), alpha=0.5, rates=(1, 1, 0.1, 0.1), draw=1)
    keep("r/c", range(0, 3), command="ring/train_ring.py", first=0, batch=3, alpha=0.99, draw=2)
    return score_labels.read_runs(["r"])


def colours(axes) -> list:
    """Return the colours of the runs' lines, in the order in which they are drawn."""
    found = [
        line.get_color()
        for line in axes.lines
        if line.get_linestyle() != "None" and len(line.get_xdata()) > 2
    ]
    return list(dict.fromkeys(found))


def test_a_run_has_one_look_everywhere(three):
    curves, panel = (
        figures.curves(three, "neg_mean", SHOWN).axes[0],
        figures.panel(three, SHOWN).axes,
    )
    bars = figures.histograms(three, [1, 2]).axes
    falls = figures.waterfall(
        [("1", 0), ("2", 1), ("3", 2)], three, "neg_mean", "alpha", SHOWN
    ).axes[0]
    expected = list(figures.COLOURS[:3])
    assert len(panel) == 6 and len(bars) == 4
    for axes in (curves, *panel[:5], *bars):
        assert colours(axes) == expected
    assert colours(falls) == expected[::-1]  # those behind come first
    looks = [figures.style(i, 100, 60) for i in range(56)]
    assert len({(look["color"], look["marker"]) for look in looks}) == 56
    channel = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in figures.COLOURS])
    linear = np.where(channel <= 0.04045, channel / 12.92, ((channel + 0.055) / 1.055) ** 2.4)
    luminance = linear @ [0.2126, 0.7152, 0.0722]
    assert luminance.max() < 0.45 and luminance[0] == 0  # dark enough for white paper


def test_curves_show_every_iteration_and_drops(three):
    axes = figures.curves(three, "pos_mean", SHOWN).axes[0]
    lines = [line for line in axes.lines if line.get_linestyle() == "-"]
    for line, found in zip(lines, three, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), found.iterations)
        np.testing.assert_array_equal(line.get_ydata(), found.curves[:, 2])
    drops = {
        line.get_xdata()[0]: line.get_color() for line in axes.lines if line.get_linestyle() == "--"
    }
    assert drops == {17: figures.COLOURS[0], 9: figures.COLOURS[1]}
    late = figures.curves(three, "pos_mean", Namespace(start=10, smooth=5)).axes[0]
    assert min(line.get_xdata()[0] for line in late.lines if len(line.get_xdata()) > 2) == 10
    assert [line.get_xdata()[0] for line in late.lines if line.get_linestyle() == "--"] == [17]


@pytest.mark.parametrize("count, length", [(1, 4), (3, 20), (9, 46), (20, 46)])
def test_no_label_lies_on_another(count, length):
    """Legends are beside the axes and within the picture; tick labels and titles are apart."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    keep("r", range(1, 4), rates=(1, 1, 0.1), knn=51.0)
    (found,) = score_labels.read_runs(["r"])
    runs = [
        score_files.Run(**vars(found) | {"label": f"{i:02d} {'w' * (length - 3)}"})
        for i in range(count)
    ]
    for figure in (
        figures.curves(runs, "exp_pos", SHOWN),
        figures.panel(runs, SHOWN),
        figures.histograms(runs, [1, 3]),
    ):
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        whole = figure.bbox.padded(2)
        legends = [
            *figure.legends,
            *(axes.get_legend() for axes in figure.axes if axes.get_legend()),
        ]
        drawn = [axes for axes in figure.axes if axes.axison]
        boxes = [axes.get_tightbbox(renderer) for axes in drawn] + [
            legend.get_window_extent() for legend in legends
        ]
        assert len(legends) == 1
        for number, box in enumerate(boxes):
            assert (
                whole.x0 <= box.x0
                and box.x1 <= whole.x1
                and whole.y0 <= box.y0
                and box.y1 <= whole.y1
            ), box
            assert not any(box.padded(-1).overlaps(other) for other in boxes[:number])
        for axes in drawn:
            labels = [t.get_window_extent(renderer) for t in axes.get_xticklabels() if t.get_text()]
            inside = [box for box in labels if axes.bbox.x0 - 30 < box.x0 < axes.bbox.x1]
            assert not any(a.overlaps(b) for a, b in zip(inside, inside[1:]))


@pytest.mark.parametrize("count", [3, 9, 20])
def test_values_of_a_waterfall_do_not_lie_on_another(count):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    keep("r", [1], steps=20)
    (found,) = score_labels.read_runs(["r"])
    order = [(f"mocov2_{number:02d}", number) for number in range(count)]
    figure = figures.waterfall(order, [found] * count, "neg_mean", "augmentation", SHOWN)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    axes = figure.axes[0]
    ticks = [*axes.yaxis.majorTicks, *axes.xaxis.majorTicks]  # as they were drawn
    labels = [tick.label1 for tick in ticks if tick.label1.get_text()]
    boxes = [label.get_window_extent(renderer).padded(-1) for label in labels]
    assert len(boxes) > count
    for number, box in enumerate(boxes):
        assert figure.bbox.x1 >= box.x1 and not any(box.overlaps(b) for b in boxes[:number])


def test_a_single_iteration_has_a_single_tick():
    keep("r", [1], steps=1)
    (found,) = score_labels.read_runs(["r"])
    curves = figures.curves([found], "neg_mean", SHOWN)
    curves.draw_without_rendering()
    waterfall = figures.waterfall([("1", 0)], [found], "neg_mean", "alpha", SHOWN)
    waterfall.draw_without_rendering()
    low, high = curves.axes[0].get_xlim()
    ticks = [tick for tick in curves.axes[0].get_xticks() if low <= tick <= high]
    assert ticks == [1]
    assert all(tick == int(tick) for tick in waterfall.axes[0].get_xticks())


def test_the_command(three, capsys):
    script.main("r --out figures --epochs 1,3 --smooth 2 --formats png,pdf --sweep alpha".split())
    said = capsys.readouterr().out
    names = [*script.NAMES, "panel", "histograms", *(f"waterfall_{name}" for name in script.NAMES)]
    assert sorted(p.name for p in Path("figures").iterdir()) == sorted(
        f"{n}.{e}" for n in names for e in ("png", "pdf")
    )
    for name in names:
        with Image.open(f"figures/{name}.png") as picture:
            assert picture.width > 700 and len(picture.convert("RGB").getcolors(10**6)) > 100
        assert Path(f"figures/{name}.pdf").read_bytes().startswith(b"%PDF")
    lines = said.splitlines()
    assert re.match(r"moco_insdis, alpha 0.999 +7 +28 +0\.\d{4}  0\.\d{4} .* k-NN 51.25$", lines[1])
    assert len(lines) == 5 and lines[-1].startswith("figures in figures: neg_variance.png, ")


def test_the_sweep_is_in_the_order_of_the_values(three):
    assert script.swept(three, "--alpha") == [("0.5", 1), ("0.99", 2), ("0.999", 0)]


def test_names_and_values_are_no_formulas(here):
    keep("r/$\\frac$", note="$\\frac$"), keep("r/ ", note=" ")
    runs = score_labels.read_runs(["r"], [r"$\frac$ " * 9, " "])
    order = script.swept(runs, "note")
    figures.panel(runs, SHOWN).draw_without_rendering()
    figures.waterfall(order, runs, "neg_mean", "$\\frac$", SHOWN).draw_without_rendering()


def test_where_nothing_was_kept_nothing_is_drawn():
    arrays = keep("run", [1, 2])
    arrays[2][:], arrays[1][:, :, [0, 1, 3]] = np.nan, np.nan  # as of an anchor without a negative
    for number, scores in arrays.items():
        np.save(f"run/scores/score_{number:03d}.npy", scores)
    (args, found), drawn = (script.parse_args(["run"]), one()), []
    for figure in (figures.curves([found], "exp_neg", args), figures.histograms([found], [1, 2])):
        figure.draw_without_rendering()
        drawn.append(
            [
                axes
                for axes in figure.axes
                if any(np.isfinite(x.get_ydata()).any() for x in axes.lines)
            ]
        )
    assert [len(axes) for axes in drawn] == [0, 1]  # positives in epoch 1


def test_tensorboard(three, capsys, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(script, "write", lambda figure, args, name: [name])
    for _ in range(2):
        script.main(["r/a", "--tensorboard"])
    script.main(["r/b", "--tensorboard", "events"])
    assert "TensorBoard: events/b\n" in capsys.readouterr().out
    for folder, found in (("r/a", three[0]), ("events/b", three[1])):
        events = EventAccumulator(folder, size_guidance={"scalars": 0})
        events.Reload()
        assert events.Tags()["scalars"] == [f"scores/{name}" for name in script.NAMES]
        scalars = events.Scalars("scores/neg_mean")  # once, also after a second time
        assert [s.step for s in scalars] == found.iterations.tolist()
        np.testing.assert_allclose([s.value for s in scalars], found.curves[:, 1], rtol=1e-6)
    with files.only_writer("r/a"), pytest.raises(UserError, match="is writing to r/a"):
        script.main(["r/a", "--tensorboard"])


def test_events_of_runs_of_one_name_stay_apart(capsys, monkeypatch):
    """In one command or in several, below --tensorboard and below the runs' --tb_path."""
    keep("x/run"), keep("y/run", draw=1), keep("z/run", tb_path="tb"), keep("w/run", tb_path="tb")
    monkeypatch.setattr(script, "write", lambda figure, args, name: [name])
    Path("tb/run").mkdir(parents=True)
    Path("tb/run/events.out.tfevents.1.host").touch()  # of a run that is not known
    for _ in range(2):
        script.main(["x", "y", "--tensorboard", "events"])
        assert "TensorBoard: events/run, events/run-2\n" in capsys.readouterr().out
    script.main(["y", "--tensorboard", "events"])
    assert "TensorBoard: events/run-2\n" in capsys.readouterr().out
    script.main(["z", "w", "--tensorboard"])
    assert "TensorBoard: tb/run-2, tb/run-3\n" in capsys.readouterr().out
    for folder in ("events/run", "events/run-2", "tb/run-2", "tb/run-3"):
        assert len(list(Path(folder).glob("events.out.tfevents.*.scores"))) == 1


def test_the_notebook(workspace, monkeypatch, capsys):
    """Run its code cells on so few pictures that an epoch has two steps."""
    (workspace / "feature_transform").symlink_to(ROOT / "feature_transform")  # the project's root
    (workspace / "below").mkdir()
    (workspace / "four.txt").write_text(
        "\n".join(sorted(p.name for p in (workspace / "data/demo/train").iterdir())[:4])
    )
    monkeypatch.chdir(workspace / "below")
    train = "moco_insdis/train_moco_ins.py"
    smaller = {train: "-b 32 --nce_k 32 --device cpu -j 2 --class-list four.txt"}
    notebook = Notebook("scores.ipynb", smaller, monkeypatch)
    notebook.is_refused_outside(monkeypatch)
    for cell in notebook.cells:
        assert cell["outputs"] == [] and cell["execution_count"] is None
    notebook.execute()
    assert notebook.started == [train, train, "feature_transform/plot_scores.py"]
    assert len(notebook.shown) == 3 and min(width for width, _ in notebook.shown) > 700
    said = capsys.readouterr().out
    assert re.search(r"^alpha 0\.5 +3 +6 .*k-NN \d+", said, re.M) and re.search(
        r"^epoch 3: negatives -?0\.\d", said, re.M
    )
    assert notebook.names["scores"].shape == (2, 32, 5)


# ---------------------------------------------------------------------------------------- bad input


def refused(*flags, error=UserError) -> str:
    with pytest.raises(error) as caught:
        script.main(list(flags))
    assert "\n" not in str(caught.value) and not Path("figures").exists()
    return str(caught.value)


def test_runs_without_scores_and_folders_that_are_no_runs():
    Path("run").mkdir()
    Path("file").touch()
    assert (
        refused("run")
        == "run is no run folder (it has no config.json), and there is no scores/score_EPOCH.npy "
        "in or below it"
    )
    Path("run/config.json").write_text("{}")
    assert refused("run") == "run: this run has no scores; train it with --save_score"
    assert refused("nowhere", error=UsageError) == "nowhere: no such folder"
    assert refused("file", error=UsageError) == "file: not a folder"


BROKEN = {
    "objects": (None, "holds Python objects, which can run code when they are read"),
    "pickle": (b"\x80\x04\x95", "holds Python objects, which can run code when they are read"),
    "empty": (b"", "cut short, or not one array of NumPy"),
    "text": (b"no array at all", "cut short, or not one array of NumPy"),
    "cut": (200, "cut short, or not one array of NumPy"),
    "header": (9, "cut short, or not one array of NumPy"),
    "shape": (
        np.zeros((3, 5), np.float32),
        "(3, 5) of float32, expected (iterations, batch, 5) of floats",
    ),
    "columns": (np.zeros((3, 2, 4)), "(3, 2, 4) of float64, expected"),
    "type": (np.zeros((3, 2, 5), "U1"), "expected (iterations, batch, 5) of floats"),
    "archive": ("npz", "cut short, or not one array of NumPy"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_files_that_cannot_be_drawn(case):
    keep("run")
    path, (content, message) = Path("run/scores/score_002.npy"), BROKEN[case]
    if (
        content is None
    ):  # batches of unequal size, as the authors' code saved them with an older NumPy
        ragged = np.empty(2, object)
        ragged[:] = [np.zeros((4, 5)), np.zeros((3, 5))]
        np.save(path, ragged, allow_pickle=True)
    elif case == "archive":
        with open(path, "wb") as file:
            np.savez(file, a=np.zeros(3))
    elif isinstance(content, np.ndarray):
        np.save(path, content)
    else:
        path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    said = refused("run")
    assert said.startswith(f"{path} ") and message in said


def test_values_that_look_like_the_type_of_objects():
    values = np.frombuffer(b"|O|O" * 30, np.float32).reshape(3, 2, 5)
    np.save("score_001.npy", values)
    np.testing.assert_array_equal(score_files.read_array(Path("score_001.npy")), values)


def test_settings_that_cannot_be_read():
    keep("run")
    for content in ("{", "[1]"):
        Path("run/config.json").write_text(content)
        assert refused("run").startswith("run/config.json does not hold the settings of a run")


def test_bad_flags(three, capsys):
    assert "--labels has 2 names for 3 runs (a, b, c)" in refused(
        "r", "--labels", "x,y", error=UsageError
    )
    assert refused("r", "--sweep", "nce_q", error=UsageError) == (
        "--sweep nce_q: r/a has no such flag in its config.json; runs differ in alpha"
    )
    keep("s/a", alpha=0.5), keep("s/b", alpha=0.5)
    assert "--sweep alpha is 0.5 in every run" in refused("s", "--sweep", "alpha", error=UsageError)
    assert "--epochs 9: no run has it; they have 1 to 7" in refused(
        "r", "--epochs", "1,9", error=UsageError
    )
    assert "--start 99: the runs have 28 iterations" in refused(
        "r", "--start", "99", error=UsageError
    )
    for flags, message in (
        ("--labels ,", "',' must be names with commas, such as A,B"),
        ("--formats gif", "'gif' must be some of png,pdf,svg"),
        ("--epochs 0,1", "whole numbers from 1"),
    ):
        says_no(script.parse_args, ["r", *flags.split()], message, capsys)
    Path("file").touch()
    with pytest.raises(FileExistsError) as error:
        script.main(["r", "--out", "file"])
    assert launch.in_one_line(error.value) == ("file: file exists", 1)


def test_as_a_program():
    keep("run", [1])
    shown = run_script("feature_transform/plot_scores.py", "--help", cwd=Path.cwd())
    assert shown.returncode == 0 and "--sweep" in shown.stdout
    found = run_script("feature_transform/plot_scores.py", "run", "--epoch", "1", cwd=Path.cwd())
    assert (found.returncode, found.stdout) == (2, "") and "did you mean --epochs?" in found.stderr
    text = script.__doc__.replace("\\\n", "")
    printed = [line.split() for line in text.splitlines() if line.strip().startswith("python ")]
    assert len(printed) == 2
    for _, program, *flags in printed:
        assert (ROOT / program).samefile(script.__file__) and script.parse_args(flags).runs
