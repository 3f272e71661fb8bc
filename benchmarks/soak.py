"""Hours of work in one process: guided synthesis and distillation in turn, while memory, file handles and threads are counted.

Each round is a run of its own, in a folder that is removed. Flat means: the last quarter's median is that of the second quarter.

    python benchmarks/soak.py [--minutes 60]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from common import write
from potstill import config, pipeline

STEPS = {"steps": 40, "batch": 32}
RECIPE: dict[str, Any] = {
    "name": "soak",
    "teacher": {"kind": "pretrained", "path": "zoo:digits-classifier"},
    "student": {"ratio": 10},
    "surrogate": {
        "kind": "guided",
        "prior": "zoo:glyphs-sd",
        "n": 64,
        "batch": 32,
        "shard": 32,
        "steps": 4,
        "prompts": ["a digit"],
        "mode": "clean",
        "energy": [{"kind": "batchnorm"}],
    },
    "distill": {"generate": None, "infer": STEPS},
    "arms": ["data_free"],
    "compute": {"threads": 1, "workers": 1},
}
GENERATIVE: dict[str, Any] = {
    "name": "soak",
    "teacher": {"kind": "pretrained", "path": "zoo:digits-lvae"},
    "student": {"width": 4},
    "surrogate": {"n": 256, "shard": 64},
    "distill": {"generate": STEPS, "infer": STEPS},
    "arms": ["data_free"],
    "compute": {"threads": 1, "workers": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    process, start = psutil.Process(), time.monotonic()
    rows: list[dict[str, Any]] = []
    while (passed := time.monotonic() - start) < 60 * arguments.minutes or len(rows) < 8:
        tree = (RECIPE, GENERATIVE)[len(rows) % 2] | {"seed": len(rows)}
        folder = Path(tempfile.mkdtemp(prefix="soak-"))
        try:
            pipeline.execute(config.check(tree), folder / "run")
        finally:
            shutil.rmtree(folder)
        held = {"mib": round(process.memory_info().rss / 2**20, 1), "handles": process.num_fds(), "threads": process.num_threads()}
        rows.append({"round": len(rows), "minutes": round(passed / 60, 2)} | held)
    quarter = len(rows) // 4
    figures: dict[str, float] = {"minutes": round((time.monotonic() - start) / 60, 1), "rounds": len(rows)}
    for key in ("mib", "handles", "threads"):
        early = statistics.median(row[key] for row in rows[quarter : 2 * quarter])
        figures |= {f"{key}_second_quarter": early, f"{key}_last_quarter": statistics.median(row[key] for row in rows[-quarter:])}
    print(f"wrote {write('soak', figures, rows[:: max(1, len(rows) // 60)])}: {figures}")


if __name__ == "__main__":
    main()
