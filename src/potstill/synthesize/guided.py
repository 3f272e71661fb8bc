"""Images from a diffusion prior, each step moved down the gradient of an energy of the predicted clean image."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..energy.view import Energy, Look, View, gradient
from ..errors import BadInput
from ..model import kept_for_gradient
from ..noise import Noise
from .prior import Affine, Condition, Prior, Prompts, affine
from .synthesis import Step, Watch

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's own conversion to gray


def fitted(x: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images ``(n, C, H, W)`` in another number of channels and another size: the mean over areas when smaller, bilinear when larger."""
    channels, height, width = shape
    if x.shape[1] == 3 and channels == 1:
        x = (x * x.new_tensor(_LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    elif x.shape[1] == 1 and channels == 3:
        x = x.expand(-1, 3, -1, -1)
    if x.shape[-2:] == (height, width):
        return x
    if height <= x.shape[-2]:
        return F.adaptive_avg_pool2d(x, (height, width))
    return F.interpolate(x, (height, width), mode="bilinear", align_corners=False)


def check_fit(found: tuple[int, int, int], wanted: tuple[int, int, int], who: str = "prior") -> None:
    """Refuse images that no resizing turns into the teacher's.

    Raises:
        BadInput: channels other than 1 and 3 differ, or the proportions do.
    """
    if found[0] != wanted[0] and {found[0], wanted[0]} != {1, 3}:
        raise BadInput(f"{who}: its images have {found[0]} channels, the teacher's {wanted[0]}; only gray and color can be converted")
    if found[1] * wanted[2] != found[2] * wanted[1]:
        raise BadInput(f"{who}: its images are {found[1]}x{found[2]}, the teacher's {wanted[1]}x{wanted[2]}; the proportions differ")


@dataclass(frozen=True)
class Guided:
    """Diffusion sampling with guidance.

    At every step the predicted clean sample is moved by ``scale`` times the gradient of the energy times the variance that the clean
    sample still has, as the tilted density exp(-energy) asks for (Dhariwal and Nichol, NeurIPS 2021; Song et al., ICLR 2023); no
    further, as a root mean square, than ``clip`` times the noise level. The network's output is changed to match, so every
    scheduler, also one that remembers earlier steps, goes on from what it would have seen had the network predicted the moved sample.

    Args:
        prior: the parts of a diffusion pipeline.
        shape: ``(C, H, W)`` of the teacher's images, to which the prior's are converted.
        steps: network calls.
        mode: "full" differentiates through the denoiser to the noisy sample; "clean" with respect to the predicted clean sample
            alone, which takes no backward pass of the denoiser (He et al., "Manifold preserving guided diffusion", ICLR 2024);
            "off" does not guide.
        scale: of the move; 1 is the tilted density's own, for an energy in nats.
        clip: largest root mean square of a move, in units of the noise level.
        repeats: moves per step in mode "clean".
        decode: "vae", "tiny" or "linear", for the gradient alone; the images come from the whole decoder.
        prompts: texts, where the prior reads text.
        guidance_scale: of classifier-free guidance; 1 is none.
        eta: of the DDIM scheduler: 0 is deterministic.

    Raises:
        BadInput: the prior's images cannot be converted to that shape.
    """

    prior: Prior
    shape: tuple[int, int, int]
    steps: int = 25
    mode: Literal["full", "clean", "off"] = "full"
    scale: float = 1.0
    clip: float = 0.3
    repeats: int = 1
    decode: Literal["vae", "tiny", "linear"] = "vae"
    prompts: Prompts | None = None
    guidance_scale: float = 1.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_fit(self.prior.image_shape, self.shape)

    @torch.no_grad()
    def __call__(self, energy: Energy, look: Look, n: int, noise: Noise, watch: Watch | None = None) -> Tensor:
        """``(n, C, H, W)`` float32 in [0, 1], of the teacher's shape.

        With no active term the images are those of the scheduler and the denoiser alone, to the bit.

        Args:
            energy: what to lower.
            look: makes a view of images; its labels choose prompts and classes.
            n: number of images.
            noise: of the first sample, the wordings and the scheduler's own noise, each row addressed by itself.
            watch: told after each step.
        """
        latents = self.latents(energy, look, n, noise, watch)
        return self.images(latents).clamp(0, 1)

    def images(self, latents: Tensor, how: str = "vae") -> Tensor:
        """Clean latents to images of the teacher's shape, unclipped."""
        return fitted(self.prior.decode(latents, how), self.shape)

    @torch.no_grad()
    def latents(self, energy: Energy, look: Look, n: int, noise: Noise, watch: Watch | None = None) -> Tensor:
        """As :meth:`__call__`, before the decoder: ``(n, C, H, W)`` of the prior's latents."""
        if self.decode == "linear" and self.mode != "off":
            self.fit_linear()
        return self._sampled(energy, look.labels, look, n, noise, watch)

    def _sampled(self, energy: Energy, labels: Tensor | None, look: Look | None, n: int, noise: Noise, watch: Watch | None) -> Tensor:
        prior, scheduler = self.prior, copy.deepcopy(self.prior.scheduler)
        scheduler.set_timesteps(self.steps)  # on the CPU: a time read from a GPU would have every step wait for the one before
        prompts = self.prompts.of(labels, noise, n) if self.prompts else None
        condition = prior.condition(prompts, labels, self.prompts.negative if self.prompts else "", self.guidance_scale)
        arguments = _step_arguments(scheduler, n, noise, self.eta)
        z = noise.normal("latents", (n, *prior.latent_shape), prior.device) * getattr(scheduler, "init_noise_sigma", 1.0)
        count, checked = len(scheduler.timesteps), frozenset[str]()
        for i, t in enumerate(scheduler.timesteps):
            at, progress = affine(scheduler, i), i / count
            active = energy.active(progress) if self.mode != "off" and at.sigma > 0 else frozenset[str]()
            if look is None or not active:
                output, parts = self._predicted(scheduler, z, t, condition), dict[str, Tensor]()
            else:
                view = partial(look, progress=progress)
                output, parts = self._guided(energy, view, scheduler, z, t, at, condition, bool(active - checked))
            checked |= active
            if watch:
                clean = at.skip * z + at.out * output
                watch(Step(i, count, at.level, self.images(clean), parts))
            z = scheduler.step(output, t, z, **arguments, return_dict=False)[0].float()
        return z

    def fit_linear(self, n: int = 64, steps: int = 10) -> float:
        """Fit the prior's linear decode to unguided samples of its own, unless that is done, and return the share of variance it leaves."""
        prior = self.prior
        if prior.linear_rest is None:
            classes = len(self.prompts.wordings) if self.prompts else prior.classes or 1
            labels = torch.arange(n, device=prior.device) % classes
            sampler = replace(self, steps=min(steps, self.steps), mode="off")
            latents = sampler._sampled(Energy(), labels, None, n, Noise(("linear decode",)), None)
            prior.fit_linear(latents)
        assert prior.linear_rest is not None
        return prior.linear_rest

    def memory(self, energy: Energy, look: Look, noise: Noise) -> tuple[int, int]:
        """Bytes of the prior's parameters, and what one image keeps for the gradient, measured on one step.

        Args:
            energy: that guides.
            look: of as many images as it has labels for, or of two.
            noise: of those.
        """
        n = 2 if look.labels is None else len(look.labels)
        return self.prior.nbytes(), kept_for_gradient(lambda: replace(self, steps=1).latents(energy, look, n, noise)) // n

    def _predicted(self, scheduler: Any, z: Tensor, t: Tensor, condition: Condition) -> Tensor:
        scaled = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
        return self.prior.predict(scaled.to(self.prior.dtype), t, condition).float()

    def _guided(
        self,
        energy: Energy,
        view: Callable[[Tensor], View],
        scheduler: Any,
        z: Tensor,
        t: Tensor,
        at: Affine,
        condition: Condition,
        check: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The network's output, changed so that the clean sample it stands for is moved down the energy's gradient."""
        if self.mode == "full":
            with torch.enable_grad():
                noisy = z.detach().requires_grad_()
                output = self._predicted(scheduler, noisy, t, condition)
                clean = at.skip * noisy + at.out * output
                slope, parts = gradient(energy, view(self.images(clean, self.decode)), noisy, check)
            # Tweedie's formula: the mean of the clean sample under the tilted density. Where flow matching begins, alpha is 0.
            move = self._clipped(slope * (at.sigma**2 / max(at.alpha, 1e-3)), at)
            return output.detach() - move / at.out, parts
        output = self._predicted(scheduler, z, t, condition)
        moved, first = at.skip * z + at.out * output, dict[str, Tensor]()
        for repeat in range(self.repeats):
            with torch.enable_grad():
                clean = moved.detach().requires_grad_()
                slope, parts = gradient(energy, view(self.images(clean, self.decode)), clean, check and not repeat)
            first = first or parts
            # For data of variance 1 the clean sample's Jacobian is that of a Gaussian, which turns the step above into this one.
            moved = moved - self._clipped(slope * at.level**2, at)
        return (moved - at.skip * z) / at.out, first

    def _clipped(self, move: Tensor, at: Affine) -> Tensor:
        move = self.scale * move
        rms = move.flatten(1).pow(2).mean(1).sqrt().view(-1, *[1] * (move.dim() - 1))
        return move * (self.clip * at.level / rms.clamp_min(1e-12)).clamp_max(1.0)


def _step_arguments(scheduler: Any, n: int, noise: Noise, eta: float) -> dict[str, Any]:
    """Arguments of ``scheduler.step``: its own noise comes from one generator per row, so that a row's does not depend on its batch."""
    known = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {}
    if "generator" in known:
        words = noise.uniform("scheduler", (n, 2)).double().mul(2**24).long()
        arguments["generator"] = [torch.Generator().manual_seed(int(a) * 2**24 + int(b)) for a, b in words.tolist()]
    if "eta" in known:
        arguments["eta"] = eta
    return arguments
