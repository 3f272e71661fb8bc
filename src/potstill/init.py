"""A first recipe for a checkpoint: what it is decides what suits it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributions import Normal

from . import build, config
from .energy.view import View
from .errors import BadInput
from .evaluate.cost import parameters
from .families.classifier import classes_of
from .families.diffusion import chain_of
from .families.helmholtz import HelmholtzMachine
from .families.latent import LatentDiffusion
from .families.vrnn import VRNN
from .importers import OWN_NETWORK
from .model import Model
from .noise import Noise
from .state import read_json
from .synthesize.prior import parts_of
from .trace import Point, Trace, run

_TIMES_SMALLER = 10
_WIDTHS = (64, 48, 32, 24, 16, 12, 8, 4)  # of a student whose teacher is of another's architecture
_FILES = (".pt", ".pth", ".tar", ".bin", ".ckpt", ".safetensors")
_KINDS = (
    "a folder of config.json and model.safetensors, zoo:NAME, a folder of diffusers, of a transformers classifier or of pythae, a KD4DGM "
    "checkpoint, or module:function"
)


def init(model: str, out: Path, allowed: Sequence[str] = ()) -> list[str]:
    """Write a commented recipe for a checkpoint, which runs as it is.

    Args:
        model: a folder, file, ``zoo:NAME``, Hub id, or ``module:function``.
        out: the recipe's file, which must not be there yet.
        allowed: modules that code may come from.

    Returns:
        what to tell: what the checkpoint is, and how to go on.

    Raises:
        BadInput: it is nothing that can be a teacher, or the file is there already.
    """
    taken = BadInput(f"{out}: is there already, and nothing is overwritten; choose another --out")
    if out.exists():
        raise taken
    build.allow(allowed)
    section = teacher_section(model)
    checked = config.check({"name": "init", "teacher": section}).teacher
    assert checked is not None
    text = recipe(model, section, build.teacher(checked, Path(), allowed), allowed)
    found = config.parse(text, str(out))
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise taken from None
    code = "".join(f" --import {module}" for module in allowed)
    told = [f"{out}: a recipe for {model}", f"look at it, then: potstill run {out}{code} --dry-run"]
    if found.student and found.student.target and not _is_there(found.student.target, allowed):
        told.insert(1, f"first write {found.student.target}: a function that returns the student as a potstill Model")
    return told


def _is_there(target: str, allowed: Sequence[str]) -> bool:
    try:
        build.named(target, allowed)
    except BadInput:
        return False
    return True


def teacher_section(model: str) -> dict[str, Any]:
    """The recipe's section ``teacher`` for a checkpoint, by the files that it has.

    Raises:
        BadInput: it has those of no kind that is known.
    """
    path = Path(model).expanduser()
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", model) and not model.startswith("zoo:"):
        return {"kind": "python", "target": model}
    if path.is_file():
        if not path.name.endswith(_FILES):
            raise BadInput(f"{model}: {_KINDS} is expected; this is another file. For a network of your own, {OWN_NETWORK}")
        return {"kind": "kd4dgm", "path": model}
    folder = build.locate(model)
    if (folder / "model_index.json").exists():
        section: dict[str, Any] = {"kind": "pretrained", "path": model}
        if parts_of(folder).get("unet") == "UNet2DConditionModel":
            section |= {"prompts": ["a photo of a cat", "a photo of a dog"], "guidance_scale": 3.0}
        return section
    if (folder / "model_config.json").exists():
        return {"kind": "pythae", "path": model}
    described = read_json(folder / "config.json") if (folder / "config.json").exists() else None
    if isinstance(described, dict) and "family" in described:
        return {"kind": "pretrained", "path": model}
    if isinstance(described, dict) and ("architectures" in described or "model_type" in described):
        return {"kind": "transformers", "path": model}
    raise BadInput(f"{model}: {_KINDS} is expected; the folder has the files of none of them. For a network of your own, {OWN_NETWORK}")


@dataclass(frozen=True)
class _Part:
    """Lines of a recipe about one kind of teacher.

    Args:
        surrogate: what makes its images, or none where students learn without any.
        distill: phases by name.
        why: a comment on the surrogate.
    """

    surrogate: dict[str, Any] | None
    distill: dict[str, Any]
    why: str = ""


def recipe(model: str, section: dict[str, Any], teacher: Model, allowed: Sequence[str] = ()) -> str:
    """The text of a recipe.

    Args:
        model: how the user calls the checkpoint.
        section: ``teacher`` of the recipe.
        teacher: what it gives.
        allowed: modules that code may come from.
    """
    part = _part(teacher)
    return "\n".join([*_head(model, section, teacher, allowed), *_stages(part), *_arms(part, teacher), *_measured(teacher)]) + "\n"


def _head(model: str, section: dict[str, Any], teacher: Model, allowed: Sequence[str]) -> Iterator[str]:
    programs = [name for name in ("generate", "infer", "link") if getattr(teacher, name) is not None]
    sizes = "x".join(map(str, teacher.images.shape))
    yield f"# Made by potstill init for {model}: {type(teacher.net).__name__} of {parameters(teacher.net):,} parameters, images {sizes},"
    yield f"# programs {' and '.join(programs)}. Every key there is: potstill schema."
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", model.removeprefix("zoo:").rstrip("/").rpartition("/")[2]).strip("-._")[:90]
    yield f"name: {config.in_a_line((stem or 'teacher') + '-student')}"
    if "prompts" in section:
        yield "# The texts that its student learns to draw: write your own."
    yield f"teacher: {config.in_a_line(section)}"
    student = _student(section, teacher, allowed)
    if "ratio" in student:
        yield "# Times fewer parameters. Or {width: 8}, or what it may cost: {budget: {mib: 1}}."
    elif "target" in student:
        yield "# The teacher's architecture is its own, and so is its student's: a function that returns a smaller Model of such images."
    else:
        yield "# The teacher's architecture is not potstill's, so its student is of another one."
    yield f"student: {config.in_a_line(student)}"


def _stages(part: _Part) -> Iterator[str]:
    if part.surrogate:
        yield f"# {part.why}"
        yield "surrogate:"
        yield from (f"  {key}: {config.in_a_line(value)}" for key, value in part.surrogate.items())
    yield "# More updates make better students; these are few."
    yield "distill:"
    others = [phase for name, phase in part.distill.items() if phase and name != "scratch"]
    for name, phase in part.distill.items():
        why = "     # as many as both phases" if name == "scratch" and len(others) > 1 else ""
        yield f"  {name}: {config.in_a_line(phase)}{why}"


def _arms(part: _Part, teacher: Model) -> Iterator[str]:
    kind = "folder" if teacher.images.pixels else "values"
    more = [*(["with_data"] if teacher.infer or teacher.link else []), *(["scratch"] if "scratch" in part.distill else [])]
    yield "arms:"
    yield "- data_free"
    # Without a space after the #, so that a line is right however it is taken away.
    yield "# Where there is data, these are the students that its owner could have made, to compare with this one."
    yield f"# Take the # away from the next {len(more) + 1} lines, and put your path there."
    yield from (f"#- {name}" for name in more)
    yield f"#data: {{kind: {kind}, path: path/to/data}}"
    yield "seeds: [0]     # three of them, [0, 1, 2], give a spread, which tells how much is chance"


def _measured(teacher: Model) -> Iterator[str]:
    features = "pixels" if teacher.images.pixels else "standardized"
    yield "# Against fresh images of the teacher, for there is no data: how like it the student is, not how good."
    yield "evaluate:"
    yield "  reference: teacher     # where there is data, delete this line: then its held-out images are measured against"
    yield f"  features: {features}     # or classifier:PATH"
    if isinstance(teacher.net, LatentDiffusion):
        yield "  n: 64     # its images take a while"
    yield "report: {}"


# ------------------------------------------------------------------ by what a teacher is


def _part(teacher: Model) -> _Part:
    """The stages that suit a teacher, by the programs that it has."""
    if chain_of(teacher) is not None:
        return _of_chain(isinstance(teacher.net, LatentDiffusion))
    if (classes := classes_of(teacher)) is not None:
        return _of_classifier(teacher, classes)
    if teacher.generate is None:
        return _of_autoencoder()
    if teacher.infer is None:
        return _of_generator()
    return _of_vae(teacher)


def _of_chain(latent: bool) -> _Part:
    few = {"steps": 2000, "batch": 8, "lr": 1e-4} if latent else {"steps": 2000, "batch": 64, "lr": 4e-3}
    link = few | {"clip": 1, "ema": 0.99}
    return _Part(None, {"link": link, "generate": None, "infer": None} | ({} if latent else {"scratch": link}))


def _of_classifier(teacher: Model, classes: int) -> _Part:
    energy: list[dict[str, Any]] = [{"kind": "cross_entropy"}, {"kind": "total_variation", "weight": 0.01}]
    if View(torch.full((2, *teacher.images.shape), 0.5, device=teacher.device), teacher).moments:
        energy.insert(1, {"kind": "batchnorm"})
    surrogate = {"kind": "inversion", "n": 4096, "steps": 100, "classes": [str(i) for i in range(classes)], "energy": energy}
    why = "Pixels, moved until the teacher is sure of a class. kind guided, with a diffusion model as prior, makes pictures."
    learning = {"steps": 2000, "batch": 128, "lr": 5e-3}
    return _Part(surrogate, {"generate": None, "infer": learning, "scratch": learning}, why)


def _of_autoencoder() -> _Part:
    surrogate = {"kind": "inversion", "n": 4096, "steps": 100, "energy": [{"kind": "reconstruction"}, {"kind": "total_variation"}]}
    why = "Pixels, moved to where the teacher reconstructs them. kind guided, with a diffusion model as prior, makes pictures."
    learning = {"steps": 2000, "batch": 128, "lr": 5e-3}
    return _Part(surrogate, {"generate": None, "infer": learning, "scratch": learning}, why)


def _of_generator() -> _Part:
    learning = {"steps": 2000, "batch": 64, "lr": 5e-3, "beta2": 0.99}
    return _Part(None, {"generate": learning | {"rules": [{"nodes": "out", "by": "mse"}]}, "infer": None, "scratch": learning})


def _of_vae(teacher: Model) -> _Part:
    learning: dict[str, Any] = {"steps": 2000, "batch": 128, "lr": 1e-2, "ema": 0.98}
    surrogate: dict[str, Any] = {"kind": "ancestral", "n": 4096}
    why = "Images from the teacher's own prior, for the student's encoder."
    generate, infer = dict(learning), dict(learning)
    match teacher.net:
        case HelmholtzMachine():
            generate |= {"replay": "y*", "rules": [{"nodes": "z*"}, {"nodes": "y*"}]}
            infer |= {"replay": "*", "rules": [{"nodes": "z*"}], "elbo": 0}
        case VRNN():
            generate |= {"clip": 5, "replay": "x*", "rules": [{"nodes": "z*", "weight": 1e-3}, {"nodes": "x*"}]}
            infer |= {"clip": 5}
        case _ if isinstance(_drawn(teacher).out.dist, Point):
            generate |= {"rules": [{"nodes": "out", "by": "mse"}]}
            infer |= {"rules": [{"nodes": "out", "by": "mse"}], "elbo": 0}
        case _:
            # An encoder that has seen only clean means trusts real images too little.
            surrogate |= {"observe": "sample"}
    both = learning | {"steps": generate["steps"] + infer["steps"]}
    return _Part(surrogate, {"generate": generate, "infer": infer, "scratch": both}, why)


@torch.no_grad()
def _drawn(teacher: Model) -> Trace:
    return run(teacher.program("generate"), noise=Noise((0,)), n=2, device=teacher.device)


# ------------------------------------------------------------------ students


def _student(section: dict[str, Any], teacher: Model, allowed: Sequence[str]) -> dict[str, Any]:
    """Smaller of the same kind where the teacher is of potstill's own families, else one of them that does the same, else a target."""
    if isinstance(teacher.net, build.Network):
        return {"ratio": _TIMES_SMALLER}
    if found := _net(teacher):
        return {"net": found}
    module = section["target"].partition(":")[0] if section["kind"] == "python" else "mine"
    return {"target": f"{module}:student"}


def _net(teacher: Model) -> dict[str, Any] | None:
    """A network of potstill's own with the teacher's programs and nodes, so many times smaller, or as small as they go."""
    images, classes = teacher.images, classes_of(teacher)
    shape: dict[str, Any] = {"image": list(images.shape)}
    if classes is not None:
        shape |= {"kind": "resnet", "classes": classes, "depth": 8, "mean": list(images.mean), "std": list(images.std)}
    elif latent := _one_latent(teacher):
        shape |= {"kind": "vae", "latent": latent[0], "std": latent[1]}
    else:
        return None
    found = None
    for width in _WIDTHS:
        described = shape | {"width": width}
        try:
            student = build.student(config.Student.model_validate({"net": described}), teacher, 0, allowed=())
        except BadInput:  # images of a shape that it does not take
            return found
        found = described
        if parameters(student.net) * _TIMES_SMALLER <= parameters(teacher.net):
            return found
    return found


def _one_latent(teacher: Model) -> tuple[int, float] | None:
    """Length of the latent and std of the output of a teacher that is a VAE of images in [0, 1] with one latent vector, ``z``."""
    if teacher.generate is None or teacher.infer is None or not teacher.images.pixels:
        return None
    if any(teacher.images.mean) or any(std != 1 for std in teacher.images.std):
        return None
    trace = _drawn(teacher)
    if [*trace] != ["z", "out"] or trace["z"].value.ndim != 2 or not isinstance(trace.out.dist, Normal):
        return None
    return trace["z"].value.shape[1], round(float(trace.out.dist.stddev.mean()), 6)
