"""Images that take no guidance: from the teacher's own prior, which needs nothing but the teacher, and plain noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..energy.view import Energy, Look
from ..noise import Noise
from ..trace import run
from .synthesis import Watch


@dataclass(frozen=True)
class Ancestral:
    """The teacher's own images: ancestral sampling, then sweeps of inference and generation.

    A sweep infers an image's latents and generates it again from them. The chain's stationary distribution is the teacher's model of
    the data as its encoder sees it, which lies closer to the data than samples of the prior (Rezende et al., "Stochastic
    backpropagation", ICML 2014; Bengio et al., "Generalized denoising auto-encoders", NeurIPS 2013).

    Args:
        observe: what becomes of the output's conditional in the end: its "mean", a "sample" with all of its noise, or "mixed", a sample
            with a share of the noise that is drawn for each image, evenly from none to all of it. How noisy real images are is not
            known without any; an encoder that has seen every share is ready for all.
        sweeps: of inference and generation.
    """

    observe: Literal["mean", "sample", "mixed"] = "mean"
    sweeps: int = 0

    @torch.no_grad()
    def __call__(self, energy: Energy, look: Look, n: int, noise: Noise, watch: Watch | None = None) -> Tensor:
        """``(n, C, H, W)`` float32 in [0, 1]; row ``i`` depends on the noise's row ``i`` alone. No energy guides it."""
        teacher = look.teacher
        trace = run(teacher.program("generate"), noise=noise, n=n, device=teacher.device)
        for sweep in range(self.sweeps):
            trace = run(teacher.program("infer"), trace.out.dist.mean, noise=noise.fold("sweep", sweep))
        x = trace.out.dist.mean if self.observe == "mean" else trace.output
        if self.observe == "mixed":
            share = noise.uniform("share of the output's noise", (n, *[1] * (x.dim() - 1)), x.device)
            x = torch.lerp(trace.out.dist.mean, x, share)
        return teacher.images.clip(teacher.images.decode(x).float())


@dataclass(frozen=True)
class Uniform:
    """Pixels of uniform noise: what a surrogate must beat.

    Args:
        shape: ``(C, H, W)``.
    """

    shape: tuple[int, int, int]

    def __call__(self, energy: Energy, look: Look, n: int, noise: Noise, watch: Watch | None = None) -> Tensor:
        """``(n, C, H, W)`` float32 in [0, 1). No energy guides it."""
        return noise.uniform("pixels", (n, *self.shape), look.teacher.device)
