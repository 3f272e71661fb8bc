"""A classifier of real pictures without its data: CIFAR-10's classes, and a prior that has seen none of them.

Two teachers: one that ``potstill train`` makes, and a ResNet-56 that nobody here trained. The student is the same small ResNet in every
row, with the same number of updates, the same augmentation and the same seeds in all rows of a teacher. It learns from labels alone,
from the teacher on real pictures, or from the teacher on pictures of inversion, of the diffusion prior, guided or not, or of noise.

    python benchmarks/cifar10_classifier.py [--teachers trained resnet56] [--seeds 3] [--data ../shared/data]
        [--pretrained ../shared/pretrained] [--runs runs/benchmark-cifar10] [--prior FOLDER] [--teacher FOLDER]

Without those two folders, the prior and the teacher are trained first, by their recipes: 25 minutes of one core. The rest takes 45 more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import gain_in_sds, write
from potstill import config, pipeline
from potstill.families.classifier import ResNet
from potstill.model import Model
from potstill.report.tables import text_table
from potstill.state import read_json

RECIPES = Path(__file__).parents[1] / "recipes"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
PRIOR_CLASSES = 159  # of tinyimagenet32; none is one of CIFAR-10's, so every picture's prompt is one of them by chance
AUGMENT = {"shift": 4, "padding": "reflect", "flip": True}
# Those of the published checkpoint: ImageNet's.
RESNET56 = {
    "kind": "resnet",
    "image": [3, 32, 32],
    "classes": 10,
    "depth": 56,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
# One pass of the ResNet-56 takes as long as nine of the trained teacher, so all of its rows have fewer images and updates.
SETTINGS: dict[str, dict[str, Any]] = {
    "trained": {
        "sets": ["inversion", "unguided", "guided", "guided-full", "guided-class", "noise"],
        "images": 1000,
        "inversion": 100,
        "updates": 600,
    },
    "resnet56": {"sets": ["inversion", "unguided", "guided"], "images": 500, "inversion": 50, "updates": 300},
}
# Found on digits (benchmarks/digits_arms.py) and taken over as they are: nothing was chosen by what CIFAR-10's pictures say.
BATCHNORM = {"kind": "batchnorm", "weight": 5.0}
CLEAN = {"mode": "clean", "clip": 0.5, "repeats": 2}
CROSS_ENTROPY = {"kind": "cross_entropy"}


def student(width: int) -> Model:
    """The student of both teachers: a residual network of 8 layers."""
    return ResNet(depth=8, width=width, mean=(0.491, 0.482, 0.447), std=(0.247, 0.243, 0.262)).model()


def surrogates(prior: str, sets: list[str], images: int, inversion: int, **_: int) -> dict[str, Any]:
    """The sets of pictures of one teacher. Those of the prior go by the same texts in as many steps."""
    common = {"n": images, "batch": 100, "classes": CLASSES}
    diffusion = common | {"kind": "guided", "prior": prior, "steps": 10, "prompts": [f"class {i}" for i in range(PRIOR_CLASSES)]}
    every: dict[str, dict[str, Any]] = {
        "inversion": common | {"kind": "inversion", "steps": inversion, "jitter": 2, "energy": [CROSS_ENTROPY, BATCHNORM]},
        "unguided": diffusion | {"mode": "off", "energy": [BATCHNORM]},
        "guided": diffusion | CLEAN | {"energy": [BATCHNORM]},
        "guided-full": diffusion | {"mode": "full", "clip": 0.5, "energy": [BATCHNORM]},
        "guided-class": diffusion | CLEAN | {"energy": [CROSS_ENTROPY, BATCHNORM]},
        "noise": {"n": images, "batch": 100, "kind": "uniform"},
    }
    return {name: every[name] for name in sets}


def shipped(name: str, **data: str) -> config.Recipe:
    """A recipe of this repository with its data elsewhere."""
    tree = config.read_tree(RECIPES / f"{name}.yaml")
    return config.check(tree | {"data": tree["data"] | data})


def measure(name: str, teacher: dict[str, Any], prior: str, data: dict[str, Any], folder: Path, seeds: int) -> dict[str, Any]:
    """Run the arms of one teacher through the pipeline, where they are not done yet, and return their metrics."""
    settings = SETTINGS[name]
    sets = surrogates(prior, **settings)
    training = {"steps": settings["updates"], "batch": 64, "lr": 5e-3, "beta2": 0.99, "augment": AUGMENT}
    recipe = {
        "name": f"cifar10-classifier-{name}",
        "seeds": list(range(seeds)),
        "data": data,
        "teacher": teacher,
        "student": {"target": "cifar10_classifier:student", "arguments": {"width": 8}},
        "surrogates": sets,
        "distill": {"generate": None, "infer": training, "scratch": training},
        "arms": [
            *({"kind": "data_free", "name": name, "surrogate": name} for name in sets),
            {"kind": "with_data", "name": "real-images"},
            {"kind": "scratch", "name": "scratch"},
        ],
        "evaluate": {"latency_repeats": 3},
        "compute": {"threads": 1, "workers": 1},
    }
    pipeline.execute(config.check(recipe), folder, allowed=("cifar10_classifier",))
    metrics: dict[str, Any] = read_json(folder / "metrics.json")
    print(f"{name}\n{text_table(metrics)}", file=sys.stderr)
    return metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", nargs="*", default=[*SETTINGS], choices=[*SETTINGS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--pretrained", type=Path, default=Path("../shared/pretrained"))
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-cifar10"))
    parser.add_argument("--prior", help="by default the one that recipes/tinyimagenet-sd.yaml trains")
    parser.add_argument("--teacher", help="by default the one that recipes/cifar10-classifier.yaml trains")
    arguments = parser.parse_args()
    runs = arguments.runs
    data = {f"{key}path": str(arguments.data / "cifar10" / f"{split}.parquet") for key, split in (("", "train"), ("test_", "test"))}
    if arguments.prior is None:
        pipeline.execute(shipped("tinyimagenet-sd", path=str(arguments.data / "tinyimagenet32" / "train.parquet")), runs / "prior")
    if "trained" in arguments.teachers and arguments.teacher is None:
        pipeline.execute(shipped("cifar10-classifier", **data), runs / "teacher")
    teachers = {
        "trained": {"kind": "pretrained", "path": arguments.teacher or str(runs / "teacher" / "teacher")},
        "resnet56": {"kind": "weights", "path": str(arguments.pretrained / "cifar10_resnet56.safetensors"), "net": RESNET56},
    }
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    prior_folder = arguments.prior or str(runs / "prior" / "teacher")
    for name in arguments.teachers:
        metrics = measure(name, teachers[name], prior_folder, {"kind": "parquet"} | data, runs / name, arguments.seeds)
        arms = metrics["arms"]
        for arm, found in arms.items():
            made = metrics["surrogates"].get(f"surrogates/{arm}", {})
            energies = {"energies": made["energies"]} if "energies" in made else {}
            rows.append({"teacher": name, "arm": arm, "accuracy": found["accuracy"], "params": found["params"], **energies})
        prefix = "" if name == "trained" else f"{name}_"
        named = {"real_images": "real-images", **{arm: arm for arm in ("teacher", "scratch", "inversion", "unguided", "guided")}}
        figures |= {f"{prefix}{figure}_accuracy": arms[arm]["accuracy"]["mean"] for figure, arm in named.items()}
        figures[f"{prefix}guided_gain_in_sds"] = gain_in_sds(arms["unguided"]["accuracy"], arms["guided"]["accuracy"])
    print(f"wrote {write('cifar10_classifier', figures, rows)}")


if __name__ == "__main__":
    main()
