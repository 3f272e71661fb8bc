"""The fuzzer in short, and that it finds what it is for."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from potstill.errors import BadInput
from runs import environment

FILE = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does")


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("potstill_fuzz", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their names
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def found(fuzz, scratch, read, inputs=3):
    """The rows of a kind with that reader."""
    (scratch / "in" / "side").mkdir(parents=True, exist_ok=True)
    rows = []
    kind = fuzz.Kind(1.0, lambda rng, folder, sound: (folder / "sound").write_text(str(sound)), read)
    at = 0
    while at < inputs:
        at = fuzz._fork(kind, "toy", range(at, inputs), 0, scratch, rows)
    return rows


def on(number, act):
    """A reader that acts on the input of that number and is well with all others."""

    def read(folder):
        if folder.name == f"toy-{number}":
            act()

    return read


def refuse():
    raise BadInput("x: wrong")


def busy(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def fail():
    raise KeyError("x")


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        (fail, "KeyError: 'x' at "),
        (lambda: time.sleep(30), "hangs for more than"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "ended with -9"),
        (lambda: bytearray(3 << 30), "MemoryError"),
        (lambda: busy(0.7), "took 0."),
        (lambda: os.write(1, b"\x1b[2J"), "an escape on the terminal"),
    ],
    ids=["error", "hang", "death", "memory", "slow", "escape"],
)
def test_what_is_wrong_is_found_and_the_rest_is_read_on(fuzz, tmp_path, monkeypatch, act, expected):
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "WAIT_SECONDS", 5.0)
    rows = found(fuzz, tmp_path, on(1, act))
    wrong = [row for row in rows if row["outcome"] == "finding"]
    assert len(wrong) == 1
    assert expected in wrong[0]["text"]
    assert {row["at"] for row in rows if row["outcome"] == "accepted"} >= {0, 2}


def test_what_is_right_is_no_finding(fuzz, tmp_path):
    assert [row["outcome"] for row in found(fuzz, tmp_path, on(1, refuse))] == ["accepted", "refused", "accepted"]


def test_a_reader_that_refuses_what_is_sound_is_found(fuzz, tmp_path):
    assert any("sound input refused" in row["text"] for row in found(fuzz, tmp_path, lambda folder: refuse()))


def test_a_file_outside_is_seen(fuzz, tmp_path):
    (tmp_path / "in" / "side").mkdir(parents=True)
    before = fuzz._around(tmp_path)
    found(fuzz, tmp_path, on(1, lambda: Path("../../outside").write_text("x")))
    assert fuzz._around(tmp_path) - before == {"in/outside"}


def test_the_same_seed_makes_the_same_inputs(fuzz):
    def made(seed):
        rng = fuzz.random.Random(seed)
        return [fuzz.as_json(rng, {"a": [1, {"b": 2.5}], "c": "x"}) for _ in range(50)], [fuzz.spoiled(rng, b"abc" * 50) for _ in range(50)]

    assert made(1) == made(1)
    assert made(1) != made(2)
    assert len(set(made(1)[0])) > 40


def test_no_finding_in_a_few_hundred_inputs():
    kinds = "recipe,prompts,zoo,weights,state,surrogate,image,data,teacher,checkpoint"
    command = [sys.executable, str(FILE), "--inputs", "240", "--seed", "1", "--kinds", kinds]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["kind"] for row in rows] == kinds.split(",")
    assert sum(row["inputs"] for row in rows) >= 235
    assert all(row["refused"] for row in rows)
