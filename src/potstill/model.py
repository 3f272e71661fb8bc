"""A teacher or a student: one network, and up to three programs over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .noise import NoiseSource
from .trace import Program, run


@contextmanager
def keeping() -> Iterator[dict[int, int]]:
    """Sizes in bytes, by where they lie, of what the block keeps until a gradient is computed, parameters aside.

    The block is to hold its results until it ends, or memory that is free again would be counted once for all that is put there.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor if tensor._base is None else tensor._base, nn.Parameter):  # a layer may keep its weight transposed
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def kept_for_gradient(call: Callable[[], object]) -> int:
    """Bytes that ``call()`` keeps until its gradient is computed, parameters aside."""
    with keeping() as kept:
        result = call()
    del result
    return sum(kept.values())


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Within the block the network is in eval mode, so that looking at it changes no BatchNorm statistics; then each module as before."""
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class Images:
    """How the library's images, float32 in [0, 1], become what a network was trained on: ``(x - mean) / std``.

    Data that are no pictures have the same three axes, with other meanings: a point of two coordinates is ``(2, 1, 1)``, a sequence
    of ``T`` steps ``(C, T, 1)``. Their values are any finite float32 in units of the data, wherever else [0, 1] is said.

    Args:
        shape: ``(C, H, W)``.
        mean: one number, or one per channel.
        std: one number, or one per channel.
        pixels: whether values are pixels, which lie in [0, 1] and are kept as uint8; others are kept as they are, as float32.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    pixels: bool = True

    @classmethod
    def between(cls, shape: tuple[int, int, int], low: float, high: float) -> Images:
        """Images of a network whose pixels go from ``low`` to ``high``, such as -1 to 1."""
        if not low < high:
            raise ValueError(f"images between {low} and {high}; the first must be less")
        return cls(shape, (low / (low - high),), (1 / (high - low),))

    def encode(self, x: Tensor) -> Tensor:
        """``(batch, C, H, W)`` in [0, 1] to the network's range."""
        mean, std = self._statistics(x)
        return (x - mean) / std

    def decode(self, x: Tensor) -> Tensor:
        """``(batch, C, H, W)`` in the network's range to [0, 1], unclipped."""
        mean, std = self._statistics(x)
        return x * std + mean

    def clip(self, x: Tensor) -> Tensor:
        """Pixels clipped to [0, 1]; other values as they are."""
        return x.clamp(0, 1) if self.pixels else x

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (x.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return mean, std


@dataclass(frozen=True)
class Model:
    """A network with its programs.

    Args:
        net: the parameters.
        images: range and shape of its images.
        generate: noise to image. VAE, LVAE, GAN, diffusion.
        infer: image to latents and reconstruction, or to a label. Encoders and classifiers.
        link: one random link per sample of a chain too long to unroll.
    """

    net: nn.Module
    images: Images
    generate: Program | None = None
    infer: Program | None = None
    link: Program | None = None

    def frozen(self) -> Model:
        """The same model, in eval mode and without gradients: a teacher must not learn, nor update its BatchNorm statistics."""
        self.net.eval().requires_grad_(False)
        return self

    def program(self, name: str) -> Program:
        """The program of that name.

        Raises:
            ValueError: the model has no such program.
        """
        program = {"generate": self.generate, "infer": self.infer, "link": self.link}.get(name)
        if program is None:
            raise ValueError(f"{type(self.net).__name__} has no program {name!r}")
        return program

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next((p.device for p in self.net.parameters()), torch.device("cpu"))

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.net.parameters())
        return f"Model({type(self.net).__name__}, {count:,} parameters, images {'x'.join(map(str, self.images.shape))})"

    @torch.no_grad()
    def sample(self, n: int, noise: NoiseSource) -> Tensor:
        """``n`` images ``(n, C, H, W)`` in [0, 1]: the mean of the output's conditional, which is what is looked at and measured.

        In eval mode, whatever mode the network is in and is left in: looking at a model does not change it.

        Raises:
            TypeError: the noise is no source of it, such as the seed alone.
        """
        _check_noise(noise)
        with evaluating(self.net):
            trace = run(self.program("generate"), noise=noise, n=n, device=self.device)
        return self.images.clip(self.images.decode(trace.out.dist.mean))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, noise: NoiseSource) -> Tensor:
        """Images ``(batch, C, H, W)`` in [0, 1] through the latents inferred from them and back, in eval mode as :meth:`sample`.

        Raises:
            TypeError: the noise is no source of it, such as the seed alone.
        """
        _check_noise(noise)
        with evaluating(self.net):
            trace = run(self.program("infer"), self.images.encode(x.to(self.device)), noise=noise)
        return self.images.clip(self.images.decode(trace.out.dist.mean))


def _check_noise(noise: object) -> None:
    if not isinstance(noise, NoiseSource):
        seed = noise if isinstance(noise, int) else 0
        raise TypeError(
            f"noise: a source is expected, found a value of type {type(noise).__name__}; pass Noise(({seed},)), where {seed} is the seed"
        )
