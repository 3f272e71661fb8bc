"""A finished run's student, or its surrogate, as a folder in the Hub's layout with its card; sent to the Hub where that is asked for."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, HfApi, ModelCard, ModelCardData

from . import __version__, config
from .errors import BadInput, Failed, Refused, redacted
from .jobs import Job, final_folders, updates_made
from .report.tables import arms_of, format_value, metrics_in, text_table, verdict
from .state import new_folder, read_json
from .synthesize import surrogate

_USE = """import potstill

student = potstill.load("FOLDER OR HUB ID")
images = student.sample(16, potstill.Noise((0,)))  # in [0, 1]"""

What = Literal["student", "surrogate"]
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_INHERITED = (
    "A student carries its teacher's biases, and may carry parts of the data that its teacher memorized: that no data were read when it "
    "was made does not mean that nothing of them can be told from it."
)


def publish(
    run: Path, repo: str | None = None, folder: Path | None = None, what: What = "student", license: str | None = None, private: bool = True
) -> str:
    """Put a run's student or surrogate into a folder with its card, and upload that.

    The card has the teacher, the recipe and its seeds, how many updates, and the run's figures, also as the Hub's model-index. Paths
    of the machine are shortened to their last part, wherever they stand.

    Args:
        run: folder of a finished run.
        repo: where on the Hub, ``user/name``; with ``None`` nothing is sent.
        folder: a new one to write to; by default a temporary one.
        what: which of the two.
        license: an identifier of the Hub, such as ``apache-2.0``; whoever holds the teacher knows it, so there is no default.
        private: whether a repository that is made for it is private.

    Returns:
        The folder, or the address on the Hub.

    Raises:
        BadInput: it is no finished run, or a name is none that the Hub takes.
        Refused: the folder is there already.
        Failed: the Hub did not take it.
    """
    if repo is None and folder is None:
        raise BadInput("push: say where: a name on the Hub, user/name, or --folder")
    if repo is not None and not _NAME.fullmatch(repo):
        raise BadInput(f"push: {redacted(repo)}: a name on the Hub is USER/NAME, of letters, digits, dots, dashes and underscores")
    recipe = _recipe(run)
    fill = _student if what == "student" else _surrogate
    if folder is not None:
        _write(folder, run, recipe, license, fill)
        return str(folder) if repo is None else _upload(folder, repo, what, private)
    assert repo is not None
    with tempfile.TemporaryDirectory(prefix="potstill-") as temporary:
        place = Path(temporary) / "whole"
        _write(place, run, recipe, license, fill)
        return _upload(place, repo, what, private)


def _recipe(run: Path) -> config.Recipe:
    if not (run / "recipe.yaml").is_file():
        raise BadInput(f"{run}: no folder of a run; it has no recipe.yaml")
    return config.read(run / "recipe.yaml")


def _write(folder: Path, run: Path, recipe: config.Recipe, license: str | None, fill: Any) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise Refused(f"{folder}: is there already; nothing is overwritten: remove it, or choose another --folder")
    with new_folder(folder) as place:
        fill(run, recipe, license, place)


def _upload(folder: Path, repo: str, what: What, private: bool) -> str:
    kind = "model" if what == "student" else "dataset"
    api = HfApi(library_name="potstill", library_version=__version__)
    try:
        address = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repo, repo_type=kind, commit_message=f"potstill {__version__}")
    except Exception as error:  # of the Hub, of the network, of the token: what is raised differs between its versions
        raise Failed(f"push: {repo}: the Hub did not take it: {redacted((str(error).splitlines() or [type(error).__name__])[0])}") from None
    return str(address)


# ------------------------------------------------------------------ a student


def _student(run: Path, recipe: config.Recipe, license: str | None, place: Path) -> None:
    folders = final_folders(recipe)
    for name in folders:
        if not (run / name / "model.safetensors").is_file():
            raise BadInput(f"{run}: no {name} in it; run the distill stage first")
    metrics = read_json(run / "metrics.json") if (run / "metrics.json").is_file() else None
    try:
        whole = model_card(run, recipe, folders, metrics, license)
    except (KeyError, TypeError, AttributeError):
        raise BadInput(f"{run / 'metrics.json'}: not what potstill wrote there") from None
    for name, job in folders.items():
        own = place / Path(name).relative_to("student")
        shutil.copytree(run / name, own, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md", ".*"))
        if own != place:
            (own / "README.md").write_text(str(model_card(run, recipe, {name: job}, metrics, license)), encoding="utf-8")
    (place / "README.md").write_text(str(whole), encoding="utf-8")


def model_card(run: Path, recipe: config.Recipe, jobs: dict[str, Job], metrics: dict[str, Any] | None, license: str | None) -> ModelCard:
    """The card of students.

    Args:
        run: its folder.
        recipe: of the run.
        jobs: which they are, by their folder.
        metrics: of the run, where it was evaluated.
        license: an identifier of the Hub.
    """
    of = recipe.teacher
    hub = isinstance(of, config.Pretrained) and _NAME.fullmatch(of.path) and not Path(of.path).exists()
    base = of.path if hub and isinstance(of, config.Pretrained) else None
    data = ModelCardData(
        library_name="potstill",
        license=license,
        base_model=base,
        tags=["potstill", "distillation", "data-free" if not any(job.arm.real for job in jobs.values()) else "distilled"],
        model_name=recipe.name,
        eval_results=[result for job in jobs.values() for result in _results(job, metrics)] or None,
    )
    how = [f"- `{name}`: arm `{job.title}`, seed {job.seed}; {_counted(updates_made(recipe, run, job))}" for name, job in jobs.items()]
    read = any(job.arm.real for job in jobs.values())
    parts = [
        f"# {recipe.name}",
        f"Distilled by potstill {__version__} from its teacher, {_teacher(recipe)}, "
        + ("on real images." if read else "without its training data."),
        "\n".join(how),
        f"```python\n{_USE}\n```",
        *_figures(metrics),
        f"## Limits\n\n{_INHERITED}",
        f"License: {license}." if license else "License: not stated; that of the teacher, and of its data, may bind a student too.",
        f"## Recipe\n\nSeeds: {', '.join(map(str, recipe.seeds))}.\n\n```json\n{_shortened(recipe)}\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _figures(metrics: dict[str, Any] | None) -> Iterator[str]:
    if metrics is None:
        yield "## Figures\n\nNone: it was not evaluated."
        return
    reference = metrics["reference"]
    features = f" Distances are on the features `{_last(reference['features'])}`, and are no FID." if reference["features"] else ""
    yield (
        f"## Figures\n\n{verdict(metrics)}\n\nAgainst {reference['n']} images of {_last(reference['data'])}, "
        f"{_of(metrics['seeds'])}.{features}\n\n```text\n{text_table(metrics)}\n```"
    )


def _of(seeds: Sequence[int]) -> str:
    """What the table's figures are of; one seed has no spread."""
    if len(seeds) == 1:
        return f"of seed {seeds[0]} alone"
    return f"mean and standard deviation over seeds {', '.join(map(str, seeds))}"


def _over(seeds: Sequence[int]) -> str:
    return "of 1 seed" if len(seeds) == 1 else f"over {len(seeds)} seeds"


# Figures of features of the images, which mean nothing without their name; the others are of pixels, latents or labels.
_ON_FEATURES = {"frechet", "frechet_sqrt", "kid", "emd", "mmd", "energy_distance", "one_nn", "precision", "recall", "density", "coverage"}


def _results(job: Job, metrics: dict[str, Any] | None) -> Iterator[EvalResult]:
    """The figures of a student's arm, as the Hub's model-index has them."""
    if metrics is None:
        return
    calibrated = f"{job.title}+calibrated"
    row = calibrated if calibrated in metrics["arms"] else job.title
    arm = next((a for a in arms_of(metrics) if a.key == row), None)
    if arm is None:
        return
    reference = metrics["reference"]
    data, features = _last(reference["data"]), f" (features: {_last(reference['features'])})" if reference["features"] else ""
    for metric in (metric for metric in metrics_in(metrics, cost=False) if metric.key in arm.values):
        value = arm.values[metric.key]
        yield EvalResult(
            task_type="image-classification" if "accuracy" in arm.values else "unconditional-image-generation",
            dataset_type=data,
            dataset_name=f"{data}, {reference['n']} images",
            metric_type=metric.key,
            metric_name=f"{metric.label}{features if metric.key in _ON_FEATURES else ''}",
            metric_value=value.mean,
            metric_config=f"{format_value(value, metric.key)} {_over(metrics['seeds'])}",
        )


# ------------------------------------------------------------------ a surrogate


def _surrogate(run: Path, recipe: config.Recipe, license: str | None, place: Path) -> None:
    made = [name for name in recipe.synthesized if (run / name / "manifest.json").is_file()]
    if not made:
        raise BadInput(f"{run}: no surrogate in it; run the synthesize stage first")
    counts = {}
    for name in made:
        surrogate.check(run / name)
        counts[name] = read_json(run / name / "manifest.json")["images"]
        shutil.copytree(run / name, place / name, ignore=shutil.ignore_patterns("README.md", ".*"))
    (place / "README.md").write_text(str(data_card(recipe, counts, license)), encoding="utf-8")


def data_card(recipe: config.Recipe, counts: dict[str, int], license: str | None) -> DatasetCard:
    """The card of surrogates, given the number of images of each by its folder."""
    split = [{"config_name": Path(name).name, "data_files": f"{name}/*.parquet"} for name in counts]
    data = DatasetCardData(license=license, tags=["potstill", "synthetic"], pretty_name=f"{recipe.name}, surrogate", configs=split)
    lines = [f"- `{name}`: {count:,} images, `{recipe.synthesized[name].kind}`" for name, count in counts.items()]
    parts = [
        f"# {recipe.name}: surrogate",
        f"Images made by potstill {__version__} from {_teacher(recipe)}, to train students on. "
        "Nobody photographed or drew them, and none was in a data set.",
        "\n".join(lines),
        "## Limits\n\nThey show what the teacher and, where there was one, the diffusion prior took for likely. They carry the biases of "
        "both, and may resemble images that either memorized.",
        f"License: {license}." if license else "License: not stated; those of the teacher and of the prior may bind their images.",
        f"## Recipe\n\n```json\n{_shortened(recipe)}\n```",
    ]
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


# ------------------------------------------------------------------ words


def _teacher(recipe: config.Recipe) -> str:
    of = recipe.teacher
    if of is None:
        return "no teacher"
    path = getattr(of, "path", None) or getattr(of, "target", None)
    return f"a {of.kind} model" if path is None else f"`{_last(str(path))}`"


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} updates of {name}" for name, count in counts.items())


def _last(text: str) -> str:
    """A path of this machine by its last part, also after a word and a colon; any other text as it is."""
    kind, colon, rest = text.rpartition(":")
    local = rest.startswith(("/", "~", "./", "../")) or ("/" in rest and Path(rest).exists())
    return f"{kind}{colon}{Path(rest).name}" if local and not rest.startswith("//") else text


def _shortened(recipe: config.Recipe) -> str:
    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: walk(v) for key, v in value.items()}
        if isinstance(value, list):
            return [walk(v) for v in value]
        return _last(value) if isinstance(value, str) else value

    return json.dumps(walk(recipe.model_dump(mode="json", exclude_defaults=True)), indent=1, ensure_ascii=False)
