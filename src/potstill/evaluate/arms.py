"""The figures of one model: its samples against real ones, its reconstructions, its cost."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..divergence import has_priors, kl, latent_kl, per_sample, sampled_kl, shape_of, total
from ..energy.view import Energy, Look
from ..model import Model
from ..noise import Noise
from ..trace import Point, run
from . import distances
from .cost import Latency, latency
from .features import Features


def samples(model: Model, n: int, noise: Noise, batch: int) -> Tensor:
    """``(n, C, H, W)`` in [0, 1] on the CPU; image ``i`` is row ``i`` of the noise."""
    return torch.cat([model.sample(min(batch, n - i), noise.at(range(i, min(i + batch, n)))).float().cpu() for i in range(0, n, batch)])


@torch.no_grad()
def reconstructions(model: Model, x: Tensor, noise: Noise, batch: int) -> tuple[Tensor, dict[str, float]]:
    """Images through a model's latents and back.

    Args:
        model: one that infers.
        x: ``(n, C, H, W)`` in [0, 1].
        noise: of the posterior's samples; image ``i`` uses row ``i``.
        batch: images at a time.

    Returns:
        The reconstructions, pixels clipped to [0, 1], on the CPU, and ``reconstruction_mse`` (per pixel), ``kl`` (nats per image, all
        latents; from one sample where inference knows no priors) and ``nelbo``, the negative ELBO in nats per image, where the output
        has a density: |x - reconstruction|^2 / (2 std^2) + kl, without the Gaussian's constant, where that is a normal.
    """
    outputs, errors, divergences, distortions = [], [], [], []
    for i in range(0, len(x), batch):
        part = x[i : i + batch].to(model.device)
        encoded = model.images.encode(part)
        trace = run(model.program("infer"), encoded, noise=noise.at(range(i, i + len(part))))
        mean = trace.out.dist.mean
        output = model.images.clip(model.images.decode(mean))
        outputs.append(output.float().cpu())
        errors.append(per_sample((output - part) ** 2).cpu() / part[0].numel())
        if has_priors(trace):
            divergences.append(sum(latent_kl(trace).values(), torch.zeros(len(part), device=part.device)).cpu())
        else:
            given = {name: node.value for name, node in trace.latents().items()}
            generative = run(model.program("generate"), noise=noise, n=len(part), given=given, device=model.device)
            divergences.append(sampled_kl(trace, generative).cpu())
        if isinstance(trace.out.dist, torch.distributions.Normal):
            distortions.append(per_sample((encoded - mean) ** 2 / (2 * trace.out.dist.scale**2)).cpu())
        elif not isinstance(trace.out.dist, Point):
            distortions.append(-per_sample(trace.out.dist.log_prob(encoded)).cpu())
    nats = torch.cat(divergences)
    figures = {"reconstruction_mse": torch.cat(errors).double().mean().item(), "kl": nats.double().mean().item()}
    if distortions:
        figures["nelbo"] = (torch.cat(distortions) + nats).double().mean().item()
    return torch.cat(outputs), figures


@torch.no_grad()
def posterior_agreement(teacher: Model, student: Model, x: Tensor, noise: Noise, batch: int) -> float | None:
    """KL(teacher || student) of what the two infer from images, in nats per image, summed over the latents.

    Every latent takes the value that the teacher infers, so both conditionals are given the same.

    Args:
        teacher: one that infers.
        student: likewise.
        x: ``(n, C, H, W)`` in [0, 1].
        noise: of the teacher's latents; image ``i`` uses row ``i``.
        batch: images at a time.

    Returns:
        ``None`` where there is nothing to compare: the two have other latents, or the teacher's are points, which have no density.
    """
    names, found = _shared_latents(teacher, student, x[:1], noise), []
    if not names:
        return None
    for i in range(0, len(x), batch):
        part, own = x[i : i + batch].to(teacher.device), noise.at(range(i, min(i + batch, len(x))))
        ours = run(teacher.program("infer"), teacher.images.encode(part), noise=own)
        given = {name: node.value for name, node in ours.latents().items()}
        theirs = run(student.program("infer"), student.images.encode(part), noise=own, given=given)
        found.append(total({name: kl(ours[name].dist, theirs[name].dist) for name in names}).cpu())
    return torch.cat(found).double().mean().item()


def _shared_latents(teacher: Model, student: Model, x: Tensor, noise: Noise) -> list[str]:
    """Names of the teacher's latents that are no points, if the student infers the same; none otherwise."""
    ours, theirs = (run(m.program("infer"), m.images.encode(x.to(m.device)), noise=noise) for m in (teacher, student))
    kinds = [{name: (type(node.dist), shape_of(node.dist)) for name, node in trace.latents().items()} for trace in (ours, theirs)]
    return [name for name, (kind, _) in kinds[0].items() if kind is not Point] if kinds[0] == kinds[1] else []


@torch.no_grad()
def labels_of(model: Model, x: Tensor, batch: int) -> NDArray[numpy.int64]:
    """The label ``(n,)`` that a classifier gives to each of the images ``(n, C, H, W)`` in [0, 1]."""
    found = []
    for i in range(0, len(x), batch):
        part = x[i : i + batch].to(model.device)
        found.append(run(model.program("infer"), model.images.encode(part), noise=Noise((0,))).out.dist.logits.argmax(-1).cpu())
    labels: NDArray[numpy.int64] = torch.cat(found).numpy()
    return labels


def accuracy(model: Model, x: Tensor, labels: NDArray[numpy.int64], batch: int) -> float:
    """Share of images ``(n, C, H, W)`` in [0, 1] to which a classifier gives their label; labels ``(n,)``."""
    return float((labels_of(model, x, batch) == labels).mean())


@torch.no_grad()
def energies(energy: Energy, model: Model, x: Tensor, labels: Tensor | None, noise: Noise, batch: int) -> dict[str, NDArray[numpy.float32]]:
    """Each term of an energy, weighted, whatever its schedule, ``(n,)`` by name; one that wants what is not there is left out.

    Args:
        energy: as a synthesis lowers it.
        model: the teacher.
        x: ``(n, C, H, W)`` in [0, 1].
        labels: ``(n,)`` int64, or ``None``.
        noise: of the latents that are inferred; image ``i`` uses row ``i``.
        batch: images at a time, on which terms that look at a batch as a whole depend.
    """
    parts: dict[str, list[Tensor]] = {term.name: [] for term in energy.terms}
    for i in range(0, len(x), batch):
        rows = range(i, min(i + batch, len(x)))
        look = Look(model, None, None if labels is None else labels[i : rows.stop].to(model.device), noise.at(rows))
        view = look(x[i : rows.stop].to(model.device))
        for term in energy.terms:
            if term.name in parts:
                try:
                    parts[term.name] += Energy((term,)).parts(view, every=True).values()
                except ValueError:  # such as labels of images that have none
                    del parts[term.name]
    return {name: torch.cat(found).cpu().numpy() for name, found in parts.items() if found}


def quality(generated: Tensor, real: NDArray[numpy.float32], features: Features, k: int) -> dict[str, float]:
    """Every distance of section "evaluation" between generated images and the features of real ones."""
    return distances(real, features(generated), k=k)


def shares(generated: NDArray[numpy.float32], real: NDArray[numpy.float32], groups: Mapping[str, NDArray[numpy.int64]]) -> dict[str, float]:
    """Share of the samples whose nearest real image, of those in any group, is in each.

    Args:
        generated: features ``(n, d)``.
        real: features ``(m, d)``.
        groups: rows of the real images, by name.
    """
    rows, owners = numpy.concatenate([*groups.values()]), numpy.repeat([*groups], [len(found) for found in groups.values()])
    distances = torch.cdist(torch.from_numpy(generated).double(), torch.from_numpy(real[rows]).double())
    nearest = owners[distances.argmin(1).numpy()]
    return {name: float((nearest == name).mean()) for name in groups}


class _Remembered:
    """Noise that is drawn once: what is timed is the network, not the generator of random numbers, which a user may replace."""

    def __init__(self, noise: Noise):
        self._noise = noise
        self._drawn: dict[str, Tensor] = {}

    def normal(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        if name not in self._drawn:
            self._drawn[name] = self._noise.normal(name, shape, device)
        return self._drawn[name]

    def uniform(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        if name not in self._drawn:
            self._drawn[name] = self._noise.uniform(name, shape, device)
        return self._drawn[name]


def _sampler(model: Model) -> Callable[[int], Tensor]:
    noise = _Remembered(Noise((0, "latency")))
    return lambda n: model.sample(n, noise)


def _inferrer(model: Model) -> Callable[[int], Tensor]:
    noise = _Remembered(Noise((0, "latency")))
    x = model.images.encode(Noise((0, "latency")).uniform("x", (64, *model.images.shape), model.device))

    def infer(n: int) -> Tensor:
        out = run(model.program("infer"), x[:n], noise=noise).out.dist
        return out.logits if isinstance(out, torch.distributions.Categorical) else out.mean

    return infer


def timed(model: Model, batch: int, threads: int, repeats: int) -> Latency:
    """The time of a batch, with that many threads on a CPU.

    Its images are generated; by a model that does not generate, they are classified or reconstructed.
    """
    make = _inferrer if model.generate is None else _sampler
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return latency(make(model), batch, device=model.device, repeats=repeats)
    finally:
        torch.set_num_threads(before)


def cost(model: Model, threads: int, repeats: int) -> dict[str, float]:
    """Latency of 1 and 64 images, in ms, as :func:`timed` has it, and images per second at 64."""
    one, many = (timed(model, batch, threads, repeats) for batch in (1, 64))
    return {
        "latency_ms_b1": one.median_ms,
        "latency_ms_b64": many.median_ms,
        "latency_iqr_ms_b1": one.iqr_ms,
        "latency_iqr_ms_b64": many.iqr_ms,
        "throughput": 64e3 / many.median_ms,
    }


def over_seeds(figures: Iterable[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (0 for one seed) of each figure."""
    rows = list(figures)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: {"mean": statistics.fmean(v), "sd": statistics.stdev(v) if len(v) > 1 else 0.0} for name, v in columns.items()}
