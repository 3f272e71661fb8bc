"""Students of several sizes in one run: each the same to the bit as alone, the teacher's work done once, cut and gone on anywhere."""

from __future__ import annotations

import json
import weakref
from collections import Counter

import numpy as np
import pytest
import torch

from potstill import config, jobs
from potstill.distill.distiller import UNSHARED, Distiller, Encoding, Shared
from potstill.distill.loop import Stopped, abreast, accelerator
from potstill.distill.pool import OnlineLinks
from potstill.divergence import Match
from potstill.errors import BadInput
from potstill.families.lvae import LVAE
from potstill.noise import Noise
from potstill.report import tables
from potstill.state import States
from runs import cut_at, digits_like, results, teacher
from test_classifier import RECIPE as LABELS
from test_kill import interrupted

WIDTHS = [1, 3, 2]
STEPS = {"steps": 4, "batch": 8}
SEVERAL = {"student": None, "students": WIDTHS, "evaluate": None, "report": None}
EVERYTHING = {
    "distill": {
        "generate": STEPS
        | {"ema": 0.9, "clip": 1.0, "augment": {"shift": 1}, "perceptual": [{"nodes": "z*"}], "energy": [{"kind": "batchnorm"}]},
        "infer": STEPS | {"rules": [{"nodes": "*"}]},
        "scratch": STEPS,
        "continual": STEPS,
    },
    "arms": [
        "data_free",
        "with_data",
        "scratch",
        "continual",
        {"kind": "data_free", "name": "behind", "start": "surrogate", "share": "z2", "replay": "z1"},
    ],
    "seeds": [0, 1],
}
NOISE_ALONE = {"surrogate": None, "distill": {"generate": STEPS, "infer": STEPS | {"start": "noise"}, "scratch": STEPS}}
GAN = {
    "train": {"model": {"kind": "gan", "image": [1, 8, 8], "width": 4, "latent": 3, "classes": 4}, "steps": 2, "batch": 8},
    "teacher": {"kind": "trained"},
    "surrogate": None,
    "distill": {
        "generate": STEPS | {"rules": [{"nodes": "out", "by": "mse"}], "adversarial": {"width": 4, "features": 1}},
        "infer": None,
        "scratch": STEPS | {"discriminator": {"width": 4}},
    },
    "arms": ["data_free", "scratch"],
}
DIFFUSION = {
    "train": {"model": {"kind": "unet", "image": [1, 8, 8], "width": 4, "steps": 3, "classes": 4}, "steps": 2, "batch": 8},
    "teacher": {"kind": "trained"},
    "surrogate": None,
    "distill": {
        "link": STEPS | {"pool": 12},
        "generate": {"steps": 2, "batch": 8, "rules": [{"nodes": "out", "by": "mse"}]},
        "infer": None,
    },
    "arms": [{"kind": "data_free", "chain": 2}],
}
ROUNDS = {
    "data": LABELS["data"],
    "teacher": LABELS["teacher"],
    "surrogate": {"kind": "inversion", "n": 16, "batch": 8, "steps": 2, "energy": [{"kind": "disagreement"}, {"kind": "batchnorm"}]},
    "distill": {"generate": None, "infer": STEPS, "rounds": 2},
}
KINDS = {"everything": EVERYTHING, "noise alone": NOISE_ALONE, "gan": GAN, "diffusion": DIFFUSION, "rounds": ROUNDS}


def made(place, out, **sections):
    """Weights of every student that a recipe makes, by arm and seed."""
    assert place.run("run", "--out", str(place.folder / out), **{"evaluate": None, "report": None} | sections) == 0
    found = (place.folder / out / "students").glob("*/*/model.safetensors")
    return {f"{p.parts[-3]}/{p.parts[-2]}": p.read_bytes() for p in found}


@pytest.fixture
def labeled(place):
    """A place whose images have labels."""
    images, labels = digits_like()
    np.savez(place.folder / "data.npz", images=images, labels=labels)
    return place


# ------------------------------------------------------------------ the same bits


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_is_the_same_as_alone(labeled, kind):
    sections = KINDS[kind]
    together = made(labeled, "together", **SEVERAL | sections)
    alone = {}
    for width in WIDTHS:
        for name, weights in made(labeled, f"w{width}", **sections, student={"width": width}).items():
            alone[name.replace("/", f"_w{width}/")] = weights
    assert together == alone
    assert len(set(alone.values())) == len(alone)


def test_one_of_them_again_is_the_same(place):
    whole = made(place, "out", **SEVERAL)
    (place.out / "students" / "student_data_free_w3" / "seed-0" / "job.json").unlink()
    (place.out / "students" / "student_data_free_w3" / "seed-0" / "model.safetensors").unlink()
    (place.out / "student" / "w2" / "model.safetensors").unlink()
    kept = place.out / "students" / "student_data_free_w1" / "seed-0" / "model.safetensors"
    before = kept.stat().st_mtime_ns
    assert made(place, "out", **SEVERAL) == whole
    assert kept.stat().st_mtime_ns == before
    assert (place.out / "student" / "w2" / "model.safetensors").read_bytes() == whole["student_data_free_w2/seed-0"]


@pytest.mark.parametrize("update", [2, 6, 12, 14, 17, 23])
def test_a_run_that_is_cut_goes_on_to_the_same_bits(place, monkeypatch, update):
    sections = SEVERAL | {"distill": EVERYTHING["distill"]}
    whole = made(place, "whole", **sections)
    with monkeypatch.context() as patch:
        cut_at(patch, update)
        assert place.run("run", **sections) == 130
    assert made(place, "out", **sections) == whole
    for folder in sorted((place.out / "students").glob("*/*")):
        steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4] * 2


@pytest.mark.slow
def test_killed_with_workers_and_gone_on(place):
    sections = SEVERAL | {"seeds": [0, 1], "arms": ["data_free", "scratch"]}
    sections["distill"] = {"generate": STEPS | {"steps": 40}, "infer": STEPS, "scratch": STEPS}
    whole = made(place, "whole", **sections)
    place.recipe["compute"] |= {"workers": 2}
    lived, _ = interrupted(place.write(**sections), place.out, "distill", "group", "state/students/*/*/step-*", 0.2)
    assert lived
    assert made(place, "out", **sections) == whole
    assert results(place.out) == results(place.folder / "whole")


# ------------------------------------------------------------------ the teacher's work is shared


def calls_of(place, monkeypatch, out, **sections):
    """How often networks of each width decode while a run is made."""
    decode, count = LVAE.decode, Counter()

    def counted(self, z):
        count[self.width] += 1
        return decode(self, z)

    with monkeypatch.context() as patch:
        patch.setattr(LVAE, "decode", counted)
        made(place, out, **sections)
    return count


@pytest.mark.parametrize(
    ("arm", "phase"),
    [
        ("data_free", {"generate": STEPS, "infer": None}),
        ({"kind": "data_free", "start": "surrogate"}, {"generate": STEPS, "infer": None}),
        ("data_free", {"generate": {"steps": 1, "batch": 8}, "infer": STEPS | {"rules": [{"nodes": "*"}]}}),
        ("data_free", {"generate": {"steps": 1, "batch": 8}, "infer": STEPS | {"start": "noise"}}),
        ("continual", {"continual": STEPS}),
    ],
)
def test_ten_updates_more_are_the_teachers_of_one_student(place, monkeypatch, arm, phase):
    def more(name, **sections):
        longer = {k: v and (v | {"steps": v["steps"] + 10 if v["steps"] > 1 else 1}) for k, v in phase.items()}
        short, long = (calls_of(place, monkeypatch, f"{name}{i}", arms=[arm], distill=d, **sections) for i, d in enumerate((phase, longer)))
        return {width: long[width] - short[width] for width in long if long[width] > short[width]}

    one = more("one", student={"width": 3})
    several = more("several", **SEVERAL)
    assert several == {4: one[4], **dict.fromkeys(WIDTHS, one[3])}
    assert one[4] >= 10


def test_the_pool_of_a_chain_is_advanced_once_for_all(labeled, monkeypatch):
    linked, count = OnlineLinks._linked, [0]

    def counted(*arguments):
        count[0] += 1
        return linked(*arguments)

    monkeypatch.setattr(OnlineLinks, "_linked", counted)
    found = []
    for width in WIDTHS, WIDTHS[:1]:
        count[0] = 0
        made(labeled, f"out{len(width)}", **DIFFUSION | SEVERAL | {"students": width})
        found.append(count[0])
    rehearsed = 1 + 1  # a pool of two for each size is filled by one call
    assert found[0] - found[1] == rehearsed * (len(WIDTHS) - 1)
    assert found[1] > rehearsed + 4


def test_what_the_teacher_infers_from_its_own_image_is_shared(monkeypatch):
    inferred = [0]
    students = [teacher().shrunk(width).model() for width in WIDTHS]
    infer = LVAE.infer

    def counted(self, sample, x):
        inferred[0] += self is frozen.net
        return infer(self, sample, x)

    def losses(shared):
        inferred[0] = 0
        rules = {"rules": (Match(weight=0.0),), "perceptual": (Match("z*"),)}
        distillers = [Distiller(frozen, student, **rules, shared=shared) for student in students]
        return [d(Noise((0, "generate", step)), n=4) for step in range(2) for d in distillers]

    monkeypatch.setattr(LVAE, "infer", counted)
    frozen = teacher().model().frozen()
    alone, apart = losses(UNSHARED), inferred[0]
    together = losses(Shared())
    assert (apart, inferred[0]) == (2 * 3 * 2, 2 * (3 + 1))
    assert all(set(a) == {"perceptual.z1", "perceptual.z2"} for a in alone)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(alone, together, strict=True) for name in a)


def test_one_that_runs_away_is_named_and_has_no_later_state(place, capsys, monkeypatch):
    monkeypatch.setattr("potstill.distill.loop.FIRST_UPDATES", 3)
    own = jobs._objective

    def objective(distill, arm, name, teacher, student, *arguments):
        made = own(distill, arm, name, teacher, student, *arguments)
        forward, calls = made.forward, [0]

        def far(*given):
            calls[0] += 1
            losses = forward(*given)
            return {k: v + 1e6 for k, v in losses.items()} if student.net.width == 3 and calls[0] > 5 else losses

        made.forward = far
        return made

    monkeypatch.setattr(jobs, "_objective", objective)
    place.recipe["compute"] |= {"log_steps": 1, "save_seconds": 0, "divergence_patience": 4}
    assert place.run("run", **SEVERAL | {"distill": {"generate": {"steps": 20, "batch": 8}, "infer": None}}) == 2
    assert "student_data_free_w3/seed-0: generate: the loss of " in (said := capsys.readouterr().err)
    assert "has diverged" in said
    at = {width: States(jobs.states_of(place.out) / f"student_data_free_w{width}/seed-0").load()[0]["step"] for width in WIDTHS}
    assert at == {1: 10, 3: 5, 2: 9}


def test_what_is_shared_is_made_once_for_a_batch():
    shared, calls = Shared(), []

    def make():
        calls.append(len(calls))
        return calls[-1]

    noise = Noise((0, "generate", 3))
    assert [shared("teacher", noise.at(range(4)), make) for _ in range(3)] == [0, 0, 0]
    assert shared("images", noise.at(range(4)), make) == 1
    assert shared("teacher", noise.at(range(4)), make) == 0
    assert shared("teacher", noise.at(range(4, 8)), make) == 2
    assert shared("teacher", noise.fold(1).at(range(4, 8)), make) == 3
    assert shared("teacher", noise.at(range(4)), make) == 4
    assert [UNSHARED("teacher", noise, make) for _ in range(2)] == [5, 6]


def test_only_the_last_of_a_kind_is_kept():
    shared, noise, seen = Shared(), Noise(), []

    def make():
        assert all(ref() is None for ref in seen)
        trace = Encoding(teacher().model().frozen(), teacher().model())
        seen.append(weakref.ref(trace))
        return trace

    for step in range(3):
        shared("teacher", noise.fold(step), make)
    assert [ref() is not None for ref in seen] == [False, False, True]


# ------------------------------------------------------------------ side by side, and asked to stop


def counting(name, first, last, log, end=None):
    """A training from one step to another, which tells where it is."""
    for step in range(first, last):
        yield 0, step
        log.append((name, step))
    if end:
        raise end


def test_who_is_behind_catches_up():
    log = []
    abreast([counting("a", 2, 4, log), counting("b", 0, 4, log), counting("c", 3, 4, log)])
    assert log == [("b", 0), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3), ("c", 3)]


def test_all_stop_before_it_is_said():
    log = []
    with pytest.raises(Stopped):
        abreast([counting("a", 0, 2, log, Stopped()), counting("b", 0, 3, log, Stopped())])
    assert log[-1] == ("b", 2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, BadInput])
def test_nobody_goes_on_after_an_error(error):
    log = []
    with pytest.raises(error) as found:
        abreast([counting("a", 0, 1, log, error("x")), counting("b", 0, 9, log)])
    assert found.type is error
    assert len(log) < 4


def test_every_one_has_saved_when_it_stops(place):
    assert place.run("synthesize") == 0
    place.recipe |= SEVERAL | {"compute": {"device": "cpu", "threads": 1, "workers": 1, "save_seconds": 1e6}}
    recipe, left = config.read(place.write()), [5]

    def keep_going():
        left[0] -= 1
        return left[0] > 0

    with pytest.raises(KeyboardInterrupt):
        jobs.make_students(jobs.Workshop(recipe, place.out), "identity", accelerator("cpu"), keep_going=keep_going)
    at = {job.width: States(jobs.states_of(place.out) / job.name).load()[0]["step"] for job in jobs.jobs(recipe)}
    assert at == {1: 1, 3: 1, 2: 1}


# ------------------------------------------------------------------ the table, the folders, the recipe


@pytest.mark.slow
def test_each_has_a_row_and_a_folder(place, capsys):
    assert place.run("run", student=None, students=[1, 2], arms=["data_free", "with_data", "scratch"]) == 0
    metrics = json.loads((place.out / "metrics.json").read_text())
    names = [f"student_{arm}_w{width}" for arm in ("data_free", "with_data", "scratch") for width in (1, 2)]
    assert list(metrics["arms"]) == list(metrics["arms_info"]) == ["teacher", *names]
    assert {name: metrics["arms"][name]["params"] for name in names} == {name: 329 if name.endswith("w1") else 1060 for name in names}
    assert all(metrics["arms_info"][name]["label"] == name for name in names)
    out = capsys.readouterr().out
    assert all(f"\n{name} " in out for name in names)
    assert all(name in (place.out / "report.html").read_text() for name in names)
    assert not (place.out / "student" / "model.safetensors").exists()
    for width in (1, 2):
        own = place.out / "students" / f"student_data_free_w{width}" / "seed-0" / "model.safetensors"
        assert (place.out / "student" / f"w{width}" / "model.safetensors").read_bytes() == own.read_bytes()
        assert LVAE.from_pretrained(place.out / "student" / f"w{width}").width == width
    assert "student_data_free_w1, seed 0" in (place.out / "student" / "w1" / "README.md").read_text()


def test_a_verdict_is_among_students_of_one_size():
    values = {"teacher": 1, "student_data_free_w8": 5, "student_data_free_w16": 2, "student_scratch_w8": 9, "student_with_data_w16": 7}
    arms = {name: {"frechet": {"mean": value, "sd": 0.1}} for name, value in values.items()}
    said = tables.verdict({"arms": arms, "seeds": [0, 1], "reference": {"features": "pixels"}})
    assert "“student data free w8”" in said
    assert "is better than the student trained from scratch on real data (9" in said
    assert "no figure for a student distilled with real data" in said


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"students": [4, 8]}, "students: widths in place of student; give one of the two"),
        ({"student": None, "students": []}, "students: a list should have at least 1 item"),
        ({"student": None, "students": [4, 4]}, "students: two are the same: 4, 4"),
        ({"student": None, "students": 4}, "students: a list is expected (found 4)"),
        ({"student": None, "students": [4, 0]}, "students.1: input should be greater than or equal to 1 (found 0)"),
        ({"student": None, "students": ["4"]}, "students.0: a number is expected (found '4')"),
        ({"student": None}, "distill: needs a student"),
        ({"student": None, "students": [2, 5]}, "student: width 5 is wider than the teacher's 4"),
        (
            {"student": None, "students": [2], "teacher": {"kind": "python", "target": "own:teacher"}},
            "student: width, ratio, budget and start are for potstill's own families; the teacher is a Linear. Give a net or a target",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_written(place, capsys, sections, message):
    (place.folder / "own.py").write_text(
        "import torch\nfrom potstill.model import Images, Model\n"
        "def teacher():\n    net = torch.nn.Linear(1, 1)\n"
        "    return Model(net, Images((1, 8, 8)), lambda sample: net(sample.normal('z', (1, 8, 8)).unsqueeze(-1)).squeeze(-1))\n"
    )
    own = {"surrogate": None, "distill": {"generate": {"rules": [{"nodes": "out", "by": "mse"}]}, "infer": None}, "arms": ["data_free"]}
    assert place.run("run", "--import", "own", **(own if "teacher" in sections else {}) | sections) == 2
    assert capsys.readouterr().err.startswith(f"potstill: {message}")
    assert not place.out.exists()


def test_a_folder_of_other_sizes_is_refused(place, capsys):
    assert place.run("run", **SEVERAL) == 0
    before = results(place.out)
    assert place.run("run", **SEVERAL | {"students": [1, 2]}) == 2
    assert "stage distill was begun here from other inputs (differs: students)" in capsys.readouterr().err
    assert results(place.out) == before


def test_an_error_names_the_student(place, capsys, monkeypatch):
    shrunk = LVAE.shrunk

    def spoiled(self, width):
        net = shrunk(self, width)
        if width == 3:
            torch.nn.init.constant_(net.d0.get_parameter(next(name for name, _ in net.d0.named_parameters())), float("nan"))
        return net

    monkeypatch.setattr(LVAE, "shrunk", spoiled)
    assert place.run("run", **SEVERAL) == 2
    assert "student_data_free_w3/seed-0: generate: the loss of " in capsys.readouterr().err


def test_a_recipe_without_sizes_depends_on_none_of_it(place):
    assert place.run("run", evaluate=None, report=None) == 0
    begun = json.loads((place.out / "distill" / "begun.json").read_text())["depends"]
    assert "students" not in begun
    assert begun["student"]["width"] == 2
