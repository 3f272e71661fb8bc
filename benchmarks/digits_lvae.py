"""Data-free against with-data on real digits: every arm, three student seeds, and as many teachers.

The advantage of a distilled student depends on its teacher, so teachers of several seeds are trained by the recipe of the zoo's
(about 15 minutes each on one core), and each gets students of every arm. All runs go through the pipeline, so an interrupted
benchmark goes on where it stopped.

    python benchmarks/digits_lvae.py [--teachers 3] [--quick] [--runs runs/benchmark-digits] [--set a.b=value ...]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from common import write
from potstill import config, pipeline
from potstill.cli import DEMO
from potstill.report.tables import text_table
from potstill.state import read_json

TEACHER = Path(__file__).parents[1] / "recipes" / "digits-lvae-teacher.yaml"
ARMS: list[Any] = ["data_free", "with_data", "scratch"]
# A third more updates than the demo has time for.
UPDATES = ["distill.generate.steps=800", "distill.infer.steps=800", "distill.scratch.steps=1600"]
# Asked of the shipped teacher alone.
MORE: list[Any] = [
    # Noise that was never inferred from an image, at the same updates.
    {"kind": "data_free", "name": "student_fresh_noise", "start": "noise"},
    # The teacher's images never run out: what it is worth to go on.
    {"kind": "data_free", "name": "student_data_free_long", "start": "more", "steps": 2400},
    # What sharing the noise is worth.
    {"kind": "data_free", "name": "noise_shared_at_the_top", "start": "noise", "share": "z3", "infer": False},
    {"kind": "data_free", "name": "noise_independent", "start": "noise", "share": "", "infer": False},
    {"kind": "data_free", "name": "values_replayed", "start": "noise", "replay": "z*", "infer": False},
]
# And on: generator and encoder six and three times as long as in the demo.
LONGER = [{"kind": "data_free", "name": "student_data_free_longer", "start": "more", "steps": 4800}]
LARGER = {"more": {"kind": "ancestral", "n": 16384, "sweeps": 10}}
KEPT = ("frechet", "frechet_sqrt", "kid", "emd", "mmd", "one_nn", "precision", "recall")
KEPT += ("paired_mse", "reconstruction_mse", "kl", "nelbo", "latency_ms_b1")


def measure(seed: int, runs: Path, name: str, arms: list[Any], overrides: list[str]) -> dict[str, Any]:
    """Train one teacher, where it is not there yet, and students of the given arms, and return metrics.json."""
    teacher = runs / f"teacher-{seed}"
    pipeline.execute(config.read(TEACHER, [f"seed={seed}"]), teacher)
    folder = runs / f"{name}-{seed}"
    chosen = config.read(DEMO, [f"teacher.path={teacher / 'teacher'}", *UPDATES, *overrides]).model_dump(mode="json")
    more = LARGER if any(isinstance(arm, dict) and arm.get("start") == "more" for arm in arms) else {}
    pipeline.execute(config.check(chosen | {"arms": arms, "surrogates": chosen["surrogates"] | more}), folder)
    found: dict[str, Any] = read_json(folder / "metrics.json")
    return found


def figures_of(metrics: dict[str, Any]) -> dict[str, float]:
    """Ratios that the claims are about; below 1 is better, but for ``independent_over_shared`` and ``sds_below_scratch``."""
    arms = metrics["arms"]

    def ratio(figure: str, a: str, b: str) -> float:
        return float(arms[a][figure]["mean"] / arms[b][figure]["mean"])

    scratch, free = arms["student_scratch"]["frechet"], arms["student_data_free"]["frechet"]
    spread = statistics.fmean([scratch["sd"] ** 2, free["sd"] ** 2]) ** 0.5
    figures = {
        "data_free_over_with_data": ratio("frechet", "student_data_free", "student_with_data"),
        "data_free_over_scratch": ratio("frechet", "student_data_free", "student_scratch"),
        "sds_below_scratch": (scratch["mean"] - free["mean"]) / spread if spread else 0.0,
        "data_free_over_teacher": ratio("frechet", "student_data_free", "teacher"),
        "reconstruction_over_teacher": ratio("reconstruction_mse", "student_data_free", "teacher"),
        "kl_over_teacher": ratio("kl", "student_data_free", "teacher"),
    }
    if "noise_independent" in arms:
        figures |= {
            "independent_over_shared": ratio("frechet", "noise_independent", "student_fresh_noise"),
            "fresh_noise_over_with_data": ratio("frechet", "student_fresh_noise", "student_with_data"),
            "data_free_long_over_with_data": ratio("frechet", "student_data_free_long", "student_with_data"),
            "reconstruction_over_teacher_long": ratio("reconstruction_mse", "student_data_free_long", "teacher"),
            "kl_over_teacher_long": ratio("kl", "student_data_free_long", "teacher"),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-digits"))
    parser.add_argument("--quick", action="store_true", help="leave out the longest training")
    parser.add_argument("--set", nargs="*", default=[], metavar="a.b=value", help="overrides of the demo's recipe")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    every: list[dict[str, float]] = []

    def keep(seed: int, metrics: dict[str, Any], names: list[str]) -> None:
        print(f"teacher {seed}\n{text_table(metrics)}", file=sys.stderr)
        for name in names:
            arm, about = metrics["arms"][name], metrics["arms_info"][name]
            kept = {k: arm[k] for k in KEPT if k in arm}
            rows.append({"teacher": seed, "arm": name, "note": about["note"], "params": arm["params"], "size_mib": arm["size_mib"], **kept})

    for seed in range(arguments.teachers):
        arms = ARMS + MORE if seed == 0 else [arm for arm in ARMS if arm != "scratch"]
        metrics = measure(seed, arguments.runs, "students", arms, arguments.set)
        if seed == 0:
            scratch = {key: metrics[key]["student_scratch"] for key in ("arms", "arms_info")}
        for key in scratch:  # which knows no teacher, so that one set of students serves for all
            metrics[key]["student_scratch"] = scratch[key]
        floor = metrics["reference"]["floor"]
        rows.append({"teacher": seed, "arm": "floor", **{k: floor[k] for k in KEPT if k in floor}})
        keep(seed, metrics, list(metrics["arms"]))
        every.append(figures_of(metrics))
    if not arguments.quick:
        with_data = next(r["frechet"]["mean"] for r in rows if r["teacher"] == 0 and r["arm"] == "student_with_data")
        metrics = measure(0, arguments.runs, "longer", LONGER, ["distill.infer.steps=2400", *arguments.set])
        keep(0, metrics, ["student_data_free_longer"])
        arm, teacher = metrics["arms"]["student_data_free_longer"], metrics["arms"]["teacher"]
        every[0] |= {
            "data_free_longer_over_with_data": arm["frechet"]["mean"] / with_data,
            "reconstruction_over_teacher_longer": arm["reconstruction_mse"]["mean"] / teacher["reconstruction_mse"]["mean"],
            "kl_over_teacher_longer": arm["kl"]["mean"] / teacher["kl"]["mean"],
        }
    # The shipped teacher is that of seed 0; the others say how far its figures can be trusted.
    figures = dict(every[0])
    for name in every[0]:
        values = [f[name] for f in every if name in f]
        if len(values) < 2:
            continue
        figures[f"{name}_mean_over_teachers"] = statistics.fmean(values)
        figures[f"{name}_sd_over_teachers"] = statistics.stdev(values)
    print(f"wrote {write('digits_lvae', figures, rows)}")


if __name__ == "__main__":
    main()
