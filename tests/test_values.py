"""Data that are no pictures: points and strokes, from file to report."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from potstill import build, config, data, strokes
from potstill.errors import BadInput, BrokenFile
from potstill.evaluate.features import pixels, standardized
from potstill.evaluate.sketch import Sketch
from potstill.families.helmholtz import HelmholtzMachine
from potstill.families.vae import VAE
from potstill.glyphs import FONTS
from potstill.model import Images
from potstill.noise import Noise
from potstill.report.figures import read_pictures
from potstill.synthesize import surrogate
from potstill.synthesize.synthesis import Made
from runs import Place


def values(path, **options):
    return data.load(config.ValuesData(kind="values", path=str(path), **options))


# ------------------------------------------------------------------ files


def test_old_faithful_is_whole():
    found = data.load(config.OldFaithfulData(kind="old_faithful"))
    whole = np.concatenate([found.train.images, found.test.images])
    assert (found.train.images.shape, found.test.images.shape, whole.dtype) == ((136, 2, 1, 1), (136, 2, 1, 1), np.float32)
    # The mean and standard deviation of all 272, as the published code has them.
    assert whole[:, :, 0, 0].astype(float).mean(0) == pytest.approx([3.48778309, 70.89705882], rel=1e-6)
    assert whole[:, :, 0, 0].astype(float).std(0) == pytest.approx([1.13927121, 13.56996002], rel=1e-6)
    again = data.load(config.OldFaithfulData(kind="old_faithful", seed=1))
    assert not np.array_equal(again.train.images, found.train.images)


def test_a_csv_file_of_points(tmp_path):
    (tmp_path / "a.csv").write_text("height,weight,age\n" + "".join(f"{i},{i}.5,-{i}e2\n" for i in range(10)) + "\n")
    found = values(tmp_path / "a.csv", test_fraction=0.2)
    assert (found.train.images.shape, found.test.images.shape) == ((8, 3, 1, 1), (2, 3, 1, 1))
    rows = sorted(np.concatenate([found.train.images, found.test.images])[:, :, 0, 0].tolist())
    assert rows == [[i, i + 0.5, -100.0 * i] for i in range(10)]


@pytest.mark.parametrize(("shape", "expected"), [((6, 2), (2, 1, 1)), ((6, 3, 5), (3, 5, 1)), ((6, 2, 3, 4), (2, 3, 4))])
@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int16])
def test_an_npz_file_of_values(tmp_path, shape, expected, dtype):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype) - 7
    np.savez(tmp_path / "a.npz", mine=array)
    np.savez(tmp_path / "b.npz", mine=array, other=array, x=array[:2])
    found = values(tmp_path / "a.npz", test_path=str(tmp_path / "b.npz"), array="mine")
    assert found.train.images.dtype == np.float32
    assert found.train.images.shape == (6, *expected)
    assert np.array_equal(found.train.images.ravel(), array.ravel())
    assert len(values(tmp_path / "b.npz").train.images) == 1  # of two arrays without a name, that named x


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a,b\n1,2\n3\n", r"a\.csv, row 3: 1 columns, but the first row has 2"),
        ("a,b\n1,2\n3,four\n", r"a\.csv, row 3: numbers between commas are expected, found '3,four'"),
        ("a,b\n1,2\n3,\n", r"a\.csv, row 3: numbers between commas"),
        ("a,b\n1,2\n3,nan\n", r"a\.csv: a value that is no finite number of 32 bits in row 1"),
        ("a,b\n1,2\n3,1e39\n", r"a\.csv: a value that is no finite number of 32 bits in row 1"),
        ("a,b\n", r"a\.csv: values of shape \(0,\)"),
        ("", r"a\.csv: values of shape \(0,\)"),
        (b"a,b\n\xff\xfe\n", r"a\.csv: not a csv file \(invalid start byte in byte 4\)"),
        ("a,b\n1,2\n", "1 images are too few"),
    ],
)
def test_a_wrong_csv_file_is_named(tmp_path, content, expected):
    (tmp_path / "a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(BadInput, match=expected):
        values(tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("arrays", "options", "expected"),
    [
        ({"x": np.zeros(5)}, {}, r"array x: values of shape \(5,\); \(n, C\), \(n, C, steps\) or \(n, C, H, W\) is expected"),
        ({"x": np.zeros((2, 2, 2, 2, 2))}, {}, "array x: values of shape"),
        ({"x": np.zeros((0, 2))}, {}, "array x: values of shape"),
        ({"x": np.array([["a"]])}, {}, "array x: values of type <U1; real numbers are expected"),
        ({"x": np.zeros((2, 2), complex)}, {}, "values of type complex128"),
        ({"x": np.array([[1.0], [np.inf]])}, {}, "no finite number of 32 bits in row 1"),
        ({"x": np.array([[1.0], [1e300]])}, {}, "no finite number of 32 bits in row 1"),
        ({"x": np.zeros((2, 2)), "y": np.zeros((2, 2))}, {"array": "z"}, r"no array z; it has x, y\. Set data\.array"),
        ({"a": np.zeros((2, 2)), "b": np.zeros((2, 2))}, {}, r"no array x; it has a, b\. Set data\.array"),
        ({"x": np.array([[{}]])}, {}, "neither a csv file nor an npz file of plain arrays"),
    ],
)
def test_a_wrong_npz_file_is_named(tmp_path, arrays, options, expected):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadInput, match=expected):
        values(tmp_path / "a.npz", **options)


def test_files_that_are_too_large_or_missing_or_unlike_are_named(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 2)))
    np.savez(tmp_path / "b.npz", x=np.zeros((5, 3)))
    (tmp_path / "a.csv").write_text("a\n1\n2\n")
    (tmp_path / "c.npz").write_bytes(b"no zip")
    with pytest.raises(BadInput, match=r"b\.npz: \(3, 1, 1\), but .*a\.npz is \(2, 1, 1\)"):
        values(tmp_path / "a.npz", test_path=str(tmp_path / "b.npz"))
    for name, expected in (("c.npz", "neither a csv file nor an npz file"), ("d.npz", "no such file")):
        with pytest.raises(BadInput, match=expected):
            values(tmp_path / name)
    monkeypatch.setattr(data, "MAX_VALUES", 9)
    monkeypatch.setattr(data, "MAX_CSV_BYTES", 5)
    with pytest.raises(BadInput, match=r"a\.npz: array x: 10 values; at most 9 are read"):
        values(tmp_path / "a.npz")
    with pytest.raises(BadInput, match=r"a\.csv: 6 bytes; at most 5 are read"):
        values(tmp_path / "a.csv")


# ------------------------------------------------------------------ strokes


def test_an_outline_is_closed_and_of_one_height():
    zero = strokes.outline("0", FONTS[0])
    assert len(zero) == 2  # the hole
    every = np.concatenate(zero)
    assert np.ptp(every[:, 1]) == pytest.approx(1)
    assert (every.max(0) + every.min(0)) == pytest.approx([0, 0], abs=1e-9)
    for contour in zero:
        assert np.array_equal(contour[0], contour[-1])
        assert contour[0, 1] == contour[:, 1].max()
    assert np.ptp(zero[0][:, 0]) > np.ptp(zero[1][:, 0])


def test_points_are_equally_far_apart_along_a_contour():
    square = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]], float)
    found = strokes.resampled((square, square / 2), 25)
    assert found.shape == (25, 3)
    up = np.flatnonzero(found[:, 2])
    assert up.tolist() == [16, 24]  # twice the length, twice the points
    assert np.linalg.norm(np.diff(found[:17, :2], axis=0), axis=1) == pytest.approx(np.full(16, 0.25))
    assert np.array_equal(found[0, :2], found[16, :2])


def test_strokes_depend_on_their_row_alone_and_go_back_to_where_they_began():
    noise = Noise((3,))
    together, labels = strokes.strokes(range(4, 12), noise, 24)
    alone, label = strokes.strokes([7], noise, 24)
    assert together.shape == (8, 3, 24, 1)
    assert together.dtype == np.float32
    assert np.array_equal(together[3], alone[0])
    assert labels[3] == label[0]
    assert {*together[:, 0].ravel().tolist()} == {0.0, 1.0}
    for sequence in together:
        places = sequence[1:, :, 0].cumsum(1)
        up = np.flatnonzero(sequence[0, :, 0])
        assert up[-1] == 23
        for start, stop in zip([0, *(up + 1)], up, strict=False):
            assert places[:, start] == pytest.approx(places[:, stop], abs=1e-5)
    assert len({*strokes.strokes(range(200), noise, 9)[1].tolist()}) == 10


# ------------------------------------------------------------------ on disk, features, pictures


def written(folder, made, n=6, shard=4):
    synthesis = lambda rows, noise: Made(made[rows.start : rows.stop])  # noqa: E731
    surrogate.write(folder, synthesis, Noise(), n=n, batch=2, shard=shard, identity="i", source="ancestral", pixels=False)
    return folder


def test_a_surrogate_keeps_values_to_the_bit(tmp_path):
    made = 1e3 * torch.randn(6, 3, 5, 1)
    found = surrogate.read(written(tmp_path, made))
    assert found.dtype == np.float32
    assert np.array_equal(found, made.numpy())
    assert surrogate.columns(tmp_path) == {}


def test_a_surrogate_of_values_is_read_by_others(tmp_path, monkeypatch):
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    made = torch.randn(6, 2, 1, 1)
    written(tmp_path / "s", made)
    found = datasets.load_dataset("parquet", data_files=str(tmp_path / "s" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found.column_names == ["values", "row"]
    assert np.array_equal(np.array(found["values"], np.float32), made.numpy())


@pytest.mark.parametrize("wrong", [[[[1.0]], [[2.0, 3.0]]], [[[1.0]]], None, [[[1.0]], [[float("nan")]]], [[[1.0]], [[None]]]])
def test_broken_values_are_named(tmp_path, wrong):
    made = torch.randn(4, 2, 1, 1)
    path = written(tmp_path, made, n=4) / surrogate.shard_name(0)
    table = pq.read_table(path)
    cells = [*made.tolist()[:3], wrong]
    pq.write_table(table.set_column(0, "values", [cells]).cast(table.schema), path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = surrogate.sha256(path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BrokenFile, match=r"shard-00000\.parquet: values of "):
        surrogate.read(tmp_path)


def test_standardized_features_have_the_training_datas_mean_and_spread():
    train = torch.randn(50, 2, 3, 1) * torch.tensor([5.0, 0.1]).view(1, 2, 1, 1) + 7
    found = torch.from_numpy(standardized(train)(train)).view(50, 2, 3)
    assert found.mean((0, 2)).abs().max() < 1e-5
    assert (found.std((0, 2)) - 1).abs().max() < 1e-5
    train[:, 1] = 3.0
    with pytest.raises(ValueError, match="channel 1 of the training data does not vary"):
        standardized(train)


def test_features_of_values_are_the_values():
    x = 100 * torch.randn(7, 2, 1, 1)
    assert np.array_equal(pixels(bounded=False)(x), x.flatten(1).numpy())
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        pixels()(x)
    with pytest.raises(ValueError, match="not finite"):
        pixels(bounded=False)(x / 0)
    kept, cpu = x.numpy(), torch.device("cpu")
    assert np.array_equal(build.features("pixels", cpu, (), 4, kept).of(x), x.flatten(1).numpy())
    assert build.features("standardized", cpu, (), 4, kept).of(x).std() == pytest.approx(1, abs=0.1)
    with pytest.raises(BadInput, match="standardized is for data that are no pictures"):
        build.features("standardized", cpu, (), 4, np.zeros((3, 1, 8, 8), np.uint8))
    with pytest.raises(BadInput, match="channel 0 of the training data does not vary"):
        build.features("standardized", cpu, (), 4, np.zeros((3, 1, 1, 1), np.float32))


def test_points_become_one_picture_in_the_frame_of_the_real_ones():
    real = torch.tensor([[0.0, 10.0], [1.0, 20.0]])[..., None, None]
    sketch = Sketch(real, pixels=False)
    (picture,) = sketch(real, 1)[:, 0]
    assert not sketch.each
    assert picture.dtype == np.uint8
    rows, columns = np.nonzero(picture == 255)
    low = (rows > 96) & (columns < 96)
    assert low.sum() == (~low).sum() == 9  # the first point at the left below, the second at the right above
    assert ((rows < 96) & (columns > 96)).sum() == 9
    assert sketch(real + 1e9, 1).max() == 0  # outside of the frame, and no error
    assert sketch(torch.full_like(real, float("nan")), 1).shape == (1, 1, 192, 192)


def test_a_lifted_pen_draws_no_line():
    down = torch.zeros(1, 3, 4, 1)
    down[0, 1:, :, 0] = torch.tensor([[0.0, 1.0, 0.0, -1.0], [0.0, 0.0, 1.0, 0.0]])
    up = down.clone()
    up[0, 0] = 1
    sketch = Sketch(down, pixels=False)
    assert sketch.each
    assert sketch(torch.cat([down, up]), 2).shape == (2, 1, 64, 64)
    assert (sketch(down, 1) > 200).sum() > 100
    assert sketch(up, 1).max() == 0


def test_other_values_become_gray_maps_and_images_stay_images():
    x = torch.randn(3, 2, 5, 7)
    assert Sketch(x, pixels=False)(x, 2).shape == (2, 1, 10, 7)
    images = torch.rand(3, 3, 4, 4)
    assert np.array_equal(Sketch(images, pixels=True)(images, 2), surrogate.to_uint8(images[:2]))


# ------------------------------------------------------------------ a run


def test_clip_leaves_values_alone():
    x = torch.tensor([-3.0, 0.5, 7.0])
    assert torch.equal(Images((1, 1, 3)).clip(x), torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(Images((1, 1, 3), pixels=False).clip(x), x)


def test_pictures_and_values_are_not_taken_for_one_another(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(6, 1, 8, 8)))
    section = config.ValuesData(kind="values", path=str(tmp_path / "a.npz"))
    with pytest.raises(BadInput, match="data: values that are no pixels; the teacher takes pictures"):
        build.dataset(section, (1, 8, 8), "teacher")
    assert build.dataset(section, (1, 8, 8), "teacher", pixels=False).train.images.shape[1:] == (1, 8, 8)
    with pytest.raises(BadInput, match=r"floats must lie in \[0, 1\]; data of kind values may have any"):
        data.load(config.FileData(kind="npz", path=str(tmp_path / "a.npz")))
    machine, vae = HelmholtzMachine().model(), VAE((1, 8, 8), 4, 2).model()
    for kind in ("uniform", "inversion"):
        made = config.check({"name": "a", "teacher": {"kind": "pretrained", "path": "x"}, "surrogate": {"kind": kind}}).surrogate
        with pytest.raises(BadInput, match=f"kind {kind} makes pictures, but the teacher's data are none"):
            build.synthesizer(made, machine)
        assert build.synthesizer(made, vae)


def test_a_run_on_points_from_training_to_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place, steps = Place(tmp_path), {"steps": 3, "batch": 8}
    code = place.run(
        "run",
        data={"kind": "old_faithful"},
        train={"model": {"kind": "helmholtz", "width": 3, "mean": [3.5, 71], "scale": [1.1, 13.6]}, **steps},
        teacher={"kind": "trained"},
        distill={
            "generate": {**steps, "replay": "y*", "rules": [{"nodes": "z*"}, {"nodes": "y*"}]},
            "infer": {**steps, "replay": "*", "rules": [{"nodes": "z*"}], "elbo": 0},
            "scratch": steps,
        },
        arms=["data_free", "scratch"],
        evaluate={"features": "standardized", "latency_repeats": 3},
    )
    assert code == 0
    metrics = json.loads((place.out / "metrics.json").read_text())
    for name in ("teacher", "student_data_free", "student_scratch"):
        assert {"mmd", "energy_distance", "frechet", "emd", "one_nn", "nelbo"} <= metrics["arms"][name].keys()
        assert metrics["arms"][name]["energy_distance"]["mean"] > 0
    shown = read_pictures(place.out / "evaluate" / "pictures.npz")
    assert shown.unusable == ()
    assert shown.images["samples/teacher"].shape == (1, 1, 192, 192)
    assert surrogate.read(place.out / "surrogate").dtype == np.float32
    assert "report" in (place.out / "report.html").read_text()


def test_strokes_are_no_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = {"model": {"kind": "vrnn", "image": [3, 9, 1]}, "steps": 3}
    assert Place(tmp_path).run("run", data={"kind": "digits"}, train=train, teacher={"kind": "trained"}) == 2
    assert "data: images of 1 channels, 8x8; the vrnn takes 3 channels, 9x1" in capsys.readouterr().err
