"""One execution of a directed graphical model, node by node.

A model is a *program*: straight-line ancestral sampling that asks a ``sample`` object for every random choice, by name.
Running it gives a *trace*: for each node its conditional distribution and its value, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property, singledispatch
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal

from .noise import FixedNoise, NoiseSource


class Point(Distribution):
    """All mass on one value: a deterministic node, such as a GAN's output. The value's first dimension is the batch."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, value: Tensor):
        self.value = value
        super().__init__(value.shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.value


def gaussian(mean: Tensor, std: Tensor) -> Normal:
    """A normal of two tensors of one shape, without torch's argument check, which stalls a GPU at every node."""
    if mean.shape != std.shape:
        return Normal(mean, std, validate_args=False)
    made = Normal.__new__(Normal)  # its __init__ would broadcast first, which takes longer than the draw of a small node
    made.loc, made.scale = mean, std
    Distribution.__init__(made, mean.shape, validate_args=False)
    return made


class Sampler(Protocol):
    """What a program is handed. Every random choice goes through it, by name."""

    @property
    def n(self) -> int:
        """Number of samples in the batch."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def noise(self) -> NoiseSource: ...

    def __call__(
        self, name: str, dist: Distribution | Callable[..., Distribution], *args: Any, prior: Distribution | None = None
    ) -> Tensor:
        """Draw the node ``name`` and return its value, ``(batch, ...)``.

        Args:
            name: unique within the program.
            dist: its conditional, or a function of ``args`` that makes it. The function runs only when somebody reads the
                conditional: a node whose value is given elsewhere costs nothing.
            prior: in an inference program, the generative conditional of the same node, where the program has it at hand.
                Without it, the prior of a normal is taken to be standard.
        """
        ...

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Draw a standard normal node of ``shape`` (without the batch), and return its value ``(batch, *shape)``."""
        ...


class Program(Protocol):
    """Ancestral sampling as straight-line code: noise, a chain of conditionals, an output.

    Returns the output's conditional, or a tensor, which stands for all mass on that value.
    """

    def __call__(self, sample: Sampler, /, *inputs: Any) -> Distribution | Tensor: ...


@singledispatch
def draw(dist: Distribution, name: str, noise: NoiseSource) -> Tensor:
    """Turn standard noise into a value of ``dist``. Register your own distribution here with ``@draw.register``."""
    raise TypeError(f"node {name!r}: no rule to draw a {type(dist).__name__} from standard noise; add one with @draw.register")


@draw.register
def _(dist: Normal, name: str, noise: NoiseSource) -> Tensor:
    return torch.addcmul(dist.loc, dist.scale, noise.normal(name, dist.loc.shape, dist.loc.device).to(dist.loc.dtype))


@draw.register
def _(dist: Bernoulli, name: str, noise: NoiseSource) -> Tensor:
    # The uniform stays float32: rounded to bfloat16 it can be 1, and a sure coin would fall on the wrong side.
    return (noise.uniform(name, dist.probs.shape, dist.probs.device) < dist.probs).to(dist.probs.dtype)


@draw.register
def _(dist: Categorical, name: str, noise: NoiseSource) -> Tensor:
    # Gumbel-max: the index is a function of the logits and of noise that two models can share.
    u = noise.uniform(name, dist.logits.shape, dist.logits.device).clamp_min(2.0**-25)
    return (dist.logits.float() - (-u.log()).log()).argmax(-1)


@draw.register
def _(dist: Independent, name: str, noise: NoiseSource) -> Tensor:
    return draw(dist.base_dist, name, noise)


@draw.register
def _(dist: Point, name: str, noise: NoiseSource) -> Tensor:
    return dist.value


@singledispatch
def undraw(dist: Distribution, value: Tensor, name: str, noise: NoiseSource) -> Tensor | None:
    """The standard noise under which ``draw(dist)`` is ``value``: the inverse of :func:`draw`.

    Where many noises give the value (a coin, a category), ``noise`` chooses among them. ``None`` for a node that takes no noise.
    """
    raise TypeError(f"node {name!r}: no rule to infer the noise of a {type(dist).__name__} from its value; add one with @undraw.register")


@undraw.register
def _(dist: Normal, value: Tensor, name: str, noise: NoiseSource) -> Tensor | None:
    return (value - dist.loc) / dist.scale


@undraw.register
def _(dist: Bernoulli, value: Tensor, name: str, noise: NoiseSource) -> Tensor | None:
    u = noise.uniform(name, dist.probs.shape, dist.probs.device)
    return torch.where(value > 0.5, u * dist.probs, dist.probs + u * (1 - dist.probs))


@undraw.register
def _(dist: Categorical, value: Tensor, name: str, noise: NoiseSource) -> Tensor | None:
    # The largest Gumbel is drawn first and bounds the others (Maddison et al., "A* Sampling", NeurIPS 2014), here as uniforms.
    u = noise.uniform(name, dist.logits.shape, dist.logits.device).clamp_min(2.0**-25)
    drawn = torch.zeros_like(u, dtype=torch.bool).scatter_(-1, value.unsqueeze(-1), True)
    return torch.where(drawn, 1.0, u) * u.gather(-1, value.unsqueeze(-1)) ** dist.probs.float()


@undraw.register
def _(dist: Independent, value: Tensor, name: str, noise: NoiseSource) -> Tensor | None:
    return undraw(dist.base_dist, value, name, noise)


@undraw.register
def _(dist: Point, value: Tensor, name: str, noise: NoiseSource) -> Tensor | None:
    return None


class Node:
    """A name, a value, and the conditional that the value was drawn from or is scored by. Both are made when first read."""

    def __init__(self, name: str, make: Callable[[], Distribution], value: Tensor | None, noise: NoiseSource, prior: Distribution | None):
        self.name, self.prior, self._make, self._noise = name, prior, make, noise
        self._grad = torch.is_grad_enabled()  # a node read late is built as it would have been built at once
        if value is not None:
            self.value = value

    @cached_property
    def dist(self) -> Distribution:
        """The node's conditional given the values before it."""
        with torch.set_grad_enabled(self._grad):
            return self._make()

    @cached_property
    def value(self) -> Tensor:
        """``(batch, ...)``, drawn from the conditional unless it was given."""
        with torch.set_grad_enabled(self._grad):
            return draw(self.dist, self.name, self._noise)

    def __repr__(self) -> str:
        return f"Node({self.name}, {type(self.dist).__name__ if 'dist' in vars(self) else 'not yet computed'})"


class Trace(Mapping[str, Node]):
    """The nodes of one execution, in order, by name. ``out`` is the node that the program returned."""

    def __init__(self, nodes: dict[str, Node], out: Node):
        self._nodes, self.out = nodes, out

    def __getitem__(self, name: str) -> Node:
        return self._nodes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def __len__(self) -> int:
        return len(self._nodes)

    @property
    def output(self) -> Tensor:
        """The output's value, ``(batch, ...)``."""
        return self.out.value

    def values_of(self, pattern: str = "*") -> dict[str, Tensor]:
        """The values at the nodes whose names match the shell pattern, detached, for another program to replay."""
        return {k: n.value.detach() for k, n in self._nodes.items() if fnmatchcase(k, pattern)}

    def latents(self) -> dict[str, Node]:
        """All nodes but the output."""
        return {k: n for k, n in self._nodes.items() if n is not self.out}


def noise_of(trace: Trace, noise: NoiseSource) -> FixedNoise:
    """The noise under which the trace's program would have drawn the values that the latent nodes hold.

    Run a generator with the latents that it infers from images as ``given``, and this is the noise behind those images.
    """
    inferred = {name: undraw(node.dist, node.value, name, noise) for name, node in trace.latents().items()}
    return FixedNoise({name: value for name, value in inferred.items() if value is not None})


def _standard(shape: tuple[int, ...], device: torch.device) -> Normal:
    zero = torch.zeros((), device=device)
    return gaussian(zero.expand(shape), (zero + 1).expand(shape))


class _Recorder:
    def __init__(self, n: int, device: torch.device, noise: NoiseSource, given: Mapping[str, Tensor], rename: Mapping[str, str]):
        self.n, self.device, self.noise = n, device, noise
        self._given, self._rename = given, rename
        self.nodes: dict[str, Node] = {}

    def node(self, name: str, dist: Distribution | Callable[..., Distribution], args: tuple[Any, ...], prior: Distribution | None) -> Node:
        name = self._rename.get(name, name)
        if name in self.nodes:
            raise ValueError(f"two nodes of the program are named {name!r}; names address the noise and must differ")

        def make() -> Distribution:
            return dist if isinstance(dist, Distribution) else dist(*args)

        node = self.nodes[name] = Node(name, make, self._given.get(name), self.noise, prior)
        return node

    def __call__(
        self, name: str, dist: Distribution | Callable[..., Distribution], *args: Any, prior: Distribution | None = None
    ) -> Tensor:
        return self.node(name, dist, args, prior).value

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        whole = (self.n, *shape)
        node = self.node(name, _standard, (whole, self.device), None)
        if node.name not in self._given:
            node.value = self.noise.normal(node.name, whole, self.device)
        return node.value


def run(
    program: Program,
    *inputs: Any,
    noise: NoiseSource,
    n: int | None = None,
    given: Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
    rename: Mapping[str, str] | None = None,
) -> Trace:
    """Run a program once and record every node.

    Args:
        program: what to run.
        inputs: handed to the program, such as images ``(batch, C, H, W)`` in the network's own range.
        noise: where every node takes its standard noise from.
        n: batch size; by default that of the first input, or 1.
        given: values to take at the named nodes instead of drawing them. A conditional whose value is given is not
            computed until somebody reads ``trace[name].dist``.
        device: where nodes without inputs are drawn; by default where the first input is, or the CPU.
        rename: this program's node name -> the name under which it is recorded, draws its noise and is compared.
    """
    first = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
    if n is None:
        n = 1 if first is None else len(first)
    if device is None:
        device = "cpu" if first is None else first.device
    recorder = _Recorder(n, torch.device(device), noise, given or {}, rename or {})
    out = program(recorder, *inputs)
    if isinstance(out, Tensor):
        for node in recorder.nodes.values():  # the value of a node already recorded, such as the last link of a chain
            if vars(node).get("value") is out:
                return Trace(recorder.nodes, node)
        out = Point(out)
    return Trace(recorder.nodes, recorder.node("out", out, (), None))
