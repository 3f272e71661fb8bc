"""What a metric looks at: images turned into rows of features, by a named choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """A named way to turn images into features. The name goes into metrics.json: a distance means nothing without it.

    `extract` maps float32 images (batch, C, H, W) in [0, 1] to floating features (batch, d). It is called on the CPU's images, at most
    `batch` at a time, without gradients, and must treat each image by itself.
    With `pixels` False it takes any finite numbers instead, those of data that are no pictures.
    """

    name: str
    extract: Callable[[Tensor], Tensor]
    batch: int = 256
    pixels: bool = True

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("features: found an empty name, expected one that says which features these are")
        if self.batch < 1:
            raise ValueError(f"features {self.name!r}: found batch {self.batch}, expected 1 image or more")

    def __call__(self, images: Tensor) -> NDArray[numpy.float32]:
        """The features of `images`, float32 of shape (n, d).

        `images` is (n, C, H, W), either uint8, or floating in [0, 1]; it is brought to float32 in [0, 1].
        Raises ValueError where images are not so, or the features are not a finite floating (batch, d) with one d for all batches.
        """
        _check_images(self.name, images, self.pixels)
        parts: list[NDArray[numpy.float32]] = []
        width: int | None = None
        for chunk in images.split(self.batch):
            pixels_in_range = chunk.float().cpu() / 255 if chunk.dtype == torch.uint8 else chunk.float().cpu()
            with torch.no_grad():
                found = self.extract(pixels_in_range)
            _check_features(self.name, found, len(chunk), width)
            width = found.shape[1]
            parts.append(found.detach().float().cpu().numpy())
        return numpy.concatenate(parts)


def pixels(bounded: bool = True) -> Features:
    """The images themselves: C*H*W pixels in [0, 1] per row. No network needed; no idea of content either.

    Without `bounded`, the values of data that are no pictures, as they are.
    """
    return Features("pixels", _flatten, pixels=bounded)


def standardized(train: Tensor) -> Features:
    """Each channel less its mean, in units of its standard deviation, both of training data (n, C, H, W): for data that are no pictures,
    whose channels may have units of their own.

    Raises ValueError where a channel does not vary.
    """
    axes = (0, 2, 3)
    mean, std = train.double().mean(axes, keepdim=True), train.double().std(axes, keepdim=True)
    if not (std > 0).all():
        raise ValueError(f"features 'standardized': channel {int((std.flatten() == 0).nonzero()[0])} of the training data does not vary")
    return Features("standardized", lambda x: ((x - mean) / std).float().flatten(1), pixels=False)


def from_network(name: str, network: Callable[[Tensor], Tensor], batch: int = 256, device: str | torch.device = "cpu") -> Features:
    """The output of `network`, a map of float32 images (batch, C, H, W) in [0, 1] to features (batch, d), as named features.

    The network does its own normalization and resizing. A module is moved to `device` and stays there; it is run in eval mode, and left
    in the mode it was in. Images go to `device` at most `batch` at a time.
    Raises ValueError where the name is empty or the batch is below 1; the result raises ValueError where the network's output is wrong.
    """
    if isinstance(network, nn.Module):
        network.to(device)

    def extract(images: Tensor) -> Tensor:
        with _evaluating(network):
            try:
                return network(images.to(device))
            except Exception as error:
                error.add_note(f"This happened while the feature network {name!r} read images of shape {tuple(images.shape)}.")
                raise

    return Features(name, extract, batch)


def _flatten(images: Tensor) -> Tensor:
    return images.flatten(1)


@contextmanager
def _evaluating(network: object) -> Iterator[None]:
    """Eval mode for the length of a block, if it is a module; then every submodule has its own mode again."""
    modes = [(module, module.training) for module in network.modules()] if isinstance(network, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_images(name: str, images: Tensor, pixels: bool) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
        found = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"features {name!r}: found images as {found}, expected a tensor (n, C, H, W) of at least one image")
    if images.dtype == torch.uint8:
        return
    if not images.is_floating_point():
        raise ValueError(f"features {name!r}: found images of type {images.dtype}, expected uint8, or floating in [0, 1]")
    if not pixels:
        if not images.isfinite().all():
            raise ValueError(f"features {name!r}: found values that are not finite")
        return
    low, high = float(images.min()), float(images.max())
    # Written so that NaN fails as well.
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"features {name!r}: found images in [{low:g}, {high:g}], expected [0, 1]; clamp or rescale them first")


def _check_features(name: str, found: object, rows: int, width: int | None) -> None:
    expected = f"a finite floating tensor of shape ({rows}, {'d' if width is None else width})"
    if not isinstance(found, Tensor):
        raise ValueError(f"feature network {name!r}: found {type(found).__name__}, expected {expected}")
    if found.ndim != 2 or len(found) != rows or found.shape[1] == 0 or (width is not None and found.shape[1] != width):
        raise ValueError(f"feature network {name!r}: found shape {tuple(found.shape)}, expected {expected}, one row per image")
    if not found.is_floating_point():
        raise ValueError(f"feature network {name!r}: found type {found.dtype}, expected {expected}")
    # After the cast: a float64 feature beyond the range of float32 is no feature either.
    wrong = int((~torch.isfinite(found.float())).sum())
    if wrong:
        raise ValueError(f"feature network {name!r}: found {wrong} values that are not finite in float32, expected {expected}")
