"""One process against two of one thread each, launched by torchrun: the same surrogate, the same student, and how much faster.

The surrogate is guided images of the zoo's prior; its time is the stage's own, without start-up, the two ways run in turn, and
``speedup_2`` is the ratio of the medians. The student is a ladder VAE's after 100 updates; what differs is the largest difference of a
pixel in [0, 1] of 256 images on the same noise, beside that of one process with two threads instead of one, which is rounding alone.

    python benchmarks/processes.py [--repeats 3] [--images 512] [--runs FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import write
from potstill.families.lvae import LVAE
from potstill.noise import Noise
from potstill.state import read_json, read_tensors

RECIPES = Path(__file__).parents[1] / "recipes"
SINGLE = [sys.executable, "-m", "potstill"]
COMMANDS = {1: SINGLE, 2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *SINGLE[1:]]}
STUDENT = {
    "name": "processes",
    "teacher": {"kind": "pretrained", "path": "zoo:digits-lvae"},
    "student": {"width": 8},
    "distill": {"generate": {"steps": 100, "batch": 128, "lr": 1e-3}, "infer": None},
    "arms": ["data_free"],
    "compute": {"threads": 1},
}


def run(processes: int, stage: str, recipe: Path, out: Path, overrides: list[str]) -> None:
    """One stage of a recipe, by so many processes of one thread."""
    command = [*COMMANDS[processes], stage, str(recipe), *overrides, "--out", str(out), "--quiet"]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--runs", type=Path, help="where the runs go; by default a temporary folder that is removed")
    arguments = parser.parse_args()
    runs = arguments.runs or Path(tempfile.mkdtemp(prefix="processes-"))
    overrides = [f"surrogates.guided.n={arguments.images}", "surrogates.guided.batch=32", "surrogates.guided.shard=32"]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    made: list[dict[str, bytes]] = []
    for repeat in range(arguments.repeats):
        for processes in (1, 2) if repeat % 2 == 0 else (2, 1):
            out = runs / f"images-{processes}-{repeat}"
            run(processes, "synthesize", RECIPES / "digits-guided.yaml", out, overrides)
            seconds[processes] += [read_json(out / "synthesize" / "done.json")["seconds"]]
            made += [{p.name: p.read_bytes() for p in (out / "surrogates" / "guided").glob("*.parquet")}]
    recipe = runs / "student.yaml"
    recipe.write_text(json.dumps(STUDENT), encoding="utf-8")
    for processes in COMMANDS:
        run(processes, "distill", recipe, runs / f"student-{processes}", [])
    run(1, "distill", recipe, runs / "student-threads", ["compute.threads=2"])
    folders = [runs / f"student-{kind}" / "student" for kind in (*COMMANDS, "threads")]
    one, two = (read_tensors(folder / "model.safetensors") for folder in folders[:2])
    images = [LVAE.from_pretrained(folder).eval().model().sample(256, Noise((7,))) for folder in folders]
    rows: list[dict[str, Any]] = [
        {"processes": processes, "seconds": times, "images_per_second": arguments.images / statistics.median(times)}
        for processes, times in seconds.items()
    ]
    figures = {
        "speedup_2": statistics.median(seconds[1]) / statistics.median(seconds[2]),
        "images_identical": float(bool(made[0]) and all(shards == made[0] for shards in made)),
        "student_max_difference": float((images[0] - images[1]).abs().max()),
        # One process again, whose sums two threads take in another order: what rounding alone makes of 100 updates.
        "student_max_difference_of_threads": float((images[0] - images[2]).abs().max()),
        # A weight without a gradient, such as a bias before a BatchNorm, goes wherever rounding sends Adam, and changes nothing.
        "student_weights_max_difference": max(float((one[name].double() - two[name].double()).abs().max()) for name in one),
    }
    if arguments.runs is None:
        shutil.rmtree(runs)
    print(f"wrote {write('processes', figures, rows)}: {figures}")


if __name__ == "__main__":
    main()
