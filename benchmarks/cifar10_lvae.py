"""The published experiment: a ladder VAE on CIFAR-10, students with data and without, compared by ratio to their teacher.

The features are a classifier's of our own, so no figure here is an FID; its accuracy is among the figures. The diffusion prior has seen
159 classes of Tiny ImageNet, none of them CIFAR-10's. Every student of a row has as many updates, but for the rows named "longer".

    python benchmarks/cifar10_lvae.py [--size small|large] [--seeds 3] [--data ../shared/data] [--runs runs/benchmark-cifar10-lvae]
        [--prior FOLDER] [--features FOLDER]

Large is the published size, for a GPU: a teacher of width 128, 50 passes. Small has a narrower teacher, fewer images and updates, for two
cores. Without those two folders, the prior and the classifier are trained first, by their recipes: 30 minutes of one core.
"""

from __future__ import annotations

import argparse
import copy
import resource
import shutil
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from common import gain_in_sds, write
from potstill import config, pipeline
from potstill.data import floats
from potstill.evaluate.arms import over_seeds, quality, samples
from potstill.evaluate.cost import latency, parameters
from potstill.export import export
from potstill.families.lvae import LVAE
from potstill.noise import Noise
from potstill.progress import Board
from potstill.report.tables import text_table
from potstill.state import read_json

RECIPES = Path(__file__).parents[1] / "recipes"
WIDTHS = {"large": (32, 16, 8), "small": (8, 16)}
PUBLISHED = (128, 32, 16, 8)
# Of every student but the first, whose table has all arms.
MAIN = ("student_data_free", "student_with_data", "calibrated", "calibrated-longest")
SMALL: dict[str, Any] = {
    "train.model.width": 32,
    "train.steps": 2500,
    "train.batch": 64,
    "train.lr": 8e-3,
    "train.warmup": 100,
    "train.beta_warmup": 500,
    "train.ema": 0.995,
    "surrogates.own.n": 2048,
    "surrogates.more.n": 8192,
    **{f"surrogates.{name}.{key}": value for name in ("unguided", "guided", "guided-full") for key, value in (("n", 500), ("steps", 10))},
    **{f"distill.{phase}.batch": 64 for phase in ("generate", "infer", "scratch")},
    **{f"distill.{phase}.ema": 0.98 for phase in ("generate", "infer", "scratch")},
    "distill.generate.lr": 1e-2,
    "distill.infer.lr": 5e-3,
    "distill.scratch.lr": 6e-3,
    "distill.generate.steps": 500,
    "distill.infer.steps": 300,
    "distill.scratch.steps": 800,
    "calibrate.steps": 240,
    "calibrate.batch": 192,
    "arms.3.steps": 1500,
    "arms.5.steps": 1500,
    "arms.6.steps": {"generate": 1500, "infer": 900},
    "evaluate.latency_repeats": 20,
    "compute.threads": 1,
}
FIGURES = ("frechet_sqrt", "emd", "mmd", "one_nn", "reconstruction_mse", "latency_ms_b1", "latency_ms_b64")


def tree_of(name: str, **sections: Any) -> dict[str, Any]:
    """A recipe of this repository as plain data, with other sections; those that are ``None`` are left out."""
    tree = config.read_tree(RECIPES / f"{name}.yaml") | sections
    return {key: value for key, value in tree.items() if value is not None}


def of_size(tree: dict[str, Any], size: str) -> dict[str, Any]:
    """The published experiment, or the small one."""
    tree = copy.deepcopy(tree)
    for path, value in SMALL.items() if size == "small" else ():
        *keys, last = path.split(".")
        at: Any = tree
        for key in keys:
            at = at[int(key)] if isinstance(at, list) else at.setdefault(key, {})
        at[last] = value
    return tree


def with_data_on_calibrated_noise(recipe: config.Recipe, folder: Path, students: Path) -> dict[str, dict[str, float]]:
    """Figures of students that were distilled with data, drawn from the noise that a run without data has calibrated."""
    run = pipeline.Run(recipe, folder, (), Board(quiet=True))
    section = recipe.evaluate or config.Evaluate()
    test = floats(run.shop.real.test.images[: section.n])
    real, found = run.features.of(test), []
    for seed in recipe.seeds:
        model = run.shop.calibrated.onto(LVAE.from_pretrained(students / f"seed-{seed}").model().frozen())
        drawn = samples(model, len(test), Noise((recipe.seed, seed, "evaluate")), section.batch)
        found.append(quality(drawn, real, run.features.features, section.k))
    return over_seeds(found)


def folder_of(arm: config.Arm) -> str:
    """What follows the width in the name of the run that an arm is trained in."""
    if arm.start != "calibrated":
        return ""
    return "-longest" if isinstance(arm.steps, dict) else "-calibrated"


def plain(arm: str) -> str:
    """A row's name as part of a figure's."""
    return arm.replace("-", "_").replace("+", "_on_")


def published_latency() -> list[dict[str, Any]]:
    """How long the published networks take to generate, whatever their weights: one row a width, in turn, the median of three.

    Beside torch, each as ``potstill export`` writes it, in onnxruntime: what of the time is torch's own is left out there.
    """
    found: dict[tuple[int, int], list[float]] = {}
    for width in PUBLISHED * 3:
        model = LVAE((3, 32, 32), width, std=0.1).eval().model()
        for batch in (1, 64):
            taken = latency(lambda n, model=model: model.sample(n, Noise((0,))), batch, device="cpu", repeats=20, warmup=3)
            found.setdefault((width, batch), []).append(taken.median_ms)
    rows: list[dict[str, Any]] = []
    for width in PUBLISHED:
        net = LVAE((3, 32, 32), width, std=0.1)
        with tempfile.TemporaryDirectory() as folder:
            net.save_pretrained(f"{folder}/model")
            exported = export(f"{folder}/model", "onnx", Path(folder) / "onnx")["table"][1]
        rows.append({"width": width, "params": parameters(net)})
        for batch in (1, 64):
            rows[-1][f"published_latency_ms_b{batch}"] = statistics.median(found[width, batch])
            rows[-1][f"published_onnx_latency_ms_b{batch}"] = exported[f"latency_ms_b{batch}"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["small", "large"], default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="*", help="of the students; by default 32, 16 and 8, and for the small size 8 and 16")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-cifar10-lvae"))
    parser.add_argument("--prior", help="by default the one that recipes/tinyimagenet-sd.yaml trains")
    parser.add_argument("--features", help="folder of a classifier; by default the one that recipes/cifar10-classifier.yaml trains")
    arguments = parser.parse_args()
    runs, start = arguments.runs / arguments.size, time.perf_counter()
    pictures = {f"{key}path": str(arguments.data / "cifar10" / f"{split}.parquet") for key, split in (("", "train"), ("test_", "test"))}
    data = {"kind": "parquet"} | pictures
    if arguments.prior is None:
        own = {"kind": "parquet", "path": str(arguments.data / "tinyimagenet32" / "train.parquet"), "test_fraction": 0.02}
        pipeline.execute(config.check(tree_of("tinyimagenet-sd", data=own)), arguments.runs / "prior")
    if arguments.features is None:
        pipeline.execute(config.check(tree_of("cifar10-classifier", data=data)), arguments.runs / "features")
    prior = arguments.prior or str(arguments.runs / "prior" / "teacher")
    features = Path(arguments.features or arguments.runs / "features" / "teacher")

    whole = of_size(tree_of("cifar10-lvae", data=data, seeds=list(range(arguments.seeds))), arguments.size)
    for section in whole["surrogates"].values():
        if section["kind"] == "guided":
            section |= {"prior": prior, "prompts_file": str(RECIPES / "texts" / "tinyimagenet.yaml")}
    whole["evaluate"]["features"] = f"classifier:{features}"
    training = {key: whole[key] for key in ("data", "train", "compute") if key in whole}
    pipeline.execute(config.check({"name": "cifar10-lvae-teacher"} | training), runs / "teacher")
    torch.set_num_threads(1)
    rows = published_latency()
    dearest = rows[0]
    figures: dict[str, float] = {
        f"published_{how}faster_at_batch_{batch}_w{row['width']}": dearest[f"published_{how}latency_ms_b{batch}"]
        / row[f"published_{how}latency_ms_b{batch}"]
        for how, row, batch in product(("", "onnx_"), rows[1:], (1, 64))
    }
    if (accuracy := features.parent / "train" / "held_out.json").exists():
        figures["feature_classifier_accuracy"] = read_json(accuracy)["accuracy"]
    with_data: dict[int, dict[str, Any]] = {}
    del whole["train"]
    widths = tuple(arguments.widths or WIDTHS[arguments.size])
    # The longest arm is of the widest student alone: a smaller one has not what it takes to reconstruct.
    for width, kind in [*product(widths, ("", "-calibrated")), (max(widths), "-longest")]:
        folder, calibrated = runs / f"width-{width}{kind}", kind != ""
        first = runs / f"width-{widths[0]}{'-calibrated' if calibrated else ''}"
        # What is of the teacher alone is the same for every student.
        if folder != first and not folder.exists():
            same = () if kind == "-longest" else ("surrogates", "synthesize")
            for made in (*same, *(("calibrate", "calibrated") if calibrated else ())):
                shutil.copytree(first / made, folder / made)
            (folder / "state").mkdir()
            (folder / "state" / "run.lock").touch()
        teacher = {"kind": "pretrained", "path": str(runs / "teacher" / "teacher")}
        chosen = whole | {"teacher": teacher, "student": {"width": width}}
        described = [(arm, config.Arm.model_validate(arm)) for arm in whole["arms"]]
        chosen["arms"] = [arm for arm, about in described if folder_of(about) == kind and (width == widths[0] or about.title in MAIN)]
        used = {name for _, about in described if folder_of(about) == kind for name in about.surrogate or ()}
        chosen["surrogates"] = {name: section for name, section in whole["surrogates"].items() if name in used}
        if not calibrated:
            del chosen["calibrate"]
        recipe = config.check(chosen)
        pipeline.execute(recipe, folder)
        metrics: dict[str, Any] = read_json(folder / "metrics.json")
        print(f"width {width}\n{text_table(metrics)}", file=sys.stderr)
        arms = metrics["arms"]
        for arm, found in arms.items():
            if calibrated and arm == "teacher":
                continue  # in the rows already
            measured = {key: found[key] for key in FIGURES}
            rows.append({"width": width, "arm": arm, "params": found["params"], "updates": metrics["arms_info"][arm]["updates"]} | measured)
        mean = {arm: {key: found[key]["mean"] for key in FIGURES} for arm, found in arms.items()}
        root = mean["teacher"]["frechet_sqrt"]
        for arm, found in mean.items():
            if arm != "teacher":
                name = plain(arm.removeprefix("student_").removeprefix("data_free"))
                figures[f"loss_vs_teacher_w{width}{'_' if name else ''}{name}"] = found["frechet_sqrt"] / root - 1
        if calibrated:
            if kind == "-calibrated":
                owner = with_data_on_calibrated_noise(recipe, folder, runs / f"width-{width}" / "students" / "student_with_data")
                rows.append({"width": width, "arm": "student_with_data+calibrated"} | {k: owner[k] for k in FIGURES if k in owner})
                figures[f"loss_vs_teacher_w{width}_with_data_on_calibrated"] = owner["frechet_sqrt"]["mean"] / root - 1
            for arm in (name for name in arms if not name.startswith("teacher")):
                name, theirs = f"{plain(arm)}_over_with_data_w{width}", with_data[width]
                figures[name] = mean[arm]["frechet_sqrt"] / theirs["frechet_sqrt"]["mean"]
                if not arm.endswith("+calibrated"):
                    over = mean[arm]["reconstruction_mse"] / mean["teacher"]["reconstruction_mse"]
                    figures[f"reconstruction_over_teacher_w{width}_{plain(arm)}"] = over
                for metric in ("frechet_sqrt", "emd", "mmd", "one_nn"):
                    figures[f"{name}_{metric}_in_sds"] = gain_in_sds(arms[arm][metric], theirs[metric])
            continue
        with_data[width] = arms["student_with_data"]
        ours = mean["student_data_free"]
        figures |= {
            f"reconstruction_over_teacher_w{width}": ours["reconstruction_mse"] / mean["teacher"]["reconstruction_mse"],
            f"faster_at_batch_1_w{width}": mean["teacher"]["latency_ms_b1"] / ours["latency_ms_b1"],
            f"faster_at_batch_64_w{width}": mean["teacher"]["latency_ms_b64"] / ours["latency_ms_b64"],
        }
        over = ours["frechet_sqrt"] / mean["student_with_data"]["frechet_sqrt"]
        figures.setdefault("data_free_over_with_data", over)  # of the first width
        figures[f"data_free_over_with_data_w{width}"] = over
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    # Of this call alone, which may have gone on from another.
    figures |= {"seconds_of_last_call": round(time.perf_counter() - start, 1), "peak_memory_gib_of_last_call": round(peak / 2**20, 3)}
    print(f"wrote {write(f'cifar10_lvae_{arguments.size}', figures, rows)}")


if __name__ == "__main__":
    main()
