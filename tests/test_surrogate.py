"""The surrogate data set: images from the teacher's prior, shards on disk, and what may be wrong with them."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributions import Normal

from potstill.energy.view import Energy, Look, energy
from potstill.errors import BadInput, BrokenFile
from potstill.families.lvae import LVAE
from potstill.model import Images, Model
from potstill.noise import Noise
from potstill.synthesize import surrogate
from potstill.synthesize.ancestral import Ancestral, Uniform
from potstill.synthesize.synthesis import Made, Synthesis
from potstill.trace import run

SHAPE = (3, 4, 5)


class Scale(torch.nn.Module):
    """Works element by element, so that its output does not depend on the batch in the last bit either."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def generate(self, sample):
        return Normal((sample.normal("z", SHAPE) * self.scale).sigmoid() * 2 - 1, 0.1)


def teacher():
    net = Scale()
    return Model(net, Images(SHAPE, (0.5,), (0.5,)), net.generate).frozen()


def images_of(make):
    """A synthesis of nothing but images."""
    return lambda rows, noise: Made(make(len(rows), noise.at(rows)))


def write(folder, synthesis=None, n=20, batch=8, shard=8, identity="i", **options):
    synthesis = synthesis or Synthesis(Ancestral(), teacher())
    noise = Noise((3, "surrogate"))
    surrogate.write(folder, synthesis, noise, n=n, batch=batch, shard=shard, identity=identity, source="ancestral", **options)
    return folder


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# ------------------------------------------------------------------ images


def test_images_are_the_teachers_own(tmp_path):
    expected = teacher().sample(20, Noise((3, "surrogate")))
    found = surrogate.read(write(tmp_path / "s"))
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected.mul(255).round().to(torch.uint8).numpy())


def test_a_drawn_image_has_the_noise_of_the_output():
    model = teacher()
    noise = Noise((3, "surrogate"))
    mean, drawn = (Ancestral(observe)(Energy(), Look(model), 64, noise) for observe in ("mean", "sample"))
    inside = (drawn > 0) & (drawn < 1)
    difference = (drawn - mean)[inside]
    assert difference.std().item() == pytest.approx(0.05, rel=0.05)  # 0.1 in the network's range, which is twice as wide
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_mixed_images_have_every_share_of_the_outputs_noise():
    look, noise = Look(teacher()), Noise((3,))
    mean, drawn, mixed = (Ancestral(observe)(Energy(), look, 400, noise) for observe in ("mean", "sample", "mixed"))
    inside = ((drawn > 0) & (drawn < 1) & (mixed > 0) & (mixed < 1)).flatten(1)
    share = [
        ((m - a)[i] / (d - a)[i]).median().item() for m, a, d, i in zip(*(x.flatten(1) for x in (mixed, mean, drawn)), inside, strict=True)
    ]
    assert np.quantile(share, [0.02, 0.25, 0.5, 0.75, 0.98]) == pytest.approx([0.02, 0.25, 0.5, 0.75, 0.98], abs=0.08)


@pytest.mark.parametrize(("batch", "shard"), [(1, 8), (7, 20), (256, 3), (5, 1000)])
def test_images_do_not_depend_on_batches_or_shards(tmp_path, batch, shard):
    expected = surrogate.read(write(tmp_path / "a"))
    assert np.array_equal(surrogate.read(write(tmp_path / "b", batch=batch, shard=shard)), expected)
    assert len(list((tmp_path / "b").glob("*.parquet"))) == -(-20 // shard)


def test_a_network_differs_by_rounding_at_most(tmp_path):
    torch.manual_seed(0)
    net = LVAE((1, 8, 8), 4, 2, 2).model().frozen()
    a, b = (surrogate.read(write(tmp_path / str(batch), Synthesis(Ancestral(), net), batch=batch)).astype(int) for batch in (3, 20))
    assert np.abs(a - b).max() <= 1
    assert np.abs(a - b).mean() < 0.01


def test_nothing_is_written_of_a_teacher_that_gives_nan(tmp_path):
    with pytest.raises(BadInput, match="surrogate: the teacher gives NaN"):
        write(tmp_path / "s", images_of(lambda n, noise: torch.full((n, *SHAPE), float("nan"))))
    assert os.listdir(tmp_path / "s") == []


# ------------------------------------------------------------------ files


def test_the_manifest_describes_every_shard(tmp_path):
    folder = write(tmp_path / "s")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == "potstill-surrogate/1"
    assert (manifest["images"], manifest["source"], manifest["identity"]) == (20, "ancestral", "i")
    assert [(s["name"], s["rows"]) for s in manifest["shards"]] == [
        ("shard-00000.parquet", 8),
        ("shard-00001.parquet", 8),
        ("shard-00002.parquet", 4),
    ]
    assert sorted(os.listdir(folder)) == ["manifest.json", *(s["name"] for s in manifest["shards"])]
    rows = [row for s in manifest["shards"] for row in pq.read_table(folder / s["name"])["row"].to_pylist()]
    assert rows == list(range(20))


@pytest.mark.parametrize("batches", range(8))
def test_a_run_that_is_cut_short_goes_on_to_the_same_bytes(tmp_path, batches):
    expected = contents(write(tmp_path / "whole", batch=3))
    left = iter([True] * batches + [False])
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s", batch=3, keep_going=lambda: next(left))
    done = contents(tmp_path / "s") if (tmp_path / "s").exists() else {}
    assert "manifest.json" not in done
    assert all(expected[name] == data for name, data in done.items())
    (tmp_path / "s" / ".shard-00001.parquet.1.tmp").write_bytes(b"PAR1")
    if batches > 3:
        os.truncate(tmp_path / "s" / "shard-00000.parquet", 50)  # as a disk may leave it
    calls = []
    write(tmp_path / "s", lambda rows, noise: (calls.append(rows), Synthesis(Ancestral(), teacher())(rows, noise))[1], batch=3)
    (tmp_path / "s" / ".shard-00001.parquet.1.tmp").unlink()
    assert contents(tmp_path / "s") == expected
    assert len(calls) == 8 - 3 * len(done) + (3 if batches > 3 else 0)  # 3, 3 and 2 batches; whole shards are kept


def test_shards_of_other_inputs_are_made_again(tmp_path):
    first = contents(write(tmp_path / "s"))
    second = contents(write(tmp_path / "s", identity="j"))
    assert first.keys() == second.keys()
    assert all(first[name] != second[name] for name in first)
    assert contents(write(tmp_path / "t", identity="j")) == second


def test_progress_is_told(tmp_path):
    told = []
    write(tmp_path / "s", batch=5, progress=told.append)
    assert told == [5, 8, 8, 13, 16, 16, 20, 20, 20]


@pytest.mark.slow
def test_datasets_reads_it_as_images(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    for channels in (1, 3):
        folder = write(tmp_path / str(channels), images_of(lambda n, noise, c=channels: noise.uniform("x", (n, c, *SHAPE[1:]))))
        files = str(folder / "*.parquet")
        found = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
        expected = surrogate.read(folder)
        assert found.column_names == ["image", "row"]
        assert isinstance(found.features["image"], datasets.Image)
        assert len(found) == 20
        for i in (0, 7, 8, 19):
            image = found[i]["image"]
            assert image.mode == ("L" if channels == 1 else "RGB")
            assert image.size == (5, 4)
            pixels = np.asarray(image)
            assert np.array_equal(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1), expected[i])
            assert found[i]["row"] == i


# ------------------------------------------------------------------ what may be wrong


def forge(folder, table, i=0, rows=None):
    """Replace a shard, and its hash in the manifest as well."""
    path = folder / surrogate.shard_name(i)
    if isinstance(table, bytes):
        path.write_bytes(table)
    else:
        pq.write_table(table, path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][i] |= {"sha256": surrogate.sha256(path), "rows": manifest["shards"][i]["rows"] if rows is None else rows}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_changed_shard_is_noticed(tmp_path):
    folder = write(tmp_path / "s")
    path = folder / "shard-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BrokenFile, match=r"shard-00001\.parquet: not the file that the manifest describes"):
        surrogate.read(folder)
    path.unlink()
    with pytest.raises(BrokenFile, match=r"shard-00001\.parquet: no such file"):
        surrogate.read(folder)


def test_a_shard_that_is_a_link_is_refused(tmp_path):
    folder = write(tmp_path / "s")
    shutil.move(folder / "shard-00001.parquet", tmp_path / "elsewhere")
    (folder / "shard-00001.parquet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BrokenFile, match=r"shard-00001\.parquet: no such file"):
        surrogate.read(folder)


@pytest.mark.parametrize("name", ["../../elsewhere.parquet", "/etc/passwd", "shard-00001.parquet", "", None, 3])
def test_a_manifest_cannot_point_elsewhere(tmp_path, name):
    folder = write(tmp_path / "s")
    shutil.copy(folder / "shard-00000.parquet", tmp_path / "elsewhere.parquet")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["name"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BrokenFile, match=r"manifest\.json: shard 0 should be named shard-00000\.parquet"):
        surrogate.read(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": "potstill-surrogate/1"}', '{"format": "potstill-surrogate/2", "shards": []}']
)
def test_a_wrong_manifest_is_named(tmp_path, content):
    folder = write(tmp_path / "s")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(BrokenFile, match=r"manifest\.json: not"):
        surrogate.read(folder)


def test_a_surrogate_without_images_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"format": "potstill-surrogate/1", "shards": []}')
    with pytest.raises(BrokenFile, match="without images"):
        surrogate.read(tmp_path)
    with pytest.raises(BrokenFile, match=r"manifest\.json: no such file"):
        surrogate.read(tmp_path / "nope")


def cells(*values):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.table({"image": pa.array(values, kind), "row": pa.array(range(len(values)), pa.int64())})


PNG = surrogate._png(np.zeros((3, 4, 5), np.uint8))


@pytest.mark.parametrize(
    ("table", "rows", "expected"),
    [
        pytest.param(b"PAR1", None, "not a parquet shard", id="no parquet"),
        pytest.param(pa.table({"picture": [PNG]}), 1, "not a shard of 1 images; 1 rows of picture", id="another column"),
        pytest.param(pa.table({"image": [PNG], "row": [0]}), 1, "not a shard of 1 images", id="bytes without struct"),
        pytest.param(pa.table({"image": ["x"], "row": [0]}), 1, "not a shard of 1 images", id="texts"),
        pytest.param(cells({"bytes": PNG}), 8, "not a shard of 8 images; 1 rows", id="fewer rows"),
        pytest.param(cells({"bytes": PNG}, None), 2, "row 1: no image", id="null"),
        pytest.param(cells({"bytes": None, "path": "/etc/passwd"}), 1, "row 0: no image", id="a path instead"),
    ],
)
def test_a_forged_shard_is_no_shard(tmp_path, table, rows, expected):
    folder = write(tmp_path / "s")
    forge(folder, table, rows=rows)
    with pytest.raises(BrokenFile, match=expected):
        surrogate.read(folder)


def test_a_forged_image_is_named(tmp_path):
    folder = write(tmp_path / "s")
    forge(folder, cells({"bytes": PNG[:40]}), rows=1)
    with pytest.raises(BadInput, match=r"shard-00000\.parquet, row 0: "):
        surrogate.read(folder)
    forge(folder, cells({"bytes": surrogate._png(np.zeros((3, 4, 4), np.uint8))}), rows=1)
    with pytest.raises(BadInput, match=r"shard-00001\.parquet, row 0: image of shape \(3, 4, 5\), others are \(3, 4, 4\)"):
        surrogate.read(folder)


# ------------------------------------------------------------------ what is known of the images


@energy
def brightness(view):
    return view.x.flatten(1).mean(1)


def test_labels_prompts_and_energies_travel_with_the_images(tmp_path):
    synthesis = Synthesis(
        Ancestral(),
        teacher(),
        2.0 * brightness.between(0, 0.1),
        classes=3,
        wording=lambda labels, noise, n: [f"a {k}" for k in labels.tolist()],
    )
    folder = write(tmp_path / "s", synthesis)
    found = surrogate.columns(folder)
    assert found["label"] == [row % 3 for row in range(20)]
    assert found["prompt"] == [f"a {row % 3}" for row in range(20)]
    images = surrogate.read(folder) / 255
    assert np.allclose(found["energy.brightness"], 2 * images.reshape(20, -1).mean(1), atol=0.01)
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table[4]["label"] == 1
    assert table[4]["image"].size == (SHAPE[2], SHAPE[1])
    assert table[4]["energy.brightness"] == pytest.approx(found["energy.brightness"][4])


def test_an_image_that_is_not_finite_is_drawn_again():
    def draw(energy, look, n, noise, watch=None):
        x = noise.uniform("x", (n, *SHAPE))
        if noise.key == (3,):
            x[[r in (2, 5) for r in noise.rows]] = float("nan")
        return x

    def wording(labels, noise, n):
        return [f"{noise.key} {row}" for row in noise.rows]

    made = Synthesis(draw, teacher(), brightness, wording=wording)(range(6), Noise((3,)))
    plain = Noise((3,)).at(range(6)).uniform("x", (6, *SHAPE))
    again = Noise((3,)).fold("redraw", 0).at([2, 5]).uniform("x", (2, *SHAPE))
    assert torch.equal(made.images[[0, 1, 3, 4]], plain[[0, 1, 3, 4]])
    assert torch.equal(made.images[[2, 5]], again)
    key, redrawn = (3,), (3, "redraw", 0)
    assert made.prompts == [f"{redrawn if row in (2, 5) else key} {row}" for row in range(6)]
    assert made.energies["brightness"].isfinite().all()


def test_an_energy_that_is_never_finite_is_reported_and_nothing_saved(tmp_path):
    @energy
    def broken(view):
        return view.x.flatten(1).mean(1) / 0

    with pytest.raises(BadInput, match="energy broken of row 0 is not finite in 4 draws"):
        write(tmp_path / "s", Synthesis(Ancestral(), teacher(), brightness + broken))
    assert os.listdir(tmp_path / "s") == []


def test_a_sweep_infers_and_generates_again():
    net = LVAE((1, 8, 8), 4, 2, 2)
    model = Model(net, Images((1, 8, 8), (0.5,), (0.1,)), net.generate, net.infer).frozen()
    noise = Noise((1,))
    first, second = (Ancestral(sweeps=k)(Energy(), Look(model), 4, noise) for k in (0, 1))
    mean = run(model.generate, noise=noise, n=4).out.dist.mean
    expected = run(model.infer, mean, noise=noise.fold("sweep", 0)).out.dist.mean
    for found, wanted in ((first, mean), (second, expected)):
        assert torch.equal(found, model.images.decode(wanted).clamp(0, 1))
    assert not torch.equal(first, second)


def test_the_first_batch_is_watched_and_no_other():
    seen = []

    def draw(energy, look, n, noise, watch=None):
        seen.append(watch is not None)
        return noise.uniform("x", (n, *SHAPE))

    synthesis = Synthesis(draw, teacher(), watch=lambda step: None)
    for rows in (range(3), range(3, 6)):
        synthesis(rows, Noise())
    assert seen == [True, False]


def test_uniform_noise_is_of_the_teachers_shape():
    found = Synthesis(Uniform(SHAPE), teacher())(range(5), Noise()).images
    assert torch.equal(found[3:], Synthesis(Uniform(SHAPE), teacher())(range(3, 5), Noise()).images)
