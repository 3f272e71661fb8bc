"""How long until something happens: help, a wrong recipe, the import, the first step of each stage.

    python benchmarks/startup.py [--repeats 5]

Every figure is the median of whole processes, in seconds, the interpreter's own start included, which is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import write

STEPS = {"steps": 1, "batch": 16}
RECIPE: dict[str, Any] = {
    "name": "startup",
    "data": {"kind": "digits", "train": 200},
    "train": {"model": {"kind": "lvae", "image": [1, 8, 8], "width": 4, "levels": 2, "latent": 2, "std": 0.1}, **STEPS},
    "teacher": {"kind": "trained"},
    "calibrate": STEPS,
    "student": {"width": 2},
    "surrogate": {"n": 16},
    "distill": {"generate": STEPS, "infer": STEPS},
    "seeds": [0],
    "evaluate": {"n": 64, "latency_repeats": 3},
    "report": {"images": 4},
    "compute": {"device": "cpu", "threads": 1, "workers": 1},
}
STAGES = ("train", "calibrate", "synthesize", "distill", "evaluate", "report")


def seconds(command: list[str], expected: int = 0) -> float:
    """Of one process, which must end with that code."""
    start = time.perf_counter()
    code = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode
    taken = time.perf_counter() - start
    if code != expected:
        raise SystemExit(f"{' '.join(command)}: exit code {code}, expected {expected}")
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    potstill = [sys.executable, "-m", "potstill"]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="startup-") as temporary:
        folder = Path(temporary)
        recipe, wrong = folder / "recipe.yaml", folder / "wrong.yaml"
        recipe.write_text(json.dumps(RECIPE), encoding="utf-8")
        wrong.write_text(json.dumps(RECIPE | {"distil": {}}), encoding="utf-8")
        alone: dict[str, tuple[list[str], int]] = {
            "python": ([sys.executable, "-c", "pass"], 0),
            "import torch": ([sys.executable, "-c", "import torch"], 0),
            "import potstill": ([sys.executable, "-c", "import potstill"], 0),
            "--help": ([*potstill, "--help"], 0),
            "a wrong recipe": ([*potstill, "run", str(wrong)], 2),
        }
        for name, (command, code) in alone.items():
            taken = statistics.median(seconds(command, code) for _ in range(repeats))
            rows.append({"what": name, "seconds": taken})
        taken_by: dict[str, list[float]] = {stage: [] for stage in STAGES}
        for i in range(repeats):
            for stage in STAGES:
                taken_by[stage].append(seconds([*potstill, stage, str(recipe), "--out", str(folder / f"run-{i}"), "--quiet"]))
        rows += [{"what": f"{stage}, one small step", "seconds": statistics.median(taken)} for stage, taken in taken_by.items()]
    for row in rows:
        print(f"{row['what']}: {row['seconds']:.2f} s")
    figures = {row["what"].partition(",")[0].strip("- ").replace(" ", "_"): row["seconds"] for row in rows}
    print(f"wrote {write('startup', figures, rows)}")


if __name__ == "__main__":
    main()
