"""Maximum mean discrepancy: with a Gaussian kernel (`mmd`), and with the polynomial kernel of KID (`kid`)."""

from __future__ import annotations

import math
from typing import Any

import numpy

from potstill.evaluate._arrays import Array, Comparison, Pairs, checked_pair, comparison, row_blocks


def mmd(x: Any, y: Any) -> float:
    """Maximum mean discrepancy of generated features `y` (m, d) from real features `x` (n, d): 0 for equal sets, below sqrt(2).

    The square root of the biased V-statistic (Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, equation 5),

        mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j),    k(a, b) = exp(-‖a - b‖² / (2 s)),

    means over all pairs, i = j included. The width s is the mean of all ‖x_i - x_j‖², i = j included, so x is the reference and
    `mmd(x, y)` differs from `mmd(y, x)`. It is biased upward: two samples of one distribution are not 0 apart.
    Computed in float64 in blocks of rows, whose number changes nothing.

    Raises ValueError where x or y is not a finite array of that shape with at least two rows, the two differ in d,
    or all rows of x are equal (s would be 0).
    """
    return mmd_of(comparison(x, y))


def mmd_of(sets: Comparison) -> float:
    """`mmd` of sets whose distances are at hand."""
    if (sets.x == sets.x[0]).all():
        raise ValueError(f"x: found {len(sets.x)} equal rows, expected rows that differ: their mean distance is the width of the kernel")
    # The mean of ‖x_i - x_j‖² over all pairs is twice the mean of ‖x_i - mean‖², which needs no pass over the pairs.
    width = 2 * float(numpy.square(sets.x - sets.x.mean(axis=0)).sum(axis=1).mean())
    squared = _kernel_mean(sets.xx, width) + _kernel_mean(sets.yy, width) - 2 * _kernel_mean(sets.xy, width)
    return math.sqrt(max(squared, 0.0))


def _kernel_mean(pairs: Pairs, width: float) -> float:
    """The mean of exp(-squared distance / (2 width)) over all pairs."""
    sums = numpy.concatenate([numpy.exp(block / (-2 * width)).sum(axis=1) for _, block in pairs.blocks()])
    return float(sums.sum()) / (len(pairs.x) * len(pairs.y))


def kid(x: Any, y: Any) -> float:
    """Kernel distance between `x` (n, d) and `y` (m, d): about 0 for samples of one distribution, then also below 0; no upper bound.

    The unbiased estimate of the squared maximum mean discrepancy (Gretton et al., JMLR 2012, equation 3) with the kernel
    k(a, b) = (a.b / d + 1)³ of Bińkowski et al., "Demystifying MMD GANs" (ICLR 2018): the mean of k over pairs i ≠ j of x, plus the
    same of y, minus twice the mean over all pairs of x and y. On Inception features it is the KID; on other features, name them.

    All rows are used at once. Other implementations average over random subsets of 1,000 rows (100 by default), which has the same
    expectation, more noise, and a random state; this one is deterministic. Computed in float64 in blocks of rows.

    Raises ValueError where x or y is not a finite array of that shape with at least two rows, or the two differ in d.
    """
    real, generated = checked_pair(x, y)
    cross = _cubic_sum(real, generated) / (len(real) * len(generated))
    return _cubic_mean_of_others(real) + _cubic_mean_of_others(generated) - 2 * cross


def _cubic_sum(first: Array, second: Array) -> float:
    """The sum of (a.b / d + 1)³ over all pairs of rows a and b."""
    width = first.shape[1]
    sums = [_cubic(first[rows] @ second.T, width).sum(axis=1) for rows in row_blocks(len(first), len(second))]
    return float(numpy.concatenate(sums).sum())


def _cubic_mean_of_others(features: Array) -> float:
    """The mean of (a.b / d + 1)³ over all ordered pairs of different rows of one set."""
    count = len(features)
    diagonal = _cubic(numpy.square(features).sum(axis=1), features.shape[1])
    return (_cubic_sum(features, features) - float(diagonal.sum())) / (count * (count - 1))


def _cubic(products: Array, width: int) -> Array:
    """The kernel (a.b / d + 1)³ from inner products a.b of features of width d."""
    base = products / width + 1
    # Several times as fast as base ** 3, which goes through a general power.
    return base * base * base
