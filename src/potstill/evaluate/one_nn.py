"""The 1-nearest-neighbor test: can a neighbor tell a generated image from a real one?"""

from __future__ import annotations

from typing import Any

import numpy

from potstill.evaluate._arrays import Comparison, comparison, neighbor_distances


def one_nn(x: Any, y: Any) -> float:
    """Leave-one-out accuracy of a 1-nearest-neighbor classifier of real `x` (n, d) against generated `y` (m, d), in [0, 1].

    0.5 is perfect for n = m: real and generated rows mix. 1 is told apart without error, 0 is copied: every row has a twin in the other
    set. Lopez-Paz and Oquab, "Revisiting Classifier Two-Sample Tests" (ICLR 2017); Xu et al., "An empirical study on evaluation metrics
    of generative adversarial networks" (2018).

    As in the published code, the rows of [x; y] are stacked, each is left out in turn, and the label of the nearest other row is the
    prediction. The first of equally near rows counts, so a tie goes to x. (The published code's `topk` does so from 64 rows up; below
    that it takes any.) The accuracy is rounded to float32, as published, so that figures agree to the last digit: 482 of 500 is
    0.9639999866485596. Computed in float64 in blocks of rows, whose number changes nothing.

    Raises ValueError where x or y is not a finite array of that shape with at least two rows, or the two differ in d.
    """
    return one_nn_of(comparison(x, y))


def one_nn_of(sets: Comparison) -> float:
    """`one_nn` of sets whose distances are at hand."""
    real_to_generated = numpy.empty(len(sets.x))
    generated_to_real = numpy.full(len(sets.y), numpy.inf)
    for rows, block in sets.xy.blocks():
        real_to_generated[rows] = block.min(axis=1)
        numpy.minimum(generated_to_real, block.min(axis=0), out=generated_to_real)
    right_in_real = neighbor_distances(sets.xx, 1) <= real_to_generated
    right_in_generated = neighbor_distances(sets.yy, 1) < generated_to_real
    right = int(right_in_real.sum()) + int(right_in_generated.sum())
    return float(numpy.float32(right / (len(sets.x) + len(sets.y))))
