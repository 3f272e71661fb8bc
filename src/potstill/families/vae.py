"""Variational autoencoder with one vector of latents (Kingma and Welling, 2014), on residual convolutions."""

from __future__ import annotations

import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from ..model import Images, Model
from ..trace import Sampler, gaussian
from .blocks import Down, Up, halvings

_MIN_STD = 1e-6


class VAE(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="potstill",
    tags=["potstill", "vae"],
    license="apache-2.0",
):
    """One latent vector ``z``, then ``out``, a Gaussian of fixed std.

    Args:
        image: ``(C, H, W)``.
        width: channels of every hidden map.
        latent: length of ``z``.
        std: standard deviation of the output, in units of an image in [0, 1].
        family: written to ``config.json``, so that a checkpoint says what it is.

    Raises:
        ValueError: a count is below 1, or the image has fewer than 2 pixels a side.
    """

    def __init__(self, image: tuple[int, int, int] = (3, 32, 32), width: int = 64, latent: int = 32, std: float = 0.1, family: str = "vae"):
        super().__init__()
        channels, height, pixels_wide = image
        if min(channels, height, pixels_wide, width, latent) < 1 or not std > 0 or max(height, pixels_wide) < 2:
            raise ValueError(
                f"VAE(image={tuple(image)}, width={width}, latent={latent}, std={std}): all must be positive, images of 2 pixels or more"
            )
        self.image, self.width, self.latent, self.std = (channels, height, pixels_wide), width, latent, std
        sizes = halvings((height, pixels_wide))
        self.stem = nn.Conv2d(channels, width, 5, 2, 2)
        self.down = Down(width, 2 * latent, width, [1] + [2] * (len(sizes) - 2))
        self.up = Up(latent, channels, width, sizes[-2::-1])

    def model(self) -> Model:
        """The network with its two programs."""
        return Model(self, Images(self.image), self.generate, self.infer)

    def shrunk(self, width: int) -> VAE:
        """A fresh network with the same latent and another width."""
        return VAE(self.image, width, self.latent, self.std)

    def encoder(self) -> list[nn.Module]:
        """The modules that only :meth:`infer` uses."""
        return [self.stem, self.down]

    def encode(self, x: Tensor) -> Normal:
        """q(z | x), ``(batch, latent)``."""
        mean, raw = self.down(self.stem(x))[1].flatten(1).chunk(2, 1)
        return gaussian(mean, F.softplus(raw) + _MIN_STD)

    def decode(self, z: Tensor) -> Normal:
        """p(x | z), ``(batch, C, H, W)``."""
        mean = self.up(z[:, :, None, None])
        return gaussian(mean, mean.new_full((1,), self.std).expand_as(mean))

    def generate(self, sample: Sampler) -> Distribution:
        """Noise to image."""
        return self.decode(sample.normal("z", (self.latent,)))

    def infer(self, sample: Sampler, x: Tensor) -> Distribution:
        """Images ``(batch, C, H, W)`` to latent and back."""
        return self.decode(sample("z", self.encode(x)))
