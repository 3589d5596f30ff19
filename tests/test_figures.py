"""Names of users in figures: every character is drawn as it is, whatever it means to matplotlib."""

import warnings

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common import figures, files
from debiased import estimator
from feature_transform import detections, score_figures, voc
from ring import sheet
from runner import views
from tools import probes

NAMES = [r"$\frac$", "two $5$ and $", r"back\$slash$ \\$x$", "_^{", "狗$x$", "\ud800\x07"]
RARE = "\U0010fffd"  # for private use: no common font has it


@pytest.fixture(autouse=True)
def settings():
    figures._say_boxes.cache_clear()
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    figures._say_boxes.cache_clear()


def drawn(text: str, **options) -> np.ndarray:
    figure = Figure(figsize=(4, 1))
    canvas = FigureCanvasAgg(figure)
    figure.text(0, 0.5, text, **options)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize("name", NAMES[:4])
def test_the_characters_are_drawn_and_no_formula(name):
    np.testing.assert_array_equal(drawn(figures.plain(name)), drawn(name, parse_math=False))


def one_picture(name: str, score: float) -> tuple[voc.Pictures, detections.Found]:
    """Return a picture of this name with an object of this class, and a detection of it."""
    pictures = voc.Pictures((), [name])
    pictures.paths = [f"{name}.jpg"]
    boxes = torch.tensor([[1.0, 1, 7, 7]])
    labels = torch.ones(1, dtype=torch.long)
    objects = voc.Objects(boxes, labels, torch.zeros(1))
    pictures.decode = lambda row: (torch.zeros(3, 8, 8, dtype=torch.uint8), objects)
    return pictures, {0: {"boxes": boxes, "labels": labels, "scores": torch.tensor([score])}}


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_takes_every_name(name, tmp_path):
    views.write(tmp_path / "views.png", {name: torch.rand(2, 3, 8, 8)}, [f"{name}/{name}.png"] * 2)
    picture = torch.rand(1, 2, 3, 8, 8)
    same = torch.ones(1, 1)
    parts = ["beyond"]
    sheet._draw(tmp_path / "ring.png", picture, parts, [[name]], same, [name], name)
    probes.draw_scores(str(tmp_path / "scores.png"), torch.rand(9), torch.rand(9), name)
    detections.draw(tmp_path / "found.png", *one_picture(name, 0.9))
    legend = Figure()
    handle = legend.subplots().plot([0, 1])[0]
    score_figures.legend_below(legend, 6, [handle], [name], 3)
    legend.savefig(tmp_path / "legend.png")
    assert len(list(tmp_path.iterdir())) == 5


@pytest.fixture
def written(monkeypatch):
    """The figures that are given to `files.write_figure`, drawn."""
    kept = []

    def keep(figure, *_, **__):
        FigureCanvasAgg(figure).draw()
        kept.append(figure)

    monkeypatch.setattr(files, "write_figure", keep)
    return kept


def test_the_legend_of_scores_covers_no_bar(written):
    cosines = torch.linspace(-1, 1, 50)
    probes.draw_scores("scores.png", cosines, cosines, "run")
    (legend,) = written[0].legends
    assert not legend.get_window_extent().overlaps(written[0].axes[0].bbox)


def test_the_legend_of_the_estimator_names_every_line(written):
    rows = [
        {"positives": kind, "batch": batch, "tau_plus": tau, "bias": 0.1, "sd": 1.0, "bound": 0.0}
        for kind in estimator.KINDS
        for batch in (8, 16)
        for tau in (0.0, 0.1)
    ]
    estimator.figure(rows, share=0.1, temperature=0.5, path="estimator.png")
    (legend,) = written[0].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:2] == ["batch 8", "batch 16"]
    assert names[2].startswith("the true tau_plus") and "lower bound" in names[3]
    assert "dashed" in legend.get_title().get_text()
    assert not any(legend.get_window_extent().overlaps(axes.bbox) for axes in written[0].axes)


def test_a_sheet_of_detections_says_what_it_shows(written):
    for score in (0.9, 0.1):
        detections.draw("found.png", *one_picture("cat", score))
    with_one, with_none = (figure.get_suptitle() for figure in written)
    assert with_one.endswith("solid: detections (1) with a score of 0.5 or more")
    assert with_none.endswith("no detection has a score of 0.5 or more")


@pytest.fixture
def font(tmp_path):
    """A font that has the character RARE alone, a filled square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder([".notdef", "rare"])
    builder.setupCharacterMap({ord(RARE): "rare"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "rare": pen.glyph()})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in (".notdef", "rare")})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Rare", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "rare.ttf")
    before = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(tmp_path / "rare.ttf")
    yield
    font_manager.fontManager.ttflist[:] = before


def test_an_installed_font_that_has_the_character_is_used(font, capsys):
    name = figures.plain(f"a {RARE}")
    assert name == f"a {RARE}" and matplotlib.rcParams["font.family"][-1] == "Rare"
    assert (drawn(name) == 0).sum() > (drawn("a") == 0).sum() + 100  # a square of 8 points
    assert capsys.readouterr().err == ""


def test_characters_that_no_font_has_are_boxes_and_said_once(capsys, tmp_path):
    assert [figures.plain(name) for name in (RARE, "ab", f"{RARE}x")] == ["□", "ab", "□x"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "install a font that has them" in said
