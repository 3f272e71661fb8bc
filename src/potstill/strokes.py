"""Outlines of digits as a pen would draw them, from the fonts that matplotlib ships: public sequences that every installation has."""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from .glyphs import FONTS, Font, folder
from .noise import Noise

Contours = tuple[npt.NDArray[np.float64], ...]
_LEAST = 3  # points of a contour, which a triangle has


@cache
def outline(digit: str, font: Font) -> Contours:
    """Closed contours of a digit, each ``(vertices, 2)``, x to the right and y up, its last vertex its first.

    A digit is 1 high and centered on 0; the outer contour comes first, and each begins at its highest point.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    path = TextPath((0, 0), digit, size=100, prop=FontProperties(fname=str(folder() / font.file)))
    contours = [polygon for polygon in map(np.asarray, path.to_polygons()) if len(polygon) > _LEAST]
    every = np.concatenate(contours)
    low, high = every.min(0), every.max(0)
    scaled = [(polygon - (low + high) / 2) / (high[1] - low[1]) for polygon in contours]
    scaled.sort(key=lambda polygon: -float(np.ptp(polygon[:, 0]) * np.ptp(polygon[:, 1])))
    return tuple(_from_the_top(polygon) for polygon in scaled)


def _from_the_top(polygon: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    opened = polygon[:-1]
    first = int(np.lexsort((opened[:, 0], -opened[:, 1]))[0])
    turned = np.roll(opened, -first, axis=0)
    return np.concatenate([turned, turned[:1]])


def resampled(contours: Contours, steps: int) -> npt.NDArray[np.float64]:
    """Points at equal distances along each contour, ``(steps, 3)``: place, and 1 where the pen is lifted after it.

    Contours get points by their lengths, each at least three.
    """
    lengths = np.array([np.linalg.norm(np.diff(c, axis=0), axis=1).sum() for c in contours])
    counts = np.maximum(np.floor(steps * lengths / lengths.sum()), _LEAST).astype(int)
    counts[0] += steps - counts.sum()
    parts = []
    for contour, count in zip(contours, counts, strict=True):
        along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(contour, axis=0), axis=1))])
        at = np.linspace(0, along[-1], count)
        points = np.stack([np.interp(at, along, contour[:, axis]) for axis in range(2)], 1)
        parts.append(np.concatenate([points, np.arange(count)[:, None] == count - 1], 1))
    return np.concatenate(parts)


def strokes(rows: Sequence[int], noise: Noise, steps: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Draw one digit per row.

    Args:
        rows: of the noise; sequence ``i`` depends on its row alone.
        noise: all that varies comes from it: digit, font, size, slant, turn.
        steps: points of a sequence.

    Returns:
        ``(n, 3, steps, 1)`` float32: 1 where the pen is lifted after the point, and the offset from the point before, the first from the
        center, in heights of a digit; and the digits, ``(n,)``.
    """
    n, noise = len(rows), noise.at(rows)

    def between(name: str, low: float, high: float) -> npt.NDArray[np.float64]:
        return (low + (high - low) * noise.uniform(name, (n,)).double()).numpy()

    labels = between("digit", 0, 10).astype(np.int64)
    fonts = between("font", 0, len(FONTS)).astype(np.int64)
    height, stretch = between("height", 0.85, 1.15), between("stretch", 0.8, 1.2)
    shear, angle = between("shear", -0.2, 0.3), between("angle", -0.15, 0.15)
    values = np.empty((n, 3, steps, 1), np.float32)
    for i in range(n):
        found = resampled(outline(string.digits[labels[i]], FONTS[fonts[i]]), steps)
        x, y = height[i] * stretch[i] * (found[:, 0] + shear[i] * found[:, 1]), height[i] * found[:, 1]
        cosine, sine = np.cos(angle[i]), np.sin(angle[i])
        places = np.stack([cosine * x - sine * y, sine * x + cosine * y])
        values[i, 0, :, 0] = found[:, 2]
        values[i, 1:, :, 0] = np.diff(places, axis=1, prepend=0)
    return values, labels
