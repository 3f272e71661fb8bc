"""What is trained: a student against a teacher, or a model against images. Each is a module, so that DDP sees every use of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules.batchnorm import _BatchNorm

from ..divergence import Match, compare, has_priors, log_density, negative_elbo
from ..energy.view import Energy, Look
from ..model import Model, evaluating
from ..noise import DrawnOnce, Noise, NoiseSource
from ..trace import Point, Sampler, Trace, noise_of, run
from .adversary import Adversary
from .calibration import NoiseMap

T = TypeVar("T")


@dataclass(frozen=True)
class Shared:
    """What students of several sizes have in common of one batch, such as the teacher's trace: made for the first that comes to it.

    The last of each kind is kept, so the students must go from batch to batch together to gain by it; they are the same if they do not.

    Args:
        keeps: ``False`` for a student alone, for which everything is made when it asks.
    """

    keeps: bool = True
    _made: dict[str, tuple[Hashable, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, what: str, of: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` gives.

        Args:
            what: kind of thing.
            of: what it is a function of, such as the batch's noise, in which seed, phase, step and rows are told.
            make: called unless the last of its kind was of the same.
        """
        if not self.keeps:
            return make()
        if what not in self._made or self._made[what][0] != of:
            self._made.pop(what, None)  # first, or for a moment there would be two
            self._made[what] = of, make()
        found: T = self._made[what][1]
        return found


UNSHARED = Shared(keeps=False)


@dataclass(frozen=True)
class PartlyShared:
    """The shared noise at nodes that match the pattern, noise of one's own elsewhere."""

    shared: NoiseSource
    own: NoiseSource
    pattern: str

    def normal(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return self._source(name).normal(name, shape, device)

    def uniform(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return self._source(name).uniform(name, shape, device)

    def _source(self, name: str) -> NoiseSource:
        return self.shared if fnmatchcase(name, self.pattern) else self.own


class Distiller(nn.Module):
    """Runs one program of both models on the same noise and compares the traces.

    With images and ``program="generate"``, the noise is the one behind the images: what the teacher infers from them,
    turned into the standard noise under which the teacher generates it. So images, real or surrogate, and fresh noise
    train a generator by one loss.

    Args:
        teacher: frozen by the caller; it is not a submodule, so neither the state dict nor DDP knows it.
        student: the model that learns.
        rules: which nodes to compare, and how.
        program: "generate", "infer" or "link".
        replay: pattern of node names whose values the student takes from the teacher. ``"*"`` fits each conditional on
            the teacher's own values, and the loss is the forward KL of the joint (chain rule); ``""`` lets the student
            run free on the teacher's noise.
        share: pattern of node names at which the student gets the teacher's noise; elsewhere it draws its own.
        elbo: weight of the student's negative ELBO of the images, with program "infer".
        adversary: tells the student's images from the teacher's, with program "generate"; it is trained on the teacher's alone.
        perceptual: with program "generate", which latents to compare of what the teacher infers from its own image and from the
            student's, on the same noise: a distance between images as the teacher sees them, and not pixel by pixel.
        energy: with program "generate", what the teacher says of the student's images by themselves, such as how far the statistics
            of its BatchNorm layers are from those of its training data, which its own samples may miss as well.
        calibrated: with program "generate" and without images, a map of the noise that both are given.
        shared: with Distillers of other students, alike in all else, which go through the same batches.

    Raises:
        ValueError: ``elbo``, ``adversary``, ``perceptual`` or ``energy`` with another program; the last two and a teacher that is not
            frozen.
    """

    def __init__(
        self,
        teacher: Model,
        student: Model,
        rules: Sequence[Match] = (Match(),),
        program: str = "generate",
        replay: str = "",
        share: str = "*",
        elbo: float = 0.0,
        adversary: Adversary | None = None,
        perceptual: Sequence[Match] = (),
        energy: Energy = Energy(),
        calibrated: NoiseMap | None = None,
        shared: Shared = UNSHARED,
    ):
        super().__init__()
        if (perceptual or energy.terms) and program != "generate":
            raise ValueError(f"perceptual and energy go with program 'generate', not {program!r}: they look at images")
        if (perceptual or energy.terms) and any(p.requires_grad for p in teacher.net.parameters()):
            raise ValueError("perceptual and energy need a frozen teacher: the gradient passes through its encoder")
        if elbo and program != "infer":
            raise ValueError(f"elbo goes with program 'infer', not {program!r}: it needs images and what is inferred from them")
        if adversary is not None and program != "generate":
            raise ValueError(f"an adversary goes with program 'generate', not {program!r}: it compares images")
        self.net, self.adversary = student.net, adversary
        self._teacher, self._calibrated = (teacher,), (calibrated,)
        self._student, self.rules, self.program, self.replay, self.share, self.elbo = student, tuple(rules), program, replay, share, elbo
        self.perceptual, self.energy, self._shared = tuple(perceptual), energy, shared

    def forward(self, noise: Noise, images: Tensor | None = None, n: int | None = None) -> dict[str, Tensor]:
        """Weighted losses by node, each ``(batch,)``.

        Args:
            noise: the teacher's, and the student's where it is shared.
            images: ``(batch, C, H, W)`` in [0, 1], or ``None`` to start from noise.
            n: batch size where there are no images.
        """
        (teacher,), student = self._teacher, self._student
        batch = n if images is None else len(images)
        target, drawn, replayed = self._shared("teacher", noise, lambda: self._of_teacher(noise, images, batch))
        inputs = self._inputs(student, images)
        found = run(student.program(self.program), *inputs, noise=drawn, n=batch, given=replayed, device=teacher.device)
        losses = compare(target, found, self.rules) if target is not None and self._compares else {}
        if self.adversary is not None and target is not None:
            losses |= self.adversary.of_traces(target, found, (teacher, student))
        if self.perceptual and target is not None:
            losses |= self._perceived(target, found, noise.fold("perceptual"))
        if self.energy.terms:
            view = Look(teacher, noise=noise.fold("energy"))(student.images.decode(found.out.dist.mean))
            losses |= {f"energy.{name}": part for name, part in self.energy.parts(view, every=True).items()}
        if self.elbo:
            parts = negative_elbo(found, *inputs)
            losses |= {f"elbo.{name}": self.elbo * part for name, part in parts.items()}
        return losses

    @property
    def _compares(self) -> bool:
        return any(rule.weight for rule in self.rules)

    def _inputs(self, model: Model, images: Tensor | None) -> tuple[Tensor, ...]:
        return () if images is None or self.program == "generate" else (model.images.encode(images),)

    def _of_teacher(self, noise: Noise, images: Tensor | None, n: int | None) -> tuple[Trace | None, NoiseSource, dict[str, Tensor]]:
        """All that no student has a part in: the teacher's trace where it is read, the student's noise, and the values it replays."""
        (teacher,), (calibrated,) = self._teacher, self._calibrated
        drawn = DrawnOnce(noise if calibrated is None else calibrated(noise))
        shared: NoiseSource = drawn
        target: Trace | None = None
        replayed: dict[str, Tensor] = {}
        if self._compares or self.adversary is not None or self.perceptual:
            with torch.no_grad():
                given = self._latents(images, noise) if images is not None and self.program == "generate" else {}
                inputs = self._inputs(teacher, images)
                target = run(teacher.program(self.program), *inputs, noise=drawn, n=n, given=given, device=teacher.device)
                if given:
                    shared = noise_of(target, drawn)
                replayed = target.values_of(self.replay) if self.replay else {}
        if self.share != "*":
            shared = PartlyShared(shared, DrawnOnce(noise.fold("the student's own")), self.share)
        return target, shared, replayed

    def _perceived(self, target: Trace, found: Trace, noise: Noise) -> dict[str, Tensor]:
        """Divergences of what the teacher infers from both images; the gradient reaches the student through the teacher's encoder."""
        (teacher,), student = self._teacher, self._student

        @torch.no_grad()
        def of_teacher() -> tuple[Trace, NoiseSource]:
            drawn = DrawnOnce(noise)
            return run(teacher.program("infer"), target.out.dist.mean, noise=drawn), drawn

        expected, drawn = self._shared("perceptual", noise, of_teacher)
        images = teacher.images.encode(student.images.decode(found.out.dist.mean))
        parts = compare(expected, run(teacher.program("infer"), images, noise=drawn), self.perceptual)
        return {f"perceptual.{name}": part for name, part in parts.items()}

    def _latents(self, images: Tensor, noise: Noise) -> dict[str, Tensor]:
        """What the teacher infers from images, by node."""
        (teacher,) = self._teacher
        trace = run(teacher.program("infer"), teacher.images.encode(images), noise=noise)
        return {name: node.value for name, node in trace.latents().items()}


class Encoding(nn.Module):
    """A student's inference of the images that a teacher generates, whose noise is known: the sleep phase of Hinton et al.
    ("The wake-sleep algorithm for unsupervised neural networks", Science 1995), with the teacher asleep.

    The rules compare, node by node, the values that the teacher generated with the conditionals that the student infers from
    the image. So ``kl`` at a latent is the negative log-likelihood of what it was, and at ``out`` half the squared error of the
    reconstruction.

    Args:
        teacher: frozen by the caller; no submodule.
        student: a model that infers.
        rules: which nodes to compare, and how.
        shared: as of a Distiller.
    """

    def __init__(self, teacher: Model, student: Model, rules: Sequence[Match] = (Match(),), shared: Shared = UNSHARED):
        super().__init__()
        self.net = student.net
        self._teacher, self._student, self.rules, self._shared = (teacher,), student, tuple(rules), shared

    def forward(self, noise: Noise, images: Tensor | None = None, n: int | None = None) -> dict[str, Tensor]:
        """Weighted losses by node, each ``(batch,)``.

        Args:
            noise: of the images, and folded, of what the student infers.
            images: for the signature of a Distiller; there are none.
            n: batch size.
        """
        (teacher,), student = self._teacher, self._student

        @torch.no_grad()
        def of_teacher() -> tuple[Trace, Tensor, NoiseSource]:
            trace = run(teacher.program("generate"), noise=noise, n=n, device=teacher.device)
            # On the teacher's own noise the student could pass the latents through without a look at the image.
            return trace, teacher.images.decode(trace.output), DrawnOnce(noise.fold("the student's own"))

        generated, pictured, own = self._shared("teacher", noise, of_teacher)
        x = student.images.encode(pictured)

        def known(sample: Sampler) -> Tensor:
            for name, node in generated.latents().items():
                sample(name, Point(node.value))
            return x

        found = run(student.program("infer"), x, noise=own)
        return compare(run(known, noise=noise, n=n, device=teacher.device), found, self.rules)


class Elbo(nn.Module):
    """The negative ELBO of images: how a teacher is trained, and a student from scratch.

    Args:
        model: a model that infers and generates.
        beta: weight of the latents' KL (Higgins et al., 2017).
    """

    def __init__(self, model: Model, beta: float = 1.0):
        super().__init__()
        self.net = model.net
        self._model, self.beta = model, beta

    def forward(self, noise: Noise, images: Tensor, warmup: float = 1.0) -> dict[str, Tensor]:
        """Loss by node, each ``(batch,)``, in nats.

        Args:
            noise: of the posterior's samples.
            images: ``(batch, C, H, W)`` in [0, 1].
            warmup: factor in [0, 1] on beta, so that early training does not empty the latents (Sønderby et al., 2016).
        """
        x = self._model.images.encode(images)
        parts = negative_elbo(run(self._model.program("infer"), x, noise=noise), x)
        return {name: part if name == "out" else self.beta * warmup * part for name, part in parts.items()}


class WakeSleep(nn.Module):
    """How a model learns whose inference hands over no priors, such as a Helmholtz machine (Hinton et al., "The wake-sleep algorithm
    for unsupervised neural networks", Science 1995).

    Two KLs of joints, but for what learns in neither: awake, of what is inferred from data from the generator; asleep, of what the
    generator dreams from the inference. Each trains one side alone, so no gradient has to pass a coin.

    Args:
        model: a model that infers and generates; inference observes what the generator draws at nodes of the same names.
    """

    def __init__(self, model: Model):
        super().__init__()
        self.net = model.net
        self._model = model

    def forward(self, noise: Noise, images: Tensor, warmup: float = 1.0) -> dict[str, Tensor]:
        """``wake``, -log p(latents, data), and ``sleep``, -log q(dreamed latents), each ``(batch,)``, in nats.

        Args:
            noise: of the latents that are inferred, and of the dreams.
            images: ``(batch, C, H, W)`` as data keep them.
            warmup: for the signature of the ELBO; here nothing can empty the latents.
        """
        generate, infer = self._model.program("generate"), self._model.program("infer")
        x, n = self._model.images.encode(images), len(images)
        with torch.no_grad():
            inferred = run(infer, x, noise=noise.fold("wake"))
            seen = {name: node.value for name, node in inferred.latents().items()} | {"out": x}
            dream = run(generate, noise=noise.fold("dream"), n=n, device=x.device)
            dreamed = {name: node.value for name, node in dream.latents().items()}
            # Read here, where no gradient is kept.
            pictured = dream.output
        awake = run(generate, noise=noise, n=n, given=seen, device=x.device)
        asleep = run(infer, pictured, noise=noise, given=dreamed)
        return {"wake": -log_density(awake.values()), "sleep": -log_density(asleep.latents().values())}


def likelihood(model: Model, beta: float = 1.0) -> Elbo | WakeSleep:
    """What a model is trained by on images alone: the ELBO where its inference knows every prior, else wake and sleep."""
    x = model.images.encode(torch.full((2, *model.images.shape), 0.5, device=model.device))
    with torch.no_grad(), evaluating(model.net):
        closed = has_priors(run(model.program("infer"), x, noise=Noise((0,))))
    return Elbo(model, beta) if closed else WakeSleep(model)


@dataclass(frozen=True)
class Stacked:
    """The noise of one batch above that of another of as many rows."""

    first: Noise
    second: Noise

    def fold(self, *keys: int | str) -> Stacked:
        return Stacked(self.first.fold(*keys), self.second.fold(*keys))

    def normal(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        half = (shape[0] // 2, *shape[1:])
        return torch.cat([source.normal(name, half, device) for source in (self.first, self.second)])

    def uniform(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        half = (shape[0] // 2, *shape[1:])
        return torch.cat([source.uniform(name, half, device) for source in (self.first, self.second)])


class Continual(nn.Module):
    """New images learned while the teacher's own are replayed: continual learning by Chen et al. (CVPR 2023), who replay the
    generator alone, and Shin et al. ("Continual learning with deep generative replay", NeurIPS 2017), who replay images.

    Args:
        teacher: what was known before; frozen by the caller, no submodule.
        student: often a copy of it, which goes on learning.
        own: the student's loss of images: :func:`likelihood`.
        rules: what to compare of the two generators on the same noise.
        new: weight of the new images, in (0, 1); the rest is the replayed ones'.
        elbo: weight of the own loss of replayed images; 0 lets inference forget.
        shared: as of a Distiller.
    """

    def __init__(
        self,
        teacher: Model,
        student: Model,
        own: Elbo | WakeSleep,
        rules: Sequence[Match],
        new: float = 0.5,
        elbo: float = 1.0,
        shared: Shared = UNSHARED,
    ):
        super().__init__()
        self.own, self._shared = own, shared
        self._teacher, self._student, self.rules, self.new, self.elbo = (teacher,), student, tuple(rules), new, elbo

    def forward(self, noise: Noise, images: Tensor, warmup: float = 1.0) -> dict[str, Tensor]:
        """``new.*`` and ``old.*``, the own losses of new and replayed images, and ``replay.*``, by node, each ``(batch,)``.

        Args:
            noise: of what is inferred, and folded, of what is replayed.
            images: ``(batch, C, H, W)`` in [0, 1].
            warmup: as the own loss takes it.
        """
        (teacher,), student, n = self._teacher, self._student, len(images)

        @torch.no_grad()
        def of_teacher() -> tuple[Trace, Tensor, NoiseSource]:
            drawn = DrawnOnce(noise.fold("replay"))
            trace = run(teacher.program("generate"), noise=drawn, n=n, device=images.device)
            return trace, teacher.images.decode(trace.output), drawn

        known, replayed, drawn = self._shared("teacher", noise, of_teacher)
        losses = {}
        if any(rule.weight for rule in self.rules):
            found = run(student.program("generate"), noise=drawn, n=n, device=images.device)
            losses = {f"replay.{name}": (1 - self.new) * part for name, part in compare(known, found, self.rules).items()}
        if self.elbo:
            # In one pass, so that BatchNorm sees both kinds together as it will in the end.
            parts = self.own(Stacked(noise, noise.fold("replayed")), torch.cat([images, replayed]), warmup)
            losses |= {f"old.{name}": (1 - self.new) * self.elbo * part[n:] for name, part in parts.items()}
        else:
            parts = self.own(noise, images, warmup)
        return losses | {f"new.{name}": self.new * part[:n] for name, part in parts.items()}


class Classification(nn.Module):
    """Cross-entropy of images against their labels."""

    def __init__(self, model: Model):
        super().__init__()
        self.net = model.net
        self._model = model

    def forward(self, noise: Noise, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross-entropy in nats, ``(batch,)``; images ``(batch, C, H, W)`` in [0, 1], labels ``(batch,)`` int64."""
        trace = run(self._model.program("infer"), self._model.images.encode(images), noise=noise)
        return {"out": -trace.out.dist.log_prob(labels)}


def tensors_of(dist: Distribution) -> Iterator[Tensor]:
    """What a distribution is made of, also within one that wraps another, such as Independent."""
    for value in vars(dist).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Distribution):
            yield from tensors_of(value)


def reached(model: Model, program: str) -> set[str]:
    """Names of the parameters that the program's conditionals depend on, found by running it once on a batch of two.

    The generator's parameters are those that "generate" reaches; the encoder's, those that only "infer" reaches.
    The network's state is left as it was.
    """
    required = {name: p.requires_grad for name, p in model.net.named_parameters()}
    model.net.requires_grad_(True)
    try:
        inputs = () if program == "generate" else (model.images.encode(torch.full((2, *model.images.shape), 0.5, device=model.device)),)
        with torch.enable_grad(), evaluating(model.net):
            trace = run(model.program(program), *inputs, noise=Noise((0,)), n=2, device=model.device)
            tensors = [t for node in trace.values() for t in (*tensors_of(node.dist), node.value)]
            total = sum((t.float().sum() for t in tensors if t.requires_grad), torch.zeros((), device=model.device))
            names, parameters = zip(*model.net.named_parameters(), strict=True)
            gradients = torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else [None] * len(names)
        return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    finally:
        for name, p in model.net.named_parameters():
            p.requires_grad_(required[name])


def train_only(net: nn.Module, names: set[str]) -> list[nn.Parameter]:
    """Let the named parameters learn, freeze the rest, and put frozen BatchNorm in eval mode so that its statistics stay.

    Returns the parameters that learn, in the network's order.
    """
    net.train()
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in names)
    for module in net.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
            module.eval()
    return [p for p in net.parameters() if p.requires_grad]
