"""Looking for copies of training images: a model that returns them is found, one that does not is left in peace."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from potstill import config, load
from potstill.data import floats
from potstill.data import load as load_data
from potstill.evaluate import memorization
from potstill.evaluate.arms import samples
from potstill.evaluate.memorization import Memorization, Neighbors, nearest
from potstill.model import Images, Model
from potstill.noise import Noise
from potstill.report.tables import privacy_of
from potstill.synthesize import surrogate


def faces(n, seed):
    """Images of three features and some noise, none like another."""
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(99).normal(0, 25, (3, 64))
    return np.clip(128 + rng.normal(size=(n, 3)) @ basis + rng.normal(0, 8, (n, 64)), 0, 255).astype(np.uint8).reshape(n, 1, 8, 8)


TRAIN, TEST = faces(400, 0), faces(300, 1)
EXPECTED = 400 / 700  # share of images nearer to a training image than to a held-out one, if neither was learned by heart


def returning(images, share=1.0, others=None):
    """A model that returns one of the images, and with some chance one of the others; both are chosen by its noise."""
    pools = [floats(images), floats(images if others is None else others)]

    def generate(sample):
        which, coin = sample.noise.uniform("which", (sample.n,)), sample.noise.uniform("coin", (sample.n,))
        drawn = [pool[(which * len(pool)).long()] for pool in pools]
        return torch.where((coin < share)[:, None, None, None], *drawn)

    return Model(nn.Linear(1, 1), Images((1, 8, 8)), generate)


def figures_of(model, n=200):
    test = Memorization.of(TRAIN, TEST)
    return test.figures(test.neighbors(samples(model, n, Noise((5,)), 64)))


# ------------------------------------------------------------------ who is found


def test_a_model_that_returns_training_images_is_found():
    found = figures_of(returning(TRAIN))
    assert found["near"] == 1
    assert found["train_nearest"] == 1
    assert found["median_ratio"] == 0
    assert found["near_p_value"] < 1e-10
    assert found["train_nearest_p_value"] < 1e-10


def test_a_model_that_returns_unseen_or_held_out_images_is_not():
    for images in (faces(1000, 2), TEST):
        found = figures_of(returning(images))
        assert found["near"] < 0.04
        assert found["near_p_value"] > 0.05
        assert found["train_nearest_p_value"] > 0.05
        assert found["median_ratio"] == pytest.approx(1, abs=0.1)
    unseen = figures_of(returning(faces(1000, 2)))["train_nearest"]
    assert unseen == pytest.approx(EXPECTED, abs=4 * math.sqrt(EXPECTED * (1 - EXPECTED) / 200))
    assert figures_of(returning(TEST))["train_nearest"] == 0


def test_one_copy_in_ten_is_found():
    found = figures_of(returning(TRAIN, 0.1, others=faces(1000, 2)))
    assert 0.05 < found["near"] < 0.2
    assert found["near_p_value"] < 1e-3


def test_smooth_images_are_near_and_the_second_test_tells_them_from_copies():
    smooth = faces(6000, 2).reshape(1500, 4, 1, 8, 8).mean(1).astype(np.uint8)
    found = figures_of(returning(smooth))
    assert found["near_p_value"] < 1e-3
    assert found["median_ratio"] < 0.95
    assert found["train_nearest_p_value"] > 0.05
    assert found["train_nearest"] == pytest.approx(EXPECTED, abs=4 * math.sqrt(EXPECTED * (1 - EXPECTED) / 200))


# ------------------------------------------------------------------ the numbers


def test_distances_are_those_of_every_pair(monkeypatch):
    images = floats(faces(30, 4))
    every = (images.numpy()[:, None].astype(np.float64) - TRAIN[None] / 255).reshape(30, 400, 64)
    expected = np.sqrt((every**2).sum(2)).min(1)
    places = (every**2).sum(2).argmin(1)

    def check():
        distances, found = nearest(images, TRAIN)
        np.testing.assert_allclose(distances, expected, rtol=1e-6)
        assert (found == places).all()

    check()
    monkeypatch.setattr(memorization, "_QUERIES", 7)
    monkeypatch.setattr(memorization, "row_blocks", lambda rows, columns: (slice(i, min(i + 33, rows)) for i in range(0, rows, 33)))
    check()
    assert (nearest(floats(TRAIN[37:137]), TRAIN)[0] == 0).all()


def apart_of(distances):
    return Neighbors(np.array(distances), np.zeros(len(distances), np.int64))


def test_the_first_p_value_is_the_chance_of_the_ranks():
    """Of three baseline and two other distances, all ten orders are as likely: one has both others first, four at least one."""
    test = Memorization(TRAIN, TEST[:3], np.array([3.0, 1.0, 2.0]))
    assert test.about()["threshold"] == 1
    assert test.about()["near_expected"] == 0.25
    values = {count: test.figures(apart_of([0.5 if i < count else 5.0 for i in range(2)]))["near_p_value"] for count in range(3)}
    assert values == pytest.approx({0: 1, 1: 0.4, 2: 0.1})


def test_the_second_p_value_is_the_chance_of_the_split():
    """Of two training and two held-out images, both that are nearest to any are training images in one of six splits."""
    test = Memorization(TRAIN[:2], TEST[:2], np.array([1.0, 2.0]))
    values = {
        places: test.figures(Neighbors(np.ones(4), np.array(places)))["train_nearest_p_value"] for places in ((0, 1, 1, 1), (0, 2, 2, 0))
    }
    assert values == pytest.approx({(0, 1, 1, 1): 1 / 6, (0, 2, 2, 0): 5 / 6})


def test_smooth_images_seldom_have_a_small_p_value_whatever_the_split():
    rng = np.random.default_rng(0)
    real, smooth = faces(150, 7), floats(faces(600, 8).reshape(150, 4, 1, 8, 8).mean(1).astype(np.uint8))
    small = 0
    for _ in range(200):
        order = rng.permutation(150)
        test = Memorization.of(real[order[:100]], real[order[100:]])
        small += test.figures(test.neighbors(smooth))["train_nearest_p_value"] <= 0.05
    assert small <= 0.05 * 200 + 3 * math.sqrt(200 * 0.05 * 0.95)


def test_distances_of_one_origin_seldom_have_a_small_p_value():
    rng = np.random.default_rng(0)
    small = 0
    for _ in range(400):
        test = Memorization(TRAIN, TEST, rng.gamma(3, size=300))
        small += test.figures(apart_of(rng.gamma(3, size=250)))["near_p_value"] <= 0.05
    assert small <= 0.05 * 400 + 3 * math.sqrt(400 * 0.05 * 0.95)


def test_held_out_images_that_are_copies_are_no_baseline():
    test = Memorization.of(TRAIN, np.concatenate([TEST, TRAIN[:20]]))
    assert test.about() | {"train_nearest_expected": 0} == Memorization.of(TRAIN, TEST).about() | {
        "held_out": 320,
        "held_out_copies": 20,
        "train_nearest_expected": 0,
    }
    with pytest.raises(ValueError, match="every held-out image is among the training images"):
        Memorization.of(TRAIN, TRAIN[:20])


# ------------------------------------------------------------------ in a run


@pytest.mark.parametrize("reference", ["data", "teacher"])
def test_a_run_looks_for_copies_where_it_is_asked_to(place, reference):
    evaluate = {"n": 16, "latency_repeats": 3, "privacy": True, "reference": reference}
    assert place.run("run", evaluate=evaluate, seeds=[0, 1]) == 0
    found = json.loads((place.out / "metrics.json").read_text())["privacy"]
    data = load_data(config.read(place.folder / "recipe.yaml").data)
    assert (found["training"], found["held_out"]) == (len(data.train.images), 16)

    def apart(images):
        every = torch.cdist(images.flatten(1).double(), floats(data.train.images).flatten(1).double())
        return every.amin(1).numpy()

    baseline = apart(floats(data.test.images[:16]))
    assert found["threshold"] == pytest.approx(baseline.min(), rel=1e-5)
    students = [load(place.out / "students" / "student_data_free" / f"seed-{seed}") for seed in (0, 1)]
    drawn = {
        "teacher": [load(place.folder / "teacher").sample(16, Noise((0, seed, "evaluate"))) for seed in (0, 1)],
        "student_data_free": [student.sample(16, Noise((0, seed, "evaluate"))) for seed, student in enumerate(students)],
        "surrogate": [floats(surrogate.read(place.out / "surrogate")[:16])],
    }
    assert set(found["sets"]) == set(drawn)
    for name, images in drawn.items():
        own = apart(torch.cat(images))
        assert found["sets"][name]["images"] == len(own)
        assert found["sets"][name]["near"] == pytest.approx((own < baseline.min()).mean())
        assert found["sets"][name]["median_ratio"] == pytest.approx(np.median(own) / np.median(baseline), rel=1e-4)
    page = (place.out / "report.html").read_text("utf-8")
    assert "This is no proof of privacy." in page
    assert "Expected without copies" in page


def test_a_run_that_is_not_asked_to_does_not(place):
    assert place.run("run") == 0
    metrics = json.loads((place.out / "metrics.json").read_text())
    assert "privacy" not in metrics
    assert privacy_of(metrics) == ([], [])
    assert "Copies of training images" not in (place.out / "report.html").read_text("utf-8")


def test_a_run_whose_held_out_images_are_training_images_is_one_line(place, capsys):
    images = np.load(place.folder / "data.npz")["images"]
    np.savez(place.folder / "data.npz", images=images)
    np.savez(place.folder / "same.npz", images=images[:20])
    data = {"kind": "npz", "path": "data.npz", "test_path": "same.npz"}
    assert place.run("run", data=data, evaluate={"n": 16, "latency_repeats": 3, "privacy": True}) == 2
    assert "evaluate.privacy: every held-out image is among the training images" in capsys.readouterr().err


def test_without_data_there_is_nothing_to_look_for(place, capsys):
    for reference in ("data", "teacher"):
        assert place.run("run", data=None, evaluate={"privacy": True, "reference": reference}) == 2
        assert capsys.readouterr().err == "potstill: evaluate.privacy: needs data, whose training images it looks for\n"


@pytest.mark.parametrize("privacy", [None, 3, [], {"sets": 3}, {"sets": {"teacher": "x", "other": {"near": 1}}, "near_expected": "x"}])
def test_a_section_that_is_none_is_no_error(privacy):
    rows, columns = privacy_of({"privacy": privacy, "arms": {"teacher": {"frechet": 1.0}}})
    assert [row.key for row in rows] in ([], ["teacher", ""])
    assert bool(rows) == bool(columns)
