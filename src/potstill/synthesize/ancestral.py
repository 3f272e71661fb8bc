"""Images from the teacher's own prior: the surrogate data that needs nothing but the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..model import Model
from ..noise import Noise
from ..trace import run


@dataclass(frozen=True)
class Ancestral:
    """Ancestral sampling.

    Args:
        teacher: a model that generates.
        observe: "mean" for the mean of the output's conditional, or "sample" to draw from it, noise and all.
    """

    teacher: Model
    observe: Literal["mean", "sample"] = "mean"

    @torch.no_grad()
    def __call__(self, n: int, noise: Noise) -> Tensor:
        """``(n, C, H, W)`` float32 in [0, 1]; row ``i`` depends on the noise's row ``i`` alone."""
        trace = run(self.teacher.program("generate"), noise=noise, n=n, device=self.teacher.device)
        x = trace.out.dist.mean if self.observe == "mean" else trace.output
        return self.teacher.images.decode(x).float().clamp(0, 1)
