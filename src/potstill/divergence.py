"""Compare two traces node by node, and score one trace: the losses of the library, each ``(batch,)``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal, kl_divergence, register_kl

from .trace import Node, Point, Trace

Divergence = Callable[[Distribution, Distribution], Tensor]
"""(teacher's conditional, student's conditional) -> one number per sample, ``(batch,)``."""


def per_sample(x: Tensor) -> Tensor:
    """``(batch, ...)`` summed to ``(batch,)``."""
    return x.reshape(len(x), -1).sum(1)


@register_kl(Point, Point)
def _kl_point_point(p: Point, q: Point) -> Tensor:
    # sigma^2 times the KL between normals of one std around the two points, which is infinite in the limit.
    return 0.5 * (p.value - q.value) ** 2


@register_kl(Point, Normal)
@register_kl(Point, Categorical)
def _kl_point(p: Point, q: Distribution) -> Tensor:
    # The negative log-likelihood of a known value: the KL but for the point's own entropy, which does not depend on q.
    return -q.log_prob(p.value)


def _kl_bernoulli(p: Bernoulli, q: Bernoulli) -> Tensor:
    # Closed form from logits: torch's own goes through probabilities and masks, four times slower.
    a, b = p.logits, q.logits
    return F.softplus(b) - F.softplus(a) - a.sigmoid() * (b - a)


def _elementwise_kl(p: Distribution, q: Distribution) -> Tensor:
    if isinstance(p, Independent) and isinstance(q, Independent):
        return _elementwise_kl(p.base_dist, q.base_dist)
    if isinstance(p, Bernoulli) and isinstance(q, Bernoulli):
        return _kl_bernoulli(p, q)
    if type(p) is Normal and type(q) is Normal:
        # torch's formula, but for the logarithm of the squared ratio: a narrow normal's underflows, and its KL would be infinite.
        ratio = p.scale / q.scale
        return 0.5 * (ratio**2 + ((p.loc - q.loc) / q.scale) ** 2 - 1) - ratio.log()
    return kl_divergence(p, q)


def kl(p: Distribution, q: Distribution) -> Tensor:
    """KL(teacher || student) in nats; half the squared error between two points."""
    return per_sample(_elementwise_kl(p, q))


def reverse_kl(p: Distribution, q: Distribution) -> Tensor:
    """KL(student || teacher) in nats."""
    return kl(q, p)


def wasserstein2(p: Normal, q: Normal) -> Tensor:
    """Squared 2-Wasserstein distance between diagonal Gaussians: squared difference of the means plus that of the stds, summed."""
    return per_sample((p.loc - q.loc) ** 2 + (p.scale - q.scale) ** 2)


def mse(p: Distribution, q: Distribution) -> Tensor:
    """Squared difference of the means, summed over the node."""
    return per_sample((p.mean - q.mean) ** 2)


def hinton(temperature: float) -> Divergence:
    """KL between class distributions softened by a temperature, times its square (Hinton et al., 2015).

    The square keeps the gradient's size when the temperature changes. Raises ValueError unless the temperature is above 0.
    """
    if not temperature > 0:
        raise ValueError(f"Hinton's temperature is {temperature}; it must be above 0")

    def divergence(p: Categorical, q: Categorical) -> Tensor:
        log_p, log_q = (F.log_softmax(d.logits / temperature, -1) for d in (p, q))
        return temperature**2 * per_sample(log_p.exp() * (log_p - log_q))

    return divergence


@dataclass(frozen=True)
class Match:
    """Which nodes to compare, how, and how much. The first rule that matches a node wins.

    Args:
        nodes: shell pattern of node names.
        by: the divergence.
        weight: factor; a node matched with weight 0 is left out.
        reduce: "sum" over the node's elements, or their "mean", which makes the weight independent of the node's size.
    """

    nodes: str = "*"
    by: Divergence = kl
    weight: float = 1.0
    reduce: Literal["sum", "mean"] = "sum"


def shape_of(dist: Distribution) -> tuple[int, ...]:
    """Of a value of the distribution: ``(batch, ...)``."""
    return tuple(dist.batch_shape + dist.event_shape)


def compare(teacher: Trace, student: Trace, rules: Sequence[Match] = (Match(),)) -> dict[str, Tensor]:
    """Weighted divergence at every matched node, each ``(batch,)``.

    Raises:
        KeyError: the student has no node of a matched name.
        ValueError: two matched nodes differ in shape, or no rule matches any node.
    """
    losses: dict[str, Tensor] = {}
    seen: set[str] = set()
    for rule in rules:
        for name in teacher:
            if name in seen or not fnmatchcase(name, rule.nodes):
                continue
            seen.add(name)
            if not rule.weight:
                continue
            if name not in student:
                raise KeyError(f"the student has no node {name!r}; it has {list(student)}. Rename one, or match fewer nodes")
            p, q = teacher[name].dist, student[name].dist
            shape, other = shape_of(p), shape_of(q)
            if shape != other:
                raise ValueError(
                    f"node {name!r} is {shape} in the teacher and {other} in the student; match nodes of one shape, or leave it out"
                )
            scale = rule.weight / math.prod(shape[1:]) if rule.reduce == "mean" else rule.weight
            losses[name] = scale * rule.by(p, q)
    if not losses:
        raise ValueError(f"no rule matches any of the teacher's nodes {list(teacher)}")
    return losses


def total(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the parts, ``(batch,)``."""
    return torch.stack(list(losses.values())).sum(0)


def latent_kl(trace: Trace, nodes: str = "*") -> dict[str, Tensor]:
    """KL(posterior || prior) of every latent node of an inference trace, in nats, each ``(batch,)``.

    A node's prior is the one that the program handed over; without one, a normal's prior is standard. What the program observes is
    left out: a node whose prior is its own conditional.

    Args:
        trace: of an inference program.
        nodes: shell pattern of the latents' names.

    Raises:
        ValueError: a latent that is not normal has no prior.
    """
    divergences = {}
    for name, node in trace.latents().items():
        if not fnmatchcase(name, nodes) or node.prior is node.dist:
            continue
        prior = node.prior
        if prior is None:
            if not isinstance(node.dist, Normal):
                raise ValueError(
                    f"node {name!r} is a {type(node.dist).__name__} without a prior; hand one over: sample({name!r}, q, prior=p)"
                )
            prior = Normal(torch.zeros_like(node.dist.loc), torch.ones_like(node.dist.scale), validate_args=False)
        divergences[name] = kl(node.dist, prior)
    return divergences


def has_priors(trace: Trace) -> bool:
    """Whether every latent of an inference trace has its prior at hand, so that :func:`latent_kl` and :func:`negative_elbo` know it."""
    return all(node.prior is not None or isinstance(node.dist, Normal) for node in trace.latents().values())


def log_density(nodes: Iterable[Node]) -> Tensor:
    """Log density of the nodes' values under their conditionals, in nats, summed: ``(batch,)``. Point masses are left out."""
    return torch.stack([per_sample(node.dist.log_prob(node.value)) for node in nodes if not isinstance(node.dist, Point)]).sum(0)


def sampled_kl(posterior: Trace, generative: Trace) -> Tensor:
    """log q - log p of the latents' values, in nats, ``(batch,)``: an unbiased estimate of KL(posterior || prior) from one sample.

    For an inference program whose order is not the generator's, such as that of a Helmholtz machine: the prior of a latent then hangs
    on latents inferred after it, and node by node there is no closed form.

    Args:
        posterior: of an inference program.
        generative: of the generator, given the posterior's values.
    """
    inferred = {name: node for name, node in posterior.latents().items() if not isinstance(node.dist, Point)}
    return log_density(inferred.values()) - log_density(generative[name] for name in inferred)


def negative_elbo(trace: Trace, x: Tensor) -> dict[str, Tensor]:
    """The negative evidence lower bound of ``x`` in nats, by node: the KL of each latent, and ``out``, the negative log-likelihood.

    Args:
        trace: of an inference program run on ``x``.
        x: ``(batch, ...)`` in the network's own range.
    """
    out = trace.out.dist
    if isinstance(out, Point):
        raise ValueError(
            "the inference program returns a plain tensor, which has no likelihood; return a distribution such as Normal(x, 0.1)"
        )
    return {**latent_kl(trace), "out": -per_sample(out.log_prob(x))}
