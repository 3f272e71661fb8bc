"""One call for a notebook: a student learns from its teacher alone. What takes hours, or needs a table of figures, goes by a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from . import build, config
from .distill.distiller import Distiller, reached, train_only
from .distill.loop import Batch, Log, Phase, accelerator, fit
from .divergence import Match, hinton, mse
from .energy import batchnorm, cross_entropy, total_variation
from .energy.view import View
from .errors import BadInput
from .evaluate.arms import samples
from .families.classifier import classes_of
from .model import Model, evaluating
from .noise import Noise
from .state import States
from .synthesize.inversion import Inversion
from .synthesize.synthesis import Synthesis
from .trace import Point, run

_ON_IMAGES = ("infer", "link")


def compress(
    teacher: Model,
    student: Model,
    *,
    steps: int = 1000,
    batch: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
    rules: Sequence[Match] | None = None,
    images: Tensor | None = None,
    n: int = 1024,
    told: Callable[[dict[str, Any]], None] | None = None,
) -> Model:
    """Train a student on its teacher alone, in place, and return it in eval mode. The same seed gives the same bits.

    Each of these is a phase of ``steps`` updates by Adam, with a learning rate that falls as a cosine, where both have the program:

    * generate: images of both from the same noise, compared by the rules; by default the KL of the output, and W2² of latents ``z*``.
    * infer, after it: what only inference uses, by the student's ELBO of the teacher's images, new ones at every update. Where the
      output has no likelihood, by the KL to what the teacher infers. Of a classifier, by Hinton's loss at temperature 4.
    * link, instead of both: of a chain too long to unroll, the squared error of the prediction at one random link per image.

    Args:
        teacher: is frozen.
        student: of the same nodes and images.
        steps: updates of a phase.
        batch: samples of an update.
        lr: largest learning rate.
        seed: of all noise.
        rules: what to compare in the phase generate, or of a classifier.
        images: to train infer and link on, ``(n, C, H, W)`` in [0, 1], such as photographs of anything. By default a generator's own;
            for a classifier pixels that are optimized until it is sure of a class and its BatchNorm layers see what they know.
        n: images that are made for a classifier or a chain.
        told: is given a line of the log now and then: phase, step, loss.

    Raises:
        BadInput: the two do not fit together, or there is nothing to train on.
    """
    teacher.frozen()
    student.net.to(teacher.device)
    noise = Noise((seed, "compress"))
    classifies = classes_of(teacher) is not None
    names = ["link"] if teacher.link and student.link else [p for p in ("generate", "infer") if getattr(teacher, p) and getattr(student, p)]
    if not names:
        raise BadInput(f"teacher and student have no program in common: {_programs(teacher)}, and {_programs(student)}")
    pool = images
    if pool is None and "generate" not in names:
        pool = _made(teacher, noise.fold("images"), n, batch)
    if pool is not None and tuple(pool.shape[1:]) != tuple(teacher.images.shape):
        raise BadInput(f"images of {tuple(pool.shape[1:])}; the teacher's are {tuple(teacher.images.shape)}")
    objectives = {name: _objective(name, teacher, student, rules, classifies) for name in names}
    for name, objective in objectives.items():
        gray = None if name == "generate" else torch.full((2, *teacher.images.shape), 0.5, device=teacher.device)
        try:
            with torch.no_grad(), evaluating(student.net):
                objective(noise.fold("rehearsal"), gray, 2)
        except Exception as error:
            raise BadInput(f"{name}: {build.reason(error)}") from None
    training = config.Training(steps=steps, batch=batch, lr=lr, warmup=min(50, steps // 10))

    def phase(name: str) -> Phase:
        learns = reached(student, name) - (reached(student, "generate") if name == "infer" and "generate" in names else set())
        if not learns:
            raise BadInput(f"{name}: the student's program {name} has no parameters of its own to train")

        def loss(module: nn.Module, b: Batch) -> dict[str, Tensor]:
            x = None
            if name in _ON_IMAGES:
                x = teacher.sample(b.n, b.noise.fold("images")) if pool is None else pool[b.index].to(teacher.device).float()
            losses: dict[str, Tensor] = module(b.noise, x, b.n)
            return losses

        size = len(pool) if pool is not None and name in _ON_IMAGES else 0
        return Phase(name, objectives[name], loss, train_only(student.net, learns), training, size)

    with TemporaryDirectory() as folder:
        engine, place = accelerator(teacher.device.type), Path(folder)
        fit(student.net, phase, names, noise, engine=engine, states=States(place), log=Log(place / "log.jsonl", told), save_seconds=1e9)
    student.net.eval().requires_grad_(True)
    return student


def _objective(name: str, teacher: Model, student: Model, rules: Sequence[Match] | None, classifies: bool) -> Distiller:
    match name:
        case "generate":
            return Distiller(teacher, student, rules or build.rules(config.Generator().rules), "generate")
        case "link":
            return Distiller(teacher, student, rules or (Match("prediction", mse, reduce="mean"),), "link", replay="*")
    if classifies:
        return Distiller(teacher, student, rules or (Match("out", hinton(4.0)),), "infer")
    gray = torch.full((2, *student.images.shape), 0.5, device=teacher.device)
    with torch.no_grad(), evaluating(student.net):
        plain = isinstance(run(student.program("infer"), student.images.encode(gray), noise=Noise()).out.dist, Point)
    return Distiller(teacher, student, (Match(),) if plain else (Match(weight=0.0),), "infer", elbo=0.0 if plain else 1.0)


def _made(teacher: Model, noise: Noise, n: int, batch: int) -> Tensor:
    """Images of a teacher that does not come with a generator to be distilled, ``(n, C, H, W)``."""
    if teacher.generate is not None:
        return samples(teacher, n, noise, batch)
    classes = classes_of(teacher)
    if classes is None:
        raise BadInput("the teacher neither generates nor tells labels apart, so it makes no images to train on; give images")
    energy = cross_entropy + 0.01 * total_variation
    gray = torch.full((2, *teacher.images.shape), 0.5, device=teacher.device)
    if View(gray, teacher).moments:
        energy = energy + batchnorm
    synthesis = Synthesis(Inversion(teacher.images.shape, steps=100), teacher, energy, classes)
    return torch.cat([synthesis(range(i, min(i + 256, n)), noise).images.cpu() for i in range(0, n, 256)])


def _programs(model: Model) -> str:
    found = [name for name in ("generate", "infer", "link") if getattr(model, name)]
    return f"{type(model.net).__name__} has {' and '.join(found) or 'none'}"
