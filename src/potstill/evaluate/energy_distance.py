"""The energy distance between two sets of points: a distance of distributions without a kernel to choose."""

from __future__ import annotations

from typing import Any

import numpy

from potstill.evaluate._arrays import Comparison, Pairs, comparison


def energy_distance(x: Any, y: Any) -> float:
    """Energy distance between `x` (n, d) and `y` (m, d), in units of the features: 0 for equal sets, no upper bound.

    2 mean |x_i - y_j| - mean |x_i - x_j| - mean |y_i - y_j|, means over all pairs, i = j included, which makes it 0 or more (Székely
    and Rizzo, "Energy statistics: a class of statistics based on distances", Journal of Statistical Planning and Inference 2013). Two
    samples of one distribution are not 0 apart. Computed in float64 in blocks of rows, whose number changes nothing.

    Raises ValueError where x or y is not a finite array of that shape with at least two rows, or the two differ in d.
    """
    return energy_distance_of(comparison(x, y))


def energy_distance_of(sets: Comparison) -> float:
    """`energy_distance` of sets whose distances are at hand."""
    return max(0.0, 2 * _mean(sets.xy) - _mean(sets.xx) - _mean(sets.yy))


def _mean(pairs: Pairs) -> float:
    """The mean distance over all pairs."""
    sums = numpy.concatenate([numpy.sqrt(block).sum(axis=1) for _, block in pairs.blocks()])
    return float(sums.sum()) / (len(pairs.x) * len(pairs.y))
