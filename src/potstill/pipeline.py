"""The stages of a run: what is done is skipped, what is not is resumed, what was made from other inputs is refused."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from . import __version__, build, config, inventory
from .data import Kept, Split, floats, places
from .distill import trackers
from .distill.loop import accelerator, threads
from .energy.statistics import FILE as ACTIVATIONS
from .energy.view import Look
from .errors import BadInput, BrokenFile, Failed, Refused, shown
from .evaluate.arms import (
    accuracy,
    cost,
    energies,
    labels_of,
    over_seeds,
    posterior_agreement,
    quality,
    reconstructions,
    samples,
    shares,
)
from .evaluate.cost import file_mib, needed, parameters, size_mib
from .evaluate.features import pixels
from .evaluate.frechet import frechet
from .evaluate.memorization import Memorization, Neighbors, nearest
from .evaluate.reference import Reference, of_data, of_teacher
from .evaluate.sketch import Sketch
from .families.chain import DenoisingLoss
from .families.classifier import classes_of
from .families.diffusion import chain_of
from .jobs import (
    Job,
    Workshop,
    captions_of,
    check_augment,
    final_folders,
    groups,
    is_done,
    jobs,
    labels_shown,
    make_calibrated,
    make_prior,
    make_students,
    make_teacher,
    memory_of_train,
    rehearse,
    rehearse_calibration,
    save_network,
    states_of,
    student_card,
    student_folder,
    trained_adversarially,
    undone,
    updates,
    updates_made,
)
from .model import Model
from .noise import Noise
from .progress import Board, LogTail, Together, gib, memory
from .ranks import ALONE, Ranks
from .state import digest_of, fingerprint, lock, read_json, replacing, sha256, spoiled_states, sweep, write_json, write_text
from .store import place
from .synthesize import surrogate
from .synthesize.guided import Guided
from .synthesize.inversion import Inversion, LatentInversion
from .synthesize.synthesis import Synthesis
from .trace import run as traced
from .worker import INTERRUPTED, stoppable, verdict

STAGES = ("train", "calibrate", "synthesize", "distill", "evaluate", "report")
_SECTION = {stage: stage for stage in STAGES} | {"synthesize": "surrogate"}
METRICS_FORMAT = "potstill-metrics/1"
DONE = "done already"
_OWN = "memory://"
_MAPPED = "+calibrated"  # no arm has a plus sign in its name


@dataclass(frozen=True)
class Inputs:
    """What a stage is made from, and what it makes.

    Args:
        depends: all that its results depend on, as plain data.
        made: files that are there when it is done.
        spoiled: names a result that is not as it was made, if any.
    """

    depends: dict[str, Any]
    made: list[Path]
    spoiled: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Run:
    """One recipe in one folder.

    Args:
        recipe: checked.
        folder: where everything goes.
        allowed: modules that code may come from.
        board: where progress is shown.
        ranks: the processes that go through it together.
    """

    recipe: config.Recipe
    folder: Path
    allowed: tuple[str, ...]
    board: Board
    ranks: Ranks = ALONE
    needs: dict[str, int] = field(default_factory=dict, init=False, repr=False)  # bytes, as far as rehearsals have found out

    @cached_property
    def shop(self) -> Workshop:
        return Workshop(self.recipe, self.folder, self.allowed, self.ranks)

    @cached_property
    def features(self) -> build.FeatureSource:
        evaluate = self._section("evaluate")
        return build.features(evaluate.features, self.shop.device, self.allowed, evaluate.batch, self._standard(evaluate))

    def _standard(self, section: config.Evaluate) -> Kept:
        """Images that features are made for: of their shape, and, where features are standardized, with their statistics."""
        if section.reference == "data":
            return self.shop.real.train.images
        images = self.shop.teacher.images
        if section.features == "standardized" and not images.pixels:
            return self.reference.images.numpy()
        return np.zeros((1, *images.shape), np.uint8) if images.pixels else np.zeros((1, *images.shape), np.float32)

    @cached_property
    def reference(self) -> Reference:
        """What every model is measured against."""
        section, shop = self._section("evaluate"), self.shop
        if section.reference == "data":
            return of_data(shop.real, section.n)
        n = self.reference_images(shop.teacher)
        if shop.teacher.generate is not None:
            return of_teacher(shop.teacher, n, Noise((self.recipe.seed, "reference")), section.batch)
        folder = next(iter(self.recipe.synthesized))
        return Reference("teacher", f"the {folder} (students may have learned on it)", floats(shop.surrogate(folder)[:n]))

    def reference_images(self, teacher: Model) -> int:
        """How many images models are measured against.

        Raises:
            BadInput: there are not so many.
        """
        section, recipe = self._section("evaluate"), self.recipe
        if section.reference == "data":
            there, what = len(self.shop.real.test.images), "are held out"
        elif teacher.generate is not None:
            return int(section.n or config.TEACHER_IMAGES)
        elif not recipe.synthesized:
            raise BadInput("evaluate.reference: the teacher generates no images; add a surrogate, whose images it is then compared on")
        else:
            folder, first = next(iter(recipe.synthesized.items()))
            there, what = first.n, f"are in the {folder}"
        if section.n is not None and section.n > there:
            raise BadInput(f"evaluate.n: {section.n} images, but {there} {what}; lower it, or leave it out to use all")
        return int(section.n or (there if section.reference == "data" else min(there, config.TEACHER_IMAGES)))

    def _section(self, stage: str) -> Any:
        section = self.recipe.synthesized if stage == "synthesize" else getattr(self.recipe, _SECTION[stage])
        if not section:
            raise BadInput(f"{self.recipe.name}: the recipe has no {_SECTION[stage]} section")
        return section

    # -------------------------------------------------------------- before anything is written

    def check(self, stages: tuple[str, ...]) -> None:
        """Load what the stages need and see that it fits together, and that the folder holds nothing else.

        Raises:
            BadInput: it does not.
        """
        for stage in stages:
            self._section(stage)
        self.check_folder()
        build.allow(self.allowed)
        _ = self.shop.device
        if {"train", "calibrate", "distill"} & set(stages):
            trackers.check(self.recipe.compute.trackers)
        if "train" in stages:
            self._check_train()
        if set(stages) & {"calibrate", "synthesize", "distill", "evaluate"}:
            teacher = self.teacher_to_be(stages)
            classes = classes_of(teacher)
            if "calibrate" in stages:
                if "train" not in stages or self.is_done("train"):
                    rehearse_calibration(self.shop)
            elif self.recipe.calibrate and {"distill", "evaluate"} & set(stages) and not self.is_done("calibrate"):
                raise BadInput(f"{stages[0]}: no calibrated noise yet; run the calibrate stage first")
            if "synthesize" in stages:
                self._check_synthesize(teacher)
            if {"distill", "evaluate"} & set(stages):
                self._check_data(classes, labels_shown(teacher))
            if "distill" in stages:
                if "synthesize" not in stages and not all((self.folder / f / "manifest.json").exists() for f in self._images_needed):
                    raise BadInput("distill: no surrogate yet; run the synthesize stage first")
                if not self.is_done("distill"):
                    self.needs["distill"] = rehearse(self.shop, teacher)
            if "evaluate" in stages:
                if "distill" not in stages and not all(is_done(self.folder, job) for job in jobs(self.recipe)):
                    raise BadInput("evaluate: not every student is trained yet; run the distill stage first")
                self._check_evaluate(teacher, classes)
        if stages == ("report",) and not (self.folder / "metrics.json").exists():
            raise BadInput("report: nothing measured yet; run the evaluate stage first")

    def check_folder(self) -> None:
        """See that no stage was begun in the folder from another recipe.

        Raises:
            Refused: one was.
        """
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"{folder}: a folder for the run is expected; it is a file")
        begun = {stage: folder / stage / "begun.json" for stage in STAGES if (folder / stage / "begun.json").exists()}
        if (folder / "recipe.yaml").exists() and not begun and not (folder / "state" / "run.lock").exists():
            raise Refused(f"{folder}: holds a recipe.yaml that is not of a run; nothing is overwritten: choose another --out")
        for stage, path in begun.items():
            now = _plain(self._reads(stage))
            before = _depends_of(path)
            if differences := _differences({k: before.get(k) for k in now}, now):
                raise Refused(_refusal(folder, stage, differences))

    def _reads(self, stage: str) -> dict[str, Any]:
        """What of the recipe a stage depends on."""
        r = self.recipe
        match stage:
            case "train":
                return {"train": r.train, "data": r.data, "seed": r.seed}
            case "calibrate":
                return {"calibrate": r.calibrate, "seed": r.seed, "teacher": r.teacher}
            case "synthesize":
                more = {"surrogates": r.surrogates} if r.surrogates else {}
                return {"surrogate": r.surrogate, "seed": r.seed, "teacher": r.teacher} | more
            case "distill":
                distill = {
                    "distill": r.distill,
                    "student": r.student,
                    "arms": r.arms,
                    "seeds": r.seeds,
                    "seed": r.seed,
                    "teacher": r.teacher,
                }
                sizes = {"students": r.students} if r.students else {}
                return distill | sizes | ({"data": r.data} if self._data_needed else {})
            case "evaluate":
                images = r.report.images if r.report else config.Report().images
                own = {"calibrate": r.calibrate} if r.calibrate else {}
                data = r.data if r.evaluate and r.evaluate.reads_data else None
                return {"evaluate": r.evaluate, "images": images, "data": data, "seed": r.seed, "teacher": r.teacher} | own
            case _:
                return {"report": r.report}

    @property
    def _data_needed(self) -> bool:
        """Whether distill trains on real images."""
        return any(arm.real for arm in self.recipe.arms)

    @property
    def _images_needed(self) -> list[str]:
        """Folders of the surrogates that distill trains on."""
        return sorted({f for arm in self.recipe.arms for f in self.recipe.every_image_of(arm)}) if self.recipe.distill else []

    @property
    def _synthesized(self) -> list[str]:
        """Folders of the surrogates that are there."""
        return [f for f in self.recipe.synthesized if (self.folder / f / "manifest.json").exists()]

    @property
    def _is_trained(self) -> bool:
        """Whether the teacher is there already."""
        made = self.is_done("train") and (self.folder / "teacher" / "model.safetensors").exists()
        return made or not isinstance(self.recipe.teacher, config.Trained)

    def teacher_to_be(self, stages: tuple[str, ...]) -> Model:
        """The teacher, or one of the same shape with fresh weights where it is still to be trained."""
        recipe = self.recipe
        if "train" not in stages or self._is_trained:
            return self.shop.teacher
        assert recipe.train is not None  # the recipe's own check
        section = recipe.train.model
        model: Model = build.born(0, "stand-in", lambda: build.network(section)).model().frozen()
        model.net.to(self.shop.device)
        return model

    def _check_synthesize(self, teacher: Model) -> None:
        """See that each surrogate can be made, by a single step of two images where the teacher is there already."""
        for folder, section in self.recipe.synthesized.items():
            if section.store:
                if section.store.startswith(_OWN) and self.ranks.count > 1:
                    raise BadInput(f"{folder}.store: {_OWN} is the memory of one process, and there are {self.ranks.count}; use another")
                place(section.store).exists()  # whether it answers is known before hours of work
            if isinstance(self.recipe.teacher, config.Trained) and not self.is_done("train"):
                build.synthesizer(section, teacher)
                continue
            self._rehearse_synthesis(folder)

    def _rehearse_synthesis(self, folder: str) -> None:
        synthesis, section = self.shop.synthesis(folder), self.recipe.synthesized[folder]
        if isinstance(synthesis.synthesizer, (Guided, Inversion, LatentInversion)):
            synthesis = replace(synthesis, synthesizer=replace(synthesis.synthesizer, steps=1))
        try:
            with needed() as held:
                synthesis(range(2), Noise((self.recipe.seed, folder, "rehearsal")))
                batch = held() // 2 * min(section.batch, section.n)
        except (BadInput, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise BadInput(f"{folder}: {build.reason(error)}") from None
        images = self.shop.teacher.images
        # A shard is put together in memory: pictures as png files, values as Python's numbers of 32 bytes.
        self.needs[folder] = batch + min(section.shard, section.n) * math.prod(images.shape) * (1 if images.pixels else 32)

    def _check_train(self) -> None:
        section = self._section("train")
        images = self.shop.real.train
        if isinstance(section.model, config.CLASSIFIERS):
            _check_labels(images, section.model.classes, "train.model.classes is")
        if isinstance(section.model, (config.GANNet, config.UNetNet)) and section.model.classes:
            _check_labels(images, section.model.classes, "train.model.classes is")
        check_augment(section.augment, images.images.shape, "train")
        if isinstance(section.model, config.TextToImageNet):
            captions_of(images)
        else:
            with torch.device("meta"):
                build.network(section.model)
        if len(images.images) < 2:
            raise BadInput("data: one training image; BatchNorm needs two")

    def _check_data(self, classes: int | None, shown: int) -> None:
        evaluate = self.recipe.evaluate
        if evaluate and not evaluate.reads_data and not self._data_needed:
            if self.recipe.data and not self.recipe.train:
                places(self.recipe.data)
            return  # it is there for the stage train alone, which may have been done elsewhere
        data, labels = self.shop.data, classes or shown
        if data is not None and labels and any(arm.kind == "scratch" for arm in self.recipe.arms):
            _check_labels(data.train, labels, "the teacher's labels are")
        if data is not None and self._data_needed and len(data.train.images) < 2:
            raise BadInput("data: one training image; BatchNorm needs two")

    def _check_evaluate(self, teacher: Model, classes: int | None) -> None:
        section = self._section("evaluate")
        by_data = section.reference == "data"
        if by_data and classes is not None:
            _check_labels(self.shop.real.test, classes, "the teacher's labels are")
        if (n := self.reference_images(teacher)) <= section.k:
            raise BadInput(f"evaluate.k: {section.k} neighbors, but {n} {'held-out' if by_data else 'reference'} images")
        if by_data:
            self.features.of(floats(self.shop.real.test.images[:2]))
            self._groups(section, self.shop.real.test.labels)
        elif self._is_trained and (teacher.images.pixels or section.features != "standardized"):  # statistics of images still to be drawn
            self.features.of(Noise((0, "rehearsal")).uniform("x", (2, *teacher.images.shape)))

    @staticmethod
    def _groups(section: config.Evaluate, labels: Any) -> dict[str, Any]:
        """Rows of the held-out images of each group."""
        if section.groups and labels is None:
            raise BadInput("evaluate.groups: the data has no labels")
        found = {name: np.flatnonzero(np.isin(labels[: section.n], wanted)) for name, wanted in section.groups.items()}
        if empty := [name for name, rows in found.items() if not len(rows)]:
            raise BadInput(f"evaluate.groups.{empty[0]}: none of its labels is among the held-out images")
        return found

    # -------------------------------------------------------------- the stages

    def train(self) -> None:
        """A teacher or a feature network from real data."""
        if isinstance(self._section("train").model, config.TextToImageNet):
            self._train_prior()
            return
        with self._stage("train", self.inputs("train")) as work:
            if not work:
                return
            self._say_spoiled(self.folder / "state" / "train")
            with threads(self.recipe.compute.threads), self._stoppable() as keep_going:
                if self.ranks.first:
                    self._say_needed(memory_of_train(self.shop))
                engine = accelerator(str(self.shop.device))
                model = make_teacher(self.shop, engine, keep_going=keep_going, told=partial(self.board.training, "train")).frozen()
            if not self.ranks.first:
                return
            test = self.shop.real.test
            images = floats(test.images)
            if model.generate is None and test.labels is not None:
                figures = {"accuracy": accuracy(model, images, test.labels, 256)}
            elif chain := chain_of(model):
                loss, noise = DenoisingLoss(model.net, chain), Noise((self.recipe.seed, "held out"))
                labels = None if test.labels is None else torch.from_numpy(test.labels).to(model.device)
                with torch.no_grad():
                    found = [
                        loss(noise.at(rows), images[rows].to(model.device), None if labels is None else labels[rows])["out"].cpu()
                        for rows in (range(i, min(i + 256, len(images))) for i in range(0, len(images), 256))
                    ]
                figures = {"denoising_mse": torch.cat(found).mean().item()}
            elif model.infer is None:
                generated = samples(model, len(images), Noise((self.recipe.seed, "held out")), 256)
                figures = {"frechet_of_pixels": frechet(pixels()(images), pixels()(generated))}
            else:
                _, figures = reconstructions(model, images, Noise((self.recipe.seed, "reconstruct")), 256)
            write_json(self.folder / "train" / "held_out.json", figures)
            self.board.say("  held out: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    def _train_prior(self) -> None:
        with self._stage("train", self.inputs("train")) as work:
            if not work:
                return
            self._say_spoiled(self.folder / "state" / "train")
            with threads(self.recipe.compute.threads), self._stoppable() as keep_going:
                engine = accelerator(str(self.shop.device))
                net = make_prior(self.shop, engine, keep_going=keep_going, told=partial(self.board.training, "train")).eval()
            if not self.ranks.first:
                return
            images = floats(self.shop.real.test.images)
            with torch.no_grad():
                decoded = torch.cat([net.vae.decode(net.encode(part)).sample.cpu() for part in images.split(256)]) / 2 + 0.5
            figures = {"reconstruction_mse": (decoded - images).pow(2).mean().item()}
            write_json(self.folder / "train" / "held_out.json", figures)
            self.board.say("  held out: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    def calibrate(self) -> None:
        """A map of the teacher's noise, with which its samples feed its layers what its training data fed them."""
        with self._stage("calibrate", self.inputs("calibrate")) as work:
            if not work:
                return
            rehearse_calibration(self.shop)
            self._say_spoiled(self.folder / "state" / "calibrate")
            with threads(self.recipe.compute.threads), self._stoppable() as keep_going:
                engine = accelerator(str(self.shop.device))
                make_calibrated(self.shop, engine, keep_going=keep_going, told=partial(self.board.training, "calibrate"))

    def synthesize(self) -> None:
        """The surrogate data sets."""
        self._section("synthesize")
        sections, shop, inputs = self.recipe.synthesized, self.shop, self.inputs("synthesize")
        with self._stage("synthesize", inputs) as work:
            if not work:
                return
            for folder, section in sections.items():
                steps = surrogate.Steps()
                synthesis = shop.synthesis(folder, watch=steps.watch)
                if self.ranks.first:
                    if folder not in self.needs:  # the teacher was not there yet when all was checked
                        self._rehearse_synthesis(folder)
                    self._say_memory(folder, synthesis, min(section.batch, section.n))
                    self._say_needed(self.needs[folder], what=f"{folder}: ")
                surrogate.write(
                    self.folder / folder,
                    synthesis,
                    Noise((self.recipe.seed, folder)),
                    n=section.n,
                    batch=section.batch,
                    shard=section.shard,
                    identity=_identity(inputs.depends, section),
                    source=section.kind,
                    pixels=shop.teacher.images.pixels,
                    store=section.store,
                    steps=steps,
                    progress=partial(self.board.update, folder, total=section.n, detail="images"),
                    ranks=self.ranks,
                )

    def _say_needed(self, beside: int | None, processes: int = 1, images: int = 0, what: str = "") -> None:
        """One line, about something, of :meth:`memory_needed`, if it is known."""
        if found := self.memory_needed(beside, processes, images):
            self.board.say(f"  {what}{found}")

    def memory_needed(self, beside: int | None, processes: int = 1, images: int = 0) -> str | None:
        """About how much memory a stage will take, in words.

        Args:
            beside: bytes, beside what this process holds already; ``None`` where they are not known.
            processes: that will hold as much each.
            images: bytes of images, which are never on a GPU.
        """
        if beside is None:
            return None
        if self.shop.device.type == "cuda":
            return f"about {gib(torch.cuda.memory_allocated() + beside)} of GPU memory"
        one = memory() + beside + images
        return f"about {gib(one * processes + (memory() if processes > 1 else 0))} of memory"

    def _say_spoiled(self, folder: Path) -> None:
        """One line for each saved state that a crash or a disk has spoiled, from which a training would otherwise have gone on."""
        for problem in spoiled_states(folder) if self.ranks.first else ():
            self.board.say(f"  {problem}; it is left out, and the one before it gone on with")

    def _say_memory(self, folder: str, synthesis: Synthesis, batch: int) -> None:
        guided = synthesis.synthesizer
        if not isinstance(guided, Guided):
            return
        labels = None if synthesis.classes is None else torch.arange(2, device=self.shop.device)
        noise = Noise((self.recipe.seed, folder, "memory"))
        weights, image = guided.memory(synthesis.energy, Look(self.shop.teacher, labels=labels, noise=noise), noise)
        text = f"  {folder}: prior of {guided.prior.parameters():,} parameters, {weights / 2**20:.1f} MiB; "
        text += f"a batch of {batch} keeps about {batch * image / 2**20:.1f} MiB for the gradient"
        if guided.prior.linear_rest is not None:
            text += f"; the linear decode leaves {guided.prior.linear_rest:.0%} of the variance"
        self.board.say(text)

    def _files_of(self, folder: str) -> dict[str, Any]:
        """What a surrogate depends on that the recipe only names: the prior, the texts, the generator, recorded activations."""
        section, synthesizer = self.recipe.synthesized[folder], self.shop.synthesis(folder).synthesizer
        found: dict[str, Any] = {}
        if isinstance(synthesizer, Guided):
            found["prior"] = synthesizer.prior.digest()
            if synthesizer.prompts:
                found["prompts"] = [list(texts) for texts in synthesizer.prompts.wordings]
        if isinstance(synthesizer, LatentInversion):
            found["generator"] = digest_of(synthesizer.generator.net)
        if any(term.kind == "activation_summary" for term in section.energy) and isinstance(self.recipe.teacher, config.Pretrained):
            found["activations"] = sha256(build.locate(self.recipe.teacher.path) / ACTIVATIONS)
        return found

    def distill(self) -> None:
        """Every student: arms times seeds, side by side where the machine has the cores; those of several sizes go through it together."""
        self._section("distill")
        recipe, inputs = self.recipe, self.inputs("distill")
        identity = fingerprint(inputs.depends)
        with self._stage("distill", inputs) as work:
            if not work:
                return
            if uneven := self.uneven():
                self.board.say(f"  {uneven}")
            todo = [job for job in jobs(recipe) if not is_done(self.folder, job, identity)]
            workers, count = self.workers(sum(bool(undone(self.folder, group, identity)) for group in groups(recipe).values()))
            how = beside(len(todo), workers) if self.ranks.count == 1 else f", each by {self.ranks.count} processes"
            sizes = f" in {len(recipe.widths)} sizes, those of an arm and a seed together" if recipe.students else ""
            self.board.say(f"  {number_of(len(todo), 'student')}{sizes}{how}")
            self._say_needed(self.needs.get("distill"), workers, self.bytes_of_surrogates())
            self._say_spoiled(states_of(self.folder))
            together = Together(self.board, {job.name: updates(recipe, job.arm) for job in todo})
            if workers == 1:
                with threads(count), self._stoppable() as keep_going:
                    engine = accelerator(str(self.shop.device))
                    with self.shop.teacher_sharded():
                        make_students(self.shop, identity, engine, keep_going=keep_going, told=lambda j, e: together.training(j.name, e))
            else:
                self._side_by_side(together, todo, workers, count or 1, identity)
            together.end()
            if not self.ranks.first:
                return
            missing = [job.name for job in todo if not is_done(self.folder, job, identity)]
            if missing:
                raise Failed(f"distill: not done: {', '.join(missing)}; run the same command again to go on")
            for folder, job in final_folders(recipe).items():
                model = self._load_student(job)
                calibrated = self.shop.calibrated if recipe.start_of(job.arm, "generate") == "calibrated" else None
                card = student_card(
                    recipe, job, updates_made(recipe, self.folder, job), *self._sizes(model), parameters(calibrated) if calibrated else 0
                )
                save_network(model, self.folder / folder, card, calibrated)

    def uneven(self) -> str:
        """A line where the recipe gives its arms different numbers of updates; empty where they have as many."""
        found = {arm.title: sum(updates(self.recipe, arm).values()) for arm in self.recipe.arms}
        if len(set(found.values())) < 2:
            return ""
        return f"updates differ, so arms do not compare like for like: {', '.join(f'{name} {n:,}' for name, n in found.items())}"

    def unread_data(self) -> str:
        """A line where the recipe has data, and its figures do not come from them; empty where they do."""
        section = self.recipe.evaluate
        if section is None or self.recipe.data is None or section.reads_data:
            return ""
        return "data is given, and figures are of the teacher's images all the same: leave out evaluate.reference to measure on the data"

    def bytes_of_surrogates(self) -> int:
        """Bytes of the images that trainings hold in memory; those of a storage are on the disk."""
        images = self.shop.teacher.images
        here = [self.recipe.synthesized[folder] for folder in self._images_needed]
        return sum(s.n for s in here if not s.store) * math.prod(images.shape) * (1 if images.pixels else 4)

    def evaluate(self) -> None:
        """Figures for the teacher and every arm, and the arrays that the report's pictures are made of."""
        section, recipe = self._section("evaluate"), self.recipe
        if not all(is_done(self.folder, job) for job in jobs(recipe)):
            raise BadInput("evaluate: not every student is trained yet; run the distill stage first")
        with self._stage("evaluate", self.inputs("evaluate")) as work:
            if not work or not self.ranks.first:
                return
            self._say_needed(self.memory_of_evaluate(section))
            if unread := self.unread_data():
                self.board.say(f"  {unread}")
            with threads(recipe.compute.threads):
                metrics, pictures = self._measure(section)
            with replacing(self.folder / "evaluate" / "pictures.npz") as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **pictures)
            write_json(self.folder / "metrics.json", metrics)
            for mark in ("done.json", "begun.json"):  # a page of other figures, such as other times of the same models, is out of date
                (self.folder / "report" / mark).unlink(missing_ok=True)

    def report(self) -> None:
        """The page."""
        from .report import page

        self._section("report")
        if not (self.folder / "metrics.json").exists():
            raise BadInput("report: nothing measured yet; run the evaluate stage first")
        with self._stage("report", self.inputs("report")) as work:
            if work and self.ranks.first:
                try:
                    page.write(self.folder)
                except page.ReportError as error:
                    raise BadInput(f"report: {error}") from None

    def memory_of_evaluate(self, section: config.Evaluate) -> int:
        teacher, chain = self.shop.teacher, chain_of(self.shop.teacher)
        noise, n = Noise((self.recipe.seed, "memory")), self.reference_images(teacher)
        x = teacher.images.encode(noise.uniform("x", (2, *teacher.images.shape), teacher.device))
        with needed() as held, torch.no_grad():
            if chain is not None:  # every link is like the first
                traced(chain.link, x, noise=noise).out.dist  # noqa: B018
            elif teacher.generate is not None:
                samples(teacher, 2, noise, 2)
            if teacher.infer is not None:
                traced(teacher.infer, x, noise=noise)
            batch = held() // 2 * section.batch
        # Real, generated, the teacher's and the first seed's images in float32; distances of all pairs, for the transport between them.
        return batch + 4 * n * math.prod(teacher.images.shape) * 4 + (2 * n * n * 8 if teacher.generate is not None else 0)

    # -------------------------------------------------------------- their parts

    @contextlib.contextmanager
    def _stage(self, name: str, inputs: Inputs) -> Iterator[bool]:
        """Whether the stage has work to do, as the first process sees it, which writes the stage's marks around the block.

        Raises:
            Refused: it was begun from something else.
        """
        if not self.ranks.first:
            yield self.ranks.share(lambda: True)
            return
        found = self.found(name, inputs)
        self.board.say(f"{name}: {found}" if found else name)
        if found == DONE:
            yield self.ranks.share(lambda: False)
            return
        mark, folder = fingerprint(inputs.depends), self.folder / name
        (folder / "done.json").unlink(missing_ok=True)
        if not (folder / "begun.json").exists():
            write_json(folder / "begun.json", {"fingerprint": mark, "depends": inputs.depends})
        start = time.perf_counter()
        yield self.ranks.share(lambda: True)
        inventory.finish(
            self.folder, name, {"fingerprint": mark, "seconds": round(time.perf_counter() - start, 1), "potstill": __version__}
        )

    def found(self, stage: str, inputs: Inputs) -> str:
        """How far a stage is: ``DONE``, going on, or again since a result is gone; nothing where it was not begun.

        Raises:
            Refused: it was begun from something else.
        """
        begun, done = (self.folder / stage / mark for mark in ("begun.json", "done.json"))
        if begun.exists() and (before := _depends_of(begun)) != inputs.depends:
            raise Refused(_refusal(self.folder, stage, _differences(before, inputs.depends)))
        gone = next((path.relative_to(self.folder) for path in inputs.made if not path.exists()), None) or inputs.spoiled()
        if not begun.exists():
            return DONE if done.exists() and not gone else ""
        if done.exists():
            return f"{gone} is gone or has changed, again" if gone else DONE
        return "going on"

    def inputs(self, stage: str) -> Inputs:
        """What a stage is made from, which must be there, and what it makes."""
        depends = self._reads(stage)
        if stage not in ("train", "report"):
            depends["weights"] = self.shop.teacher_digest
            depends |= {"code": code} if (code := self.shop.code) else {}
        match stage:
            case "train":
                prior = isinstance(self._section("train").model, config.TextToImageNet)
                names = ["model_index.json"] if prior else ["config.json", "model.safetensors"]
                return self._inputs(depends | {"pixels": self.shop.pixels[0]}, [f"teacher/{name}" for name in names])
            case "calibrate":
                return self._inputs(depends, ["calibrated/model.safetensors"])
            case "synthesize":
                return self._inputs_of_synthesize(depends)
            case "distill":
                return self._inputs_of_distill(depends)
            case "evaluate":
                made = ["metrics.json"]
                spoiled = partial(inventory.changed, self.folder, "evaluate", made)
                return self._inputs(self._depends_of_evaluate(depends), made, spoiled)
            case _:
                from .report import page  # late, for it brings jinja and matplotlib

                depends |= {"metrics": sha256(self.folder / "metrics.json")}
                return self._inputs(depends, ["report.html"], lambda: "the table of exports" if page.outdated(self.folder) else None)

    def _inputs(self, depends: dict[str, Any], made: list[str], spoiled: Callable[[], str | None] = lambda: None) -> Inputs:
        return Inputs(_plain(depends), [self.folder / name for name in made], spoiled)

    def _inputs_of_synthesize(self, depends: dict[str, Any]) -> Inputs:
        folders = self.recipe.synthesized
        files = {folder: found for folder in folders if (found := self._files_of(folder))}

        def spoiled() -> str | None:
            gone = (surrogate.missing(self.folder / folder) for folder in folders)
            return next((str(path).removeprefix(f"{self.folder}/") for path in gone if path is not None), None)

        return self._inputs(depends | ({"files": files} if files else {}), [f"{folder}/manifest.json" for folder in folders], spoiled)

    def _inputs_of_distill(self, depends: dict[str, Any]) -> Inputs:
        recipe = self.recipe
        depends["surrogate"] = {folder: surrogate.digest(self.folder / folder) for folder in self._images_needed}
        depends["pixels"] = self.shop.pixels[0] if self._data_needed else None
        if (width := self.shop.width(self.shop.teacher)) is not None:
            depends["width"] = width
        if self._starts_calibrated:
            depends["calibrated"] = digest_of(self.shop.calibrated)
        identity = fingerprint(_plain(depends))

        final = [*final_folders(recipe)]

        def spoiled() -> str | None:
            lost = next((f"students/{job.name}" for job in jobs(recipe) if not is_done(self.folder, job, identity)), None)
            return lost or inventory.changed(self.folder, "distill", final)

        return self._inputs(depends, [f"{folder}/model.safetensors" for folder in final], spoiled)

    def _depends_of_evaluate(self, depends: dict[str, Any]) -> dict[str, Any]:
        depends |= {
            "students": {job.name: sha256(student_folder(self.folder, job) / "model.safetensors") for job in jobs(self.recipe)},
            "pixels": self.shop.pixels if self._section("evaluate").reads_data else None,
            "features": self.features.digest,
        }
        if self.recipe.calibrate:
            depends["calibrated"] = digest_of(self.shop.calibrated)
        if made := self._synthesized:
            depends["surrogates"] = {folder: surrogate.digest(self.folder / folder) for folder in made}
        return depends

    @property
    def _starts_calibrated(self) -> bool:
        """Whether an arm's students learn on calibrated noise."""
        return any(self.recipe.start_of(arm, "generate") == "calibrated" for arm in self.recipe.arms)

    def tidy(self) -> None:
        """Remove the saved states of what is done, and what killed processes left half written."""
        own = {stage: self.folder / "state" / stage for stage in ("train", "calibrate")}
        for stage, states in (own | {"distill": states_of(self.folder)}).items():
            if self.is_done(stage):
                shutil.rmtree(states, ignore_errors=True)
        sweep(self.folder)

    def is_done(self, name: str) -> bool:
        """Whether a stage has left its mark that it is."""
        return (self.folder / name / "done.json").exists()

    def _stoppable(self) -> contextlib.AbstractContextManager[Callable[[], bool]]:
        return stoppable(patient=self.ranks.count > 1)

    def _load_student(self, job: Job) -> Model:
        model = self.shop.student(job)
        build.load_weights(model.net, student_folder(self.folder, job) / "model.safetensors")
        return model.frozen()

    def _sizes(self, student: Model) -> tuple[int, int]:
        return parameters(student.net), parameters(self.shop.teacher.net)

    def workers(self, todo: int) -> tuple[int, int | None]:
        """How many processes train side by side so many arms and seeds, and the threads of each.

        The threads follow from the recipe and the machine, not from what is left to do: a run that goes on has the bits of one that
        was not cut short.
        """
        asked = os.environ.get("OMP_NUM_THREADS", "")
        threads_given = self.recipe.compute.threads or (int(asked) if asked.isdecimal() and int(asked) else None)
        own = any(section.store and section.store.startswith(_OWN) for section in self.recipe.synthesized.values())
        if self.shop.device.type != "cpu" or "RANK" in os.environ or own:
            return 1, threads_given
        most = max(1, min(len(groups(self.recipe)), self.recipe.compute.workers or build.cores()))
        return max(1, min(most, todo)), threads_given or max(1, build.cores() // most)

    def _side_by_side(self, together: Together, todo: list[Job], workers: int, count: int, identity: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
        # Without -P, a file of the working directory named as a module of the standard library would be run.
        own = self.allowed or Path(__file__).parents[1] == Path.cwd()
        command = [sys.executable, *([] if own else ["-P"]), "-m", "potstill.worker", str(self.folder), identity, str(os.getpid())]
        tails = {job: LogTail(student_folder(self.folder, job) / "log.jsonl") for job in todo}
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(workers)]
            processes: list[subprocess.Popen[bytes]] = []
            try:
                for output in outputs:
                    processes += [subprocess.Popen([*command, *self.allowed], env=environment, stderr=output, stdout=output)]
                while any(p.poll() is None for p in processes) and not any(p.returncode for p in processes):
                    for job, tail in tails.items():
                        if entry := tail.last():
                            together.training(job.name, entry)
                    time.sleep(0.2)
            finally:
                # They are asked to stop, and save what they have, when this process is interrupted or one of them has failed.
                try:
                    for process in processes:
                        if process.poll() is None:
                            process.terminate()
                    for process in processes:
                        process.wait()
                except KeyboardInterrupt:  # the second: not to wait for them
                    for process in processes:
                        process.kill()
                    raise
            for process, output in zip(processes, outputs, strict=True):
                if process.returncode not in (0, INTERRUPTED, -signal.SIGTERM):
                    output.seek(0)
                    self._worker_failed(process.returncode, output.read().decode(errors="replace"))

    def _worker_failed(self, code: int, output: str) -> None:
        said = verdict(output)
        if said is not None:
            raise BadInput(said) if code == 2 else Failed(said)
        if code < 0:
            raise Failed(
                f"distill: a worker was killed by signal {-code} (9: often for want of memory); run the same command again to go on"
            )
        path = self.folder / "state" / "worker.log"
        write_text(path, shown(output))
        last = (output.strip().splitlines() or ["it said nothing"])[-1]
        raise Failed(f"distill: a worker failed: {last}; all that it said is in {path}")

    def _measure(self, section: config.Evaluate) -> tuple[dict[str, Any], dict[str, Any]]:
        recipe, shop, features = self.recipe, self.shop, self.features.features
        against, test = self.reference, self.reference.images
        by_teacher = against.kind == "teacher"
        n, k, shown = len(test), section.k, recipe.report.images if recipe.report else config.Report().images
        generates = shop.teacher.generate is not None
        real = self.features.of(test) if generates else None
        groups = self._groups(section, against.labels)
        labels = labels_of(shop.teacher, test, section.batch) if by_teacher and shop.classes is not None else None

        def measured(images: torch.Tensor, who: str) -> dict[str, float]:
            if real is None:
                return {}
            try:
                return quality(images, real, features, k)
            except (ValueError, RuntimeError) as error:
                raise BadInput(f"evaluate: {who}: {build.reason(error)}") from None

        arms = {job.title: job.arm for job in jobs(recipe)}
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in self._rows(arms)}
        floor: list[dict[str, float]] = []
        sketch = Sketch(test, shop.teacher.images.pixels)
        pictures: dict[str, Any] = dict.fromkeys(("input",) if by_teacher else ("real", "input"), sketch(test, shown))
        counts: dict[str, dict[str, float]] = {}
        drawn: torch.Tensor | None = None
        memorization = self._memorization(section)
        neighbors: dict[str, list[Neighbors]] = {}  # of each row's images, by seed
        total, done = len(recipe.seeds) * len(rows), 0
        for seed in recipe.seeds:
            noise = Noise((recipe.seed, seed, "evaluate"))
            if generates and against.others and len(others := against.others(noise)) > k:
                floor.append(measured(others, "teacher against teacher" if by_teacher else "real against real"))
            references: dict[bool, torch.Tensor] = {}  # the teacher's images, by whether the noise is mapped
            seen: torch.Tensor | None = None  # the teacher's reconstructions
            students = {job.title: job for job in jobs(recipe) if job.seed == seed}
            for name in rows:
                mapped = name.endswith(_MAPPED)
                job = students.get(name.removesuffix(_MAPPED))
                model = shop.teacher if job is None else self._load_student(job)
                if mapped:
                    model = shop.calibrated.onto(model)
                figures: dict[str, float] = {}
                if generates and model.generate is not None:
                    generated = samples(model, n, noise, section.batch)
                    figures |= measured(generated, name if job is None else job.name)
                    if memorization:
                        neighbors.setdefault(name, []).append(memorization.neighbors(generated))
                    if groups and real is not None:
                        figures |= {f"share/{k}": v for k, v in shares(features(generated), real, groups).items()}
                    if job is None:
                        references[mapped] = generated
                        drawn = generated if drawn is None else drawn
                    else:
                        figures["paired_mse"] = (generated - references[mapped]).double().pow(2).mean().item()
                    if seed == recipe.seeds[0]:
                        pictures[f"samples/{name}"] = sketch(generated, shown)
                if shop.classes is not None and against.labels is not None:
                    figures["accuracy"] = accuracy(model, test, against.labels, section.batch)
                    for group, rows_of in groups.items():
                        figures[f"accuracy/{group}"] = accuracy(model, test[rows_of], against.labels[rows_of], section.batch)
                elif labels is not None:
                    figures["label_agreement"] = accuracy(model, test, labels, section.batch)
                elif model.infer is not None:
                    outputs, found = reconstructions(model, test, noise, section.batch)
                    figures |= found
                    seen = outputs if job is None else seen
                    if by_teacher and job is not None and seen is not None:
                        figures |= self._agreement(model, outputs, seen, noise)
                    for group, rows_of in groups.items():
                        found = reconstructions(model, test[rows_of], noise, section.batch)[1]
                        figures |= {f"{key}/{group}": value for key, value in found.items()}
                    if seed == recipe.seeds[0]:
                        pictures[f"reconstruction/{name}"] = sketch(outputs, shown)
                figures |= cost(model, section.latency_threads, section.latency_repeats)
                rows[name].append(figures)
                beside = shop.calibrated if mapped else None
                counts[name] = {
                    "params": parameters(model.net) + (parameters(beside) if beside else 0),
                    "size_mib": self._size_mib(job, model) + (size_mib(beside) if beside else 0.0),
                }
                done += 1
                self.board.update("evaluate", done, total, name)
        made = self._synthesized
        if made and sketch.each and not by_teacher:
            pictures |= _nearest(shop.surrogate(made[0])[:shown], shop.real.train.images, sketch)
        surrogates: dict[str, dict[str, Any]] = {}
        for i, folder in enumerate(made):
            surrogates[folder], arrays = self._of_surrogate(folder, sketch, real, drawn, 2 * shown)
            pictures |= arrays
            if memorization:
                neighbors[folder] = [memorization.neighbors(floats(shop.surrogate(folder)[:n]))]
            self.board.update("evaluate", i + 1, len(made), folder)
        environment = describe(shop.device) | {"threads": torch.get_num_threads(), "latency_threads": section.latency_threads}
        metrics = {
            "format": METRICS_FORMAT,
            "name": recipe.name,
            "reference": {
                "kind": against.kind,
                "data": against.name,
                "n": n,
                "features": features.name if generates else None,
                **({} if real is None else {"dimensions": real.shape[1]}),
                "floor": _spread(floor) if floor else {},
            }
            | ({"images": self._reference_identity()} if by_teacher else {}),
            "compared": self._compared(generates),
            "arms": {name: _spread(found) | counts[name] for name, found in rows.items()},
            "arms_info": {"teacher": {"label": "teacher", "updates": None, "data": "real", "note": ""}}
            | {name: {"label": name} | self._about(name, arm) for name, arm in arms.items()}
            | self._about_mapped(arms),
            "surrogates": surrogates,
            **({"privacy": _privacy(memorization, neighbors)} if memorization else {}),
            "seeds": list(recipe.seeds),
            "environment": environment,
        }
        return metrics, pictures

    def _memorization(self, section: config.Evaluate) -> Memorization | None:
        if not section.privacy:
            return None
        try:
            return Memorization.of(self.shop.real.train.images, self.shop.real.test.images[: section.n])
        except ValueError as error:
            raise BadInput(f"evaluate.privacy: {error}") from None

    def _agreement(self, student: Model, outputs: torch.Tensor, seen: torch.Tensor, noise: Noise) -> dict[str, float]:
        """How much a student that infers is like its teacher on the reference images, given the reconstructions of both."""
        section = self._section("evaluate")
        figures = {"reconstruction_agreement": (outputs - seen).double().pow(2).mean().item()}
        found = posterior_agreement(self.shop.teacher, student, self.reference.images, noise, section.batch)
        return figures | ({} if found is None else {"posterior_agreement": found})

    def _reference_identity(self) -> str:
        """Fingerprint of what images of the teacher's making follow from: figures against those of another do not compare."""
        made = self.shop.teacher.generate is None and surrogate.digest(self.folder / next(iter(self.recipe.synthesized)))
        return fingerprint([self.shop.teacher_digest, self.recipe.seed, made])

    def _of_surrogate(
        self, folder: str, sketch: Sketch, real: Any, drawn: torch.Tensor | None, shown: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The figures of a surrogate, and its first images with what they were made for, and its energies beside others'.

        Args:
            folder: within the run's.
            sketch: draws what is like the reference images, which it holds.
            real: their features, or ``None``, without which there are no distances.
            drawn: samples of the teacher, or ``None`` where it does not generate.
            shown: images for the page.
        """
        section, test_labels, test = self.recipe.synthesized[folder], self.reference.labels, sketch.real
        images, columns = self.shop.surrogate(folder), surrogate.columns(self.folder / folder)
        arrays: dict[str, Any] = {f"images/{folder}": sketch(floats(images[: shown if sketch.each else len(test)]), shown)}
        if section.classes and "label" in columns:
            names = dict(enumerate(section.classes))
            arrays[f"label/{folder}"] = np.array([names.get(label, str(label)) for label in columns["label"][:shown]])
        if "prompt" in columns:
            arrays[f"prompt/{folder}"] = np.array([str(prompt) for prompt in columns["prompt"][:shown]])
        parts = {n.removeprefix("energy."): np.array(v, np.float64) for n, v in columns.items() if n.startswith("energy.")}
        parts = {name: values for name, values in parts.items() if np.isfinite(values).all()}
        arrays |= {f"energy/{folder}/{name}/surrogate": values.astype(np.float32) for name, values in parts.items()}
        if parts:
            asked = torch.arange(len(test)) % len(section.classes) if section.classes else None
            own = None if test_labels is None or self.shop.classes is None else torch.from_numpy(test_labels)
            real_ones = {"real": (test, own)} if self.reference.kind == "data" else {}
            arrays |= self._energies_of(folder, {"teacher": (drawn, asked)} | real_ones)
        figures: dict[str, Any] = {
            "images": len(images),
            "kind": section.kind,
            "energies": {name: {"mean": values.mean().item(), "sd": values.std(ddof=1).item()} for name, values in parts.items()},
        }
        if real is not None:
            try:
                figures["frechet"] = frechet(real, self.features.of(floats(images[: len(test)])))
            except ValueError as error:
                raise BadInput(f"evaluate: {folder}: {build.reason(error)}") from None
        return figures, arrays

    def _energies_of(self, folder: str, sets: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]) -> dict[str, Any]:
        """What the energy of a surrogate says of other images, given with their labels: ``energy/FOLDER/TERM/SET``, each ``(n,)``."""
        recipe, section, teacher = self.recipe, self.recipe.synthesized[folder], self.shop.teacher
        assert recipe.teacher is not None  # the recipe's own check
        try:
            energy = build.energy(section.energy, teacher, recipe.teacher, recipe.seed, self.allowed)
        except BadInput as error:  # the surrogate is made already: what makes its energy may have gone since
            self.board.say(f"  {folder}: the report compares no energies: {error}")
            return {}
        found: dict[str, Any] = {}
        for who, (images, labels) in sets.items():
            if images is not None:
                parts = energies(energy, teacher, images, labels, Noise((recipe.seed, folder, who)), section.batch)
                found |= {f"energy/{folder}/{name}/{who}": values for name, values in parts.items()}
        return found

    def _compared(self, generates: bool) -> str:
        """The figure that tells how good a student is: samples of one whose generator no phase trained would tell of chance."""
        if self.shop.classes is not None:
            return "accuracy" if self.reference.kind == "data" else "label_agreement"
        distill = self.recipe.distill
        return "frechet" if generates and distill and (distill.generate or distill.link) else "reconstruction_mse"

    def _about(self, name: str, arm: config.Arm) -> dict[str, Any]:
        own = "a discriminator's losses on" if trained_adversarially(self.shop.teacher) else "the ELBO on"
        loss = own if self.shop.classes is None else "cross-entropy of the labels of"
        if chain_of(self.shop.teacher):
            loss = "the denoising loss of"
        note = {
            "data_free": self._data_free_note(arm),
            "with_data": "the same losses on real images",
            "scratch": f"{loss} {'real' if arm.real else 'surrogate'} images, no teacher",
            "continual": f"{loss} new real images, and the teacher's own replayed",
        }[arm.kind]
        extra = [f"{k} {v!r}" for k, v in (("share", arm.share), ("replay", arm.replay), ("chain", arm.chain)) if v is not None]
        made = [updates_made(self.recipe, self.folder, job) for job in jobs(self.recipe) if job.title == name]
        counts = {phase: round(fmean(of[phase] for of in made)) for phase in made[0]}
        most = updates(self.recipe, arm)
        if self.recipe.start_of(arm, "generate") == "calibrated":
            note = note.replace("the teacher's noise", "the teacher's noise, calibrated")
        if self.recipe.student and self.recipe.student.start:
            note = f"from the teacher's weights, {note}"
        note = "; ".join(
            [note, " + ".join(f"{v} {k}" if v == most[k] else f"{v} of {most[k]} {k}" for k, v in counts.items()) + " updates", *extra]
        )
        return {"updates": sum(counts.values()), "data": "real" if arm.real else "none", "note": note}

    def _rows(self, arms: dict[str, config.Arm]) -> Iterator[str]:
        """The teacher and every arm; after those that know calibrated noise, the same on such noise."""
        yield "teacher"
        if self.recipe.calibrate:
            yield f"teacher{_MAPPED}"
        for name, arm in arms.items():
            yield name
            if self.recipe.start_of(arm, "generate") == "calibrated":
                yield f"{name}{_MAPPED}"

    def _about_mapped(self, arms: dict[str, config.Arm]) -> dict[str, Any]:
        section, found = self.recipe.calibrate, {}
        for name in self._rows(arms):
            if section and name.endswith(_MAPPED):
                own = name.removesuffix(_MAPPED)
                note = f"drawn from noise that goes through the map of the section calibrate ({section.steps} updates, no data)"
                about = self._about(own, arms[own]) if own in arms else {"updates": None, "data": "real"}
                found[name] = about | {"label": f"{own}, calibrated noise", "note": note}
        return found

    def _data_free_note(self, arm: config.Arm) -> str:
        if self.recipe.distill and self.recipe.distill.link:
            return "links of noised surrogate images" if self.recipe.images_of(arm, "link") else "links of the teacher's unfinished images"
        if not (self.recipe.distill and self.recipe.distill.generate):
            return "surrogate images"
        if not self.recipe.images_of(arm, "generate"):
            return "the teacher's noise, then surrogate images"
        return "the noise behind the teacher's own images, then surrogate images"

    def _size_mib(self, job: Job | None, model: Model) -> float:
        if job is not None:
            return file_mib(student_folder(self.folder, job) / "model.safetensors")
        return size_mib(model.net)


def _check_labels(split: Split, classes: int, whose: str) -> None:
    if split.labels is None:
        raise BadInput("data: has no labels, which a classifier needs")
    if split.labels.max() >= classes:
        raise BadInput(f"data: label {split.labels.max()}, but {whose} {classes}")


def _nearest(images: Kept, real: Kept, sketch: Sketch) -> dict[str, Any]:
    """The real image nearest to each surrogate image, by Euclidean distance of pixels in [0, 1], or of other values."""
    distances, places = nearest(floats(images), real)
    shown = [sketch(floats(part), len(images)) for part in (images, real[places])]
    return {"surrogate": shown[0], "nearest": shown[1], "nearest_distance": distances}


def _privacy(test: Memorization, neighbors: dict[str, list[Neighbors]]) -> dict[str, Any]:
    """The section of metrics.json: what is expected, and the figures of each arm's images, of all its seeds, and of each surrogate's."""
    return test.about() | {"sets": {name: test.figures(Neighbors.joined(found)) for name, found in neighbors.items()}}


def _spread(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Mean and standard deviation over seeds; ``None`` for a figure that is not finite, such as the ELBO of a student that fell apart."""
    finite = [name for name in rows[0] if all(math.isfinite(row[name]) for row in rows)]
    return dict.fromkeys(rows[0]) | over_seeds([{name: row[name] for name in finite} for row in rows])


def _depends_of(begun: Path) -> dict[str, Any]:
    content = read_json(begun)
    depends = content.get("depends") if isinstance(content, dict) else None
    if not isinstance(depends, dict):
        raise BrokenFile(f"{begun}: not what potstill wrote there; choose another --out")
    return depends


def number_of(n: int, what: str) -> str:
    """A number of things, such as 1 student or 3 students."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def beside(students: int, workers: int) -> str:
    """How many of so many students are trained at a time, to be said after them; of one there is nothing to say."""
    if students <= 1:
        return ""
    return ", one after the other" if workers == 1 else f", {workers} side by side"


def _refusal(folder: Path, stage: str, differences: list[str]) -> str:
    what = ", ".join(differences) or "unknown"
    begun = f"{folder}: stage {stage} was begun here from other inputs (differs: {what})"
    return f"{begun}; nothing is overwritten: choose another --out, or remove the folder to begin again"


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _identity(depends: dict[str, Any], section: config.Surrogate) -> str:
    """Fingerprint of all that the images of a surrogate depend on, which is not where they are kept."""
    whole = _plain({k: v for k, v in depends.items() if k != "surrogates"} | {"section": section})
    for part in (whole["surrogate"], whole["section"]):
        if part is not None:
            part.pop("store", None)
    return fingerprint(whole)


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Dotted names of what differs between two trees of plain data."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(k for k in now if k not in before)]
        return [d for k in keys for d in _differences(before.get(k), now.get(k), f"{path}.{k}" if path else k)]
    return [] if before == now else [path]


def describe(device: torch.device) -> dict[str, Any]:
    """Machine and versions, as metrics.json keeps them."""
    versions = {}
    for package in (
        "torch",
        "accelerate",
        "numpy",
        "scipy",
        "POT",
        "pyarrow",
        "pillow",
        "safetensors",
        "huggingface_hub",
        "pydantic",
        "scikit-learn",
    ):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "potstill": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "cpu": _processor(),
        "cores": build.cores(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": versions,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def stages_of(recipe: config.Recipe) -> tuple[str, ...]:
    """The stages that a recipe has, in order.

    Raises:
        BadInput: it has none.
    """
    found = tuple(s for s in STAGES if (recipe.synthesized if s == "synthesize" else getattr(recipe, _SECTION[s])))
    if not found:
        raise BadInput(f"{recipe.name}: the recipe has no stage in it: {', '.join(_SECTION.values())}")
    return found


def execute(
    recipe: config.Recipe,
    folder: Path,
    stages: tuple[str, ...] | None = None,
    allowed: tuple[str, ...] = (),
    quiet: bool = False,
    ranks: Ranks = ALONE,
    log_json: bool = False,
) -> None:
    """Run stages of a recipe in a folder; all that the recipe has, by default. Of several processes, all make this call.

    Raises:
        BadInput: something given is wrong; where it can be known before, nothing is written.
        Failed: a worker died.
    """
    chosen = stages or stages_of(recipe)
    with Board(quiet, log_json) as board, build.memory_watched():
        run = Run(recipe, folder, allowed, board, ranks)
        run.check(chosen)
        ranks.wait()
        with lock(folder / "state" / "run.lock", what=str(folder)) if ranks.first else contextlib.nullcontext():
            path = folder / "recipe.yaml"
            if ranks.first:
                run.check_folder()  # again, for another process may have been at work until now
                resolved = inventory.sealed(config.dump(recipe))
                if not path.exists() or path.read_bytes() != resolved.encode():  # whatever became of it
                    write_text(path, resolved)
            ranks.wait()
            if not path.exists():
                raise BadInput(f"{folder}: {platform.node()} does not see what another has written there; they must share the folder")
            for stage in chosen:
                getattr(run, stage)()
                ranks.wait()
            if ranks.first:
                run.tidy()
