"""Pictures of characters from matplotlib's fonts: what is drawn is what the caption and the label say, whatever the batch."""

from __future__ import annotations

import re

import numpy as np
import pytest

from potstill import glyphs as module
from potstill.glyphs import CHARACTERS, FONTS, folder, glyphs, template
from potstill.noise import Noise

NOISE = Noise((0, "test"))
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLAIN = tuple(font for font in FONTS if font.file == "DejaVuSans.ttf")


def character_in(caption):
    """What a reader takes a caption to say: the character, told by the words around it."""
    digit = re.search(r"\b(?:digit|number) (\w+)", caption)
    letter = re.search(r"\b(capital|small) letter (\w)\b", caption)
    assert (digit is None) != (letter is None), caption
    if digit:
        return str(NAMES.index(digit[1])) if digit[1] in NAMES else digit[1]
    assert letter[2].isupper() == (letter[1] == "capital"), caption  # CLIP's tokenizer lowers the letter itself
    return letter[2]


def extent(mask):
    rows = np.flatnonzero(mask.any(1))
    return rows[-1] - rows[0] + 1


@pytest.mark.parametrize("font", FONTS, ids=lambda font: font.file)
def test_every_font_is_there_and_draws_upright_characters_of_the_agreed_height(font):
    assert (folder() / font.file).is_file()
    for character, height in (("0", 48), ("7", 48), ("H", 0.85 * 48)):
        field = template(character, font)
        assert field.shape == (96, 96)
        assert abs(extent(field > 0) - height) <= 2
        assert (field[[0, -1]] < 0).all()  # nothing is cut off
        assert (field[:, [0, -1]] < 0).all()


def test_fonts_are_distinct_and_of_every_style():
    assert len({font.file for font in FONTS}) == len(FONTS)
    assert {(font.family, font.bold, font.italic) for font in FONTS} >= {
        (family, bold, italic) for family in ("sans", "serif", "mono") for bold in (False, True) for italic in (False, True)
    }


def test_a_template_holds_distances():
    """A distance changes by no more than the distance walked, and by just that much on the way to a straight edge.

    At the outline itself it is known to a rendered pixel, a third of the template's.
    """
    field = template("1", PLAIN[0])
    steps = np.abs(np.diff(field, axis=0))
    away = np.minimum(np.abs(field[1:]), np.abs(field[:-1])) > 1
    assert away.mean() > 0.7
    assert steps[away].max() <= 1.05  # a pixel averages 2.8 rendered ones, whose centers are not quite evenly spaced
    assert steps.max() <= 1.4
    assert np.median(steps[:10, 40:56]) == pytest.approx(1, abs=0.05)  # straight above the character


def test_letters_keep_their_size_beside_capitals():
    assert extent(template("x", PLAIN[0]) > 0) < 0.85 * extent(template("X", PLAIN[0]) > 0)
    assert extent(template("p", PLAIN[0]) > 0) > 1.2 * extent(template("x", PLAIN[0]) > 0)


def test_a_picture_depends_on_its_row_alone(monkeypatch):
    whole = glyphs(range(40), NOISE)
    rows = (31, 4, 17)
    some = glyphs(rows, NOISE)
    assert np.array_equal(some.images, whole.images[list(rows)])
    assert some.captions == tuple(whole.captions[i] for i in rows)
    assert np.array_equal(some.labels, whole.labels[list(rows)])
    monkeypatch.setattr(module, "_BATCH", 7)
    parts = glyphs(range(40), NOISE)
    assert np.array_equal(parts.images, whole.images)
    assert parts.captions == whole.captions


def test_another_seed_draws_other_pictures(monkeypatch):
    monkeypatch.setattr(module, "FONTS", PLAIN)
    one, other = glyphs(range(16), NOISE), glyphs(range(16), NOISE.fold("other"))
    assert not (one.images == other.images).all((1, 2, 3)).any()
    assert len(np.unique(one.images, axis=0)) == 16


def test_pictures_are_white_on_black_and_digits_fill_their_height(monkeypatch):
    monkeypatch.setattr(module, "FONTS", PLAIN)
    drawn = glyphs(range(64), NOISE, digits=1.0)
    assert drawn.images.shape == (64, 3, 32, 32)
    assert drawn.images.dtype == np.uint8
    assert (drawn.images == drawn.images[:, :1]).all()
    gray = drawn.images[:, 0]
    assert (gray.max((1, 2)) == 255).all()
    share = gray.mean((1, 2)) / 255
    assert share.min() > 0.08
    assert share.max() < 0.6
    assert min(extent(picture > 127) for picture in gray) >= 0.7 * 32


def test_a_picture_is_the_same_at_any_size(monkeypatch):
    monkeypatch.setattr(module, "FONTS", PLAIN)
    large, small = glyphs(range(16), NOISE, size=64), glyphs(range(16), NOISE, size=16)
    assert large.captions == small.captions
    averaged = large.images.reshape(16, 3, 16, 4, 16, 4).mean((3, 5))
    error = np.abs(averaged - small.images).mean()
    assert error < 0.2 * np.abs(averaged - np.roll(small.images, 1, axis=0)).mean()


def test_captions_say_what_the_labels_are():
    drawn = glyphs(range(60), NOISE, digits=0.5)
    assert [character_in(caption) for caption in drawn.captions] == [CHARACTERS[i] for i in drawn.labels]


def test_every_character_and_wording_has_a_caption_of_its_own():
    for label, character in enumerate(CHARACTERS):
        for wording in range(8):
            for said in range(16):
                assert character_in(module._caption(label, PLAIN[0], 0, False, wording, said)) == character
    captions = {module._caption(3, PLAIN[0], 0, False, wording, said) for wording in range(8) for said in range(16)}
    assert len(captions) > 20
    assert {"the digit 3, thin", "the digit three, thin sans", "a sans number 3", "a picture of the number three"} <= captions


def test_captions_name_the_style_that_is_there_and_no_other():
    for font in FONTS:
        for bent in (False, True):
            full = [module._caption(3, font, 2, bent, wording, 7) for wording in range(4)]
            for caption in full:
                assert ("bold" in caption, "italic" in caption, "handwritten" in caption) == (font.bold, font.italic, bent)
                assert ("thick" in caption, "thin" in caption) == (True, False)
                assert [family for family in ("sans", "serif", "mono") if family in caption.split()] == ([] if bent else [font.family])
    assert module._caption(3, FONTS[0], 1, False, 0, 0) == "the digit 3"


def test_thick_is_thicker_than_thin(monkeypatch):
    monkeypatch.setattr(module, "FONTS", PLAIN)
    drawn = glyphs(range(300), NOISE, digits=1.0)
    ink = drawn.images.mean((1, 2, 3))
    thick, thin = (ink[[word in caption.split() for caption in drawn.captions]] for word in ("thick", "thin"))
    assert len(thick) > 20
    assert len(thin) > 20
    assert thick.mean() > 1.3 * thin.mean()


def test_the_share_of_digits_is_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(module, "FONTS", PLAIN)
    assert (glyphs(range(30), NOISE, digits=1.0).labels < 10).all()
    assert (glyphs(range(30), NOISE, digits=0.0).labels >= 10).all()
    labels = glyphs(range(400), NOISE, digits=0.75).labels
    assert (labels < 10).mean() == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 400) ** 0.5)
    assert set(labels[labels < 10]) == set(range(10))
