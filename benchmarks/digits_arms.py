"""Where does guidance help? Three kinds of student on real digits, each trained on images from many sources, one row a source.

(a) an LVAE student's encoder and reconstruction; (b) a classifier; (c) an autoencoder whose prior cannot be sampled, for its KL
has a weight of 1e-6 as that of Stable Diffusion's own: a surrogate from outside is the only way. The prior has seen characters of
public fonts and no handwriting. Every row has the same number of updates and the same student seeds; real images are the bar.

    python benchmarks/digits_arms.py [--only a b c] [--seeds 3] [--runs runs/benchmark-arms] [--prior zoo:glyphs-sd]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import write
from potstill import config, pipeline
from potstill.report.tables import text_table
from potstill.state import read_json

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
IMAGES = 1024
COMMON = {"n": IMAGES, "batch": 128}
NELBO = [{"kind": "posterior_kl"}, {"kind": "reconstruction"}]


def prior(path: str, **more: Any) -> dict[str, Any]:
    """A surrogate from the glyph prior with a prompt for each class."""
    return (
        COMMON
        | {
            "kind": "guided",
            "prior": path,
            "steps": 15,
            "classes": DIGITS,
            "prompts": ["the digit {}", "a handwritten digit {}", "a thin handwritten number {}", "number {}, thick"],
            "guidance_scale": 2.0,
            "clip": 0.2,
        }
        | more
    )


def scored(energy: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    """The same energies, each weight times a factor."""
    return [term | {"weight": factor * term.get("weight", 1.0)} for term in energy]


def reconstruction(path: str) -> dict[str, Any]:
    """(a) the student of an LVAE, encoder and decoder trained together on images."""
    typical = [{"kind": "typicality"}]
    return {
        "teacher": {"kind": "pretrained", "path": "zoo:digits-lvae"},
        "student": {"width": 8},
        "distill": {"generate": None, "infer": {"steps": 600, "batch": 128, "lr": 1.2e-2}},
        "surrogates": {
            "teachers-prior": COMMON | {"kind": "ancestral", "observe": "sample"},
            "unguided": prior(path, mode="off"),
            "unguided-any-class": prior(path, mode="off", classes=None, prompts=["a digit"]),
            "guided-full": prior(path, mode="full", energy=NELBO),
            "guided-clean": prior(path, mode="clean", energy=NELBO),
            "typical-full": prior(path, mode="full", energy=typical),
            "typical-clean": prior(path, mode="clean", energy=typical),
            "typical-any-class": prior(path, mode="full", energy=typical, classes=None, prompts=["a digit"]),
            "noise": COMMON | {"kind": "uniform"},
        },
        "mixtures": {
            "teachers-prior-and-typical": ["teachers-prior", "typical-full"],
            "unguided-and-typical": ["unguided", "typical-full"],
        },
    }


def classifier(path: str) -> dict[str, Any]:
    """(b) a classifier of a tenth of its teacher's size."""
    aimed = [{"kind": "cross_entropy"}]
    full = [*aimed, {"kind": "batchnorm", "weight": 0.5}]
    return {
        "teacher": {"kind": "pretrained", "path": "zoo:digits-classifier"},
        "student": {"ratio": 10},
        "distill": {"generate": None, "infer": {"steps": 600, "batch": 128, "lr": 5e-3}},
        "surrogates": {
            "inversion": COMMON | {"kind": "inversion", "energy": full, "classes": DIGITS},
            "unguided": prior(path, mode="off"),
            "guided-full": prior(path, mode="full", energy=aimed),
            "guided-clean": prior(path, mode="clean", energy=aimed),
            "guided-batchnorm": prior(path, mode="full", energy=full),
            "guided-batchnorm-far": prior(path, mode="full", energy=full, clip=0.5),
            "noise": COMMON | {"kind": "uniform"},
        },
        "mixtures": {"unguided-and-guided": ["unguided", "guided-batchnorm"]},
    }


def autoencoder(path: str, teacher: Path) -> dict[str, Any]:
    """(c) an autoencoder whose prior cannot be sampled."""
    found = [{"kind": "reconstruction"}]
    return {
        "teacher": {"kind": "pretrained", "path": str(teacher)},
        "student": {"ratio": 10},
        "distill": {
            "generate": None,
            "infer": {
                "steps": 600,
                "batch": 128,
                "lr": 5e-3,
                "elbo": 0,
                "rules": [{"nodes": "z", "weight": 0}, {"nodes": "out", "by": "mse"}],
            },
        },
        "surrogates": {
            "decoded-noise": COMMON | {"kind": "ancestral"},
            "unguided": prior(path, mode="off"),
            "guided-full": prior(path, mode="full", energy=found),
            "guided-clean": prior(path, mode="clean", energy=found),
            "noise": COMMON | {"kind": "uniform"},
        },
        "mixtures": {},
    }


def measure(name: str, experiment: dict[str, Any], runs: Path, seeds: int) -> dict[str, Any]:
    """Run one experiment through the pipeline, where it is not done yet, and return its metrics."""
    mixtures = {source: [source] for source in experiment["surrogates"]} | experiment["mixtures"]
    arms = [{"kind": "data_free", "name": arm, "surrogate": sources} for arm, sources in mixtures.items()]
    recipe = {
        "name": f"digits-arms-{name}",
        "seeds": list(range(seeds)),
        "data": {"kind": "digits"},
        "arms": [*arms, {"kind": "with_data", "name": "real-images"}],
        "evaluate": {"features": "classifier:zoo:digits-classifier", "latency_repeats": 3},
        "compute": {"threads": 1},
    }
    experiment = {key: value for key, value in experiment.items() if key != "mixtures"}
    folder = runs / name
    pipeline.execute(config.check(recipe | experiment), folder)
    metrics: dict[str, Any] = read_json(folder / "metrics.json")
    print(f"{name}\n{text_table(metrics)}", file=sys.stderr)
    return metrics


def unsampled(runs: Path) -> Path:
    """The teacher of (c): trained here, for it takes less than a minute."""
    recipe = {
        "name": "unsampled",
        "data": {"kind": "digits"},
        "train": {
            "model": {"kind": "vae", "image": [1, 8, 8], "width": 32, "latent": 16},
            "steps": 2000,
            "lr": 3e-3,
            "beta": 1e-6,
        },
        "compute": {"threads": 1},
    }
    pipeline.execute(config.check(recipe), runs / "unsampled")
    return runs / "unsampled" / "teacher"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["a", "b", "c"], choices=["a", "b", "c"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-arms"))
    parser.add_argument("--prior", default="zoo:glyphs-sd")
    arguments = parser.parse_args()
    experiments = {"a": lambda: reconstruction(arguments.prior), "b": lambda: classifier(arguments.prior)}
    experiments["c"] = lambda: autoencoder(arguments.prior, unsampled(arguments.runs))
    figure = {"a": "reconstruction_mse", "b": "accuracy", "c": "reconstruction_mse"}
    rows: list[dict[str, Any]] = []
    figures: dict[str, float] = {}
    for name in arguments.only:
        metrics = measure(name, experiments[name](), arguments.runs, arguments.seeds)
        arms = metrics["arms"]
        for arm, found in arms.items():
            made = metrics["surrogates"].get(f"surrogates/{arm}", {})
            rows.append(
                {
                    "student": name,
                    "arm": arm,
                    figure[name]: found[figure[name]],
                    **{k: made[k] for k in ("frechet", "energies") if k in made},
                }
            )
        guided = [arm for arm in arms if arm.startswith(("guided", "typical"))]
        pick = max if name == "b" else min
        best = pick(guided, key=lambda arm: arms[arm][figure[name]]["mean"])
        off = arms["unguided"][figure[name]]
        figures[f"{name}_real_images"] = arms["real-images"][figure[name]]["mean"]
        figures[f"{name}_unguided"] = off["mean"]
        figures[f"{name}_guided"] = arms[best][figure[name]]["mean"]
        spread = max(((off["sd"] ** 2 + arms[best][figure[name]]["sd"] ** 2) / 2) ** 0.5, 1e-12)
        figures[f"{name}_gain_in_sds"] = (figures[f"{name}_guided"] - off["mean"]) / spread * (1 if name == "b" else -1)
    print(f"wrote {write('digits_arms', figures, rows)}")


if __name__ == "__main__":
    main()
