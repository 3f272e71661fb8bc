"""Anybody's own networks as models: an encoder with a decoder, a generator, a classifier, a denoiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from ..errors import BadInput
from ..model import Images, Model, evaluating
from ..trace import Sampler, gaussian
from .chain import Chain, Prediction

Spread = Literal["log_variance", "std", "log_std"]
_STDS: dict[Spread, Callable[[Tensor], Tensor]] = {
    "log_variance": lambda raw: (raw / 2).exp(),
    "std": lambda raw: raw,
    "log_std": lambda raw: raw.exp(),
}


def from_autoencoder(
    encode: Callable[[Tensor], Any] | nn.Module,
    decode: Callable[[Tensor], Any] | Images,
    images: Images | None = None,
    *,
    spread: Spread = "log_variance",
    std: float | None = 0.1,
    net: nn.Module | None = None,
    channels_last: bool = False,
) -> Model:
    """A VAE as a model with both programs; its one latent is the node ``z``, with a standard normal prior.

    ``from_autoencoder(net, images)`` is of one network with methods ``encode`` and ``decode``, and otherwise as
    ``from_autoencoder(net.encode, net.decode, images)``.

    Args:
        encode: a module, or a method of one such as ``vae.encode``: images ``(batch, C, H, W)`` in their own range to the posterior's mean
            and spread, as a pair, as one tensor with both on axis 1, as an object with ``embedding`` and ``log_covariance``, or a Normal.
        decode: likewise: latents to images, or to an object that has them as ``reconstruction`` or ``sample``.
        images: shape and range of its images, such as ``Images.between((3, 32, 32), -1, 1)``.
        spread: what the encoder's second part is.
        std: of the output, a Gaussian, in units of an image in [0, 1]; ``None`` for a plain image, whose loss is half the squared error.
        net: the module that holds both, where they are neither modules nor methods of modules.
        channels_last: whether both are on images ``(batch, H, W, C)``.

    Raises:
        BadInput: the encoder fails on images of that shape, or gives something else; one network is given that has no such methods.
    """
    if images is not None:
        if isinstance(decode, Images):
            raise BadInput("decode: a function of latents is expected, found Images; give encode, decode, images, or a network and images")
        return _autoencoder(encode, decode, images, spread, std, net, channels_last)
    if not isinstance(decode, Images):
        raise BadInput("images: the shape and range of its images are expected, such as Images.between((3, 32, 32), -1, 1)")
    methods = [getattr(encode, name, None) for name in ("encode", "decode")]
    if not all(callable(method) for method in methods):
        raise BadInput(f"{_name(encode)} has no methods encode and decode; give the two, whatever they are called, and images")
    return _autoencoder(methods[0], methods[1], decode, spread, std, net, channels_last)


def _autoencoder(
    encode: Any, decode: Any, images: Images, spread: Spread, std: float | None, net: nn.Module | None, channels_last: bool
) -> Model:
    if spread not in _STDS:
        raise BadInput(f"spread {spread!r}: one of {', '.join(_STDS)} is expected")
    net = net or _whole({"encoder": encode, "decoder": decode})
    layout = _Layout(channels_last)

    def posterior(x: Tensor) -> Distribution:
        return _posterior(encode(layout.into(x)), spread, encode)

    def output(z: Tensor) -> Distribution | Tensor:
        mean = layout.out_of(_image(decode(z), decode))
        if std is None:
            return mean
        scale = std / mean.new_tensor(images.std).view(-1, 1, 1)
        return gaussian(mean, scale.expand_as(mean))

    shape = _latent_shape(net, images, posterior)

    def generate(sample: Sampler) -> Distribution | Tensor:
        return output(sample.normal("z", shape))

    def infer(sample: Sampler, x: Tensor) -> Distribution | Tensor:
        return output(sample("z", posterior(x)))

    return Model(net, images, generate, infer)


def from_generator(net: nn.Module, images: Images, noise: int | Sequence[int], *, channels_last: bool = False) -> Model:
    """A GAN's generator, or a decoder alone, as a model that generates from one standard normal node ``z``.

    Args:
        net: called with noise ``(batch, *noise)``; returns images in their own range, or an object that has them as ``sample``.
        images: shape and range of its images, such as ``Images.between((3, 32, 32), -1, 1)`` for those of a tanh.
        noise: its length, or its shape without the batch, such as ``(100, 1, 1)``.
        channels_last: whether it gives images ``(batch, H, W, C)``.
    """
    shape, layout = (noise,) if isinstance(noise, int) else tuple(noise), _Layout(channels_last)

    def generate(sample: Sampler) -> Tensor:
        return layout.out_of(_image(net(sample.normal("z", shape)), net))

    return Model(net, images, generate)


def from_logits(net: nn.Module, images: Images, *, channels_last: bool = False) -> Model:
    """A classifier as a model that infers labels.

    Args:
        net: called with images ``(batch, C, H, W)`` in their own range; returns logits ``(batch, classes)``, or an object that has them
            as ``logits``, as the models of transformers do.
        images: shape, mean and std of what it was trained on.
        channels_last: whether it takes images ``(batch, H, W, C)``.
    """
    layout = _Layout(channels_last)

    def infer(sample: Sampler, x: Tensor) -> Categorical:
        found = net(layout.into(x))
        logits = found if isinstance(found, Tensor) else getattr(found, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            what = f"logits of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(found).__name__}"
            raise ValueError(f"{type(net).__name__} returns {what}; a tensor (batch, classes), or an object with such logits, is expected")
        return Categorical(logits=logits, validate_args=False)

    return Model(net, images, infer=infer)


def from_eps(
    net: nn.Module,
    image: tuple[int, int, int],
    alphas: Tensor | None,
    *,
    prediction: Prediction = "epsilon",
    sampler: Literal["ddim", "ddpm"] = "ddim",
    steps: int = 50,
    clip: bool = True,
) -> Model:
    """A denoiser ``eps(x, t)`` as a model that generates by a chain of links, and has the program ``link``; see :class:`Chain`.

    Args:
        net: called with noisy images ``(batch, C, H, W)`` in [-1, 1] and times ``(batch,)``; returns its prediction, or an object that
            has it as ``sample``.
        image: ``(C, H, W)``.
        alphas: products of ``1 - beta`` up to each time, ``(times,)``, falling from about 1; ``None`` for a flow.
        prediction: what it predicts: "epsilon", "v", "sample" or "flow".
        sampler: "ddim" or "ddpm"; a flow takes Euler's steps.
        steps: links of the chain.
        clip: predicted images to [-1, 1] at every link.

    Raises:
        BadInput: the numbers do not fit together.
    """
    try:
        return Chain(net, image, prediction, alphas, sampler, steps, clip).model()
    except ValueError as error:
        raise BadInput(str(error)) from None


class _Layout:
    """Between ``(batch, C, H, W)`` and the layout that a network has inside."""

    def __init__(self, channels_last: bool):
        self._last = channels_last

    def into(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1) if self._last else x

    def out_of(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2) if self._last else x


def _name(part: Any) -> str:
    return type(part).__name__ if isinstance(part, nn.Module) else getattr(part, "__name__", type(part).__name__)


def _whole(parts: dict[str, Any]) -> nn.Module:
    """The module that holds all parts: the one that they are methods of, or one made of them."""
    owners = {name: part if isinstance(part, nn.Module) else getattr(part, "__self__", None) for name, part in parts.items()}
    for name, owner in owners.items():
        if not isinstance(owner, nn.Module):
            raise BadInput(f"{name}: {_name(parts[name])} is no module, nor a method of one; give net, which holds its weights")
    first, *rest = owners.values()
    return first if all(owner is first for owner in rest) else nn.ModuleDict(owners)


def _field(found: Any, *names: str) -> Any:
    """What an object or a mapping has under one of those names."""
    for name in names:
        value = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
        if isinstance(value, Tensor):
            return value
    return None


def _image(found: Any, decode: Any) -> Tensor:
    x = found if isinstance(found, Tensor) else _field(found, "reconstruction", "sample")
    if x is None:
        raise ValueError(
            f"{_name(decode)} returns a {type(found).__name__}; images, or an object with reconstruction or sample, is expected"
        )
    return x


def _posterior(found: Any, spread: Spread, encode: Any) -> Distribution:
    if isinstance(found, Distribution):
        return found
    pair: Any = (_field(found, "embedding"), _field(found, "log_covariance"))
    if isinstance(found, Tensor):
        if found.ndim < 2 or found.shape[1] % 2:
            raise ValueError(f"{_name(encode)} returns {tuple(found.shape)}; mean and spread are expected, as two halves of axis 1")
        pair = found.chunk(2, 1)
    elif isinstance(found, (tuple, list)):
        pair = tuple(found[:2])
    if len(pair) != 2 or not all(isinstance(part, Tensor) for part in pair) or pair[0].shape != pair[1].shape:
        raise ValueError(
            f"{_name(encode)} returns a {type(found).__name__}; mean and spread of one shape are expected, as a pair, as one tensor with "
            "both on axis 1, or as an object with embedding and log_covariance"
        )
    return gaussian(pair[0], _STDS[spread](pair[1]))


@torch.no_grad()
def _latent_shape(net: nn.Module, images: Images, posterior: Callable[[Tensor], Distribution]) -> tuple[int, ...]:
    """Of one latent, seen by encoding two gray images; the network is left as it was."""
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    try:
        with evaluating(net):
            found = posterior(images.encode(torch.full((2, *images.shape), 0.5, device=device)))
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        raise BadInput(f"encoder: on images of {tuple(images.shape)}: {(str(error).splitlines() or [''])[0]}") from None
    return tuple(found.batch_shape + found.event_shape)[1:]
