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

from common import figures
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


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_takes_every_name(name, tmp_path):
    views.write(tmp_path / "views.png", {name: torch.rand(2, 3, 8, 8)}, [f"{name}/{name}.png"] * 2)
    picture = torch.rand(1, 2, 3, 8, 8)
    same = torch.ones(1, 1)
    parts = ["beyond"]
    sheet._draw(tmp_path / "ring.png", picture, parts, [[name]], same, [name], name)
    probes.draw_scores(str(tmp_path / "scores.png"), torch.rand(9), torch.rand(9), name)
    pictures = voc.Pictures((), [name])
    boxes = torch.tensor([[1.0, 1, 7, 7]])
    label = torch.ones(1, dtype=torch.long)
    pictures.paths = [f"{name}.jpg"]
    pictures.decode = lambda row: (
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        voc.Objects(boxes, label, torch.zeros(1)),
    )
    found = {0: {"boxes": boxes, "labels": label, "scores": torch.ones(1)}}
    detections.draw(tmp_path / "found.png", pictures, found)
    legend = Figure()
    handle = legend.subplots().plot([0, 1])[0]
    score_figures.legend_below(legend, 6, [handle], [name], 3)
    legend.savefig(tmp_path / "legend.png")
    assert len(list(tmp_path.iterdir())) == 5


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
