"""What models are measured against: held-out real images, or, where there is no data, images of the teacher's making."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy
from torch import Tensor

from ..data import Dataset, Labels, floats
from ..model import Model
from ..noise import Noise
from .arms import samples


@dataclass(frozen=True)
class Reference:
    """Images that every model is measured against.

    Args:
        kind: "data" for real images, "teacher" for what was made without any.
        name: what they are images of, for the reader.
        images: ``(n, C, H, W)`` in [0, 1].
        labels: ``(n,)``, or ``None``.
        others: as many images of the same origin, of which none is among these, for the floor; ``None`` where there are none.
    """

    kind: Literal["data", "teacher"]
    name: str
    images: Tensor
    labels: Labels | None = None
    others: Callable[[Noise], Tensor] | None = None


def of_data(data: Dataset, n: int | None) -> Reference:
    """The first held-out images, all of them by default; training images make the floor."""
    test = floats(data.test.images[:n])

    def others(noise: Noise) -> Tensor:
        order = noise.permutation("floor", len(data.train.images)).numpy()[: len(test)]
        return floats(data.train.images[numpy.sort(order)])

    return Reference("data", data.name, test, None if data.test.labels is None else data.test.labels[:n], others)


def of_teacher(teacher: Model, n: int, noise: Noise, batch: int) -> Reference:
    """Fresh samples of a teacher; still others of its samples make the floor.

    Args:
        teacher: one that generates.
        n: images.
        noise: that nothing else is drawn from.
        batch: images at a time.
    """
    fresh = samples(teacher, n, noise, batch)
    return Reference("teacher", "the teacher's own making", fresh, others=lambda own: samples(teacher, n, own.fold("floor"), batch))
