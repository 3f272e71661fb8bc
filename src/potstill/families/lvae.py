"""Ladder variational autoencoder: the hierarchical VAE of Chen et al. (CVPR 2023), after Sønderby et al. (NeurIPS 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from ..model import Images, Model
from ..trace import Sampler, gaussian
from .blocks import Down, Up, halvings

# The published code divides by this rounded ln 2; checkpoints trained with it expect the same.
_LN2 = 0.6931
_MIN_STD = 1e-6


def split(h: Tensor) -> Normal:
    """Channels ``(batch, 2 c, H, W)`` to a normal of ``c`` channels; the std is a softplus that is 1 where its input is 0."""
    mean, raw = h.chunk(2, 1)
    return gaussian(mean, F.softplus(raw) / _LN2 + _MIN_STD)


def combine(a: Normal, b: Normal) -> Normal:
    """The product of two normals, normalized: the precision-weighted posterior of a ladder VAE."""
    precision_a, precision_b = a.scale**-2, b.scale**-2
    precision = precision_a + precision_b
    return gaussian((a.loc * precision_a + b.loc * precision_b) / precision, precision**-0.5)


class LVAE(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="potstill",
    tags=["potstill", "vae", "lvae"],
    license="apache-2.0",
):
    """Latents ``z{levels}`` (top, 1x1) to ``z1`` (bottom, half the image), then ``out``, a Gaussian of fixed std.

    The published network is ``LVAE(image=(3, 32, 32), width=128)``; its state dict loads as it is.
    Every level halves the image; the top level takes all halvings that are left, down to 1x1.

    Args:
        image: ``(C, H, W)``; published for 32 and 64 pixels, tested here for 8, 16, 28, 32 and 64.
        width: channels of every hidden map.
        levels: number of latent maps, from 1 to the number of times the image can be halved.
        latent: channels of every latent map.
        std: standard deviation of the output, in units of an image in [0, 1]; published: sqrt(0.05).
        family: written to ``config.json``, so that a checkpoint says what it is.

    Raises:
        ValueError: the image has no pixels, a count is below 1, or there are more levels than halvings.
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 32),
        width: int = 128,
        levels: int = 5,
        latent: int = 16,
        std: float = 0.05**0.5,
        family: str = "lvae",
    ):
        super().__init__()
        channels, height, pixels_wide = image
        if min(channels, height, pixels_wide, width, latent) < 1 or not std > 0 or max(height, pixels_wide) < 2:
            raise ValueError(
                f"LVAE(image={tuple(image)}, width={width}, latent={latent}, std={std}): all must be positive, images of 2 pixels or more"
            )
        sizes = halvings((height, pixels_wide))
        if not 1 <= levels < len(sizes):
            raise ValueError(f"an LVAE on {height}x{pixels_wide} images has 1 to {len(sizes) - 1} levels, not {levels}")
        self.image, self.width, self.levels, self.latent, self.std = (channels, height, pixels_wide), width, levels, latent, std
        self.sizes = [*sizes[1:levels], (1, 1)]  # of z1, z2, ... up to the top
        left = len(sizes) - levels  # halvings that the top level takes
        first = Down(width, 2 * latent, width, [1] + [2] * (left - 1) if levels == 1 else [1])
        self.u1 = nn.Sequential(nn.Conv2d(channels, width, 5, 2, 2), first)
        for i in range(2, levels + 1):
            self.add_module(f"u{i}", Down(width, 2 * latent, width, [2] * (left if i == levels else 1)))
        for i in range(levels - 1, -1, -1):
            targets = sizes[i : i + left][::-1] if i == levels - 1 else [sizes[i]]
            # The output's second half is a std that the published model computes and does not use: kept for its checkpoints.
            self.add_module(f"d{i}", Up(latent, 2 * (latent if i else channels), width, targets))

    def model(self) -> Model:
        """The network with its two programs."""
        return Model(self, Images(self.image), self.generate, self.infer)

    def shrunk(self, width: int) -> LVAE:
        """A fresh network of the same shape of latents and another width."""
        return LVAE(self.image, width, self.levels, self.latent, self.std)

    def encoder(self) -> list[nn.Module]:
        """The modules that only :meth:`infer` uses."""
        return [self.get_submodule(f"u{i}") for i in range(1, self.levels + 1)]

    def prior(self, level: int, above: Tensor) -> Normal:
        """p(z_level | the latent above it)."""
        return split(self.get_submodule(f"d{level}")(above))

    def decode(self, z: Tensor) -> Normal:
        """p(x | z1), ``(batch, C, H, W)``."""
        mean = self.get_submodule("d0")(z)[:, : self.image[0]]
        return gaussian(mean, mean.new_full((1,), self.std).expand_as(mean))

    def generate(self, sample: Sampler) -> Distribution:
        """Top-down from noise."""
        z = sample.normal(f"z{self.levels}", (self.latent, *self.sizes[-1]))
        for level in range(self.levels - 1, 0, -1):
            z = sample(f"z{level}", self.prior, level, z)
        return self.decode(z)

    def infer(self, sample: Sampler, x: Tensor) -> Distribution:
        """Bottom-up over images ``(batch, C, H, W)``, then top-down, combining what both say of each latent."""
        likelihoods = []
        h = x
        for module in self.encoder():
            h, raw = module(h)
            likelihoods.append(split(raw))
        z = sample(f"z{self.levels}", likelihoods[-1])
        for level in range(self.levels - 1, 0, -1):
            prior = self.prior(level, z)
            z = sample(f"z{level}", combine(likelihoods[level - 1], prior), prior=prior)
        return self.decode(z)
