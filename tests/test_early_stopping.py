"""A phase that ends by its loss on fresh samples of the teacher, and keeps the weights that were best there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from potstill import config, load
from potstill.config import Training
from potstill.distill.distiller import Distiller
from potstill.distill.loop import Best, HeldOut, Log, Phase, accelerator, fit
from potstill.divergence import Match, total, wasserstein2
from potstill.errors import BadInput
from potstill.model import evaluating
from potstill.noise import Noise
from potstill.state import States
from runs import cut_at, results

STOPPING = {"early_stopping": {"every": 2, "patience": 2, "n": 12}}


@pytest.fixture(scope="module")
def engine():
    return accelerator("cpu")


class Drift(nn.Module):
    """One weight that moves by about the learning rate at each update."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, noise, images, n):
        return {"loss": -self.weight.expand(n)}


def trained(engine, folder, measures, steps=20, every=2, patience=2, ema=0.0):
    """A training whose held-out losses are as given, measurement by measurement; the weights at each, and the log's entries."""
    net, seen, left = Drift(), [], iter(measures)

    def measure():
        seen.append(net.weight.item())
        return next(left)

    training = Training(steps=steps, batch=4, lr=0.1, warmup=0, decay="constant", ema=ema)
    phase = Phase(
        "only",
        net,
        lambda module, batch: module(batch.noise, None, batch.n),
        [net.weight],
        training,
        held_out=HeldOut(measure, every, patience),
    )
    log = Log(folder / "log.jsonl")
    fit(net, lambda _: phase, ["only"], Noise((1,)), engine=engine, states=States(folder / "state"), log=log, log_steps=7)
    return net.weight.item(), seen, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_it_ends_after_so_many_measurements_without_a_better_one_and_keeps_the_best(engine, tmp_path):
    kept, seen, entries = trained(engine, tmp_path, [5.0, 3.0, 4.0, 3.0, 2.0])
    assert len(seen) == 4  # at 2, 4, 6 and 8 updates: 3.0 again is none better
    assert kept == seen[1]
    assert [(entry["step"], entry["held_out"]) for entry in entries if "held_out" in entry] == [(2, 5.0), (4, 3.0), (6, 4.0), (8, 3.0)]
    assert entries[-1]["step"] == 8
    assert Log(tmp_path / "log.jsonl").last_steps() == {"only": 8}


def test_the_last_update_is_measured_too(engine, tmp_path):
    kept, seen, entries = trained(engine, tmp_path, [3.0, 2.0, 1.0, 0.5], steps=7)
    assert [entry["step"] for entry in entries if "held_out" in entry] == [2, 4, 6, 7]
    assert kept == seen[-1]


def test_what_is_measured_and_kept_is_the_average(engine, tmp_path):
    kept, seen, _ = trained(engine, tmp_path, [2.0, 1.0, 3.0, 3.0], ema=0.9)
    plain, own, _ = trained(engine, tmp_path / "plain", [2.0, 1.0, 3.0, 3.0])
    assert kept == seen[1]
    assert plain == own[1]
    assert 0 < kept < plain  # behind the weights, which go on from where they were and not from their average
    assert seen[3] - seen[2] > seen[1] - seen[0] > 0


def test_a_measurement_that_is_not_finite_is_an_error(engine, tmp_path):
    with pytest.raises(BadInput, match="held-out samples is not finite at update 4"):
        trained(engine, tmp_path, [1.0, float("nan")])


@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=12))
def test_the_best_is_the_first_of_the_smallest(values):
    best, net = Best(), Drift()
    for i, value in enumerate(values):
        nn.init.constant_(net.weight, i)
        best.add(value, net)
    first = int(np.argmin(values))
    assert (best.least, best.weights["weight"].item(), best.since) == (values[first], first, len(values) - 1 - first)
    again = Best()
    again.load(best.tree())
    assert again.tree() == best.tree()


# ------------------------------------------------------------------ from a recipe


def sections(steps=40, generate=None, infer=None, **more):
    stopping = {"steps": steps, "batch": 8, "lr": 1.0, "warmup": 0, "decay": "constant"}  # so large that it soon gets worse
    generate, infer = (stopping | STOPPING | (own or {}) for own in (generate, infer))
    return {"distill": {"generate": generate, "infer": infer, "scratch": {"steps": 6, "batch": 8}}, **more}


def ends(place, name="student_data_free"):
    return json.loads((place.out / "students" / name / "seed-0" / "job.json").read_text())["updates"]


def test_updates_are_counted_as_they_were_made(place):
    assert place.run("run", **sections(arms=["data_free", "scratch"])) == 0
    made = ends(place)
    assert 4 < made["generate"] < 40  # or the rest would tell nothing
    assert 4 < made["infer"] < 40
    assert ends(place, "student_scratch") == {"scratch": 6}
    about = json.loads((place.out / "metrics.json").read_text())["arms_info"]
    assert about["student_data_free"]["updates"] == sum(made.values())
    assert f"{made['generate']} of 40 generate + {made['infer']} of 40 infer updates" in about["student_data_free"]["note"]
    assert about["student_scratch"]["updates"] == 6
    assert "not compared like for like" in (place.out / "report.html").read_text("utf-8")
    assert f"{made['generate']} updates of generate, {made['infer']} updates of infer" in (place.out / "student" / "README.md").read_text()


def test_the_weights_are_those_that_were_best_on_the_teachers_samples(place):
    """Measured again from outside, by what the log says of it."""
    assert place.run("run", **sections()) == 0
    log = [json.loads(line) for line in (place.out / "students/student_data_free/seed-0/log.jsonl").read_text().splitlines()]
    least = {phase: min(e["held_out"] for e in log if e["phase"] == phase and "held_out" in e) for phase in ("generate", "infer")}
    teacher, student = load(place.folder / "teacher"), load(place.out / "student")
    noise, rules = Noise((0, "held out", "generate")), (Match("z*", wasserstein2, 0.1, "mean"), Match("out"))
    with torch.no_grad(), evaluating(student.net):
        found = total(Distiller(teacher, student, rules)(noise.at(range(12)), None, 12)).mean().item()
        images = teacher.sample(12, Noise((0, "held out", "infer")).fold("images"))
        own = Distiller(teacher, student, (), "infer", elbo=1.0)(Noise((0, "held out", "infer")).at(range(12)), images, 12)
    assert found == pytest.approx(least["generate"], rel=1e-4)
    assert total(own).mean().item() == pytest.approx(least["infer"], rel=1e-4)


CUT = sections(infer={"ema": 0.5}, evaluate=None, report=None)


@pytest.mark.parametrize("update", [1, 3, 5, 7, 9, 11, 13, 15])
def test_a_run_cut_anywhere_ends_in_the_same_bits(place, monkeypatch, update):
    assert place.run("run", **CUT) == 0
    whole, made = results(place.out), ends(place)
    assert sum(made.values()) > 15
    with monkeypatch.context() as context:
        cut_at(context, update)
        assert place.run("run", "--out", str(place.folder / "cut"), **CUT) == 130
    assert place.run("run", "--out", str(place.folder / "cut"), **CUT) == 0
    again = place.folder / "cut"
    assert json.loads((again / "students/student_data_free/seed-0/job.json").read_text())["updates"] == made
    assert results(again) == whole


def test_students_of_several_sizes_end_each_when_it_is_its_time(place):
    both = sections(students=[2, 3])
    del place.recipe["student"]
    assert place.run("run", **both) == 0
    about = json.loads((place.out / "metrics.json").read_text())["arms_info"]
    for width in (2, 3):
        name = f"student_data_free_w{width}"
        assert about[name]["updates"] == sum(ends(place, name).values())


def test_a_recipe_without_it_is_hashed_as_ever():
    for section in (config.Generator(), config.Encoder()):
        assert "early_stopping" not in section.model_dump(mode="json")


@pytest.mark.parametrize(
    ("distill", "problem"),
    [
        ({"generate": {"adversarial": {}} | STOPPING}, "early_stopping needs a loss that falls"),
        ({"generate": {"early_stopping": {"every": 0}}}, "every"),
        ({"scratch": STOPPING}, "early_stopping"),
        ({"infer": {"early_stoping": {}}}, "did you mean early_stopping?"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(place, capsys, distill, problem):
    assert place.run("run", distill=distill) == 2
    assert problem in capsys.readouterr().err
    assert not place.out.exists()
