"""One of the processes that train side by side, here in this process."""

import json
import os
import signal
import sys
import threading

import pytest

from potstill import worker
from potstill.state import lock


@pytest.fixture
def work(place, monkeypatch, capsys):
    """Prepare a run as the pipeline does, and be a worker of it: exit code, and what it printed."""

    def run(*, parent=None, modules=(), **sections):
        assert place.run("synthesize", **sections) == 0
        capsys.readouterr()
        arguments = ["worker", str(place.out), "identity", str(os.getppid() if parent is None else parent), *modules]
        monkeypatch.setattr(sys, "argv", arguments)
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        code = worker.main()
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
        out, err = capsys.readouterr()
        assert err == ""
        return code, out

    return run


def students(place):
    return sorted(str(p.parent.relative_to(place.out / "students")) for p in place.out.glob("students/*/*/model.safetensors"))


def test_it_trains_every_student_that_nobody_is_at(place, work, monkeypatch):
    monkeypatch.setattr("potstill.jobs.PATIENCE_SECONDS", 0.1)
    with lock(place.out / "state" / "students" / "student_data_free" / "seed-1.lock"):
        assert work(seeds=[0, 1, 2]) == (0, "")
    assert students(place) == ["student_data_free/seed-0", "student_data_free/seed-2"]
    marks = {p: p.stat().st_mtime_ns for p in place.out.glob("students/*/*/job.json")}
    assert all(json.loads(p.read_text())["identity"] == "identity" for p in marks)
    assert work(seeds=[0, 1, 2]) == (0, "")
    assert len(students(place)) == 3
    assert {p: p.stat().st_mtime_ns for p in marks} == marks


def test_a_loss_that_is_not_finite_is_the_last_thing_it_says(place, work):
    code, out = work(distill={"generate": {"steps": 4, "batch": 8, "lr": 1e30, "warmup": 0}})
    assert code == 2
    said = worker.verdict(f"noise\n{out}")
    assert said is not None
    assert said.startswith("student_data_free/seed-0: generate: ")
    assert "not finite" in said
    assert students(place) == []


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (OSError(28, "No space left on device", "a/b"), 1, "a/b: No space left on device"),
        (MemoryError(), 1, "out of memory; lower batch (of the surrogate: or mode clean, decode linear, save_memory), or compute.workers"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_other_ends(work, monkeypatch, error, code, expected):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("potstill.jobs.make_student", fail)
    found, out = work()
    assert found == code
    assert worker.verdict(out) == expected


def test_it_stops_when_its_parent_is_gone(place, work):
    assert work(parent=1 << 22) == (130, "")
    assert students(place) == []


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGINT, signal.SIGTERM)])
def test_it_saves_its_state_when_it_is_asked_to_stop(place, work, monkeypatch, numbers):
    """By both signals too: a terminal sends the first to all, and then the parent the second to its workers."""
    from potstill.distill.loop import Log

    def write(self, entry):
        if entry["step"] == 2:
            for number in numbers:
                signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "write", write)
        assert work(compute={"device": "cpu", "threads": 1, "log_steps": 1}) == (130, "")
    assert [p.name for p in place.out.glob("state/students/student_data_free/seed-0/*")] == ["step-00000002"]
    assert work(compute={"device": "cpu", "threads": 1, "log_steps": 1}) == (0, "")
    assert students(place) == ["student_data_free/seed-0"]


@pytest.mark.parametrize("output", ["", "text", "[]", "3", "null", '{"other": 1}', "{"])
def test_without_a_verdict(output):
    assert worker.verdict(output) is None


def test_a_second_signal_acts_as_it_did_before():
    with worker.stoppable() as keep_going:
        assert keep_going()
        signal.raise_signal(signal.SIGINT)
        assert not keep_going()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and background jobs have it
    try:
        with worker.stoppable() as keep_going:
            signal.raise_signal(signal.SIGINT)
            assert keep_going()
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_can_set_no_handler():
    found = []

    def run():
        with worker.stoppable() as keep_going:
            found.append(keep_going())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True]
