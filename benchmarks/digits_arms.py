"""Where does guidance help? Three kinds of student on real digits, each trained on images from many sources, one row a source.

(a) an LVAE student's encoder and reconstruction, its generator learned on the teacher's noise first, as in the demo; (b) a classifier;
(c) an autoencoder whose prior cannot be sampled, for its KL has a weight of 1e-6 as that of Stable Diffusion's own: a surrogate from
outside is the only way. The prior has seen characters of public fonts and no handwriting. Every row has the same number of updates and
the same student seeds; real images are the bar.

    python benchmarks/digits_arms.py [--only a b c] [--seeds 3] [--runs runs/benchmark-arms] [--prior zoo:glyphs-sd]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from common import gain_in_sds, write
from potstill import config, pipeline
from potstill.report.tables import text_table
from potstill.state import read_json

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COMMON = {"n": 512, "batch": 128}
BATCHNORM = {"kind": "batchnorm", "weight": 5.0}
CROSS_ENTROPY = {"kind": "cross_entropy"}
RECONSTRUCTION = {"kind": "reconstruction"}
NELBO = ({"kind": "posterior_kl"}, RECONSTRUCTION)
TYPICALITY = {"kind": "typicality"}
# Every arm of a mixture has as many images of each source.
MIXTURES = {
    "unguided-both": ["unguided", "unguided-class"],
    "guided-and-unguided-class": ["guided", "unguided-class"],
    "guided-both": ["guided", "guided-class"],
}
# Of each pair, the prompts, the steps and the number of images are the same; what differs is the teacher's say, and the noise drawn.
PAIRS = (("guided", "unguided"), ("guided-class", "unguided-class"), ("guided-both", "unguided-both"))


def prior(path: str, *energy: dict[str, Any], mode: str = "clean", **more: Any) -> dict[str, Any]:
    """A surrogate of any characters from the glyph prior; unguided without an energy."""
    section: dict[str, Any] = COMMON | {
        "kind": "guided",
        "prior": path,
        "steps": 10,
        "prompts": ["a digit", "a letter", "a character"],
        "mode": mode if energy else "off",
        "energy": list(energy),
        "clip": 0.5,
        "repeats": 2 if energy and mode == "clean" else 1,
    }
    return section | more


def of_class(path: str, *energy: dict[str, Any]) -> dict[str, Any]:
    """The same with prompts for each class, and classifier-free guidance."""
    wordings = ["the digit {}", "a handwritten digit {}", "a thin handwritten number {}", "number {}, thick"]
    return prior(path, *energy, classes=DIGITS, prompts=wordings, guidance_scale=2.0)


def reconstruction(path: str) -> dict[str, Any]:
    """(a) the student of an LVAE: its generator on the teacher's noise, then its encoder on images."""
    return {
        "teacher": {"kind": "pretrained", "path": "zoo:digits-lvae"},
        "student": {"width": 8},
        "distill": {
            "generate": {"steps": 600, "batch": 128, "lr": 2e-2, "ema": 0.98},
            "infer": {"steps": 600, "batch": 128, "lr": 5e-3, "ema": 0.98},
        },
        "surrogates": {
            "teachers-prior": COMMON | {"kind": "ancestral", "observe": "sample"},
            "unguided": prior(path),
            "guided": prior(path, BATCHNORM),
            "guided-full": prior(path, BATCHNORM, mode="full"),
            "guided-elbo": prior(path, *NELBO),
            "guided-typicality": prior(path, TYPICALITY),
            "unguided-class": of_class(path),
            "guided-class": of_class(path, BATCHNORM),
            "noise": COMMON | {"kind": "uniform"},
        },
        "mixtures": MIXTURES | {"teachers-prior-and-guided": ["teachers-prior", "guided"]},
    }


def classifier(path: str) -> dict[str, Any]:
    """(b) a classifier of a tenth of its teacher's size."""
    return {
        "teacher": {"kind": "pretrained", "path": "zoo:digits-classifier"},
        "student": {"ratio": 10},
        "distill": {"generate": None, "infer": {"steps": 600, "batch": 128, "lr": 5e-3, "ema": 0.98}},
        "surrogates": {
            "inversion": COMMON | {"kind": "inversion", "energy": [CROSS_ENTROPY, BATCHNORM], "classes": DIGITS},
            "unguided": prior(path),
            "guided": prior(path, BATCHNORM),
            "guided-full": prior(path, BATCHNORM, mode="full"),
            "unguided-class": of_class(path),
            "guided-class": of_class(path, BATCHNORM),
            "guided-class-cross-entropy": of_class(path, CROSS_ENTROPY),
            "noise": COMMON | {"kind": "uniform"},
        },
        "mixtures": MIXTURES,
    }


def autoencoder(path: str, teacher: Path) -> dict[str, Any]:
    """(c) an autoencoder whose prior cannot be sampled."""
    output_alone = [{"nodes": "z", "weight": 0}, {"nodes": "out", "by": "mse"}]
    return {
        "teacher": {"kind": "pretrained", "path": str(teacher)},
        "student": {"ratio": 10},
        "distill": {
            "generate": None,
            "infer": {"steps": 600, "batch": 128, "lr": 5e-3, "ema": 0.98, "elbo": 0, "rules": output_alone},
        },
        "surrogates": {
            "decoded-noise": COMMON | {"kind": "ancestral"},
            "unguided": prior(path),
            "guided": prior(path, BATCHNORM),
            "guided-full": prior(path, BATCHNORM, mode="full"),
            "guided-reconstruction": prior(path, RECONSTRUCTION),
            "unguided-class": of_class(path),
            "guided-class": of_class(path, BATCHNORM),
            "noise": COMMON | {"kind": "uniform"},
        },
        "mixtures": MIXTURES,
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
        figures[f"{name}_real_images"] = arms["real-images"][figure[name]]["mean"]
        for guided, off in PAIRS:
            a, b = arms[guided][figure[name]], arms[off][figure[name]]
            figures[f"{name}_{off}"], figures[f"{name}_{guided}"] = b["mean"], a["mean"]
            figures[f"{name}_{guided}_gain_in_sds"] = gain_in_sds(b, a) * (1 if name == "b" else -1)
    print(f"wrote {write('digits_arms', figures, rows)}")


if __name__ == "__main__":
    main()
