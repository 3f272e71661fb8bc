"""Does a model give away its training images? Its images' distances to them, beside those of held-out images, which cannot be copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from scipy.stats import betabinom, hypergeom
from torch import Tensor

from ..data import Kept, floats
from ._arrays import row_blocks

QUANTILE = 0.01
"""Share of held-out images that are as near to a training image as what is counted: rare, so that a few copies stand out."""

_QUERIES = 1024  # images whose distances are in memory at a time

Distances = NDArray[numpy.float64]
Places = NDArray[numpy.int64]


def nearest(images: Tensor, real: Kept) -> tuple[Distances, Places]:
    """The nearest of the real images ``(m, C, H, W)`` to each image ``(n, C, H, W)``: how far it is, and which it is, each ``(n,)``.

    Distances are Euclidean, over pixels in [0, 1], in float64; they are computed in blocks of about 64 MiB, whatever n and m are. A copy
    is exactly 0 apart.
    """
    distances, places = [], []
    for part in images.cpu().flatten(1).double().split(_QUERIES):
        least, place = torch.full((len(part),), torch.inf, dtype=torch.float64), torch.zeros(len(part), dtype=torch.int64)
        for rows in row_blocks(len(real), max(_QUERIES, part.shape[1])):
            apart, at = torch.cdist(part, floats(real[rows]).flatten(1).double()).min(1)
            nearer = apart < least
            least[nearer], place[nearer] = apart[nearer], at[nearer] + rows.start
        # The blocks are matrix products, which leave rounding where rows coincide.
        distances.append((part - floats(real[place.numpy()]).flatten(1).double()).norm(dim=1))
        places.append(place)
    return torch.cat(distances).numpy(), torch.cat(places).numpy()


class Neighbors(NamedTuple):
    """Of some images: the distance to the nearest training image, and which real image is nearest, training images first: ``(n,)``."""

    distances: Distances
    places: Places

    @classmethod
    def joined(cls, several: Sequence[Neighbors]) -> Neighbors:
        """Those of several sets of images as of one."""
        return cls(numpy.concatenate([one.distances for one in several]), numpy.concatenate([one.places for one in several]))


@dataclass(frozen=True)
class Memorization:
    """Two tests for images that are too near to training images, with held-out images as the baseline.

    *Near* is an image that is nearer to a training image than a hundredth of the held-out ones are. If the distances of a model's images
    are drawn as those of held-out images are, the number of near ones is beta-binomial, for the threshold is itself an order statistic.
    After Meehan et al., "A Non-Parametric Test to Detect Data-Copying in Generative Models" (AISTATS 2020), who compare the same
    distances by their ranks. Smooth images are near to every real image, and are found here without being copies.

    *Nearest* asks whether the real image nearest to each is a training image more often than a held-out one. If the model knows no
    difference between the two, which of the real images that are nearest to any are training images is a matter of the split, and
    their number hypergeometric; an image that is nearest to many counts once. Smooth images pass this test.

    Args:
        train: the training images.
        test: held-out images of the same origin.
        baseline: distances of the held-out images to the training images, ``(m,)``, without those that are copies of one.
    """

    train: Kept
    test: Kept
    baseline: Distances

    @classmethod
    def of(cls, train: Kept, test: Kept) -> Memorization:
        """The test with its baseline.

        Raises:
            ValueError: every held-out image is a copy of a training image.
        """
        distances, _ = nearest(floats(test), train)
        if not distances.any():
            raise ValueError("every held-out image is among the training images too, so there is nothing to compare with")
        return cls(train, test, distances[distances > 0])

    @property
    def _rank(self) -> int:
        return max(1, round(QUANTILE * (len(self.baseline) + 1)))

    @property
    def _threshold(self) -> float:
        return float(numpy.sort(self.baseline)[self._rank - 1])

    def about(self) -> dict[str, float]:
        """What the figures are to be compared with: the threshold, and shares that are expected of a model that copies nothing."""
        held_out, training = len(self.test), len(self.train)
        return {
            "training": training,
            "held_out": held_out,
            "held_out_copies": held_out - len(self.baseline),
            "threshold": self._threshold,
            "near_expected": self._rank / (len(self.baseline) + 1),
            "train_nearest_expected": training / (training + held_out),
        }

    def neighbors(self, images: Tensor) -> Neighbors:
        """Of images ``(n, C, H, W)``; a held-out image counts as the nearest where a training image is no nearer."""
        (to_train, place), (to_test, other) = nearest(images, self.train), nearest(images, self.test)
        return Neighbors(to_train, numpy.where(to_train < to_test, place, len(self.train) + other))

    def figures(self, found: Neighbors) -> dict[str, float]:
        """What the neighbors of ``n`` images say of them.

        Returns:
            ``near``, the share of near images, and ``near_p_value``, how likely as many or more are without copies; ``median_ratio``, of
            the median distance to a training image to that of held-out images; ``train_nearest``, the share whose nearest real image is
            a training image, and ``train_nearest_p_value``, likewise.
        """
        n, held_out, training = len(found.distances), len(self.baseline), len(self.train)
        near, hit = int((found.distances < self._threshold).sum()), numpy.unique(found.places)
        trained = int((hit < training).sum())
        return {
            "images": n,
            "near": near / n,
            "near_p_value": float(betabinom.sf(near - 1, n, self._rank, held_out + 1 - self._rank)),
            "median_ratio": float(numpy.median(found.distances) / numpy.median(self.baseline)),
            "train_nearest": float((found.places < training).mean()),
            "train_nearest_p_value": float(hypergeom.sf(trained - 1, training + len(self.test), training, len(hit))),
        }
