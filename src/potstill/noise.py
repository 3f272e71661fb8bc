"""Randomness as a function: the same (seed, name, row) gives the same numbers, in any order, batch or process.

The generator is Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): a keyed
bijection of a counter. The key is a hash of the seed and the node's name, the counter is (row, position in the row),
so a row's numbers need no state and none of the rows before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_IN_CACHE = 2**17  # numbers, each of which goes through a few words of eight bytes


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10.

    Args:
        counter: ``(4, ...)`` int64, each word in [0, 2**32).
        key: two words in [0, 2**32).

    Returns:
        ``(4, ...)`` int64, each word uniform in [0, 2**32).
    """
    c0, c1, c2, c3 = counter.unbind(0)
    for i in range(_ROUNDS):
        key0, key1 = ((k + i * step) & _MASK for k, step in zip(key, _KEY_STEPS, strict=True))
        # int64 products wrap modulo 2**64, so their bits are right. The shift is arithmetic and low halves stay unmasked:
        # one mask after the exclusive or clears what both leave above bit 31.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> 32).bitwise_xor_(c1).bitwise_xor_(key0).bitwise_and_(_MASK)
        c2 = (product0 >> 32).bitwise_xor_(c3).bitwise_xor_(key1).bitwise_and_(_MASK)
        c1, c3 = product1, product0
    return torch.stack([c0, c1 & _MASK, c2, c3 & _MASK])


@runtime_checkable
class NoiseSource(Protocol):
    """Where a trace takes its standard noise from."""

    def normal(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Standard normal float32 of the given shape; the first dimension is the batch."""
        ...

    def uniform(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Uniform float32 in [0, 1) of the given shape; the first dimension is the batch."""
        ...


@dataclass(frozen=True)
class Noise:
    """Standard noise addressed by name and row.

    Two models given the same ``Noise`` draw the same noise at nodes of the same name, whatever else they draw and in
    whatever order: this is all that "sharing the noise" takes.

    Args:
        key: the seed and everything folded into it.
        rows: one index in [0, 2**63) per sample of the batch. Row ``r`` of the noise depends on ``r`` alone, not on the
            batch around it, so an image does not change with the batch size or the number of processes.
            ``None`` stands for rows 0, 1, 2, ... of whatever batch is asked for.

    Raises:
        TypeError: the key is no tuple of ints and strings.
    """

    key: tuple[int | str, ...] = (0,)
    rows: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.key, tuple):
            raise TypeError(f"Noise: its key is a tuple such as (0,), where 0 is the seed; found a value of type {type(self.key).__name__}")
        if strange := [part for part in self.key if not isinstance(part, (int, str))]:
            raise TypeError(f"Noise: its key is of ints and strings; found a value of type {type(strange[0]).__name__} in it")

    def fold(self, *keys: int | str) -> Noise:
        """A fresh, independent source derived from this one."""
        return replace(self, key=self.key + keys)

    def at(self, rows: Sequence[int]) -> Noise:
        """The same source with the batch's rows addressed one by one."""
        return replace(self, rows=rows if isinstance(rows, range) else tuple(rows))

    def normal(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Standard normal float32 by Box and Muller's transform, computed in float64 so that devices agree."""
        return self._in_parts(Noise._normal, name, shape, device)

    def uniform(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Uniform float32 in [0, 1), a multiple of 2**-24."""
        return self._in_parts(Noise._uniform, name, shape, device)

    def _in_parts(
        self,
        draw: Callable[[Noise, str, Sequence[int], torch.device | str], Tensor],
        name: str,
        shape: Sequence[int],
        device: torch.device | str,
    ) -> Tensor:
        """On a CPU, few enough rows at a time that their words stay in its cache, which is three times as fast for a million rows."""
        batch = shape[0]
        rows = range(batch) if self.rows is None else self.rows
        part = max(1, _IN_CACHE // max(1, math.prod(shape[1:])))
        if batch <= part or len(rows) != batch or torch.device(device).type != "cpu":
            return draw(self, name, shape, device)
        whole = torch.empty(tuple(shape))
        for i in range(0, batch, part):
            there = rows[i : i + part]
            whole[i : i + part] = draw(self.at(there), name, (len(there), *shape[1:]), device)
        return whole

    def _normal(self, name: str, shape: Sequence[int], device: torch.device | str) -> Tensor:
        words = self._words(name, shape, device)  # of the first pair of numbers and of the second, in turn a radius and an angle
        r = words[0::2].double().add_(1).mul_(2.0**-32).log_().mul_(-2).sqrt_()  # the argument of the logarithm lies in (0, 1]
        a = words[1::2].double().mul_(2 * math.pi * 2.0**-32)
        cosines, sines = a.cos().mul_(r).float(), a.sin_().mul_(r).float()
        return self._arrange([cosines[0], sines[0], cosines[1], sines[1]], shape)

    def _uniform(self, name: str, shape: Sequence[int], device: torch.device | str) -> Tensor:
        return self._arrange([(word >> 8).float().mul_(2.0**-24) for word in self._words(name, shape, device)], shape)

    def permutation(self, name: str, n: int) -> Tensor:
        """A random order of ``range(n)``, ``(n,)`` int64."""
        words = replace(self, rows=(0,))._words(name, (1, 2 * n), "cpu")
        wide = self._arrange([w.double() for w in words], (1, 2 * n)).view(2, n)
        return torch.argsort(wide[0] * 2.0**20 + (wide[1] * 2.0**-12).floor(), stable=True)  # 52 bits: no ties in practice

    def _words(self, name: str, shape: Sequence[int], device: torch.device | str) -> Tensor:
        batch, per_row = shape[0], math.prod(shape[1:])
        rows = range(batch) if self.rows is None else self.rows
        if len(rows) != batch:
            raise ValueError(f"node {name!r} asks for {batch} rows of noise, but {len(rows)} rows were addressed")
        digest = hashlib.blake2b(repr((self.key, name)).encode(), digest_size=8).digest()
        key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
        index = torch.arange(rows.start, rows.stop, rows.step) if isinstance(rows, range) else torch.tensor(rows, dtype=torch.int64)
        index = index.to(device).view(-1, 1)
        counter = torch.zeros((4, batch, -(-per_row // 4)), dtype=torch.int64, device=device)
        counter[0] = torch.arange(counter.shape[2], device=device)
        counter[2] = index & _MASK
        counter[3] = index >> 32
        return philox(counter, key)

    @staticmethod
    def _arrange(words: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        flat = torch.stack(list(words), -1).flatten(1)
        return flat[:, : math.prod(shape[1:])].reshape(tuple(shape))


@dataclass(frozen=True)
class DrawnOnce:
    """Another source, whose numbers are computed once per node: for models that share the noise of one batch."""

    source: NoiseSource
    _drawn: dict[tuple[object, ...], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def normal(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """As the source draws it; do not write into it."""
        return self._once(self.source.normal, "normal", name, shape, device)

    def uniform(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """As the source draws it; do not write into it."""
        return self._once(self.source.uniform, "uniform", name, shape, device)

    def _once(self, make: Callable[..., Tensor], kind: str, name: str, shape: Sequence[int], device: torch.device | str) -> Tensor:
        address = (kind, name, tuple(shape), torch.device(device))
        if address not in self._drawn:
            self._drawn[address] = make(name, shape, device)
        return self._drawn[address]


@dataclass(frozen=True)
class FixedNoise:
    """Noise that is already known: one tensor per node name, such as noise inferred from an image or read from a file."""

    values: Mapping[str, Tensor]

    def normal(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """The tensor of that name.

        Raises:
            KeyError: no noise of that name is held.
            ValueError: its shape is not the one that the node asks for.
        """
        if name not in self.values:
            raise KeyError(f"no noise for node {name!r}; there is noise for {sorted(self.values)}")
        value = self.values[name]
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"noise for node {name!r} is {tuple(value.shape)}, but the node is {tuple(shape)}")
        return value.to(device)

    uniform = normal
