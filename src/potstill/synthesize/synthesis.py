"""What every synthesizer has in common: labels, the energies of finished images, and what is done about those that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..energy.view import Energy, Look, finite
from ..errors import BadInput
from ..model import Model
from ..noise import Noise

REDRAWS = 3
OFF = Energy()


@dataclass(frozen=True)
class Step:
    """What somebody who watches a synthesis is told after each step.

    Args:
        index: of the step, from 0.
        steps: in all.
        level: share of noise, from 1 to 0.
        images: what the images look like so far, ``(n, C, H, W)``, unclipped.
        parts: each active term of the energy, weighted, ``(n,)``.
    """

    index: int
    steps: int
    level: float
    images: Tensor
    parts: dict[str, Tensor]


Watch = Callable[[Step], None]


class Synthesizer(Protocol):
    """From noise to images."""

    def __call__(self, energy: Energy, look: Look, n: int, noise: Noise, watch: Watch | None = None) -> Tensor:
        """``(n, C, H, W)`` float32 in [0, 1], of the teacher's shape; row ``i`` draws its noise from the noise's row ``i`` alone.

        Args:
            energy: what to lower.
            look: makes a view of images; it holds the teacher and the labels.
            n: number of images.
            noise: addressed by the images' rows.
            watch: told after each step.
        """
        ...


@dataclass(frozen=True)
class Made:
    """A part of a surrogate.

    Args:
        images: ``(n, C, H, W)`` float32 in [0, 1].
        labels: what each was made for, or ``None``.
        prompts: what the prior was told of each, or ``None``.
        energies: each term of the energy of the finished images, weighted, ``(n,)``.
    """

    images: Tensor
    labels: list[int] | None = None
    prompts: list[str] | None = None
    energies: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Synthesis:
    """A synthesizer at work for one teacher.

    Args:
        synthesizer: makes the images.
        teacher: frozen.
        energy: what guides them, and is recorded of those that are done.
        classes: number of labels; row ``i`` is made for label ``i`` modulo that. ``None`` for images without labels.
        student: the adversary of energies that compare.
        wording: tells the prompt of each image, for the record.
        watch: told of the steps of the first batch, the one that begins with row 0.
    """

    synthesizer: Synthesizer
    teacher: Model
    energy: Energy = OFF
    classes: int | None = None
    student: Model | None = None
    wording: Callable[[Tensor | None, Noise, int], list[str]] | None = None
    watch: Watch | None = None

    def __call__(self, rows: Sequence[int], noise: Noise) -> Made:
        """The images of those rows. One with a pixel or an energy that is not finite is drawn again, from other noise.

        Raises:
            BadInput: one is not finite after so many draws; it names the term.
        """
        watch = self.watch if len(rows) and rows[0] == 0 else None
        images, labels = self._drawn(rows, noise, watch), self._labels(rows)
        prompts = self.wording(labels, noise.at(rows), len(rows)) if self.wording else None
        for attempt in range(REDRAWS + 1):
            with torch.no_grad():
                parts = self.energy.parts(self._look(rows, noise)(images, 1.0), every=True)
            good = images.isfinite().flatten(1).all(1) & finite(parts).to(images.device)
            bad = (~good).nonzero().flatten().tolist()
            if not bad:
                break
            if attempt == REDRAWS:
                terms = [name for name, part in parts.items() if not part.isfinite().all()]
                what = f"energy {', '.join(terms)}" if terms else "the image"
                raise BadInput(
                    f"surrogate: {what} of row {rows[bad[0]]} is not finite in {REDRAWS + 1} draws; lower scale, or look at the teacher"
                )
            again, fresh = [rows[i] for i in bad], noise.fold("redraw", attempt)
            images[bad] = self._drawn(again, fresh, None)
            if self.wording and prompts is not None:
                for i, prompt in zip(bad, self.wording(self._labels(again), fresh.at(again), len(again)), strict=True):
                    prompts[i] = prompt
        return Made(images, None if labels is None else labels.tolist(), prompts, {name: part.detach() for name, part in parts.items()})

    def _drawn(self, rows: Sequence[int], noise: Noise, watch: Watch | None) -> Tensor:
        return self.synthesizer(self.energy, self._look(rows, noise), len(rows), noise.at(rows), watch)

    def _look(self, rows: Sequence[int], noise: Noise) -> Look:
        return Look(self.teacher, self.student, self._labels(rows), noise.fold("look").at(rows))

    def _labels(self, rows: Sequence[int]) -> Tensor | None:
        return None if self.classes is None else torch.tensor([row % self.classes for row in rows], device=self.teacher.device)
