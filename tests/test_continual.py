"""Continual learning: new images while the old model's own are replayed; students that begin as their teacher; figures by group."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from potstill.data import Split
from potstill.distill.distiller import Continual, Stacked, likelihood
from potstill.divergence import Match
from potstill.errors import BadInput
from potstill.evaluate.arms import shares
from potstill.families.classifier import Classifier
from potstill.families.lvae import LVAE
from potstill.noise import Noise
from potstill.report.tables import metric_of, text_table
from potstill.trace import run
from runs import STEPS, Place, cut_at, results, teacher

N = 6
OLD, NEW = [0, 1], [2, 3]
SECTIONS = {
    "student": {"start": "teacher"},
    "surrogate": None,
    "distill": {"labels": NEW, "continual": STEPS, "scratch": STEPS},
    "arms": [
        {"kind": "continual", "name": "with-replay"},
        {"kind": "scratch", "name": "without-replay"},
        {"kind": "scratch", "name": "everything", "labels": OLD + NEW},
    ],
    "evaluate": {"n": 24, "latency_repeats": 3, "groups": {"old": OLD, "new": NEW}},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def pair():
    return teacher().model().frozen(), teacher().train().model()


def loss(images, noise=Noise((3,)), **arguments):
    old, student = pair()
    return Continual(old, student, likelihood(student), (Match("z*"), Match("out")), **arguments)(noise, images)


def test_a_copy_loses_nothing_on_what_is_replayed_by_its_generator():
    old, student = pair()
    student.net.eval()
    losses = Continual(old, student, likelihood(student), (Match("z*"), Match("out")))(Noise((3,)), Noise((9,)).uniform("x", (N, 1, 8, 8)))
    assert {name.partition(".")[0] for name in losses} == {"new", "old", "replay"}
    assert all(part.shape == (N,) for part in losses.values())
    assert all(torch.equal(part, torch.zeros(N)) for name, part in losses.items() if name.startswith("replay."))


def test_new_images_and_replayed_ones_are_weighed_and_seen_by_batchnorm_together():
    x, noise = Noise((9,)).uniform("x", (N, 1, 8, 8)), Noise((3,))
    old, student = pair()
    replayed = run(old.generate, noise=noise.fold("replay"), n=N).output
    parts = likelihood(student)(Stacked(noise, noise.fold("replayed")), torch.cat([x, replayed]))
    found = loss(x, noise, new=0.25, elbo=2.0)
    for name, part in parts.items():
        torch.testing.assert_close(found[f"new.{name}"], 0.25 * part[:N])
        torch.testing.assert_close(found[f"old.{name}"], 0.75 * 2.0 * part[N:])


def test_as_published_the_old_images_are_not_inferred():
    found = loss(Noise((9,)).uniform("x", (N, 1, 8, 8)), elbo=0.0)
    assert not any(name.startswith("old.") for name in found)
    assert any(name.startswith("replay.") for name in found)


def test_the_replayed_batch_does_not_depend_on_the_new_one_and_differs_by_noise():
    first, second = (loss(Noise((seed,)).uniform("x", (N, 1, 8, 8)), elbo=0.0) for seed in (10, 11))
    other = loss(Noise((9,)).uniform("x", (N, 1, 8, 8)), Noise((4,)), elbo=0.0)
    assert torch.equal(first["replay.out"], second["replay.out"])
    assert not torch.equal(first["new.out"], second["new.out"])
    assert not torch.equal(first["replay.out"], other["replay.out"])


def test_the_gradient_of_replay_leads_back_to_the_teacher():
    """A student that has moved away is pulled back by replay alone."""
    old, student = pair()
    student.net.eval()
    with torch.no_grad():
        for p in student.net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    objective = Continual(old, student, likelihood(student), (Match("z*"), Match("out")), elbo=0.0)
    optimizer, found = torch.optim.Adam(student.net.parameters(), 1e-2), []
    for step in range(30):
        parts = objective(Noise((step,)), Noise((9,)).uniform("x", (N, 1, 8, 8)))
        replay = sum(part.mean() for name, part in parts.items() if name.startswith("replay."))
        found.append(replay.item())
        optimizer.zero_grad()
        replay.backward()
        optimizer.step()
    assert sum(found[-5:]) < 0.5 * sum(found[:5])
    assert all(p.grad is None for p in old.net.parameters())


def test_the_noise_of_two_batches_is_that_of_each():
    a, b = Noise((1,)), Noise((2,))
    for draw in ("normal", "uniform"):
        found = getattr(Stacked(a, b), draw)("z", (2 * N, 3))
        assert torch.equal(found, torch.cat([getattr(source, draw)("z", (N, 3)) for source in (a, b)]))
    assert Stacked(a, b).fold("more") == Stacked(a.fold("more"), b.fold("more"))


# ------------------------------------------------------------------ images by label


def test_images_of_some_labels():
    split = Split(np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1), np.array([0, 1, 2, 1, 0]), tuple("abcde"))
    found = split.of([1, 0])
    assert found.images.ravel().tolist() == [0, 1, 3, 4]
    assert found.labels.tolist() == [0, 1, 1, 0]
    assert found.captions == tuple("abde")
    assert split.of(None) is split
    with pytest.raises(BadInput, match="1 images of the labels 2; two or more"):
        split.of([2])
    with pytest.raises(BadInput, match="no labels"):
        Split(split.images, None).of([1])


def test_each_arm_sees_the_images_it_is_meant_to(place, monkeypatch):
    from potstill import jobs

    seen = {}
    whole = jobs._from_scratch

    def watched(shop, model, adversary, training, name, classifier, train, shared):
        seen[name, len(train.images)] = set(train.labels.tolist())
        return whole(shop, model, adversary, training, name, classifier, train, shared)

    monkeypatch.setattr(jobs, "_from_scratch", watched)
    assert place.run("run", **SECTIONS) == 0
    assert sorted(map(sorted, seen.values())) == [OLD + NEW, NEW, NEW]


# ------------------------------------------------------------------ whole runs


def test_a_run(place):
    assert place.run("run", **SECTIONS) == 0
    metrics = json.loads((place.out / "metrics.json").read_text())
    for figures in metrics["arms"].values():
        for key in ("reconstruction_mse", "kl", "nelbo", "share"):
            assert figures[f"{key}/old"]["mean"] >= 0
            assert figures[f"{key}/new"]["mean"] >= 0
        assert figures["share/old"]["mean"] + figures["share/new"]["mean"] == pytest.approx(1)
        assert min(g := [figures[f"reconstruction_mse/{k}"]["mean"] for k in ("old", "new")]) <= figures["reconstruction_mse"]["mean"]
        assert figures["reconstruction_mse"]["mean"] <= max(g)
    note = metrics["arms_info"]["with-replay"]["note"]
    assert note == "from the teacher's weights, the ELBO on new real images, and the teacher's own replayed; 3 continual updates"
    assert metrics["arms_info"]["without-replay"]["note"].startswith("from the teacher's weights, the ELBO on real images, no teacher")
    table = text_table(metrics)
    assert "old recon MSE" in table
    assert "new share" in table
    card = (place.out / "students" / "with-replay" / "seed-0" / "README.md").read_text()
    assert "from its teacher's weights, on new real images, with its teacher's own replayed: 3 updates of continual" in card
    page = (place.out / "report.html").read_text()
    assert "Reconstruction MSE, old" in page


def test_a_student_begins_as_its_teacher(place):
    place.recipe["distill"] = {"scratch": STEPS | {"lr": 1e-12, "steps": 1, "ema": 0.0}}
    assert place.run("distill", student={"start": "teacher"}, surrogate=None, arms=["scratch"]) == 0
    found, own = LVAE.from_pretrained(place.out / "student"), LVAE.from_pretrained(place.folder / "teacher")
    for (name, a), b in zip(found.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=name)


def test_a_run_that_is_cut_short_goes_on_to_the_same_bits(place, monkeypatch):
    assert place.run("run", **SECTIONS) == 0
    expected = results(place.out)
    shutil.rmtree(place.out)
    cut_at(monkeypatch, 2, 4)
    codes = [place.run("run", **SECTIONS) for _ in range(3)]
    assert codes == [130, 130, 0]
    assert results(place.out) == expected


# ------------------------------------------------------------------ bad input


def test_what_cannot_be_replayed_is_named(place, capsys):
    torch.manual_seed(0)
    Classifier((1, 8, 8), 4, 4).save_pretrained(place.folder / "teacher")
    distill = {"generate": None, "continual": STEPS}
    assert place.run("run", student={"width": 2}, surrogate=None, distill=distill, arms=["continual"]) == 2
    assert "continual is for teachers that generate and infer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"evaluate": SECTIONS["evaluate"] | {"groups": {"none": [9]}}}, "evaluate.groups.none: none of its labels"),
        ({"distill": SECTIONS["distill"] | {"labels": [9]}}, "data: 0 images of the labels 9"),
        ({"student": {"start": "teacher", "width": 2}}, "give exactly one of width, ratio, budget, target, net and start"),
        ({"student": {"start": "teacher", "encoder": True}}, "encoder goes with width, ratio or budget"),
        ({"distill": SECTIONS["distill"] | {"continual": STEPS | {"new": 1.0}}}, "distill.continual.new"),
        ({"distill": SECTIONS["distill"] | {"continual": STEPS | {"elbo": 0}}}, "nothing is replayed"),
        ({"arms": [{"kind": "continual", "replay": "z*"}]}, "a continual arm has one phase of its own"),
        ({"arms": [{"kind": "data_free", "labels": [1]}]}, "labels are of arms with real images"),
        ({"arms": ["continual"], "data": None, "evaluate": None, "report": None}, "with_data, scratch and continual need data"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(place, capsys, sections, expected):
    assert place.run("run", **(SECTIONS | sections)) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert not (place.out / "students").exists()


def test_a_group_without_labels(place, capsys):
    images = np.load(place.folder / "data.npz")["images"]
    np.savez(place.folder / "data.npz", images=images)
    assert place.run("run", **(SECTIONS | {"distill": {"continual": STEPS, "scratch": STEPS}, "arms": ["continual"]})) == 2
    assert "evaluate.groups: the data has no labels" in capsys.readouterr().err


# ------------------------------------------------------------------ figures


def test_shares_are_of_the_nearest_real_image():
    real = np.array([[0.0], [1.0], [10.0], [11.0], [5.0]], np.float32)
    groups = {"low": np.array([0, 1]), "high": np.array([2, 3])}
    generated = np.array([[0.2], [0.9], [9.0], [5.2]], np.float32)  # the last is nearest to one that is in no group
    assert shares(generated, real, groups) == {"low": 0.75, "high": 0.25}


def test_a_figure_of_a_group_is_described_as_its_whole():
    found = metric_of("reconstruction_mse/old")
    assert (found.key, found.better, found.label) == ("reconstruction_mse/old", "lower", "Reconstruction MSE, old")
    assert metric_of("unknown/old").better == ""
