"""One table for all families: each recipe run from nothing, one row a family and arm, with the time that the whole run took.

Every recipe trains its own teacher, unless the zoo has it, then students with data and without, three seeds each, and measures them.

    python benchmarks/families.py [--only digits-gan ...] [--runs runs/benchmark-families]
"""

from __future__ import annotations

import argparse
import sys
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from common import write
from potstill import config, pipeline
from potstill.report.tables import text_table
from potstill.state import read_json, write_json

RECIPES = Path(__file__).parents[1] / "recipes"
FAMILIES = {
    "vae": "digits-vae",
    "lvae": "demo",
    "gan": "digits-gan",
    "diffusion": "digits-diffusion",
    "flow": "digits-flow",
    "vrnn": "strokes-vrnn",
    "helmholtz": "old-faithful-hm",
    "classifier": "digits-guided",
    "vae, continual": "digits-continual",
    "text-to-image": "glyphs-sd-student",
}
FIGURES = (
    "accuracy",
    "frechet",
    "mmd",
    "one_nn",
    "energy_distance",
    "reconstruction_mse",
    "kl",
    "nelbo",
    "paired_mse",
    "latency_ms_b1",
    "latency_ms_b64",
)


def recipe(name: str) -> config.Recipe:
    """A recipe of this repository; the demo's is part of the package."""
    return config.read(str(files("potstill") / "demo.yaml") if name == "demo" else RECIPES / f"{name}.yaml")


def rows(family: str, name: str, metrics: dict[str, Any], seconds: float | None) -> list[dict[str, Any]]:
    """The table's rows of one run."""
    found = []
    for arm, measured in metrics["arms"].items():
        figures = {key: measured[key] for key in FIGURES if key in measured}
        groups = {key: value for key, value in measured.items() if "/" in key}
        found.append({"family": family, "recipe": name, "arm": arm, "params": measured["params"]} | figures | groups)
        if seconds is not None:
            found[-1]["run_seconds"] = round(seconds, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[*FAMILIES.values()], choices=[*FAMILIES.values()])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-families"))
    arguments = parser.parse_args()
    table: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    for family, name in FAMILIES.items():
        if name not in arguments.only:
            continue
        folder, start = arguments.runs / name, time.perf_counter()
        fresh, clock = not folder.exists(), arguments.runs / f"{name}.seconds.json"
        if fresh:
            clock.unlink(missing_ok=True)
        pipeline.execute(recipe(name), folder)
        if fresh:  # a run that went on would tell of its rest alone
            write_json(clock, time.perf_counter() - start)
        seconds = read_json(clock) if clock.exists() else None
        metrics: dict[str, Any] = read_json(folder / "metrics.json")
        print(f"{name}\n{text_table(metrics)}", file=sys.stderr)
        table += rows(family, name, metrics, seconds)
        if seconds is not None:
            figures[f"{name}_seconds"] = round(seconds, 1)
    print(f"wrote {write('families', figures, table)}")


if __name__ == "__main__":
    main()
