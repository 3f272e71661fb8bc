"""Guidance: energies of images, low where the teacher feels at home. They add up, and the networks run once for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.modules.batchnorm import _BatchNorm

from ..model import Model
from ..noise import Noise
from ..trace import Trace, run

Moments = tuple[Tensor, Tensor]
"""(mean, biased variance) of each channel over the batch and all positions, each ``(channels,)``."""


class View:
    """All that an energy may look at: images, and what the teacher and the student make of them.

    Everything is computed when first read, once, in float32 whatever autocast surrounds it, and with a graph back to the
    images exactly where they have one.

    Args:
        x: ``(batch, C, H, W)`` in [0, 1].
        teacher: in eval mode.
        y: labels ``(batch,)``, int64, where there are some.
        student: in eval mode; the adversary of energies that compare.
        noise: of the latents that are inferred; one row per image.
        progress: how far the synthesis is, from 0 to 1: what schedules go by.

    Raises:
        ValueError: the images are not of the teacher's shape, or there is not one whole number in ``y`` per image.
    """

    def __init__(
        self,
        x: Tensor,
        teacher: Model,
        *,
        y: Tensor | None = None,
        student: Model | None = None,
        noise: Noise = Noise(),
        progress: float = 1.0,
    ):
        if x.ndim != 4 or tuple(x.shape[1:]) != tuple(teacher.images.shape):
            raise ValueError(f"images of shape {tuple(x.shape)}; the teacher takes (batch, *{tuple(teacher.images.shape)})")
        if y is not None and (tuple(y.shape) != (len(x),) or y.is_floating_point()):
            raise ValueError(f"labels of shape {tuple(y.shape)}, {y.dtype}; one whole number is expected for each of {len(x)} images")
        self.x, self.teacher, self.student, self.noise, self.progress = x.float(), teacher, student, noise, progress
        self.y = None if y is None else y.to(x.device, torch.int64)
        self._fed: list[tuple[str, nn.Module, Tensor | tuple[Moments, ...]]] = []

    def __len__(self) -> int:
        return len(self.x)

    @property
    def labels(self) -> Tensor:
        """The labels, ``(batch,)`` int64.

        Raises:
            ValueError: there are none.
        """
        if self.y is None:
            raise ValueError("an energy asks for labels y, and the view has none; give one label per image")
        return self.y

    @cached_property
    def encoded(self) -> Tensor:
        """The images in the teacher's own range, ``(batch, C, H, W)``."""
        with self._exactly():
            return self.teacher.images.encode(self.x)

    @cached_property
    def trace(self) -> Trace:
        """The teacher's inference on the images."""
        with self._exactly(), self._listening():
            return self._infer(self.teacher, "teacher", self.encoded)

    @cached_property
    def rival(self) -> Trace:
        """The student's inference on the same images, with the same noise.

        Raises:
            ValueError: there is no student.
        """
        if self.student is None:
            raise ValueError("an energy asks for a student to compare the teacher with, and the view has none; give one")
        with self._exactly():
            return self._infer(self.student, "student", self.student.images.encode(self.x))

    @cached_property
    def moments(self) -> list[tuple[nn.Module, Tensor, Tensor]]:
        """Of every use of a BatchNorm layer of the teacher: the layer, and mean and variance of what the batch feeds it."""
        return [(module, *moments) for _, module, moments in self._moments_of(_BatchNorm)]

    @cached_property
    def halves(self) -> list[tuple[nn.Module, Moments, Moments]]:
        """As :attr:`moments`, of every other image and of the rest, each by itself; of one image, twice those of that one."""
        return [(module, *both) for _, module, both in self._moments_of(_BatchNorm, _halves)]

    @cached_property
    def activations(self) -> dict[str, Moments]:
        """Mean and variance of what the batch feeds every convolution and linear layer of the teacher, by the layer's name.

        A layer that is used again is ``name:1`` the second time. ``top layer`` are a classifier's logits.
        """
        found: dict[str, Moments] = {}
        uses: dict[str, int] = {}
        for name, _, moments in self._moments_of(_LAYERS):
            found[f"{name}:{uses[name]}" if name in uses else name] = moments
            uses[name] = uses.get(name, 0) + 1
        if isinstance(self.trace.out.dist, Categorical):
            with self._exactly():
                found["top layer"] = _moments(self.trace.out.dist.logits, -1)
        return found

    def _infer(self, model: Model, who: str, x: Tensor) -> Trace:
        if model.net.training:
            raise ValueError(f"the {who} is in train mode, in which looking at images would change its BatchNorm statistics; call .eval()")
        return run(model.program("infer"), x, noise=self.noise, device=self.x.device)

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        # Not as the surroundings have it: an energy logged under no_grad first must not kill the gradient that is asked for after.
        with torch.set_grad_enabled(self.x.requires_grad), torch.autocast(self.x.device.type, enabled=False):
            yield

    @contextmanager
    def _listening(self) -> Iterator[None]:
        self._fed.clear()  # of an attempt that failed
        with ExitStack() as stack:
            for name, module in self.teacher.net.named_modules():
                if isinstance(module, (_BatchNorm, *_LAYERS)):
                    stack.callback(module.register_forward_pre_hook(self._listener(name)).remove)
            yield

    def _listener(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def listen(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            h = inputs[0]
            # What convolutions and BatchNorm are fed, a graph holds anyway and guards against change: the moments, a fifth of a
            # pass of the network, can wait until somebody asks. Elsewhere holding on would cost memory, or see what came later.
            held = torch.is_grad_enabled() and not isinstance(module, nn.Linear)
            halves = _halves(h, 1) if isinstance(module, _BatchNorm) and not held else ()
            self._fed.append((name, module, h if held else (_moments(h, _channels(module)), *halves)))

        return listen

    def _moments_of(self, kinds: Any, of: Callable[[Tensor, int], Any] | None = None) -> list[tuple[str, nn.Module, Any]]:
        _ = self.trace
        with self._exactly():
            return [
                (name, module, (of or _moments)(fed, _channels(module)) if isinstance(fed, Tensor) else fed[1:] if of else fed[0])
                for name, module, fed in self._fed
                if isinstance(module, kinds)
            ]


_LAYERS = (nn.modules.conv._ConvNd, nn.Linear)


def _channels(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _moments(h: Tensor, channels: int) -> Moments:
    variance, mean = torch.var_mean(h.float(), [i for i in range(h.ndim) if i != channels % h.ndim], correction=0)
    return mean, variance


def _halves(h: Tensor, channels: int) -> tuple[Moments, Moments]:
    return _moments(h[::2], channels), _moments(h[1::2] if len(h) > 1 else h, channels)


@dataclass(frozen=True)
class Look:
    """Who looks at the images of one batch: what a synthesizer is handed.

    Args:
        teacher: in eval mode.
        student: the adversary of energies that compare, in eval mode.
        labels: ``(batch,)`` int64, for energies that ask for them.
        noise: of the latents that are inferred; one row per image.
    """

    teacher: Model
    student: Model | None = None
    labels: Tensor | None = None
    noise: Noise = field(default_factory=Noise)

    def __call__(self, x: Tensor, progress: float = 1.0) -> View:
        """A view of images ``(batch, C, H, W)`` in [0, 1] at a point of the synthesis, from 0 to 1."""
        return View(x, self.teacher, y=self.labels, student=self.student, noise=self.noise, progress=progress)


Score = Callable[[View], Tensor]
"""``(batch,)``, or ``()`` for an energy that looks at the batch as a whole; that one counts once per image."""


@dataclass(frozen=True)
class Term:
    """One score with its weight, active while ``start <= progress <= stop``. Plain data: it prints and compares.

    Raises:
        ValueError: the weight is not finite, or the schedule is no part of [0, 1].
    """

    name: str
    score: Score = field(repr=False)
    weight: float = 1.0
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise ValueError(f"energy {self.name!r} has weight {self.weight}; a finite number is expected")
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(f"energy {self.name!r} is scheduled from {self.start} to {self.stop}; 0 <= start <= stop <= 1 is expected")


@dataclass(frozen=True)
class Energy:
    """A weighted sum of named scores: ``0.1 * a + b.between(0.5, 1)`` is one. ``Energy()`` is guidance off."""

    terms: tuple[Term, ...] = ()

    def parts(self, view: View, every: bool = False) -> dict[str, Tensor]:
        """Each active term by name, weighted, ``(batch,)`` float32. Terms of weight 0 are left out, unread.

        Args:
            view: of the images.
            every: whatever the schedule says, to record the energies of finished images.

        Raises:
            ValueError: a score has another shape, or asks for what the view does not have.
        """
        parts = {}
        active = self.active(view.progress)
        for term in self.terms:
            if term.weight and (every or term.name in active):
                with torch.autocast(view.x.device.type, enabled=False):
                    score = term.score(view)
                if tuple(score.shape) not in ((), (len(view),)):
                    raise ValueError(
                        f"energy {term.name!r} has shape {tuple(score.shape)}; ({len(view)},), one per image, or () is expected"
                    )
                parts[term.name] = term.weight * score.float().expand(len(view))
        return parts

    def active(self, progress: float) -> frozenset[str]:
        """Names of the terms that count at a point of the synthesis, from 0 to 1."""
        return frozenset(t.name for t in self.terms if t.weight and t.start <= progress <= t.stop)

    def __call__(self, view: View, every: bool = False) -> Tensor:
        """The sum of the parts, ``(batch,)``; zeros where guidance is off."""
        return sum(self.parts(view, every).values(), torch.zeros(len(view), device=view.x.device))

    def __add__(self, other: Energy) -> Energy:
        names = [term.name for term in self.terms + other.terms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two energies of one sum are named {', '.join(twice)}; names tell them apart in every record")
        return Energy(self.terms + other.terms)

    def __rmul__(self, factor: float) -> Energy:
        return Energy(tuple(replace(term, weight=factor * term.weight) for term in self.terms))

    def __neg__(self) -> Energy:
        return -1.0 * self

    def between(self, start: float, stop: float) -> Energy:
        """The same energy, active from ``start`` to ``stop`` of the synthesis, both included; this replaces an earlier schedule."""
        return Energy(tuple(replace(term, start=start, stop=stop) for term in self.terms))


def energy(score: Score) -> Energy:
    """Make a function of a :class:`View` composable, under the function's name."""
    return Energy((Term(score.__name__, score),))


class DeadEnergy(RuntimeError):
    """An energy without a gradient with respect to what is guided: guidance by it would do nothing, in silence."""


def gradient(energy: Energy, view: View, wrt: Tensor, check: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """d(sum of the energies of all images) / d ``wrt``, and the parts, detached.

    Over the batch it is a sum, not a mean, so that one image's step does not depend on how many are beside it. The graph
    is freed: one view gives one gradient. Where no term is active the gradient is 0 and no network runs.

    Args:
        energy: what should fall.
        view: of images computed from ``wrt``.
        wrt: ``(batch, ...)``, the images or what they are made from, with ``requires_grad``.
        check: look at every term alone, one more backward pass each, to the images: also one whose gradient is 0 everywhere is dead then.

    Raises:
        DeadEnergy: naming the terms that have no gradient. Without ``check``, only those that are cut off from any graph.
    """
    # Autocast is off for the way back too, whose products it would round.
    with torch.enable_grad(), torch.autocast(view.x.device.type, enabled=False):
        parts = energy.parts(view)
        if not parts:
            return torch.zeros_like(wrt), {}
        # From the images to what they are made of all terms go one way, a dear one through a denoiser: their sum tells whether it is cut.
        dead = [name for name, part in parts.items() if not wrt.requires_grad or _is_dead(part, view.x, check)]
        if not dead:
            (found,) = torch.autograd.grad(torch.stack(list(parts.values())).sum(), wrt, allow_unused=True)
            if found is not None and not (check and not found.any()):
                return found, {name: part.detach() for name, part in parts.items()}
            dead = list(parts)
    raise DeadEnergy(
        f"energy {', '.join(map(repr, dead))} has no gradient with respect to what is guided; "
        "is something between them computed under torch.no_grad(), or constant?"
    )


def _is_dead(part: Tensor, x: Tensor, check: bool) -> bool:
    if not (part.requires_grad and x.requires_grad):
        return True
    if not check:
        return False
    (alone,) = torch.autograd.grad(part.sum(), x, retain_graph=True, allow_unused=True)
    return alone is None or not alone.any()


def finite(parts: Mapping[str, Tensor]) -> Tensor:
    """Which images have finite energies, ``(batch,)`` bool; ``()`` and true where there are no parts."""
    return torch.stack([part.isfinite() for part in parts.values()]).all(0) if parts else torch.ones((), dtype=torch.bool)
