"""Pictures of what a model makes, for the report: images as they are, points and strokes drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

_POINTS_SIDE, _STROKE_SIDE, _FINE = 192, 64, 4
_DOT = 2  # pixels from the middle of a point's square to its edge


@dataclass(frozen=True)
class Sketch:
    """Draws what is like some real data, all in the frame of those.

    Points ``(n, 2, 1, 1)`` become one picture of all of them, the first value to the right and the second up; sequences of a pen
    ``(n, 3, steps, 1)``, which hold 1 where it is lifted and its offsets, a picture each. Other values that are no pixels become gray
    maps of each, channels one below the other.

    Args:
        real: ``(n, C, H, W)``.
        pixels: whether they are images in [0, 1].
    """

    real: Tensor
    pixels: bool

    @property
    def each(self) -> bool:
        """Whether each sample has a picture of its own."""
        return self.pixels or tuple(self.real.shape[1:]) != (2, 1, 1)

    @cached_property
    def _frame(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of each axis, with a margin."""
        places = self._places(self.real).transpose(0, 1).flatten(1)
        low, high = places.amin(1), places.amax(1)
        if self.each:  # strokes keep their proportions
            middle, half = (low + high) / 2, (high - low).max().expand_as(low) / 2
            low, high = middle - half, middle + half
        margin = 0.08 * (high - low).clamp_min(1e-6)
        return low - margin, high + margin

    def _places(self, x: Tensor) -> Tensor:
        """Where points lie, or a pen has been, ``(n, 2, steps)``."""
        return x[:, -2:].flatten(2).double().cumsum(2)

    def __call__(self, images: Tensor, shown: int) -> NDArray[numpy.uint8]:
        """``(pictures, C, height, width)`` uint8 of the first images, or of all points."""
        if self.pixels:
            pixels: NDArray[numpy.uint8] = images[:shown].mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            return pixels
        if not self.each:
            return self._scatter(images)
        if self.real.shape[1] == 3 and self.real.shape[3] == 1:
            return numpy.stack([self._line(x) for x in images[:shown]])
        low, high = self.real.min(), self.real.max()
        gray = ((images[:shown] - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).flatten(1, 2)[:, None]
        maps: NDArray[numpy.uint8] = gray.mul(255).round().to(torch.uint8).cpu().numpy()
        return maps

    def _scaled(self, places: Tensor, side: int) -> NDArray[numpy.float64]:
        """Columns and rows on a picture of that side, ``(..., 2, steps)``."""
        low, high = (edge.view(2, 1) for edge in self._frame)
        share = (places - low) / (high - low)
        share = torch.stack([share[..., 0, :], 1 - share[..., 1, :]], -2).nan_to_num().clamp(-1, 2)
        scaled: NDArray[numpy.float64] = (share * (side - 1)).numpy()
        return scaled

    def _scatter(self, points: Tensor) -> NDArray[numpy.uint8]:
        canvas = Image.new("L", (_POINTS_SIDE, _POINTS_SIDE))
        pen = ImageDraw.Draw(canvas)
        for column, row in self._scaled(self._places(points), _POINTS_SIDE)[:, :, 0].round():
            pen.rectangle((column - _DOT, row - _DOT, column + _DOT, row + _DOT), fill=160)
            pen.rectangle((column - _DOT + 1, row - _DOT + 1, column + _DOT - 1, row + _DOT - 1), fill=255)
        return numpy.asarray(canvas)[None, None]

    def _line(self, steps: Tensor) -> NDArray[numpy.uint8]:
        side = _STROKE_SIDE * _FINE
        canvas = Image.new("L", (side, side))
        pen = ImageDraw.Draw(canvas)
        places = [tuple(place) for place in self._scaled(self._places(steps[None])[0], side).T.tolist()]
        lifted = (steps[0].flatten() > 0.5).tolist()
        for start, stop, up in zip(places, places[1:], lifted, strict=False):
            if not up:
                pen.line((*start, *stop), fill=255, width=2 * _FINE)
        return numpy.asarray(canvas.resize((_STROKE_SIDE, _STROKE_SIDE), Image.Resampling.BOX))[None]
