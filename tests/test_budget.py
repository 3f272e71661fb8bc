"""Students of a budget: the largest width within it, found once for a run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from potstill import build, config
from potstill.errors import BadInput
from potstill.evaluate import arms
from potstill.evaluate.cost import parameters, size_mib
from potstill.families.classifier import Classifier, ResNet
from potstill.families.gan import GAN
from potstill.families.helmholtz import HelmholtzMachine
from potstill.families.lvae import LVAE
from potstill.families.vae import VAE

TEACHERS = {
    "lvae": lambda: LVAE((1, 8, 8), 12, 2, 4),
    "vae": lambda: VAE((1, 8, 8), 12, 4),
    "classifier": lambda: Classifier((1, 8, 8), 10, 12),
    "resnet": lambda: ResNet((1, 8, 8), 10, 8, 12),
    "gan": lambda: GAN((1, 8, 8), 12, 4),
    "helmholtz": lambda: HelmholtzMachine((2, 1, 1), 12),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_the_largest_width_within_a_budget(name):
    teacher = TEACHERS[name]().model().frozen()
    students = {width: teacher.net.shrunk(width) for width in range(1, 13)}
    for width in (1, 5, 11):
        params, mib = parameters(students[width]), size_mib(students[width])
        assert build.width_within(config.Budget(params=params), teacher) == width
        assert build.width_within(config.Budget(params=parameters(students[width + 1]) - 1), teacher) == width
        assert build.width_within(config.Budget(mib=mib), teacher) == width
        assert build.width_within(config.Budget(mib=size_mib(students[width + 1]) - 1e-5), teacher) == width
    assert build.width_within(config.Budget(params=10**9), teacher) == 12
    least = parameters(students[1])
    with pytest.raises(BadInput, match=rf"student.budget.params: {least - 1}, but a \w+ of width 1 takes {least}; give more"):
        build.width_within(config.Budget(params=least - 1), teacher)


def test_the_size_is_that_of_the_file(tmp_path):
    net = LVAE((1, 8, 8), 4, 2, 2)
    net.save_pretrained(tmp_path)
    assert size_mib(net) == pytest.approx((tmp_path / "model.safetensors").stat().st_size / 2**20, abs=1e-4)


@pytest.fixture
def clock(monkeypatch):
    """Times that are the width plus what each call adds, as a busy machine's do: ``calls`` and ``more`` of it."""
    found = SimpleNamespace(calls=[], more=0.0)

    def timed(model, batch, threads, repeats):
        assert (batch, threads) == (1, 1)
        assert not model.net.training
        found.calls.append(model.net.width)
        return SimpleNamespace(median_ms=model.net.width + found.more)

    monkeypatch.setattr(arms, "timed", timed)
    return found


def test_a_time_is_measured_for_a_few_widths(clock):
    teacher = VAE((1, 8, 8), 40, 4).model().frozen()
    assert build.width_within(config.Budget(ms=13.5), teacher) == 13
    assert len(clock.calls) <= 6
    with pytest.raises(BadInput, match=r"student.budget.ms: 0.5, but a VAE of width 1 takes 1; give more"):
        build.width_within(config.Budget(ms=0.5), teacher)


def test_a_time_that_any_network_keeps_and_one_that_none_keeps():
    teacher = Classifier((1, 8, 8), 10, 3).model().frozen()
    assert build.width_within(config.Budget(ms=1e4), teacher) == 3
    with pytest.raises(BadInput, match=r"student.budget.ms: 1e-06, but a Classifier of width 1 takes"):
        build.width_within(config.Budget(ms=1e-6), teacher)


def test_a_width_is_found_once_for_a_run(place, clock):
    """The processes that train, and whoever resumes or evaluates, build the students that the stage distill began with."""
    recipe = {"student": {"budget": {"ms": 2.5}}, "seeds": [0, 1]}
    assert place.run("synthesize", **recipe) == 0
    assert clock.calls == []
    assert place.run("distill", **recipe) == 0
    assert clock.calls
    begun = place.out / "distill" / "begun.json"
    assert json.loads(begun.read_text())["depends"]["width"] == 2
    clock.calls.clear()
    clock.more = 1.0  # the machine is busier now: width 1 would be found
    (place.out / "students" / "student_data_free" / "seed-1" / "job.json").unlink()
    (place.out / "distill" / "done.json").unlink()
    assert place.run("distill", **recipe) == 0
    assert clock.calls == []
    widths = [json.loads(path.read_text())["width"] for path in sorted(place.out.glob("students/*/*/config.json"))]
    assert widths == [2, 2]
    shop = build_shop(place, recipe)
    assert shop.width(shop.teacher) == 2


def build_shop(place, recipe):
    from potstill.jobs import Workshop

    return Workshop(config.read(place.write(**recipe)), place.out)


def test_a_budget_that_cannot_be_kept_is_said_before_anything_is_made(place, capsys):
    params = ({"params": 3}, "student.budget.params: 3, but a LVAE of width 1 takes")
    for budget, said in (params, ({"mib": 1e-6}, "student.budget.mib: 1e-06")):
        assert place.run("run", student={"budget": budget}) == 2
        assert said in capsys.readouterr().err
        assert not place.out.exists()


def test_a_student_of_a_budget_is_that_of_its_width():
    teacher = LVAE((1, 8, 8), 8, 2, 2).model().frozen()
    wanted = parameters(teacher.net.shrunk(3))
    assert build.width_within(config.Budget(params=wanted + 5), teacher) == 3
    with pytest.raises(BadInput, match=r"student: width, ratio, budget and start are for potstill's own families; the teacher is a Linear"):
        build.width_within(config.Budget(params=1), build.Model(torch.nn.Linear(1, 1), teacher.images))
