"""How surrogates were made, in a run's figures and in its report: images, prompts, energies against steps and against those of others."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Normal

import browser
from potstill import cli, config
from potstill.data import load
from potstill.energy import cross_entropy, l2, posterior_kl, total_variation
from potstill.energy.view import Look, energy
from potstill.evaluate.arms import energies
from potstill.evaluate.frechet import frechet
from potstill.families.classifier import Classifier
from potstill.model import Images, Model
from potstill.noise import Noise
from potstill.report import figures, page, tables
from potstill.synthesize import surrogate
from potstill.synthesize.synthesis import Step
from runs import Place, teacher
from test_report import EVIL, decode, dump, make_metrics, make_run, parse, text_of

SHAPE = (1, 4, 4)


# ------------------------------------------------------------------ what a run measures


class Mean(torch.nn.Module):
    """Two labels by the mean of an image; and a model of images with one latent."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(3.0))

    def classify(self, sample, x):
        mean = x.flatten(1).mean(1) * self.scale
        return Categorical(logits=torch.stack([mean, -mean], 1))

    def infer(self, sample, x):
        z = sample("z", Normal(x.flatten(1).mean(1, keepdim=True), 0.5))
        return Normal(z[:, :, None, None].expand_as(x), 0.1)


def test_each_term_is_what_the_energy_says_of_the_images_whatever_its_schedule():
    images = torch.rand(7, *SHAPE, generator=torch.Generator().manual_seed(0))
    net = Mean()
    model = Model(net, Images(SHAPE), infer=net.infer).frozen()
    guide = 0.5 * posterior_kl + 2 * total_variation.between(0.0, 0.1)
    found = energies(guide, model, images, None, Noise((1,)), batch=3)
    expected = guide.parts(Look(model, noise=Noise((1,)).at(range(7)))(images), every=True)
    assert found.keys() == expected.keys() == {"posterior_kl", "total_variation"}
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name].numpy(), rtol=1e-5)


def test_each_image_is_looked_at_with_its_own_label():
    images = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    net = Mean()
    model = Model(net, Images(SHAPE), infer=net.classify).frozen()
    labels = torch.tensor([0, 1, 1, 0, 1])
    found = energies(cross_entropy, model, images, labels, Noise(), batch=2)["cross_entropy"]
    margin = 6 * images.flatten(1).mean(1) * torch.where(labels == 0, 1, -1)
    np.testing.assert_allclose(found, torch.nn.functional.softplus(-margin).numpy(), rtol=1e-5)


def test_a_term_that_asks_for_what_is_not_there_leaves_the_others():
    net = Mean()
    model = Model(net, Images(SHAPE), infer=net.classify).frozen()
    images = torch.full((3, *SHAPE), 0.5)
    found = energies(cross_entropy + posterior_kl + l2, model, images, None, Noise(), batch=2)
    assert {name: values.tolist() for name, values in found.items()} == {"l2": [2.0] * 3}  # 16 pixels of 0.5, half the sum of squares

    @energy
    def wrong(view):
        raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind"):
        energies(wrong, model, images, None, Noise(), batch=2)


def test_steps_that_nobody_told_of_count():
    """Inversion is silent while no term is active: what it tells later still lies at its own step."""
    steps = surrogate.Steps(columns=4)
    images = torch.zeros(2, *SHAPE)
    for index in (5, 6, 9):
        steps.watch(Step(index, 40, 1 - index / 40, images, {"l2": torch.tensor([1.0, 3.0])}))
    assert steps.at == [5], "the first is kept, though it is none of the four columns"
    assert np.isnan(steps.level).tolist() == [True] * 5 + [False, False, True, True, False]
    assert [i for i, value in enumerate(steps.energy["l2"]) if value == 2.0] == [5, 6, 9]
    assert len(steps.energy["l2"]) == 10


SMALL = {"n": 12, "shard": 8, "batch": 6}
ENERGY = [{"kind": "posterior_kl", "weight": 0.1}, {"kind": "l2", "start": 0.5}]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run with surrogates of three kinds that is done. Not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("synthesis")
        patch.chdir(folder)
        place = Place(folder)
        named = {
            "inverted": SMALL | {"kind": "inversion", "steps": 10, "classes": ["dark", "<b>bright"], "energy": ENERGY},
            "noise": SMALL | {"kind": "uniform"},
        }
        assert place.run("run", surrogate=SMALL | {"energy": ENERGY}, surrogates=named) == 0
        yield place


@pytest.mark.slow
def test_figures_of_every_surrogate_are_kept(measured):
    metrics = json.loads((measured.out / "metrics.json").read_text())
    found = metrics["surrogates"]
    assert {folder: (row["images"], row["kind"]) for folder, row in found.items()} == {
        "surrogate": (12, "ancestral"),
        "surrogates/inverted": (12, "inversion"),
        "surrogates/noise": (12, "uniform"),
    }
    assert found["surrogates/noise"]["energies"] == {}
    columns = surrogate.columns(measured.out / "surrogates/inverted")
    for name in ("posterior_kl", "l2"):
        values = torch.tensor(columns[f"energy.{name}"], dtype=torch.float64)
        kept = found["surrogates/inverted"]["energies"][name]
        assert kept == {"mean": pytest.approx(values.mean().item()), "sd": pytest.approx(values.std().item())}
    real = load(config.check(measured.recipe).data).test.images[:16].reshape(16, -1) / 255
    for folder, row in found.items():
        made = surrogate.read(measured.out / folder).reshape(12, -1) / 255
        assert row["frechet"] == pytest.approx(frechet(real, made), rel=1e-4)


@pytest.mark.slow
def test_energies_of_the_teachers_samples_and_of_real_images_are_kept_beside(measured):
    with np.load(measured.out / "evaluate" / "pictures.npz") as archive:
        arrays = dict(archive)
    sets = {name for name in arrays if name.startswith("energy/")}
    assert sets == {
        f"energy/{folder}/{term}/{who}"
        for folder in ("surrogate", "surrogates/inverted")
        for term in ("posterior_kl", "l2")
        for who in ("surrogate", "teacher", "real")
    }
    assert [len(arrays[f"energy/surrogate/l2/{who}"]) for who in ("surrogate", "teacher", "real")] == [12, 16, 16]
    drawn = teacher().model().frozen().sample(16, Noise((0, 0, "evaluate")))
    for who, images in (("real", arrays["input"] / 255), ("teacher", drawn.numpy())):
        expected = 0.5 * (images**2).reshape(len(images), -1).sum(1)  # the teacher's range is the images' own
        np.testing.assert_allclose(arrays[f"energy/surrogate/l2/{who}"][: len(images)], expected, rtol=1e-3)
    np.testing.assert_array_equal(arrays["samples/teacher"], surrogate.to_uint8(drawn[:2]))
    assert arrays["images/surrogate"].shape == (4, 1, 8, 8), "two rows of as many as the report asks for"
    assert arrays["label/surrogates/inverted"].tolist() == ["dark", "<b>bright"] * 2


@pytest.mark.slow
def test_the_report_of_a_run_shows_how_its_surrogates_were_made(measured):
    report = measured.out / "report.html"
    text = text_of(report)
    for words in (
        "Kind inversion, 12 synthetic images in 2 shards.",
        "Kind ancestral",
        "Intermediate predictions",
        "Energies against steps",
    ):
        assert words in text
    elements = parse(report)
    assert sum(found.get("alt") == "A surrogate image, made for: <b>bright" for _, found in elements) == 2
    # l2 begins at half of the ten steps; the images of every step but the silent ones are there.
    assert [found["alt"] for tag, found in elements if tag == "img" and found["alt"].startswith("What the images")] == [
        f"What the images looked like at step {step} of 10" for step in range(1, 11)
    ]
    assert "at step 6" in next(found["aria-label"] for _, found in elements if found.get("aria-label", "").startswith("Energy l2 against"))


@pytest.mark.slow
def test_a_surrogate_that_changes_after_it_was_measured_is_noticed(measured, tmp_path, capsys):
    out = shutil.copytree(measured.out, tmp_path / "out")
    manifest = json.loads((out / "surrogates/noise/manifest.json").read_text())
    (out / "surrogates/noise/manifest.json").write_text(json.dumps(manifest | {"more": 1}))
    assert cli.main(["evaluate", str(measured.folder / "recipe.yaml"), "--out", str(out), "--quiet"]) == 2
    assert "differs: surrogates.surrogates/noise" in capsys.readouterr().err


@pytest.mark.slow
def test_real_images_keep_their_own_labels_under_a_classifier(place):
    torch.manual_seed(0)
    net = Classifier((1, 8, 8), 4, 4)
    net.save_pretrained(place.folder / "judge")
    section = SMALL | {"kind": "uniform", "classes": ["a", "b", "c", "d"], "energy": [{"kind": "cross_entropy"}]}
    sections = {"teacher": {"kind": "pretrained", "path": "./judge"}, "surrogate": section, "report": None}
    assert place.run("run", **sections, distill={"generate": None, "infer": {"steps": 2, "batch": 8}}) == 0
    assert "frechet" not in json.loads((place.out / "metrics.json").read_text())["surrogates"]["surrogate"]
    test = load(config.check(place.recipe).data).test
    model = net.model().frozen()
    with torch.no_grad(), np.load(place.out / "evaluate" / "pictures.npz") as arrays:
        assert "energy/surrogate/cross_entropy/teacher" not in arrays, "a classifier has no samples"
        logits = net(model.images.encode(torch.from_numpy(test.images[:16]).float() / 255))
        expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(test.labels[:16]), reduction="none")
        np.testing.assert_allclose(arrays["energy/surrogate/cross_entropy/real"], expected.numpy(), rtol=1e-4)


# ------------------------------------------------------------------ what the page shows


def course(folder, **changes):
    """A `steps.npz` of 20 steps, with six kept columns of three pictures; changed or, given as None, missing arrays."""
    rng = np.random.default_rng(0)
    late = np.linspace(2, 1, 20)
    late[:8] = np.nan
    arrays = {
        "level": np.linspace(1, 0.05, 20),
        "energy.posterior_kl": np.linspace(30, 10, 20),
        "energy.late one": late,
        "at": np.array([0, 4, 8, 12, 16, 19]),
        "images": rng.integers(0, 256, (6, 3, 1, 8, 8), dtype=np.uint8),
    } | changes
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "steps.npz", **{name: array for name, array in arrays.items() if array is not None})
    return arrays


def made_run(run, folder="surrogate", label="three", prompt="the digit three, bold serif", term="posterior_kl", kind="guided", **changes):
    """A run folder with a surrogate of which everything is known, and its steps."""
    metrics = make_metrics()
    metrics["surrogates"] = {
        folder: {"images": 4096, "kind": kind, "energies": {term: {"mean": 20.3, "sd": 1.2}}, "frechet": 6.7},
        "surrogates/plain": {"images": 64, "kind": "ancestral", "energies": {}},
    }
    make_run(run, metrics=metrics, logs=False)
    rng = np.random.default_rng(1)
    with np.load(run / "evaluate" / "pictures.npz") as archive:
        arrays = dict(archive)
    arrays |= {f"images/{folder}": rng.integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)}
    arrays |= {"images/surrogates/plain": rng.integers(0, 256, (5, 1, 8, 8), dtype=np.uint8)}
    arrays |= {f"label/{folder}": np.array([label] * 5), f"prompt/{folder}": np.array([prompt] * 5)}
    for index, who in enumerate(("surrogate", "teacher", "real")):
        arrays[f"energy/{folder}/{term}/{who}"] = rng.normal(20 + index, 2, 200).astype(np.float32)
    np.savez(run / "evaluate" / "pictures.npz", **arrays)
    (run / folder).mkdir(parents=True, exist_ok=True)
    (run / folder / "manifest.json").write_text(json.dumps({"images": 4096, "shards": ["a"], "source": kind}))
    course(run / folder, **changes)
    return run


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return page.write(made_run(tmp_path_factory.mktemp("made") / "run"))


def section_of(path):
    """The words of the section on surrogates."""
    text = text_of(path)
    return text[text.index("Images made without real data") : text.rindex("How to make it again")]


def test_a_surrogate_is_shown_with_its_images_prompts_course_and_energies(written):
    text = section_of(written)
    for words in (
        "Kind guided, 4,096 synthetic images in 1 shard.",
        "the digit three, bold serif",
        "Intermediate predictions",
        "below it the level of noise",
        "Energies against steps",
        "late one",
        "Energies of the finished images",
        "this surrogate the teacher’s samples real held-out images",
        "Energy: posterior kl",
        "20.3 ± 1.2",
        "6.7",
        "plain",
    ):
        assert words in text, words
    assert "nan" not in text.lower().split()
    assert "None" not in text
    means = [float(mean) for mean in re.search(r"mean ([\d.]+) ([\d.]+) ([\d.]+)", text).groups()]
    assert means == pytest.approx([20, 21, 22], abs=0.5), "of the three sets, in the order of the legend"
    assert "A surrogate image and the real image nearest to it" in written.read_text("utf-8")


def test_images_with_captions_stand_alone_and_others_in_rows(written):
    alts = [found["alt"] for tag, found in parse(written) if tag == "img"]
    assert alts.count("A surrogate image, made for: three · the digit three, bold serif") == 5
    assert alts.count("First images of plain") == 1
    assert "First images of Surrogate" not in alts


@pytest.mark.parametrize(("label", "prompt", "heads"), [("three", "a 3", True), ("Three", "the digit three", False), ("three", "", True)])
def test_a_label_is_told_where_the_prompt_does_not(tmp_path, label, prompt, heads):
    markup = page.write(made_run(tmp_path / "run", label=label, prompt=prompt)).read_text("utf-8")
    assert (f"<b>{label}</b>" in markup) == heads
    assert markup.count(f"<figcaption>{f'<b>{label}</b> ' if heads else ''}{prompt}</figcaption>") == 5


def test_captions_that_are_not_one_for_each_image_are_left_out(tmp_path):
    run = made_run(tmp_path / "run")
    with np.load(run / "evaluate" / "pictures.npz") as archive:
        arrays = dict(archive)
    np.savez(run / "evaluate" / "pictures.npz", **arrays | {"label/surrogate": np.array(["three"] * 4)})
    assert 'alt="First images of Surrogate"' in page.write(run).read_text("utf-8")


def test_a_column_of_predictions_holds_the_pictures_of_its_step(tmp_path):
    arrays = course(tmp_path)
    found = figures.read_course(tmp_path / "steps.npz")
    columns = figures.columns(found.images, [str(step) for step in found.at])
    assert [column.alt for column in columns] == ["1", "5", "9", "13", "17", "20"], "steps count from 1"
    shown = decode(columns[2])
    assert shown.shape[:2] == (3 * 64 + 2 * 2, 64)
    for picture in range(3):
        np.testing.assert_array_equal(shown[66 * picture : 66 * picture + 64 : 8, ::8, 0], arrays["images"][2, picture, 0])
    assert (shown[64:66, :, 3] == 0).all(), "the gap lets the page's background through"


def test_predictions_are_bounded(tmp_path):
    changes = {"at": np.arange(20), "images": np.zeros((20, 30, 1, 8, 8), np.uint8)}
    elements = parse(page.write(made_run(tmp_path / "run", **changes)))
    images = [found for tag, found in elements if tag == "img" and found["alt"].startswith("What the images looked like")]
    assert len(images) == 16
    assert images[0]["alt"].endswith("step 1 of 20")
    assert images[-1]["alt"].endswith("step 20 of 20")
    assert {found["height"] for found in images} == {str(8 * 64 + 7 * 2)}


def test_the_level_of_noise_is_told_only_of_images_that_are_denoised(tmp_path, written):
    assert written.read_text("utf-8").count("noise level</text>") == 2
    inverted = page.write(made_run(tmp_path / "run", kind="inversion"))
    assert "noise level" not in inverted.read_text("utf-8")
    assert "level of noise" not in text_of(inverted)


def test_energies_lie_at_their_steps():
    level = np.linspace(1, 0.5, 11)
    late = figures.energy_svg((np.array([6.0, 11.0]), np.array([1.0, 2.0])), level, True, "a")
    whole = figures.energy_svg((np.arange(1.0, 12.0), np.linspace(1, 2, 11)), level, True, "a")
    (early,), (first,) = (re.findall(r'd="M ([\d.]+) [^"]*"[^>]*var\(--series\)', svg) for svg in (late, whole))
    width = float(re.search(r'd="M ([\d.]+) [^"]*L ([\d.]+) [\d.]+ *\n?"[^>]*var\(--series\)', whole)[2]) - float(first)
    assert float(early) - float(first) == pytest.approx(width / 2, rel=0.01)
    labels = set(re.findall(r">([\d.]+)</text>", whole))
    assert {"3", "6", "9", "0.90", "0.75", "0.60"} <= labels, "steps below, the level at each above"


def test_histograms_show_shares_in_common_bins():
    sets = {"free": np.array([0.0, 0.0, 0.0, 1.0]), "teacher": np.ones(50), "real": np.zeros(2)}
    svg = figures.histogram_svg(sets, "a")

    def heights(kind):
        (path,) = re.findall(rf'd="([^"]+)"[^>]*style="fill: none[^"]*var\(--{kind}\)', svg)
        points = np.array(re.findall(r"([\d.]+) ([\d.]+)", path), dtype=float)
        return points[:, 0], points[:, 1].max() - points[:, 1]

    (x, free), (_, teacher), (_, real) = heights("free"), heights("teacher"), heights("real")
    # Three quarters in the first bin and a quarter in the last, all in the last, all in the first.
    first, last = x < np.quantile(x, 0.5), x >= np.quantile(x, 0.5)
    assert free[first].max() == pytest.approx(0.75 * real.max(), rel=1e-3)
    assert free[last].max() == pytest.approx(0.25 * real.max(), rel=1e-3)
    assert teacher.max() == pytest.approx(real.max())
    assert x[teacher.argmax()] > x[real.argmax()] + 100
    colors = set(re.findall(r"(?:stroke|fill): ([^;\"]+)", svg))
    assert colors <= {"none", "var(--muted)", "var(--rule)", "var(--free)", "var(--teacher)", "var(--real)"}
    dashes = {kind: re.search(rf"stroke-dasharray: [^;]+[^\"]*var\(--{kind}\)", svg) is not None for kind in sets}
    assert dashes == {"free": False, "teacher": True, "real": True}, "told apart without their colors"


@pytest.mark.parametrize(
    "values",
    [[1.0], [0.0, 0.0], [1e-20, 1e20], [-1e29, 1e29], [5.0] * 3, [1e-300, 1e-299], [0.0, 1e-300], [1.0, 1.0 + 1e-15]],
)
def test_odd_energies_are_drawn(values):
    numbers = np.array(values)
    svg = figures.histogram_svg({"free": numbers, "real": numbers}, "a")
    assert svg.startswith("<svg")
    assert "nan" not in svg
    steps = np.arange(1.0, 1 + len(values))
    assert "nan" not in figures.energy_svg((steps, numbers), np.linspace(1, 0, len(values)), True, "a")


def test_energies_of_very_different_sizes_share_an_axis_of_ratios():
    sets = {"free": np.geomspace(1000, 3000, 50), "real": np.geomspace(1, 3, 50)}
    assert "energy, log scale" in figures.histogram_svg(sets, "a")
    assert "log scale" not in figures.histogram_svg({"free": np.linspace(10, 100, 50)}, "a")
    assert "log scale" not in figures.histogram_svg({"free": np.linspace(-50, 100, 50)}, "a")


def test_an_outlier_leaves_the_rest_its_room():
    numbers = np.append(np.linspace(1, 2, 999), 1e6)
    svg = figures.histogram_svg({"free": numbers}, "a")
    ticks = [float(found) for found in re.findall(r">(\d[\d.]*)</text>", svg)]
    assert max(ticks) < 10


def test_identifiers_are_unique_and_resolve(written):
    elements = parse(written)
    identifiers = [found["id"] for _, found in elements if "id" in found]
    assert len(identifiers) == len(set(identifiers)) > 0
    for used in re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', written.read_text("utf-8")):
        assert "".join(used) in identifiers


def test_same_files_give_the_same_bytes(tmp_path, written):
    assert page.write(made_run(tmp_path / "run")).read_bytes() == written.read_bytes()


def test_text_of_files_is_escaped(tmp_path):
    name = EVIL.replace("/", "|")  # of a folder, and of a file in an archive
    run = made_run(
        tmp_path / "run",
        f"surrogates/{name}",
        EVIL,
        f"{EVIL} prompt",
        name,
        EVIL,
        **{f"energy.{name}": np.arange(20.0), f"odd{name}": np.zeros(3)},
    )
    written = page.write(run)
    markup = written.read_text("utf-8")
    assert markup.count("<script") == 1, "the page's own"
    assert not any("onerror" in found for _, found in parse(written))
    text = section_of(written)
    for words in (f"Kind {EVIL}", f"{EVIL} prompt", f"odd{name}", f"Energy: {name}"):
        assert words in text


# ------------------------------------------------------------------ files from elsewhere


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x93NUMPY", b"not at all"])
def test_a_broken_file_of_steps_is_said_to_be_broken(tmp_path, content):
    run = made_run(tmp_path / "run")
    (run / "surrogate" / "steps.npz").write_bytes(content)
    text = section_of(page.write(run))
    assert "Its steps.npz cannot be read" in text
    assert "Intermediate predictions" not in text
    assert "the digit three" in text, "the rest is shown"


CURVE, PREDICTIONS = ["Energy posterior_kl against step"], ["Intermediate predictions"]
EVERYTHING = ["Energies against steps", *CURVE, *PREDICTIONS]


@pytest.mark.parametrize(
    ("changes", "left_out", "gone"),
    [
        ({"level": None}, "level", EVERYTHING),
        ({"level": np.zeros((20, 1))}, "level", EVERYTHING),
        ({"energy.posterior_kl": np.zeros(19)}, "energy.posterior_kl", CURVE),
        ({"energy.posterior_kl": np.array(["x"] * 20)}, "energy.posterior_kl", CURVE),
        ({"energy.posterior_kl": np.zeros(20, complex)}, "energy.posterior_kl", CURVE),
        ({"energy.posterior_kl": np.array([{}] * 20, dtype=object)}, "energy.posterior_kl", CURVE),
        ({"at": None}, "images", PREDICTIONS),
        ({"at": np.array([0, 4, 8, 12, 16, 20])}, "images", PREDICTIONS),
        ({"at": np.array([-1, 4, 8, 12, 16, 19])}, "images", PREDICTIONS),
        ({"at": np.array([0, 4, 4, 12, 16, 19])}, "images", PREDICTIONS),
        ({"at": np.arange(6.0)}, "images", PREDICTIONS),
        ({"at": np.arange(5)}, "images", PREDICTIONS),
        ({"images": None}, "images", PREDICTIONS),
        ({"images": np.zeros((6, 3, 2, 8, 8), np.uint8)}, "images", PREDICTIONS),
        ({"images": np.zeros((6, 0, 1, 8, 8), np.uint8)}, "images", PREDICTIONS),
        ({"images": np.zeros((6, 3, 1, 8, 8), np.float32)}, "images", PREDICTIONS),
        ({"images": np.uint8(3)}, "images", PREDICTIONS),
        ({"at": np.array(3)}, "images", PREDICTIONS),
        ({"extra": np.zeros(3)}, "extra", []),
    ],
)
def test_what_no_synthesis_keeps_is_left_out_by_name(tmp_path, changes, left_out, gone):
    report = page.write(made_run(tmp_path / "run", **changes))
    text = section_of(report)
    assert f"not what a synthesis keeps of its steps: {left_out}." in text
    markup = report.read_text("utf-8")
    assert {words for words in EVERYTHING if words not in markup} == set(gone)


def test_energies_that_are_not_finite_are_gaps(tmp_path):
    values = np.array([np.inf, 1.0, np.nan, 1e200, 2.0, *[3.0] * 15])
    course(tmp_path, **{"energy.a": values, "energy.b": np.full(20, np.nan)})
    found = figures.read_course(tmp_path / "steps.npz")
    steps, kept = found.energies["a"]
    assert steps[:3].tolist() == [2, 5, 6]
    assert kept[:3].tolist() == [1.0, 2.0, 3.0]
    assert "b" not in found.energies, "a term that never was active has nothing to show"


def test_an_archive_of_terabytes_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "_LARGEST_FILE", 3000)
    course(tmp_path, images=np.zeros((6, 3, 1, 8, 8), np.uint8))
    assert figures.read_course(tmp_path / "steps.npz") is not None
    course(tmp_path, images=np.zeros((6, 3, 3, 8, 8), np.uint8))
    assert figures.read_course(tmp_path / "steps.npz") is None


@pytest.mark.parametrize("flaw", ["encrypted", "method"])
def test_an_archive_that_python_cannot_unpack_is_no_error(tmp_path, flaw):
    course(tmp_path)
    path = tmp_path / "steps.npz"
    content = bytearray(path.read_bytes())
    at = 0
    while (at := content.find(b"PK\x01\x02", at)) >= 0:  # in the directory of the archive, of each file
        content[at + 8 if flaw == "encrypted" else at + 10] = 1 if flaw == "encrypted" else 97
        at += 4
    path.write_bytes(content)
    found = figures.read_course(path)
    assert found is None or (not found.energies and not found.at)


def test_a_header_that_claims_more_than_there_is_is_no_error(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (2**50,)})
    course(tmp_path)
    with zipfile.ZipFile(tmp_path / "steps.npz", "a") as archive:
        archive.writestr("energy.large.npy", header.getvalue())
    found = figures.read_course(tmp_path / "steps.npz")
    assert found.unusable == ("energy.large",)
    assert "posterior_kl" in found.energies


def test_thousands_of_terms_make_no_page_of_thousands(tmp_path):
    run = made_run(tmp_path / "run", **{f"energy.{i}": np.arange(20.0) for i in range(40)})
    assert page.write(run).read_text("utf-8").count("against step, from") == 16


def test_text_that_is_no_unicode_is_left_out_by_name(tmp_path):
    run = made_run(tmp_path / "run")
    with np.load(run / "evaluate" / "pictures.npz") as archive:
        arrays = dict(archive)
    broken = np.frombuffer(np.full(5 * 3, 0x7FFFFFFF, np.uint32).tobytes(), dtype="<U3")
    np.savez(run / "evaluate" / "pictures.npz", **arrays | {"prompt/surrogate": broken})
    text = text_of(page.write(run))
    assert "prompt/surrogate" in text
    assert "three" in text


def test_names_of_surrogates_never_leave_the_run_folder(tmp_path):
    course(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "manifest.json").write_text('{"images": 77777}')
    run = made_run(tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["surrogates"] |= {"../elsewhere": {"kind": "x"}, str(tmp_path / "elsewhere"): {}, "nul\0": None, "surrogates": {"energies": []}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert "77,777" not in section_of(page.write(run))


@pytest.mark.parametrize(
    "found", [None, [], "text", {"surrogate": None}, {"surrogate": {"images": "many", "kind": 3, "energies": {"a": "b"}}}]
)
def test_odd_figures_of_surrogates_are_no_error(tmp_path, found):
    run = make_run(tmp_path / "run", metrics=make_metrics() | {"surrogates": found}, pictures=False)
    assert "16,384 synthetic images in 2 shards" in section_of(page.write(run))


def test_a_source_beside_the_kind_is_told(tmp_path):
    run = made_run(tmp_path / "run")
    (run / "surrogate" / "manifest.json").write_text('{"images": 5, "source": "a diffusion prior"}')
    assert "Kind guided, 5 synthetic images; source: a diffusion prior." in section_of(page.write(run))


# ------------------------------------------------------------------ the terminal, a browser


def test_the_terminals_table_names_each_surrogate():
    metrics = make_metrics()
    plain = tables.text_table(metrics).splitlines()
    metrics["surrogates"] = {
        "surrogate": {"images": 4096, "kind": "guided", "frechet": 6.7234, "energies": {"a": {"mean": 1.0, "sd": 0.1}}},
        "surrogates/\x1b[31m" + "x" * 200: {"images": 64, "kind": "uniform"},
    }
    lines = tables.text_table(metrics).splitlines()
    assert lines[: len(plain)] == plain
    assert lines[len(plain)] == "surrogate: guided, images 4,096, Fréchet 6.723"
    assert len(lines) == len(plain) + 2
    assert len(lines[-1]) <= 120
    assert "\x1b" not in lines[-1]


@browser.needed
def test_a_browser_shows_the_surrogates_on_a_narrow_phone(tmp_path):
    long = "a" * 90  # one long word must not widen the page
    run = made_run(tmp_path / "run", f"surrogates/{long}", long, f"{long} prompt", long)
    found = dump(page.write(run), tmp_path)
    assert found["width"] <= 360, "the page itself never scrolls sideways"
    assert found["decoded"] == found["images"] == 16 + 5 + 1 + 6
    assert found["drawn"] >= 5
    assert not found["said"], "nothing on the browser's console"
