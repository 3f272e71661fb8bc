"""Surrogates as recipes ask for them: guided by a diffusion prior, by inversion, named and put together, in rounds."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch

import priors
from potstill import config, pipeline
from potstill.families.classifier import Classifier
from potstill.synthesize import surrogate
from runs import STEPS, interrupting, results

pytest.importorskip("diffusers")
SMALL = {"n": 8, "shard": 8, "batch": 4}
GUIDED = SMALL | {
    "kind": "guided",
    "prior": "./prior",
    "steps": 2,
    "classes": ["zero", "one"],
    "prompts": ["the digit {}", "a {}"],
    "guidance_scale": 2.0,
}
NELBO = [{"kind": "posterior_kl", "weight": 0.1}, {"kind": "reconstruction"}]


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place.folder)
    os.rename(priors.text_to_image(place.folder / "made")[1], place.folder / "prior")
    return place


def classifier(folder, seed=0):
    torch.manual_seed(seed)
    Classifier((1, 8, 8), 4, 4).save_pretrained(folder)


@pytest.mark.parametrize(
    "section",
    [
        GUIDED | {"energy": NELBO, "mode": "full"},
        GUIDED | {"energy": NELBO, "mode": "clean", "decode": "linear", "repeats": 2, "scheduler": "dpmsolver++"},
        GUIDED | {"energy": [{"kind": "typicality", "n": 8}, {"kind": "total_variation", "start": 0.5}], "save_memory": True},
        GUIDED | {"mode": "off", "scheduler": "lcm"},
        SMALL | {"kind": "inversion", "steps": 3, "energy": NELBO, "jitter": 1},
        SMALL | {"kind": "latent", "steps": 3, "energy": [{"kind": "posterior_kl", "nodes": "z1"}]},
        SMALL | {"kind": "uniform", "energy": NELBO},
        SMALL | {"sweeps": 2, "energy": NELBO},
    ],
    ids=lambda section: "-".join(str(section.get(k)) for k in ("kind", "mode", "decode") if k in section),
)
def test_each_kind_makes_a_surrogate(here, section):
    assert here.run("synthesize", surrogate=section) == 0
    folder = here.out / "surrogate"
    assert surrogate.read(folder).shape == (8, 1, 8, 8)
    columns = surrogate.columns(folder)
    energies = {name.removeprefix("energy.") for name in columns if name.startswith("energy.")}
    wanted = {term["kind"] for term in section.get("energy", ())}
    assert {name.partition(" ")[0] for name in energies} == wanted
    assert all(np.isfinite(columns[f"energy.{name}"]).all() for name in energies)
    if "classes" in section:
        assert columns["label"] == [0, 1] * 4
        assert all(prompt.endswith(("zero", "one")[label]) for prompt, label in zip(columns["prompt"], columns["label"], strict=True))
    if section.get("kind") in ("guided", "inversion", "latent"):
        with np.load(folder / "steps.npz") as steps:
            count = section["steps"]
            assert steps["level"].shape == (count,)
            assert steps["images"].shape[1:] == (4, 1, 8, 8)
            assert all(steps[f"energy.{name}"].shape == (count,) for name in energies)
            assert np.isfinite(steps["level"]).all()


def test_a_later_terms_course_begins_when_it_does(here):
    energy = [{"kind": "l2"}, {"kind": "total_variation", "start": 0.5}]
    assert here.run("synthesize", surrogate=GUIDED | {"energy": energy, "steps": 4}) == 0
    with np.load(here.out / "surrogate" / "steps.npz") as steps:
        assert np.isnan(steps["energy.total_variation"]).tolist() == [True, True, False, False]
        assert not np.isnan(steps["energy.l2"]).any()


def test_arms_train_on_the_surrogates_they_name(here):
    sections = {
        "surrogate": None,
        "surrogates": {"own": SMALL, "noise": SMALL | {"kind": "uniform"}},
        "arms": [
            {"kind": "data_free", "name": "a", "surrogate": "own"},
            {"kind": "data_free", "name": "b", "surrogate": "noise"},
            {"kind": "data_free", "name": "c", "surrogate": ["own", "noise"]},
            {"kind": "data_free", "name": "d", "surrogate": "own", "start": "surrogate"},
            {"kind": "data_free", "name": "e", "surrogate": "own", "start": "noise"},
            {"kind": "data_free", "name": "f", "surrogate": "noise", "start": "own"},
        ],
    }
    assert here.run("synthesize", **sections) == 0
    assert here.run("distill", **sections) == 0
    weights = {name: (here.out / "students" / name / "seed-0" / "model.safetensors").read_bytes() for name in "abcdef"}
    assert weights["a"] == weights["e"]
    assert len(set(weights.values())) == 5
    shop = pipeline.Run(config.check(here.recipe | sections), here.out, (), None).shop
    recipe = shop.recipe
    images = {arm.name: shop.images_of(arm, "infer") for arm in recipe.arms}
    assert np.array_equal(images["c"], np.concatenate([images["a"], images["b"]]))
    assert not np.array_equal(images["a"], images["b"])
    starts = {arm.name: shop.images_of(arm, "generate") for arm in recipe.arms}
    assert [name for name, pool in starts.items() if pool is not None] == ["d", "f"]
    assert all(np.array_equal(starts[name], images["a"]) for name in "df")


def rounds(**more):
    energy = [{"kind": "cross_entropy"}, {"kind": "disagreement", "weight": 5}]
    return {
        "teacher": {"kind": "pretrained", "path": "./judge"},
        "surrogate": SMALL | {"kind": "inversion", "steps": 2, "energy": energy, "classes": ["a", "b", "c", "d"]},
        "distill": {"generate": None, "infer": STEPS | {"steps": 6}, "rounds": 3} | more,
        "evaluate": None,
        "report": None,
    }


def test_rounds_alternate_synthesis_and_distillation(here):
    classifier(here.folder / "judge")
    assert here.run("run", **rounds()) == 0
    student = here.out / "students" / "student_data_free" / "seed-0"
    first, *later = [here.out / "surrogate", *(student / f"round-{i}" / "surrogate" for i in (2, 3))]
    assert "energy.disagreement" not in surrogate.columns(first)
    for folder in later:
        assert np.isfinite(surrogate.columns(folder)["energy.disagreement"]).all()
    images = [surrogate.read(folder) for folder in (first, *later)]
    assert not np.array_equal(images[1], images[2])
    log = [json.loads(line) for line in (student / "log.jsonl").read_text().splitlines()]
    assert [(entry["phase"], entry["step"]) for entry in log] == [(f"infer-{i}", step) for i in (1, 2, 3) for step in (1, 2)]
    assert json.loads((student / "job.json").read_text())["updates"] == {"infer-1": 2, "infer-2": 2, "infer-3": 2}


def test_rounds_that_are_cut_short_go_on_to_the_same_bits(here, monkeypatch):
    classifier(here.folder / "judge")
    assert here.run("run", **rounds()) == 0
    whole = results(here.out)
    left = interrupting(monkeypatch)
    out = here.folder / "again"
    codes = []
    for after in (5, 4, 1 << 30):
        left[0] = after
        codes.append(pipeline_code(here, out))
    assert codes == [130, 130, 0]
    assert results(out) == whole


def pipeline_code(here, out):
    from potstill.cli import main

    return main(["run", str(here.write(**rounds())), "--out", str(out), "--quiet"])


def told(here, capsys, **sections):
    """The one line with which the command refuses the recipe, and sees that nothing was written."""
    assert here.run("synthesize", **sections) == 2
    assert not here.out.exists()
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("section", "what"),
    [
        (GUIDED | {"prior": "./nowhere"}, "no such folder"),
        (GUIDED | {"prior": "zoo:nothing"}, "no such prior in the zoo"),
        (GUIDED | {"prompts": None}, "it reads text; give prompts"),
        (GUIDED | {"prompts": None, "prompts_file": "texts.yaml"}, "no prompts for one; a list for each class"),
        (GUIDED | {"prompts": None, "prompts_file": "nowhere.yaml"}, "nowhere.yaml: no such file"),
        (GUIDED | {"energy": [{"kind": "cross_entropy"}]}, "the teacher is a LVAE"),
        (GUIDED | {"energy": [{"kind": "activation_summary"}]}, "activations.safetensors"),
        (GUIDED | {"energy": [{"kind": "python", "target": "elsewhere:thing"}]}, "add --import elsewhere"),
        (GUIDED | {"decode": "tiny", "tiny": "./nowhere"}, "cannot be loaded"),
        (SMALL | {"kind": "latent", "generator": "./judge", "energy": NELBO}, "does not generate"),
    ],
)
def test_what_cannot_be_made_is_one_line(here, capsys, section, what):
    classifier(here.folder / "judge")
    (here.folder / "texts.yaml").write_text("zero: [the digit zero]")
    assert what in told(here, capsys, surrogate=section)


@pytest.mark.parametrize(
    ("text", "what"),
    [("{a: [b]}", "the recipe names no classes"), ("7", "a list of texts is expected"), ("[a, 3]", "a list of texts"), ("[]", "a list of")],
)
def test_a_file_of_texts_alone_is_a_list(here, capsys, text, what):
    section = GUIDED | {"mode": "off", "classes": None, "prompts": None, "prompts_file": "texts.yaml"}
    (here.folder / "texts.yaml").write_text(text)
    assert what in told(here, capsys, surrogate=section)


def test_texts_of_a_file_without_classes_are_drawn_by_chance(here):
    section = GUIDED | {"mode": "off", "classes": None, "prompts": None, "prompts_file": "texts.yaml"}
    (here.folder / "texts.yaml").write_text("[one, two, three]")
    assert here.run("synthesize", surrogate=section) == 0
    found = surrogate.columns(here.out / "surrogate")["prompt"]
    assert set(found) <= {"one", "two", "three"}
    assert len(set(found)) > 1


def test_a_prior_of_other_proportions_is_refused(here, capsys):
    from potstill.families.lvae import LVAE

    torch.manual_seed(0)
    LVAE((1, 8, 16), 4, 2, 2).save_pretrained(here.folder / "wide")
    assert "the proportions differ" in told(here, capsys, surrogate=GUIDED, teacher={"kind": "pretrained", "path": "./wide"})


@pytest.mark.parametrize(
    ("section", "what"),
    [
        (GUIDED | {"classes": None}, "prompts with {} need classes"),
        (GUIDED | {"prompts_file": "x"}, "not both"),
        (GUIDED | {"repeats": 2}, "repeats goes with mode clean"),
        (GUIDED | {"tiny": "x"}, "go together"),
        (SMALL | {"energy": [{"kind": "l2"}, {"kind": "l2"}]}, "two are the same: l2"),
        (SMALL | {"energy": [{"kind": "l2", "start": 0.7, "stop": 0.5}]}, "after its stop"),
        (SMALL | {"energy": [{"kind": "python"}]}, "kind python needs one"),
        (SMALL | {"energy": [{"kind": "disagreement"}]}, "set distill.rounds above 1"),
    ],
)
def test_what_does_not_fit_together_is_one_line(here, capsys, section, what):
    assert what in told(here, capsys, surrogate=section)


def test_other_texts_in_the_same_file_are_refused(here, capsys):
    texts = here.folder / "texts.yaml"
    section = GUIDED | {"mode": "off", "prompts": None, "prompts_file": "texts.yaml"}
    texts.write_text("{zero: [the digit zero], one: [the digit one]}")
    assert here.run("synthesize", surrogate=section) == 0
    assert here.run("synthesize", surrogate=section) == 0
    texts.write_text("{zero: [the digit zero], one: [another one]}")
    assert here.run("synthesize", surrogate=section) == 2
    assert "differs: files.surrogate.prompts" in capsys.readouterr().err


def test_an_arm_that_names_an_unknown_surrogate(here, capsys):
    line = told(here, capsys, surrogates={"a": SMALL}, arms=[{"kind": "data_free", "surrogate": "b"}])
    assert "surrogate b is not among surrogates, which has a" in line


def test_ones_own_energy(here, monkeypatch):
    (here.folder / "mine.py").write_text("def warmth(view):\n    return view.x.flatten(1).mean(1)\n")
    monkeypatch.syspath_prepend(str(here.folder))
    section = GUIDED | {"energy": [{"kind": "python", "target": "mine:warmth", "weight": 2}]}
    assert here.run("synthesize", "--import", "mine", surrogate=section) == 0
    found = surrogate.columns(here.out / "surrogate")["energy.warmth"]
    images = surrogate.read(here.out / "surrogate") / 255
    assert np.allclose(found, 2 * images.reshape(8, -1).mean(1), atol=0.02)
