"""What guidance lowers: energies of images, one file per group, composed with ``+``, ``*`` and ``between``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .classification import cross_entropy, disagreement
from .image import diversity, diversity_at, l2, total_variation
from .likelihood import posterior_kl, posterior_kl_at, reconstruction, typicality
from .statistics import activation_summary, batchnorm, relative_batchnorm
from .view import DeadEnergy, Energy, Look, Score, Term, View, energy, finite, gradient

__all__ = [
    "ENERGIES",
    "DeadEnergy",
    "Energy",
    "Look",
    "Score",
    "Term",
    "View",
    "activation_summary",
    "batchnorm",
    "cross_entropy",
    "disagreement",
    "diversity",
    "diversity_at",
    "energy",
    "finite",
    "gradient",
    "l2",
    "posterior_kl",
    "posterior_kl_at",
    "reconstruction",
    "relative_batchnorm",
    "total_variation",
    "typicality",
]

ENERGIES: Mapping[str, Energy | Callable[..., Energy]] = {
    "cross_entropy": cross_entropy,
    "batchnorm": batchnorm,
    "relative_batchnorm": relative_batchnorm,
    "activation_summary": activation_summary,
    "disagreement": disagreement,
    "posterior_kl": posterior_kl,
    "reconstruction": reconstruction,
    "total_variation": total_variation,
    "l2": l2,
    "diversity": diversity,
    "typicality": typicality,
}
"""The energies that a recipe may name. ``activation_summary`` and ``typicality`` are functions that make one of a teacher's."""
