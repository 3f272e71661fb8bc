"""Distillation of a chain on the teacher's own way from noise to images, which is kept in a pool between updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..divergence import Match, compare
from ..families.chain import Chain
from ..model import Model
from ..noise import Noise
from ..trace import Trace, run
from .distiller import UNSHARED, Shared
from .rows import of_all


class OnlineLinks(nn.Module):
    """One link per sample, begun where the teacher stands on its way, which it then goes on: one teacher call is target and progress.

    The shuffled, dynamic iterative distillation of Xiang et al. ("DKDM: Data-Free Knowledge Distillation for Diffusion Models with Any
    Architecture", CVPR 2025): unfinished images at every time of the chain stand in a pool, each batch takes some, and those that are
    finished begin again from fresh noise. The pool stands in the module's buffers, and so in the saved state of a training.

    Args:
        teacher: frozen by the caller; no submodule.
        student: the model that learns.
        chain: the teacher's.
        rules: which nodes of ``link`` to compare, and how.
        size: unfinished images that are kept.
        noise: of the images that the pool begins with.
        batch: images of which the first ones are advanced at a time.
        shared: with pools of other students, alike in all else, which go through the same batches.
    """

    x: Tensor
    done: Tensor
    told: Tensor

    def __init__(
        self,
        teacher: Model,
        student: Model,
        chain: Chain,
        rules: Sequence[Match],
        size: int,
        noise: Noise,
        batch: int = 256,
        shared: Shared = UNSHARED,
    ):
        super().__init__()
        self.net = student.net
        self._teacher, self._student, self.rules, self._chain = (teacher,), student, tuple(rules), (chain,)
        self._noise, self._batch, self._shared = noise, batch, shared
        self.register_buffer("x", torch.zeros((size, *chain.image), device=teacher.device))
        # Links behind each image; below 0 before the pool is filled.
        self.register_buffer("done", torch.full((size,), -1, dtype=torch.int64, device=teacher.device))
        # The condition of each, which stays the same on the whole way.
        self.register_buffer("told", torch.zeros(size if chain.conditions else 0, dtype=torch.int64, device=teacher.device))

    def forward(self, noise: Noise, index: Tensor) -> dict[str, Tensor]:
        """Weighted losses by node, each ``(batch,)``; the teacher's images of the batch are one link further on.

        Args:
            noise: of the links where they are random, and of the images that begin anew.
            index: places in the pool, ``(batch,)`` int64, each once, also over all processes.
        """
        if int(self.done[0]) < 0:
            for own, filled in zip((self.x, self.done, self.told), self._shared("pool", self._noise, self._filled), strict=True):
                own.copy_(filled)
        index = index.to(self.x.device)
        x, done = self.x[index], self.done[index]
        told = self.told[index] if len(self.told) else self.told
        target = self._shared("teacher", noise, lambda: self._linked(x, done, told, noise))
        student = self._student
        # What a link begins with is given, so the images that it would be noised from are not read.
        begins = {name: target[name].value for name in ("t", "xt", "told") if name in target}
        found = run(student.program("link"), x, noise=noise, given=begins)
        losses = compare(target, found, self.rules)
        finished = done + 1 == self._chain[0].steps
        fresh = noise.normal("xT", x.shape, x.device)
        advanced = torch.where(finished.view(-1, 1, 1, 1), fresh, target.output), torch.where(finished, 0, done + 1)
        where, x, done = map(of_all, (index, *advanced))  # every process keeps the whole pool
        self.x[where], self.done[where] = x, done
        if len(self.told):
            self.told[where] = of_all(torch.where(finished, self._tell(noise, len(index)), told))
        return losses

    def _tell(self, noise: Noise, n: int) -> Tensor:
        chance = noise.uniform("told", (n, 1), self.x.device)[:, 0]
        return (chance * self._chain[0].conditions).long()

    @torch.no_grad()
    def _linked(self, x: Tensor, done: Tensor, told: Tensor, noise: Noise) -> Trace:
        (teacher,), (chain,) = self._teacher, self._chain
        given = {"t": chain.links[done], "xt": x} | ({"told": told.float()} if len(told) else {})
        trace = run(teacher.program("link"), x, noise=noise, given=given)
        _ = trace.output  # drawn here, where no gradient is kept
        return trace

    @torch.no_grad()
    def _filled(self) -> tuple[Tensor, Tensor, Tensor]:
        """Evenly many images at every time of the chain, each brought there from noise; the links behind each, and its condition."""
        size, steps = len(self.x), self._chain[0].steps
        x = self._noise.normal("xT", self.x.shape, self.x.device)
        conditions = self._tell(self._noise, size) if len(self.told) else self.told
        everyone = torch.arange(size, device=x.device)
        goal = everyone * steps // size
        for k in range(int(goal[-1])):
            for rows in everyone[goal > k].split(self._batch):
                told = conditions[rows] if len(conditions) else conditions
                trace = self._linked(x[rows], torch.full_like(rows, k), told, self._noise.fold("link", k).at(rows.tolist()))
                x[rows] = trace.output
        return x, goal, conditions
