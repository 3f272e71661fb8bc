"""Precision, recall, density and coverage: fidelity and diversity, each seen by k-nearest-neighbor balls."""

from __future__ import annotations

from typing import Any

import numpy

from potstill.evaluate._arrays import Comparison, comparison, neighbor_distances


def prdc(x: Any, y: Any, k: int = 5) -> dict[str, float]:
    """Precision, recall, density and coverage of generated features `y` (m, d) against real features `x` (n, d).

    The ball of a row reaches to its k-th nearest other row of its own set, and includes its surface.

    * `precision`, in [0, 1]: the share of generated rows that lie in the ball of some real row (are they realistic?).
    * `recall`, in [0, 1]: the share of real rows that lie in the ball of some generated row (is everything covered?).
    * `density`, in [0, n / k], 1 where the distributions are equal: the number of real balls a generated row lies in, over k, averaged.
    * `coverage`, in [0, 1]: the share of real rows with a generated row in their ball.

    Precision and recall are from Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models"
    (NeurIPS 2019), density and coverage from Naeem et al., "Reliable Fidelity and Diversity Metrics for Generative Models" (ICML 2020).
    Naeem's code leaves the surface out. That differs only where distances are equal: there a copy of a duplicated real row, whose ball
    has radius 0, would not count as realistic. Computed in float64 in blocks of rows, whose number changes nothing.

    Raises ValueError where x or y is not a finite array of that shape with at least two rows, the two differ in d,
    or k is not a whole number from 1 to one less than the rows of each set.
    """
    return prdc_of(comparison(x, y), k)


def prdc_of(sets: Comparison, k: int) -> dict[str, float]:
    """`prdc` of sets whose distances are at hand."""
    fewest = min(len(sets.x), len(sets.y))
    if not isinstance(k, int) or not 1 <= k < fewest:
        raise ValueError(f"k: found {k!r}, expected a whole number from 1 to {fewest - 1}: a row has so many neighbors in the smaller set")
    real_radius = neighbor_distances(sets.xx, k)
    generated_radius = neighbor_distances(sets.yy, k)
    balls_around = numpy.zeros(len(sets.y), dtype=numpy.int64)
    recalled = covered = 0
    for rows, block in sets.xy.blocks():
        in_real_ball = block <= real_radius[rows, None]
        balls_around += in_real_ball.sum(axis=0)
        covered += int(in_real_ball.any(axis=1).sum())
        recalled += int((block <= generated_radius).any(axis=1).sum())
    return {
        "precision": float((balls_around > 0).mean()),
        "recall": recalled / len(sets.x),
        "density": float(balls_around.mean()) / k,
        "coverage": covered / len(sets.x),
    }
