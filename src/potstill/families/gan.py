"""Generative adversarial networks (Goodfellow et al., NeurIPS 2014): noise, a label where there are classes, one network to an image."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from ..model import Images, Model
from ..trace import Sampler, gaussian
from .blocks import halvings

Architecture = Literal["conv", "mlp"]

LABEL = "y"
"""The node that holds the label of a conditional GAN's image."""

_COARSEST = 4  # pixels a side of the map that noise becomes first, as in DCGAN
_HIDDEN = 3  # layers of an MLP
_SLOPE = 0.2
_MIN_STD = 1e-3  # the noise behind a generated image can be known exactly, and its density would have no bound


def _maps(image: tuple[int, int, int], width: int) -> list[tuple[int, int, int]]:
    """Shapes ``(C, H, W)`` of the hidden maps, finest first: twice the channels for half the size, up to 8 times."""
    sizes = halvings(image[1:])
    coarsest = next(i for i, size in enumerate(sizes) if max(size) <= _COARSEST)
    return [(width * 2 ** min(i, 3), *size) for i, size in enumerate(sizes[: coarsest + 1])]


class _Normalized(nn.Module):
    """Each position's channels divided by their root mean square (Karras et al., "Progressive Growing of GANs", ICLR 2018).

    Unlike BatchNorm, it leaves an image independent of the batch around it while it trains too.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class _Generator(nn.Sequential):
    """``(batch, inputs)`` to images ``(batch, C, H, W)`` in [-1, 1]."""

    def __init__(self, inputs: int, image: tuple[int, int, int], width: int, arch: Architecture):
        activation = nn.LeakyReLU(_SLOPE)
        layers: list[nn.Module]
        if arch == "mlp":
            layers = [nn.Linear(inputs, width), activation]
            for _ in range(_HIDDEN - 1):
                layers += [nn.Linear(width, width), activation]
            layers += [nn.Linear(width, image[0] * image[1] * image[2]), nn.Unflatten(1, image)]
        else:
            maps = _maps(image, width)
            channels, height, pixels_wide = maps[-1]
            layers = [nn.Linear(inputs, channels * height * pixels_wide), nn.Unflatten(1, maps[-1]), _Normalized(), activation]
            for finer, *size in maps[-2::-1]:
                layers += [nn.Upsample(tuple(size)), nn.Conv2d(channels, finer, 3, 1, 1), _Normalized(), activation]
                channels = finer
            layers += [nn.Conv2d(channels, image[0], 3, 1, 1)]
        super().__init__(*layers, nn.Tanh())


class _Reader(nn.ModuleList):
    """Images ``(batch, C, H, W)`` in [-1, 1] to every hidden layer, from the pixels on; the last one is ``(batch, outputs)``."""

    def __init__(self, image: tuple[int, int, int], width: int, arch: Architecture):
        if arch == "mlp":
            sizes = [image[0] * image[1] * image[2]] + _HIDDEN * [width]
            layers: list[nn.Module] = [nn.Linear(a, b) for a, b in pairwise(sizes)]
            self.outputs = width
        else:
            maps = _maps(image, width)
            channels = [image[0], *(c for c, _, _ in maps)]
            layers = [nn.Conv2d(a, b, 3, 2 if i else 1, 1) for i, (a, b) in enumerate(pairwise(channels))]
            self.outputs = maps[-1][0] * maps[-1][1] * maps[-1][2]
        super().__init__(layers)
        self._flat = arch == "mlp"

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = []
        h = x.flatten(1) if self._flat else x
        for layer in self:
            h = F.leaky_relu(layer(h), _SLOPE)
            hidden.append(h)
        return [*hidden[:-1], hidden[-1].flatten(1)]


class GAN(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="potstill",
    tags=["potstill", "gan"],
    license="apache-2.0",
):
    """Noise ``z``, a label ``y`` where there are classes, then ``out``, an image without any spread.

    The convolutional one is like DCGAN (Radford et al., ICLR 2016), but enlarges by nearest neighbor, which leaves no checkerboard,
    and has no BatchNorm.

    Args:
        image: ``(C, H, W)``.
        width: channels of the finest hidden map, or of every hidden layer of an MLP.
        latent: length of ``z``.
        classes: number of labels, which the generator is shown; 0 for none.
        arch: "conv" or "mlp".
        encoder: whether there is a network from an image to what it was generated from, and so the program "infer".
        family: written to ``config.json``, so that a checkpoint says what it is.

    Raises:
        ValueError: a count is below 1, or the architecture is another.
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 32),
        width: int = 64,
        latent: int = 64,
        classes: int = 0,
        arch: Architecture = "conv",
        encoder: bool = False,
        family: str = "gan",
    ):
        super().__init__()
        if min(*image, width, latent) < 1 or classes < 0:
            raise ValueError(
                f"GAN(image={tuple(image)}, width={width}, latent={latent}, classes={classes}): all must be positive, but classes may be 0"
            )
        if arch not in ("conv", "mlp"):
            raise ValueError(f"GAN(arch={arch!r}): conv or mlp is expected")
        channels, height, pixels_wide = image
        self.image, self.width, self.latent, self.classes, self.arch = (channels, height, pixels_wide), width, latent, classes, arch
        self.generator = _Generator(latent + classes, self.image, width, arch)
        self.encoder: nn.ModuleList | None = None
        if encoder:
            reader = _Reader(self.image, width, arch)
            self.encoder = nn.ModuleList([reader, nn.Linear(reader.outputs, 2 * latent + classes)])

    def model(self) -> Model:
        """The network with its programs."""
        return Model(self, Images(self.image, (0.5,), (0.5,)), self.generate, self.infer if self.encoder is not None else None)

    def shrunk(self, width: int, encoder: bool | None = None) -> GAN:
        """A fresh network of another width, with an encoder or without one, by default as this one."""
        with_encoder = self.encoder is not None if encoder is None else encoder
        return GAN(self.image, width, self.latent, self.classes, self.arch, with_encoder)

    def decode(self, z: Tensor, y: Tensor | None) -> Tensor:
        """Images ``(batch, C, H, W)`` in [-1, 1] from noise ``(batch, latent)`` and labels ``(batch,)`` int64."""
        inputs = z if y is None else torch.cat([z, F.one_hot(y, self.classes).to(z.dtype)], 1)
        images: Tensor = self.generator(inputs)
        return images

    def encode(self, x: Tensor) -> tuple[Normal, Categorical | None]:
        """q(z | x), ``(batch, latent)``, and q(y | x) where there are classes.

        Raises:
            ValueError: the network has no encoder.
        """
        if self.encoder is None:
            raise ValueError("this GAN has no encoder")
        reader, head = self.encoder
        mean, raw, logits = head(reader(x)[-1]).split([self.latent, self.latent, self.classes], 1)
        z = gaussian(mean, F.softplus(raw) + _MIN_STD)
        return z, Categorical(logits=logits, validate_args=False) if self.classes else None

    def _labels(self, n: int, device: torch.device) -> Categorical:
        return Categorical(logits=torch.zeros(n, self.classes, device=device), validate_args=False)

    def generate(self, sample: Sampler) -> Tensor:
        """Noise to image."""
        z = sample.normal("z", (self.latent,))
        return self.decode(z, sample(LABEL, self._labels(sample.n, sample.device)) if self.classes else None)

    def infer(self, sample: Sampler, x: Tensor) -> Tensor:
        """Images ``(batch, C, H, W)`` in [-1, 1] to what they were generated from, and back."""
        q_z, q_y = self.encode(x)
        z = sample("z", q_z)
        return self.decode(z, None if q_y is None else sample(LABEL, q_y, prior=self._labels(x.shape[0], x.device)))


class Discriminator(nn.Module):
    """Tells images from others by one logit each; with classes, by whether an image is of its label too.

    The label enters as a projection (Miyato and Koyama, "cGANs with Projection Discriminator", ICLR 2018).

    Args:
        image: ``(C, H, W)``.
        width: channels of the finest hidden map, or of every hidden layer of an MLP.
        classes: number of labels; 0 for none.
        arch: "conv" or "mlp".
    """

    def __init__(self, image: tuple[int, int, int], width: int = 32, classes: int = 0, arch: Architecture = "conv"):
        super().__init__()
        self.classes = classes
        self.reader = _Reader(image, width, arch)
        self.head = nn.Linear(self.reader.outputs, 1)
        self.label = nn.Embedding(classes, self.reader.outputs) if classes else None

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits ``(batch,)`` and every hidden layer ``(batch, ...)``.

        Args:
            x: ``(batch, C, H, W)`` in [0, 1].
            labels: ``(batch,)`` int64, where there are classes.
        """
        hidden = self.reader(2 * x - 1)
        logits = self.head(hidden[-1]).squeeze(1)
        if self.label is not None:
            logits = logits + (self.label(labels) * hidden[-1]).sum(1)
        return logits, hidden
