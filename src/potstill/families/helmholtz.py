"""Helmholtz machine of two values with binary latents (Dayan et al., Neural Computation 1995), as published by Chen et al. (CVPR 2023)."""

from __future__ import annotations

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Normal

from ..model import Images, Model
from ..trace import Point, Sampler, gaussian


def _layers(into: int, width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(into, width), nn.ReLU(), nn.Linear(width, out))


class HelmholtzMachine(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="potstill",
    tags=["potstill", "helmholtz"],
    license="apache-2.0",
):
    """The chain ``z4``, ``z3``, ``y2``, ``z2``, ``z1``, ``y1``: binary latents z, observed values y, of which ``out`` is made.

    The published student is ``HelmholtzMachine(width=2)``, its teacher ``width=8``; their state dicts load as they are. On Old Faithful,
    ``y1`` is the eruption's duration and ``y2`` the waiting time. Inference goes the other way, so that no latent has its prior at
    hand: such a model learns by wake and sleep, not by a closed-form ELBO.

    Args:
        image: ``(2, 1, 1)``, the shape of a point.
        width: units of every hidden layer.
        latent: length of each latent.
        std: standard deviation of the observed values, in units of standardized data.
        mean: of the data, one number or one per value.
        scale: standard deviation of the data, likewise.
        family: written to ``config.json``, so that a checkpoint says what it is.

    Raises:
        ValueError: a number is not positive, or the shape is not that of a point of two values.
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (2, 1, 1),
        width: int = 8,
        latent: int = 2,
        std: float = 0.5,
        mean: tuple[float, ...] = (0.0,),
        scale: tuple[float, ...] = (1.0,),
        family: str = "helmholtz",
    ):
        super().__init__()
        if tuple(image) != (2, 1, 1):
            raise ValueError(f"a Helmholtz machine is of points of two values, (2, 1, 1), not {tuple(image)}")
        if min(width, latent) < 1 or not std > 0 or not min(scale) > 0 or not {len(mean), len(scale)} <= {1, 2}:
            raise ValueError(
                f"HelmholtzMachine(width={width}, latent={latent}, std={std}, mean={tuple(mean)}, scale={tuple(scale)}): all but the mean "
                "must be positive, mean and scale one number or two"
            )
        self.image, self.width, self.latent, self.std = (2, 1, 1), width, latent, std
        self.mean, self.scale = tuple(mean), tuple(scale)
        self.infnet = nn.ModuleList(_layers(into, width, latent) for into in (2, latent + 1, 1, latent))
        chain = [_layers(*sizes) for sizes in ((latent, width, latent), (latent, width, 1), (1, width, latent))]
        chain += [_layers(latent, width, latent), _layers(latent, width, 1)]
        self.gennet = nn.ModuleList([nn.Linear(1, latent, bias=False), *chain])

    def model(self) -> Model:
        """The network with its two programs."""
        return Model(self, Images(self.image, self.mean, self.scale, pixels=False), self.generate, self.infer)

    def shrunk(self, width: int) -> HelmholtzMachine:
        """A fresh network with the same latents and another width."""
        return HelmholtzMachine(self.image, width, self.latent, self.std, self.mean, self.scale)

    def encoder(self) -> list[nn.Module]:
        """The modules that only :meth:`infer` uses."""
        return [self.infnet]

    def _prior(self, n: int) -> Bernoulli:
        weight = self.gennet[0].weight
        return Bernoulli(logits=self.gennet[0](weight.new_ones(n, 1)), validate_args=False)

    def _latent(self, i: int, parent: Tensor) -> Bernoulli:
        return Bernoulli(logits=self.gennet[i](parent), validate_args=False)

    def _value(self, i: int, parent: Tensor) -> Normal:
        mean = self.gennet[i](parent)
        return gaussian(mean, torch.full_like(mean, self.std))

    def _posterior(self, i: int, *parents: Tensor) -> Bernoulli:
        return Bernoulli(logits=self.infnet[i](torch.cat(parents, 1)), validate_args=False)

    def generate(self, sample: Sampler) -> Tensor:
        """Noise to points ``(batch, 2, 1, 1)``."""
        z4 = sample("z4", self._prior, sample.n)
        z3 = sample("z3", self._latent, 1, z4)
        y2 = sample("y2", self._value, 2, z3)
        z2 = sample("z2", self._latent, 3, y2)
        z1 = sample("z1", self._latent, 4, z2)
        y1 = sample("y1", self._value, 5, z1)
        return torch.cat([y1, y2], 1)[:, :, None, None]

    def infer(self, sample: Sampler, x: Tensor) -> Distribution:
        """Points ``(batch, 2, 1, 1)`` to latents and back."""
        seen = [Point(value) for value in x.flatten(1).split(1, 1)]
        y1, y2 = (sample(f"y{i}", point, prior=point) for i, point in enumerate(seen, 1))
        z1 = sample("z1", self._posterior(0, y1, y2))
        sample("z2", self._posterior(1, y2, z1))
        z3 = sample("z3", self._posterior(2, y2))
        sample("z4", self._posterior(3, z3))
        mean = torch.cat([self._value(5, z1).loc, self._value(2, z3).loc], 1)[:, :, None, None]
        return gaussian(mean, torch.full_like(mean, self.std))
