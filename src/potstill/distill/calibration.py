"""A teacher whose latents are recalibrated, without data, so that its samples feed its layers what its training data fed them.

A model's prior and its data part ways: an autoencoder's samples have more contrast, or less, than what it was trained on. Its BatchNorm
layers remember moments of the latter. A small linear map of the noise behind each latent has few enough numbers to be found from those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ..energy.view import Energy, Look
from ..model import Model
from ..noise import Noise, NoiseSource
from ..trace import Sampler, gaussian, run

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


class Calibrated(nn.Module):
    """The teacher with ``mean + std * (noise + map(noise))`` wherever it draws a latent as ``mean + std * noise``.

    The map of a latent's standard noise is affine: a matrix where the latent is a vector, a convolution of three pixels a side where it
    has a height and a width, with which neighbors may vary together. At first it is 0, and this is the teacher. The teacher's own weights
    stay as they are and are no part of the state dict, where ``maps.0`` is of the first latent.

    Only noise goes in: what the teacher infers from an image is not turned into the noise that would give the image here.

    Args:
        teacher: frozen.

    Raises:
        ValueError: it draws no latent from a normal.
    """

    def __init__(self, teacher: Model):
        super().__init__()
        self._teacher = (teacher,)
        with torch.no_grad():
            trace = run(teacher.program("generate"), noise=Noise(), n=2, device=teacher.device)
        shapes = {name: tuple(node.value.shape) for name, node in trace.latents().items() if _is_normal(node.dist)}
        shapes = {name: shape for name, shape in shapes.items() if 2 <= len(shape) <= 5}
        if not shapes:
            raise ValueError(f"the teacher, a {type(teacher.net).__name__}, draws no latent from a normal")
        self.latents = tuple(shapes)
        self.maps = nn.ModuleList(_map(shape).to(teacher.device) for shape in shapes.values())

    def model(self) -> Model:
        """With the teacher's programs, of which inference is as it was."""
        (teacher,) = self._teacher
        return Model(self, teacher.images, self._generate, teacher.infer)

    def _generate(self, sample: Sampler) -> Distribution | Tensor:
        return self._teacher[0].program("generate")(_Moved(sample, self))

    def moved(self, name: str, dist: Distribution, noise: NoiseSource) -> Distribution:
        """What to draw the node of that name from, with that noise, in place of the teacher's conditional."""
        if name not in self.latents:
            return dist
        if isinstance(dist, Independent):
            return Independent(self.moved(name, dist.base_dist, noise), dist.reinterpreted_batch_ndims, validate_args=False)
        assert isinstance(dist, Normal)
        standard = noise.normal(name, dist.loc.shape, dist.loc.device).to(dist.loc.dtype)
        return gaussian(torch.addcmul(dist.loc, dist.scale, self.maps[self.latents.index(name)](standard)), dist.scale)


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


class _Moved:
    """Hands a program's requests on, each with the conditional that is to be drawn from."""

    def __init__(self, sample: Sampler, net: Calibrated):
        self._sample, self._net = sample, net

    @property
    def n(self) -> int:
        return self._sample.n

    @property
    def device(self) -> torch.device:
        return self._sample.device

    @property
    def noise(self) -> NoiseSource:
        return self._sample.noise

    def __call__(
        self, name: str, dist: Distribution | Callable[..., Distribution], *args: Any, prior: Distribution | None = None
    ) -> Tensor:
        def make() -> Distribution:
            return self._net.moved(name, dist if isinstance(dist, Distribution) else dist(*args), self.noise)

        return self._sample(name, make, prior=prior)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        zeros = torch.zeros((self.n, *shape), device=self.device)
        return self(name, gaussian(zeros, torch.ones_like(zeros)))


class Calibration(nn.Module):
    """What the teacher says of the images of its recalibrated self.

    Args:
        teacher: frozen.
        net: of that teacher; it learns.
        energy: of images, such as ``relative_batchnorm``.
    """

    def __init__(self, teacher: Model, net: Calibrated, energy: Energy):
        super().__init__()
        self.net, self.energy = net, energy
        self._teacher, self._model = (teacher,), net.model()

    def forward(self, noise: Noise, n: int) -> dict[str, Tensor]:
        """Weighted energies of ``n`` images by name, each ``(batch,)``."""
        (teacher,) = self._teacher
        trace = run(self._model.program("generate"), noise=noise, n=n, device=teacher.device)
        view = Look(teacher, noise=noise.fold("energy"))(teacher.images.decode(trace.out.dist.mean))
        return {f"energy.{name}": part for name, part in self.energy.parts(view, every=True).items()}
