"""Draw names that come from users, and no formulas, in matplotlib's figures."""

from __future__ import annotations

import contextlib
import functools
import sys

BOX = "\N{WHITE SQUARE}"  # is drawn for a character that no font has


def plain(text: str) -> str:
    """Return `text` as matplotlib must be given it so that it draws these very characters.

    Dollars do not begin a formula. If matplotlib's font lacks a character, a font that has it is
    added for all further figures; if none is installed, a box is drawn, and one line says so.
    """
    from matplotlib import font_manager, rcParams  # imported here, as it takes half a second

    lacking = {character for character in text if not character.isspace()}
    for family in rcParams["font.family"]:
        family = font_manager.FontProperties(family=[family])
        lacking -= _characters(font_manager.findfont(family))
    while lacking:
        fonts = [font for font in font_manager.fontManager.ttflist if font.style == "normal"]
        fonts.sort(key=lambda font: font.weight != 400)  # of equal ones the first is taken
        best = max(fonts, key=lambda font: len(lacking & _characters(font.fname)))
        found = lacking & _characters(best.fname)
        if not found:
            _say_boxes()
            break
        rcParams["font.family"] = [*rcParams["font.family"], best.name]
        lacking -= found
    boxed = str.maketrans(dict.fromkeys(lacking, BOX))
    return text.translate(boxed).replace("$", r"\$")


@functools.cache
def _characters(path: str) -> frozenset[str]:
    """Return the characters that matplotlib can draw with a font file."""
    from matplotlib import font_manager

    codes = ()
    with contextlib.suppress(OSError, RuntimeError):  # a file that FreeType does not read
        font = font_manager.get_font(path)
        if font.scalable and not font.family_name.startswith("Last Resort"):
            codes = font.get_charmap()
    return frozenset(map(chr, codes))


@functools.cache
def _say_boxes() -> None:
    """Say once that characters are missing."""
    print(
        "note: no installed font has some of the characters in the names of this figure, so boxes "
        "are drawn for them; install a font that has them, such as Noto Sans CJK",
        file=sys.stderr,
    )
