"""Figures as text: what each metric means, how a value is written, the terminal's table and the one-sentence verdict.

Everything here reads the dictionary of a `metrics.json` and nothing else, with the standard library alone, so that the
command line can print a table without loading a plotting library.
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["ARM_LABELS", "DASH", "METRICS", "Arm", "Metric", "Value", "arms_of", "compared_metric", "features_of", "floor_of"]
__all__ += ["SURROGATE", "format_value", "metric_of", "metrics_in", "ratio", "subject_of", "surrogate_label", "surrogate_metrics"]
__all__ += ["BLIND", "by_teacher", "floor_name", "privacy_of", "too_few", "uneven_updates"]
__all__ += ["export_metrics", "exports_of", "surrogates_of", "text_table", "verdict"]

DASH = "–"
"""What stands where a value is missing: an en dash, which every terminal's code page has."""

TEACHER, DATA_FREE, WITH_DATA, SCRATCH = "teacher", "student_data_free", "student_with_data", "student_scratch"
CALIBRATED = "teacher+calibrated"

BLIND = "the teacher's own faults cannot be seen, nor a student that is better than it"
"""What cannot be known where models are measured against images of the teacher's making."""

ARM_LABELS: dict[str, str] = {
    TEACHER: "Teacher",
    DATA_FREE: "Student, data-free",
    WITH_DATA: "Student, distilled with data",
    SCRATCH: "Student, from scratch",
}
"""Names in the reader's words for arms that bring no label of their own."""

SURROGATE = "surrogate"
"""The folder of the surrogate that has no name of its own; the others lie in a folder that is named for them all."""


@dataclass(frozen=True)
class Metric:
    """One metric: its key in `metrics.json`, its names, which way is better, and what it says.

    `better` is "lower", "higher", "half" (one half is perfect) or "" (no direction). `short` heads a column of the terminal's table.
    """

    key: str
    label: str
    better: Literal["lower", "higher", "half", ""] = ""
    note: str = ""
    short: str = ""
    cost: bool = False

    @property
    def direction(self) -> str:
        """Which way is better, in words; empty where the metric has no better side."""
        return {"lower": "lower is better", "higher": "higher is better", "half": "0.5 is best", "": ""}[self.better]

    @property
    def arrow(self) -> str:
        """The direction as a sign for a column's head."""
        return {"lower": "↓", "higher": "↑", "half": "→ ½", "": ""}[self.better]


METRICS: tuple[Metric, ...] = (
    Metric("frechet", "Fréchet distance", "lower", "squared, between Gaussians fitted to reference and to generated features", "Fréchet"),
    Metric("mmd", "MMD", "lower", "maximum mean discrepancy under a Gaussian kernel", "MMD"),
    Metric("one_nn", "1-NN accuracy", "half", "how often the nearest neighbor tells reference from generated images", "1-NN"),
    Metric("accuracy", "Accuracy", "higher", "share of test images classified rightly", "accuracy"),
    Metric("label_agreement", "Label agreement", "higher", "share of images to which the student gives the teacher's label", "agreement"),
    Metric("reconstruction_mse", "Reconstruction MSE", "lower", "mean squared error per pixel on the reference images", "recon MSE"),
    Metric("paired_mse", "Paired MSE", "lower", "mean squared difference to the teacher's output for the same noise"),
    Metric("frechet_sqrt", "√ Fréchet", "lower", "its square root, the figure that some papers print"),
    Metric("kid", "KID", "lower", "kernel distance, unbiased, so that it may fall slightly below zero"),
    Metric("emd", "EMD", "lower", "cost of the optimal transport from generated to reference features"),
    Metric("energy_distance", "Energy distance", "lower", "mean distance between reference and generated features beyond that within each"),
    Metric("precision", "Precision", "higher", "share of generated images that lie among those of the reference"),
    Metric("recall", "Recall", "higher", "share of reference images that lie among generated ones"),
    Metric("density", "Density", "higher", "how densely reference images surround a generated one; may exceed 1"),
    Metric("coverage", "Coverage", "higher", "share of reference images with a generated one nearby"),
    Metric("share", "Share", "", "share of generated images whose nearest reference image is of the group", "share"),
    Metric("nelbo", "Negative ELBO", "lower", "bound on the negative log likelihood of the reference images"),
    Metric("kl", "KL", "", "Kullback-Leibler divergence of the posterior from the prior, nats per reference image"),
    Metric(
        "reconstruction_agreement",
        "Reconstruction agreement, MSE",
        "lower",
        "mean squared difference to the teacher's reconstructions",
    ),
    Metric(
        "posterior_agreement", "Posterior agreement, KL", "lower", "of the teacher's inferred latents from the student's, nats per image"
    ),
    Metric("params", "Parameters", short="params", cost=True),
    Metric("size_mib", "Size, MiB", short="MiB", cost=True),
    Metric("latency_ms_b1", "Latency, ms (1 image)", "lower", short="ms/image", cost=True),
    Metric("latency_iqr_ms_b1", "Quartile range, ms (1 image)", cost=True),
    Metric("latency_ms_b64", "Latency, ms (batch of 64)", "lower", cost=True),
    Metric("latency_iqr_ms_b64", "Quartile range, ms (batch of 64)", cost=True),
    Metric("throughput", "Throughput, images/s", "higher", cost=True),
)
"""The metrics that the page knows, in the order of its columns. Others are shown under their own key, without a direction."""

_SURROGATE_METRICS = (Metric("images", "Images", short="images"), METRICS[0])
_ENERGY = "energy."  # before the name of one among a surrogate's values
_BY_KEY = {metric.key: metric for metric in METRICS}
_MOST_EXPORTED = 16  # rows of one export: more than there are, so a file of thousands cannot make a page of them
_COST_PREFIXES = ("latency", "throughput", "params", "size", "memory", "flops")
_TEXT_COLUMNS = ("frechet", "mmd", "one_nn", "reconstruction_mse", "accuracy", "label_agreement", "params", "size_mib", "latency_ms_b1")
_GROUPED_COLUMNS = ("reconstruction_mse", "accuracy", "share")  # in a column for each group of labels, where the recipe names some
_DROPPED_FIRST = ("size_mib", "mmd", "latency_ms_b1", "one_nn")  # parameters say nearly the same as MiB, Fréchet as MMD
_WIDTH = 120
_SMALLEST_LABEL = 28  # shorter ones would cut the end off, where labels of arms tend to differ


@dataclass(frozen=True)
class Value:
    """A figure: its mean and its standard deviation over seeds, `None` where no spread is known."""

    mean: float
    sd: float | None = None


@dataclass(frozen=True)
class Arm:
    """One row of the comparison.

    `kind` is "teacher", "free" (saw no real data), "real" (trained on real data) or "" where the file does not say.
    """

    key: str
    label: str
    kind: Literal["teacher", "free", "real", ""]
    updates: int | None
    note: str
    values: Mapping[str, Value]


def _number(found: object) -> float | None:
    """A finite float, or `None` for anything else: null, text, booleans, NaN and infinities all count as missing."""
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    try:
        number = float(found)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _value(found: object) -> Value | None:
    if isinstance(found, dict):  # as JSON has it; a check for any mapping takes most of a second on a thousand rows
        mean, sd = _number(found.get("mean")), _number(found.get("sd"))
        return None if mean is None else Value(mean, sd if sd is None or sd >= 0 else None)
    mean = _number(found)
    return None if mean is None else Value(mean)


def _values(found: object) -> dict[str, Value]:
    if not isinstance(found, dict):
        return {}
    pairs = ((str(key), _value(entry)) for key, entry in found.items())
    return {key: value for key, value in pairs if value is not None}


def _over_seeds(found: object, metrics: Mapping[str, Any]) -> dict[str, Value]:
    """Figures over a run's seeds: one seed has no spread, though the file writes it as 0."""
    values = _values(found)
    return {key: Value(value.mean) for key, value in values.items()} if _one_seed(metrics) else values


def _one_seed(metrics: Mapping[str, Any]) -> bool:
    seeds = metrics.get("seeds")
    return isinstance(seeds, list) and len(seeds) == 1


def _mapping(found: object) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}


def arms_of(metrics: Mapping[str, Any]) -> list[Arm]:
    """The arms in the file's order, the teacher moved to the front; values that are null or not finite are left out."""
    described = _mapping(metrics.get("arms_info"))
    arms = []
    for key, found in _mapping(metrics.get("arms")).items():
        info = _mapping(described.get(key))
        data = info.get("data")
        kind: Literal["teacher", "free", "real", ""] = ""
        if key in (TEACHER, CALIBRATED):
            kind = "teacher"
        elif data == "none" or (data != "real" and key.startswith(DATA_FREE)):
            kind = "free"
        elif data == "real" or key in (WITH_DATA, SCRATCH):
            kind = "real"
        updates = _number(info.get("updates"))
        own = info.get("label")  # an arm whose label is its name has none that a reader would choose
        label = ARM_LABELS.get(key, str(own or key.replace("_", " "))) if own in (None, "", key) else str(own)
        arms.append(
            Arm(key, label, kind, None if updates is None else int(updates), str(info.get("note") or ""), _over_seeds(found, metrics))
        )
    return sorted(arms, key=lambda arm: (arm.key != TEACHER, arm.kind != "teacher"))


def surrogates_of(metrics: Mapping[str, Any]) -> list[Arm]:
    """The surrogates in the file's order as rows of their own table: `key` is the folder, `note` the kind.

    Their values are `images`, `frechet` and, with their spread over images, `energy.NAME`.
    """
    rows = []
    for folder, found in _mapping(metrics.get("surrogates")).items():
        about = _mapping(found)
        values = _values({metric.key: about.get(metric.key) for metric in _SURROGATE_METRICS})
        values |= {f"{_ENERGY}{name}": value for name, value in _values(about.get("energies")).items()}
        rows.append(Arm(folder, surrogate_label(folder), "free", None, str(about.get("kind") or ""), values))
    return rows


def surrogate_label(folder: str) -> str:
    """A surrogate's name for the reader: that of its folder, without the one that all named ones share."""
    return "Surrogate" if folder == SURROGATE else folder.removeprefix(f"{SURROGATE}s/")


def surrogate_metrics(rows: Sequence[Arm]) -> list[Metric]:
    """The columns of the table of surrogates: those that one of them has, energies last."""
    present = dict.fromkeys(key for row in rows for key in row.values)
    energies = [Metric(key, f"Energy: {_words(key.removeprefix(_ENERGY))}") for key in present if key.startswith(_ENERGY)]
    return [metric for metric in _SURROGATE_METRICS if metric.key in present] + energies


_EXPORTED = {
    "size_mib": _BY_KEY["size_mib"],
    "latency_ms_b1": _BY_KEY["latency_ms_b1"],
    "latency_ms_b64": _BY_KEY["latency_ms_b64"],
    "max_abs_difference": Metric("max_abs_difference", "Difference to torch", "lower"),
    "frechet": METRICS[0],
}


def exports_of(exports: Mapping[str, object]) -> list[Arm]:
    """The rows of the tables of exports, each given by its folder; values that are null or not finite are left out."""
    rows = []
    for folder, found in exports.items():
        table = _mapping(found).get("table")
        for about in map(_mapping, table[:_MOST_EXPORTED] if isinstance(table, list) else []):
            label = " · ".join(str(part)[:80] for part in (folder, about.get("name"), about.get("file")) if part)
            rows.append(Arm(folder, label, "", None, "", _values({key: about.get(key) for key in _EXPORTED})))
    return rows


def export_metrics(rows: Sequence[Arm]) -> list[Metric]:
    """The columns of the table of exports: those that one of them has."""
    return [metric for key, metric in _EXPORTED.items() if any(key in row.values for row in rows)]


_PRIVACY = (
    Metric("images", "Images"),
    Metric("near", "Near", note="share of images nearer to a training image than the nearest hundredth of held-out images"),
    Metric("near_p_value", "Near, p-value", note="how likely as many near ones are if a model's images are as far away as held-out images"),
    Metric("median_ratio", "Median distance", note="to the nearest training image, in units of that of held-out images"),
    Metric("train_nearest", "Nearest", note="share of images whose nearest real image is a training image, not a held-out one"),
    Metric(
        "train_nearest_p_value", "Nearest, p-value", note="how likely as many training images are nearest if the model knows no difference"
    ),
)


def privacy_of(metrics: Mapping[str, Any]) -> tuple[list[Arm], list[Metric]]:
    """Rows and columns of the table of copied training images, what is expected without copies last; both empty without that section."""
    found = _mapping(metrics.get("privacy"))
    sets = _mapping(found.get("sets"))
    rows = [
        replace(row, values=_over_seeds(sets[row.key], metrics)) for row in (*arms_of(metrics), *surrogates_of(metrics)) if row.key in sets
    ]
    if not rows:
        return [], []
    expected = {"near": found.get("near_expected"), "median_ratio": 1.0, "train_nearest": found.get("train_nearest_expected")}
    return [*rows, Arm("", "Expected without copies", "", None, "", _values(expected))], [*_PRIVACY]


def _words(key: str) -> str:
    return key.replace("_", " ")


def floor_of(metrics: Mapping[str, Any]) -> dict[str, Value]:
    """The floor: every metric with reference images against others of their origin, the best that any model can be expected to reach."""
    return _over_seeds(_mapping(metrics.get("reference")).get("floor"), metrics)


def by_teacher(metrics: Mapping[str, Any]) -> bool:
    """Whether the figures are against images of the teacher's making, without any real data."""
    return bool(_mapping(metrics.get("reference")).get("kind") == "teacher")


def floor_name(metrics: Mapping[str, Any]) -> str:
    """What is compared with what in the floor."""
    return "teacher to teacher" if by_teacher(metrics) else "real against real"


def too_few(metrics: Mapping[str, Any]) -> str:
    """A warning where there are no more images than features: a Gaussian fitted to so few is flat, and its distances are of chance."""
    n, dimensions = (_number(_mapping(metrics.get("reference")).get(key)) for key in ("n", "dimensions"))
    if n is None or dimensions is None or n > dimensions:
        return ""
    return f"{n:,.0f} images are too few for {dimensions:,.0f} features: Fréchet distances of so few are mostly chance"


def uneven_updates(metrics: Mapping[str, Any]) -> list[int]:
    """The numbers of updates that students had, increasing, where they differ; none where all had as many."""
    found = {arm.updates for arm in arms_of(metrics) if arm.kind != "teacher" and arm.updates is not None}
    return sorted(found) if len(found) > 1 else []


def features_of(metrics: Mapping[str, Any]) -> str:
    """The name of the features behind the distances, which have no meaning without it; empty where the file says that there are none."""
    found = _mapping(metrics.get("reference")).get("features", "not named")
    return "" if found is None else str(found)


def metric_of(key: str) -> Metric:
    """The description of a metric; one that the page does not know gets its key as its name and no direction."""
    if known := _BY_KEY.get(key):
        return known
    base, slash, group = key.partition("/")
    if slash and (known := _BY_KEY.get(base)):  # of the held-out images of one group of labels
        return replace(known, key=key, label=f"{known.label}, {group}", short=f"{group} {known.short}" if known.short else "")
    return Metric(key, _words(key), cost=key.startswith(_COST_PREFIXES))


def metrics_in(metrics: Mapping[str, Any], cost: bool) -> list[Metric]:
    """The metrics that at least one arm (or the floor) has, known ones first; `cost` picks size and speed instead of quality."""
    present = dict.fromkeys(key for arm in arms_of(metrics) for key in arm.values)
    present.update(dict.fromkeys(floor_of(metrics)))
    keys = [metric.key for metric in METRICS if metric.key in present] + [key for key in present if key not in _BY_KEY]
    return [metric for metric in map(metric_of, keys) if metric.cost == cost]


def subject_of(arms: Sequence[Arm]) -> Arm | None:
    """The data-free student that the verdict is about: `student_data_free`, or else the first arm that saw no real data.

    It is chosen by name and order, never by its figures: the best of several arms would flatter the method.
    """
    free = [arm for arm in arms if arm.kind == "free"]
    return next((arm for arm in free if arm.key == DATA_FREE), free[0] if free else None)


def compared_metric(arms: Sequence[Arm], named: object = None) -> Metric:
    """What the verdict compares: the metric that the file names under "compared", where the student has it.

    Otherwise it is the Fréchet distance, or for models that generate nothing their accuracy or reconstruction.
    """
    subject = subject_of(arms)
    pool = [subject] if subject else list(arms)
    keys = (str(named), "frechet", "accuracy", "label_agreement", "reconstruction_mse")
    return metric_of(next((key for key in keys if any(key in arm.values for arm in pool)), "frechet"))


def _decimals(size: float, significant: int) -> int:
    return max(0, min(6, significant - 1 - math.floor(math.log10(size))))


def _spread_digits(sd: float) -> int:
    """One significant digit for a spread, two where its digits begin below 355: the Particle Data Group's rule for printed errors.

    A second digit of 0.41 would claim more than a few seeds can know, while 0.14 as 0.1 would be a third off.
    """
    return 2 if sd / 10 ** math.floor(math.log10(sd)) < 3.55 else 1


def format_value(value: Value | None, key: str = "") -> str:
    """A value as text: `12.3 ± 0.4`, the digits of the spread deciding how many the mean gets; a dash where there is none.

    Without a spread, or with a spread of zero, the mean has four significant digits. Counts of parameters are written in full.
    """
    if value is None:
        return DASH
    mean, sd = value.mean, value.sd
    if key == "params":
        return f"{mean:,.0f}"
    largest = max(abs(mean), sd or 0.0)
    if largest == 0:
        return "0" if sd is None else "0 ± 0"
    if largest >= 1e7 or largest < 1e-4:
        return f"{mean:.2e}" if sd is None else f"{mean:.2e} ± {sd:.0e}"
    if sd is None or sd < 5e-7:  # below the sixth decimal, the last that is ever printed
        text = f"{mean:,.{_decimals(abs(mean), 4)}f}"
        text = text.rstrip("0").rstrip(".") if "." in text else text
        return text if sd is None else f"{text} ± 0"
    decimals = _decimals(sd, _spread_digits(sd))
    return f"{mean:z,.{decimals}f} ± {sd:,.{decimals}f}"  # z: a mean that rounds to zero has no sign


def ratio(larger: float, smaller: float) -> str:
    """How many times larger, as text: one decimal below ten, none above."""
    times = larger / smaller
    return f"{times:.1f}" if times < 9.95 else f"{times:,.0f}"


def _times(teacher: Value | None, student: Value | None, less: str, more: str, same: str) -> str:
    """`15 times smaller`; the honest `1.3 times larger` where it is so; empty where a figure is missing or zero.

    A difference within the pooled standard deviation is none, as of quality.
    """
    if teacher is None or student is None or teacher.mean <= 0 or student.mean <= 0:
        return ""
    if max(teacher.mean, student.mean) < 1.05 * min(teacher.mean, student.mean) or _within_spread(teacher, student):
        return same  # ratios are printed to one decimal: 1.0 times smaller says nothing
    if teacher.mean > student.mean:
        return f"{ratio(teacher.mean, student.mean)} times {less}"
    return f"{ratio(student.mean, teacher.mean)} times {more}"


def _timed(arm: Arm) -> Value | None:
    """The latency of one image. Where there is no spread over seeds, half the quartile range of the repeats stands for it."""
    latency, quartiles = arm.values.get("latency_ms_b1"), arm.values.get("latency_iqr_ms_b1")
    return Value(latency.mean, quartiles.mean / 2) if latency and latency.sd is None and quartiles else latency


def _savings(arms: Sequence[Arm], student: Arm) -> str:
    """What the student saves: "15 times smaller and 8.2 times faster"; empty where neither can be said."""
    teacher = next((arm for arm in arms if arm.kind == "teacher"), None)
    if teacher is None:
        return ""
    measure = "params" if "params" in teacher.values and "params" in student.values else "size_mib"
    size = _times(teacher.values.get(measure), student.values.get(measure), "smaller", "larger", "the same size")
    pace = _times(_timed(teacher), _timed(student), "faster", "slower", "equally fast")
    return " and ".join(part for part in (size, pace) if part)


def _within_spread(one: Value, other: Value) -> bool:
    """Whether two means differ by no more than the pooled standard deviation."""
    spreads = [value.sd for value in (one, other) if value.sd is not None]
    pooled = math.sqrt(sum(sd * sd for sd in spreads) / len(spreads)) if spreads else 0.0
    difference = abs(one.mean - other.mean)
    # One of exactly the pooled sd counts as within it, also when the subtraction leaves a last bit.
    return difference <= pooled or math.isclose(difference, pooled, rel_tol=1e-9)


def _comparison(metric: Metric, ours: Value, theirs: Value) -> str:
    """Better than, worse than or level with; level means within the pooled standard deviation of the two."""
    if _within_spread(ours, theirs):
        return "level with"
    return "better than" if (ours.mean < theirs.mean) == (metric.better == "lower") else "worse than"


def verdict(metrics: Mapping[str, Any]) -> str:
    """One sentence on the data-free student: against both students that saw data, and in size and speed against the teacher.

    A loss is worded as plainly as a win. "Level" means that the difference is at most the pooled standard deviation,
    sqrt((sd1² + sd2²) / 2). Where an arm is missing the sentence says that there is nothing to compare with.
    Where no real data was measured against, it says so, and what cannot be known then.
    Of students of several sizes, the first is judged, against those of its size.
    """
    arms = arms_of(metrics)
    subject = subject_of(arms)
    if subject is None:
        return "This run has no data-free student, so there is nothing to judge."
    others = [arm for arm in arms if arm.kind == "free" and arm is not subject]
    plain = subject.label in (DATA_FREE, ARM_LABELS[DATA_FREE]) or (subject.key == DATA_FREE and not others)
    name = "The data-free student" if plain else f"The data-free student “{subject.label}”"
    savings = _savings(arms, subject)
    saved = f"; compared with the teacher it is {savings}" if savings else ""

    metric = compared_metric(arms, metrics.get("compared"))
    ours = subject.values.get(metric.key)
    if ours is None:
        return f"{name} has no figure of quality, so it cannot be compared{saved}."
    on = f" on features “{features_of(metrics)}”" if metric.key == "frechet" else ""
    figure = f"{metric.label} {format_value(ours)}{on}, {metric.direction}"

    size = re.fullmatch(rf"{DATA_FREE}(_w\d+)", subject.key)
    of_its_size = size[1] if size else ""
    rivals = {
        f"{SCRATCH}{of_its_size}": "student trained from scratch on real data",
        f"{WITH_DATA}{of_its_size}": "student distilled with real data",
    }
    by_key = {arm.key: arm for arm in arms}
    said: dict[str, list[str]] = {}
    absent, values = [], [ours]
    for key, words in rivals.items():
        theirs = by_key[key].values.get(metric.key) if key in by_key else None
        if theirs is None:
            absent.append(words)
            continue
        values.append(theirs)
        said.setdefault(_comparison(metric, ours, theirs), []).append(f"the {words} ({format_value(theirs)})")
    if by_teacher(metrics):
        saved = f"; it was measured against images of {_origin(metrics)}, not real data, and so {BLIND}{saved}"
        if not said:
            bound = floor_of(metrics).get(metric.key)
            least = f", where other samples of the teacher have {format_value(bound)}" if bound else ""
            return f"{name} has {figure}{least}{saved}."
    if not said:
        beside = {"its teacher": by_key[TEACHER].values.get(metric.key) if TEACHER in by_key else None}
        beside |= {"real images against real images": floor_of(metrics).get(metric.key)}
        known = "".join(f", {who} {format_value(value)}" for who, value in beside.items() if value)
        return f"{name} has {figure}{known}. This run has no figure for a student trained on real data to compare it with{saved}."
    compared = " and ".join(f"{outcome} {' and '.join(them)}" for outcome, them in said.items())
    sentence = f"{name} ({figure}) is {compared}"
    if absent:
        sentence += f" (this run has no figure for a {absent[0]})"
    if any(value.sd is None for value in values):
        sentence += ", though without a spread over seeds chance is not ruled out"
    return f"{sentence}{saved}."


def _origin(metrics: Mapping[str, Any]) -> str:
    return _printable(str(_mapping(metrics.get("reference")).get("data") or "the teacher's own making"))


def _printable(text: str) -> str:
    """Text without control characters: a label from a file must not move the terminal's cursor or change its colors."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _width(text: str) -> int:
    """Columns that a text takes in a terminal: East Asian wide characters take two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def _cut(text: str, width: int) -> str:
    if _width(text) <= width:
        return text
    while text and _width(text) > width - 2:
        text = text[:-1]
    return text.rstrip() + ".."


def text_table(metrics: Mapping[str, Any]) -> str:
    """The arms and their main figures as plain text of at most 120 columns, the floor last, below it directions and the surrogates.

    A column that no arm has is left out. Where the rest does not fit, labels are cut first and then whole columns dropped.
    """
    arms, floor = arms_of(metrics), floor_of(metrics)
    keys = [key for key in _TEXT_COLUMNS if key in floor or any(key in arm.values for arm in arms)]
    grouped = dict.fromkeys(key for arm in arms for key in arm.values if "/" in key and key.partition("/")[0] in _GROUPED_COLUMNS)
    keys = [key for key in keys if key not in _GROUPED_COLUMNS or not grouped] + [*grouped]
    rows = [(_printable(arm.label), arm.values) for arm in arms]
    if floor:
        rows.append((f"Floor ({floor_name(metrics)})", floor))

    def columns(shown: Sequence[str]) -> list[list[str]]:
        return [[metric_of(key).short, *(format_value(values.get(key), key) for _, values in rows)] for key in shown]

    label_width = max([_width(label) for label, _ in rows], default=0)
    for dropped in (*_DROPPED_FIRST, ""):
        body = columns(keys)
        widths = [max(map(_width, column)) for column in body]
        room = _WIDTH - sum(width + 2 for width in widths)
        if room >= min(label_width, _SMALLEST_LABEL) or not dropped:
            break
        keys = [key for key in keys if key != dropped]
    label_width = min(label_width, max(room, 1))

    labels = ["", *(_cut(label, label_width) for label, _ in rows)]
    lines = []
    for index, label in enumerate(labels):
        cells = "".join(f"  {' ' * (width - _width(column[index]))}{column[index]}" for column, width in zip(body, widths, strict=True))
        lines.append((label + " " * (label_width - _width(label)) + cells).rstrip())
    rule = "-" * (label_width + sum(width + 2 for width in widths))
    lines.insert(1, rule)
    if floor:
        lines.insert(len(lines) - 1, rule)

    groups: dict[str, list[str]] = {}
    for metric in map(metric_of, keys):
        if metric.direction and not metric.cost:
            groups.setdefault(metric.direction, []).append(metric.short)
    notes = [f"{', '.join(names)}: {direction}" for direction, names in groups.items()]
    if features := features_of(metrics):
        notes.append(f"features: {_printable(features)}")
    lines.append(_cut("; ".join(notes), _WIDTH))
    if few := too_few(metrics):
        lines.append(few)
    if uneven := uneven_updates(metrics):
        counts = ", ".join(f"{count:,}" for count in uneven)
        lines.append(_cut(f"students had different numbers of updates ({counts}): they do not compare like for like", _WIDTH))
    if by_teacher(metrics):
        lines += [_cut(f"reference: images of {_origin(metrics)}, no real data;", _WIDTH), BLIND]
    for row in surrogates_of(metrics):
        figures = [f"{metric.short} {format_value(row.values[metric.key])}" for metric in _SURROGATE_METRICS if metric.key in row.values]
        lines.append(_cut(_printable(f"{row.key}: {', '.join([row.note, *figures])}"), _WIDTH))
    return "\n".join(lines)
