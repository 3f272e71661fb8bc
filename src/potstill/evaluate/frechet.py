"""The Fréchet distance between two feature sets, each seen as a Gaussian."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy

from potstill.evaluate._arrays import Array, checked_pair


def frechet(x: Any, y: Any) -> float:
    """Squared Fréchet distance between Gaussians fitted to `x` (n, d) and `y` (m, d): 0 for equal moments, no upper bound.

        ‖mean_x - mean_y‖² + tr(A) + tr(B) - 2 tr((A B)^(1/2)),    A, B the unbiased covariances

    in squared units of the features, computed in float64. This is the standard figure; some publications report its square root.
    On Inception features it is the FID of Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash
    Equilibrium" (NeurIPS 2017); on other features, name them. The closed form is from Dowson and Landau, "The Fréchet distance between
    multivariate normal distributions" (Journal of Multivariate Analysis, 1982).

    No square root of a d x d matrix is taken. With the rows of X centered and divided by sqrt(n - 1), A = X'X, and likewise B = Y'Y.
    A B = X' (X Y' Y) and (X Y' Y) X' = (X Y')(X Y')' have the same nonzero eigenvalues, because swapping the two factors of a product
    keeps them. So the eigenvalues of A B are the squared singular values of X Y', and tr((A B)^(1/2)) is the sum of these singular
    values, the nuclear norm of the n x m cross Gram matrix X Y'. Where n is above d, X = Q R with orthonormal columns in Q, which
    leave singular values alone, so the triangle R (d x d) stands for X; the same holds for Y. The matrix is therefore never larger
    than min(n, d) x min(m, d). Nothing is inverted, and no root is taken of a rounded eigenvalue, so singular covariances (n below d,
    dead features) lose no digits, and the result is real. Rounding alone could make it negative: it is cut off at 0.

    Raises ValueError where x or y is not a finite array of that shape with at least two rows, or the two differ in d.
    """
    real, generated = checked_pair(x, y)
    offset = real.mean(axis=0) - generated.mean(axis=0)
    first, second = _root_of_covariance(real), _root_of_covariance(generated)
    nuclear = numpy.linalg.svd(first @ second.T, compute_uv=False).sum()
    squared = float(offset @ offset + numpy.square(first).sum() + numpy.square(second).sum() - 2 * nuclear)
    return max(squared, 0.0)


def _root_of_covariance(features: Array) -> Array:
    """A matrix F of shape (min(n, d), d) with F'F the unbiased covariance of `features` (n, d)."""
    count, width = features.shape
    centered: Array = (features - features.mean(axis=0)) / math.sqrt(count - 1)
    if count <= width:
        return centered
    # numpy's annotations miss that this mode returns the triangle alone.
    return cast(Array, numpy.linalg.qr(centered, mode="r"))
