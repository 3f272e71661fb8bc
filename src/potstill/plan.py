"""What a run would do, and about what it would cost, found out without writing anything."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from . import build, config
from .distill.loop import threads
from .errors import BadInput
from .evaluate.cost import Operations, parameters, size_mib
from .jobs import (
    Job,
    adversary_of,
    flops,
    flops_of_calibration,
    flops_of_train,
    groups,
    is_done,
    jobs,
    memory_of_train,
    seconds,
    updates,
)
from .noise import Noise
from .pipeline import DONE, Run, beside, number_of, stages_of
from .progress import Board, span
from .state import check_unlocked
from .synthesize.guided import Guided
from .synthesize.inversion import Inversion, LatentInversion

# The stages whose results a stage is made from.
_BEFORE = {
    "train": (),
    "calibrate": ("train",),
    "synthesize": ("train",),
    "distill": ("train", "calibrate", "synthesize"),
    "evaluate": ("distill",),
    "report": ("evaluate",),
}
# At most, of an image's PNG beside its pixels and of the rest of its row, and of a parquet file beside its rows.
_ROW_BYTES, _FILE_BYTES = 200, 8192
_KEPT_STATES = 2  # of a training


def plan(recipe: config.Recipe, folder: Path, stages: tuple[str, ...] | None = None, allowed: tuple[str, ...] = ()) -> list[str]:
    """The stages of a run, in lines of text: how far each is, what it makes, and about what that costs.

    All that :func:`potstill.pipeline.execute` checks before it writes is checked, and nothing is written.

    Args:
        recipe: checked.
        folder: of the run.
        stages: to be done; by default all that the recipe has.
        allowed: modules that code may come from.

    Raises:
        BadInput: something given is wrong, or the folder holds the results of something else, or another process works there.
    """
    chosen = stages or stages_of(recipe)
    with Board(quiet=True) as board, build.memory_watched(), _no_bytecode():
        run = Run(recipe, folder, allowed, board)
        run.check(chosen)
        check_unlocked(folder / "state" / "run.lock", str(folder))
        return [f"{recipe.name}: a dry run of what would be done in {folder}; nothing is written", *_Plan(run, chosen).lines()]


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Within the block an allowed module that is imported leaves no ``__pycache__`` behind."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


class _Plan:
    """The lines of a plan, and what they add up to.

    Args:
        run: checked.
        stages: of it.
    """

    def __init__(self, run: Run, stages: tuple[str, ...]):
        self.run, self.recipe, self.shop, self.stages = run, run.recipe, run.shop, stages
        self.flops, self.bytes = 0, 0.0
        trained = isinstance(self.recipe.teacher, config.Trained)
        self.stands_in = trained and "train" in stages and not run.is_done("train")
        if self.stands_in:
            vars(self.shop)["teacher"] = run.teacher_to_be(stages)  # of the same shape, and so of the same cost

    def lines(self) -> Iterator[str]:
        """All of them."""
        yield from self._networks()
        details: dict[str, Callable[[], Iterator[str]]] = {
            "train": self._train,
            "calibrate": self._calibrate,
            "synthesize": self._synthesize,
            "distill": self._distill,
            "evaluate": self._evaluate,
        }
        found: dict[str, str] = {}
        for stage in self.stages:
            found[stage] = self._how_far(stage, found)
            yield f"{stage}: {found[stage]}"
            if found[stage] != DONE and stage in details:
                yield from (f"  {line}" for line in details[stage]())
        if self.flops:
            yield f"in all about {_operations(self.flops)}, evaluation aside, and {_mib(self.bytes)} on disk, logs and report aside"

    def _how_far(self, stage: str, found: dict[str, str]) -> str:
        """What the stage itself would say; while one before it is still to be done, what it depends on is not known."""
        open_ = [before for before in _BEFORE[stage] if found.get(before, DONE) != DONE]
        if not open_:
            return self.run.found(stage, self.run.inputs(stage)) or "to do"
        begun = (self.run.folder / stage / "begun.json").exists()
        return f"begun; goes on with what {open_[0]} makes" if begun else "to do"

    # -------------------------------------------------------------- networks

    def _networks(self) -> Iterator[str]:
        recipe = self.recipe
        if not {"calibrate", "synthesize", "distill", "evaluate"} & set(self.stages):
            return
        teacher = self.shop.teacher
        yield f"teacher: {_network(teacher.net)}"
        for folder in recipe.synthesized if "synthesize" in self.stages else ():
            synthesizer = self.shop.synthesis(folder).synthesizer
            if isinstance(synthesizer, Guided):
                yield f"prior of {folder}: {synthesizer.prior.parameters():,} parameters, {_mib(synthesizer.prior.nbytes())}"
        if "distill" not in self.stages:
            return
        for width in recipe.widths:
            student = self.shop.student_of(teacher, 0, None, width).net
            times = parameters(teacher.net) / parameters(student)
            yield f"student: {_network(student)}, {times:.3g} times fewer"
        for arm in recipe.arms:
            student_model = self.shop.student_of(teacher, 0, arm.chain, recipe.widths[0])
            if adversary := adversary_of(recipe, arm, student_model, 0):
                yield f"discriminator of {arm.title}: {_network(adversary)}"

    # -------------------------------------------------------------- stages

    def _train(self) -> Iterator[str]:
        section = self.recipe.train
        assert section is not None  # the run's own check
        images = len(self.shop.real.train.of(section.labels).images)
        batch = min(section.batch, images)
        text = f"{section.steps:,} updates of {batch} of {images:,} images"
        if isinstance(section.model, config.TextToImageNet):
            yield f"{section.autoencoder.steps:,} updates of the autoencoder, then {text}"
            return
        with torch.device("meta"):
            net = build.network(section.model)
        size, states = _bytes(net), self._states(_bytes(net), bool(section.ema))
        self.bytes += size + states
        yield f"{_network(net)}; about {_mib(states)} of saved states while it trains"
        if (each := flops_of_train(self.shop)) is not None:
            text += f", {_operations(each * batch)} each"
            self.flops += each * batch * section.steps
        yield text
        if found := self.run.memory_needed(memory_of_train(self.shop)):
            yield found

    def _calibrate(self) -> Iterator[str]:
        section = self.recipe.calibrate
        assert section is not None  # the run's own check
        text = f"{section.steps:,} updates of {section.batch} samples"
        with self._estimate():
            each = flops_of_calibration(self.shop) * section.batch
            self.flops += each * section.steps
            text += f", {_operations(each)} each"
        yield text

    def _synthesize(self) -> Iterator[str]:
        shape, pixels = self.shop.teacher.images.shape, self.shop.teacher.images.pixels
        for folder, section in self.recipe.synthesized.items():
            # A PNG's worst is its pixels as they are, and a byte more in each line.
            row = (math.prod(shape) + shape[1] if pixels else 4 * math.prod(shape)) + _ROW_BYTES
            size = section.n * row + math.ceil(section.n / section.shard) * _FILE_BYTES
            text = f"{folder}: {section.n:,} images, {section.kind}, at most {_mib(size)} "
            text += "in its store" if section.store else "on disk"
            self.bytes += 0 if section.store else size
            with self._estimate():
                each = self._flops_of_image(folder)
                self.flops += each * section.n
                text += f", {_operations(each)} an image"
            if found := self.run.memory_needed(self.run.needs.get(folder)):
                text += f", {found}"
            yield text

    def _flops_of_image(self, folder: str) -> int:
        """Of a synthesis with steps it is reckoned from one step and two, as if its whole energy were active in each."""
        synthesis = self.shop.synthesis(folder)

        def counted(steps: int | None) -> int:
            made = synthesis.synthesizer
            if isinstance(made, (Guided, Inversion, LatentInversion)) and steps:
                made = replace(made, steps=steps)
            with Operations() as operations:
                replace(synthesis, synthesizer=made)(range(2), Noise((self.recipe.seed, folder, "plan")))
            return operations.count // 2

        if not isinstance(synthesis.synthesizer, (Guided, Inversion, LatentInversion)):
            return counted(None)
        steps, first = synthesis.synthesizer.steps, counted(1)
        return first + (steps - 1) * (counted(2) - first)

    def _time(self, workers: int, done: int) -> Iterator[str]:
        recipe = self.recipe
        with threads(self.run.workers(len(groups(recipe)))[1]):
            each = seconds(self.shop, self.shop.teacher)
        whole = sum(
            each[Job(arm, 0, width).title][name] * steps * len(recipe.seeds)
            for arm in recipe.arms
            for width in recipe.widths
            for name, steps in updates(recipe, arm).items()
        )
        yield f"about {span(whole / workers)} on this machine, as an update of each is timed now" + (", if none were there" if done else "")

    def _at_most(self, phase: str) -> str:
        section = getattr(self.recipe.distill, phase.partition("-")[0], None)
        return "at most " if getattr(section, "early_stopping", None) else ""

    def _distill(self) -> Iterator[str]:
        recipe, every = self.recipe, jobs(self.recipe)
        workers, _ = self.run.workers(len(groups(recipe)))
        done = sum(is_done(self.run.folder, job) for job in every)
        sizes = f" x {len(recipe.widths)} widths" if recipe.students else ""
        text = f"{number_of(len(every), 'student')}: {number_of(len(recipe.arms), 'arm')} x {number_of(len(recipe.seeds), 'seed')}"
        text += f" ({', '.join(map(str, recipe.seeds))}){sizes}"
        yield text + beside(len(every), workers) + (f"; {done} of them are there" if done else "")
        if uneven := self.run.uneven():
            yield uneven
        each = flops(self.shop, self.shop.teacher)
        for arm in recipe.arms:
            for width in recipe.widths:
                title, phases = Job(arm, 0, width).title, []
                for name, steps in updates(recipe, arm).items():
                    batch = self._batch(arm, name.partition("-")[0])
                    update = each[title][name] * batch
                    self.flops += update * steps * len(recipe.seeds)
                    phases.append(f"{name} {self._at_most(name)}{steps:,} updates of {batch}, {_operations(update)} each")
                yield f"{title}: {'; '.join(phases)}"
        yield from self._time(workers, done)
        if recipe.students:
            yield "the teacher's part of an update is counted for each width, and is done once"
        yield from self._rounds()
        yield from self._students_on_disk(workers)
        if found := self.run.memory_needed(self.run.needs.get("distill"), workers, self.run.bytes_of_surrogates()):
            yield found

    def _batch(self, arm: config.Arm, phase: str) -> int:
        """Samples of an update: no more than there are images."""
        distill = self.recipe.distill or config.Distill()
        section, images = getattr(distill, phase), math.inf
        if arm.real:
            images = len(self.shop.real_of(arm).images)
        elif folders := self.recipe.images_of(arm, phase):
            images = sum(self.recipe.synthesized[folder].n for folder in folders)
        elif phase == "link":
            images = section.pool
        return int(min(section.batch, images))

    def _rounds(self) -> Iterator[str]:
        rounds = self.recipe.distill.rounds if self.recipe.distill else 1
        again = [s.n for s in self.recipe.synthesized.values() if any(term.kind == "disagreement" for term in s.energy)]
        if rounds > 1:
            when = "round 2" if rounds == 2 else f"each of rounds 2 to {rounds}"
            yield f"before {when} of every student, {sum(again):,} more images, made against it, which are not counted here"

    def _students_on_disk(self, workers: int) -> Iterator[str]:
        recipe, distill = self.recipe, self.recipe.distill or config.Distill()
        size = 2**20 * sum(size_mib(self.shop.student_of(self.shop.teacher, 0, None, width).net) for width in recipe.widths)
        whole = size * (len(groups(recipe)) + 1)  # one of each width lies in student too
        averaged = any(section and section.ema for section in (distill.link, distill.generate, distill.infer, distill.scratch))
        states = workers * self._states(size, averaged)
        self.bytes += whole + states
        yield f"{_mib(whole)} of students on disk, and about {_mib(states)} of saved states while they train"

    @staticmethod
    def _states(size: float, averaged: bool) -> float:
        """Bytes of a training's states: weights, the two moments of Adam, and the average of the weights, if there is one."""
        return _KEPT_STATES * size * (4 if averaged else 3)

    def _evaluate(self) -> Iterator[str]:
        section, recipe = self.recipe.evaluate, self.recipe
        assert section is not None  # the run's own check
        n = self.run.reference_images(self.shop.teacher)
        against = "held-out images" if section.reference == "data" else "images of the teacher's making"
        rows = 1 + len(recipe.arms) * len(recipe.widths)
        text = f"the teacher and {number_of(rows - 1, 'row')} of students, at {number_of(len(recipe.seeds), 'seed')}, on {n:,} {against}"
        yield f"{text}; {section.features}"
        if unread := self.run.unread_data():
            yield unread
        with self._estimate():
            if found := self.run.memory_needed(self.run.memory_of_evaluate(section)):
                yield found

    @contextmanager
    def _estimate(self) -> Iterator[None]:
        """Within the block, what only fails since the teacher is a stand-in of random weights leaves an estimate out."""
        try:
            yield
        except BadInput:
            if not self.stands_in:
                raise


def _bytes(net: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in net.state_dict().values())


def _network(net: nn.Module) -> str:
    return f"{type(net).__name__}, {parameters(net):,} parameters, {_mib(_bytes(net))} of weights"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.3g} MiB" if size < 2**30 else f"{size / 2**30:,.3g} GiB"


def _operations(count: float) -> str:
    """A number of floating-point operations for a reader."""
    for size, unit in ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,.0f} FLOP"
