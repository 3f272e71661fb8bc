"""Captioned pictures of characters, drawn from the fonts that matplotlib ships: public data that every installation has.

Picture ``i`` depends on the noise's row ``i`` alone. A character's outline is kept as a signed distance field (Rosenfeld and Pfaltz,
"Sequential Operations in Digital Picture Processing", JACM 1966), so that any stroke width is one addition and any warp one lookup.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from .noise import Noise

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Font:
    """A font file of matplotlib, and the words for how it looks."""

    file: str
    family: str
    bold: bool = False
    italic: bool = False


# matplotlib's other fonts hold symbols, or, in cmmi10, digits of unequal height.
FONTS = (
    *(
        Font(f"DejaVu{face}{suffix}.ttf", family, bold, italic)
        for face, family, slanted in (("Sans", "sans", "Oblique"), ("SansMono", "mono", "Oblique"), ("Serif", "serif", "Italic"))
        for suffix, bold, italic in (
            ("", False, False),
            ("-Bold", True, False),
            (f"-{slanted}", False, True),
            (f"-Bold{slanted}", True, True),
        )
    ),
    Font("STIXGeneral.ttf", "serif"),
    Font("STIXGeneralBol.ttf", "serif", bold=True),
    Font("STIXGeneralItalic.ttf", "serif", italic=True),
    Font("STIXGeneralBolIta.ttf", "serif", bold=True, italic=True),
    Font("cmr10.ttf", "serif"),
    Font("cmb10.ttf", "serif", bold=True),
    Font("cmti10.ttf", "serif", italic=True),
    Font("cmss10.ttf", "sans"),
    Font("cmtt10.ttf", "mono"),
)

# A template is a square of this many pixels, in which a digit is _HEIGHT high; the rest is room for wide letters and warps.
_TEMPLATE, _HEIGHT, _RENDERED = 96, 48, 192
_CAPITAL = 0.85  # a capital letter is this much of a digit's height, so that descenders and wide letters stay in the picture
_BATCH = 1024


@dataclass(frozen=True)
class Glyphs:
    """Pictures ``(n, 3, size, size)`` uint8, white on black; a caption of each; and the index ``(n,)`` of its character."""

    images: npt.NDArray[np.uint8]
    captions: tuple[str, ...]
    labels: npt.NDArray[np.int64]


def folder() -> Path:
    """Where matplotlib keeps its fonts."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@cache
def template(character: str, font: Font) -> npt.NDArray[np.float32]:
    """Distance to the outline, ``(96, 96)``, in pixels of the template; positive inside.

    A digit is 48 pixels high in every font; letters keep their size relative to the font's capitals.
    """
    from PIL import Image, ImageDraw, ImageFont
    from scipy.ndimage import distance_transform_edt

    face = ImageFont.truetype(str(folder() / font.file), _RENDERED)
    left, top, right, bottom = face.getbbox(character, anchor="ls")
    _, reference, _, base = face.getbbox(character if character.isdigit() else "H", anchor="ls")
    wanted = _HEIGHT * (1.0 if character.isdigit() else _CAPITAL)
    scale = (base - reference) / wanted  # rendered pixels in one of the template
    side = round(_TEMPLATE * scale)
    canvas = Image.new("L", (side, side))
    ImageDraw.Draw(canvas).text(((side - left - right) / 2, (side - top - bottom) / 2), character, fill=255, font=face, anchor="ls")
    inside = np.asarray(canvas) > 127
    distance = distance_transform_edt(inside) - distance_transform_edt(~inside)
    distance = (distance - 0.5 * np.sign(distance)) / scale  # the outline lies between two pixels, half a pixel from either
    small = Image.fromarray(distance.astype(np.float32)).resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32)


def glyphs(rows: Sequence[int], noise: Noise, size: int = 32, digits: float = 0.75) -> Glyphs:
    """Draw one picture per row.

    Args:
        rows: of the noise.
        noise: all that varies comes from it: character, font, place, size, slant, stroke, and how a pen might bend it.
        size: side of a picture in pixels.
        digits: share of digits, in [0, 1]; the rest are letters.
    """
    parts = [_drawn(noise.at(rows[i : i + _BATCH]), len(rows[i : i + _BATCH]), size, digits) for i in range(0, len(rows), _BATCH)]
    images = np.concatenate([part.images for part in parts])
    return Glyphs(images, tuple(c for part in parts for c in part.captions), np.concatenate([part.labels for part in parts]))


def _drawn(noise: Noise, n: int, size: int, digits: float) -> Glyphs:
    def pick(name: str, count: int) -> list[int]:
        return (noise.uniform(name, (n,)).double() * count).long().tolist()

    def between(name: str, low: float, high: float) -> Tensor:
        return low + (high - low) * noise.uniform(name, (n,)).double()

    letters = len(CHARACTERS) - 10
    is_digit = (noise.uniform("is digit", (n,)) < digits).tolist()
    labels = [d if yes else 10 + c for yes, d, c in zip(is_digit, pick("digit", 10), pick("letter", letters), strict=True)]
    fonts = [FONTS[i] for i in pick("font", len(FONTS))]
    field = torch.from_numpy(np.stack([template(CHARACTERS[c], font) for c, font in zip(labels, fonts, strict=True)]))

    # Half of the pictures are bent, as a hand would; a bend under a third of the largest is not worth a word.
    bend = (between("bend", -1, 1)).clamp(min=0)
    height = between("height", 0.88, 1.0)
    width = height * between("stretch", 0.8, 1.1)
    angle, shear = between("angle", -0.15, 0.15), between("shear", -0.15, 0.15)
    room = 0.5 * (1 - height)
    x0, y0 = room * between("x", -1, 1), room * between("y", -1, 1)
    bold = torch.tensor([font.bold for font in fonts])
    heavy = noise.uniform("stroke", (n,)).double()
    stroke = torch.where(bold, -0.01 + 0.03 * heavy, 0.005 + 0.05 * heavy)  # added on each side, as a share of the picture

    # Pixel centers in [-0.5, 0.5], then the inverse of: bend, shear, turn, scale, shift. Arithmetic is in float64, one number at a time,
    # so that a picture has the same bits in any batch.
    line = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    y, x = (t.expand(n, size, size) for t in torch.meshgrid(line, line, indexing="ij"))

    def each(t: Tensor) -> Tensor:
        return t.view(n, 1, 1)

    x, y = x - each(x0), y - each(y0)
    cosine, sine = each(angle.cos()), each(angle.sin())
    x, y = x * cosine + y * sine, y * cosine - x * sine
    x, y = (x + y * each(shear)) / each(width), y / each(height)
    for axis in range(2):
        phases = 2 * torch.pi * noise.uniform(f"phase {axis}", (n, 2)).double()
        sizes = 0.07 * bend.view(n, 1) * noise.normal(f"wave {axis}", (n, 2)).double().clamp(-2, 2)
        wave = each(sizes[:, 0]) * (5.0 * y + each(phases[:, 0])).sin() + each(sizes[:, 1]) * (4.0 * x + each(phases[:, 1])).sin()
        x, y = (x + wave, y) if axis == 0 else (x, y + wave)
    # A digit's height is 1 here, and _HEIGHT of the template's _TEMPLATE pixels.
    grid = (torch.stack([x, y], -1) * (2 * _HEIGHT / _TEMPLATE)).float()
    distance = grid_sample(field[:, None], grid, padding_mode="border", align_corners=False)[:, 0].double()
    pixels = (distance / _HEIGHT * each(height) + each(stroke)) * size  # distance to the stroke's edge, in pixels of the picture
    images = ((pixels + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()

    thick = [0 if t < 0.3 else 2 if t > 0.7 else 1 for t in heavy.tolist()]
    drawn = zip(labels, fonts, thick, (bend > 1 / 3).tolist(), pick("wording", 8), pick("said", 16), strict=True)
    captions = tuple(_caption(*row) for row in drawn)
    return Glyphs(np.repeat(images[:, None], 3, axis=1), captions, np.array(labels, dtype=np.int64))


def _caption(label: int, font: Font, thick: int, bent: bool, wording: int, said: int) -> str:
    """One of several wordings; ``said`` decides which of the four properties are mentioned."""
    style = " ".join(
        word
        for word, mentioned in (
            (("thin", "", "thick")[thick], said & 1),
            ("bold" if font.bold else "", said & 2),
            ("italic" if font.italic else "", said & 2),
            ("handwritten" if bent else font.family, said & 4),
        )
        if word and mentioned
    )
    character = CHARACTERS[label]
    if label < 10:
        kind, name = ("number" if said & 8 else "digit"), (_DIGITS[label] if wording % 2 else character)
    else:
        kind, name = ("capital letter" if character.isupper() else "small letter"), character
    match wording // 2:
        case 0:
            return f"the {kind} {name}, {style}" if style else f"the {kind} {name}"
        case 1:
            return f"a {style} {kind} {name}" if style else f"a {kind} {name}"
        case 2:
            return f"a picture of the {kind} {name}"
        case _:
            return f"{kind} {name}, {style}" if style else f"{kind} {name}"
