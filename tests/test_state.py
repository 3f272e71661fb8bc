"""Files that survive: atomic writes, saved states, tensors from outside, locks."""

import json
import os
import pickle
import stat
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from potstill import state
from potstill.errors import BrokenFile, Locked


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# ------------------------------------------------------------------ writing


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "a.json"
    state.write_json(path, {"a": 1})
    state.write_json(path, {"a": [1.5, None, "é"]})
    assert state.read_json(path) == {"a": [1.5, None, "é"]}
    assert os.listdir(path.parent) == ["a.json"]


def test_a_reader_has_the_old_file_or_the_new_one_never_half_of_both(tmp_path):
    path = tmp_path / "a.txt"
    state.write_text(path, "old " * 100_000)
    with path.open() as reader:
        start = reader.read(10)
        state.write_text(path, "new")
        assert start + reader.read() == "old " * 100_000
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_crash_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def crash():
        with state.replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise error

    with pytest.raises(error):
        crash()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_without_nan(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        state.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(tmp_path, mask, expected):
    before = os.umask(mask)
    try:
        state.write_text(tmp_path / "a.txt", "a")
        state.write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
        with state.new_folder(tmp_path / "folder") as folder:
            (folder / "b").write_text("b")
        states = state.States(tmp_path / "states")
        states.save(1, {"x": torch.zeros(2)})
    finally:
        assert os.umask(before) == mask  # reading the mask put it back
    files = [tmp_path / "a.txt", tmp_path / "a.safetensors", tmp_path / "folder" / "b", *(tmp_path / "states").glob("*/*")]
    assert {mode(f) for f in files} == {expected}
    assert mode(tmp_path / "folder") == expected | (0o111 & ~mask)


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "folder"

    def crash():
        with state.new_folder(target) as temporary:
            (temporary / "a").write_text("a")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        crash()
    assert os.listdir(tmp_path) == []
    with state.new_folder(target) as temporary:
        (temporary / "a").write_text("a")
        assert not target.exists()
    assert os.listdir(target) == ["a"]
    assert os.listdir(tmp_path) == ["folder"]


def test_tied_weights_are_written_each_in_full(tmp_path):
    layer = torch.nn.Linear(3, 3, bias=False)
    state.write_tensors(tmp_path / "a.safetensors", {"a": layer.weight, "b": layer.weight, "c": layer.weight[1:].T})
    found = state.read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(found["a"], layer.weight)
    assert torch.equal(found["b"], layer.weight)
    assert torch.equal(found["c"], layer.weight[1:].T)


@contextmanager
def nearly_full(size):
    """Files of this process cannot grow past ``size``, as on a disk that is full there."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_is_an_os_error_and_leaves_nothing(tmp_path):
    large = {"x": torch.zeros(9999)}
    with nearly_full(4096), pytest.raises(OSError, match="File too large"):
        state.write_tensors(tmp_path / "a.safetensors", large)
    with nearly_full(4096), pytest.raises(OSError, match="File too large"):
        state.States(tmp_path / "states").save(1, large)
    with nearly_full(4096), pytest.raises(OSError, match="File too large"):
        state.write_text(tmp_path / "a.txt", "a" * 9999)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_safetensors_texts_become_the_errors_of_the_system(tmp_path):
    error = state.os_error(Exception("Error while serializing: I/O error: No space left on device (os error 28)"), tmp_path / "a")
    assert (error.errno, error.strerror, error.filename) == (28, "No space left on device", str(tmp_path / "a"))
    assert str(state.os_error(Exception("odd"), Path("a"))) == "a: odd"


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path):
    kept = ["a.txt", ".hidden", ".notes.tmp", "a.12.tmp", ".git/a.12.tmp"]
    left = [".a.txt.123.tmp", "deep/.b.json.9.tmp", "deep/.step-00000001.abcd_123.tmp/state.safetensors"]
    for name in kept + left:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    state.sweep(tmp_path)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(kept)
    assert os.listdir(tmp_path / "deep") == []


# ------------------------------------------------------------------ saved states


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_nest_comes_back_as_it_was(tmp_path):
    shared = torch.arange(6.0)
    tree = {
        "step": 3,
        "phase": "generate",
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 1: {}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1], "foreach": None, "fused": True}],
        },
        "odd": [torch.zeros(0), torch.ones(2, dtype=torch.bfloat16), torch.tensor(True), (), [], {}, {"$tensor": "x", "$dict": []}],
        "shared": [shared, shared[2:], shared.view(2, 3).T],
        "same path": {1: torch.zeros(1), "1": torch.ones(1), "a/b": torch.ones(2), "a": {"b": torch.zeros(2)}},
        "small": 5e-324,
    }
    states = state.States(tmp_path / "states")
    states.save(3, tree)
    found, complaints = states.load()
    assert same(found, tree)
    assert complaints == []


@pytest.mark.parametrize("tree", [{"a": object()}, {"a": {(1, 2): 3}}, {"a": {1}}])
def test_what_cannot_be_read_back_is_not_saved(tmp_path, tree):
    with pytest.raises(TypeError, match="cannot save"):
        state.States(tmp_path).save(1, tree)
    assert os.listdir(tmp_path) == []


def test_the_newest_two_are_kept_in_the_order_of_their_numbers(tmp_path):
    states = state.States(tmp_path)
    for step in (1, 9, 99_999_999, 100_000_000):  # the last has a digit more, and sorts first as text
        states.save(step, {"step": step})
    assert sorted(os.listdir(tmp_path)) == ["step-100000000", "step-99999999"]
    assert states.load()[0] == {"step": 100_000_000}
    states.save(100_000_000, {"step": "again"})
    assert states.load()[0] == {"step": "again"}
    states.clear()
    assert states.load() == (None, [])
    states.clear()


def corrupted(how):
    def spoil(folder):
        weights, manifest = folder / "state.safetensors", folder / "manifest.json"
        content = json.loads(manifest.read_text())
        if how == "bit":
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(data)
        elif how == "truncated":
            weights.write_bytes(weights.read_bytes()[:-3])
        elif how == "no weights":
            weights.unlink()
        elif how == "no manifest":
            manifest.unlink()
        elif how == "empty manifest":
            manifest.write_text("")
        elif how == "a list":
            manifest.write_text("[]")
        elif how == "format":
            manifest.write_text(json.dumps(content | {"format": "potstill-state/9"}))
        elif how == "unknown tensor":
            manifest.write_text(json.dumps(content | {"state": {"$dict": [["x", {"$tensor": "y"}]]}}))
        elif how == "three":
            manifest.write_text(json.dumps(content | {"state": {"$dict": [["x", 1, 2]]}}))
        elif how == "list as key":
            manifest.write_text(json.dumps(content | {"state": {"$dict": [[[], 1]]}}))
        else:
            manifest.write_text(json.dumps(content | {"state": {"$dict": 7}}))

    return pytest.param(spoil, id=how)


@pytest.mark.parametrize(
    "spoil",
    [
        corrupted(how)
        for how in (
            "bit",
            "truncated",
            "no weights",
            "no manifest",
            "empty manifest",
            "a list",
            "format",
            "unknown tensor",
            "three",
            "list as key",
            "seven",
        )
    ],
)
def test_a_spoiled_newest_falls_back_to_the_one_before_and_says_so(tmp_path, spoil):
    states = state.States(tmp_path)
    for step in (1, 2):
        states.save(step, {"x": torch.full((3,), float(step))})
    spoil(tmp_path / "step-00000002")
    found, complaints = states.load()
    assert found is not None
    assert torch.equal(found["x"], torch.ones(3))
    assert len(complaints) == 1
    assert "step-00000002" in complaints[0]
    spoil(tmp_path / "step-00000001")
    found, complaints = states.load()
    assert found is None
    assert len(complaints) == 2


def test_a_killed_save_is_no_state(tmp_path):
    states = state.States(tmp_path)
    states.save(1, {"step": 1})
    (tmp_path / ".step-00000002.abcdefgh.tmp").mkdir()
    (tmp_path / "step-new").mkdir()
    assert states.load() == ({"step": 1}, [])


# ------------------------------------------------------------------ tensors from outside


def safetensors(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor(dtype, shape, start, end):
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x00", id="one byte"),
        pytest.param(os.urandom(512), id="garbage"),
        pytest.param(struct.pack("<Q", 1 << 60) + b"{}", id="a header longer than the file"),
        pytest.param(struct.pack("<Q", (1 << 64) - 1), id="a header of all bytes there are"),
        pytest.param(safetensors(b"[1, 2"), id="a header that is no JSON"),
        pytest.param(safetensors([1]), id="a header that is a list"),
        pytest.param(safetensors(b'{"a":' * 5000), id="a deep header"),
        pytest.param(safetensors(tensor("F32", [1000], 0, 4), bytes(4)), id="more values than bytes"),
        pytest.param(safetensors(tensor("F32", [1], 0, 4000), bytes(4)), id="past the end"),
        pytest.param(safetensors(tensor("F32", [1], 4, 0), bytes(4)), id="backwards"),
        pytest.param(safetensors(tensor("F32", [-1], 0, 4), bytes(4)), id="a negative size"),
        pytest.param(safetensors(tensor("F32", [2**62, 2**62], 0, 4), bytes(4)), id="an overflow"),
        pytest.param(safetensors(tensor("F99", [1], 0, 4), bytes(4)), id="an unknown type"),
        pytest.param(safetensors(tensor("F32", [1], 0, 4), bytes(8)), id="bytes left over"),
    ],
)
def test_a_file_that_is_not_safetensors_is_named(tmp_path, data):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(BrokenFile, match=r"model\.safetensors: not a whole safetensors file"):
        state.read_tensors(path)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "model.safetensors"
    state.write_tensors(path, {"x": torch.arange(4.0), "y": torch.zeros(2, 2)})
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(BrokenFile):
            state.read_tensors(path)


class Evil:
    def __reduce__(self):
        return (os.abort, ())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_and_never_run(tmp_path, protocol):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Evil(), protocol))
    with pytest.raises(BrokenFile, match="pickled checkpoint" if protocol >= 2 else "not a whole safetensors file"):
        state.read_tensors(path)


def test_a_torch_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    torch.save({"x": torch.zeros(2)}, path)
    with pytest.raises(BrokenFile, match=r"pickled checkpoint.*convert it to safetensors"):
        state.read_tensors(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(BrokenFile, match="nope: no such file"):
        state.read_tensors(tmp_path / "nope")
    with pytest.raises(BrokenFile, match="a folder"):
        state.read_tensors(tmp_path)
    with pytest.raises(BrokenFile, match="nope: no such file"):
        state.read_json(tmp_path / "nope")
    with pytest.raises(BrokenFile, match="cannot be read"):
        state.read_json(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"\x00"])
def test_a_file_that_is_not_json_is_named(tmp_path, data):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(BrokenFile, match=r"a\.json: not JSON"):
        state.read_json(path)


def test_a_fingerprint_does_not_depend_on_the_order_of_keys():
    assert state.fingerprint({"a": 1, "b": [1, None]}) == state.fingerprint({"b": [1, None], "a": 1})
    assert state.fingerprint({"a": 1}) != state.fingerprint({"a": 1.5}) != state.fingerprint({"a": "1"})


# ------------------------------------------------------------------ locks

HOLDER = """
import sys, time
from contextlib import contextmanager
from pathlib import Path
from potstill.state import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run/x.lock."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / "x.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_lock_keeps_others_out_until_its_holder_is_killed(tmp_path, holder):
    path = tmp_path / "run" / "x.lock"
    with pytest.raises(Locked, match="run: another potstill process is working in this folder"), state.lock(path):
        pass
    with pytest.raises(Locked, match="my run"), state.lock(path, what="my run"):
        pass
    holder.kill()
    holder.wait()
    with state.lock(path, 10):
        pass


def test_waiting_for_a_lock_ends_when_asked_to(tmp_path, holder):
    with pytest.raises(KeyboardInterrupt), state.lock(tmp_path / "run" / "x.lock", 60, keep_going=lambda: False):
        pass


def test_a_lock_file_left_over_is_harmless(tmp_path):
    path = tmp_path / "x.lock"
    path.write_text("")
    for _ in range(2):
        with state.lock(path):
            pass
    assert path.exists()
