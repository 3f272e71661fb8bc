"""Energies of a teacher with latents: how well it explains the images, in nats."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..divergence import latent_kl, per_sample
from ..errors import BadInput
from ..model import Model
from ..noise import Noise
from ..trace import Point, run
from .view import Energy, Term, View, energy


def _kl(view: View, nodes: str) -> Tensor:
    divergences = latent_kl(view.trace, nodes)
    if not divergences:
        raise ValueError(f"posterior_kl at {nodes!r} wants a teacher with such latents; this one infers {list(view.trace.latents())}")
    return torch.stack(list(divergences.values())).sum(0)


@energy
def posterior_kl(view: View) -> Tensor:
    """KL(posterior || prior) of the latents that the teacher infers, in nats, ``(batch,)``.

    With :data:`reconstruction` it is the negative ELBO.

    Raises:
        ValueError: the teacher infers no latents.
    """
    return _kl(view, "*")


def posterior_kl_at(nodes: str) -> Energy:
    """:data:`posterior_kl` of the latents whose names match a shell pattern alone, such as one level; named ``posterior_kl NODES``.

    Raises:
        ValueError: when it looks, at a teacher that infers no such latents.
    """
    return Energy((Term(f"posterior_kl {nodes}", lambda view: _kl(view, nodes)),))


@energy
def reconstruction(view: View) -> Tensor:
    """-log p(image | latents inferred from it) in nats, ``(batch,)``; half the squared error where the output is a plain tensor.

    Raises:
        ValueError: the teacher does not decode what it infers to images.
    """
    out = view.trace.out.dist
    shape = tuple(out.batch_shape + out.event_shape)
    if shape != tuple(view.encoded.shape):
        raise ValueError(f"reconstruction wants a teacher that decodes images; this one gives a {type(out).__name__} of shape {shape}")
    if isinstance(out, Point):
        return 0.5 * per_sample((out.value - view.encoded) ** 2)
    return -per_sample(out.log_prob(view.encoded))


def _by_node(view: View) -> dict[str, Tensor]:
    """The negative ELBO by node, each ``(batch,)``."""
    return {**latent_kl(view.trace), "out": reconstruction(view)}


@torch.no_grad()
def typicality(
    teacher: Model,
    noise: Noise,
    n: int = 512,
    per_node: bool = False,
    observe: Literal["mean", "sample"] = "sample",
    batch: int = 64,
) -> Energy:
    """How far the teacher's negative ELBO of an image lies from the values it gives its own samples, ``(batch,)``.

    The most probable image is no typical one: where a model is sure of blank or blurred images, their negative ELBO is below that
    of its samples, and a plain ELBO collapses to them (Nalisnick et al., "Detecting Out-of-Distribution Inputs to Deep Generative
    Models Using Typicality", 2019). So each image has a target, the negative ELBO of one sample of the teacher, chosen by the view's
    noise at its row: together they are distributed as the teacher's own. The energy is 0.5 ((value - target) / sd)², with the
    standard deviation of the samples' values.

    Args:
        teacher: the one that will look; it generates and infers, and is in eval mode.
        noise: of the samples.
        n: samples.
        per_node: compare each node's part of the negative ELBO with the same sample's, and add up.
        observe: "sample" to draw samples from the output's conditional, noise and all, as the model says that images come;
            "mean" for its mean, where the output's spread is a modeling choice that real images do not show.
        batch: samples at a time.

    Raises:
        ValueError: fewer than 2 samples, or a teacher that does not generate, or does not decode what it infers.
        BadInput: the negative ELBO of a sample is not finite.
    """
    if n < 2:
        raise ValueError(f"typicality from {n} samples; at least 2 are needed for a standard deviation")

    def values(view: View) -> Tensor:
        parts = torch.stack(list(_by_node(view).values()), 1)
        return parts if per_node else parts.sum(1, keepdim=True)

    found = []
    source = noise.fold("typicality")
    for start in range(0, n, batch):
        rows = range(start, min(start + batch, n))
        drawn = run(teacher.program("generate"), noise=source.at(rows), n=len(rows), device=teacher.device)
        x = drawn.output if observe == "sample" else drawn.out.dist.mean
        x = teacher.images.clip(teacher.images.decode(x).float())
        found.append(values(View(x, teacher, noise=source.fold("infer").at(rows))))
    typical = torch.cat(found)
    if not typical.isfinite().all():
        raise BadInput("typicality: the teacher's negative ELBO of its own samples is NaN or infinite; look at its weights")
    sd = typical.std(0)
    sd = torch.where(sd > 1e-6 * typical.abs().amax(0), sd, 1)  # of a teacher that always says the same, but for rounding: one nat

    def score(view: View) -> Tensor:
        chosen = (view.noise.uniform("typicality", (len(view), 1), view.x.device)[:, 0] * n).long().clamp_max(n - 1)
        return 0.5 * (((values(view) - typical.to(view.x.device)[chosen]) / sd.to(view.x.device)) ** 2).sum(1)

    return Energy((Term("typicality", score),))
