"""One training of a recipe: its teacher, or the student of one arm and one seed."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor

from . import build, config
from .data import Dataset, Kept, Split, floats
from .distill.adversary import AdversarialTraining, Adversary
from .distill.augment import augmented
from .distill.calibration import NOISE_MAP, Calibration, NoiseMap
from .distill.distiller import UNSHARED, Classification, Continual, Distiller, Encoding, Shared, likelihood, reached, train_only
from .distill.loop import Batch, HeldOut, Log, Phase, abreast, fit, fitting
from .distill.pool import OnlineLinks
from .distill.trackers import tracked
from .divergence import total
from .energy.view import Energy
from .errors import BadInput, BrokenFile, Locked
from .evaluate.cost import Operations, needed, parameters
from .evaluate.reference import of_teacher
from .families.chain import DenoisingLoss
from .families.classifier import classes_of
from .families.diffusion import Autoencoding, Denoising, TextToImage, UNet, chain_of
from .families.gan import GAN
from .families.latent import LatentDiffusion
from .model import Model, evaluating, keeping, kept_for_gradient
from .noise import Noise
from .ranks import ALONE, Ranks
from .state import States, digest_of, fingerprint, lock, os_error, publish, read_json, save_tensors, sha256, write_json
from .synthesize import surrogate
from .synthesize.prior import Prompts
from .synthesize.synthesis import Synthesis, Synthesizer, Watch
from .trace import run

if TYPE_CHECKING:
    from accelerate import Accelerator

# Longer than a killed run's worker needs to finish its update and notice that its parent is gone.
PATIENCE_SECONDS = 60.0
_TIMED, _LONG = 32, 0.25  # samples of an update that is timed, and seconds after which two of them must do


@dataclass(frozen=True)
class Workshop:
    """A recipe with what its trainings share: the teacher, the data, the surrogate, each loaded when first asked for.

    Args:
        recipe: checked.
        folder: of the run.
        allowed: modules that code may come from.
        ranks: the processes that work together.
    """

    recipe: config.Recipe
    folder: Path
    allowed: tuple[str, ...] = ()
    ranks: Ranks = ALONE
    _surrogates: dict[str, Kept] = field(default_factory=dict, init=False, repr=False)
    _synthesizers: dict[str, tuple[Synthesizer, Prompts | None]] = field(default_factory=dict, init=False, repr=False)
    _widths: list[int] = field(default_factory=list, init=False, repr=False)

    @cached_property
    def device(self) -> torch.device:
        """Where networks run."""
        wanted = self.recipe.compute.device
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        if (wanted == "cuda" and not torch.cuda.is_available()) or (wanted == "mps" and not torch.backends.mps.is_available()):
            raise BadInput(f"compute.device: {wanted} is not available here")
        return torch.device(wanted)

    def energy_of(self, arm: config.Arm) -> Energy:
        """What the teacher says of a student's images by themselves while an arm's generator learns."""
        distill, of = self.recipe.distill, self.recipe.teacher
        generate = distill.generate if distill else None
        terms = arm.energy if arm.energy is not None else generate.energy if generate else ()
        if not terms or of is None:
            return Energy()
        return build.energy(terms, self.teacher, of, self.recipe.seed, self.allowed)

    @cached_property
    def teacher(self) -> Model:
        """Frozen."""
        if self.recipe.teacher is None:
            raise BadInput("the recipe names no teacher")
        model = build.teacher(self.recipe.teacher, self.folder / "teacher", self.allowed)
        if not self.shards:  # which it does where it is, until it has been cut up
            model.net.to(self.device, memory_format=torch.channels_last)  # convolutions run up to twice as fast
        return model

    @property
    def shards(self) -> bool:
        """Whether each process keeps a part of the teacher while students are trained."""
        return self.recipe.compute.shard_teacher and self.ranks.count > 1

    @contextmanager
    def teacher_sharded(self) -> Iterator[None]:
        """Within the block this process has its part of the teacher, if the recipe says so; afterwards the whole is loaded again."""
        if not self.shards:
            yield
            return
        from .distill.sharding import shard

        shard(self.teacher.net, self.device, self.ranks.count)
        try:
            yield
        finally:
            for name in ("teacher", "calibrated"):
                vars(self).pop(name, None)

    @cached_property
    def calibrated(self) -> NoiseMap:
        """The map of noise that the stage calibrate has found."""
        net = NoiseMap(self.teacher)
        build.load_weights(net, self.folder / "calibrated" / "model.safetensors")
        return net.eval().requires_grad_(False)

    @cached_property
    def classes(self) -> int | None:
        """How many labels the teacher tells apart; ``None`` for one that is no classifier."""
        return classes_of(self.teacher)

    @cached_property
    def teacher_digest(self) -> str:
        """Of its weights, and of what its students share with it."""
        net = self.teacher.net
        return digest_of(net) if not isinstance(net, LatentDiffusion) else fingerprint([digest_of(n) for n in (net, *net.shared())])

    @cached_property
    def code(self) -> dict[str, str]:
        """Digests of the modules of one's own that make the teacher and its students, and of those that their networks come from.

        A student of one's own is made for it even where a stage has no part in one: the two are mostly in the same module.
        """
        targets = [getattr(section, "target", None) for section in (self.recipe.teacher, self.recipe.student)]
        own = {target.partition(":")[0] for target in targets if target and build.named(target, self.allowed)}
        nets = [self.teacher.net] if own else []
        nets += [self.student_of(self.teacher, 0).net] if targets[1] else []
        own |= {type(module).__module__ for net in nets for module in net.modules()}
        return {name: digest for name in sorted(own) if (digest := build.digest_of_code(name))}

    @cached_property
    def data(self) -> Dataset | None:
        """Real images, of the teacher's shape, or of the shape of what is trained."""
        if self.recipe.teacher is None or (self.recipe.train and isinstance(self.recipe.teacher, config.Trained)):
            section = self.recipe.train.model if self.recipe.train else None
            pixels = not isinstance(section, config.NO_PICTURES)
            return build.dataset(self.recipe.data, section.image, section.kind, pixels) if section else None
        return build.dataset(self.recipe.data, self.teacher.images.shape, "teacher", self.teacher.images.pixels)

    @cached_property
    def real(self) -> Dataset:
        """Real images where they are needed."""
        if self.data is None:
            raise BadInput("the recipe names no data")
        return self.data

    @cached_property
    def pixels(self) -> tuple[str, str]:
        """Digests of the training images and of the held-out ones."""
        return self.real.train.digest(), self.real.test.digest()

    def surrogate(self, folder: str) -> Kept:
        """Surrogate images of that folder within the run's, of the teacher's shape."""
        if folder not in self._surrogates:
            images = surrogate.read(self.folder / folder)
            if images.shape[1:] != self.teacher.images.shape:
                raise BadInput(f"{folder}: images of {images.shape[1:]}, the teacher's are {self.teacher.images.shape}")
            self._surrogates[folder] = images
        return self._surrogates[folder]

    def real_of(self, arm: config.Arm) -> Split:
        """The real images that an arm trains on."""
        labels = arm.labels or (self.recipe.distill or config.Distill()).labels
        return self.real.train.of(labels)

    def images_of(self, arm: config.Arm, phase: str) -> Kept | None:
        """What a phase of an arm begins with: real images, its surrogates put together, or ``None``, noise alone."""
        if arm.real:
            return self.real_of(arm).images
        folders = self.recipe.images_of(arm, phase)
        found: list[Any] = [self.surrogate(folder) for folder in folders]
        # One alone is left where it is, which may be on the disk.
        return np.concatenate(found) if len(found) > 1 else next(iter(found), None)

    def synthesis(self, folder: str, student: Model | None = None, watch: Watch | None = None) -> Synthesis:
        """What makes the surrogate of that folder.

        Args:
            folder: within the run's.
            student: the adversary of energies that compare; without one they are left out.
            watch: told of the steps of its first batch.
        """
        section, of = self.recipe.synthesized[folder], self.recipe.teacher
        assert of is not None  # the recipe's own check
        if folder not in self._synthesizers:
            self._synthesizers[folder] = build.synthesizer(section, self.teacher)
        synthesizer, prompts = self._synthesizers[folder]
        energy = build.energy(section.energy, self.teacher, of, self.recipe.seed, self.allowed, student is not None)
        classes = len(section.classes) if section.classes else None
        if any(t.kind in ("cross_entropy", "disagreement") for t in section.energy) and self.classes is None:
            raise BadInput(f"{folder}: its energies are of classifiers; the teacher is a {type(self.teacher.net).__name__}")
        if any(t.kind == "cross_entropy" for t in section.energy) and classes != self.classes:
            raise BadInput(f"{folder}.classes: {classes or 'none'} given, but the teacher tells {self.classes} apart; name every class")
        return Synthesis(synthesizer, self.teacher, energy, classes, student, prompts.of if prompts else None, watch)

    def student(self, job: Job) -> Model:
        """A fresh student."""
        return self.student_of(self.teacher, job.seed, job.arm.chain, job.width)

    def width(self, teacher: Model) -> int | None:
        """Of the students of a teacher that are given a budget, or ``None`` where they are not.

        It is found once: a measured time is another each time, and all students of a run, in all its processes, must be alike. The
        stage distill records it with what it depends on, and whoever comes later reads it there.
        """
        student = self.recipe.student
        if student is None or student.budget is None:
            return None
        if not self._widths:
            begun = self.folder / "distill" / "begun.json"
            depends = read_json(begun).get("depends") if begun.exists() else None
            width = depends.get("width") if isinstance(depends, dict) else None
            known = width if type(width) is int and width > 0 else None
            threads = (self.recipe.evaluate or config.Evaluate()).latency_threads
            budget, encoder = student.budget, student.encoder
            found = self.ranks.share(lambda: known or build.width_within(budget, teacher, encoder, threads))
            self._widths.append(int(found))
        return self._widths[0]

    def student_of(self, teacher: Model, seed: int, chain: int | None = None, width: int | None = None) -> Model:
        """A fresh student of that teacher.

        Args:
            teacher: of the run.
            seed: of the weights.
            chain: links of its chain, where it has another than its teacher's.
            width: where the recipe has students of several.
        """
        if width is not None:
            section = config.Student(width=width)
        elif self.recipe.student is None:
            raise BadInput("the recipe names no student")
        else:
            section, found = self.recipe.student, self.width(teacher)
            if found is not None:
                section = section.model_copy(update={"width": found, "budget": None})
        model = build.student(section, teacher, seed, self.allowed, chain)
        model.net.to(self.device, memory_format=torch.channels_last)  # convolutions run up to twice as fast
        return model


@dataclass(frozen=True)
class Job:
    """A student of one arm and one seed, and one width where the recipe has students of several."""

    arm: config.Arm = field(hash=False)  # which may hold a mapping
    seed: int
    width: int | None = None

    @property
    def title(self) -> str:
        """Its row's name in metrics.json."""
        return self.arm.title + _suffix(self.width)

    @property
    def name(self) -> str:
        return f"{self.title}/seed-{self.seed}"


def _suffix(width: int | None) -> str:
    return "" if width is None else f"_w{width}"


def groups(recipe: config.Recipe) -> dict[str, list[Job]]:
    """The students of every arm and seed by its name, one of each size, which are trained together.

    They go seed by seed, so that a run that is cut short has whole comparisons.
    """
    pairs = [(arm, seed) for seed in recipe.seeds for arm in recipe.arms]
    return {Job(arm, seed).name: [Job(arm, seed, width) for width in recipe.widths] for arm, seed in pairs}


def jobs(recipe: config.Recipe) -> list[Job]:
    """Every student of a recipe."""
    return [job for group in groups(recipe).values() for job in group]


def final_folders(recipe: config.Recipe) -> dict[str, Job]:
    """Folders, within the run's, of the students to be taken away, one of each size, and which they are."""
    arm = next((a for a in recipe.arms if a.kind == "data_free"), recipe.arms[0])
    chosen = [Job(arm, recipe.seeds[0], width) for width in recipe.widths]
    return {"student" if job.width is None else f"student/w{job.width}": job for job in chosen}


def student_folder(run: Path, job: Job) -> Path:
    return run / "students" / job.name


def states_of(run: Path) -> Path:
    """The folder of the students' saved states and locks, of which nothing is needed when all of them are done."""
    return run / "state" / "students"


def is_done(run: Path, job: Job, identity: str | None = None) -> bool:
    """Whether the student is whole, and, where an identity is given, was made from those inputs."""
    folder = student_folder(run, job)
    try:
        marker = read_json(folder / "job.json")
        whole = bool(marker["sha256"] == sha256(folder / "model.safetensors"))
        return whole and identity in (None, marker["identity"])
    except (BrokenFile, OSError, KeyError, TypeError):
        return False


def updates(recipe: config.Recipe, arm: config.Arm) -> dict[str, int]:
    """Number of updates of each of an arm's phases."""
    distill = recipe.distill or config.Distill()
    phases = distill.phases(arm)
    if arm.steps:
        phases.update(arm.steps if isinstance(arm.steps, dict) else {next(iter(phases)): arm.steps})
    rounds = distill.rounds if arm.kind == "data_free" and "infer" in phases else 1
    if rounds > 1:
        steps = phases.pop("infer")
        ends = [steps * i // rounds for i in range(rounds + 1)]
        phases |= {f"infer-{i + 1}": ends[i + 1] - ends[i] for i in range(rounds)}
    return phases


def may_end_early(recipe: config.Recipe) -> bool:
    """Whether the updates that a recipe names are only the most that are made."""
    distill = recipe.distill or config.Distill()
    return any(section is not None and section.early_stopping is not None for section in (distill.generate, distill.infer))


def updates_made(recipe: config.Recipe, run: Path, job: Job) -> dict[str, int]:
    """Number of updates that each phase of a finished student had."""
    named = updates(recipe, job.arm)
    if not may_end_early(recipe):
        return named
    found = read_json(student_folder(run, job) / "job.json").get("updates")
    if not isinstance(found, dict) or any(not isinstance(found.get(name), int) for name in named):
        raise BrokenFile(f"{student_folder(run, job) / 'job.json'}: no updates of {', '.join(named)}; make the student again")
    return {name: found[name] for name in named}


def _plain_name(phase: str) -> str:
    """The phase without the number of its round."""
    return phase.partition("-")[0]


def _loader(images: Kept, device: torch.device, augment: config.Augment | None, shared: Shared = UNSHARED) -> Callable[[Batch], Tensor]:
    def read(index: Tensor | None, noise: Noise) -> Tensor:
        if index is None:
            raise RuntimeError("a phase on images was given a batch without them")
        x = floats(images[index.numpy()]).to(device, non_blocking=True)
        return augmented(x, augment, noise.fold("augment")) if augment else x

    return lambda batch: shared("images", batch.noise, lambda: read(batch.index, batch.noise))


def _beta(training: config.Scratch | config.Train, step: int) -> float:
    return min(1.0, (step + 1) / training.beta_warmup) if training.beta_warmup else 1.0


def _inference(distill: config.Distill, classifier: bool) -> tuple[tuple[config.Rule, ...], float]:
    """Rules of the phase on images, and the weight of its ELBO, where the recipe leaves them to the kind of the teacher."""
    section = distill.infer or config.Encoder()
    if classifier and section.elbo:
        raise BadInput("distill.infer.elbo: a classifier has no ELBO; leave it out")
    usual = config.Rule(nodes="out", by="hinton", temperature=4.0) if classifier else config.Rule(weight=0.0)
    if section.start == "noise":
        return (config.Rule(),) if section.rules is None else section.rules, 0.0
    elbo = section.elbo if section.elbo is not None else float(not classifier)
    return (usual,) if section.rules is None else section.rules, elbo


def trained_adversarially(model: Model) -> bool:
    """Whether a model's own training is against a discriminator: a GAN, and a generator of one's own that has no other program."""
    return isinstance(model.net, GAN) or (model.infer is None and model.link is None)


def labels_shown(model: Model) -> int:
    """How many labels a model's generator is shown."""
    if isinstance(model.net, UNet):
        return model.net.chain.conditions
    return model.net.classes if isinstance(model.net, GAN) else 0


def adversary_of(recipe: config.Recipe, arm: config.Arm, student: Model, seed: int) -> Adversary | None:
    """What a student of an arm is trained against, fresh; ``None`` where the arm has none."""
    distill = recipe.distill or config.Distill()
    if arm.kind == "scratch":
        return build.adversary(distill.scratch.discriminator, student, seed) if trained_adversarially(student) else None
    generate = distill.generate if arm.generate else None
    section = arm.adversarial or (generate and generate.adversarial)
    return build.adversary(section, student, seed) if section else None


def _with(model: Model, adversary: Adversary | None) -> torch.nn.Module:
    """All that learns, and so all that is kept in a training's state. The adversary's part goes no further."""
    return model.net if adversary is None else torch.nn.ModuleDict({"net": model.net, "adversary": adversary})


def _objective(
    distill: config.Distill,
    arm: config.Arm,
    name: str,
    teacher: Model,
    student: Model,
    adversary: Adversary | None,
    energy: Energy = Energy(),
    shared: Shared = UNSHARED,
    calibrated: NoiseMap | None = None,
) -> Distiller | Encoding:
    """What the phase of that name trains."""
    for position, (program, section) in enumerate(distill.generators(arm)):
        if program == name:
            replay = arm.replay if arm.replay is not None and position == 0 else section.replay
            share = arm.share if arm.share is not None and position == 0 else section.share
            own = build.rules(section.rules)
            if program != "generate":
                return Distiller(teacher, student, own, program, replay, share, shared=shared)
            given = arm.perceptual if arm.perceptual is not None else distill.generate.perceptual if distill.generate else ()
            return Distiller(
                teacher,
                student,
                own,
                program,
                replay,
                share,
                adversary=adversary,
                perceptual=build.rules(given),
                energy=energy,
                calibrated=calibrated,
                shared=shared,
            )
    infer = distill.infer or config.Encoder()
    if student.infer is None and isinstance(student.net, GAN):
        raise BadInput(f"arm {arm.title}, infer: the student has no encoder; set student.encoder: true, or infer: null")
    rules, elbo = _inference(distill, classes_of(teacher) is not None)
    if infer.start == "noise" and arm.kind == "data_free":
        return Encoding(teacher, student, build.rules(rules), shared)
    return Distiller(teacher, student, build.rules(rules), "infer", infer.replay, elbo=elbo, shared=shared)


def _pool(
    recipe: config.Recipe,
    arm: config.Arm,
    teacher: Model,
    student: Model,
    seed: int,
    size: int | None = None,
    shared: Shared = UNSHARED,
) -> OnlineLinks | None:
    """What the phase "link" of an arm trains where the teacher's links begin with noise; ``None`` where they begin with images."""
    link = recipe.distill and recipe.distill.link
    if not link or arm.kind != "data_free" or recipe.images_of(arm, "link"):
        return None
    chain = chain_of(teacher)
    if chain is None:
        raise BadInput(
            f"distill.link.start: noise is for teachers with a chain of potstill's own, and this is a {type(teacher.net).__name__}; "
            "name a surrogate"
        )
    noise = Noise((recipe.seed, seed, "pool"))
    return OnlineLinks(teacher, student, chain, build.rules(link.rules), size or link.pool, noise, shared=shared)


def _learns(distill: config.Distill, arm: config.Arm, student: Model, name: str) -> set[str]:
    """Names of the parameters that the phase of that name trains.

    They are the generator's, then those that only inference uses; all that inference uses where no phase trains the generator.
    """
    if not arm.distilled:
        return {name for name, _ in student.net.named_parameters()}
    # A link and the chain that it is of use the same network.
    generator = "generate" if student.link is None else "link"
    before = reached(student, generator) if distill.generators(arm) else set()
    return reached(student, "infer") - before if name == "infer" else before


def check_augment(augment: config.Augment | None, shape: tuple[int, ...], where: str) -> None:
    """See that images of that shape can be moved so far.

    Raises:
        BadInput: they cannot.
    """
    if augment and augment.shift >= min(shape[-2:]):
        raise BadInput(f"{where}.augment.shift: {augment.shift} pixels, but images are {shape[-2]}x{shape[-1]}")


def check_unrolled(student: Model, batch: int) -> None:
    """See that the gradient of a student's whole chain fits in the memory that is free.

    Raises:
        BadInput: it does not.
    """
    chain = chain_of(student)
    if chain is None:
        return
    x = torch.zeros((2, *chain.image), device=student.device)
    needed = kept_for_gradient(lambda: run(chain.link, x, noise=Noise()).out.dist) // 2 * chain.steps * batch
    if student.device.type == "cuda":
        free = torch.cuda.mem_get_info(student.device)[0]
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise BadInput(
            f"distill.generate: a chain of {chain.steps:,} links is too long to unroll: the gradient of a batch of {batch} keeps about "
            f"{needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free; set generate: null and train by distill.link, one link at a "
            "time, lower the batch, or give the arm a shorter chain"
        )


def _check_labels(student: Model, classes: int) -> None:
    try:
        found = classes_of(student)
    except Exception as error:
        raise BadInput(f"student: its infer program fails: {build.reason(error)}") from None
    if found != classes:
        raise BadInput(f"student: it tells {found or 'no'} labels apart, its teacher {classes}")


def _learning(net: torch.nn.Module, average: bool) -> int:
    """Bytes of a network that learns: weights, gradients, Adam's two moments, and the average of the weights where there is one."""
    return (5 if average else 4) * sum(p.nbytes for p in net.parameters()) + sum(b.nbytes for b in net.buffers())


def rehearse(shop: Workshop, teacher: Model) -> int:
    """Run every phase of every arm once, on two samples and a student that is thrown away.

    Returns:
        about how many bytes the training of an arm's students needs, beside those of its teacher and its images.

    Raises:
        BadInput: a rule matches nothing, a program fails, teacher and student do not fit together.
    """
    distill = shop.recipe.distill or config.Distill()
    if distill.generate and teacher.generate is None:
        raise BadInput(f"distill.generate: the teacher, a {type(teacher.net).__name__}, does not generate; set generate: null")
    for phase in ("link", "generate", "infer", "scratch"):
        section = getattr(distill, phase)
        check_augment(section and section.augment, teacher.images.shape, f"distill.{phase}")
    classes = classes_of(teacher)
    if any(arm.kind == "continual" for arm in shop.recipe.arms):
        _check_continual(teacher)
    updating: dict[tuple[str, str], int] = {}
    learning: dict[tuple[str, str], int] = {}
    for arm, width in product(shop.recipe.arms, shop.recipe.widths):
        student = shop.student_of(teacher, 0, arm.chain, width)
        if classes is not None:
            _check_labels(student, classes)
        if arm.kind == "scratch" and arm.surrogate and classes is not None:
            raise BadInput(f"arm {arm.title}: a surrogate has no labels, which a classifier needs")
        adversary = adversary_of(shop.recipe, arm, student, 0)
        for name in updates(shop.recipe, arm):
            plain = _plain_name(name)
            if plain == "generate" and distill.generate:
                check_unrolled(student, distill.generate.batch)
            try:
                with keeping() as kept:
                    losses = _rehearsed(shop, teacher, arm, name, student, adversary)()
                    learns = _learns(distill, arm, student, plain)
                shape = tuple(total(losses).shape) if losses else None
                held = sum(kept.values()) // 2
            except BadInput:
                raise
            except Exception as error:
                raise BadInput(f"arm {arm.title}, {name}: {build.reason(error)}") from None
            if shape != (2,):
                what = "no rule has a weight, so there is no loss" if shape is None else f"losses of 2 samples are {shape}"
                raise BadInput(f"arm {arm.title}, {name}: {what}")
            if not learns:
                own = " of its own" if _plain_name(name) == "infer" else ""
                raise BadInput(f"arm {arm.title}, {name}: the student's {name} program has no parameters{own} to train")
            section, at = getattr(distill, plain), (arm.title, name)
            # Students of several sizes are all in memory, but take their updates one after another.
            updating[at] = max(updating.get(at, 0), held * section.batch)
            learning[at] = learning.get(at, 0) + _learning(_with(student, adversary), bool(section.ema))
    return max((size + learning[at] for at, size in updating.items()), default=0)


def _rehearsed(
    shop: Workshop, teacher: Model, arm: config.Arm, name: str, student: Model, adversary: Adversary | None, n: int = 2
) -> Callable[[], dict[str, Tensor]]:
    """What finds the losses of a phase of an arm, on a few samples."""
    distill, plain = shop.recipe.distill or config.Distill(), _plain_name(name)
    noise, gray = Noise((0, "rehearsal")), torch.full((n, *teacher.images.shape), 0.5, device=shop.device)
    if name == "scratch":
        return _scratch(arm, student, adversary, classes_of(teacher) is not None, noise, gray)
    if name == "continual":
        learning = _continual(distill.continual, teacher, student)
        return lambda: learning(noise, gray)
    if plain == "link" and (pool := _pool(shop.recipe, arm, teacher, student, 0, n)):
        return lambda: pool(noise, torch.arange(n))
    images = gray if arm.kind != "data_free" or shop.recipe.images_of(arm, plain) else None
    if plain == "generate" and images is not None and teacher.infer is None:
        raise BadInput(
            f"arm {arm.title}, generate: begins with images, but the teacher, a {type(teacher.net).__name__}, does not "
            "infer the noise behind them; use data_free arms that start from noise"
        )
    objective = _objective(distill, arm, plain, teacher, student, adversary, shop.energy_of(arm))
    return lambda: objective(noise, images, n)


def _scratch(
    arm: config.Arm, student: Model, adversary: Adversary | None, classifier: bool, noise: Noise, images: Tensor
) -> Callable[[], dict[str, Tensor]]:
    """What finds the losses of a student without a teacher, on images that are all of label 0 where it is told labels."""
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    if adversary is not None:
        against = AdversarialTraining(student, adversary)
        return lambda: against(noise, images, labels)
    if chain := chain_of(student):
        if isinstance(student.net, LatentDiffusion):
            raise BadInput("arms: scratch is not for text-to-image students, which would need a text for each real image")
        if arm.surrogate and chain.conditions:
            raise BadInput(f"arm {arm.title}: a surrogate has no labels, which the student is told")
        denoising = DenoisingLoss(student.net, chain)
        return lambda: denoising(noise, images, labels)
    if classifier:
        classification = Classification(student)
        return lambda: classification(noise, images, labels)
    own = likelihood(student)
    return lambda: own(noise, images)


def _phases(shop: Workshop, teacher: Model) -> Iterator[tuple[str, str, Callable[[int], Callable[[], dict[str, Tensor]]]]]:
    """Each student's title and each of its phases by name, with what makes an update of so many samples."""
    distill = shop.recipe.distill or config.Distill()
    for arm, width in product(shop.recipe.arms, shop.recipe.widths):
        student = shop.student_of(teacher, 0, arm.chain, width)
        adversary = adversary_of(shop.recipe, arm, student, 0)
        for name in updates(shop.recipe, arm):
            train_only(student.net, _learns(distill, arm, student, _plain_name(name)))
            yield Job(arm, 0, width).title, name, partial(_rehearsed, shop, teacher, arm, name, student, adversary)


def flops(shop: Workshop, teacher: Model) -> dict[str, dict[str, int]]:
    """About how many floating-point operations a sample of an update takes, by the student's title and the phase.

    They are counted on two samples of the networks themselves: the teacher forward, the student forward and backward, and what else the
    phase's loss has.
    """
    found: dict[str, dict[str, int]] = {}
    for title, name, of in _phases(shop, teacher):
        found.setdefault(title, {})[name] = _counted(of(2)) // 2
    return found


def seconds(shop: Workshop, teacher: Model) -> dict[str, dict[str, float]]:
    """About how long an update takes on this machine, the optimizer aside, by the student's title and the phase: one is timed.

    It is of two samples where these take long, of more where what is timed would be the start of each operation.
    """
    distill, found = shop.recipe.distill or config.Distill(), dict[str, dict[str, float]]()
    for title, name, of in _phases(shop, teacher):
        batch = getattr(distill, _plain_name(name)).batch
        for n in (2, min(batch, _TIMED)):
            taken = _timed(of(n))
            found.setdefault(title, {})[name] = taken * batch / n
            if taken > _LONG:
                break
    return found


def _timed(update: Callable[[], dict[str, Tensor]]) -> float:
    """Seconds of an update, forward and backward, the second time that it is made."""
    for _ in range(2):
        start = time.perf_counter()
        total(update()).mean().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return time.perf_counter() - start


def _counted(update: Callable[[], dict[str, Tensor]]) -> int:
    """Floating-point operations of an update, forward and backward."""
    update()  # what is done once, such as filling a pool, is not counted
    with Operations() as operations:
        total(update()).mean().backward()
    return operations.count


def flops_of_calibration(shop: Workshop) -> int:
    """As :func:`flops`, of the calibration."""
    calibration = _calibration(shop, NoiseMap(shop.teacher))
    return _counted(lambda: calibration(Noise((0, "rehearsal")), 4)) // 4


def flops_of_train(shop: Workshop) -> int | None:
    """As :func:`flops`, of the recipe's ``train`` section, or ``None`` where that is not known."""
    if (stand_in := _stand_in(shop)) is None:
        return None
    return _counted(stand_in[1]) // 2


def _stand_in(shop: Workshop) -> tuple[torch.nn.Module, Callable[[], dict[str, Tensor]]] | None:
    """All that learns by the recipe's ``train`` section, fresh, and what finds its losses on two images."""
    section = shop.recipe.train
    if section is None or isinstance(section.model, config.TextToImageNet):
        return None
    described = section.model
    model: Model = build.born(0, "stand-in", lambda: build.network(described)).model()
    model.net.to(shop.device)
    adversary = build.adversary(section.discriminator, model, 0) if trained_adversarially(model) else None
    classifies = isinstance(described, config.CLASSIFIERS)
    phase = _from_scratch(shop, model, adversary, section, "train", classifies, shop.real.train)("train")
    batch = Batch(Noise((0, "memory")).at(range(2)), torch.arange(2), 2, 0)
    return _with(model, adversary), partial(phase.loss, phase.objective, batch)


def memory_of_train(shop: Workshop) -> int | None:
    """About how many bytes the training of the recipe's ``train`` section needs beside its images, or ``None`` where that is not known."""
    section = shop.recipe.train
    try:
        stand_in = _stand_in(shop)
        if section is None or stand_in is None:
            return None
        learning, update = stand_in
        with needed() as held:
            losses = update()
            whole = held() // 2 * min(section.batch, len(shop.real.train.images)) + _learning(learning, bool(section.ema))
    except Exception:  # it is an estimate: what is wrong is for the training to say
        return None
    del losses
    return whole


def _check_continual(teacher: Model) -> None:
    if teacher.generate is None or teacher.infer is None or classes_of(teacher) is not None or chain_of(teacher):
        raise BadInput(
            f"arms: continual is for teachers that generate and infer, such as a VAE; this is a {type(teacher.net).__name__}, whose images "
            "cannot be replayed and learned by one loss"
        )


def _continual(section: config.Continual, teacher: Model, student: Model, shared: Shared = UNSHARED) -> Continual:
    return Continual(teacher, student, likelihood(student, section.beta), build.rules(section.rules), section.new, section.elbo, shared)


def _own(adversary: Adversary | None) -> list[torch.nn.Parameter]:
    return [] if adversary is None else list(adversary.parameters())


def _distilled(
    shop: Workshop,
    job: Job,
    identity: str,
    student: Model,
    adversary: Adversary | None,
    distill: config.Distill,
    keep_going: Callable[[], bool],
    every: Shared,
) -> Callable[[str], Phase]:
    arm, teacher = job.arm, shop.teacher
    sections: dict[str, config.Training | None] = {"link": distill.link, "generate": distill.generate, "infer": distill.infer}
    counts = updates(shop.recipe, arm)

    def phase(name: str) -> Phase:
        plain, _, number = name.partition("-")
        # From the second round on, each student has images of its own.
        shared = UNSHARED if number and int(number) > 1 else every
        pool = shared("data", plain, lambda: shop.images_of(arm, plain))
        if number and pool is not None:
            pool = np.concatenate([pool, *_adversarial(shop, job, identity, student, int(number), keep_going)])
        section = sections[plain]
        assert section is not None  # or it would be no phase of the arm's
        section = section.model_copy(update={"steps": counts[name]})
        load = None if pool is None else _loader(pool, shop.device, section.augment, shared)
        learns = train_only(student.net, _learns(distill, arm, student, plain))
        if plain == "link" and (online := _pool(shop.recipe, arm, teacher, student, job.seed, shared=shared)):
            return Phase(name, online, lambda module, batch: module(batch.noise, batch.index), learns, section, len(online.x))

        def loss(module: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
            losses: dict[str, Tensor] = module(batch.noise, load(batch) if load else None, batch.n)
            return losses

        energy = every("energy", arm.title, lambda: shop.energy_of(arm))
        calibrated = shop.calibrated if shop.recipe.start_of(arm, plain) == "calibrated" else None
        objective = _objective(distill, arm, plain, teacher, student, adversary, energy, shared, calibrated)
        learns += _own(adversary) if plain == "generate" else []
        held_out = None
        if isinstance(section, config.Stoppable) and section.early_stopping:
            of_its_own = _objective(distill, arm, plain, teacher, student, adversary, energy, UNSHARED, calibrated)
            held_out = _held_out(shop, section, section.early_stopping, of_its_own, plain, student)
        return Phase(name, objective, loss, learns, section, 0 if pool is None else len(pool), held_out=held_out)

    return phase


def _held_out(
    shop: Workshop,
    section: config.Training,
    stopping: config.EarlyStopping,
    objective: Distiller | Encoding,
    phase: str,
    student: Model,
) -> HeldOut:
    """A phase's loss on samples of the teacher that no training sees: the same for all students of a run.

    Raises:
        BadInput: the phase is of images, and the teacher generates none.
    """
    noise = Noise((shop.recipe.seed, "held out", phase))
    parts = [range(i, min(i + section.batch, stopping.n)) for i in range(0, stopping.n, section.batch)]
    images: Tensor | None = None
    if phase == "infer" and isinstance(objective, Distiller):
        if shop.teacher.generate is None:
            raise BadInput("infer: early_stopping looks at samples of the teacher, and this one generates none; leave it out")
        images = of_teacher(shop.teacher, stopping.n, noise.fold("images"), section.batch).images

    @torch.no_grad()
    def measure() -> float:
        with evaluating(student.net):
            found = [
                total(objective(noise.at(rows), None if images is None else images[rows.start : rows.stop].to(shop.device), len(rows)))
                for rows in parts
            ]
        return float(torch.cat(found).double().mean())

    return HeldOut(measure, stopping.every, stopping.patience)


def _adversarial(shop: Workshop, job: Job, identity: str, student: Model, number: int, keep_going: Callable[[], bool]) -> Iterator[Kept]:
    """The images that earlier rounds made, and those of this one, whose adversary is the student as it is now."""
    for i in range(2, number + 1):
        for source in shop.recipe.images_of(job.arm, "infer"):
            section = shop.recipe.synthesized[source]
            if not any(term.kind == "disagreement" for term in section.energy):
                continue
            folder = student_folder(shop.folder, job) / f"round-{i}" / source
            if i == number:
                with evaluating(student.net):
                    surrogate.write(
                        folder,
                        shop.synthesis(source, student),
                        Noise((shop.recipe.seed, source, job.seed, "round", i)),
                        n=section.n,
                        batch=section.batch,
                        shard=section.shard,
                        # Not of the student's weights: when its training goes on, they are already those of the middle of the round.
                        identity=fingerprint({"run": identity, "job": job.name, "round": i, "section": section.model_dump(mode="json")}),
                        source=section.kind,
                        pixels=shop.teacher.images.pixels,
                        keep_going=keep_going,
                        ranks=shop.ranks,
                    )
            yield surrogate.read(folder)


def _from_scratch(
    shop: Workshop,
    model: Model,
    adversary: Adversary | None,
    training: config.Scratch | config.Train,
    name: str,
    classifier: bool,
    train: Split,
    shared: Shared = UNSHARED,
) -> Callable[[str], Phase]:
    load = _loader(train.images, shop.device, training.augment, shared)

    def elbo(module: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = module(batch.noise, load(batch), _beta(training, batch.step))
        return losses

    def with_labels(module: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        labels = None if train.labels is None else torch.from_numpy(train.labels)[batch.index].to(shop.device)
        losses: dict[str, Tensor] = module(batch.noise, load(batch), labels)
        return losses

    def phase(_: str) -> Phase:
        parameters = train_only(model.net, {n for n, _ in model.net.named_parameters()})
        if classifier:
            return Phase(name, Classification(model), with_labels, parameters, training, len(train.images))
        if adversary is not None:
            objective = AdversarialTraining(model, adversary)
            return Phase(name, objective, with_labels, parameters + _own(adversary), training, len(train.images))
        if chain := chain_of(model):
            denoising = DenoisingLoss(model.net, chain)
            return Phase(name, denoising, with_labels, parameters, training, len(train.images))
        if isinstance(training, config.Continual):
            return Phase(name, _continual(training, shop.teacher, model, shared), elbo, parameters, training, len(train.images))
        return Phase(name, likelihood(model, training.beta), elbo, parameters, training, len(train.images))

    return phase


def _tracked(
    shop: Workshop, engine: Accelerator, title: str, counts: dict[str, int]
) -> AbstractContextManager[Callable[[dict[str, Any]], None] | None]:
    return tracked(engine, shop.recipe.compute.trackers, shop.folder / "trackers", shop.recipe.name, title, counts)


def make_student(
    shop: Workshop,
    job: Job,
    identity: str,
    engine: Accelerator,
    *,
    keep_going: Callable[[], bool] = lambda: True,
    told: Callable[[dict[str, Any]], None] | None = None,
    shared: Shared = UNSHARED,
) -> Iterator[tuple[int, int]]:
    """Train one student, an update at a time as :func:`fitting` does, and write it to ``students/ARM/seed-S``.

    It goes on from its saved state where there is one. What is shared is shared with the students of other sizes that go through the
    same updates; its bits are those of a student alone.
    """
    recipe = shop.recipe
    distill = recipe.distill or config.Distill()
    student = shop.student(job)
    adversary = adversary_of(recipe, job.arm, student, job.seed)
    if not job.arm.distilled:
        kind = job.arm.kind
        whole: config.Scratch = getattr(distill, kind)
        section = whole.model_copy(update={"steps": updates(recipe, job.arm)[kind]})
        images = None if job.arm.real else shared("data", kind, lambda: shop.images_of(job.arm, kind))
        train = shop.real_of(job.arm) if images is None else Split(images, None)
        phases = _from_scratch(shop, student, adversary, section, kind, shop.classes is not None, train, shared)
    else:
        phases = _distilled(shop, job, identity, student, adversary, distill, keep_going, shared)
    states = States(states_of(shop.folder) / job.name)
    folder = student_folder(shop.folder, job)
    counts = updates(recipe, job.arm)
    with _tracked(shop, engine, job.name, counts) as track:
        log = Log(folder / "log.jsonl", told, track)
        yield from fitting(
            _with(student, adversary),
            phases,
            list(counts),
            Noise((recipe.seed, job.seed)),
            engine=engine,
            states=states,
            log=log,
            save_seconds=recipe.compute.save_seconds,
            log_steps=recipe.compute.log_steps,
            patience=recipe.compute.divergence_patience,
            keep_going=keep_going,
        )
    if engine.is_main_process:
        if may_end_early(recipe):
            counts |= {phase: step for phase, step in log.last_steps().items() if phase in counts}
        done = {"identity": identity, "updates": counts, "seed": job.seed}
        save_network(student, folder, student_card(recipe, job, counts, parameters(student.net), parameters(shop.teacher.net)))
        write_json(folder / "job.json", done | {"sha256": sha256(folder / "model.safetensors")})
        states.clear()


def make_students(
    shop: Workshop,
    identity: str,
    engine: Accelerator,
    *,
    keep_going: Callable[[], bool],
    told: Callable[[Job, dict[str, Any]], None] | None = None,
) -> None:
    """Train every student that is not done and that nobody else is at.

    Raises:
        BadInput: a training went wrong; it names the student.
    """
    every = {job.name: job for job in jobs(shop.recipe)}
    with closing(_free(shop, identity, keep_going)) as free:
        for names in shop.ranks.each(free):
            shared = Shared() if len(names) > 1 else UNSHARED
            group = [every[name] for name in names]
            with build.memory_watched():
                abreast([_named(shop, job, identity, engine, keep_going, partial(told, job) if told else None, shared) for job in group])


def _named(
    shop: Workshop,
    job: Job,
    identity: str,
    engine: Accelerator,
    keep_going: Callable[[], bool],
    told: Callable[[dict[str, Any]], None] | None,
    shared: Shared,
) -> Iterator[tuple[int, int]]:
    """:func:`make_student`, whose errors say which student it is."""
    try:
        yield from make_student(shop, job, identity, engine, keep_going=keep_going, told=told, shared=shared)
    except BadInput as error:
        raise BadInput(f"{job.name}: {error}") from None


def undone(run: Path, group: list[Job], identity: str) -> list[str]:
    """Names of the students that are still to be trained, or have to be again."""
    return [job.name for job in group if not is_done(run, job, identity)]


def _free(shop: Workshop, identity: str, keep_going: Callable[[], bool]) -> Generator[list[str], None, None]:
    """Names of the students of each arm and seed that are not done and that nobody else is at.

    They are locked until the next are asked for.
    """
    for patience in (0.0, PATIENCE_SECONDS):
        for name, group in groups(shop.recipe).items():
            if not undone(shop.folder, group, identity):
                continue
            if not keep_going():
                raise KeyboardInterrupt
            try:
                with lock(states_of(shop.folder) / f"{name}.lock", patience, str(shop.folder), keep_going):
                    if todo := undone(shop.folder, group, identity):
                        yield todo
            except Locked:
                continue


def make_teacher(
    shop: Workshop,
    engine: Accelerator,
    *,
    keep_going: Callable[[], bool] = lambda: True,
    told: Callable[[dict[str, Any]], None] | None = None,
) -> Model:
    """Train what the recipe's ``train`` section describes, and write it to ``teacher``. The saved state stays, for the caller to clear."""
    recipe = shop.recipe
    section = recipe.train
    if section is None:
        raise BadInput("the recipe has no train section")
    model: Model = build.born(recipe.seed, "teacher", lambda: build.network(section.model)).model()
    model.net.to(shop.device)
    adversary = build.adversary(section.discriminator, model, recipe.seed) if trained_adversarially(model) else None
    states = States(shop.folder / "state" / "train")
    with _tracked(shop, engine, "train", {"train": section.steps}) as track:
        fit(
            _with(model, adversary),
            _from_scratch(
                shop, model, adversary, section, "train", isinstance(section.model, config.CLASSIFIERS), shop.real.train.of(section.labels)
            ),
            ["train"],
            Noise((recipe.seed, "train")),
            engine=engine,
            states=states,
            log=Log(shop.folder / "train" / "log.jsonl", told, track),
            save_seconds=recipe.compute.save_seconds,
            log_steps=recipe.compute.log_steps,
            patience=recipe.compute.divergence_patience,
            keep_going=keep_going,
        )
    if engine.is_main_process:
        save_network(model, shop.folder / "teacher", teacher_card(recipe, shop.real.name, parameters(model.net)))
    return model


def _calibration(shop: Workshop, net: NoiseMap) -> Calibration:
    section, of = shop.recipe.calibrate, shop.recipe.teacher
    assert section is not None  # the recipe's own check
    assert of is not None
    return Calibration(shop.teacher, net, build.energy(section.energy, shop.teacher, of, shop.recipe.seed, shop.allowed))


def rehearse_calibration(shop: Workshop) -> None:
    """Find the calibration's loss once, of four samples.

    Raises:
        BadInput: the teacher has no latents to calibrate, or nothing that the energy wants.
    """
    try:
        losses = _calibration(shop, NoiseMap(shop.teacher))(Noise((0, "rehearsal")), 4)
        learns = any(loss.requires_grad for loss in losses.values())
    except Exception as error:
        raise BadInput(f"calibrate: {build.reason(error)}") from None
    if not learns:
        raise BadInput("calibrate: no energy has a weight, so there is nothing to learn")


def make_calibrated(
    shop: Workshop,
    engine: Accelerator,
    *,
    keep_going: Callable[[], bool] = lambda: True,
    told: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Find a map of the teacher's noise by the recipe's ``calibrate`` section, and write it to ``calibrated``."""
    recipe, section, net = shop.recipe, shop.recipe.calibrate, NoiseMap(shop.teacher)
    assert section is not None  # the recipe's own check
    objective, learns = _calibration(shop, net), list(net.parameters())
    with _tracked(shop, engine, "calibrate", {"calibrate": section.steps}) as track:
        fit(
            net,
            lambda name: Phase(name, objective, lambda module, batch: module(batch.noise, batch.n), learns, section, split=False),
            ["calibrate"],
            Noise((recipe.seed, "calibrate")),
            engine=engine,
            states=States(shop.folder / "state" / "calibrate"),
            log=Log(shop.folder / "calibrated" / "log.jsonl", told, track),
            save_seconds=recipe.compute.save_seconds,
            log_steps=recipe.compute.log_steps,
            patience=recipe.compute.divergence_patience,
            keep_going=keep_going,
        )
    if engine.is_main_process:
        write_json(shop.folder / "calibrated" / "config.json", {"latents": list(net.latents)})
        save_tensors(net.state_dict(), shop.folder / "calibrated" / "model.safetensors")


def captions_of(split: Split) -> tuple[str, ...]:
    """A caption of each image: its own, or its class."""
    if split.captions is not None:
        return split.captions
    if split.labels is None:
        raise BadInput("data: has neither captions nor labels, which a text_to_image model reads")
    return tuple(f"class {label}" for label in split.labels.tolist())


def make_prior(
    shop: Workshop,
    engine: Accelerator,
    *,
    keep_going: Callable[[], bool] = lambda: True,
    told: Callable[[dict[str, Any]], None] | None = None,
) -> TextToImage:
    """Train the text-to-image model of the recipe's ``train`` section, and write it to ``teacher`` in the layout of diffusers."""
    recipe, section = shop.recipe, shop.recipe.train
    assert section is not None
    split = shop.real.train.of(section.labels)
    assert isinstance(section.model, config.TextToImageNet)  # the caller's own check
    described, captions = section.model, captions_of(split)
    net: TextToImage = build.born(recipe.seed, "teacher", lambda: build.text_to_image(described, captions))
    net.to(shop.device)
    load = _loader(split.images, shop.device, section.autoencoder.augment)

    def phase(name: str) -> Phase:
        if name == "autoencoder":
            learns = train_only(net, {f"vae.{n}" for n, _ in net.vae.named_parameters()})
            return Phase(
                name, Autoencoding(net), lambda module, b: module(b.noise, load(b)), learns, section.autoencoder, len(split.images)
            )
        learns = train_only(net, {n for n, _ in net.named_parameters() if not n.startswith("vae.")})
        net.vae.eval()
        # All are encoded once: the autoencoder has learned what it will.
        latents = torch.cat([net.encode(part).cpu() for part in floats(split.images).split(1024)])
        net.scale.copy_(1 / latents.std())
        latents, tokens = latents * net.scale.cpu(), net.tokens(captions)

        def loss(module: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
            found: dict[str, Tensor] = module(batch.noise, latents[batch.index].to(shop.device), tokens[batch.index].to(shop.device))
            return found

        return Phase(name, Denoising(net, section.dropout), loss, learns, section, len(split.images))

    counts = {"autoencoder": section.autoencoder.steps, "denoiser": section.steps}
    with _tracked(shop, engine, "train", counts) as track:
        fit(
            net,
            phase,
            list(counts),
            Noise((recipe.seed, "train")),
            engine=engine,
            states=States(shop.folder / "state" / "train"),
            log=Log(shop.folder / "train" / "log.jsonl", told, track),
            save_seconds=recipe.compute.save_seconds,
            log_steps=recipe.compute.log_steps,
            patience=recipe.compute.divergence_patience,
            keep_going=keep_going,
        )
    if engine.is_main_process:
        folder = shop.folder / "teacher"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.", suffix=".tmp") as temporary:
            net.save_pretrained(Path(temporary))
            (Path(temporary) / "README.md").write_text(teacher_card(recipe, shop.real.name, parameters(net)), encoding="utf-8")
            # The index comes last: a folder without one is not taken for a pipeline.
            files = sorted((p for p in Path(temporary).rglob("*") if p.is_file()), key=lambda p: p.name == "model_index.json")
            for file in files:
                target = folder / file.relative_to(temporary)
                target.parent.mkdir(exist_ok=True)
                publish(file, target)
    return net


def save_network(model: Model, folder: Path, card: str, calibrated: NoiseMap | None = None) -> None:
    """Write a network as ``save_pretrained`` does, with a model card, each file whole or not at all, the weights last.

    Args:
        model: whose network.
        folder: where to.
        card: what it is.
        calibrated: the map of the noise that it is to draw from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if calibrated is None:
        (folder / NOISE_MAP).unlink(missing_ok=True)  # of a student that was there before
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving.", suffix=".tmp") as temporary:
        target = Path(temporary)
        (target / "README.md").write_text(card, encoding="utf-8")
        if isinstance(model.net, PyTorchModelHubMixin):
            try:
                model.net.save_pretrained(target)
            except SafetensorError as error:
                raise os_error(error, folder / "model.safetensors") from None
        else:
            save_tensors(model.net.state_dict(), target / "model.safetensors")
        if calibrated is not None:
            save_tensors(calibrated.state_dict(), target / NOISE_MAP)
        if isinstance(model.net, LatentDiffusion):  # for whoever puts it into the teacher's pipeline
            model.net.unet.save_pretrained(target / "unet", safe_serialization=True)
        files = sorted((p for p in target.rglob("*") if p.is_file()), key=lambda p: p.name == "model.safetensors")
        for file in files:
            place = folder / file.relative_to(target)
            place.parent.mkdir(exist_ok=True)
            publish(file, place)


def _front(*tags: str) -> str:
    return "---\nlibrary_name: potstill\ntags:\n" + "".join(f"- {tag}\n" for tag in ("potstill", *tags)) + "---\n"


def teacher_card(recipe: config.Recipe, data: str, parameters: int) -> str:
    """The model card of a network that the train stage made."""
    section = recipe.train
    assert section is not None
    described = json.dumps(section.model_dump(mode="json"), indent=1)
    return (
        f"{_front(section.model.kind)}\n# {recipe.name}\n\n"
        f"A {section.model.kind} of {parameters:,} parameters, trained by potstill on {data}: {section.steps:,} updates of batch "
        f"{section.batch}, seed {recipe.seed}.\n\n"
        "A model may carry the biases of its training data, and may have memorized parts of it.\n\n"
        f"```json\n{described}\n```\n"
    )


def student_card(recipe: config.Recipe, job: Job, counts: dict[str, int], parameters: int, teacher: int, mapped: int = 0) -> str:
    """The model card of a student, with so many numbers in the map of its noise, if it has one beside it."""
    how = {
        "data_free": "from its teacher alone, without data",
        "with_data": "from its teacher, on real images",
        "scratch": "from scratch on real images, without a teacher",
        "continual": "on new real images, with its teacher's own replayed",
    }[job.arm.kind]
    if recipe.student and recipe.student.start:
        how = f"from its teacher's weights, {how.removeprefix('from scratch ')}"
    steps = ", ".join(f"{count:,} updates of {name}" for name, count in counts.items())
    beside = (
        f"It draws from calibrated noise: `{NOISE_MAP}` is a map of it of {mapped:,} numbers, which `potstill.load` of "
        "this folder puts before the network.\n\n"
        if mapped
        else ""
    )
    return (
        f"{_front('distillation')}\n# {recipe.name}: {job.title}, seed {job.seed}\n\n"
        f"A student of {parameters:,} parameters, {teacher / parameters:.1f} times fewer than its teacher's {teacher:,}. "
        f"Made by potstill {how}: {steps}.\n\n{beside}"
        "A student carries its teacher's biases, and may carry parts of the data that its teacher memorized.\n"
    )
