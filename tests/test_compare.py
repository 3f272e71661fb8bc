"""`potstill compare`: several runs in one table, and runs that have nothing to say about each other."""

import json

import pytest

from potstill import cli

METRICS = {
    "reference": {"data": "digits", "n": 64, "features": "pixels", "floor": {"frechet": {"mean": 0.5, "sd": 0.1}}},
    "arms": {
        "teacher": {"frechet": {"mean": 1.0, "sd": 0.0}, "params": 100},
        "student_data_free": {"frechet": {"mean": 2.0, "sd": 0.5}, "params": 10},
    },
}


def run(folder, frechet=2.0, **reference):
    folder.mkdir(parents=True)
    metrics = json.loads(json.dumps(METRICS))
    metrics["arms"]["student_data_free"]["frechet"]["mean"] = frechet
    metrics["reference"] |= reference
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return str(folder)


def test_each_row_names_its_run(tmp_path, capsys):
    assert cli.main(["compare", run(tmp_path / "a", 2.0), run(tmp_path / "b", 3.0)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[0].strip(): line for line in lines}
    assert "2.0 ± 0.5" in rows["a: Student, data-free"]
    assert "3.0 ± 0.5" in rows["b: Student, data-free"]
    assert {"a: Teacher", "b: Teacher", "Floor (real against real)"} <= set(rows)


def test_folders_of_one_name_are_told_apart(tmp_path, capsys):
    assert cli.main(["compare", run(tmp_path / "a" / "run"), run(tmp_path / "b" / "run")]) == 0
    printed = capsys.readouterr().out
    assert "a/run: Teacher" in printed
    assert "b/run: Teacher" in printed


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ({"features": "classifier:x"}, "its features, classifier:x, differ from pixels"),
        ({"n": 32}, "its number of held-out images, 32, differ from 64"),
        ({"data": "strokes"}, "its data, strokes, differ from digits"),
    ],
)
def test_figures_against_something_else_are_not_put_beside(tmp_path, capsys, other, problem):
    assert cli.main(["compare", run(tmp_path / "a"), run(tmp_path / "b", **other)]) == 2
    captured = capsys.readouterr()
    assert problem in captured.err
    assert captured.out == ""


def test_folders_that_cannot_be_compared(tmp_path, capsys):
    here = run(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    assert cli.main(["compare", here, str(tmp_path / "empty")]) == 2
    assert "nothing measured; run the evaluate stage there first" in capsys.readouterr().err
    assert cli.main(["compare", here, here]) == 2
    assert "named twice" in capsys.readouterr().err
    (tmp_path / "empty" / "metrics.json").write_text("[1]")
    assert cli.main(["compare", here, str(tmp_path / "empty")]) == 2
    assert "not what potstill wrote there" in capsys.readouterr().err
