"""Energies of a network's own statistics: what the training data fed its layers, against what the images feed them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ..errors import BadInput, BrokenFile
from ..model import Model, evaluating
from ..noise import Noise
from ..state import read_tensors, write_tensors
from .view import Energy, Moments, Term, View, energy

FILE = "activations.safetensors"
"""Name of the side-file of activation statistics, in the folder of the checkpoint."""


@energy
def batchnorm(view: View) -> Tensor:
    """Distance of the batch's moments from the running ones, at every BatchNorm layer of the teacher, ``()``.

    The sum over layers of |mean - running mean| + |variance - running variance|, Euclidean norms over channels:
    Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020.

    Raises:
        ValueError: the teacher has no BatchNorm layer with running statistics.
    """
    distances = [
        vector_norm(mean - layer.running_mean) + vector_norm(variance - layer.running_var)
        for layer, mean, variance in view.moments
        if layer.running_mean is not None
    ]
    if not distances:
        raise ValueError("batchnorm wants a teacher with BatchNorm layers; this one has none that keep statistics")
    return torch.stack(distances).sum()


@energy
def relative_batchnorm(view: View) -> Tensor:
    """Squared distance of the batch's moments from the running ones, each channel in units of its running std, ``()``.

    The sum over the teacher's BatchNorm layers of the mean over channels of (difference of means / std)² + (ratio of stds - 1)². Each
    square is the product of what two halves of the batch give, every other image and the rest. Their noise is independent, so its square,
    by which small batches seem far from any statistics and alike images seem near, drops out of the means; the value can be below 0. Of
    one image it is the square.

    Raises:
        ValueError: the teacher has no BatchNorm layer with running statistics.
    """
    distances = []
    for layer, one, other in view.halves:
        if layer.running_mean is None:
            continue
        std = (layer.running_var + layer.eps).sqrt()
        means, stds = zip(*[((m - layer.running_mean) / std, (v + layer.eps).sqrt() / std - 1) for m, v in (one, other)], strict=True)
        distances.append((means[0] * means[1] + stds[0] * stds[1]).mean())
    if not distances:
        raise ValueError("relative_batchnorm wants a teacher with BatchNorm layers; this one has none that keep statistics")
    return torch.stack(distances).sum()


@torch.no_grad()
def record(model: Model, images: Tensor, noise: Noise = Noise(), batch: int = 256) -> dict[str, Tensor]:
    """The mean and standard deviation of each channel that is fed to each layer, over a set of images.

    Taken where the training data is, they are all of it that leaves: Lopes, Fenu and Starner, "Data-Free Knowledge
    Distillation for Deep Neural Networks", NeurIPS workshops 2017.

    Args:
        model: of the trained network, which is left as it was.
        images: ``(n, C, H, W)`` in [0, 1].
        noise: of the latents that are inferred; image ``i`` takes row ``i``.
        batch: images at a time; the result does not depend on it.

    Returns:
        ``LAYER.mean`` and ``LAYER.std`` of every convolution and linear layer's input and of a classifier's logits
        (``top layer``), each ``(channels,)`` float32.

    Raises:
        ValueError: there are no images, or they are not of the model's shape.
    """
    if not len(images):
        raise ValueError("activation statistics of no images")
    first: dict[str, Tensor] = {}  # means, and mean squares below: batches weighted by their images
    second: dict[str, Tensor] = {}
    with evaluating(model.net):
        for start in range(0, len(images), batch):
            x = images[start : start + batch].to(model.device)
            share = len(x) / len(images)
            for name, (mean, variance) in View(x, model, noise=noise.at(range(start, start + len(x)))).activations.items():
                mean, variance = mean.double(), variance.double()
                first[name] = first.get(name, 0.0) + share * mean
                second[name] = second.get(name, 0.0) + share * (variance + mean**2)
    summary = {}
    for name, mean in first.items():
        summary[f"{name}.mean"] = mean.float().cpu()
        summary[f"{name}.std"] = (second[name] - mean**2).clamp_min(0).sqrt().float().cpu()
    return summary


def save(summary: Mapping[str, Tensor], folder: Path) -> None:
    """Write the statistics beside a checkpoint."""
    write_tensors(folder / FILE, summary)


def load(folder: Path) -> dict[str, Tensor]:
    """The statistics beside a checkpoint, as :func:`record` gave them.

    Raises:
        BrokenFile: there are none, or the file is not one of them.
    """
    path = folder / FILE
    summary = read_tensors(path)
    if not summary:
        raise BrokenFile(f"{path}: statistics of no layer")
    for name, tensor in summary.items():
        layer, _, what = name.rpartition(".")
        other = summary.get(f"{layer}.{'std' if what == 'mean' else 'mean'}")
        if not layer or what not in ("mean", "std") or other is None:
            raise BrokenFile(f"{path}: {name!r}; a pair LAYER.mean and LAYER.std is expected")
        if tensor.dtype != torch.float32 or tensor.ndim != 1 or not len(tensor) or tensor.shape != other.shape:
            raise BrokenFile(
                f"{path}: {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; a float32 vector as long as its pair is expected"
            )
        if not tensor.isfinite().all() or (what == "std" and (tensor < 0).any()):
            raise BrokenFile(f"{path}: {name!r} holds NaN, infinite or, for a standard deviation, negative values")
    return summary


def activation_summary(summary: Mapping[str, Tensor]) -> Energy:
    """Distance of what the batch feeds each layer from what the training data did, ``()``.

    For each layer the squared 2-Wasserstein distance between the diagonal Gaussians of both, relative to the variance on the
    data: the sum over channels of (difference of means)² + (difference of stds)², over that of std². Then the sum over
    layers. Needs no BatchNorm.

    Args:
        summary: from :func:`record` or :func:`load`; some layers of it may be left out.

    Raises:
        BadInput: when it looks, at a teacher that has no such layers.
    """

    @functools.cache
    def layers(device: torch.device) -> dict[str, Moments]:
        names = [name.removesuffix(".mean") for name in summary if name.endswith(".mean")]
        return {name: (summary[f"{name}.mean"].to(device), summary[f"{name}.std"].to(device)) for name in names}

    def score(view: View) -> Tensor:
        distances = []
        for name, (mean, std) in layers(view.x.device).items():
            if name not in view.activations or view.activations[name][0].shape != mean.shape:
                raise BadInput(f"activation_summary: its layer {name!r} of {len(mean)} channels is not one of the teacher's")
            batch_mean, batch_variance = view.activations[name]
            size = (std**2).sum().clamp_min(1e-12)
            # A root has no gradient at 0, which is the variance of one image's logits.
            batch_std = (batch_variance + 1e-6 * size / len(std)).sqrt()
            distances.append((((batch_mean - mean) ** 2) + (batch_std - std) ** 2).sum() / size)
        return torch.stack(distances).sum()

    return Energy((Term("activation_summary", score),))
