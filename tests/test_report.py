"""The report: what it says of a run, that it stands alone, and that a browser shows it."""

import copy
import hashlib
import html
import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from base64 import b64decode, b64encode
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import browser
from potstill.report import figures, page, tables

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"


def spread(mean, sd):
    return {"mean": mean, "sd": sd}


def make_metrics():
    """Three seeds, four arms; the data-free student beats training from scratch and loses to distillation with data."""
    sizes = {"params": 366656, "size_mib": 1.4, "latency_ms_b1": spread(3.0, 0.1), "throughput": spread(900.0, 9.0)}
    arms = {
        "teacher": {
            "frechet": spread(5.2, 0.1),
            "one_nn": spread(0.6, 0.01),
            "reconstruction_mse": spread(0.004, 0.0),
            **sizes,
            "params": 5386496,
            "latency_ms_b1": spread(24.0, 0.5),
        },
        "student_data_free": {"frechet": spread(12.0, 0.5), "mmd": spread(0.2, 0.01), "nelbo": spread(3.0, 0.1), **sizes},
        "student_with_data": {"frechet": spread(10.0, 0.4), "kid": None, "paired_mse": 0.01, **sizes},
        "student_scratch": {"frechet": spread(15.0, 0.6), "my_metric": 4.0, **sizes},
    }
    return {
        "format": "potstill-metrics/1",
        "reference": {"data": "digits, test", "n": 1024, "features": "pixels", "floor": {"frechet": spread(0.5, 0.02)}},
        "arms": arms,
        "seeds": [0, 1, 2],
        "environment": {
            "python": "3.11.7",
            "cpu": "A CPU",
            "threads": 2,
            "device": "cpu",
            "versions": {"torch": "2.13.0"},
            "potstill": "0.1",
        },
        "arms_info": {
            "teacher": {"label": "The teacher", "updates": 9000, "data": "real", "note": ""},
            "student_data_free": {"label": "Data-free", "updates": 400, "data": "none", "note": "from the teacher's prior"},
            "student_with_data": {"label": "With data", "updates": 400, "data": "real", "note": ""},
            "student_scratch": {"label": "From scratch", "updates": 400, "data": "real", "note": ""},
        },
    }


def make_run(run, metrics=None, recipe="name: digits-run\nsteps: 400\n", channels=1, pictures=True, logs=True):
    """A run folder with every file the page knows."""
    metrics = make_metrics() if metrics is None else metrics
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.json").write_text(json.dumps(metrics))
    if recipe is not None:
        (run / "recipe.yaml").write_text(recipe)
    if pictures:
        rng = np.random.default_rng(0)
        arrays = {name: rng.integers(0, 256, (4, channels, 8, 8), dtype=np.uint8) for name in ("real", "input", "surrogate", "nearest")}
        for arm in metrics["arms"]:
            arrays[f"samples/{arm}"] = rng.integers(0, 256, (4, channels, 8, 8), dtype=np.uint8)
            arrays[f"reconstruction/{arm}"] = rng.integers(0, 256, (4, channels, 8, 8), dtype=np.uint8)
        arrays["nearest_distance"] = np.array([4.0, 1.5, 3.0, 2.0], dtype=np.float32)
        (run / "evaluate").mkdir(exist_ok=True)
        np.savez(run / "evaluate" / "pictures.npz", **arrays)
    if logs:
        for seed in (0, 1):
            folder = run / "students" / "student_data_free" / f"seed-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            write_log(folder / "log.jsonl", [(step, 100 * 0.9**step + seed) for step in range(1, 40)], phase="generate")
        (run / "surrogate").mkdir(exist_ok=True)
        (run / "surrogate" / "manifest.json").write_text(json.dumps({"images": 16384, "shards": ["a", "b"], "source": "the prior"}))
    return run


def write_log(path, points, tail="", **extra):
    lines = [json.dumps({"step": step, "loss": loss, "images_per_second": 100.0, **extra}) for step, loss in points]
    path.write_text("\n".join(lines) + "\n" + tail)
    return path


def text_of(path):
    """The words of a page: no markup, no styles, no script, white space as in a browser."""
    markup = re.sub(r"<(style|script)>.*?</\1>", "", path.read_text("utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", markup)))


class Collector(HTMLParser):
    """Elements and their attributes, and whether every element that must be closed is."""

    VOID = {"img", "meta", "br", "hr", "link", "input"}

    def __init__(self):
        super().__init__()
        self.elements, self.open, self.errors = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(tag)


def parse(path):
    collector = Collector()
    collector.feed(path.read_text("utf-8"))
    assert not collector.open
    assert not collector.errors
    return collector.elements


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return page.write(make_run(tmp_path_factory.mktemp("report") / "run"))


# The page


def test_page_holds_every_section(written):
    text = text_of(written)
    for words in ("digits-run", "12.0 ± 0.5", "features “pixels”", "Floor: real against real", "with 2 threads", "5,386,496", "24.0 ± 0.5"):
        assert words in text.replace("\u00a0", " ")
    for heading in ("Quality", "Size and speed", "Samples", "Reconstructions", "Surrogates", "Training", "How to make it again"):
        assert heading in text
    for words in ("16,384 synthetic images", "2 shards", "steps: 400", "torch", "2.13.0", "A CPU", "my metric", "from the teacher's prior"):
        assert words in text
    assert "FID" not in text
    assert "None" not in text
    assert "nan" not in text.split()


def test_page_is_named_and_complete(written):
    assert written.name == "report.html"
    assert not list(written.parent.glob("*.tmp"))
    markup = written.read_text("utf-8")
    assert markup.startswith("<!DOCTYPE html>")
    assert markup.rstrip().endswith("</html>")
    parse(written)


def test_page_asks_for_nothing_outside(written):
    """No script but its own, no address but data, no style that loads; its policy forbids what a later change might let in."""
    elements = parse(written)
    tags = [tag for tag, _ in elements]
    assert tags.count("script") == 1
    assert not {*tags} & {"link", "iframe", "object", "embed", "base", "form", "video", "audio"}
    markup = written.read_text("utf-8")
    assert not re.search(r"""(src|href|action|data|xmlns[:\w]*)\s*=\s*["']?\s*(https?:)?//""", markup)
    assert "http://" not in markup
    assert "https://" not in markup
    assert "@import" not in markup
    for tag, attributes in elements:
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "img" or attributes["src"].startswith("data:image/png;base64,")
        assert attributes.get("xlink:href", "#").startswith("#")
    policy = next(found["content"] for tag, found in elements if found.get("http-equiv") == "Content-Security-Policy")
    digest = b64encode(hashlib.sha256(re.search("<script>(.*?)</script>", markup, re.DOTALL)[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_every_image_decodes_has_its_size_and_words(written):
    images = [attributes for tag, attributes in parse(written) if tag == "img"]
    # Three pairs of samples, one row of real images, five rows of reconstructions, four surrogate pairs.
    assert len(images) == 6 + 1 + 5 + 4
    for attributes in images:
        with Image.open(io.BytesIO(b64decode(attributes["src"].partition(",")[2]))) as image:
            image.load()
            assert image.size == (int(attributes["width"]), int(attributes["height"]))
            assert image.height >= 56
        assert attributes["alt"]


def test_identifiers_are_unique_and_resolve(written):
    elements = parse(written)
    identifiers = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    markup = written.read_text("utf-8")
    for used in re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', markup):
        assert "".join(used) in identifiers


def test_same_inputs_give_the_same_bytes(tmp_path, monkeypatch):
    first = page.write(make_run(tmp_path / "a" / "run")).read_bytes()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    monkeypatch.setattr(os, "getpid", lambda: 12345)
    again = make_run(tmp_path / "b" / "run")
    assert page.write(again).read_bytes() == first
    assert page.write(again).read_bytes() == first, "writing over a report changes nothing"


def test_user_text_is_escaped_everywhere(tmp_path):
    metrics = make_metrics()
    metrics["arms"][EVIL] = {"frechet": spread(20.0, 1.0), EVIL: 1.0}
    metrics["reference"].update(data=EVIL, features=EVIL, n=EVIL)
    metrics["environment"].update({EVIL: EVIL, "device": EVIL, "threads": EVIL, "versions": {EVIL: EVIL}})
    metrics["seeds"] = [EVIL, 1]
    for info in metrics["arms_info"].values():
        info.update(label=EVIL, note=EVIL)
    recipe = f"name: {json.dumps(EVIL)}\n# </pre></details>{EVIL}\n"
    run = make_run(tmp_path / "run", metrics=metrics, recipe=recipe, pictures=False)
    write_log(run / "students" / "student_data_free" / "seed-0" / "log.jsonl", [(1, 2.0), (2, 1.0)], phase=EVIL)
    (run / "surrogate" / "manifest.json").write_text(json.dumps({"images": EVIL, "source": EVIL, "shards": EVIL}))
    (run / "evaluate").mkdir()
    images = np.zeros((1, 1, 4, 4), np.uint8)
    name = EVIL.replace("/", "|")  # a file name inside the archive
    metrics["arms"][name] = {}
    (run / "metrics.json").write_text(json.dumps(metrics))
    np.savez(run / "evaluate" / "pictures.npz", **{"samples/teacher": images, f"samples/{name}": images, f"odd {name}": np.zeros(3)})
    written = page.write(run)
    markup = written.read_text("utf-8")
    assert markup.count("<script") == 1, "the page's own"
    assert not any("onerror" in attributes for _, attributes in parse(written))
    assert markup.count("&lt;script&gt;") > 20
    assert EVIL in text_of(written)


def test_recipe_is_shown_verbatim(tmp_path):
    recipe = "name: quoted\n# why: a < b && c > \"d\"\nteacher: {kind: python, target: 'm:f'}\n\n\tnot even yaml: [\n"
    text = html.unescape(page.write(make_run(tmp_path / "folder", recipe=recipe)).read_text("utf-8"))
    assert f"<pre>{recipe}</pre>" in text
    assert "<h1>folder</h1>" in text, "a recipe that cannot be read has no name, so the folder's stands in"


@pytest.mark.parametrize("recipe", [None, "", "- a\n- b\n", "name: ''\n", "name:\n", "other: 1\n"])
def test_title_falls_back_to_the_folder(tmp_path, recipe):
    run = make_run(tmp_path / "my-run", recipe=recipe, pictures=False, logs=False)
    assert "<h1>my-run</h1>" in page.write(run).read_text("utf-8")


def test_only_metrics_are_required(tmp_path):
    run = tmp_path / "bare"
    run.mkdir()
    (run / "metrics.json").write_text('{"format": "potstill-metrics/1"}')
    text = text_of(page.write(run))
    assert "no data-free student" in text
    assert "no samples to show" in text
    assert "no recipe.yaml" in text
    assert "no figures of quality" in text
    assert "Training" not in text
    assert "Surrogate" not in text
    parse(run / "report.html")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("{", "cannot be read as JSON"),
        ("[]", "format 'list'"),
        ('{"format": "other/2"}', "'other/2', expected 'potstill-metrics/1'"),
        (
            json.dumps({"format": "potstill-metrics/1", "arms": {f"arm {i}": {"emd": 1.0} for i in range(1001)}}),
            "1,001 arms, and a page that can be read holds 1,000 at most",
        ),
    ],
)
def test_unusable_metrics_are_refused_by_name(tmp_path, content, words):
    (tmp_path / "report.html").write_text("an older report")
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(page.ReportError, match=re.escape(words)) as caught:
        page.write(tmp_path)
    assert str(tmp_path / "metrics.json") in str(caught.value)
    assert (tmp_path / "report.html").read_text() == "an older report"


def test_failed_write_leaves_the_old_report_alone(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", pictures=False, logs=False)
    (run / "report.html").write_text("an older report")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        page.write(run)
    assert (run / "report.html").read_text() == "an older report"
    assert not list(run.glob(".report*"))


def test_missing_and_odd_values_become_dashes(tmp_path):
    metrics = make_metrics()
    metrics["arms"] = {
        "student_data_free": {"frechet": spread(float("nan"), 1.0), "kid": spread(None, None), "params": None, "mmd": spread(0.5, None)},
        "teacher": {"frechet": float("inf"), "mmd": True, "kid": "text", "one_nn": [1], "size_mib": 10**400},
        "student_scratch": None,
        "bad \ud800": {"frechet": spread(1.0, -1.0)},
    }
    metrics["arms_info"] = {"teacher": {"updates": float("nan")}, "student_scratch": "text"}
    written = page.write(make_run(tmp_path / "run", metrics=metrics, pictures=False, logs=False))
    text = text_of(written)
    assert "0.5" in text
    assert "no figure of quality" in text
    assert "nan" not in text.lower().split()
    assert "inf" not in text.lower().split()
    assert tables.text_table(metrics)


def test_teacher_comes_first_and_other_arms_keep_their_order():
    metrics = make_metrics()
    metrics["arms"] = dict(reversed(metrics["arms"].items()))
    keys = [arm.key for arm in tables.arms_of(metrics)]
    assert keys == ["teacher", "student_scratch", "student_with_data", "student_data_free"]


def test_uneven_updates_are_called_out(tmp_path, written):
    words = "not compared like for like"
    assert words not in text_of(written)
    metrics = make_metrics()
    metrics["arms_info"]["student_scratch"]["updates"] = 401
    assert words in text_of(page.write(make_run(tmp_path / "run", metrics=metrics, pictures=False, logs=False)))


# Pictures


def decode(picture):
    with Image.open(io.BytesIO(b64decode(picture.uri.partition(",")[2]))) as image:
        return np.asarray(image.convert("RGBA"))


@pytest.mark.parametrize("channels", [1, 3])
def test_strip_shows_the_pixels_that_it_was_given(channels):
    images = np.random.default_rng(1).integers(0, 256, (3, channels, 32, 32), dtype=np.uint8)
    (strip,) = figures.strips(images, "things")
    shown = decode(strip)
    assert (strip.width, strip.height) == (3 * 64 + 2 * 2, 64)
    for index in range(3):
        tile = shown[::2, 66 * index : 66 * index + 64 : 2]
        expected = np.broadcast_to(images[index].transpose(1, 2, 0), (32, 32, 3))
        np.testing.assert_array_equal(tile[..., :3], expected)
        assert (tile[..., 3] == 255).all()
    assert (shown[:, 64:66, 3] == 0).all(), "the gap lets the page's background through"


def test_strips_are_bounded_and_wrap():
    images = np.zeros((100, 1, 8, 8), np.uint8)
    first, second = figures.strips(images, "digits")
    assert first.width == second.width <= 1056
    assert "1 to 16" in first.alt
    assert "17 to 32" in second.alt
    large = figures.strips(np.zeros((9, 3, 600, 400), np.uint8), "photographs", rows=1)[0]
    assert large.width <= 1056
    assert large.height <= 256


def test_students_stand_below_the_teacher_for_the_same_noise(tmp_path):
    run = make_run(tmp_path / "run")
    with np.load(run / "evaluate" / "pictures.npz") as archive:
        teacher, student = (archive[f"samples/{arm}"] for arm in ("teacher", "student_data_free"))
    images = [attributes for tag, attributes in parse(page.write(run)) if tag == "img"]
    assert images[0]["src"] == images[2]["src"] == figures.strips(teacher, "")[0].uri
    assert images[1]["src"] == figures.strips(student, "")[0].uri
    assert "same noise" in images[1]["alt"]


def test_nearest_neighbors_come_closest_first_with_their_distance(tmp_path, written):
    figures_shown = re.findall(r'alt="A surrogate image[^"]*distance ([\d.]+)"', written.read_text("utf-8"))
    assert figures_shown == ["1.50", "2.00", "3.00", "4.00"]


def test_unusable_pictures_are_named_and_the_rest_is_shown(tmp_path):
    run = make_run(tmp_path / "run", pictures=False, logs=False)
    (run / "evaluate").mkdir()
    np.savez(
        run / "evaluate" / "pictures.npz",
        **{
            "samples/teacher": np.zeros((2, 3, 4, 4), np.uint8),
            "samples/student_data_free": np.zeros((2, 3, 4, 4), np.float32),
            "real": np.zeros((2, 2, 4, 4), np.uint8),
            "input": np.zeros((0, 1, 4, 4), np.uint8),
            "surrogate": np.array([{}], dtype=object),
        },
    )
    written = page.write(run)
    text = text_of(written)
    assert sum(tag == "img" for tag, _ in parse(written)) == 1
    assert all(name in text for name in ("samples/student_data_free", "real, input", "surrogate"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut", b"\x93NUMPY"])
def test_broken_picture_file_is_said_to_be_broken(tmp_path, content):
    run = make_run(tmp_path / "run", pictures=False, logs=False)
    (run / "evaluate").mkdir()
    (run / "evaluate" / "pictures.npz").write_bytes(content)
    assert "pictures.npz cannot be read" in text_of(page.write(run))


def test_truncated_picture_file_is_no_error(tmp_path):
    run = make_run(tmp_path / "run", logs=False)
    path = run / "evaluate" / "pictures.npz"
    path.write_bytes(path.read_bytes()[:900])
    assert "pictures.npz cannot be read" in text_of(page.write(run))


def test_rows_of_different_lengths_still_correspond(tmp_path):
    run = make_run(tmp_path / "run", pictures=False, logs=False)
    (run / "evaluate").mkdir()
    wall = {"samples/teacher": np.zeros((5, 1, 8, 8), np.uint8), "samples/student_data_free": np.zeros((3, 1, 8, 8), np.uint8)}
    np.savez(run / "evaluate" / "pictures.npz", **wall)
    widths = [attributes["width"] for tag, attributes in parse(page.write(run)) if tag == "img"]
    assert widths == ["196", "196"]


# Logs and loss curves


def test_log_of_a_killed_run_keeps_its_whole_lines(tmp_path):
    tail = '{"step": 4, "loss": 0.\n[1]\nnull\n\xff\xfe\n{"loss": 1.0}\n{"step": "5", "loss": 1.0}\n{"step": 6, "loss": null}\n{"st'
    path = tmp_path / "log.jsonl"
    write_log(path, [(1, 3.0), (2, 2.0)])
    path.write_bytes(path.read_bytes() + tail.encode("latin-1"))
    steps, losses = figures.read_log(path).losses[""]
    assert steps.tolist() == [1, 2]
    assert losses.tolist() == [3.0, 2.0]


def test_log_splits_phases_and_a_resumed_step_counts_once(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [
        {"step": 1, "loss": 9.0, "phase": "infer"},
        {"step": 2, "loss": 8.0},
        {"step": 3, "loss": 7.0, "images_per_second": 10.0},
        {"step": 2, "loss": 6.0, "images_per_second": 30.0},
        {"step": 4, "loss": float("nan")},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    log = figures.read_log(path)
    assert set(log.losses) == {"", "infer"}
    assert log.losses[""][0].tolist() == [2, 3]
    assert log.losses[""][1].tolist() == [6.0, 7.0]
    assert log.pace == {"": 20.0}
    assert log.broken == {"": 1}


def test_missing_log_is_an_empty_one(tmp_path):
    assert figures.read_log(tmp_path / "no.jsonl").losses == {}


def lines_in(svg):
    return [path for path in re.findall(r'd="([^"]+)"[^>]*style="([^"]*)"', svg) if "var(--series)" in path[1]]


def test_curves_show_each_seed_and_their_mean(tmp_path):
    steps = np.arange(1.0, 20.0)
    runs = [(steps, 2.0 + np.sin(steps)), (steps[:10], 3.0 + np.cos(steps[:10]))]
    curves = figures.loss_svg(runs, "a")
    drawn = lines_in(curves.svg)
    assert len(drawn) == 3
    thin, short, bold = (float(re.search(r"stroke-width: ([\d.]+)", style)[1]) for _, style in drawn)
    assert thin == short < bold
    # The mean ends where the shorter run does.
    assert drawn[2][0].split()[-2] == drawn[1][0].split()[-2] != drawn[0][0].split()[-2]
    assert not curves.log
    assert ">loss</text>" in curves.svg


def test_curves_use_a_logarithmic_axis_only_where_the_spread_asks_for_it():
    steps = np.arange(1.0, 20.0)
    wide = figures.loss_svg([(steps, 1000 * 0.5**steps)], "a")
    assert wide.log
    assert "log scale" in wide.svg
    for values in (1000 * 0.5**steps - 1.0, 2.0 + steps):
        assert not figures.loss_svg([(steps, values)], "a").log


def test_curves_take_the_colors_of_the_page():
    svg = figures.loss_svg([(np.arange(5.0), np.arange(5.0))], "a").svg
    colors = set(re.findall(r"(?:stroke|fill): ([^;\"]+)", svg))
    assert colors <= {"none", "var(--muted)", "var(--rule)", "var(--series)"}
    assert "var(--series)" in colors


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-30, 1e30], [-1e12, 1e12], [5.0, 5.0, 5.0]])
def test_curves_of_odd_values_are_drawn(values):
    svg = figures.loss_svg([(np.arange(float(len(values))), np.array(values))] * 2, "a").svg
    assert svg.startswith("<svg")
    assert "nan" not in svg


def test_long_logs_stay_small():
    steps = np.arange(50_000.0)
    curves = figures.loss_svg([(steps, np.random.default_rng(0).random(50_000))], "a")
    assert curves.averaged
    assert len(curves.svg) < 40_000


def test_panels_count_losses_that_were_not_finite(tmp_path):
    run = make_run(tmp_path / "run", pictures=False)
    (run / "train").mkdir()
    write_log(run / "train" / "log.jsonl", [(1, 2.0), (2, float("nan")), (3, float("inf")), (4, 1.0)])
    text = text_of(page.write(run))
    assert "2 losses were not finite" in text
    assert "2 seeds thin, their mean bold; 100 images/s" in text


def test_arm_names_never_leave_the_run_folder(tmp_path):
    outside = tmp_path / "elsewhere" / "seed-0"
    outside.mkdir(parents=True)
    write_log(outside / "log.jsonl", [(1, 2.0), (2, 1.0)])
    metrics = make_metrics()
    metrics["arms"] |= {str(outside.parent): {}, "../../elsewhere": {}, "nul\0": {}}
    run = make_run(tmp_path / "run", metrics=metrics, pictures=False, logs=False)
    assert 'id="training"' not in page.write(run).read_text("utf-8")


# Charts of the arms


def positions(path):
    return [float(at) for at in re.findall(r'class="mean" style="left:([\d.]+)%"', path.read_text("utf-8"))]


def test_arms_stand_on_one_line_from_zero_and_on_a_logarithmic_one_where_one_would_hide_the_rest(tmp_path, written):
    assert "Fréchet distance from zero" in text_of(written)
    top = 1.03 * 15.6
    assert positions(written) == pytest.approx([100 * mean / top for mean in (5.2, 12.0, 10.0, 15.0)], abs=0.01)
    metrics = make_metrics()
    metrics["arms"]["student_scratch"]["frechet"] = spread(5000.0, 100.0)
    wide = page.write(make_run(tmp_path / "run", metrics=metrics))
    assert "Fréchet distance on a logarithmic scale" in text_of(wide)
    whole = np.log(1.1 * 5100 / 0.4)  # from below the floor, 0.5
    assert positions(wide) == pytest.approx([100 * np.log(mean / 0.4) / whole for mean in (5.2, 12.0, 10.0, 5000.0)], abs=0.01)


def test_quality_stands_against_size_and_latency(written):
    text = text_of(written)
    assert "Fréchet distance against parameters" in text
    assert "Fréchet distance against milliseconds for one image" in text
    words = [found["aria-label"] for tag, found in parse(written) if tag == "div" and "by the arms' numbers" in found.get("aria-label", "")]
    assert words == [
        "Fréchet distance against parameters, by the arms' numbers: "
        "1: 5,386,496, 5.20 ± 0.10; 2: 366,656, 12.0 ± 0.5; 3: 366,656, 10.0 ± 0.4; 4: 366,656, 15.0 ± 0.6",
        "Fréchet distance against milliseconds for one image, by the arms' numbers: "
        "1: 24.0 ± 0.5, 5.20 ± 0.10; 2: 3.00 ± 0.10, 12.0 ± 0.5; 3: 3.00 ± 0.10, 10.0 ± 0.4; 4: 3.00 ± 0.10, 15.0 ± 0.6",
    ]
    panel = written.read_text("utf-8").split("<svg")[1]
    assert [number for number in re.findall(r">(\d+)</text>", panel) if int(number) <= 4][-4:] == ["1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("change", "panels"),
    [
        ({"params": 366656}, ["milliseconds for one image"]),  # all of one size
        ({"params": None, "latency_ms_b1": None}, []),
        ({"frechet": None}, []),
        ({"params": 1e300, "latency_ms_b1": 0.0}, []),  # nothing that an axis shows beside the others
        ({"frechet": -3.0}, ["parameters", "milliseconds for one image"]),
        ({"frechet": spread(1e200, 0.0)}, []),
        ({"frechet": spread(5.0, 1e250)}, []),
    ],
)
def test_a_scatter_shows_what_can_be_compared(tmp_path, change, panels):
    metrics = make_metrics()
    metrics["arms"]["teacher"] |= change
    text = text_of(page.write(make_run(tmp_path / "run", metrics=metrics, pictures=False, logs=False)))
    assert re.findall(r"Fréchet distance against ([\w ]+?) (?:log|\d|\.)", text) == panels


def test_a_scatter_of_many_arms_says_how_many_it_shows(tmp_path):
    metrics = make_metrics()
    metrics["arms"] |= {f"arm {i}": metrics["arms"]["student_scratch"] for i in range(40)}
    text = text_of(page.write(make_run(tmp_path / "run", metrics=metrics, pictures=False, logs=False)))
    assert "Only the first 24 arms are drawn." in text


def test_an_arm_without_a_label_of_its_own_is_named_in_the_readers_words():
    metrics = make_metrics()
    for name, info in metrics["arms_info"].items():
        info["label"] = name
    metrics["arms"]["my_arm"] = {"frechet": spread(20.0, 1.0)}
    metrics["arms_info"]["my_arm"] = {"label": "my_arm", "data": "none"}
    labels = ["Teacher", "Student, data-free", "Student, distilled with data", "Student, from scratch", "my_arm"]
    assert [arm.label for arm in tables.arms_of(metrics)] == labels
    assert tables.verdict(metrics).startswith("The data-free student (Fréchet distance 12.0")


# The verdict


def with_frechet(**figures_by_arm):
    """Metrics whose students have these Fréchet distances; an arm given as None is left out."""
    metrics = make_metrics()
    for arm, found in figures_by_arm.items():
        if found is None:
            del metrics["arms"][f"student_{arm}"]
        else:
            metrics["arms"][f"student_{arm}"]["frechet"] = found
    return metrics


def test_verdict_prints_a_win_and_a_loss_alike():
    said = tables.verdict(make_metrics())
    assert "is better than the student trained from scratch on real data (15.0 ± 0.6)" in said
    assert "worse than the student distilled with real data (10.0 ± 0.4)" in said
    assert "Fréchet distance 12.0 ± 0.5 on features “pixels”, lower is better" in said
    assert "compared with the teacher it is 15 times smaller and 8.0 times faster" in said
    assert said.count(".  ") == 0
    assert said.endswith(".")
    assert "FID" not in said


def test_verdict_of_two_losses():
    said = tables.verdict(with_frechet(data_free=spread(30.0, 1.0)))
    assert "is worse than the student trained from scratch" in said
    assert "and the student distilled with real data" in said
    assert "better than" not in said


@pytest.mark.parametrize(("sd", "outcome"), [(2.0, "level with"), (1.999, "worse than"), (0.0, "worse than")])
def test_level_means_within_the_pooled_spread(sd, outcome):
    said = tables.verdict(with_frechet(data_free=spread(12.0, sd), with_data=spread(10.0, sd), scratch=None))
    assert f"is {outcome} the student distilled" in said


def test_pooled_spread_is_the_root_mean_square():
    # sqrt((3² + 0²) / 2) = 2.12: a difference of 2.1 is within it, one of 2.2 is not.
    for mean, outcome in ((12.1, "level with"), (12.2, "worse than")):
        said = tables.verdict(with_frechet(data_free=spread(mean, 3.0), with_data=spread(10.0, 0.0), scratch=None))
        assert outcome in said


def test_verdict_without_baselines_says_so():
    said = tables.verdict(with_frechet(with_data=None, scratch=None))
    assert "has Fréchet distance 12.0 ± 0.5 on features “pixels”, lower is better, its teacher 5.20 ± 0.10, " in said
    assert "real images against real images 0.500 ± 0.020. This run has no figure for a student trained on real data" in said
    assert "better than" not in said
    assert "worse than" not in said
    assert "15 times smaller" in said
    one = tables.verdict(with_frechet(with_data=None))
    assert "better than the student trained from scratch" in one
    assert "no figure for a student distilled with real data" in one


def test_verdict_without_a_spread_warns():
    for metrics in (make_metrics() | {"seeds": [0]}, with_frechet(data_free=12.0), with_frechet(data_free=spread(12.0, None))):
        assert "chance is not ruled out" in tables.verdict(metrics)
    assert "chance" not in tables.verdict(make_metrics())


def test_figures_of_one_seed_have_no_spread(tmp_path):
    metrics = make_metrics() | {"seeds": [7]}
    for arm in metrics["arms"].values():
        arm["frechet"] = spread(arm["frechet"]["mean"], 0.0)
    assert {arm.values["frechet"].sd for arm in tables.arms_of(metrics)} == {tables.floor_of(metrics)["frechet"].sd} == {None}
    assert "±" not in tables.text_table(metrics)
    text = text_of(page.write(make_run(tmp_path / "run", metrics=metrics)))
    assert "One seed, 7: how far chance moves these figures is not known" in text
    assert "standard deviation" not in text
    assert "without a spread over seeds chance is not ruled out" in text


def test_verdict_admits_a_larger_and_slower_student():
    metrics = make_metrics()
    metrics["arms"]["teacher"].update(params=183328, latency_ms_b1=3.1)
    assert "compared with the teacher it is 2.0 times larger and equally fast" in tables.verdict(metrics)
    metrics["arms"]["teacher"]["latency_ms_b1"] = 1.5
    assert "2.0 times slower" in tables.verdict(metrics)


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"latency_ms_b1": spread(24.5, 2.0)}, "equally fast"),
        ({"latency_ms_b1": spread(30.0, 9.0)}, "equally fast"),  # 6 apart, and the pooled spread is 6.4
        ({"latency_ms_b1": spread(30.0, 1.0)}, "1.2 times slower"),
        ({"latency_ms_b1": spread(30.0, None), "latency_iqr_ms_b1": spread(20.0, None)}, "equally fast"),
        ({"latency_ms_b1": spread(30.0, None), "latency_iqr_ms_b1": spread(2.0, None)}, "1.2 times slower"),
    ],
)
def test_a_difference_of_times_within_their_spread_is_none(student, said):
    metrics = make_metrics()
    metrics["arms"]["student_data_free"] |= student
    assert said in tables.verdict(metrics)


def test_too_few_images_for_the_features_are_told(tmp_path):
    metrics = make_metrics()
    metrics["reference"]["dimensions"] = 1024
    assert "1,024 images are too few for 1,024 features" in tables.text_table(metrics)
    assert "1,024 images are too few for 1,024 features" in text_of(page.write(make_run(tmp_path / "run", metrics=metrics)))
    metrics["reference"]["dimensions"] = 1023
    assert "too few" not in tables.text_table(metrics)


def test_verdict_picks_its_student_by_name_and_never_by_its_figures():
    metrics = make_metrics()
    metrics["arms"] = {"student_data_free_guided": {"frechet": spread(1.0, 0.1)}, **metrics["arms"]}
    assert "Fréchet distance 12.0" in tables.verdict(metrics)
    assert "“Data-free”" in tables.verdict(metrics), "with several data-free arms, the one that is meant is named"
    del metrics["arms"]["student_data_free"]
    assert "Fréchet distance 1.00" in tables.verdict(metrics)


def test_verdict_of_a_classifier_compares_accuracy():
    metrics = make_metrics()
    for arm, accuracy in (("student_data_free", 0.9), ("student_scratch", 0.8), ("student_with_data", 0.95)):
        metrics["arms"][arm] = {"accuracy": spread(accuracy, 0.01)}
    said = tables.verdict(metrics)
    assert "Accuracy 0.900 ± 0.010, higher is better) is better than the student trained from scratch" in said
    assert "worse than the student distilled" in said


def test_verdict_without_a_data_free_student():
    assert "no data-free student" in tables.verdict({"arms": {"teacher": {"frechet": 1.0}}})
    assert "no figure of quality" in tables.verdict({"arms": {"student_data_free": {}}})


# Figures as text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (tables.Value(12.3412, 0.4123), "12.3 ± 0.4"),
        (tables.Value(12.3412, 0.1234), "12.34 ± 0.12"),
        (tables.Value(203.9, 12.3), "204 ± 12"),
        (tables.Value(1234.5, 96.0), "1,234 ± 96"),
        (tables.Value(0.00123, 0.0002), "0.00123 ± 0.00020"),
        (tables.Value(-0.00001, 0.00051), "0.0000 ± 0.0005"),
        (tables.Value(0.8), "0.8"),
        (tables.Value(1234.0), "1,234"),
        (tables.Value(0.0), "0"),
        (tables.Value(0.0, 0.0), "0 ± 0"),
        (tables.Value(5.0, 0.0), "5 ± 0"),
        (tables.Value(5.0, 5e-324), "5 ± 0"),
        (tables.Value(3.2e-6, 1e-7), "3.20e-06 ± 1e-07"),
        (tables.Value(1e9), "1.00e+09"),
    ],
)
def test_spread_decides_the_digits(value, text):
    assert tables.format_value(value) == text


def columns(line):
    """Terminal columns of a line: wide characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in line)


def test_text_table_is_aligned_and_fits():
    lines = tables.text_table(make_metrics()).splitlines()
    header, rule, *rows = lines
    assert header.split() == ["Fréchet", "MMD", "1-NN", "recon", "MSE", "params", "MiB", "ms/image"]
    assert set(rule) == {"-"}
    assert [row.split("  ")[0] for row in rows[:4]] == ["The teacher", "Data-free", "With data", "From scratch"]
    assert rows[4] == rule
    assert rows[5].startswith("Floor")
    assert {len(line) for line in (header, rule, *rows[:6])} == {len(rule)}
    end = header.index("Fréchet") + len("Fréchet")
    assert all(row[:end].endswith(figure) for row, figure in zip(rows, ["5.20 ± 0.10", "12.0 ± 0.5"], strict=False))
    assert rows[1].count("–") == 2, "no 1-NN and no reconstruction for this arm"
    assert rows[6] == "Fréchet, MMD, recon MSE: lower is better; 1-NN: 0.5 is best; features: pixels"


def test_text_table_stays_within_120_columns():
    metrics = make_metrics()
    for key in metrics["arms"]:
        metrics["arms"][key] = {name: spread(123456.123456, 0.000123) for name in tables._TEXT_COLUMNS}
        metrics["arms_info"][key]["label"] = f"A student with a very long label of 長い名前 {key}"
    metrics["reference"]["features"] = "classifier:" + "x" * 200
    lines = tables.text_table(metrics).splitlines()
    assert max(map(columns, lines)) <= 120
    assert "Fréchet" in lines[0]
    assert len({columns(line) for line in lines[1:6]}) == 1


def test_text_table_of_nothing_and_of_hostile_labels():
    assert tables.text_table({})
    metrics = make_metrics()
    metrics["arms_info"]["teacher"]["label"] = "\x1b[31mred\x1b[0m\nline"
    table = tables.text_table(metrics)
    assert "\x1b" not in table
    assert len(table.splitlines()) == len(tables.text_table(make_metrics()).splitlines())


def test_text_is_printable_on_a_western_windows_console():
    metrics = make_metrics()
    (tables.text_table(metrics) + tables.verdict(metrics)).encode("cp1252")


def test_functions_leave_their_input_alone():
    metrics = make_metrics()
    before = copy.deepcopy(metrics)
    tables.text_table(metrics)
    tables.verdict(metrics)
    assert metrics == before


def test_tables_load_no_plotting_library_and_the_report_no_torch():
    code = (
        "import sys; import potstill.report.tables; assert not {'matplotlib', 'jinja2', 'numpy'} & set(sys.modules);"
        "import potstill.report.page; assert 'torch' not in sys.modules;"
        "print(sorted(n for n in sys.modules if n.startswith('potstill.') and not n.startswith('potstill.report')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# A browser

ROW = "row => row.cells[0].querySelector('.label').firstChild.nextSibling.data.trim()"
OF_A_REPORT = f"""
drawn: [...page.querySelectorAll("svg path")].filter(path => path.getBoundingClientRect().width > 100).length,
orders: [...page.querySelectorAll("#quality th[scope=col]")].slice(0, 3).map(head => [1, 2, 3].map(() => {{
  head.querySelector("button").click();
  return [head.ariaSort, ...[...page.querySelectorAll("#quality tbody tr")].map({ROW})];
}})),
unnamed: [...page.querySelectorAll("button, a, summary, [tabindex]")].filter(e => !(e.ariaLabel || e.textContent.trim())).length,
unreachable: [...page.querySelectorAll(".scroll")].filter(box => box.tabIndex !== 0 || box.role !== "region").length,
dead: [...page.querySelectorAll("a")].filter(link => !page.getElementById(link.hash.slice(1))).length,
scrolls: [...page.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length,
"""


def dump(report, folder, width=360, scheme="light"):
    """What a browser finds in a report, and, as ``said``, what it says on its console."""
    (found,), said = browser.look([report], folder, width, scheme, OF_A_REPORT)
    return found | {"said": said}


@browser.needed
def test_browser_shows_the_page_on_a_narrow_phone(tmp_path):
    metrics = make_metrics()
    metrics["arms_info"]["student_data_free"]["label"] = "a" * 90  # one long word must not widen the page
    metrics["environment"]["platform"] = "b" * 120
    report = page.write(make_run(tmp_path / "run", metrics=metrics, recipe=f"name: {'c' * 80}\nlong: {'d ' * 200}\n"))
    found = dump(report, tmp_path)
    assert found["heading"] == "c" * 80
    assert found["width"] <= 360, "the page itself never scrolls sideways"
    assert found["scrolls"] >= 2, "wide tables scroll inside their own container"
    assert found["decoded"] == found["images"] == 16
    assert found["drawn"] >= 2
    assert not found["said"], "nothing on its console"


@browser.needed
@browser.WINDOWS
def test_browser_shows_the_page_in_every_window(tmp_path, written, width, scheme):
    found = dump(written, tmp_path, width, scheme)
    assert found["dark"] == (scheme == "dark")
    assert found["width"] <= width
    assert found["texts"] > 100
    assert found["contrast"] >= 4.5, "level AA"
    assert found["decoded"] == found["images"] == 16
    assert (found["wordless"], found["unnamed"], found["unreachable"], found["dead"]) == (0, 0, 0, 0)
    assert not found["said"]


@browser.needed
def test_browser_sorts_a_table_by_a_click_on_a_head(tmp_path):
    metrics = make_metrics()
    metrics["arms_info"]["teacher"]["updates"] = None
    metrics["arms_info"]["student_scratch"]["updates"] = 1000  # more than 400, though not as text
    floor, teacher = "Floor: real against real", "The teacher"
    before = [teacher, "Data-free", "With data", "From scratch", floor]
    by_name, by_updates, by_frechet = dump(page.write(make_run(tmp_path / "run", metrics=metrics)), tmp_path)["orders"]
    assert by_name == [
        ["ascending", "Data-free", "From scratch", teacher, "With data", floor],
        ["descending", "With data", teacher, "From scratch", "Data-free", floor],
        [None, *before],
    ]
    assert by_frechet == [
        ["ascending", teacher, "With data", "Data-free", "From scratch", floor],
        ["descending", "From scratch", "Data-free", "With data", teacher, floor],
        [None, *before],
    ]
    assert by_updates == [
        ["ascending", "Data-free", "With data", "From scratch", teacher, floor],
        ["descending", "From scratch", "Data-free", "With data", teacher, floor],
        [None, *before],
    ]


@browser.needed
def test_browser_runs_no_script_but_the_pages_own(tmp_path, written):
    """Were a user's text ever let through as markup, the policy would still not run it."""
    evil = tmp_path / "evil.html"
    evil.write_text(written.read_text("utf-8").replace("</h1>", "<script>document.querySelector('h1').textContent = 'evil'</script></h1>"))
    found = dump(evil, tmp_path)
    assert found["heading"].startswith("digits-run")
    assert found["orders"]
    assert "Content Security Policy" in found["said"][0]


def test_template_ships_beside_the_module():
    assert {"page.html.j2", "page.js"} <= {path.name for path in Path(page.__file__).parent.iterdir()}
