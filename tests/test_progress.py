"""What the terminal shows while something runs."""

import json

import pytest

from potstill import progress
from potstill.progress import Board, LogTail


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
        for step in range(1, 61):
            clock[0] += 1
            board.training("a/seed-0", entry(step, steps=100))
    assert capsys.readouterr().err.splitlines() == [
        "distill",
        "  a/seed-0 generate: 20/100 loss 1.5, 20 images/s, about 80 s left",
        "  a/seed-0 generate: 40/100 loss 1.5, 20 images/s, about 60 s left",
        "  a/seed-0 generate: 60/100 loss 1.5, 20 images/s, about 40 s left",
    ]


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
