"""potstill doctor RUN: every file of a run that is gone or changed, by one byte, is named; a sound run is sound."""

from __future__ import annotations

import json
import shutil

import pytest

from potstill import cli
from potstill.errors import BadInput
from potstill.inventory import MADE, damage, sealed
from potstill.pipeline import STAGES
from potstill.state import fingerprint
from runs import STEPS, Place, cut_at

SECTIONS = {
    "train": {"model": {"kind": "lvae", "image": [1, 8, 8], "width": 4, "levels": 2, "latent": 2, "std": 0.1}} | STEPS,
    "teacher": {"kind": "trained"},
    "surrogates": {"more": {"n": 8, "shard": 4}},
    "arms": ["data_free", {"kind": "data_free", "name": "other", "surrogate": "more"}],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is done. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        place = Place(folder)
        assert place.run("run", **SECTIONS) == 0
    return place.out


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


def files(folder):
    """All that say something: the lock is an empty file."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


def changed(path):
    """One byte of it is another."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x01
    path.write_bytes(data)


def test_every_stage_lists_what_it_made():
    assert tuple(MADE) == STAGES


def test_a_sound_run(out, capsys):
    assert damage(out) == []
    assert cli.main(["doctor", str(out)]) == 0
    assert "every file is as it was written" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", [changed, lambda path: path.unlink(), lambda path: path.write_bytes(b"")], ids=["byte", "gone", "empty"])
def test_damage_to_any_file_is_found_and_named(out, spoil):
    whole = files(out)
    assert len(whole) > 30
    assert {"recipe.yaml", "metrics.json", "report.html", "log.jsonl", "README.md", "pictures.npz", "manifest.json"} <= {
        p.name for p in whole
    }
    # Without its last mark, a run is one that was cut short just before it.
    last = [] if spoil is changed else [out / "report" / "done.json"]
    for path in [p for p in whole if p not in last]:
        before = path.read_bytes()
        spoil(path)
        found = damage(out)
        assert any(str(path) in line for line in found), path
        path.write_bytes(before)
    assert damage(out) == []


def test_all_of_them_are_named_at_once_on_the_command_line(out, capsys):
    spoiled = [out / "student" / "model.safetensors", out / "surrogates" / "more" / "shard-00001.parquet", out / "report.html"]
    for path in spoiled:
        changed(path)
    assert cli.main(["doctor", str(out)]) == 2
    said = capsys.readouterr().err
    assert all(str(path) in said for path in spoiled)
    assert len(said.splitlines()) == len(spoiled)


def test_a_link_in_place_of_a_file_is_no_file_of_ours(out, tmp_path):
    elsewhere = tmp_path / "weights"
    path = out / "student" / "model.safetensors"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)
    assert damage(out) == [f"{path}: gone"]


def test_what_was_added_is_no_damage(out):
    (out / "teacher" / "activations.safetensors").write_bytes(b"mine")
    (out / "notes.txt").write_text("mine")
    assert damage(out) == []


def test_a_mark_that_lists_other_files_is_found(out):
    path = out / "distill" / "done.json"
    whole = json.loads(path.read_text())
    whole["files"].pop("student/model.safetensors")
    path.write_text(json.dumps(whole))
    assert damage(out) == [f"{path}: not as it was written"]


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/hostname"])
def test_a_mark_that_points_out_of_the_run_is_not_followed(out, name):
    path = out / "distill" / "done.json"
    whole = {"files": {name: "0" * 64}}
    path.write_text(json.dumps(whole | {"sha256": fingerprint(whole)}))
    assert damage(out) == [f"{path}: names {name}, which is no file of the run"]


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"files": 7, "sha256": 1}', '{"files": {"a": 1}'])
def test_marks_that_are_none(out, text):
    for name in ("begun.json", "done.json"):
        path = out / "evaluate" / name
        before = path.read_text()
        path.write_text(text)
        assert len(damage(out)) == 1
        assert str(path) in damage(out)[0]
        path.write_text(before)


def test_states_of_a_run_that_was_cut_short(place, monkeypatch):
    cut_at(monkeypatch, 3)
    assert place.run("run") == 130
    assert damage(place.out) == []
    states = sorted(place.out.glob("state/students/*/*/step-*/*"))
    assert states
    for path in states:
        before = path.read_bytes()
        changed(path)
        assert any(str(path.parent) in line for line in damage(place.out)), path
        path.write_bytes(before)


def test_no_run(tmp_path, capsys):
    with pytest.raises(BadInput, match="no folder of a run"):
        damage(tmp_path)
    assert cli.main(["doctor", str(tmp_path / "nowhere")]) == 2
    assert "no folder of a run" in capsys.readouterr().err


def test_a_seal_is_of_all_that_is_before_it():
    text = sealed("a: 1\n")
    assert text.startswith("a: 1\n# sha256 ")
    assert sealed("a: 2\n") != text.replace("1", "2", 1)
