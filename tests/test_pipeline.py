"""A run from end to end: what it makes, that it is not made twice, and that other inputs are refused."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from potstill import build, cli, config, jobs, pipeline
from potstill.data import load
from potstill.families.classifier import Classifier
from potstill.families.lvae import LVAE
from potstill.noise import Noise
from potstill.state import lock, read_tensors
from runs import digits_like, environment, results, snapshot

STEPS = {"steps": 3, "batch": 16}
ARMS = ["data_free", "with_data", "scratch"]
RECIPE = {
    "name": "whole",
    "data": {"kind": "digits", "train": 200},
    "train": {"model": {"kind": "lvae", "image": [1, 8, 8], "width": 4, "levels": 2, "latent": 2, "std": 0.1}, "steps": 6, "batch": 16},
    "teacher": {"kind": "trained"},
    "student": {"width": 2},
    "surrogate": {"n": 64, "shard": 24},
    "distill": {"generate": STEPS, "infer": STEPS, "scratch": STEPS},
    "arms": ARMS,
    "seeds": [0, 1],
    "evaluate": {"n": 64, "latency_repeats": 3},
    "report": {"images": 4},
    "compute": {"device": "cpu", "threads": 1, "workers": 1, "log_steps": 1},
}
STAGES = [stage for stage in pipeline.STAGES if stage != "calibrate"]
COST = {"latency_ms_b1", "latency_ms_b64", "throughput"}
QUALITY = {"frechet", "frechet_sqrt", "kid", "emd", "energy_distance", "mmd", "one_nn", "precision", "recall", "density", "coverage"}


def execute(folder, *stages, **sections):
    pipeline.execute(config.check(RECIPE | sections), folder, stages or None, quiet=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is done. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    execute(folder)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, with its times."""
    return shutil.copytree(finished, tmp_path / "run")


def undo(run, *stages):
    """As it was before those stages."""
    made = {"distill": ["distill", "student", "students"], "evaluate": ["evaluate", "metrics.json"], "report": ["report", "report.html"]}
    for path in (run / name for stage in stages for name in made[stage]):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def command(run, name, *overrides):
    """The command line on the recipe of the run, as the run's own folder keeps it."""
    recipe = run.parent / "recipe.yaml"
    recipe.write_text(json.dumps(RECIPE))
    return cli.main([name, str(recipe), "--out", str(run), "--quiet", *overrides])


# ------------------------------------------------------------------ what it makes


@pytest.mark.slow
def test_every_file_has_its_place(finished):
    students = {f"students/student_{arm}/seed-{seed}" for arm in ARMS for seed in (0, 1)}
    model = {"README.md", "config.json", "model.safetensors"}
    expected = {"recipe.yaml", "metrics.json", "report.html", "state/run.lock", "surrogate/manifest.json"}
    expected |= {f"surrogate/shard-0000{i}.parquet" for i in range(3)}
    expected |= {f"{stage}/{name}.json" for stage in STAGES for name in ("begun", "done")}
    expected |= {"train/held_out.json", "train/log.jsonl", "evaluate/pictures.npz"}
    expected |= {f"{folder}/{name}" for folder in ("teacher", "student") for name in model}
    expected |= {f"{folder}/{name}" for folder in students for name in (*model, "job.json", "log.jsonl")}
    assert set(snapshot(finished)) == expected
    assert config.read(finished / "recipe.yaml") == config.check(RECIPE)


@pytest.mark.slow
def test_metrics_have_the_promised_shape(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["format"] == "potstill-metrics/1"
    assert metrics["reference"] | {"floor": 0} == {
        "kind": "data",
        "data": "digits (seed 0)",
        "n": 64,
        "features": "pixels",
        "dimensions": 64,
        "floor": 0,
    }
    assert set(metrics["reference"]["floor"]) == QUALITY
    assert metrics["seeds"] == [0, 1]
    assert set(metrics["arms"]) == set(metrics["arms_info"]) == {"teacher", *(f"student_{arm}" for arm in ARMS)}
    for name, arm in metrics["arms"].items():
        spread = {key for key, value in arm.items() if isinstance(value, dict)}
        assert spread >= QUALITY | COST | {"reconstruction_mse", "nelbo"}
        assert all(set(arm[key]) == {"mean", "sd"} for key in spread)
        assert set(arm) - spread == {"params", "size_mib"}
        assert arm["params"] == (3728 if name == "teacher" else 1060)
        assert ("paired_mse" in arm) == (name != "teacher")
    info = metrics["arms_info"]
    assert {name: (about["data"], about["updates"]) for name, about in info.items()} == {
        "teacher": ("real", None),
        "student_data_free": ("none", 6),
        "student_with_data": ("real", 6),
        "student_scratch": ("real", 3),
    }
    environment = metrics["environment"]
    assert (environment["threads"], environment["latency_threads"], environment["device"]) == (1, 1, "cpu")
    assert "torch" in environment["versions"]
    assert json.loads((finished / "train" / "held_out.json").read_text()).keys() >= {"reconstruction_mse"}


@pytest.mark.slow
def test_the_teacher_is_judged_as_it_is_used(finished):
    """In eval mode; BatchNorm would take its statistics from the held-out images otherwise."""
    images = load(config.check(RECIPE).data).test.images
    teacher = LVAE.from_pretrained(finished / "teacher").eval().model()
    _, expected = pipeline.reconstructions(teacher, torch.from_numpy(images).float() / 255, Noise((0, "reconstruct")), 256)
    assert json.loads((finished / "train" / "held_out.json").read_text()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_students_load_and_are_as_they_were_measured(finished):
    student = LVAE.from_pretrained(finished / "student")
    assert student.width == 2
    first = finished / "students" / "student_data_free" / "seed-0"
    assert read_tensors(finished / "student" / "model.safetensors").keys() == student.state_dict().keys()
    assert (finished / "student" / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert (
        len({(finished / "students" / f"student_{arm}" / f"seed-{s}" / "model.safetensors").read_bytes() for arm in ARMS for s in (0, 1)})
        == 6
    )
    card = (finished / "student" / "README.md").read_text()
    assert "1,060 parameters, 3.5 times fewer than its teacher's 3,728" in card
    log = [json.loads(line) for line in (first / "log.jsonl").read_text().splitlines()]
    assert [(entry["phase"], entry["step"]) for entry in log] == [(p, s) for p in ("generate", "infer") for s in (1, 2, 3)]


@pytest.mark.slow
def test_another_run_of_the_recipe_is_the_same_to_the_bit_with_two_workers(finished, tmp_path):
    execute(tmp_path / "run", "train")
    execute(tmp_path / "run", "synthesize")
    execute(tmp_path / "run", "distill", compute=RECIPE["compute"] | {"workers": 2})
    assert results(tmp_path / "run") == results(finished)
    assert os.listdir(tmp_path / "run" / "state") == ["run.lock"]


# ------------------------------------------------------------------ run again


@pytest.mark.slow
def test_a_run_that_is_done_is_left_alone(run, capsys):
    before = snapshot(run)
    for name in ("run", *STAGES):
        assert command(run, name) == 0
    assert snapshot(run) == before
    assert capsys.readouterr().err == ""
    assert cli.main(["run", str(run / "recipe.yaml"), "--out", str(run)]) == 0  # from its own resolved recipe
    assert capsys.readouterr().err.splitlines() == [f"{stage}: done already" for stage in STAGES]
    assert snapshot(run) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "override", "stage", "differs"),
    [
        ("run", "seed=1", "train", "seed"),
        ("run", "train.lr=1e-3", "train", "train.lr"),
        ("run", "data.seed=1", "train", "data.seed"),
        ("synthesize", "surrogate.n=65", "synthesize", "surrogate.n"),
        ("run", "distill.generate.rules=[{}]", "distill", "distill.generate.rules"),
        ("run", "distill.infer=null", "distill", "distill.infer"),
        ("distill", "student.width=3", "distill", "student.width"),
        ("distill", "seeds=[0, 1, 2]", "distill", "seeds"),
        ("distill", "arms=[data_free]", "distill", "arms"),
        ("evaluate", "evaluate.k=3", "evaluate", "evaluate.k"),
        ("run", "report.images=5", "evaluate", "images"),
        ("report", "evaluate.k=3", "evaluate", "evaluate.k"),  # the recipe in the folder must not tell of another run
    ],
)
def test_another_recipe_is_refused_and_nothing_changes(run, capsys, name, override, stage, differs):
    before = snapshot(run)
    assert command(run, name, override) == 2
    expected = f"potstill: {run}: stage {stage} was begun here from other inputs (differs: {differs})"
    err = capsys.readouterr().err
    assert err.startswith(expected)
    assert err.endswith("; nothing is overwritten: choose another --out, or remove the folder to begin again\n")
    assert err.count("\n") == 1
    assert snapshot(run) == before


@pytest.mark.slow
def test_other_pixels_or_weights_are_refused(place, capsys):
    assert place.run("run", arms=["scratch"], report=None) == 0
    before = snapshot(place.out)
    images, labels = digits_like(seed=1)
    kept = (place.folder / "data.npz").read_bytes()
    np.savez(place.folder / "data.npz", images=images, labels=labels)
    capsys.readouterr()
    assert place.run("distill", arms=["scratch"], report=None) == 2
    assert "stage distill was begun here from other inputs (differs: pixels)" in capsys.readouterr().err
    assert place.run("evaluate", arms=["scratch"], report=None) == 2
    assert "stage evaluate was begun here from other inputs (differs: pixels)" in capsys.readouterr().err
    (place.folder / "data.npz").write_bytes(kept)
    build.born(1, "other", lambda: LVAE((1, 8, 8), 4, 2, 2, 0.1)).save_pretrained(place.folder / "teacher")
    assert place.run("synthesize", arms=["scratch"], report=None) == 2
    assert "stage synthesize was begun here from other inputs (differs: weights)" in capsys.readouterr().err
    assert snapshot(place.out) == before


@pytest.mark.slow
def test_what_evaluates_may_change_until_it_was_begun(run, capsys):
    undo(run, "evaluate", "report")
    before = snapshot(run)
    assert command(run, "evaluate", "evaluate.k=3", "evaluate.n=32") == 0
    assert json.loads((run / "metrics.json").read_text())["reference"]["n"] == 32
    assert config.read(run / "recipe.yaml").evaluate.k == 3
    after = snapshot(run)
    assert {name for name in before if after[name] != before[name]} == {"recipe.yaml"}
    capsys.readouterr()
    assert command(run, "evaluate") == 2
    assert "(differs: evaluate.n, evaluate.k)" in capsys.readouterr().err
    assert snapshot(run) == after


@pytest.mark.slow
def test_a_result_that_is_gone_is_made_again(run, finished):
    (run / "students" / "student_scratch" / "seed-1" / "model.safetensors").unlink()
    (run / "students" / "student_scratch" / "seed-1" / "job.json").unlink()
    (run / "report.html").unlink()
    assert command(run, "run") == 0
    assert results(run) == results(finished)
    assert (run / "report.html").exists()


@pytest.mark.slow
def test_a_student_that_was_spoiled_is_trained_again(run, finished, capsys):
    undo(run, "evaluate", "report")
    path = run / "students" / "student_scratch" / "seed-1" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert command(run, "evaluate") == 2
    assert "evaluate: not every student is trained yet; run the distill stage first" in capsys.readouterr().err
    assert command(run, "distill") == 0
    assert results(run) == results(finished)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"depends": 3}'])
def test_a_broken_mark_of_a_stage_is_named(run, capsys, content):
    (run / "distill" / "begun.json").write_text(content)
    assert command(run, "run") == 2
    err = capsys.readouterr().err
    assert "distill/begun.json: not " in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_figures_that_are_not_numbers_are_left_out(run, capsys, monkeypatch):
    undo(run, "evaluate", "report")
    found = pipeline.reconstructions
    monkeypatch.setattr(pipeline, "reconstructions", lambda *a: (found(*a)[0], found(*a)[1] | {"nelbo": float("inf")}))
    assert command(run, "run") == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["arms"]["student_scratch"]["nelbo"] is None
    assert metrics["arms"]["student_scratch"]["frechet"]["mean"] > 0


@pytest.mark.slow
def test_what_cannot_be_measured_is_one_line(run, capsys, monkeypatch):
    undo(run, "evaluate", "report")

    def fail(*_):
        raise ValueError("all rows of x are equal")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quality", fail)
        assert command(run, "evaluate") == 2
    assert (
        capsys.readouterr().err
        == f"potstill: evaluate: real against real: all rows of x are equal (test_pipeline.py, line {fail.__code__.co_firstlineno + 1})\n"
    )
    (run / "metrics.json").write_text('{"format": "other"}')
    assert command(run, "report") == 2
    err = capsys.readouterr().err
    assert err.startswith("potstill: report: ")
    assert "has format 'other', expected 'potstill-metrics/1'" in err


# ------------------------------------------------------------------ students side by side


def test_the_threads_of_a_training_do_not_depend_on_what_is_left_to_do(place, monkeypatch):
    monkeypatch.setattr(build, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def workers(todo, **compute):
        run = pipeline.Run(config.check(RECIPE | {"compute": {"device": "cpu", **compute}}), place.out, (), None)  # type: ignore[arg-type]
        return run.workers(todo)

    assert workers(6) == (6, 1)  # six students on eight cores
    assert workers(1) == (1, 1)
    assert workers(6, workers=2) == (2, 4)
    assert workers(1, workers=2) == (1, 4)
    assert workers(6, workers=2, threads=3) == (2, 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert workers(6) == (6, 2)
    monkeypatch.setenv("RANK", "0")
    assert workers(6, threads=3) == (1, 3)


def test_a_student_at_which_another_process_is_waited_for(place, capsys, monkeypatch):
    assert place.run("synthesize") == 0
    monkeypatch.setattr(jobs, "PATIENCE_SECONDS", 0.2)
    with lock(place.out / "state" / "students" / "student_data_free" / "seed-0.lock"):
        assert place.run("distill") == 1
    assert capsys.readouterr().err == "potstill: distill: not done: student_data_free/seed-0; run the same command again to go on\n"
    assert place.run("distill") == 0


GOING_ON = "run the same command again to go on"


@pytest.mark.parametrize(
    ("program", "code", "expected"),
    [
        ("print('noise'); print('{\"potstill\": \"it is bad\"}'); sys.exit(2)", 2, "it is bad"),
        ('print(\'{"potstill": "disk full"}\'); sys.exit(1)', 1, "disk full"),
        ("os.kill(os.getpid(), 9)", 1, f"distill: a worker was killed by signal 9 (9: often for want of memory); {GOING_ON}"),
        ("os.kill(os.getpid(), 15)", 1, f"distill: not done: student_data_free/seed-0, student_data_free/seed-1; {GOING_ON}"),
        ("sys.exit(130)", 1, f"distill: not done: student_data_free/seed-0, student_data_free/seed-1; {GOING_ON}"),
        ("print('noise')", 1, f"distill: not done: student_data_free/seed-0, student_data_free/seed-1; {GOING_ON}"),
        ("{}[3]", 1, "distill: a worker failed: KeyError: 3; all that it said is in "),
        ("print([1]); sys.exit(1)", 1, "distill: a worker failed: [1]; all that it said is in "),
        ("sys.exit(3)", 1, "distill: a worker failed: it said nothing; all that it said is in "),
    ],
)
def test_a_worker_that_fails_is_told_in_one_line_and_its_kin_are_stopped(place, capsys, monkeypatch, program, code, expected):
    """Workers of another program, which come at once: the first fails, the second would stay."""
    assert place.run("synthesize") == 0
    started = []
    programs = [f"import os, sys; {program}", "import time; time.sleep(30)"]

    def start(command, **options):
        assert command[1:4] == ["-P", "-m", "potstill.worker"]
        assert command[6] == str(os.getpid())
        assert options["env"]["OMP_NUM_THREADS"] == "1"
        kin = programs[len(started)] if program[-7:] != "noise')" else programs[0]
        started.append(popen([command[0], "-c", kin], **options))
        return started[-1]

    popen = subprocess.Popen
    monkeypatch.setattr(pipeline.subprocess, "Popen", start)
    began = time.monotonic()
    assert place.run("distill", seeds=[0, 1], compute=place.recipe["compute"] | {"workers": 2}) == code
    assert time.monotonic() - began < 20
    assert [process.poll() is not None for process in started] == [True, True]
    err = capsys.readouterr().err
    assert err.startswith(f"potstill: {expected}")
    assert err.count("\n") == 1
    log = place.out / "state" / "worker.log"
    assert log.exists() == ("all that it said" in expected)


# ------------------------------------------------------------------ other recipes


def test_a_run_without_any_data(place):
    assert place.run("run", data=None, evaluate=None, report=None) == 0
    assert (place.out / "student" / "model.safetensors").exists()
    assert not (place.out / "metrics.json").exists()


def test_a_run_without_inference(place):
    distill = {"generate": {"steps": 2, "batch": 8}, "infer": None}
    assert place.run("run", data=None, surrogate=None, evaluate=None, report=None, distill=distill) == 0
    assert json.loads((place.out / "students" / "student_data_free" / "seed-0" / "job.json").read_text())["updates"] == {"generate": 2}
    assert not (place.out / "surrogate").exists()


@pytest.mark.slow
def test_a_classifier_from_a_folder_of_images(place):
    images, labels = digits_like()
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = place.folder / "images" / str(label) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0]).save(path)
    train = {
        "model": {"kind": "classifier", "image": [1, 8, 8], "classes": 4, "width": 2},
        "steps": 40,
        "batch": 16,
        "lr": 2e-2,
        "warmup": 2,
    }
    alone = dict.fromkeys(("teacher", "student", "surrogate", "distill", "evaluate", "report"))
    data = {"kind": "folder", "path": "images", "test_fraction": 0.4}
    assert place.run("run", train=train, data=data, **alone) == 0
    judge = Classifier.from_pretrained(place.out / "teacher").eval()
    test = load(config.check(place.recipe | {"data": data}).data).test
    right = judge(torch.from_numpy(test.images).float() / 255).argmax(1).numpy() == test.labels
    assert json.loads((place.out / "train" / "held_out.json").read_text()) == {"accuracy": right.mean()}  # as it is used, in eval mode
    assert right.mean() > 0.5  # a quarter by chance


@pytest.mark.slow
def test_the_demo(tmp_path, monkeypatch, capsys):
    """The embedded recipe with fewer updates; whatever the zoo's models are worth."""
    monkeypatch.chdir(tmp_path)
    few = [f"distill.{phase}.steps=2" for phase in ("generate", "infer", "scratch")]
    arguments = [
        "demo",
        *few,
        "seeds=[0]",
        "surrogate.n=64",
        "evaluate.n=64",
        "evaluate.latency_repeats=3",
        "compute={threads: 1, workers: 1}",
    ]
    assert cli.main([*arguments, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Student, data-free" in out
    assert out.splitlines()[-1].startswith("report: runs/")
    assert (tmp_path / out.splitlines()[-1].removeprefix("report: ")).stat().st_size > 10_000


OWN = """
from torch import nn
from potstill.model import Images, Model
from own_net import Linear
import own_small

def teacher():
    net = Linear(32)

    def generate(sample):
        return net(sample.normal("z", (4,))).view(-1, 1, 8, 8)

    return Model(net, Images((1, 8, 8)), generate)

def student():
    net = own_small.Small()
    return Model(net, Images((1, 8, 8)), lambda sample: net(sample.normal("z", (4,))).view(-1, 1, 8, 8))
"""
OWN_NET = """
from torch import nn

class Linear(nn.Sequential):
    def __init__(self, inner):
        super().__init__(nn.Linear(4, inner), nn.Linear(inner, 64))
"""


OWN_SMALL = """
from own_net import Linear

class Small(Linear):
    def __init__(self):
        super().__init__(2)
"""


@pytest.mark.parametrize("changed", ["own", "own_net", "own_small"])
def test_code_of_ones_own_that_has_changed_is_another_input(place, changed):
    """A process each, for a module is imported once."""
    (place.folder / "own.py").write_text(OWN)
    (place.folder / "own_small.py").write_text(OWN_SMALL)
    (place.folder / "own_net.py").write_text(OWN_NET.replace("super()", "import torch; torch.manual_seed(0); super()"))
    place.recipe |= {"teacher": {"kind": "python", "target": "own:teacher"}, "student": {"target": "own:student"}}
    place.recipe["distill"] = {"generate": {"steps": 2, "batch": 8}, "infer": None}
    place.write(data=None, evaluate=None, report=None)

    def run():
        command = [sys.executable, "-m", "potstill", "run", "recipe.yaml", "--out", "out", "--import", "own"]
        done = subprocess.run(command, cwd=place.folder, env=environment(), capture_output=True, text=True)
        return done.returncode, done.stderr

    assert run()[0] == 0
    file = place.folder / f"{changed}.py"
    file.write_text(f"# a word on it\n\n{file.read_text()}")
    code, said = run()
    assert code == 0
    assert said.count("done already") == 2
    before = snapshot(place.out)
    file.write_text(re.sub("^(class Linear|class Small|def student)", r"times = 2\n\n\1", file.read_text(), flags=re.MULTILINE))
    code, said = run()
    assert code == 2
    assert f"differs: code.{changed}" in said
    assert snapshot(place.out) == before


def test_a_final_student_and_figures_that_are_damaged_are_made_again(place, capsys):
    assert place.run("run") == 0
    weights, metrics = place.out / "student" / "model.safetensors", place.out / "metrics.json"
    whole, figures = weights.read_bytes(), metrics.read_text()
    weights.write_bytes(whole + b" ")
    capsys.readouterr()
    assert cli.main(["run", str(place.write()), "--out", str(place.out)]) == 0
    assert "distill: student/model.safetensors is gone or has changed, again" in capsys.readouterr().err
    assert weights.read_bytes() == whole
    metrics.write_text(figures.replace('"n": 16', '"n": 17'))
    assert place.run("run") == 0
    assert json.loads(metrics.read_text())["reference"] == json.loads(figures)["reference"]
    assert cli.main(["doctor", str(place.out)]) == 0


def test_data_that_no_figure_comes_from_are_told_and_must_be_there(place, capsys):
    by_teacher = {"evaluate": place.recipe["evaluate"] | {"reference": "teacher"}}
    assert cli.main(["run", str(place.write(**by_teacher)), "--out", str(place.out)]) == 0
    assert "data is given, and figures are of the teacher's images all the same" in capsys.readouterr().err
    gone = by_teacher | {"data": {"kind": "folder", "path": "nowhere"}}
    assert place.run("run", "--dry-run", **gone) == 2
    assert "nowhere: no such file or folder" in capsys.readouterr().err


def test_arms_of_different_numbers_of_updates_are_told(place, capsys):
    place.recipe["arms"] = ["data_free", "scratch"]
    assert cli.main(["run", str(place.write()), "--out", str(place.out)]) == 0
    said = capsys.readouterr()
    assert "updates differ, so arms do not compare like for like: student_data_free 6, student_scratch 3" in said.err
    assert "students had different numbers of updates (3, 6): they do not compare like for like" in said.out
