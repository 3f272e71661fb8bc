"""Pictures for the page: image strips as PNG data URIs, training logs, and loss curves as inline SVG.

Nothing that a user wrote enters a picture, labels stand in the page's own text. The same inputs give the same bytes.
"""

import base64
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

__all__ = ["Curves", "Log", "Picture", "Pictures", "loss_svg", "pairs", "read_log", "read_pictures", "strips"]

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

# The colors that matplotlib draws with stand for the page's own, which follow its light or dark mode.
_INK, _RULE, _SERIES = "#010203", "#040506", "#070809"
_PLACEHOLDERS = {_INK: "var(--muted)", _RULE: "var(--rule)", _SERIES: "var(--series)"}
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
    """The arrays of a `pictures.npz` that can be shown, the nearest distances `(k,)`, and the names of those that cannot."""

    images: dict[str, Pixels] = field(default_factory=dict)
    distances: NDArray[np.float64] | None = None
    unusable: tuple[str, ...] = ()


def read_pictures(path: Path) -> Pictures | None:
    """The pictures of a run; `None` where there is no such file or where it is no archive of arrays."""
    images: dict[str, Pixels] = {}
    distances = None
    unusable = []
    broken = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
    try:
        # The file is opened here, since numpy leaves one that it cannot read open.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                return None
            for name in archive.files:
                try:
                    array = archive[name]
                except broken:
                    unusable.append(name)
                    continue
                if name == "nearest_distance" and array.ndim == 1 and array.dtype.kind == "f" and np.isfinite(array).all():
                    distances = array.astype(np.float64)
                elif array.dtype == np.uint8 and array.ndim == 4 and array.shape[1] in (1, 3) and min(array.shape) > 0:
                    images[name] = array
                else:
                    unusable.append(name)
            archive.close()
    except broken:
        return None
    return Pictures(images, distances, tuple(unusable))


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


def _row(tiles: Sequence[Image.Image], alt: str) -> Picture:
    """Tiles side by side with transparent gaps, so that the page's own background shows in light and in dark mode."""
    width = sum(tile.width + _GAP for tile in tiles) - _GAP
    height = max(tile.height for tile in tiles)
    canvas = Image.new("LA" if all(tile.mode == "L" for tile in tiles) else "RGBA", (width, height))
    left = 0
    for tile in tiles:
        canvas.paste(tile.convert(canvas.mode), (left, 0))
        left += tile.width + _GAP
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
    log = bool(values.min() > 0 and values.max() > 30 * values.min())
    with matplotlib.style.context(["default", _STYLE], after_reset=True):
        figure = Figure(figsize=(3.8, 2.3), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        mean = _mean(runs) if len(runs) > 1 else runs[0]
        if len(runs) > 1:
            for run in runs:
                axes.plot(*_thin(run), color=_SERIES, linewidth=0.7, alpha=0.45, marker="." if len(run[0]) == 1 else None)
        if mean is not None:
            axes.plot(*_thin(mean), color=_SERIES, linewidth=1.7, marker="." if len(mean[0]) == 1 else None)
        if log:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            wide = math.log10(high / low) > 2.5
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 3.0), numticks=7))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{round(loss, 12):,g}" if abs(loss) < 1e6 else f"{loss:.0e}"))
        axes.set_xlabel("update")
        axes.set_ylabel("loss, log scale" if log else "loss")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return Curves(_inline(buffer.getvalue(), name), log, any(len(steps) > _POINTS for steps, _ in runs))


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
