"""Diffusion and flow models as chains: one network takes noise to an image, link by link."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..errors import BadInput
from ..model import Images, Model
from ..noise import NoiseSource
from ..trace import Point, Sampler, gaussian

Prediction = Literal["epsilon", "v", "sample", "flow"]
FLOW_TIMES = 1000  # what a flow network is told at pure noise; 0 at the image, as diffusers scales it


def prediction_of(scheduler: Any) -> Prediction:
    """What the network of one of diffusers' schedulers predicts.

    Raises:
        BadInput: a schedule that is not supported.
    """
    noises = scheduler.config
    for name, usual in (("thresholding", False), ("rescale_betas_zero_snr", False), ("shift", 1.0)):
        if noises.get(name, usual) not in (usual, None):
            raise BadInput(f"teacher: its scheduler has {name} {noises[name]}, which is not supported")
    known: dict[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}
    flows = type(scheduler).__name__.startswith("FlowMatch")
    predicts = "flow_prediction" if flows else noises.get("prediction_type", "epsilon")
    if predicts not in known:
        raise BadInput(f"teacher: its scheduler has prediction_type {predicts}, which is not supported")
    return known[predicts]


class Chain(nn.Module):
    """Ancestral sampling with a denoiser. Nodes: ``told``, the number of its condition, where there are some; ``xT``, the noise;
    ``x{t}``, the image at time ``t``; ``out``.

    A noisy image is ``alpha x + sigma eps``. The network predicts from it and its time
    the noise (Ho et al., "Denoising diffusion probabilistic models", NeurIPS 2020), the velocity ``alpha eps - sigma x`` (Salimans
    and Ho, "Progressive distillation for fast sampling of diffusion models", ICLR 2022), the image, or, where ``alpha = 1 - sigma``,
    the flow ``eps - x`` (Liu et al., "Flow straight and fast", ICLR 2023; Lipman et al., "Flow matching for generative modeling",
    ICLR 2023). The times of a short chain are those called "trailing", which begin at pure noise (Lin et al., WACV 2024).

    Args:
        net: ``net(x, t)`` is the prediction, a tensor or diffusers' output class; ``x`` is ``(batch, C, H, W)`` in about [-1, 1],
            ``t`` ``(batch,)``. With conditions, ``net(x, t, told)``.
        image: ``(C, H, W)``.
        prediction: what it predicts.
        alphas: ``alpha^2`` at times 0, 1, ..., ``(times,)``, falling; ``None`` for a flow.
        sampler: "ddim", every link a point (Song et al., "Denoising diffusion implicit models", ICLR 2021; Euler's steps for a flow),
            or "ddpm", every link a Gaussian.
        steps: links of the chain.
        clip: predicted images to [-1, 1] at every link; has no part in a flow.
        conditions: that the network knows, of which each image is told one, drawn evenly; 0 for none.

    Raises:
        ValueError: more steps than times, a flow with ddpm, or a diffusion without alphas.
    """

    alphas: Tensor

    def __init__(
        self,
        net: nn.Module,
        image: tuple[int, int, int],
        prediction: Prediction = "epsilon",
        alphas: Tensor | None = None,
        sampler: Literal["ddim", "ddpm"] = "ddim",
        steps: int = 50,
        clip: bool = True,
        conditions: int = 0,
    ):
        super().__init__()
        self.conditions = conditions
        if (alphas is None) != (prediction == "flow"):
            raise ValueError(f"a chain with prediction {prediction!r} {'takes no' if prediction == 'flow' else 'needs'} alphas")
        if prediction == "flow" and sampler == "ddpm":
            raise ValueError("a flow is deterministic; sampler ddpm is for diffusion")
        times = FLOW_TIMES if alphas is None else len(alphas)
        if not 1 <= steps <= times:
            raise ValueError(f"a chain of {steps} steps; 1 to {times} are expected, for the network was trained at {times} times")
        self.net, self.image, self.prediction, self.sampler, self.steps, self.clip = net, image, prediction, sampler, steps, clip
        # One place further on, so that time -1 is the image without noise. No weight, so it is not saved.
        padded = torch.ones(1) if alphas is None else torch.cat([alphas.new_ones(1), alphas])
        self.register_buffer("alphas", padded.float(), persistent=False)

    def model(self) -> Model:
        """The network with its two programs."""
        return Model(self, self.images, self.generate, link=self.link)

    @property
    def images(self) -> Images:
        """[0, 1] to [-1, 1], as diffusers has it."""
        return Images(self.image, (0.5,), (0.5,))

    @property
    def links(self) -> Tensor:
        """Time before and after each link, from noise to image, ``(steps, 2)``."""
        if self.prediction == "flow":
            ends = torch.linspace(FLOW_TIMES, 0, self.steps + 1, dtype=torch.float64)
        else:
            times = len(self.alphas) - 1
            ends = (times - torch.arange(self.steps + 1, dtype=torch.float64) * times / self.steps).round() - 1
        return torch.stack([ends[:-1], ends[1:]], 1).float().to(self.alphas.device)

    def forward(self, x: Tensor, t: Tensor, told: Tensor | None = None) -> Tensor:
        """The prediction, float32, from noisy images ``(batch, C, H, W)`` at times ``(batch,)``, told the conditions of those numbers."""
        own = next(self.net.parameters(), x).dtype
        found = self.net(x.to(own), t if self.prediction == "flow" else t.long(), *(() if told is None else (told.long(),)))
        tensor: Tensor = found if isinstance(found, Tensor) else found.sample
        return tensor.float()

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``sigma`` at times ``(batch,)``, each ``(batch, 1, 1, 1)``."""
        t = t.view(-1, 1, 1, 1)
        if self.prediction == "flow":
            return 1 - t / FLOW_TIMES, t / FLOW_TIMES
        square = self.alphas[t.long() + 1]
        return square.sqrt(), (1 - square).sqrt()

    def towards(self, prediction: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Distribution:
        """The conditional of the image at times ``s`` given the network's prediction from ``x`` at times ``t``, each ``(batch,)``.

        The last link of DDPM is a Gaussian of the link's own noise around the predicted image, as its likelihood wants it.
        """
        (alpha, sigma), (alpha_s, sigma_s) = self.levels(t), self.levels(s)
        match self.prediction:
            case "epsilon":
                clean, noise = (x - sigma * prediction) / alpha, prediction
            case "v":
                clean, noise = alpha * x - sigma * prediction, alpha * prediction + sigma * x
            case "sample":
                clean, noise = prediction, (x - alpha * prediction) / sigma
            case "flow":
                clean, noise = x - sigma * prediction, x + (1 - sigma) * prediction
        if self.clip and self.prediction != "flow":
            clean = clean.clamp(-1, 1)
        if self.sampler == "ddim":
            return Point(alpha_s * clean + sigma_s * noise)
        before, after = (self.alphas[time.long() + 1].view(-1, 1, 1, 1) for time in (t, s))
        beta = 1 - before / after  # of the table's own numbers: where it is small, roots and squares would lose its digits
        mean = alpha_s * beta / sigma**2 * clean + alpha / alpha_s * sigma_s**2 / sigma**2 * x
        variance = torch.where(sigma_s > 0, beta * sigma_s**2 / sigma**2, beta)
        return gaussian(mean, variance.sqrt().expand_as(mean))

    def step(self, x: Tensor, t: float, s: float, told: Tensor | None = None) -> Distribution:
        """One link from time ``t`` to ``s``, of images ``(batch, C, H, W)``."""
        before, after = (x.new_full((x.shape[0],), time) for time in (t, s))
        return self.towards(self(x, before, told), x, before, after)

    def tell(self, sample: Sampler) -> Tensor | None:
        """The condition of each image, ``(batch,)``; ``None`` where there are none."""
        if not self.conditions:
            return None
        chance = sample.noise.uniform("told", (sample.n, 1), sample.device)[:, 0]
        return sample("told", Point((chance * self.conditions).floor()))

    def generate(self, sample: Sampler) -> Distribution:
        """Noise to image through the whole chain."""
        told = self.tell(sample)
        x = sample.normal("xT", self.image)
        *links, (before, after) = self.links.tolist()
        for t, s in links:
            x = sample(f"x{round(s)}", self.step, x, t, s, told)
        return self.step(x, before, after, told)

    def link(self, sample: Sampler, x: Tensor) -> Distribution:
        """One link of the chain, drawn evenly for each image: nodes ``t``, ``xt``, ``prediction`` and ``out``, and ``told``.

        ``t`` holds the times before and after, ``(batch, 2)``; ``xt`` the image with that much noise; ``prediction`` what the network
        says of it, whose squared error is the simple loss of Ho et al.; ``out`` the link's conditional, whose KL is the exact one:
        as many times as there are links, it is in the mean the KL of the whole chain.

        Args:
            sample: of the trace.
            x: ``(batch, C, H, W)`` in [-1, 1].
        """
        u = sample.noise.uniform("link", (sample.n, 1), x.device)[:, 0]
        t, s = sample("t", Point(self.links[(u * self.steps).long()])).unbind(1)
        alpha, sigma = self.levels(t)
        told = self.tell(sample)
        noisy = sample("xt", gaussian(alpha * x, sigma.expand_as(x)))
        prediction = self(noisy, t, told)
        sample("prediction", Point(prediction))  # a value given there says what another network predicted; the link is this one's
        return self.towards(prediction, noisy, t, s)

    def denoising(self, noise: NoiseSource, x: Tensor, told: Tensor | None = None) -> Tensor:
        """Mean squared error of the prediction at a random time, ``(batch,)``: the simple loss of Ho et al., and that of flow matching.

        Args:
            noise: of the times and of the images.
            x: ``(batch, C, H, W)`` in [-1, 1].
            told: numbers of the images' conditions, ``(batch,)``, where the network is told some.

        Raises:
            ValueError: it is, and there are none.
        """
        if self.conditions and told is None:
            raise ValueError(f"a chain that is told one of {self.conditions} conditions learns from images with theirs")
        u = noise.uniform("t", (len(x), 1), x.device)[:, 0]
        t = u * FLOW_TIMES if self.prediction == "flow" else (u * (len(self.alphas) - 1)).floor()
        alpha, sigma = self.levels(t)
        eps = noise.normal("eps", x.shape, x.device)
        target = {"epsilon": eps, "v": alpha * eps - sigma * x, "sample": x, "flow": eps - x}[self.prediction]
        return (self(alpha * x + sigma * eps, t, told if self.conditions else None) - target).square().flatten(1).mean(1)


class DenoisingLoss(nn.Module):
    """How a diffusion or flow teacher is trained, and a student without one.

    Args:
        net: whose parameters learn.
        chain: of it.
    """

    def __init__(self, net: nn.Module, chain: Chain):
        super().__init__()
        self.net = net
        self._chain = (chain,)  # it is the network or within it, and would be saved twice

    def forward(self, noise: NoiseSource, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Loss ``(batch,)`` of images ``(batch, C, H, W)`` in [0, 1], with labels ``(batch,)`` where the network is told them."""
        (chain,) = self._chain
        return {"out": chain.denoising(noise, chain.images.encode(images), labels)}
