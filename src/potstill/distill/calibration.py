"""The noise that the data would have behind it, as far as a teacher remembers: found without data, for students to learn on.

A model's prior and its data part ways: an autoencoder's own samples have more contrast, or less, than what it was trained on, and the
noise that it infers behind its data is not the noise that it is given. Its BatchNorm layers remember moments of that data. A small
affine map of the noise has few enough numbers to be found from those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ..energy.view import Energy, Look
from ..model import Model
from ..noise import Noise, NoiseSource
from ..trace import Point, Sampler, draw, gaussian, run

NOISE_MAP = "noise_map.safetensors"
"""Beside a model's weights, in the folder of one that draws from mapped noise."""

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


@dataclass(frozen=True)
class Mapped:
    """Another source, with ``noise + map(noise)`` at the nodes that have a map."""

    source: NoiseSource
    maps: Mapping[str, nn.Module]

    def normal(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """As the source draws it, then mapped; with a graph where a map learns."""
        noise = self.source.normal(name, shape, device)
        return noise + self.maps[name](noise) if name in self.maps else noise

    def uniform(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """As the source draws it."""
        return self.source.uniform(name, shape, device)


class NoiseMap(nn.Module):
    """An affine map of the standard noise of each latent that a teacher draws from a normal; at first 0.

    A matrix where the latent is a vector, a convolution of three pixels a side where it has a height and a width, with which neighbors
    may vary together. In the state dict, ``maps.0`` is of the first of ``latents``.

    Args:
        model: a teacher, or a student of one, whose latents are the same; its program ``generate`` is run once to see them.

    Raises:
        ValueError: it draws no latent from a normal.
    """

    def __init__(self, model: Model):
        super().__init__()
        with torch.no_grad():
            trace = run(model.program("generate"), noise=Noise(), n=2, device=model.device)
        shapes = {name: tuple(node.value.shape) for name, node in trace.latents().items() if _is_normal(node.dist)}
        shapes = {name: shape for name, shape in shapes.items() if 2 <= len(shape) <= 5}
        if not shapes:
            raise ValueError(f"a {type(model.net).__name__} of this kind draws no latent from a normal")
        self.latents = tuple(shapes)
        self.maps = nn.ModuleList(_map(shape).to(model.device) for shape in shapes.values())

    def forward(self, noise: NoiseSource) -> Mapped:
        """The noise, mapped."""
        return Mapped(noise, dict(zip(self.latents, self.maps, strict=True)))

    def onto(self, model: Model) -> Model:
        """A model that draws from mapped noise by itself, whatever noise it is given: to be looked at and measured, not trained.

        Its latents are points: where they were drawn from is no longer in the trace.
        """
        program = model.program("generate")
        return replace(model, generate=lambda sample: program(_Moved(sample, dict(zip(self.latents, self.maps, strict=True)))))


class _Moved:
    """Hands a program's requests on, with the value of mapped noise in place of the conditional."""

    def __init__(self, sample: Sampler, maps: Mapping[str, nn.Module]):
        self._sample, self._maps = sample, maps

    @property
    def n(self) -> int:
        return self._sample.n

    @property
    def device(self) -> torch.device:
        return self._sample.device

    @property
    def noise(self) -> NoiseSource:
        return Mapped(self._sample.noise, self._maps)

    def __call__(
        self, name: str, dist: Distribution | Callable[..., Distribution], *args: Any, prior: Distribution | None = None
    ) -> Tensor:
        def make() -> Distribution:
            given = dist if isinstance(dist, Distribution) else dist(*args)
            return Point(draw(given, name, self.noise)) if name in self._maps else given

        return self._sample(name, make, prior=prior)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        zeros = torch.zeros((self.n, *shape), device=self.device)
        return self(name, gaussian(zeros, torch.ones_like(zeros)))


def _map(shape: tuple[int, ...]) -> nn.Module:
    if len(shape) == 2:
        made: nn.Module = nn.Linear(shape[1], shape[1])
    else:
        sides = [3 if size > 1 else 1 for size in shape[2:]]
        made = _CONVOLUTIONS[len(shape)](shape[1], shape[1], sides, padding=[side // 2 for side in sides])
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    return made


def _is_normal(dist: Distribution) -> bool:
    return isinstance(dist, Normal) or (isinstance(dist, Independent) and _is_normal(dist.base_dist))


class Calibration(nn.Module):
    """What the teacher says of the images that it makes of mapped noise.

    Args:
        teacher: frozen.
        net: the map, which learns.
        energy: of images, such as ``relative_batchnorm``.
    """

    def __init__(self, teacher: Model, net: NoiseMap, energy: Energy):
        super().__init__()
        self.net, self.energy = net, energy
        self._teacher = (teacher,)

    def forward(self, noise: Noise, n: int) -> dict[str, Tensor]:
        """Weighted energies of ``n`` images by name, each ``(batch,)``."""
        (teacher,) = self._teacher
        trace = run(teacher.program("generate"), noise=self.net(noise), n=n, device=teacher.device)
        view = Look(teacher, noise=noise.fold("energy"))(teacher.images.decode(trace.out.dist.mean))
        return {f"energy.{name}": part for name, part in self.energy.parts(view, every=True).items()}
