"""The report of a run as one HTML file that needs nothing else: no network, no other file, and of scripts only its own.

That one sorts tables; the page's policy names its digest, so that no other runs, whatever text of a user is on the page. The report is made
from the files of the run folder alone, so it can be written again at any time, and the same files give the same bytes.
"""

import base64
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from . import figures, tables
from .figures import Picture, Pictures
from .tables import Arm, Metric, Value

__all__ = ["ReportError", "outdated", "write"]

_FORMAT = "potstill-metrics/1"
_PAIRS = 24  # surrogate images shown beside their nearest real neighbor; the closest come first, so the rest tell less
_CAPTIONED = 24  # surrogate images shown with what they were made for
_STEPS = 16  # columns of a strip of predictions, which fill the page
_ROWS = 8
_SCATTERED = 24  # arms in a scatter: the numbers of more would lie on each other
_COSTS = (("params", "parameters"), ("latency_ms_b1", "milliseconds for one image"))
_PANELS = 80  # of losses: each takes a moment to draw, and a log may name any number of phases; arms have up to three, in each size
_TERMS = 16  # energies that a surrogate is shown with: more than there are, so a file of thousands cannot make a page of them
_ARMS = 1000  # a file may name any number, and a row takes a millisecond
_SETS = {"surrogate": "free", "teacher": "teacher", "real": "real"}
_WITHOUT_NOISE = ("inversion", "latent")  # kinds whose images are not denoised
_KINDS = {"teacher": "", "free": "no real data", "real": "real data", "": ""}


class ReportError(Exception):
    """A run folder that no report can be made of: the message names the file, what was found and what to do."""


def write(run: Path) -> Path:
    """Write `run/report.html` from the files of the run folder and return its path.

    Only `metrics.json` is required. The file appears under its final name when it is complete, or not at all.
    Raises `ReportError` where `metrics.json` is missing or is not a file of metrics.
    """
    run = Path(run)
    html = _render(run)
    target = run / "report.html"
    temporary = run / f".report.html.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            # A lone surrogate, which JSON can express, has no UTF-8: it becomes a question mark rather than an error.
            file.write(html.encode("utf-8", errors="replace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    return target


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ReportError(f"{path} does not exist: a report needs the run's figures; run `potstill evaluate` first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{path} cannot be read as JSON ({error}): run `potstill evaluate` again") from error
    found = metrics.get("format") if isinstance(metrics, dict) else type(metrics).__name__
    if not isinstance(metrics, dict) or found != _FORMAT:
        raise ReportError(f"{path} has format {found!r}, expected {_FORMAT!r}: it is from another version or no file of metrics")
    return metrics


def _read_text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _name_of(recipe: str | None, run: Path) -> str:
    """The recipe's `name`, or the folder's where the recipe has none."""
    try:
        loaded = yaml.safe_load(recipe or "")
    except (yaml.YAMLError, RecursionError, ValueError):
        loaded = None
    name = loaded.get("name") if isinstance(loaded, dict) else None
    return str(name).strip() if name is not None and str(name).strip() else run.resolve().name


@dataclass(frozen=True)
class _Dot:
    """One arm on the line of the compared metric; positions and lengths in percent of the line."""

    label: str
    kind: str
    text: str
    at: float
    low: float
    length: float


@dataclass(frozen=True)
class _Line:
    """The arms on one scale, from zero or logarithmic, and where the floor lies on it."""

    dots: list[_Dot]
    floor: float | None = None
    log: bool = False


def _line(arms: Sequence[Arm], metric: Metric, floor: Value | None) -> _Line:
    """The arms that have the metric."""
    found = [(arm, arm.values[metric.key]) for arm in arms if metric.key in arm.values]
    values = [value for _, value in found] + ([floor] if floor else [])
    top = max((value.mean + (value.sd or 0.0) for value in values), default=0.0)
    if len(found) < 2 or top <= 0:
        return _Line([])
    least = min(value.mean for value in values)
    log = figures.is_wide(np.array([least, max(value.mean for value in values)]))

    def percent(number: float) -> float:
        share = math.log(max(number / (0.8 * least), 1.0)) / math.log(1.1 * top / (0.8 * least)) if log else number / (1.03 * top)
        return round(100 * min(max(share, 0.0), 1.0), 2)

    dots = []
    for arm, value in found:
        low, high = percent(value.mean - (value.sd or 0.0)), percent(value.mean + (value.sd or 0.0))
        dots.append(_Dot(arm.label, arm.kind, tables.format_value(value), percent(value.mean), low, round(high - low, 2)))
    return _Line(dots, None if floor is None else percent(floor.mean), log)


def _scatter(arms: Sequence[Arm], metric: Metric, floor: Value | None) -> dict[str, Any] | None:
    """Quality against size and against latency, the arms numbered; `None` where all cost the same or too few have both figures."""
    shown = [arm for arm in arms if metric.key in arm.values and any(key in arm.values for key, _ in _COSTS)][:_SCATTERED]
    panels = []
    for key, cost in _COSTS:
        points = [
            figures.Point(i, arm.kind, arm.values[key], arm.values[metric.key]) for i, arm in enumerate(shown, 1) if key in arm.values
        ]
        points = [point for point in points if point.fits]
        if len({point.x.mean for point in points}) < 2:
            continue
        said = "; ".join(
            f"{point.number}: {tables.format_value(point.x, key)}, {tables.format_value(point.y, metric.key)}" for point in points
        )
        svg = Markup(figures.scatter_svg(points, floor.mean if floor else None, cost, f"scatter-{key.replace('_', '-')}"))
        panels.append({"cost": cost, "svg": svg, "words": f"{metric.label} against {cost}, by the arms' numbers: {said}"})
    return {"panels": panels, "arms": shown, "left_out": len(arms) > len(shown) == _SCATTERED} if panels else None


@dataclass(frozen=True)
class _Strip:
    """Rows of images of one kind under one label."""

    label: str
    kind: str
    rows: list[Picture]


def _walls(arms: Sequence[Arm], images: Mapping[str, figures.Pixels]) -> list[dict[str, Any]]:
    """For each student, rows of the teacher's samples each followed by the student's for the same noise."""
    drawn = [(arm, images[f"samples/{arm.key}"]) for arm in arms if f"samples/{arm.key}" in images]
    teacher = next(((arm, found) for arm, found in drawn if arm.kind == "teacher"), None)
    walls = []
    for arm, found in drawn:
        if arm.key == tables.TEACHER and len(drawn) > 1:
            continue
        blocks: Iterable[list[Picture]]
        if teacher is None or arm is teacher[0]:
            blocks = [[row] for row in figures.strips(found, f"Samples of {arm.label}")]
        else:
            count = min(len(found), len(teacher[1]))
            above = figures.strips(teacher[1][:count], f"Samples of {teacher[0].label}")
            below = figures.strips(found[:count], f"Samples of {arm.label} for the same noise")
            # Images of another size fall into rows of another length; rows that do not correspond are not shown as pairs.
            same = above[0].width == below[0].width
            blocks = [list(both) for both in zip(above, below, strict=False)] if same else [above[:1], below[:1]]
        walls.append({"arm": arm, "blocks": list(blocks), "paired": teacher is not None and arm is not teacher[0]})
    return walls


def _timed(arms: Sequence[Arm]) -> str:
    """What the times are of: a model that generates is timed generating."""
    figures = {key for arm in arms for key in arm.values}
    if "frechet" in figures or not figures & {"accuracy", "label_agreement", "reconstruction_mse"}:
        return "Generation"
    return "Classification" if figures & {"accuracy", "label_agreement"} else "Reconstruction"


def _reconstructions(arms: Sequence[Arm], images: Mapping[str, figures.Pixels], shown: str) -> list[_Strip]:
    drawn = [(arm, images[f"reconstruction/{arm.key}"]) for arm in arms if f"reconstruction/{arm.key}" in images]
    if "input" not in images or not drawn:
        return []
    rows = [_Strip(shown, "", figures.strips(images["input"], shown, rows=1))]
    return rows + [_Strip(arm.label, arm.kind, figures.strips(found, f"Reconstructions by {arm.label}", rows=1)) for arm, found in drawn]


def _surrogates(run: Path, metrics: Mapping[str, Any], pictures: Pictures | None) -> list[dict[str, Any]]:
    """One block for each surrogate: what it is, its first images, how they were made, and their energies beside those of others."""
    # Folders are looked up among those that exist: a name from a file need not be a usable path.
    own = [run / tables.SURROGATE, *sorted((run / f"{tables.SURROGATE}s").glob("*"))]
    folders = {str(folder.relative_to(run)): folder for folder in own if (folder / "manifest.json").is_file()}
    measured = {row.key: row for row in tables.surrogates_of(metrics)}
    blocks: list[dict[str, Any]] = []
    for key in dict.fromkeys([*measured, *folders]):
        manifest = _read_manifest(folders[key] / "manifest.json") if key in folders else {}
        kind = measured[key].note if key in measured else ""
        source = str(manifest.get("source") or "")
        shown = kind or source
        steps = folders[key] / "steps.npz" if key in folders else None
        course = figures.read_course(steps) if steps and steps.exists() else None
        name = f"surrogate-{len(blocks)}"
        block = {
            "label": tables.surrogate_label(key),
            "kind": kind,
            "manifest": manifest,
            "source": "" if source == kind else source,
            "broken": bool(steps and steps.exists() and course is None),
            "course": course,
            "curves": _curves(course, name, shown not in _WITHOUT_NOISE) if course else [],
            "predictions": _predictions(course, shown not in _WITHOUT_NOISE) if course else [],
            "histograms": _histograms(pictures, key, name) if pictures else [],
        }
        blocks.append(block | _first_images(pictures, key, tables.surrogate_label(key)))
    return blocks


def _first_images(pictures: Pictures | None, key: str, label: str) -> dict[str, Any]:
    """The first images of a surrogate: in rows, or each with its label and prompt."""
    images = pictures.images.get(f"images/{key}") if pictures else None
    if pictures is None or images is None:
        return {"rows": [], "cards": []}
    texts = [pictures.texts.get(f"{what}/{key}", []) for what in ("label", "prompt")]
    if not all(len(found) in (0, len(images)) for found in texts) or not any(texts):
        return {"rows": figures.strips(images, f"First images of {label}"), "cards": []}
    labels, prompts = (found[:_CAPTIONED] or [""] * min(len(images), _CAPTIONED) for found in texts)
    words = [" · ".join(filter(None, both)) for both in zip(labels, prompts, strict=True)]
    shown = figures.singles(images, [f"A surrogate image, made for: {found}" for found in words])
    # A prompt that names its label says it all.
    heads = ["" if label.lower() in prompt.lower() else label for label, prompt in zip(labels, prompts, strict=True)]
    return {"rows": [], "cards": list(zip(shown, heads, prompts, strict=True))}


def _curves(course: figures.Course, name: str, noise: bool) -> list[dict[str, Any]]:
    """Each term of the energy against the steps of a synthesis."""
    return [
        {
            "label": term,
            # As in the panels of losses: drawn from numbers, no text of a user is inside.
            "svg": Markup(figures.energy_svg(series, course.level, noise, f"{name}-course-{index}")),
            "words": f"Energy {term} against step, from {series[1][0]:.4g} at step {series[0][0]:.0f} to {series[1][-1]:.4g} at the last",
        }
        for index, (term, series) in enumerate(list(course.energies.items())[:_TERMS])
    ]


def _predictions(course: figures.Course, noise: bool) -> list[dict[str, Any]]:
    """Columns of predicted images, one for each of the steps that were kept, or for as many of them as fit."""
    if not course.at:
        return []
    kept = np.unique(np.linspace(0, len(course.at) - 1, min(len(course.at), _STEPS)).round().astype(int))
    alts = [f"What the images looked like at step {course.at[index]} of {len(course.level)}" for index in kept]
    levels = [course.level[course.at[index] - 1] for index in kept]
    drawn = figures.columns(course.images[kept, :_ROWS], alts)
    return [
        {"picture": picture, "step": course.at[index], "level": f"{level:#.2g}" if noise and np.isfinite(level) else ""}
        for picture, index, level in zip(drawn, kept, levels, strict=True)
    ]


def _histograms(pictures: Pictures, key: str, name: str) -> list[dict[str, Any]]:
    """Each term's energies of a surrogate, of the teacher's samples and of real images."""
    found: dict[str, dict[str, Any]] = {}
    for path, energies in pictures.energies.items():
        term, _, who = path.removeprefix(f"energy/{key}/").rpartition("/")
        if path.startswith(f"energy/{key}/") and term and who in _SETS:
            found.setdefault(term, {})[who] = energies
    panels = []
    for index, (term, sets) in enumerate(list(found.items())[:_TERMS]):
        by_kind = {kind: sets[who] for who, kind in _SETS.items() if who in sets}
        means = [(kind, f"{numbers.mean():.4g}") for kind, numbers in by_kind.items()]
        words = ", ".join(f"{who} {sets[who].mean():.4g}" for who in _SETS if who in sets)
        svg = Markup(figures.histogram_svg(by_kind, f"{name}-energy-{index}"))
        panels.append({"label": term, "svg": svg, "means": means, "words": f"Histogram of energy {term}; means: {words}"})
    return panels


def _neighbors(pictures: Pictures) -> dict[str, Any] | None:
    """Each surrogate image beside the real image nearest to it, the closest pair first where distances are known."""
    made, nearest, distances = pictures.images.get("surrogate"), pictures.images.get("nearest"), pictures.distances
    if made is None or nearest is None:
        return None
    count = min(len(made), len(nearest))
    if distances is not None and len(distances) >= count:
        order = np.argsort(distances[:count], kind="stable")[:_PAIRS]
        captions = [f"{distances[index]:#.3g}" for index in order]
    else:
        order, captions = np.arange(count)[:_PAIRS], [""] * min(count, _PAIRS)
    alts = ["A surrogate image and the real image nearest to it" + (f", at distance {text}" if text else "") for text in captions]
    shown = figures.pairs(made[order], nearest[order], alts)
    return {"pairs": list(zip(shown, captions, strict=True)), "of": count, "sorted": any(captions)}


def _training(run: Path, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """One panel for each arm and phase that left a log, the teacher's own training first."""
    # Folders are looked up among those that exist: an arm's name comes from a file and need not be a usable path.
    found = {folder.name: sorted(folder.glob("seed-*/log.jsonl")) for folder in sorted((run / "students").glob("*"))}
    sources = [("Teacher, its own training", "teacher", [run / "train" / "log.jsonl"])]
    sources += [("Teacher, its calibration", "teacher", [run / "calibrated" / "log.jsonl"])]
    sources += [(arm.label, str(arm.kind), found.pop(arm.key, [])) for arm in arms]
    sources += [(tables.ARM_LABELS.get(name, name), "", paths) for name, paths in found.items()]
    panels: list[dict[str, Any]] = []
    for label, kind, paths in sources:
        logs = [figures.read_log(path) for path in paths]
        for phase in sorted({phase for log in logs for phase in log.losses})[: _PANELS - len(panels)]:
            runs = [log.losses[phase] for log in logs if phase in log.losses]
            curves = figures.loss_svg(runs, f"loss-{len(panels)}")
            paces = [log.pace[phase] for log in logs if phase in log.pace]
            facts = [f"{len(runs)} seeds thin, their mean bold"] if len(runs) > 1 else []
            facts += [f"{float(np.median(paces)):,.0f} images/s"] if paces else []
            facts += ["points averaged to fit"] if curves.averaged else []
            broken = sum(log.broken.get(phase, 0) for log in logs)
            facts += [f"{broken:,} losses were not finite and are left out"] if broken else []
            words = f"Loss of {label}{', ' if phase else ''}{phase}, against updates"
            # The only markup that is not escaped: matplotlib drew it from numbers, no text of a user is inside.
            panels.append({"label": label, "kind": kind, "phase": phase, "svg": Markup(curves.svg), "words": words, "facts": facts})
    return panels


def _exports(run: Path) -> dict[str, dict[str, Any]]:
    """What each export of the run says of itself, by its folder."""
    return {path.parent.name: _read_manifest(path) for path in sorted((run / "export").glob("*/export.json"))}


def _digest(exports: Mapping[str, Any]) -> str:
    """Of the exports on a page; empty where there are none."""
    return hashlib.sha256(json.dumps(exports, sort_keys=True).encode()).hexdigest() if exports else ""


def outdated(run: Path) -> bool:
    """Whether `run/report.html` shows other exports than the run now has."""
    shown = re.search(r'<section id="exports" data-digest="(\w+)">', _read_text(run / "report.html") or "")
    return (shown[1] if shown else "") != _digest(_exports(run))


def _count(found: object) -> str:
    """A whole number with its thousands apart, anything else as it is, a dash for nothing."""
    return tables.DASH if found is None else f"{found:,}" if isinstance(found, int) and not isinstance(found, bool) else str(found)


def _facts(found: object) -> list[tuple[str, str]]:
    """A mapping as rows of text; what is nested below it stays JSON."""
    if not isinstance(found, Mapping):
        return []
    return [
        (str(key).replace("_", " "), entry if isinstance(entry, str) else json.dumps(entry, sort_keys=True, ensure_ascii=False))
        for key, entry in found.items()
        if entry is not None
    ]


def _render(run: Path) -> str:
    metrics = _read_metrics(run / "metrics.json")
    recipe = _read_text(run / "recipe.yaml")
    pictures = figures.read_pictures(run / "evaluate" / "pictures.npz")
    images = pictures.images if pictures else {}
    arms, floor = tables.arms_of(metrics), tables.floor_of(metrics)
    if len(arms) > _ARMS:
        raise ReportError(f"{run / 'metrics.json'}: {len(arms):,} arms, and a page that can be read holds {_ARMS:,} at most")
    reference = metrics.get("reference")
    environment = metrics.get("environment")
    environment = environment if isinstance(environment, Mapping) else {}
    compared = tables.compared_metric(arms, metrics.get("compared"))
    line = _line(arms, compared, floor.get(compared.key))
    by_teacher = tables.by_teacher(metrics)
    private_rows, private_columns = tables.privacy_of(metrics)
    privacy = metrics.get("privacy")
    privacy = privacy if isinstance(privacy, Mapping) else {}
    seen = "The reference images" if by_teacher else "Real test images"
    seeds = metrics.get("seeds")
    exports = _exports(run)
    exported = tables.exports_of(exports)

    script = (Path(__file__).parent / "page.js").read_text("utf-8")

    loader = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(default_for_string=True, default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return loader.get_template("page.html.j2").render(
        name=_name_of(recipe, run),
        verdict=tables.verdict(metrics),
        arms=arms,
        kinds=_KINDS,
        floor=floor,
        quality=tables.metrics_in(metrics, cost=False),
        costs=tables.metrics_in(metrics, cost=True),
        features=tables.features_of(metrics),
        reference=dict(reference) if isinstance(reference, Mapping) else {},
        compared=compared,
        timed=_timed(arms),
        exported=exported,
        export_columns=tables.export_metrics(exported),
        export_digest=_digest(exports),
        spread=any(value.sd is not None for arm in arms for value in arm.values.values()),
        dots=line.dots,
        dots_log=line.log,
        floor_at=line.floor,
        scatter=_scatter(arms, compared, floor.get(compared.key)),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        uneven=tables.uneven_updates(metrics),
        too_few=tables.too_few(metrics),
        value=tables.format_value,
        count=_count,
        threads=environment.get("latency_threads", environment.get("threads")),
        device=environment.get("device"),
        pictures=pictures,
        pictures_found=(run / "evaluate" / "pictures.npz").exists(),
        real=figures.strips(images["real"], "Real images", rows=1) if "real" in images else [],
        walls=_walls(arms, images),
        reconstructions=_reconstructions(arms, images, seen),
        seen=seen,
        by_teacher=by_teacher,
        blind=tables.BLIND,
        floor_name=tables.floor_name(metrics),
        neighbors=_neighbors(pictures) if pictures else None,
        surrogates=_surrogates(run, metrics, pictures),
        surrogate_rows=tables.surrogates_of(metrics),
        surrogate_columns=tables.surrogate_metrics(tables.surrogates_of(metrics)),
        privacy=privacy,
        private_rows=private_rows,
        private_columns=private_columns,
        sets={who: kind for who, kind in _SETS.items() if who != "real" or not by_teacher},
        panels=_training(run, arms),
        recipe=recipe,
        environment=_facts({key: entry for key, entry in environment.items() if key != "versions"}),
        versions=_facts(environment.get("versions")),
        seeds=", ".join(map(str, seeds)) if isinstance(seeds, list) else "",
    )
