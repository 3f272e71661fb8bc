"""Energies of labels: what a classifier says of the images."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Categorical

from ..trace import Trace
from .view import View, energy


def _log_probabilities(trace: Trace, who: str, wanted_by: str) -> Tensor:
    dist = trace.out.dist
    if not isinstance(dist, Categorical):
        raise ValueError(f"{wanted_by} wants a {who} that classifies; this one infers a {type(dist).__name__}")
    return dist.logits.float().log_softmax(-1)


@energy
def cross_entropy(view: View) -> Tensor:
    """-log p(label | image) of the teacher in nats, ``(batch,)``.

    Raises:
        ValueError: no labels, one that the teacher does not have, or a teacher that does not classify.
    """
    log_p = _log_probabilities(view.trace, "teacher", "cross_entropy")
    labels = view.labels
    # On a GPU a label out of range would not be an error but the end of the process.
    if labels.min() < 0 or labels.max() >= log_p.shape[1]:
        raise ValueError(f"labels from {int(labels.min())} to {int(labels.max())}; the teacher has classes 0 to {log_p.shape[1] - 1}")
    return -log_p.gather(1, labels[:, None])[:, 0]


@energy
def disagreement(view: View) -> Tensor:
    """1 - the Jensen-Shannon divergence of teacher and student in bits, ``(batch,)``: 1 where they agree, 0 where they contradict.

    Bounded, so that images cannot win by being extreme: the competition term of Yin et al., "Dreaming to Distill:
    Data-free Knowledge Transfer via DeepInversion", CVPR 2020.

    Raises:
        ValueError: no student, one with other classes, or a model that does not classify.
    """
    log_p = _log_probabilities(view.trace, "teacher", "disagreement")
    log_q = _log_probabilities(view.rival, "student", "disagreement")
    if log_p.shape != log_q.shape:
        raise ValueError(f"the teacher has {log_p.shape[1]} classes, the student {log_q.shape[1]}; disagreement wants the same")
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    divergence = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(1)
    return (1 - divergence / math.log(2)).clamp(0, 1)
