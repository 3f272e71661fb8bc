"""The recipe of the published experiment, whole, at toy size: every arm, from training to the report. Its figures are a benchmark's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")

import priors
from potstill import config, pipeline

ROOT = Path(__file__).parents[1]
TOY = {"steps": 2, "batch": 4, "ema": 0.5}


@pytest.mark.slow
def test_the_whole_recipe_at_toy_size(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (60, 3, 32, 32)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", images=pictures)
    prior = str(priors.text_to_image(tmp_path / "prior")[1])
    tree = config.read_tree(ROOT / "recipes" / "cifar10-lvae.yaml")
    tree |= {"data": {"kind": "npz", "path": str(tmp_path / "data.npz"), "test_fraction": 0.4}, "seeds": [0], "student": {"width": 2}}
    tree["train"] |= TOY
    tree["train"]["model"]["width"] = 4
    for section in tree["surrogates"].values():
        section |= {"n": 6, "batch": 6}
        if section["kind"] == "guided":
            section |= {"prior": prior, "prompts_file": str(ROOT / "recipes" / "texts" / "tinyimagenet.yaml"), "steps": 2}
    for section in tree["distill"].values():
        section |= TOY
    tree["calibrate"] = TOY
    for at in (3, 5):
        tree["arms"][at]["steps"] = 3
    tree["arms"][6]["steps"] = {"generate": 3, "infer": 4}
    tree["evaluate"] = {"features": "pixels", "n": 12, "latency_repeats": 3}
    tree["compute"] = {"threads": 1, "workers": 1}
    pipeline.execute(config.check(tree), tmp_path / "run", quiet=True)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [*metrics["arms"]] == [
        "teacher",
        "teacher+calibrated",
        "student_data_free",
        "student_with_data",
        "student_scratch",
        "longer",
        "calibrated",
        "calibrated+calibrated",
        "calibrated-longer",
        "calibrated-longer+calibrated",
        "calibrated-longest",
        "calibrated-longest+calibrated",
        "mixed-unguided",
        "mixed-guided",
        "mixed-guided-full",
        "unguided",
        "guided",
    ]
    assert [metrics["arms_info"][name]["updates"] for name in ("longer", "calibrated-longest")] == [5, 7]
    assert all(figures["frechet_sqrt"]["mean"] > 0 for figures in metrics["arms"].values())
    assert set(metrics["surrogates"]) == {f"surrogates/{name}" for name in ("own", "more", "unguided", "guided", "guided-full")}
    assert (tmp_path / "run" / "report.html").exists()


def test_every_arm_but_the_longer_ones_has_as_many_updates():
    from potstill.jobs import updates

    recipe = config.read(ROOT / "recipes" / "cifar10-lvae.yaml")
    counts = {arm.title: sum(updates(recipe, arm).values()) for arm in recipe.arms}
    assert counts.pop("longer") == counts.pop("calibrated-longer") == 39000
    assert counts.pop("calibrated-longest") == 58500
    assert set(counts.values()) == {19500}
