"""Text-to-image diffusion in an autoencoder's latents, such as Stable Diffusion, as teacher: its denoiser is what gets smaller."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..model import Images, Model
from ..trace import Point, Sampler
from .chain import Chain, Prediction, prediction_of

Arguments = Mapping[str, Any]
"""What a denoiser is told beside the noisy latents: tensors ``(texts, ...)`` by name, and such mappings."""


class Told(nn.Module):
    """A denoiser that is told one of the texts it knows, with classifier-free guidance (Ho and Salimans, 2022) where it has any.

    Args:
        unet: diffusers' ``UNet2DConditionModel``.
        arguments: for each text.
        nothing: the same for the negative one, ``(1, ...)``; needed where the strength is not 1.
        strength: of the guidance; 1 is none, and one call of the network instead of two.
    """

    def __init__(self, unet: nn.Module, arguments: Arguments, nothing: Arguments | None = None, strength: float = 1.0):
        super().__init__()
        self.unet, self.strength = unet, strength
        self._places: list[tuple[str, ...]] = []
        for i, (place, tensor) in enumerate(_tensors(arguments)):
            self._places.append(place)
            # They are made from the texts again when a student is loaded, so they are no part of what is saved.
            self.register_buffer(f"told{i}", tensor.detach(), persistent=False)
        for i, (_, tensor) in enumerate(_tensors(nothing or {})):
            self.register_buffer(f"nothing{i}", tensor.detach(), persistent=False)

    @property
    def texts(self) -> int:
        """How many texts it knows."""
        return len(self.get_buffer("told0"))

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """The prediction from noisy latents ``(batch, C, H, W)`` at times ``(batch,)`` for texts ``(batch,)``, by their numbers."""
        given = [self.get_buffer(f"told{i}")[text] for i in range(len(self._places))]
        if self.strength == 1:
            return self._call(x, t, given)
        without = [self.get_buffer(f"nothing{i}").expand_as(told) for i, told in enumerate(given)]
        both = self._call(torch.cat([x] * 2), torch.cat([t] * 2), [torch.cat(pair) for pair in zip(without, given, strict=True)])
        off, on = both.chunk(2)
        return off + self.strength * (on - off)

    def _call(self, x: Tensor, t: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        found: Tensor = self.unet(x, t, **self._arguments(tensors), return_dict=False)[0]
        return found

    def _arguments(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """The tensors where the denoiser looks for them."""
        arguments: dict[str, Any] = {}
        for (*outer, last), tensor in zip(self._places, tensors, strict=True):
            inner = arguments
            for key in outer:
                inner = inner.setdefault(key, {})
            inner[last] = tensor
        return arguments

    def smaller(self, unet: nn.Module) -> Told:
        """The same texts for another denoiser, which learns what guidance makes of them, and so needs none."""
        return Told(unet, self._arguments([self.get_buffer(f"told{i}") for i in range(len(self._places))]))


def _tensors(arguments: Arguments, place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    for key in sorted(arguments):
        value = arguments[key]
        if isinstance(value, Tensor):
            yield (*place, key), value
        else:
            yield from _tensors(value, (*place, key))


class LatentChain(Chain):
    """A chain of latents that ends in a picture. Nodes: ``told``, the text; ``xT`` and ``x{t}``, latents; ``z``, the last; ``out``.

    Args:
        net: told texts.
        latent: ``(C, H, W)`` of the latents.
        vae: diffusers' autoencoder, frozen. It is nobody's parameter: teacher and students share it.
        picture: ``(C, H, W)`` of the images.
        prediction: as of :class:`Chain`, and so the rest.
        alphas: of the noise.
        sampler: "ddim" or "ddpm".
        steps: links of the chain.
    """

    def __init__(
        self,
        net: Told,
        latent: tuple[int, int, int],
        vae: nn.Module,
        picture: tuple[int, int, int],
        prediction: Prediction,
        alphas: Tensor | None,
        sampler: Literal["ddim", "ddpm"] = "ddim",
        steps: int = 50,
    ):
        super().__init__(net, latent, prediction, alphas, sampler, steps, clip=False, conditions=net.texts)
        self.picture, self._vae = picture, (vae,)

    @property
    def vae(self) -> Any:
        """The autoencoder, where the latents are."""
        return self._vae[0].to(self.alphas.device)

    @property
    def images(self) -> Images:
        return Images(self.picture, (0.5,), (0.5,))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents ``(batch, C, H, W)`` to images, about [-1, 1]."""
        settings = self.vae.config
        scaled = latents / settings.scaling_factor + (getattr(settings, "shift_factor", None) or 0.0)
        image: Tensor = self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0]
        return image.float()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Images ``(batch, C, H, W)`` in [-1, 1] to their latents; latents are left as they are."""
        if tuple(x.shape[1:]) == tuple(self.image):
            return x
        settings = self.vae.config
        mean = self.vae.encode(x.to(self.vae.dtype)).latent_dist.mean.float()
        return (mean - (getattr(settings, "shift_factor", None) or 0.0)) * float(settings.scaling_factor)

    def generate(self, sample: Sampler) -> Distribution:
        """Noise to picture through the whole chain, for a text drawn evenly."""
        return Point(self.decode(sample("z", super().generate(sample))))

    def link(self, sample: Sampler, x: Tensor) -> Distribution:
        """One link of the chain in the latents of images ``(batch, C, H, W)`` in [-1, 1], or of latents."""
        return super().link(sample, self.encode(x))


class LatentDiffusion(nn.Module):
    """The denoiser of a text-to-image pipeline, with the chain that samples pictures for texts from it; see :class:`LatentChain`.

    Its parameters are the denoiser's alone. The autoencoder and the texts' embeddings are its teacher's, and the same for students.

    Args:
        chain: in which the denoiser is.
        made: makes a fresh denoiser of a width.
    """

    def __init__(self, chain: LatentChain, made: Callable[[int], nn.Module]):
        super().__init__()
        self.chain, self._made = chain, made
        self.width: int = self.unet.config.block_out_channels[0]

    @property
    def unet(self) -> Any:
        """The denoiser."""
        return self.chain.net.unet

    @classmethod
    def of(
        cls,
        unet: Any,
        scheduler: Any,
        vae: Any,
        picture: tuple[int, int, int],
        told: Told,
        steps: int | None = None,
        sampler: Literal["ddim", "ddpm"] | None = None,
    ) -> LatentDiffusion:
        """The parts that diffusers has loaded, in eval mode.

        Args:
            unet: a ``UNet2DConditionModel``.
            scheduler: its noise schedule.
            vae: the autoencoder of its latents.
            picture: ``(C, H, W)`` of the images.
            told: the unet with the texts.
            steps: links of the chain; by default 50.
            sampler: by default DDIM's, or Euler's steps for a flow.

        Raises:
            BadInput: a schedule that is not supported.
        """
        prediction = prediction_of(scheduler)
        alphas = None if prediction == "flow" else scheduler.alphas_cumprod
        size = unet.config.sample_size
        height, wide = (size, size) if isinstance(size, int) else size
        latent = (unet.config.in_channels, height, wide)
        chain = LatentChain(told, latent, vae, picture, prediction, alphas, sampler or "ddim", steps or 50)
        settings, kind = dict(unet.config), type(unet)
        return cls(chain, lambda width: kind.from_config(_of_width(settings, width))).eval()

    def model(self) -> Model:
        """The network with its two programs."""
        return Model(self, self.chain.images, self.chain.generate, link=self.chain.link)

    def shared(self) -> tuple[nn.Module, nn.Module]:
        """What it shares with its students beside its own weights: the autoencoder, and the embeddings of the texts."""
        told = nn.Module()
        for name, tensor in self.chain.net.named_buffers(recurse=False):
            told.register_buffer(name, tensor)
        return self.chain.vae, told

    def shrunk(self, width: int, steps: int | None = None) -> LatentDiffusion:
        """A fresh denoiser of another width without guidance, in a chain of that many steps where they are given."""
        c = self.chain
        told = c.net.smaller(self._made(width))
        alphas = None if c.prediction == "flow" else c.alphas[1:]
        chain = LatentChain(told, c.image, c._vae[0], c.picture, c.prediction, alphas, c.sampler, steps or c.steps)
        return LatentDiffusion(chain, self._made)


def _of_width(settings: dict[str, Any], width: int) -> dict[str, Any]:
    """A UNet's configuration with other channels; groups of norms and heads of attention fall where they would not divide them."""
    widths = settings["block_out_channels"]
    blocks = tuple(max(1, round(c * width / widths[0])) for c in widths)
    found = dict(settings) | {"block_out_channels": blocks}
    if settings.get("norm_num_groups") is not None:
        found["norm_num_groups"] = math.gcd(settings["norm_num_groups"], *blocks)
    # What diffusers calls the dimension of a head is their number here.
    heads = settings.get("num_attention_heads") or settings["attention_head_dim"]
    each = [heads] * len(blocks) if isinstance(heads, int) else list(heads)
    found["attention_head_dim"] = tuple(math.gcd(h, c) for h, c in zip(each, blocks, strict=True))
    return found | {"num_attention_heads": None}
