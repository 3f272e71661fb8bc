"""The metrics against what a user would otherwise call: as fast, as small in memory, and the same values.

    python benchmarks/metrics.py [--repeats 5] [--large]

Each pair is timed in turn in one process with as many threads as the machine has cores, features are float32 with a decaying spectrum,
as a network's are, and every ratio is the other's median time over ours. ``--large`` adds 10,000 rows of 2,048 features.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from common import write
from potstill.evaluate import emd, frechet, mmd, one_nn, prdc
from potstill.noise import Noise

Features = NDArray[np.float32]
METRICS: dict[str, Callable[[Any, Any], Any]] = {"frechet": frechet, "one_nn": one_nn, "prdc": prdc, "mmd": mmd}
LARGE = {"frechet": 10_000, "one_nn": 10_000, "prdc": 4000, "mmd": 4000}  # rows of each; exact distances of 10,000 take minutes


def features(name: str, n: int, d: int, shift: float = 0.0) -> Features:
    """``(n, d)``, the standard deviation of column ``i`` falling as ``(i + 1) ** -0.5``."""
    scale = torch.arange(1, d + 1) ** -0.5
    drawn: Features = (Noise((name,)).normal("features", (n, d)) * scale + shift).numpy()
    return drawn


def sqrtm_formula(x: Features, y: Features) -> float:
    """The Fréchet distance as it is usually computed: the square root of the product of two covariances."""
    from scipy.linalg import sqrtm

    first, second = np.cov(x.astype(np.float64), rowvar=False), np.cov(y.astype(np.float64), rowvar=False)
    offset = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
    root = np.real(sqrtm(first @ second))
    return float(offset @ offset + np.trace(first) + np.trace(second) - 2 * np.trace(root))


def torchmetrics_formula(x: Features, y: Features) -> float:
    """The Fréchet distance by torchmetrics, given the features as they are."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        num_features = x.shape[1]

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows.flatten(1)

    metric = FrechetInceptionDistance(feature=Given(), normalize=True, input_img_size=(1, 1, x.shape[1])).set_dtype(torch.float64)
    for rows, real in ((x, True), (y, False)):
        metric.update(torch.from_numpy(rows).double().view(len(rows), 1, 1, -1), real=real)
    return float(metric.compute())


def pot_formula(x: Features, y: Features) -> float:
    """The earth mover's distance by POT."""
    import ot

    cost = ot.dist(x.astype(np.float64), y.astype(np.float64), metric="euclidean")
    return float(ot.emd2([], [], cost, numItermax=10**8))


def timed(calls: Sequence[Callable[[], float]], repeats: int) -> tuple[list[float], list[float]]:
    """Median seconds and values of calls that are made in turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    values = [0.0] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            values[i] = call()
            seconds[i] += [time.perf_counter() - start]
    return [statistics.median(each) for each in seconds], values


def child(metric: str, n: int, d: int) -> None:
    """Print the seconds of one metric and the most memory that this process ever held, in GiB."""
    x, y = features("x", n, d), features("y", n, d, 0.01)
    start = time.perf_counter()
    METRICS[metric](x, y)
    seconds = time.perf_counter() - start
    # The system's own figure of a process, ru_maxrss, begins with what its parent held when it was started.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    print(seconds, int(status.partition("VmHWM:")[2].split()[0]) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--child", nargs=3, metavar=("METRIC", "N", "D"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], int(arguments.child[1]), int(arguments.child[2]))
        return
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}

    def against(name: str, n: int, d: int, ours: Callable[..., float], other: Callable[..., float], repeats: int) -> None:
        x, y = features("x", n, d), features("y", n, d, 0.01)
        (mine, theirs), (value, expected) = timed([lambda: ours(x, y), lambda: other(x, y)], repeats)
        suffix = "" if n == 1024 else f"_{n}"
        figures[name + suffix] = theirs / mine
        figures[f"{name}{suffix}_difference"] = abs(value - expected) / max(abs(expected), 1e-12)
        rows.append({"pair": name, "n": n, "d": d, "seconds": mine, "seconds_other": theirs, "value": value, "value_other": expected})
        print(rows[-1], file=sys.stderr, flush=True)

    for n in (1024, 10_000) if arguments.large else (1024,):
        repeats = arguments.repeats if n == 1024 else 1
        against("frechet_vs_sqrtm", n, 2048, frechet, sqrtm_formula, repeats)
        against("frechet_vs_torchmetrics", n, 2048, frechet, torchmetrics_formula, repeats)
    for n in (1024, 3000):
        against("emd_vs_pot", n, 128, emd, pot_formula, arguments.repeats)
    for metric, n in LARGE.items() if arguments.large else ():
        command = [sys.executable, __file__, "--child", metric, str(n), "2048"]
        seconds, peak = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        figures[f"{metric}_peak_gib{'' if n == 10_000 else f'_{n}'}"] = peak
        rows.append({"metric": metric, "n": n, "d": 2048, "seconds": seconds, "peak_gib": peak})
        print(rows[-1], file=sys.stderr, flush=True)
    print(f"wrote {write('metrics', figures, rows)}")


if __name__ == "__main__":
    main()
