"""How cost grows: time and memory of one distillation update, and of drawing images, with batch, image, width, latents and number.

    python benchmarks/growth.py [--repeats 5] [--plot docs/growth.png]

One thread; the median of some repeats, each case with a fresh teacher and student of random weights (what they have learned costs
nothing). ``power`` is the exponent of a straight line through the logarithms: 1 is proportional, 0 is for free.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import write
from potstill.distill.distiller import Distiller, reached, train_only
from potstill.divergence import Match, total, wasserstein2
from potstill.evaluate.arms import samples
from potstill.families.lvae import LVAE
from potstill.model import kept_for_gradient
from potstill.noise import Noise

RULES = (Match("z*", wasserstein2, 0.1, "mean"), Match("out"))


@dataclass(frozen=True)
class Case:
    """An update of a student of a quarter of its teacher's width."""

    batch: int = 32
    side: int = 32
    width: int = 32
    levels: int = 3


GROWTH: dict[str, tuple[int, ...]] = {
    "batch": (8, 16, 32, 64, 128, 256),
    "side": (8, 16, 32, 64),
    "width": (16, 32, 64, 128),
    "levels": (1, 2, 3, 4, 5),
}
LABELS = {"batch": "images in a batch", "side": "pixels a side", "width": "teacher's width", "levels": "latent nodes", "n": "images drawn"}


def nets(case: Case) -> tuple[LVAE, LVAE]:
    torch.manual_seed(0)
    image = (3, case.side, case.side)
    teacher = LVAE(image, case.width, case.levels).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return teacher, LVAE(image, case.width // 4, case.levels).to(memory_format=torch.channels_last)


def update(case: Case, repeats: int) -> dict[str, Any]:
    """Median milliseconds of an update, and the MiB that it keeps for the gradient."""
    teacher, student = nets(case)
    model = student.model()
    learns = train_only(student, reached(model, "generate"))
    objective, optimizer = Distiller(teacher.model(), model, RULES), torch.optim.AdamW(learns, 1e-3, foreach=True)

    def loss(i: int) -> torch.Tensor:
        return total(objective(Noise((0, i)).at(range(case.batch)), None, case.batch)).mean()

    kept = kept_for_gradient(lambda: loss(0))
    seconds = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        loss(i).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    return {"ms": 1e3 * statistics.median(seconds[2:]), "gradient_mib": kept / 2**20}


def drawing(n: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of drawing ``n`` images of a student, 256 at a time."""
    model, seconds = nets(Case())[1].eval().model(), []
    for i in range(repeats):
        start = time.perf_counter()
        samples(model, n, Noise((i,)), 256)
        seconds.append(time.perf_counter() - start)
    return {"ms": 1e3 * statistics.median(seconds)}


def power(rows: list[dict[str, Any]], key: str) -> float:
    """Exponent of the growth from the second case on: the first is mostly what every update costs."""
    x, y = (np.log([row[k] for row in rows[1:]]) for k in ("at", key))
    return float(np.polyfit(x, y, 1)[0])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["grows"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(2.6 * len(names), 2.6), dpi=120, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        own = [row for row in rows if row["grows"] == name]
        axis.plot([r["at"] for r in own], [r["ms"] for r in own], "o-", color="#1f5fa8", label="ms")
        if "gradient_mib" in own[0]:
            axis.plot([r["at"] for r in own], [r["gradient_mib"] for r in own], "s--", color="#a8541f", label="MiB for the gradient")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks([r["at"] for r in own], [str(r["at"]) for r in own], fontsize=7)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_xlabel(LABELS[name], fontsize=8)
        axis.grid(alpha=0.3)
        if axis is axes[0]:
            axis.legend(fontsize=7, frameon=False)
    figure.savefig(path, metadata={"Software": None})
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", type=Path, default=Path(__file__).parents[1] / "docs" / "growth.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name, values in GROWTH.items():
        rows += [{"grows": name, "at": at, **update(replace(Case(), **{name: at}), arguments.repeats)} for at in values]
    rows += [{"grows": "n", "at": n, **drawing(n, max(1, arguments.repeats // 2))} for n in (64, 256, 1024, 4096)]
    figures: dict[str, float] = {}
    for name in dict.fromkeys(row["grows"] for row in rows):
        own = [row for row in rows if row["grows"] == name]
        figures[f"power_{name}"] = power(own, "ms")
        if "gradient_mib" in own[0]:
            figures[f"memory_power_{name}"] = power(own, "gradient_mib")
    for row in rows:
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) and math.isfinite(v) else f"{k} {v}" for k, v in row.items()))
    plot(rows, arguments.plot)
    print(f"wrote {write('growth', figures, rows)}")


if __name__ == "__main__":
    main()
