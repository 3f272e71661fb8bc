"""What every metric shares: the check of its arguments, and squared distances in blocks of bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

Array = NDArray[numpy.float64]

BLOCK_BYTES = 64 * 2**20
"""Memory of one block of a pairwise matrix, in bytes: large enough that the loop costs nothing, small beside the features."""


def checked(name: str, values: Any) -> Array:
    """The features `values` as a float64 array of shape (n, d), for a metric to work on.

    `values` is anything that `numpy.asarray` reads, or a tensor on any device, of real numbers. `name` is the word for it in an error.
    Raises ValueError where it is not 2-d, has fewer than two rows or no columns, does not hold real numbers, or is not finite.
    """
    if isinstance(values, torch.Tensor):
        # bfloat16 has no counterpart in numpy, so a floating tensor is widened before it gets there.
        tensor = values.detach().cpu()
        values = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    try:
        array = numpy.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: found rows of different lengths, expected an array of shape (n, d)") from error
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name}: found values of type {array.dtype}, expected real numbers in an array of shape (n, d)")
    if array.ndim != 2:
        raise ValueError(f"{name}: found shape {array.shape}, expected (n, d), one row of features per image; flatten the other axes")
    if array.shape[0] < 2 or array.shape[1] < 1:
        raise ValueError(f"{name}: found shape {array.shape}, expected at least 2 rows and 1 column")
    array = array.astype(numpy.float64)
    wrong = ~numpy.isfinite(array)
    if wrong.any():
        row = int(wrong.any(axis=1).argmax())
        raise ValueError(f"{name}: found {int(wrong.sum())} values that are not finite, the first in row {row}; expected only finite ones")
    return array


def checked_pair(x: Any, y: Any) -> tuple[Array, Array]:
    """The real features `x` (n, d) and the generated features `y` (m, d), both float64.

    Raises ValueError where `checked` does, and where the two differ in d.
    """
    real, generated = checked("x", x), checked("y", y)
    if real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"x and y: found {real.shape[1]} and {generated.shape[1]} features per row, expected the same number; "
            "extract both with the same feature network"
        )
    return real, generated


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cover `rows` rows in order; a float64 block of one slice by `columns` columns takes about BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // (8 * columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclass(frozen=True)
class Pairs:
    """The squared Euclidean distances between the rows of `x` (n, d) and of `y` (m, d), read in blocks of rows.

    Distances are sums of squared differences in float64. The expanded form |x|² + |y|² - 2 x.y is up to ten times faster, but leaves
    rounding where rows coincide: a copied image would then be nearest to one of its two equal neighbors by chance. In the direct form
    equal rows are exactly 0 apart, the matrix of a set with itself is exactly symmetric, and no value depends on the size of a block.

    `kept` is the whole (n, m) matrix, where several metrics are to read it.
    """

    x: Array
    y: Array
    kept: Array | None = None

    def block(self, rows: slice) -> Array:
        """The squared distances of the given rows of x to all rows of y, shape (rows, m). Not to be written to."""
        if self.kept is not None:
            return self.kept[rows]
        squared: Array = cdist(self.x[rows], self.y, "sqeuclidean")
        return squared

    def blocks(self) -> Iterator[tuple[slice, Array]]:
        """Each slice of rows of x with its block."""
        for rows in row_blocks(len(self.x), len(self.y)):
            yield rows, self.block(rows)

    def whole(self) -> Array:
        """All squared distances, shape (n, m): 8 n m bytes."""
        return self.block(slice(None))


@dataclass(frozen=True)
class Comparison:
    """Real features `x` (n, d), generated features `y` (m, d), and the three sets of squared distances between their rows."""

    x: Array
    y: Array
    xx: Pairs
    xy: Pairs
    yy: Pairs


def comparison(x: Any, y: Any, keep: bool = False) -> Comparison:
    """The checked arguments of a metric with their squared distances.

    With `keep`, the three matrices are computed once and held, 8 (n² + n m + m²) bytes; without, each reader computes its own blocks.
    Raises ValueError where `checked_pair` does.
    """
    real, generated = checked_pair(x, y)
    pairs = [Pairs(real, real), Pairs(real, generated), Pairs(generated, generated)]
    if keep:
        pairs = [Pairs(each.x, each.y, each.whole()) for each in pairs]
    return Comparison(real, generated, *pairs)


def neighbor_distances(itself: Pairs, k: int) -> Array:
    """The squared distance of each row to its k-th nearest other row in the same set, shape (n,). `itself` pairs a set with itself.

    k is 1 to n - 1. A row is 0 from itself and nothing is nearer, so leaving it out is to skip the first value in order.
    """
    # A column of its own: a view would hold its whole block until the last one is done.
    return numpy.concatenate([numpy.partition(block, k, axis=1)[:, k].copy() for _, block in itself.blocks()])
