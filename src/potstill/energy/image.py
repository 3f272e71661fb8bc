"""Energies of the pixels alone: no network looks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..divergence import per_sample
from .view import Energy, Term, View, energy


@energy
def total_variation(view: View) -> Tensor:
    """Sum of the absolute differences of neighboring pixels, ``(batch,)``: low for smooth images.

    Rudin, Osher and Fatemi, "Nonlinear total variation based noise removal algorithms", Physica D 1992; anisotropic.
    """
    down, right = view.x.diff(dim=2).abs(), view.x.diff(dim=3).abs()
    return per_sample(down) + per_sample(right)


@energy
def l2(view: View) -> Tensor:
    """Half the squared norm of the images in the teacher's own range, ``(batch,)``: low near the mean image.

    In nats, up to a constant, of pixels that are standard normal in that range.
    """
    return 0.5 * per_sample(view.encoded**2)


def diversity_at(scale: float) -> Energy:
    """Similarity of the images of a batch, low where they differ: the mean of 1 / (1 + d / scale) over all pairs, ``()``.

    ``d`` is the root mean square difference of two images' pixels. Between 0 and 1, so that images cannot win by being
    extreme; near copies are pushed hardest, and pairs far apart still feel it. 0 for a batch of one.

    Args:
        scale: the ``d`` at which two images count as half alike.

    Raises:
        ValueError: the scale is not above 0.
    """
    if not scale > 0:
        raise ValueError(f"diversity at a scale of {scale}; it must be above 0")

    def diversity(view: View) -> Tensor:
        distances = torch.pdist(view.x.flatten(1)) / math.sqrt(view.x[0].numel())
        return (1 / (1 + distances / scale)).sum() / max(len(distances), 1)

    return Energy((Term("diversity", diversity),))


diversity = diversity_at(0.35)  # as far apart as two photographs, or two handwritten digits, usually are
