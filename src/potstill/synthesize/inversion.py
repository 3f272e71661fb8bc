"""Images optimized from noise: pixels (Yin et al., "Dreaming to distill", CVPR 2020), or the noise of a generator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..energy.view import Energy, Look, gradient
from ..model import Model
from ..noise import FixedNoise, Noise
from ..trace import run
from .guided import check_fit, fitted
from .synthesis import Step, Watch


@dataclass(frozen=True)
class Inversion:
    """Pixels from noise, by Adam.

    Args:
        shape: ``(C, H, W)`` of the teacher's images.
        steps: updates.
        lr: of Adam, on the logits of the pixels.
        jitter: largest shift in pixels, drawn anew for each update, so that no feature depends on its exact position.
    """

    shape: tuple[int, int, int]
    steps: int = 200
    lr: float = 0.1
    jitter: int = 0

    def __call__(self, energy: Energy, look: Look, n: int, noise: Noise, watch: Watch | None = None) -> Tensor:
        """``(n, C, H, W)`` float32 in [0, 1]; the arguments are those of :class:`potstill.synthesize.guided.Guided`."""
        logits = noise.normal("pixels", (n, *self.shape), look.teacher.device).requires_grad_()

        def images(step: int) -> Tensor:
            x = logits.sigmoid()
            if not self.jitter:
                return x
            u = noise.fold("jitter", step).uniform("shift", (n, 2))
            shifts = (u * (2 * self.jitter + 1)).long().sub(self.jitter).tolist()
            return torch.stack([image.roll(tuple(shift), (1, 2)) for image, shift in zip(x, shifts, strict=True)])

        _descend(energy, look, logits, images, self.steps, self.lr, watch)
        return logits.detach().sigmoid()


@dataclass(frozen=True)
class LatentInversion:
    """The noise of a generator, by Adam: a GAN's, a VAE's, or the latents of a diffusion prior's decoder.

    Args:
        generator: a model that generates; frozen.
        shape: ``(C, H, W)`` of the teacher's images, to which its own are converted.
        steps: updates.
        lr: of Adam, on standard noise.
        pull: weight of the noise's own energy, half its squared norm in nats, which keeps it where the generator was trained.

    Raises:
        BadInput: the generator's images cannot be converted to that shape.
    """

    generator: Model
    shape: tuple[int, int, int]
    steps: int = 100
    lr: float = 0.05
    pull: float = 0.1

    def __post_init__(self) -> None:
        check_fit(self.generator.images.shape, self.shape, "generator")

    def __call__(self, energy: Energy, look: Look, n: int, noise: Noise, watch: Watch | None = None) -> Tensor:
        """``(n, C, H, W)`` float32 in [0, 1]; the arguments are those of :class:`potstill.synthesize.guided.Guided`."""
        model = self.generator
        program, asked = model.program("generate"), _Asked(noise)
        with torch.no_grad():  # which noise does the program ask for?
            _ = run(program, noise=asked, n=n, device=model.device).out.dist.mean
        leaf = torch.cat([value.flatten(1) for value in asked.values.values()], 1).requires_grad_()
        shapes = {name: value.shape for name, value in asked.values.items()}

        def images(_: int) -> Tensor:
            parts = leaf.split([prod(shape[1:]) for shape in shapes.values()], 1)
            values = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
            trace = run(program, noise=FixedNoise(values), n=n, device=model.device)
            return fitted(model.images.decode(trace.out.dist.mean).float(), self.shape)

        _descend(energy, look, leaf, images, self.steps, self.lr, watch, self.pull)
        with torch.no_grad():
            return images(self.steps).clamp(0, 1)


class _Asked:
    """A source that keeps what it was asked for."""

    def __init__(self, noise: Noise):
        self._noise, self.values = noise, dict[str, Tensor]()

    def normal(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        self.values[name] = self._noise.normal(name, shape, device)
        return self.values[name]

    def uniform(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        raise ValueError(f"node {name!r} is discrete, and its noise has no gradient; invert a generator with continuous noise")


def _descend(
    energy: Energy,
    look: Look,
    leaf: Tensor,
    images: Callable[[int], Tensor],
    steps: int,
    lr: float,
    watch: Watch | None,
    pull: float = 0.0,
) -> None:
    """Adam on ``leaf``, in place, so that the energy of the images it stands for falls; without an active term it stays."""
    optimizer, checked = torch.optim.Adam([leaf], lr), frozenset[str]()
    for i in range(steps):
        progress = i / steps
        active = energy.active(progress)
        if not active:
            continue
        with torch.enable_grad():
            x = images(i)
            slope, parts = gradient(energy, look(x, progress), leaf, bool(active - checked))
        checked |= active
        leaf.grad = slope + pull * leaf.detach()
        optimizer.step()
        if watch:
            watch(Step(i, steps, 1 - progress, x.detach(), parts))
