"""Trackers of other projects: what they are told, that it is told once, and what is said when one is missing or fails."""

import json
import sys
import types
from importlib.machinery import ModuleSpec

import pytest
from accelerate.utils import LoggerType

from potstill.distill import trackers
from potstill.distill.loop import accelerator
from potstill.errors import BadInput, Failed
from runs import cut_at, results

COUNTS = {"generate": 3, "infer": 3}


def entry(phase, step):
    return {"phase": phase, "step": step, "steps": 3, "loss": 1.5 * step, "loss/out": 1.5 * step}


@pytest.fixture
def wandb(monkeypatch):
    """A package that writes down what it is told."""
    found = types.ModuleType("wandb")
    found.__spec__ = ModuleSpec("wandb", None)
    found.begun, found.told, found.by, found.finished, found.broken = [], [], [], [], False

    class Run:
        def __init__(self, name):
            self.name = name

        def log(self, values, step):
            if found.broken:
                raise ConnectionError("no route\nto host")
            found.told.append((step, values))
            found.by.append(self.name)

        def finish(self):
            found.finished.append(1)
            raise RuntimeError("no route to host")

    def init(**arguments):
        found.begun.append(arguments)
        return Run(arguments["name"])

    found.init = init
    monkeypatch.setitem(sys.modules, "wandb", found)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    return found


def tell(folder, lines, names=("wandb",)):
    engine = accelerator("cpu")
    with trackers.tracked(engine, names, folder, "project", "arm/seed-0", COUNTS) as told:
        for line in lines:
            told(line)
    assert engine.trackers == []


def test_a_line_is_told_once_with_its_step_in_the_whole_training(tmp_path, wandb):
    tell(tmp_path, [entry("generate", 1), entry("generate", 3), entry("infer", 1)])
    tell(tmp_path, [entry("generate", 3), entry("infer", 1), entry("infer", 2)])  # it goes on from the state before
    assert [step for step, _ in wandb.told] == [1, 3, 4, 5]
    assert wandb.told[2][1] == {"infer/loss": 1.5, "infer/loss/out": 1.5}
    assert len(wandb.finished) == 2  # and that it fails is no error
    first, second = wandb.begun
    assert first == second  # the same record
    assert (first["project"], first["name"], first["resume"]) == ("project", "arm/seed-0", "allow")
    (tmp_path / "arm" / "seed-0" / "sent.json").write_text("broken")
    tell(tmp_path, [entry("infer", 1)])
    assert wandb.told[-1][0] == 4


def test_trainings_side_by_side_have_a_record_each(tmp_path, wandb):
    engine = accelerator("cpu")
    with trackers.tracked(engine, ["wandb"], tmp_path, "project", "a_w1/seed-0", COUNTS) as first:
        with trackers.tracked(engine, ["wandb"], tmp_path, "project", "a_w2/seed-0", COUNTS) as second:
            for step in (1, 2):
                first(entry("generate", step))
                second(entry("generate", step))
        first(entry("generate", 3))
    assert wandb.by == ["a_w1/seed-0", "a_w2/seed-0"] * 2 + ["a_w1/seed-0"]
    assert [begun["reinit"] for begun in wandb.begun] == ["create_new"] * 2  # or the second would get the first one's
    assert len(wandb.finished) == 2


def test_a_tracker_that_fails_is_one_error(tmp_path, wandb, monkeypatch):
    wandb.broken = True
    with pytest.raises(Failed, match=r"^compute\.trackers: could not take a line of the log \(ConnectionError: no route\); compute\."):
        tell(tmp_path, [entry("generate", 1)])
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(Failed, match=r"could not start wandb \(ImportError: accelerate finds no wandb"):
        tell(tmp_path, [])
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    with pytest.raises(Failed, match=r"could not start wandb \(ZeroDivisionError"):
        tell(tmp_path, [])


def test_without_trackers_and_in_other_processes_nobody_is_told(tmp_path, wandb):
    engine = accelerator("cpu")
    with trackers.tracked(engine, (), tmp_path, "project", "a", COUNTS) as told:
        assert told is None
    other = types.SimpleNamespace(is_main_process=False)
    with trackers.tracked(other, ("wandb",), tmp_path, "project", "a", COUNTS) as told:
        assert told is None
    assert wandb.begun == []
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named_before_anything_is_written(place, capsys, monkeypatch):
    find = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name))
    assert place.run("run", "compute.trackers=[tensorboard]") == 2
    expected = "potstill: compute.trackers: tensorboard is not installed; pip install tensorboard, or potstill[tensorboard]\n"
    assert capsys.readouterr().err == expected
    assert not place.out.exists()
    with pytest.raises(BadInput):
        trackers.check(["tensorboard"])


def curves(folder):
    """What TensorBoard reads from a folder: of each name, the steps and values."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder))
    found.Reload()
    return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_shows_the_log_though_the_run_was_cut(place, monkeypatch):
    pytest.importorskip("tensorboard")
    arguments = ("compute.trackers=[tensorboard]", "distill.generate.steps=5")
    sections = {"evaluate": None, "report": None}
    assert place.run("run", *arguments[1:], **sections) == 0
    plain = results(place.out)
    (place.out).rename(place.folder / "plain")
    with monkeypatch.context() as patch:
        cut_at(patch, 4)
        assert place.run("run", *arguments, "compute.save_seconds=1000", **sections) == 130
    job = "student_data_free/seed-0"
    before = curves(place.out / "trackers" / job)["generate/loss"]
    assert [step for step, _ in before] == [1, 2, 3]
    assert place.run("run", *arguments, **sections) == 0  # from the beginning, for no state was saved
    found = curves(place.out / "trackers" / job)
    lines = [json.loads(line) for line in (place.out / "students" / job / "log.jsonl").read_text().splitlines()]
    for phase, begin in (("generate", 0), ("infer", 5)):
        expected = [(begin + line["step"], line["loss"]) for line in lines if line["phase"] == phase]
        assert [step for step, _ in found[f"{phase}/loss"]] == [step for step, _ in expected]
        assert [value for _, value in found[f"{phase}/loss"]] == pytest.approx([value for _, value in expected])
    assert found["generate/loss"][:3] == before
    assert results(place.out) == plain
