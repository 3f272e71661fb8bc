"""The stages of a run: what is done is skipped, what is not is resumed, what was made from other inputs is refused."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import __version__, build, config
from .data import Dataset
from .distill.loop import accelerator, threads
from .errors import BadInput, Failed, Refused
from .evaluate.arms import cost, over_seeds, quality, reconstructions, samples
from .evaluate.cost import file_mib
from .jobs import Job, Workshop, is_done, jobs, make_student, make_teacher, save_network, student_card, student_folder, updates
from .model import Model
from .noise import Noise
from .progress import Board, LogTail
from .state import fingerprint, lock, read_json, replacing, sha256, write_json, write_text
from .synthesize import surrogate
from .synthesize.ancestral import Ancestral

STAGES = ("train", "synthesize", "distill", "evaluate", "report")
_SECTION = {"train": "train", "synthesize": "surrogate", "distill": "distill", "evaluate": "evaluate", "report": "report"}
METRICS_FORMAT = "potstill-metrics/1"


@dataclass(frozen=True)
class Run:
    """One recipe in one folder.

    Args:
        recipe: checked.
        folder: where everything goes.
        allowed: modules that code may come from.
        board: where progress is shown.
    """

    recipe: config.Recipe
    folder: Path
    allowed: tuple[str, ...]
    board: Board

    @cached_property
    def shop(self) -> Workshop:
        return Workshop(self.recipe, self.folder, self.allowed)

    @cached_property
    def features(self) -> build.FeatureSource:
        evaluate = self._section("evaluate")
        return build.features(evaluate.features, self.shop.device, self.allowed, evaluate.batch, self.shop.real.train.images.shape[1:])

    def _section(self, stage: str) -> Any:
        section = getattr(self.recipe, _SECTION[stage])
        if section is None:
            raise BadInput(f"{self.recipe.name}: the recipe has no {_SECTION[stage]} section")
        return section

    # -------------------------------------------------------------- before anything is written

    def check(self, stages: tuple[str, ...]) -> None:
        """Load what the stages need and see that it fits together.

        Raises:
            BadInput: it does not.
        """
        recipe = self.recipe
        for stage in stages:
            self._section(stage)
        _ = self.shop.device
        if "train" in stages:
            assert recipe.train is not None
            images = self.shop.real.train
            if isinstance(recipe.train.model, config.ClassifierNet) and images.labels is None:
                raise BadInput("data: has no labels, which a classifier needs")
            if (
                isinstance(recipe.train.model, config.ClassifierNet)
                and images.labels is not None
                and images.labels.max() >= recipe.train.model.classes
            ):
                raise BadInput(f"data: label {images.labels.max()}, but train.model.classes is {recipe.train.model.classes}")
            with torch.device("meta"):
                build.network(recipe.train.model)
        to_come = "train" in stages and isinstance(recipe.teacher, config.Trained) and not self._is_done("train")
        if recipe.teacher and not to_come and set(stages) - {"train"}:
            teacher = self.shop.teacher
            if recipe.student:
                build.student(recipe.student, teacher, 0, self.allowed)
            if any(arm.kind != "scratch" for arm in recipe.arms) and recipe.distill and recipe.distill.infer and teacher.infer is None:
                raise BadInput("distill.infer: the teacher does not infer; set infer: null")
        if {"distill", "evaluate"} & set(stages):
            _ = self.shop.data
        if "evaluate" in stages:
            _ = self.features

    # -------------------------------------------------------------- the stages

    def train(self) -> None:
        """A teacher or a feature network from real data."""
        section = self._section("train")
        depends = {"train": section, "data": self.recipe.data, "seed": self.recipe.seed, "pixels": self.shop.real.train.digest()}
        with self._stage("train", depends) as work:
            if not work:
                return
            with threads(self.recipe.compute.threads):
                model = make_teacher(self.shop, accelerator(str(self.shop.device)), told=partial(self.board.training, "train"))
            test = self.shop.real.test
            if model.generate is None and test.labels is not None:
                logits = torch.cat([model.net(torch.from_numpy(part).to(self.shop.device).float() / 255) for part in _parts(test.images)])
                figures = {"accuracy": (logits.argmax(1).cpu().numpy() == test.labels).mean().item()}
            else:
                _, figures = reconstructions(
                    model, torch.from_numpy(test.images).float() / 255, Noise((self.recipe.seed, "reconstruct")), 256
                )
            write_json(self.folder / "train" / "held_out.json", figures)
            self.board.say("  held out: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))

    def synthesize(self) -> None:
        """The surrogate data set."""
        section = self._section("synthesize")
        depends = {"surrogate": section, "seed": self.recipe.seed, "teacher": self.shop.teacher_digest}
        with self._stage("synthesize", depends) as work:
            if not work:
                return
            surrogate.write(
                self.folder / "surrogate",
                Ancestral(self.shop.teacher, section.observe),
                Noise((self.recipe.seed, "surrogate")),
                n=section.n,
                batch=section.batch,
                shard=section.shard,
                identity=fingerprint(_plain(depends)),
                source=section.kind,
                progress=lambda done: self.board.update("synthesize", done, section.n, "images"),
            )

    def distill(self) -> None:
        """Every student: arms times seeds, side by side where the machine has the cores."""
        section, recipe = self._section("distill"), self.recipe
        data = any(arm.kind != "data_free" for arm in recipe.arms)
        images = section.infer is not None and any(arm.kind == "data_free" for arm in recipe.arms)
        if images and not (self.folder / "surrogate" / "manifest.json").exists():
            raise BadInput("distill: no surrogate yet; run the synthesize stage first")
        depends = {
            "distill": section,
            "student": recipe.student,
            "arms": recipe.arms,
            "seeds": recipe.seeds,
            "seed": recipe.seed,
            "teacher": self.shop.teacher_digest,
            "surrogate": surrogate.digest(self.folder / "surrogate") if images else None,
            "pixels": self.shop.real.train.digest() if data else None,
        }
        with self._stage("distill", depends) as work:
            if not work:
                return
            identity = fingerprint(_plain(depends))
            todo = [job for job in jobs(recipe) if not is_done(self.folder, job, identity)]
            workers = self._workers(len(todo))
            self.board.say(f"  {len(todo)} students, {workers} side by side")
            if workers == 1:
                with threads(recipe.compute.threads):
                    engine = accelerator(str(self.shop.device))
                    for job in todo:
                        make_student(self.shop, job, identity, engine, told=partial(self.board.training, job.name))
            else:
                self._side_by_side(todo, workers, identity)
            missing = [job.name for job in todo if not is_done(self.folder, job, identity)]
            if missing:
                raise Failed(f"distill: not done: {', '.join(missing)}; run the same command again to go on")
            first = next((a for a in recipe.arms if a.kind == "data_free"), recipe.arms[0])
            job = Job(first, recipe.seeds[0])
            model = self._load_student(job)
            save_network(model, self.folder / "student", student_card(recipe, job, updates(recipe, first), *self._sizes(model)))

    def evaluate(self) -> None:
        """Figures for the teacher and every arm, and the arrays that the report's pictures are made of."""
        section, recipe = self._section("evaluate"), self.recipe
        students = {
            job.name: sha256(student_folder(self.folder, job) / "model.safetensors") for job in jobs(recipe) if self._is_trained(job)
        }
        if len(students) < len(jobs(recipe)):
            raise BadInput("evaluate: not every student is trained yet; run the distill stage first")
        depends = {
            "evaluate": section,
            "images": recipe.report.images if recipe.report else config.Report().images,
            "students": students,
            "teacher": self.shop.teacher_digest,
            "pixels": [self.shop.real.train.digest(), self.shop.real.test.digest()],
            "features": self.features.digest,
        }
        with self._stage("evaluate", depends) as work:
            if not work:
                return
            with threads(recipe.compute.threads):
                metrics, pictures = self._measure(section)
            with replacing(self.folder / "evaluate" / "pictures.npz") as temporary, temporary.open("wb") as file:
                np.savez_compressed(file, **pictures)
            write_json(self.folder / "metrics.json", metrics)

    def report(self) -> None:
        """The page."""
        from .report import page

        section = self._section("report")
        if not (self.folder / "metrics.json").exists():
            raise BadInput("report: nothing measured yet; run the evaluate stage first")
        depends = {"report": section, "metrics": sha256(self.folder / "metrics.json")}
        with self._stage("report", depends) as work:
            if work:
                page.write(self.folder)

    # -------------------------------------------------------------- their parts

    @contextlib.contextmanager
    def _stage(self, name: str, depends: dict[str, Any]) -> Iterator[bool]:
        plain = _plain(depends)
        mark, folder = fingerprint(plain), self.folder / name
        begun, done = folder / "begun.json", folder / "done.json"
        if begun.exists():
            before = read_json(begun)
            if before.get("fingerprint") != mark:
                raise Refused(_refusal(self.folder, name, _differences(before.get("depends"), plain)))
        if done.exists():
            self.board.say(f"{name}: done already")
            yield False
            return
        self.board.say(f"{name}{': going on' if begun.exists() else ''}")
        write_json(begun, {"fingerprint": mark, "depends": plain})
        start = time.perf_counter()
        yield True
        write_json(done, {"fingerprint": mark, "seconds": round(time.perf_counter() - start, 1), "potstill": __version__})

    def _is_done(self, name: str) -> bool:
        return (self.folder / name / "done.json").exists()

    def _is_trained(self, job: Job) -> bool:
        return (student_folder(self.folder, job) / "job.json").exists()

    def _load_student(self, job: Job) -> Model:
        model = self.shop.student(job.seed)
        build.load_weights(model.net, student_folder(self.folder, job) / "model.safetensors")
        return model.frozen()

    def _sizes(self, student: Model) -> tuple[int, int]:
        return build.parameters(student.net), build.parameters(self.shop.teacher.net)

    def _workers(self, count: int) -> int:
        if self.shop.device.type != "cpu" or "RANK" in os.environ:
            return 1
        return max(1, min(count, self.recipe.compute.workers or build.cores()))

    def _side_by_side(self, todo: list[Job], workers: int, identity: str) -> None:
        count = self.recipe.compute.threads or max(1, build.cores() // workers)
        environment = os.environ | {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count)}
        command = [sys.executable, "-m", "potstill.worker", str(self.folder), identity, *self.allowed]
        tails = {job: LogTail(student_folder(self.folder, job) / "log.jsonl") for job in todo}
        with contextlib.ExitStack() as stack:
            outputs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(workers)]
            processes = [subprocess.Popen(command, env=environment, stderr=output, stdout=output) for output in outputs]
            try:
                while any(p.poll() is None for p in processes) and not any(p.returncode for p in processes):
                    for job, tail in tails.items():
                        if entry := tail.last():
                            self.board.training(job.name, entry)
                    time.sleep(0.2)
            finally:
                # They are asked to stop, and save what they have, when this process is interrupted or one of them has failed.
                for process in processes:
                    if process.poll() is None:
                        process.terminate()
                for process in processes:
                    process.wait()
            for process, output in zip(processes, outputs, strict=True):
                if process.returncode not in (0, -15):
                    output.seek(0)
                    text = output.read().decode(errors="replace").strip()
                    if process.returncode == 2:
                        raise BadInput(text.splitlines()[-1] if text else "a worker refused its input")
                    raise Failed(f"a worker died with code {process.returncode}: {text[-2000:] or 'it said nothing'}")

    def _measure(self, section: config.Evaluate) -> tuple[dict[str, Any], dict[str, Any]]:
        recipe, shop, features = self.recipe, self.shop, self.features.features
        data: Dataset = shop.real
        test = torch.from_numpy(data.test.images[: section.n]).float() / 255
        n, k, shown = len(test), section.k, recipe.report.images if recipe.report else config.Report().images
        if n <= k:
            raise BadInput(f"evaluate: {n} held-out images are too few for {k} neighbors")
        real = features(test)
        arms = [arm.title for arm in recipe.arms]
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in ("teacher", *arms)}
        floor: list[dict[str, float]] = []
        pictures: dict[str, Any] = {"real": data.test.images[:shown], "input": data.test.images[:shown]}
        counts: dict[str, dict[str, float]] = {}
        total, done = len(recipe.seeds) * (1 + len(arms)), 0
        for seed in recipe.seeds:
            noise = Noise((recipe.seed, seed, "evaluate"))
            order = noise.permutation("floor", len(data.train.images)).numpy()[:n]
            if len(order) > k:
                floor.append(quality(torch.from_numpy(data.train.images[np.sort(order)]), real, features, k))
            reference = None
            for name in rows:
                job = None if name == "teacher" else Job(next(a for a in recipe.arms if a.title == name), seed)
                model = shop.teacher if job is None else self._load_student(job)
                generated = samples(model, n, noise, section.batch)
                figures = quality(generated, real, features, k)
                if reference is None:
                    reference = generated
                else:
                    figures["paired_mse"] = (generated - reference).double().pow(2).mean().item()
                if seed == recipe.seeds[0]:
                    pictures[f"samples/{name}"] = surrogate.to_uint8(generated[:shown])
                if model.infer is not None:
                    outputs, found = reconstructions(model, test, noise, section.batch)
                    figures |= found
                    if seed == recipe.seeds[0]:
                        pictures[f"reconstruction/{name}"] = surrogate.to_uint8(outputs[:shown])
                figures |= cost(model, section.latency_threads, section.latency_repeats)
                rows[name].append(figures)
                counts[name] = {"params": build.parameters(model.net), "size_mib": self._size_mib(job, model)}
                done += 1
                self.board.update("evaluate", done, total, name)
        if (self.folder / "surrogate" / "manifest.json").exists():
            pictures |= _nearest(shop.surrogate[:shown], data.train.images)
        environment = describe(shop.device) | {"threads": torch.get_num_threads(), "latency_threads": section.latency_threads}
        metrics = {
            "format": METRICS_FORMAT,
            "name": recipe.name,
            "reference": {"data": data.name, "n": n, "features": features.name, "floor": over_seeds(floor) if floor else {}},
            "arms": {name: over_seeds(found) | counts[name] for name, found in rows.items()},
            "arms_info": {"teacher": {"label": "teacher", "updates": None, "data": "real", "note": ""}}
            | {a.title: self._about(a) for a in recipe.arms},
            "seeds": list(recipe.seeds),
            "environment": environment,
        }
        return metrics, pictures

    def _about(self, arm: config.Arm) -> dict[str, Any]:
        note = {
            "data_free": "the teacher's noise, then surrogate images",
            "with_data": "the same losses on real images",
            "scratch": "the ELBO on real images, no teacher",
        }[arm.kind]
        extra = [f"{k} {v!r}" for k, v in (("share", arm.share), ("replay", arm.replay)) if v is not None]
        counts = updates(self.recipe, arm)
        note = "; ".join([note, " + ".join(f"{v} {k}" for k, v in counts.items()) + " updates", *extra])
        return {"label": arm.title, "updates": sum(counts.values()), "data": "none" if arm.kind == "data_free" else "real", "note": note}

    def _size_mib(self, job: Job | None, model: Model) -> float:
        if job is not None:
            return file_mib(student_folder(self.folder, job) / "model.safetensors")
        from safetensors.torch import save

        return len(save({k: v.cpu().contiguous() for k, v in model.net.state_dict().items()})) / 2**20


def _parts(images: Any, size: int = 256) -> Iterator[Any]:
    for i in range(0, len(images), size):
        yield images[i : i + size]


def _nearest(images: Any, real: Any) -> dict[str, Any]:
    """The real image nearest to each surrogate image, by Euclidean distance of pixels in [0, 1]."""
    a = torch.from_numpy(images).flatten(1).double() / 255
    found, distances = [], []
    for row in a:
        every = torch.cat([(torch.from_numpy(p).flatten(1).double() / 255 - row).norm(dim=1) for p in _parts(real, 8192)])
        distance, index = every.min(0)
        found.append(real[int(index)])
        distances.append(float(distance))
    return {"surrogate": images, "nearest": np.stack(found), "nearest_distance": np.array(distances)}


def _refusal(folder: Path, stage: str, differences: list[str]) -> str:
    what = ", ".join(differences) or "unknown"
    return f"{folder}: stage {stage} was begun here from other inputs (differs: {what}); nothing is overwritten: choose another --out"


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


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


def execute(
    recipe: config.Recipe, folder: Path, stages: tuple[str, ...] | None = None, allowed: tuple[str, ...] = (), quiet: bool = False
) -> None:
    """Run stages of a recipe in a folder; all that the recipe has, by default.

    Raises:
        BadInput: something given is wrong; where it can be known before, nothing is written.
        Failed: a worker died.
    """
    chosen = stages or tuple(s for s in STAGES if getattr(recipe, _SECTION[s]) is not None)
    if not chosen:
        raise BadInput(f"{recipe.name}: the recipe has no stage in it: {', '.join(_SECTION.values())}")
    with Board(quiet) as board:
        run = Run(recipe, folder, allowed, board)
        run.check(chosen)
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / "state" / "run.lock", 0):
            resolved = config.dump(recipe)
            if not (folder / "recipe.yaml").exists() or (folder / "recipe.yaml").read_text(encoding="utf-8") != resolved:
                _refuse_other(run)
                write_text(folder / "recipe.yaml", resolved)
            for stage in chosen:
                getattr(run, stage)()


def _refuse_other(run: Run) -> None:
    """Refuse before the recipe is replaced, where a stage that was begun here has read other sections of a recipe."""
    path = run.folder / "recipe.yaml"
    if not path.exists():
        return
    before, now = config.read(path).model_dump(mode="json"), run.recipe.model_dump(mode="json")
    reads = {
        "train": ("train", "data", "seed"),
        "synthesize": ("surrogate", "seed", "teacher"),
        "distill": ("distill", "student", "arms", "seeds", "seed", "teacher", "surrogate"),
        "evaluate": ("evaluate", "data", "arms", "seeds", "teacher", "student"),
    }
    for stage, sections in reads.items():
        changed = [d for s in sections for d in _differences(before.get(s), now.get(s), s)]
        if changed and (run.folder / stage / "begun.json").exists():
            raise Refused(_refusal(run.folder, stage, changed))
