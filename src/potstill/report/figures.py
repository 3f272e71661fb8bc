"""Pictures for the page: image strips as PNG data URIs; losses, energies and histograms as inline SVG; and the files they come from.

Nothing that a user wrote enters a picture, labels stand in the page's own text. The same inputs give the same bytes.
"""

import base64
import io
import json
import math
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

from .tables import Value

__all__ = ["Course", "Curves", "Log", "Picture", "Pictures", "Point", "columns", "energy_svg", "histogram_svg", "is_wide", "loss_svg"]
__all__ += ["pairs", "read_course", "read_log", "read_pictures", "scatter_svg", "singles", "strips"]

Pixels = NDArray[np.uint8]
"""Images `(k, C, H, W)` with C of 1 or 3."""
Series = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps, increasing, and the value at each; both `(n,)`."""

_PAGE = 1056  # CSS pixels between the page's margins: a strip of 16 tiles of 64 fills it
_TILE = 64  # CSS pixels; smaller tiles are hard to read, and 2 x 32 or 8 x 8 makes it exactly
_LARGEST = 256  # larger images are reduced: a report is looked at, the run folder holds the originals
_GAP = 2
_COLUMNS = 16
_POINTS = 400  # a panel is about this many pixels wide
_SIZE = (3.8, 2.3)  # of a panel, in inches
_LARGER = (5.6, 3.2)  # where two stand side by side
_BINS = 24
_LARGEST_FILE = 2**32  # bytes that an archive may unpack to: a small file can hold terabytes of zeros
_LARGEST_ENERGY = 1e30  # beyond it sums and axes would overflow

# The colors that matplotlib draws with stand for the page's own, which follow its light or dark mode.
_INK, _RULE, _SERIES = "#010203", "#040506", "#070809"
# The kinds of the page, told apart by their lines too, for eyes and printers that do not tell the colors apart.
_LINES = {"free": ("#0a0b0c", "solid"), "teacher": ("#0d0e0f", (0, (4, 1.6))), "real": ("#101112", (0, (1, 1.2)))}
_MARKERS = {kind: (color, marker) for (kind, (color, _)), marker in zip(_LINES.items(), "os^", strict=True)}
_PLACEHOLDERS = {_INK: "var(--muted)", _RULE: "var(--rule)", _SERIES: "var(--series)"}
_PLACEHOLDERS |= {color: f"var(--{kind})" for kind, (color, _) in _LINES.items()}
_STYLE = {
    "svg.hashsalt": "potstill",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _INK,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Picture:
    """A PNG inside its own address, its size in CSS pixels, and the words that stand for it where it is not seen."""

    uri: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True)
class Pictures:
    """The arrays of a `pictures.npz` that can be shown, by name, and the names of those that cannot.

    `distances` are those of the nearest images, `(k,)`; `texts` are labels and prompts; `energies` are finite, each `(n,)`.
    """

    images: dict[str, Pixels] = field(default_factory=dict)
    distances: NDArray[np.float64] | None = None
    texts: dict[str, list[str]] = field(default_factory=dict)
    energies: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    unusable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Course:
    """The course of a synthesis: a `steps.npz`.

    Args:
        level: share of noise at each step, `(steps,)`, NaN at steps of which nothing is known. Without it the rest is empty too.
        energies: each term's mean over images, where it is known, against steps that count from 1.
        at: steps, from 1, at which images were kept, increasing.
        images: those images, a picture's in one column, `(shown, pictures, C, H, W)` uint8; empty where there are none.
        unusable: names of arrays that are not what they should be.
    """

    level: NDArray[np.float64]
    energies: dict[str, Series]
    at: list[int]
    images: NDArray[np.uint8]
    unusable: tuple[str, ...] = ()


def _read_arrays(path: Path) -> tuple[dict[str, NDArray[Any]], list[str]] | None:
    """The arrays of an npz file, and the names of those that cannot be read; `None` where it is no such file."""
    # What zipfile raises where a file is encrypted, or packed in a way that it does not know, are RuntimeErrors.
    broken = (OSError, ValueError, EOFError, KeyError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
    arrays: dict[str, NDArray[Any]] = {}
    unusable = []
    try:
        # The file is opened here, since numpy leaves one that it cannot read open.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                return None
            if archive.zip is None or sum(entry.file_size for entry in archive.zip.infolist()) > _LARGEST_FILE:
                return None
            for name in archive.files:
                try:
                    arrays[name] = archive[name]
                except broken:
                    unusable.append(name)
            archive.close()
    except broken:
        return None
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}, unusable


def _floats(array: NDArray[Any]) -> NDArray[np.float64] | None:
    """Numbers `(n,)`, those beyond all use as NaN; `None` for anything else."""
    if array.ndim != 1 or array.dtype.kind != "f" or array.itemsize > 8 or not len(array):
        return None
    numbers = array.astype(np.float64)
    numbers[~(np.abs(numbers) < _LARGEST_ENERGY)] = np.nan
    return numbers


def _are_images(array: NDArray[Any], ndim: int) -> bool:
    return array.dtype == np.uint8 and array.ndim == ndim and array.shape[-3] in (1, 3) and min(array.shape) > 0


def _texts(array: NDArray[Any]) -> list[str] | None:
    if array.ndim != 1 or array.dtype.kind != "U" or not array.dtype.isnative or not array.nbytes:
        return None
    # numpy makes strings of characters that there are not, with which Python can do nothing.
    return [str(text) for text in array] if np.ascontiguousarray(array).view(np.uint32).max() <= sys.maxunicode else None


def read_pictures(path: Path) -> Pictures | None:
    """The pictures of a run; `None` where there is no such file or where it is no archive of arrays."""
    found = _read_arrays(path)
    if found is None:
        return None
    arrays, unusable = found
    pictures = Pictures()
    distances = None
    for name, array in arrays.items():
        numbers = _floats(array)
        if name == "nearest_distance" and numbers is not None and np.isfinite(numbers).all():
            distances = numbers
        elif name.startswith("energy/") and numbers is not None and np.isfinite(numbers).all():
            pictures.energies[name] = numbers
        elif name.startswith(("label/", "prompt/")) and (texts := _texts(array)) is not None:
            pictures.texts[name] = texts
        elif _are_images(array, 4):
            pictures.images[name] = array
        else:
            unusable.append(name)
    return replace(pictures, distances=distances, unusable=tuple(unusable))


def read_course(path: Path) -> Course | None:
    """The course of a synthesis; `None` where there is no such file or where it is no archive of arrays."""
    found = _read_arrays(path)
    if found is None:
        return None
    arrays, unusable = found
    nothing = np.empty((0, 0, 0, 0, 0), np.uint8)
    level = _floats(arrays.pop("level", np.empty(0)))
    if level is None:
        return Course(np.empty(0), {}, [], nothing, (*unusable, "level"))
    energies: dict[str, Series] = {}
    at, images = arrays.pop("at", np.empty(0)), arrays.pop("images", nothing)
    for name, array in arrays.items():
        values = _floats(array)
        if not name.startswith("energy.") or values is None or len(values) != len(level):
            unusable.append(name)
        elif np.isfinite(values).any():
            steps = 1 + np.flatnonzero(np.isfinite(values))
            energies[name.removeprefix("energy.")] = steps.astype(np.float64), values[steps - 1]
    whole = at.ndim == 1 and at.dtype.kind == "i" and _are_images(images, 5) and len(at) == len(images)
    if not whole or at[0] < 0 or at[-1] >= len(level) or (np.diff(at) <= 0).any():
        return Course(level, energies, [], nothing, (*unusable, "images"))
    return Course(level, energies, [int(step) + 1 for step in at], images, tuple(unusable))


def _tiles(images: Pixels) -> list[Image.Image]:
    """Each image as a tile of legible size: enlarged by a whole factor without smoothing, or reduced by one."""
    height, width = images.shape[2:]
    enlarge = max(1, _TILE // max(height, width))
    reduce = math.ceil(max(height, width) / _LARGEST)
    tiles = []
    for image in images:
        tile = Image.fromarray(np.ascontiguousarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)))
        if enlarge > 1:
            tile = tile.resize((width * enlarge, height * enlarge), Image.Resampling.NEAREST)
        elif reduce > 1:
            tile = tile.reduce(reduce)
        tiles.append(tile)
    return tiles


def _row(tiles: Sequence[Image.Image], alt: str, down: bool = False) -> Picture:
    """Tiles side by side, or one below the other, with transparent gaps: the page's own background shows in light and in dark mode."""
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    if down:
        height = sum(tile.height + _GAP for tile in tiles) - _GAP
    else:
        width = sum(tile.width + _GAP for tile in tiles) - _GAP
    canvas = Image.new("LA" if all(tile.mode == "L" for tile in tiles) else "RGBA", (width, height))
    at = 0
    for tile in tiles:
        canvas.paste(tile.convert(canvas.mode), (0, at) if down else (at, 0))
        at += (tile.height if down else tile.width) + _GAP
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    return Picture("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"), width, height, alt)


def strips(images: Pixels, what: str, rows: int = 2) -> list[Picture]:
    """The first images in rows as wide as the page, at most `rows` of them; `what` names the images in the alternative text."""
    tiles = _tiles(images[: _COLUMNS * rows])
    columns = max(1, min(_COLUMNS, (_PAGE + _GAP) // (tiles[0].width + _GAP)))
    starts = range(0, min(len(tiles), columns * rows), columns)
    parts = [tiles[start : start + columns] for start in starts]
    many = len(parts) > 1
    return [_row(part, f"{what}, {start + 1} to {start + len(part)}" if many else what) for start, part in zip(starts, parts, strict=True)]


def pairs(left: Pixels, right: Pixels, alts: Sequence[str]) -> list[Picture]:
    """Two images side by side, for each of the `alts`."""
    return [_row(both, alt) for *both, alt in zip(_tiles(left[: len(alts)]), _tiles(right[: len(alts)]), alts, strict=True)]


def singles(images: Pixels, alts: Sequence[str]) -> list[Picture]:
    """One image for each of the `alts`."""
    return [_row([tile], alt) for tile, alt in zip(_tiles(images[: len(alts)]), alts, strict=True)]


def columns(images: NDArray[np.uint8], alts: Sequence[str]) -> list[Picture]:
    """Columns of images `(columns, images in each, C, H, W)`, one for each of the `alts`."""
    return [_row(_tiles(column), alt, down=True) for column, alt in zip(images, alts, strict=True)]


@dataclass(frozen=True)
class Log:
    """One `log.jsonl`: a series of losses for each phase, how many losses were not finite, and the median images per second."""

    losses: dict[str, Series]
    broken: dict[str, int]
    pace: dict[str, float]


def _finite(found: object) -> float | None:
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found) else None


def read_log(path: Path) -> Log:
    """A training log, one JSON object a line. Lines that cannot be read are skipped: a run may have been killed while writing one.

    A step that occurs twice keeps its later line, since a resumed run repeats the steps after its last checkpoint.
    """
    losses: dict[str, dict[float, float]] = {}
    broken: dict[str, int] = {}
    paces: dict[str, list[float]] = {}
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            record: Any = json.loads(line)
            if not isinstance(record, dict):
                continue
            step, loss, pace = (_finite(record.get(key)) for key in ("step", "loss", "images_per_second"))
        except (ValueError, OverflowError, RecursionError):
            continue
        phase = str(record.get("phase") or "")
        if step is None:
            continue
        if loss is not None:
            losses.setdefault(phase, {})[step] = loss
        elif isinstance(record.get("loss"), float):
            broken[phase] = broken.get(phase, 0) + 1
        if pace is not None and pace > 0:
            paces.setdefault(phase, []).append(pace)
    series = {phase: (np.array(sorted(found)), np.array([found[step] for step in sorted(found)])) for phase, found in losses.items()}
    return Log(series, broken, {phase: float(np.median(found)) for phase, found in paces.items()})


def _thin(series: Series) -> Series:
    """At most about 400 points, each the mean of its neighbors."""
    steps, values = series
    size = math.ceil(len(steps) / _POINTS)
    if size <= 1:
        return series
    starts = np.arange(0, len(steps), size)
    counts = np.diff(np.append(starts, len(steps)))
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def _mean(runs: Sequence[Series]) -> Series | None:
    """The mean over seeds on the steps that all of them reached; `None` where they share none."""
    first, last = max(steps[0] for steps, _ in runs), min(steps[-1] for steps, _ in runs)
    grid = np.unique(np.concatenate([steps for steps, _ in runs]))
    grid = grid[(grid >= first) & (grid <= last)]
    if not len(grid):
        return None
    return grid, np.mean([np.interp(grid, steps, values) for steps, values in runs], axis=0)


@dataclass(frozen=True)
class Curves:
    """A loss figure: its SVG, whether its axis is logarithmic, and whether points were averaged to draw it."""

    svg: str
    log: bool
    averaged: bool


def loss_svg(runs: Sequence[Series], name: str) -> Curves:
    """Losses against steps: each run thin, their mean bold, and a logarithmic axis where the values span more than a factor 30.

    `name` keeps the identifiers inside one page apart; it is made of letters, digits and hyphens.
    """
    values = np.concatenate([losses for _, losses in runs])
    log = is_wide(values)

    def draw(axes: Axes) -> None:
        mean = _mean(runs) if len(runs) > 1 else runs[0]
        if len(runs) > 1:
            for run in runs:
                axes.plot(*_thin(run), color=_SERIES, linewidth=0.7, alpha=0.45, marker=_marker(run))
        if mean is not None:
            axes.plot(*_thin(mean), color=_SERIES, linewidth=1.7, marker=_marker(mean))
        if log:
            axes.set_yscale("log")
        _label(axes, "y", log, "loss")
        _count_steps(axes)
        axes.set_xlabel("update")

    return Curves(_svg(draw, name), log, any(len(steps) > _POINTS for steps, _ in runs))


def energy_svg(series: Series, level: NDArray[np.float64], noise: bool, name: str) -> str:
    """One term of an energy against the steps of a synthesis, from 1 to as many as `level` has; above them, with `noise`, that level."""
    log = is_wide(series[1])

    def draw(axes: Axes) -> None:
        axes.plot(*_thin(series), color=_SERIES, linewidth=1.7, marker=_marker(series))
        if log:
            axes.set_yscale("log")
        _label(axes, "y", log, "energy")
        _count_steps(axes)
        axes.set_xlabel("step")
        if len(level) > 1:
            margin = 0.03 * (len(level) - 1)
            axes.set_xlim(1 - margin, len(level) + margin)  # also where the term began later, so that panels compare
        if noise:
            shown = {step: f"{level[step - 1]:#.2g}" for step in range(1, len(level) + 1) if np.isfinite(level[step - 1])}
            above = axes.secondary_xaxis("top")
            above.set_xlabel("noise level")
            above.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            above.xaxis.set_major_formatter(FuncFormatter(lambda step, _: shown.get(round(step), "")))

    return _svg(draw, name)


def histogram_svg(sets: Mapping[str, NDArray[np.float64]], name: str) -> str:
    """Shares of each set of numbers, one for each kind of the page ("free", "teacher", "real"), in bins that all of them have.

    Bins are of equal ratios where all numbers are positive and span more than a factor 30. The last hundredth at either end of a set,
    which would leave the rest no room, counts in the outermost bins.
    """
    low = min(float(np.quantile(numbers, 0.01)) for numbers in sets.values())
    high = max(float(np.quantile(numbers, 0.99)) for numbers in sets.values())
    log = is_wide(np.array([low, high]))
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    edges = np.geomspace(low, high, _BINS + 1) if log else np.linspace(low, high, _BINS + 1)

    def draw(axes: Axes) -> None:
        for kind, numbers in sets.items():
            color, line = _LINES[kind]
            shares = np.histogram(numbers.clip(edges[0], edges[-1]), edges)[0] / len(numbers)
            if kind == "free":
                axes.stairs(shares, edges, color=color, fill=True, alpha=0.16, linewidth=0)
            axes.stairs(shares, edges, color=color, linewidth=1.5, linestyle=line)
        if log:
            axes.set_xscale("log")
        _label(axes, "x", log, "energy")
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g}%"))
        axes.set_ylabel("share of images")

    return _svg(draw, name)


@dataclass(frozen=True)
class Point:
    """An arm in a scatter: its number on the page, its kind, a cost and a figure of quality."""

    number: int
    kind: str
    x: Value
    y: Value

    @property
    def fits(self) -> bool:
        """Whether an axis can show it."""
        return self.x.mean > 0 and all(max(abs(value.mean), value.sd or 0.0) < _LARGEST_ENERGY for value in (self.x, self.y))


def scatter_svg(points: Sequence[Point], floor: float | None, cost: str, name: str) -> str:
    """Quality, upwards, against a cost, both with a spread of one standard deviation where it is known; the floor is a dashed line."""
    x, y = (np.array([getattr(point, axis).mean for point in points]) for axis in "xy")
    log_x, log_y = bool(x.max() > 3 * x.min()), is_wide(y)

    def draw(axes: Axes) -> None:
        if log_x:
            axes.set_xscale("log")
        if log_y:
            axes.set_yscale("log")
        for point in points:
            color, marker = _MARKERS.get(point.kind, (_INK, "o"))
            bars = [[[min(value.sd or 0.0, 0.9 * abs(value.mean))], [value.sd or 0.0]] for value in (point.x, point.y)]
            axes.errorbar(point.x.mean, point.y.mean, bars[1], bars[0], color=color, marker=marker, markersize=5.5, elinewidth=1.2)
        if floor is not None and floor < _LARGEST_ENERGY and (floor > 0 or not log_y):
            axes.axhline(floor, color=_INK, linewidth=1, linestyle=(0, (4, 3)))
        if not log_y and y.min() >= 0:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.12)
        _label(axes, "x", log_x, cost)
        _label(axes, "y", log_y)
        _number(axes, points)

    return _svg(draw, name, _LARGER)


def _number(axes: Axes, points: Sequence[Point]) -> None:
    """Each point's number beside it, on the first side where it covers neither a point nor another number."""
    axes.autoscale_view()
    at = [72 / axes.figure.dpi * axes.transData.transform((point.x.mean, point.y.mean)) for point in points]
    taken = [*at]
    for point, place in zip(points, at, strict=True):
        sides = [(9, 0), (-9, 0), (0, 10), (0, -10), (8, 8), (-8, 8), (8, -8), (-8, -8), (18, 0), (-18, 0), (26, 0), (-26, 0)]
        free = (side for side in sides if all(abs(place[0] + side[0] - x) > 8 or abs(place[1] + side[1] - y) > 8 for x, y in taken))
        side = next(free, sides[0])
        taken.append(place + side)
        axes.annotate(str(point.number), (point.x.mean, point.y.mean), side, "data", "offset points", color=_INK, ha="center", va="center")


def is_wide(values: NDArray[np.float64]) -> bool:
    """Whether an axis of the values should be logarithmic: positive, they span more than a factor 30."""
    return bool(values.min() > 0 and values.max() > 30 * values.min())


def _marker(series: Series) -> str | None:
    return "." if len(series[0]) == 1 else None


def _label(axes: Axes, which: Literal["x", "y"], log: bool, *what: str) -> None:
    """Name, if it has one, and numbers of an axis of values."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    if log:
        low, high = axis.get_view_interval()
        wide = math.log10(high / low) > 2.5
        axis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0), numticks=7))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{round(value, 12):,g}" if abs(value) < 1e6 else f"{value:.0e}"))
    axis.set_label_text(", ".join([*what, "log scale"] if log else what))


def _count_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))


def _svg(draw: Callable[[Axes], None], name: str, size: tuple[float, float] = _SIZE) -> str:
    """What `draw` draws as an element of the page; `name` keeps the identifiers inside one page apart."""
    with matplotlib.style.context(["default", _STYLE], after_reset=True):
        figure = Figure(figsize=size)
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        _leave_margins(figure, axes)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _inline(buffer.getvalue(), name)


def _leave_margins(figure: Figure, axes: Axes) -> None:
    """Room for the axes' numbers and names. Matplotlib's own layouts draw every label to measure it, which takes longer than the figure."""
    width, height = (72 * side for side in figure.get_size_inches())  # points
    line = 1.35 * float(matplotlib.rcParams["font.size"])
    longest = max((len(text) for text in axes.yaxis.get_major_formatter().format_ticks(list(axes.yaxis.get_majorticklocs()))), default=0)
    left, above = longest * 0.45 * line + 1.9 * line, 2.6 * line if axes.child_axes else 0.6 * line
    figure.subplots_adjust(left / width, 2.7 * line / height, 1 - 1.5 * line / width, 1 - above / height)


def _inline(svg: str, name: str) -> str:
    """A stand-alone SVG as an element of the page: no header, no addresses, identifiers of its own, the page's colors."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<defs>\s*<style[^>]*>.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"""\sxmlns(:xlink)?="[^"]*"|\s(width|height)="[^"]*pt"|\sversion="[^"]*\"""", "", svg)
    svg = re.sub(r"font-family: [^;]*; ", "", svg)
    used = set(re.findall(r"#([\w.-]+)[\")]", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    for placeholder, color in _PLACEHOLDERS.items():
        svg = svg.replace(placeholder, color)
    return svg.strip()
