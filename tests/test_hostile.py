"""Hostile input, file by file: what is no file, what unpacks to terabytes, what never ends; access tokens; a disk that is full."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from potstill import build, cli, config, data, state
from potstill.errors import BadInput, BrokenFile, RecipeError, shown
from potstill.families.lvae import LVAE
from potstill.importers import kd4dgm, pythae, read_checkpoint, transformers_classifier
from potstill.pipeline import Run
from potstill.progress import Board
from potstill.report import page
from potstill.synthesize import surrogate
from potstill.synthesize.prior import Prior
from runs import Place, cut_at, results
from test_report import make_metrics, make_run, write_log
from test_surrogate import forge, write

TOKEN = "hf_" + "Ab1" * 11


def png(side=8):
    buffer = io.BytesIO()
    Image.new("L", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def file_data(kind, path, **options):
    return data.load(data.FileData(kind=kind, path=str(path), test_fraction=0.4, **options))


# ------------------------------------------------------------------ what is no file


@pytest.fixture(params=["pipe", "device"])
def endless(request, tmp_path):
    """Makes a path that is waited for, or one of a device: here an empty one, or a test that fails would fill the memory."""

    def make(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path) if request.param == "pipe" else path.symlink_to("/dev/null")
        return path

    return make


@pytest.mark.parametrize("read", [state.sha256, state.read_json, state.read_tensors, read_checkpoint], ids=lambda f: f.__name__)
def test_pipes_and_devices_are_not_read(tmp_path, endless, read):
    with pytest.raises(BrokenFile, match="a pipe or a device; a file is expected"):
        read(endless(tmp_path / "x"))


@pytest.mark.parametrize("kind", ["npz", "parquet", "values"])
def test_nor_are_they_data(tmp_path, endless, kind):
    section = data.ValuesData(kind="values", path=str(tmp_path / "x.csv")) if kind == "values" else None
    path = endless(tmp_path / ("x.csv" if section else "x"))
    with pytest.raises(BadInput, match="a pipe or a device"):
        data.load(section) if section else file_data(kind, path)


def test_nor_parts_of_a_surrogate_or_a_state(tmp_path, endless):
    folder = write(tmp_path / "s")
    endless(folder / "manifest.json")
    with pytest.raises(BrokenFile, match="a pipe or a device"):
        surrogate.read(folder)
    states = state.States(tmp_path / "state")
    states.save(1, {"x": 1})
    endless(tmp_path / "state" / "step-00000001" / "state.safetensors")
    found, (complaint,) = states.load()
    assert found is None
    assert "a pipe or a device" in complaint


def test_a_mark_of_endless_size_is_not_parsed(tmp_path):
    (tmp_path / "x.json").write_text("[" + "1," * (state.MAX_JSON_BYTES // 2) + "1]")
    with pytest.raises(BrokenFile, match=f"more than {state.MAX_JSON_BYTES} bytes"):
        state.read_json(tmp_path / "x.json")


# ------------------------------------------------------------------ data


def bomb(path, dtype, shape, size):
    """An npz file of kilobytes with an array of ``size`` zeros."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w") as member:
        member.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))
    return path


def test_an_npz_that_unpacks_to_far_more_than_it_is(tmp_path):
    path = bomb(tmp_path / "x.npz", "|u1", (257 << 14, 8, 8), 257 << 20)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(BadInput, match=r"bytes that unpack to .* over 100 times as many; if that is meant, store it unpacked"):
        file_data("npz", path)
    with pytest.raises(BadInput, match="over 100 times as many"):
        data.load(data.ValuesData(kind="values", path=str(path), array="images"))


def test_an_npz_of_endless_tiny_images(tmp_path):
    path = bomb(tmp_path / "x.npz", "|u1", (1 << 18, 2, 2), 1 << 20)
    with pytest.raises(BadInput, match=r"262144 images in \d+ bytes; none are that small"):
        file_data("npz", path, size=16)


def test_large_data_that_is_what_it_seems_is_no_bomb():
    data.check_unpacked(2**40, 2**36, "x")
    with pytest.raises(BadInput):
        data.check_unpacked(2**40, 2**32, "x")
    data.check_rows(10_000, 1, "x")


def test_a_folder_of_endless_pictures_of_one_color(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_UNPACKED", 1 << 20)
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(png(400))
    with pytest.raises(BadInput, match="over 100 times as many"):
        file_data("folder", tmp_path)


def repeated(path, n, cell):
    one = pa.array([cell], pa.binary())
    pq.write_table(pa.table({"image": pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), one)}), path)
    return path


def test_a_parquet_file_that_says_one_picture_again_and_again(tmp_path, monkeypatch):
    path = repeated(tmp_path / "x.parquet", 2_000_000, png())
    with pytest.raises(BadInput, match=r"2000000 images in \d+ bytes; none are that small"):
        file_data("parquet", path)
    monkeypatch.setattr(data, "MAX_UNPACKED", 1 << 20)
    with pytest.raises(BadInput, match="over 100 times as many"):
        file_data("parquet", repeated(tmp_path / "x.parquet", 500, png(400)))


def test_a_parquet_file_whose_repeated_picture_is_made_small(tmp_path):
    path = repeated(tmp_path / "x.parquet", 5000, png(400))
    with pytest.raises(BadInput, match=r"of encoded images, which are the same ones"):
        file_data("parquet", path, size=2, mode="L")


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([0, 2**31], "labels are below 2147483648"), ([[1], [1, 2]], "one whole number per image is expected, found object")],
)
def test_labels_of_absurd_kinds(tmp_path, labels, expected):
    pq.write_table(pa.table({"image": [png(), png()], "label": labels}), tmp_path / "x.parquet")
    with pytest.raises(BadInput, match=expected):
        file_data("parquet", tmp_path / "x.parquet", label="label")


def test_labels_of_unequal_length_that_nobody_asked_for_are_left_out(tmp_path):
    pq.write_table(pa.table({"image": [png()] * 3, "label": [[1], [1, 2], []]}), tmp_path / "x.parquet")
    assert file_data("parquet", tmp_path / "x.parquet").train.labels is None


def test_a_jpeg_of_endless_scans():
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    assert data.decode(whole, "x").shape == (1, 64, 64)
    last = whole.rindex(b"\xff\xda")
    with pytest.raises(BadInput, match=r"JPEG of 1[0-9]{3} scans; at most 100 are read"):
        data.decode(whole[:last] + whole[last:-2] * 1001 + whole[-2:], "x")


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_formats_that_are_not_read(kind):
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, kind)
    with pytest.raises(BadInput, match="not a png, jpg, webp or bmp image"):
        data.decode(buffer.getvalue(), "x")


def test_a_shard_that_says_one_picture_again_and_again(tmp_path, monkeypatch):
    folder = write(tmp_path / "s")
    cell = pa.array([{"bytes": png(400), "path": None}] * 500, surrogate._FIELDS["image"])
    forge(folder, pa.table({"image": cell, "row": pa.array(range(500), pa.int64())}), rows=500)
    monkeypatch.setattr(data, "MAX_UNPACKED", 1 << 20)
    with pytest.raises(BadInput, match="over 100 times as many"):
        surrogate.read(folder)


def test_a_shard_with_two_columns_of_a_name(tmp_path):
    folder = write(tmp_path / "s")
    table = pq.read_table(folder / surrogate.shard_name(0))
    forge(folder, table.append_column("row", table["row"]))
    with pytest.raises(BrokenFile, match="not a shard of 8 images"):
        surrogate.read(folder)


# ------------------------------------------------------------------ networks


def saved(path, value):
    torch.save(value, path)
    return path


def test_a_checkpoint_that_holds_itself(tmp_path):
    cyclic = {}
    cyclic["state_dict"] = cyclic
    with pytest.raises(BrokenFile, match="a state dict of tensors is expected"):
        read_checkpoint(saved(tmp_path / "x.pt", cyclic))


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(10**6, 10**6), torch.eye(3).to_sparse(), torch.empty(3, device="meta")],
    ids=["a number told to be many", "sparse", "without data"],
)
def test_a_checkpoint_of_odd_tensors(tmp_path, tensor):
    with pytest.raises(BrokenFile, match="b is no tensor with a number of its own in each place"):
        read_checkpoint(saved(tmp_path / "x.pt", {"a": torch.zeros(2), "b": tensor}))


def test_a_checkpoint_that_is_packed(tmp_path):
    path = saved(tmp_path / "x.pt", {"a": torch.zeros(1 << 20)})
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(BrokenFile, match=r"a packed archive, which torch\.save does not write"):
        read_checkpoint(tmp_path / "y.pt")


def test_a_published_checkpoint_of_endless_levels_or_other_sizes(tmp_path):
    weights = LVAE((1, 8, 8), 4, 2, 2, 0.1).state_dict()
    for more in ({"u99999999999.out.weight": torch.zeros(1)}, {"u99.out.weight": torch.zeros(4, 4, 1, 1)}):
        with pytest.raises(BadInput, match=r"x\.pt: "):
            kd4dgm(saved(tmp_path / "x.pt", weights | more))
    # A network of those numbers would have 10^11 weights: it is never made.
    with pytest.raises(BadInput, match=r"u1\.1\.|u1\.0\."):
        kd4dgm(saved(tmp_path / "x.pt", weights | {"u1.0.weight": torch.zeros(1 << 17, 1, 5, 5)}), (1, 8, 8))


@pytest.mark.parametrize("shape", [[0, 4, 4], ["1", 4, 4], [1, 4, 10**9], [1, True, 4]])
def test_a_pythae_folder_of_absurd_shape(tmp_path, shape):
    saved(tmp_path / "model.pt", {"a": torch.zeros(1)})
    (tmp_path / "model_config.json").write_text(json.dumps({"input_dim": shape}))
    with pytest.raises(BadInput, match="input_dim is"):
        pythae(tmp_path)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"model_type": "vit", "num_hidden_layers": 10**9}, "num_hidden_layers is 1e+09; at most 256 are read"),
        ([], "a mapping is expected"),
        ({"model_type": "vit", "hidden_size": "x"}, "no image classifier that transformers can load"),
        ({"model_type": "vit", "num_attention_heads": 0}, "no image classifier that transformers can load"),
    ],
)
def test_a_classifier_of_absurd_description(tmp_path, described, expected):
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(BadInput) as found:
        transformers_classifier(str(tmp_path))
    assert expected in str(found.value)


@pytest.fixture
def pipeline(tmp_path):
    """A copy of the zoo's text-to-image pipeline, and a way to change a description in it."""
    folder = shutil.copytree(build.ZOO / "glyphs-sd", tmp_path / "sd")

    def change(name, **values):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return folder

    return change


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("unet/config.json", {"layers_per_block": 10**9}, "layers_per_block is 1e+09; at most 256 are read"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 300}, "down_block_types has 300 entries; at most 256"),
        ("unet/config.json", {"block_out_channels": [20_000, 20_000]}, "weights, but the safetensors files there have"),
        ("vae/config.json", {"latent_channels": 10**7}, "weights, but the safetensors files there have"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**10}, "num_train_timesteps is 1e+10; at most 65536 are read"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1e+09"),
        ("text_encoder/config.json", {"model_type": "\x1b[2J"}, "'model_type' has control characters in it"),
    ],
)
def test_a_pipeline_of_absurd_description_is_not_made(pipeline, name, values, expected):
    with pytest.raises(BadInput) as found:
        Prior.from_pretrained(pipeline(name, **values))
    assert expected in str(found.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_no_weights_of_a_pipeline_are_made_up_and_nothing_is_said_of_it_but_the_error(pipeline, capfd, part):
    folder = pipeline("unet/config.json")
    (path,) = (folder / part).glob("*.safetensors")
    tensors = state.read_tensors(path)
    name = next(name for name in tensors if name.endswith("weight"))
    from safetensors.torch import save_file

    save_file({("\x1b[2J" if k == name else k): v for k, v in tensors.items()}, path, {"format": "pt"})
    capfd.readouterr()
    with pytest.raises(BadInput, match=rf"{part}: not the weights of a .*: it lacks "):
        Prior.from_pretrained(folder)
    assert "\x1b" not in "".join(capfd.readouterr())


def test_a_pipeline_whose_description_is_too_deep_to_read(pipeline):
    folder = pipeline("unet/config.json")
    (folder / "scheduler" / "scheduler_config.json").write_text("[" * 100_000)
    with pytest.raises(BadInput, match=r"scheduler_config\.json: not JSON"):
        Prior.from_pretrained(folder)


def test_a_text_is_as_long_as_its_encoder_reads_whatever_the_tokenizer_says(pipeline):
    whole = Prior.from_pretrained(pipeline("tokenizer/tokenizer_config.json")).condition(["the digit two"], None)
    folder = pipeline("tokenizer/tokenizer_config.json", model_max_length=10**12)
    found = Prior.from_pretrained(folder).condition(["the digit two"], None)
    assert torch.equal(found.arguments["encoder_hidden_states"], whole.arguments["encoder_hidden_states"])


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("unet/config.json", {"sample_size": None}),
        ("unet/config.json", {"sample_size": [1, 2, 3]}),
        ("unet/config.json", {"sample_size": 10**12}),
        ("scheduler/scheduler_config.json", {"prediction_type": ["epsilon"]}),
        ("vae/config.json", {"scaling_factor": "x"}),
        ("text_encoder/config.json", {"vocab_size": 5}),
    ],
)
def test_a_text_to_image_teacher_of_wrong_description(pipeline, name, values):
    section = config.Pretrained(kind="pretrained", path=str(pipeline(name, **values)), prompts=("the digit two",), chain=2)
    with pytest.raises(BadInput, match=r"sd|prior: its vae|teacher: its link program fails"):
        build.teacher(section, Path(), ())


@pytest.mark.parametrize(
    "arguments",
    [
        {"norm_num_groups": "x"},
        {"attention_head_dim": [8]},
        {"down_block_types": [["a"], "b"]},
        {"time_embedding_type": 7},
        {"up_block_types": None},
    ],
)
def test_a_unet_of_absurd_arguments(arguments):
    with pytest.raises(BadInput):
        build.network(config.UNetNet(kind="unet", image=(1, 8, 8), width=8, arguments=arguments))


def test_a_network_of_a_recipe_is_no_larger_than_its_file(tmp_path):
    state.write_tensors(tmp_path / "x.safetensors", LVAE((1, 8, 8), 4, 2, 2, 0.1).state_dict())
    net = {"kind": "lvae", "image": [1, 8, 8], "width": 1_000_000, "levels": 2, "latent": 2}
    section = config.check({"name": "a", "teacher": {"kind": "weights", "path": str(tmp_path / "x.safetensors"), "net": net}}).teacher
    with pytest.raises(BadInput, match=r"but this LVAE has \(1000000"):
        build.loaded(section, tmp_path, ())


# ------------------------------------------------------------------ recipes


def test_endless_unknown_keys_do_not_take_long(tmp_path):
    (tmp_path / "x.yaml").write_text("name: a\n" + "".join(f"key{i}: 1\n" for i in range(3000)))
    start = time.process_time()
    with pytest.raises(RecipeError) as found:
        config.read(tmp_path / "x.yaml")
    assert time.process_time() - start < 5
    lines = str(found.value).splitlines()
    assert len(lines) == 101
    assert lines[-1] == "and 2900 more"


def test_endless_values_are_not_read(tmp_path):
    (tmp_path / "x.yaml").write_text("name: a\nseeds: [" + "1," * 100_000 + "]")
    with pytest.raises(RecipeError, match=r"x\.yaml: line 2: more than 10000 values"):
        config.read(tmp_path / "x.yaml")


def test_a_unet_of_endless_layers():
    with pytest.raises(RecipeError, match="layers: input should be less than or equal to 64"):
        config.check(
            {"name": "a", "teacher": {"kind": "weights", "path": "x", "net": {"kind": "unet", "image": [1, 8, 8], "layers": 10**6}}}
        )


# ------------------------------------------------------------------ access tokens


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (f"name: {TOKEN}", "name"),
        (f"name: a\nteacher: {{kind: pretrained, path: 'a/{TOKEN}'}}", "teacher.path"),
        (f"name: a\nteacher: {{kind: python, target: 'a:b', arguments: {{x: [1, '{TOKEN}']}}}}", "teacher.arguments.x.1"),
        (f"name: a\n{TOKEN}: 1", "hf_***"),
        ('name: "' + "".join(f"\\x{ord(c):02x}" for c in TOKEN) + '"', "name"),
    ],
)
def test_a_token_in_a_recipe_is_refused_and_not_repeated(tmp_path, capsys, text, place):
    (tmp_path / "x.yaml").write_text(text)
    assert cli.main(["run", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert f"x.yaml: {place}: an access token of the Hub" in err
    assert TOKEN not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [[f"teacher.path={TOKEN}"], [f"{TOKEN}=1"], [f"name=[{TOKEN}"], [f"name.b{TOKEN}=1"], ["--out", TOKEN, "x=]"]]
)
def test_nor_is_one_in_an_argument(place, capsys, words):
    assert cli.main(["run", str(place.write()), *words]) == 2
    assert TOKEN not in capsys.readouterr().err


def test_a_token_in_a_broken_recipe_is_not_repeated(tmp_path, capsys):
    for text in (f"{{a: {TOKEN}, [", f"a: {TOKEN}\na: {TOKEN}\n", f"a: &{TOKEN} 1\n", f"a: !{TOKEN} 1\n", f"{TOKEN}: 1\n{TOKEN}: 2"):
        (tmp_path / "x.yaml").write_text(text)
        assert cli.main(["run", str(tmp_path / "x.yaml")]) == 2
        assert TOKEN not in capsys.readouterr().err


def test_the_environments_token_reaches_no_message_whatever_it_looks_like(place, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "api-org-secret-1")
    assert shown("401 for api-org-secret-1\x1b[2J") == "401 for hf_***\\x1b[2J"
    Board().say("asked with api-org-secret-1")
    assert cli.main(["run", str(place.write(teacher={"kind": "pretrained", "path": "a/api-org-secret-1"}))]) == 2
    err = capsys.readouterr().err
    assert "asked with hf_***" in err
    assert "teacher.path: an access token" in err
    assert "secret" not in err


def test_prompts_hold_no_token(tmp_path):
    (tmp_path / "x.yaml").write_text(f"[a, {TOKEN}]")
    with pytest.raises(RecipeError, match=r"x\.yaml: 1: an access token"):
        build.prompts(config.Guided(kind="guided", prior="zoo:glyphs-sd", prompts_file=str(tmp_path / "x.yaml")))


def test_no_file_of_a_run_has_the_token_of_the_environment(place, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert place.run("run") == 0
    files = [p for p in place.folder.rglob("*") if p.is_file()]
    assert any(p.name == "README.md" for p in files)
    assert [p for p in files if TOKEN.encode() in p.read_bytes()] == []
    assert TOKEN not in "".join(capfd.readouterr())


def test_what_a_worker_that_fails_says_is_kept_without_tokens(place):
    with Board(quiet=True) as board, pytest.raises(Exception, match=r"hf_\*\*\*|worker failed"):
        Run(config.read(place.write()), place.out, (), board)._worker_failed(1, f"Traceback\nSomeError: {TOKEN}\x1b[2J")
    assert (place.out / "state" / "worker.log").read_text() == "Traceback\nSomeError: hf_***\\x1b[2J"


# ------------------------------------------------------------------ markup


def test_names_are_escaped_in_the_report_and_plain_on_the_terminal(tmp_path, capsys):
    hostile = "<script>alert(1)</script>\x1b[2J"
    metrics = make_metrics()
    metrics["arms"][hostile] = next(iter(metrics["arms"].values()))
    metrics["surrogates"] = {hostile: {"kind": hostile, "images": 1}}
    html = page.write(make_run(tmp_path / "run", metrics, recipe=f"name: '{hostile[:-4]}'\n")).read_text()
    assert html.count("<script") == 1, "the page's own"
    assert "&lt;script&gt;" in html
    Board().say(hostile)
    assert "\x1b[2J" not in capsys.readouterr().err


def test_a_log_of_endless_phases_makes_no_endless_page(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    path = run / "students" / "student_data_free" / "seed-0" / "log.jsonl"
    write_log(path, [])
    path.write_text("".join(json.dumps({"phase": f"p{i}", "step": s, "loss": 1.0}) + "\n" for i in range(500) for s in (1, 2)))
    monkeypatch.setattr(page, "_PANELS", 5)
    assert page.write(run).read_text().count("against updates") == 5


# ------------------------------------------------------------------ a run in trouble


def test_figures_that_are_no_json_any_more(place, capsys):
    assert place.run("run", report=None) == 0
    (place.out / "metrics.json").write_bytes(b"\xff{")
    capsys.readouterr()
    assert cli.main(["compare", str(place.out)]) == 2
    assert "metrics.json: not JSON" in capsys.readouterr().err
    assert place.run("run", report=None) == 0, "they are measured again"
    assert json.loads((place.out / "metrics.json").read_bytes())["format"] == "potstill-metrics/1"


def test_a_recipe_of_a_run_that_is_no_text_any_more_is_written_again(place):
    assert place.run("synthesize") == 0
    before = (place.out / "recipe.yaml").read_bytes()
    (place.out / "recipe.yaml").write_bytes(b"\xff" + before)
    assert place.run("synthesize") == 0
    assert (place.out / "recipe.yaml").read_bytes() == before


def test_memory_that_runs_out_before_a_run_begins(capsys, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("potstill.config.read", fail)
    assert cli.main(["run", "x.yaml"]) == 1
    assert capsys.readouterr().err == "potstill: out of memory\n"


@pytest.fixture
def whole(tmp_path_factory, monkeypatch):
    """What a run that nothing happens to makes."""
    folder = tmp_path_factory.mktemp("whole")
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        place = Place(folder)
        assert place.run("run") == 0
        return results(place.out)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_a_disk_that_is_full_leaves_the_last_good_state_at_any_moment(place, capsys, whole):
    resource = pytest.importorskip("resource")
    recipe = str(place.write())
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for size in (0, 200, 1500, 6000, 12_000, 30_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            code = cli.main(["run", recipe, "--out", str(place.out), "--quiet"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        err = capsys.readouterr().err
        assert code == 1, (size, err)
        assert err.count("\n") == 1, err
        assert "File too large" in err
        for path in place.out.rglob("*.json"):
            json.loads(path.read_text())
    assert place.run("run") == 0
    assert results(place.out) == whole


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="needs root, to be somebody else")
def test_a_folder_without_write_permission(capsys, monkeypatch, whole):
    folder = Path(tempfile.mkdtemp(prefix="potstill-"))  # nobody may not look into pytest's own
    try:
        folder.chmod(0o755)
        monkeypatch.chdir(folder)
        place = Place(folder)
        cut_at(monkeypatch, 2)
        assert place.run("run") == 130
        capsys.readouterr()
        place.write()
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # to be read, safetensors writes 0600
        before = results(folder)
        os.seteuid(65534)
        try:
            code = cli.main(["run", "recipe.yaml", "--out", "out", "--quiet"])
        finally:
            os.seteuid(0)
        err = capsys.readouterr().err
        assert code == 1, err
        assert err.startswith("potstill: out/")
        assert err.endswith("Permission denied\n")
        assert err.count("\n") == 1
        assert results(folder) == before
        assert cli.main(["run", "recipe.yaml", "--out", "out", "--quiet"]) == 0
        assert results(place.out) == whole
    finally:
        os.chdir("/")
        shutil.rmtree(folder)


def test_a_shard_that_is_deleted_under_a_running_job_is_named_and_made_again(place, capsys, monkeypatch, whole):
    from potstill import pipeline

    real, shard = pipeline.make_students, place.out / "surrogate" / surrogate.shard_name(1)

    def deleting(*arguments, **options):
        shard.unlink()
        real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_students", deleting)
        assert place.run("run") == 2
    assert capsys.readouterr().err == f"potstill: student_data_free/seed-0: {shard}: no such file\n"
    assert place.run("run") == 0
    assert shard.exists()
    assert results(place.out) == whole
