"""Variational recurrent network of strokes (Chung et al., NeurIPS 2015), as published by Chen et al. (CVPR 2023)."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Normal, register_kl
from torch.special import ndtr, ndtri

from ..divergence import kl
from ..model import Images, Model
from ..noise import NoiseSource
from ..trace import Point, Sampler, draw, gaussian, undraw

_ALMOST_0 = 1e-6


class Stroke(Distribution):
    """One step of a pen, or several: whether it is lifted after the step, a coin, and by how much it moved, a Gaussian.

    Its values are ``(batch, 3, ...)``: 1 where the pen is lifted, and the offset in both directions.

    Args:
        logits: of the lifted pen, ``(batch, 1, ...)``.
        offset: ``(batch, 2, ...)``.
        temperature: factor of the offset's std where a value is drawn. The density knows nothing of it.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, logits: Tensor, offset: Normal, temperature: float = 1.0):
        self.pen, self.offset, self.temperature = Bernoulli(logits=logits, validate_args=False), offset, temperature
        super().__init__(torch.Size((logits.shape[0], 3, *logits.shape[2:])), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return torch.cat([self.pen.probs, self.offset.loc], 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Of each element, ``(batch, 3, ...)``."""
        return torch.cat([self.pen.log_prob(value[:, :1]), self.offset.log_prob(value[:, 1:])], 1)


# One normal tensor is all the noise of a step: the coin's uniform is its first channel's distribution function.
@draw.register
def _(dist: Stroke, name: str, noise: NoiseSource) -> Tensor:
    e = noise.normal(name, dist.batch_shape, dist.offset.loc.device)
    lifted = (ndtr(e[:, :1]) < dist.pen.probs).to(dist.offset.loc.dtype)
    moved = torch.addcmul(dist.offset.loc, dist.offset.scale, e[:, 1:].to(dist.offset.loc.dtype), value=dist.temperature)
    return torch.cat([lifted, moved], 1)


@undraw.register
def _(dist: Stroke, value: Tensor, name: str, noise: NoiseSource) -> Tensor | None:
    p = dist.pen.probs
    u = noise.uniform(name, p.shape, p.device)
    u = torch.where(value[:, :1] > 0.5, u * p, p + u * (1 - p))
    e = (value[:, 1:] - dist.offset.loc) / dist.offset.scale
    e = e / dist.temperature if dist.temperature else torch.zeros_like(e)  # at temperature 0 any noise gives the same offset
    return torch.cat([ndtri(u.clamp(_ALMOST_0, 1 - _ALMOST_0)).to(e.dtype), e], 1)


@register_kl(Stroke, Stroke)
def _kl_stroke_stroke(p: Stroke, q: Stroke) -> Tensor:
    return kl(p.pen, q.pen) + kl(p.offset, q.offset)


def _layers(into: int, width: int) -> nn.Sequential:
    net = nn.Sequential()
    for i in range(2):
        net.add_module(f"linear{i}", nn.Linear(width if i else into, width))
        net.add_module(f"activation{i}", nn.ReLU())
    return net


class VRNN(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="potstill",
    tags=["potstill", "vrnn"],
    license="apache-2.0",
):
    """Latents ``z0, z1, ...`` and steps ``x0, x1, ...`` of a pen, by turns, of which ``out`` is made.

    The published teacher has ``width=512, hidden=1200``, its student ``width=128, hidden=600``, both ``std=1, temperature=0``; their
    state dicts load as they are.

    Args:
        image: ``(3, steps, 1)``, the shape of a sequence: 1 where the pen is lifted after the step, and its offset.
        width: units of every hidden layer.
        hidden: units of the recurrent state.
        latent: length of each latent.
        std: standard deviation of an offset, in units of standardized data.
        temperature: factor of that standard deviation where strokes are drawn; the published code draws with 0, the mean.
        mean: of the data's offsets, one number or one per direction.
        scale: standard deviation of the data's offsets, likewise.
        family: written to ``config.json``, so that a checkpoint says what it is.

    Raises:
        ValueError: a number is not positive, or the shape is not that of a sequence of three values.
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 1),
        width: int = 64,
        hidden: int = 128,
        latent: int = 16,
        std: float = 1.0,
        temperature: float = 1.0,
        mean: tuple[float, ...] = (0.0,),
        scale: tuple[float, ...] = (1.0,),
        family: str = "vrnn",
    ):
        super().__init__()
        channels, steps, last = image
        if channels != 3 or last != 1 or steps < 1:
            raise ValueError(f"a VRNN is of sequences of a pen and its offset, (3, steps, 1), not {tuple(image)}")
        if (
            min(width, hidden, latent) < 1
            or not std > 0
            or not min(scale) > 0
            or not temperature >= 0
            or not {len(mean), len(scale)} <= {1, 2}
        ):
            raise ValueError(
                f"VRNN(width={width}, hidden={hidden}, latent={latent}, std={std}, temperature={temperature}, mean={tuple(mean)}, "
                f"scale={tuple(scale)}): all but the mean must be positive, mean and scale one number or two"
            )
        self.image, self.width, self.hidden, self.latent = (channels, steps, last), width, hidden, latent
        self.std, self.temperature, self.mean, self.scale = std, temperature, tuple(mean), tuple(scale)
        self.feature_extractor_x, self.feature_extractor_z = _layers(3, width), _layers(latent, width)
        self.mlp_hx_z, self.inf_mean, self.inf_logvar = _layers(width + hidden, width), nn.Linear(width, latent), nn.Linear(width, latent)
        self.mlp_h_z, self.prior_mean, self.prior_logvar = _layers(hidden, width), nn.Linear(width, latent), nn.Linear(width, latent)
        self.mlp_hz_x, self.gen_linear = _layers(hidden + width, width), nn.Linear(width, 3)
        self.rnn = nn.LSTM(2 * width, hidden)

    def model(self) -> Model:
        """The network with its two programs."""
        mean, scale = ((*values, *values)[:2] for values in (self.mean, self.scale))
        return Model(self, Images(self.image, (0.0, *mean), (1.0, *scale), pixels=False), self.generate, self.infer)

    def shrunk(self, width: int) -> VRNN:
        """A fresh network of the same latents, another width, and a recurrent state smaller in proportion."""
        hidden = max(1, round(self.hidden * width / self.width))
        return VRNN(self.image, width, hidden, self.latent, self.std, self.temperature, self.mean, self.scale)

    def encoder(self) -> list[nn.Module]:
        """The modules that only :meth:`infer` uses."""
        return [self.mlp_hx_z, self.inf_mean, self.inf_logvar]

    def prior(self, h: Tensor) -> Normal:
        """p(z_t | what was before), from the recurrent state ``(batch, hidden)``."""
        found = self.mlp_h_z(h)
        return gaussian(self.prior_mean(found), (self.prior_logvar(found) / 2).exp())

    def posterior(self, x: Tensor, h: Tensor) -> Normal:
        """q(z_t | x_t and what was before), from features ``(batch, width)`` of the step and the recurrent state."""
        found = self.mlp_hx_z(torch.cat([x, h], 1))
        return gaussian(self.inf_mean(found), (self.inf_logvar(found) / 2).exp())

    def step(self, z: Tensor, h: Tensor) -> Stroke:
        """p(x_t | z_t and what was before), from features ``(..., width)`` of the latent and the recurrent state.

        Of a whole sequence, ``(steps, batch, ...)``, it is one conditional ``(batch, 3, steps, 1)``.
        """
        found = self.gen_linear(self.mlp_hz_x(torch.cat([z, h], -1)))
        if found.dim() == 3:
            found = found.permute(1, 2, 0)[..., None]
        return Stroke(found[:, :1], gaussian(found[:, 1:], torch.full_like(found[:, 1:], self.std)), self.temperature)

    def _start(self, n: int) -> tuple[Tensor, Tensor]:
        zeros = self.gen_linear.weight.new_zeros(n, self.hidden)
        return zeros, zeros

    def _next(self, x: Tensor, z: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        _, (h, c) = self.rnn(torch.cat([x, z], 1)[None], (state[0][None], state[1][None]))
        return h[0], c[0]

    def generate(self, sample: Sampler) -> Tensor:
        """Noise to sequences ``(batch, 3, steps, 1)``."""
        state, steps = self._start(sample.n), []
        for t in range(self.image[1]):
            z = self.feature_extractor_z(sample(f"z{t}", self.prior, state[0]))
            steps.append(sample(f"x{t}", self.step, z, state[0]))
            state = self._next(self.feature_extractor_x(steps[-1]), z, state)
        return torch.stack(steps, 2)[..., None]

    def infer(self, sample: Sampler, x: Tensor) -> Distribution:
        """Sequences ``(batch, 3, steps, 1)`` to latents and back."""
        state, features, states = self._start(x.shape[0]), [], []  # len would be a constant in an export
        seen = x.squeeze(3).permute(2, 0, 1)
        for t, (step, feature) in enumerate(zip(seen, self.feature_extractor_x(seen), strict=True)):
            features.append(self.feature_extractor_z(sample(f"z{t}", self.posterior(feature, state[0]), prior=self.prior(state[0]))))
            states.append(state[0])
            point = Point(step)
            sample(f"x{t}", point, prior=point)
            state = self._next(feature, features[-1], state)
        return self.step(torch.stack(features), torch.stack(states))
