"""What the terminal shows while something runs."""

import json
import re
import subprocess
import sys
from datetime import datetime

import pytest

from potstill import progress
from potstill.cli import main
from potstill.progress import Board, LogTail, Together, memory, span


@pytest.fixture(autouse=True)
def held(monkeypatch):
    """As much memory on every machine."""
    monkeypatch.setattr(progress, "memory", lambda: 3 << 29)


def entry(step, phase="generate", steps=10):
    return {"phase": phase, "step": step, "steps": steps, "loss": 1.5, "images_per_second": 20.0}


def test_the_newest_whole_line_is_read_once(tmp_path):
    path = tmp_path / "log.jsonl"
    tail = LogTail(path)
    assert tail.last() is None  # no file yet
    lines = [json.dumps(entry(step)) + "\n" for step in range(4)]
    path.write_text(lines[0] + lines[1] + lines[2][:9])
    assert tail.last() == entry(1)
    assert tail.last() is None
    path.write_text("".join(lines[:3]))
    assert tail.last() == entry(2)
    path.write_text(lines[0])  # a resumed training cuts its log
    assert tail.last() is None
    path.write_text(lines[0] + "no json\n[1]\n")
    assert tail.last() is None
    path.write_text("".join(lines))
    assert tail.last() == entry(3)


def test_a_line_now_and_then_where_there_is_no_terminal(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Board() as board:
        board.say("distill")
        for step in range(1, 181):
            clock[0] += 1
            board.training("a/seed-0", entry(step, steps=300))
    assert capsys.readouterr().err.splitlines() == [
        "distill",
        "  a/seed-0 generate: 60/300 loss 1.5, 20 images/s, about 4 min left, 1.5 GiB",
        "  a/seed-0 generate: 120/300 loss 1.5, 20 images/s, about 3 min left, 1.5 GiB",
        "  a/seed-0 generate: 180/300 loss 1.5, 20 images/s, about 2 min left, 1.5 GiB",
    ]


def test_what_is_left_is_of_all_students(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    phases = {"a/seed-0": {"generate": 300, "infer": 100}, "a/seed-1": {"generate": 300, "infer": 100}}
    with Board() as board:
        together = Together(board, phases)
        for step in range(1, 101):  # a second each: the first is in its second phase
            clock[0] += 1
            together.training("a/seed-0", entry(step, steps=100) | {"phase": "infer"})
            if step == 60:
                together.training("a/seed-1", entry(30, steps=300))
        clock[0] += 60
        together.end()
    assert capsys.readouterr().err.splitlines() == [
        "  all students: 360/800 updates; a/seed-0 infer 60/100, loss 1.5, about 7.33 min left, 1.5 GiB",
        "  all students: 800/800 about 0 s left, 1.5 GiB",
    ]


def test_one_student_is_shown_alone(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Board() as board:
        together = Together(board, {"a/seed-0": {"generate": 300}})
        together.training("a/seed-0", entry(60, steps=300))
        together.end()
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["  a/seed-0 generate"]


def test_a_pace_is_that_of_the_last_minute(capsys, monkeypatch):
    """Shards that are there already are counted in no time, and say nothing of those that are not."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with Board() as board:
        for done in (10_000, 20_000, 30_000):
            board.update("surrogate", done, 31_000, "images")
        for second in range(1, 121):
            clock[0] += 1
            board.update("surrogate", 30_000 + 5 * second, 31_000, "images")
    first, second = capsys.readouterr().err.splitlines()
    assert second == "  surrogate: 30600/31000 images, 5 images/s, about 80 s left, 1.5 GiB"
    assert first.startswith("  surrogate: 30300/31000 images, ")


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (5400, "90 min"), (7200, "2 h"), (3e5, "3.47 days")]
)
def test_a_stretch_of_time(seconds, expected):
    assert span(seconds) == expected


def test_memory_is_that_of_this_process_and_of_those_it_has_started():
    own = memory()
    assert 10 << 20 < own < 100 << 30
    code = "import sys; held = b'x' * (64 << 20); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert memory() - own > 48 << 20
        process.stdin.close()


def test_json_has_every_event_on_a_line(capsys):
    with Board(log_json=True) as board:
        board.say("  distill: é")
        board.training("a/seed-0", entry(5))
        board.update("surrogate", 8, 16, "images")
    out, err = capsys.readouterr()
    assert out == ""
    said, trained, made = map(json.loads, err.splitlines())
    assert datetime.fromisoformat(said.pop("time")).tzinfo is not None
    assert said == {"event": "say", "text": "distill: é"}
    expected = {"event": "progress", "task": "a/seed-0 generate", "done": 5, "total": 10, "memory_bytes": 3 << 29}
    assert {k: v for k, v in trained.items() if k != "time"} == expected | {"loss": 1.5, "images_per_second": 20.0}
    assert (made["task"], made["done"], made["total"]) == ("surrogate", 8, 16)


def test_a_command_that_logs_json_says_all_in_json(place, capsys):
    assert main(["run", str(place.write()), "--out", str(place.out), "--log-json"]) == 0
    out, err = capsys.readouterr()
    assert "Student, data-free" in out  # the table is no progress
    events = [json.loads(line) for line in err.splitlines()]
    assert next(e["text"] for e in events if e["event"] == "say") == "synthesize"
    tasks = {e["task"]: e for e in events if e["event"] == "progress"}
    assert {"surrogate", "student_data_free/seed-0 generate", "student_data_free/seed-0 infer", "evaluate"} <= tasks.keys()
    assert (tasks["surrogate"]["done"], tasks["surrogate"]["total"]) == (16, 16)
    assert tasks["student_data_free/seed-0 generate"]["loss"] > 0
    assert main(["run", str(place.write(seed="x")), "--out", str(place.out), "--log-json"]) == 2
    (error,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (error["event"], error["text"]) == ("error", "seed: a number is expected (found 'x')")
    with pytest.raises(SystemExit):
        main(["run", str(place.write()), "--log-json", "--quiet"])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[red]a[/red]", "a " * 200, "é [/]"])
def test_text_is_shown_as_it_is(capsys, text):
    with Board() as board:
        board.say(text)
    assert capsys.readouterr().err == f"{text}\n"


def test_quiet_is_quiet(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Board(quiet=True) as board:
        board.say("distill")
        board.update("a", 1, 2)
    assert capsys.readouterr().err == ""


def test_bars_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("TERM", "xterm")
    with Board() as board:
        for step in (1, 2, 10):
            board.training("a/seed-0", entry(step))
        board.update("synthesize", 3, 8, "images")
    assert "synthesize" in capsys.readouterr().err


def test_every_stage_says_how_much_memory_it_takes(place, capsys, monkeypatch):
    monkeypatch.setattr("potstill.pipeline.memory", lambda: 5 << 30)
    train = {"model": {"kind": "vae", "image": [1, 8, 8], "width": 4, "latent": 2}, "steps": 3, "batch": 8, "warmup": 0}
    sections = {"train": train, "teacher": {"kind": "trained"}}
    assert main(["run", str(place.write(**sections)), "--out", str(place.out)]) == 0
    lines = capsys.readouterr().err.splitlines()
    at = [i for i, line in enumerate(lines) if re.fullmatch(r"  (surrogate: )?about 5\.0 GiB of memory", line)]
    before = [next(line for line in reversed(lines[:i]) if not line.startswith(" ")) for i in at]
    assert before == ["train", "synthesize", "distill", "evaluate"]


def test_a_batch_that_is_larger_takes_more(place):
    from potstill import config, jobs
    from potstill.pipeline import Run

    def taken(batch):
        recipe = config.check(place.recipe | {"distill": {"generate": {"steps": 3, "batch": batch}, "infer": None}})
        run = Run(recipe, place.out, (), Board(quiet=True))
        return jobs.rehearse(run.shop, run.shop.teacher)

    one, two, four = taken(1000), taken(2000), taken(4000)
    assert four - two == 2 * (two - one) > 1000 * 4 * 64  # in proportion, and at least an image each
