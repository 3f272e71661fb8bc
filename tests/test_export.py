"""What export writes: equal to torch on shared noise, runnable without it, in numpy and in a browser; and what it refuses."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import browser
from potstill import build, cli
from potstill import export as module
from potstill.errors import BadInput, Failed, Refused
from potstill.export import TOLERANCE, export, summary
from potstill.families.classifier import Classifier
from potstill.families.gan import GAN
from potstill.families.helmholtz import HelmholtzMachine
from potstill.families.own import from_generator
from potstill.families.vae import VAE
from potstill.families.vrnn import VRNN
from potstill.model import Images, Model
from potstill.noise import Noise
from runs import environment, snapshot

pytest.importorskip("sklearn", reason="the digits need scikit-learn")
onnx = pytest.importorskip("onnx", reason="ONNX is an extra: pip install 'potstill[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX is an extra: pip install 'potstill[export]'")
pytest.importorskip("onnxscript", reason="ONNX is an extra: pip install 'potstill[export]'")

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPE = {
    "name": "digits",
    "seeds": [0],
    "data": {"kind": "digits"},
    "teacher": {"kind": "pretrained", "path": "zoo:digits-lvae"},
    "student": {"width": 8},
    "surrogate": {"n": 256},
    "distill": {"generate": {"steps": 300, "batch": 32, "lr": 2e-2, "ema": 0.95}, "infer": {"steps": 5, "batch": 32}},
    "arms": ["data_free"],
    "evaluate": {"features": "classifier:zoo:digits-classifier", "n": 128, "latency_repeats": 3},
    "report": {"images": 2},
    "compute": {"device": "cpu", "threads": 1, "workers": 1},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run whose student, of a few hundred updates, draws digits; exported as ONNX in 8 bits too."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    assert cli.main(["run", str(folder / "recipe.yaml"), "--out", str(folder / "run"), "--quiet"]) == 0
    assert cli.main(["export", str(folder / "run"), "--to", "onnx", "--int8"]) == 0
    return folder / "run"


def described(folder):
    return json.loads((folder / "export.json").read_text())


def onnx_of(path, **given):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, given)


def saved(net, folder):
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    net.eval().save_pretrained(folder)
    return folder


# ------------------------------------------------------------------ a student of a run


def test_the_student_of_a_run_as_onnx_draws_what_torch_draws(finished):
    folder, student = finished / "export" / "onnx", build.pretrained(str(finished / "student")).model()
    found, noise = described(folder), Noise((7, "shared"))
    inputs = found["graphs"]["model.onnx"]["inputs"]
    assert [(i["name"], i["shape"], i["kind"]) for i in inputs] == [
        ("z3", ["batch", 16, 1, 1], "normal"),
        ("z2", ["batch", 16, 2, 2], "normal"),
        ("z1", ["batch", 16, 4, 4], "normal"),
    ]
    for n in (1, 3, 65):  # the batch is no constant of the graph
        (images,) = onnx_of(folder / "model.onnx", **{i["name"]: noise.normal(i["name"], (n, *i["shape"][1:])).numpy() for i in inputs})
        expected = student.sample(n, noise).numpy()
        assert images.shape == (n, 1, 8, 8)
        assert np.abs(images - expected).max() <= TOLERANCE
    assert 0 < found["graphs"]["model.onnx"]["max_abs_difference"] <= TOLERANCE


def test_its_encoder_gives_the_means_of_the_latents_and_the_reconstruction(finished):
    folder, student = finished / "export" / "onnx", build.pretrained(str(finished / "student")).model()
    graph = described(folder)["graphs"]["encoder.onnx"]
    assert graph["outputs"] == ["z3", "z2", "z1", "reconstruction"]
    x = student.sample(5, Noise((1,)))
    z3, z2, z1, reconstruction = onnx_of(folder / "encoder.onnx", image=x.numpy())
    with torch.no_grad():
        h = x
        for rung in student.net.encoder():
            h, raw = rung(h)
        top = raw.chunk(2, 1)[0]
        decoded = student.net.decode(torch.from_numpy(z1)).mean.clamp(0, 1)
    assert np.abs(z3 - top.numpy()).max() < 1e-5 * max(1, top.abs().max())
    assert np.abs(reconstruction - decoded.numpy()).max() < 1e-5
    assert (z2.shape, z1.shape) == ((5, 16, 2, 2), (5, 16, 4, 4))


def test_what_8_bits_cost_is_stated_on_the_features_of_the_run(finished):
    found = described(finished / "export" / "onnx")
    change = found["int8"]["frechet"]
    metrics = json.loads((finished / "metrics.json").read_text())
    assert change["features"] == metrics["reference"]["features"] == "classifier:zoo:digits-classifier"
    assert change["n"] == metrics["reference"]["n"] == 128
    assert change["change"] == change["int8"] - change["float"] != 0
    # Other noise than evaluate's, so not to the digit: the float graph is the student of the table.
    assert change["float"] == pytest.approx(metrics["arms"]["student_data_free"]["frechet"]["mean"], rel=0.5)
    assert TOLERANCE < found["int8"]["max_abs_difference"] < 0.5
    kinds = {t.name: t.data_type for t in onnx.load(finished / "export" / "onnx" / "model.int8.onnx").graph.initializer}
    assert onnx.TensorProto.INT8 in kinds.values()
    assert [row["name"] for row in found["table"]] == ["torch", "ONNX", "ONNX int8"]
    assert all(row["size_mib"] > 0 and row["latency_ms_b1"] > 0 and row["latency_ms_b64"] > 0 for row in found["table"])


def test_nothing_in_the_files_tells_of_this_machine(finished, tmp_path):
    export(finished, "torch-export", tmp_path / "pt2")
    files = {str(p): p.read_bytes() for p in (finished / "export").rglob("*") if p.is_file()}
    with zipfile.ZipFile(tmp_path / "pt2" / "model.pt2") as archive:
        files |= {name: archive.read(name) for name in archive.namelist()}
    assert len(files) > 8
    for name, content in files.items():
        for path in (module.__file__, str(Path(module.__file__).parent), str(Path(torch.__file__).parent), str(finished), str(Path.cwd())):
            assert path.encode() not in content, name


def test_torch_export_is_read_back_by_torch(finished, tmp_path):
    found = export(finished, "torch-export", tmp_path / "pt2")
    student = build.pretrained(str(finished / "student")).model()
    program = torch.export.load(tmp_path / "pt2" / "model.pt2").module()
    noise = Noise((3,))
    (images,) = program(*(noise.normal(i["name"], (9, *i["shape"][1:])) for i in found["graphs"]["model.pt2"]["inputs"]))
    assert (images - student.sample(9, noise)).abs().max() <= TOLERANCE
    assert {p.name for p in (tmp_path / "pt2").iterdir()} == {"model.pt2", "encoder.pt2", "export.json"}


def test_an_export_is_never_overwritten_and_leaves_nothing_when_it_fails(finished, tmp_path, capsys, monkeypatch):
    before = snapshot(finished / "export")
    assert cli.main(["export", str(finished), "--to", "onnx"]) == 2
    assert "is there already; nothing is overwritten" in capsys.readouterr().err
    assert snapshot(finished / "export") == before
    whole = module._as_onnx

    def wrong(part, exported, path):
        call = whole(part, exported, path)
        return lambda tensors: [out + 2 * TOLERANCE for out in call(tensors)]

    monkeypatch.setattr(module, "_as_onnx", wrong)
    assert cli.main(["export", str(finished), "--to", "onnx", "--out", str(tmp_path / "new")]) == 1
    assert re.search(r"model.onnx differs from torch by 2.*e-05 on the same noise; at most 1e-05 is allowed", capsys.readouterr().err)
    assert os.listdir(tmp_path) == []


def test_the_report_shows_the_exports_that_the_run_has(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert "Exports of the student" not in (run / "report.html").read_text()

    def report():
        assert cli.main(["report", str(run / "recipe.yaml"), "--out", str(run), "--quiet"]) == 0
        return (run / "report.html").read_text()

    first = report()
    assert "Exports of the student" in first
    assert "onnx · ONNX int8 · model.int8.onnx" in first
    assert cli.main(["doctor", str(run)]) == 0
    time = (run / "report.html").stat().st_mtime_ns
    assert report() == first
    assert (run / "report.html").stat().st_mtime_ns == time  # not written again
    evil = {"table": [{"name": "<script>alert(1)</script>", "size_mib": 1, "frechet": "x"}, 3], "x": float("nan")}
    (run / "export" / "onnx" / "export.json").write_text(json.dumps(evil))
    assert "<script>alert" not in report()
    shutil.rmtree(run / "export")
    assert "Exports of the student" not in report()


# ------------------------------------------------------------------ every family


FAMILIES = {
    "vae": lambda: VAE((1, 8, 8), 4, 3),
    "gan": lambda: GAN((3, 8, 8), 4, 5, classes=4, encoder=True),
    "helmholtz": lambda: HelmholtzMachine(width=3),
    "vrnn": lambda: VRNN((3, 2, 1), 4, 5, 2),
    "classifier": lambda: Classifier((1, 8, 8), 5, 2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_as_onnx(family, tmp_path):
    folder = saved(FAMILIES[family](), tmp_path / "model")
    found = export(folder, "onnx", tmp_path / "out")
    model, noise = build.pretrained(str(folder)).model(), Noise((5,))
    graph = found["graphs"]["model.onnx"]
    if family == "classifier":
        assert graph["outputs"] == ["logits"]
        x = noise.uniform("x", (7, 1, 8, 8))
        with torch.no_grad():
            expected = model.net(model.images.encode(x)).log_softmax(1).numpy()
        assert np.abs(onnx_of(tmp_path / "out" / "model.onnx", image=x.numpy())[0] - expected).max() < 1e-5 * max(1, np.abs(expected).max())
        assert found["labels"] == {"output": "logits", "classes": 5}
        return
    given = {i["name"]: getattr(noise, i["kind"])(i["name"], (7, *i["shape"][1:])).numpy() for i in graph["inputs"]}
    (images,) = onnx_of(tmp_path / "out" / "model.onnx", **given)
    expected = model.sample(7, noise).numpy()
    assert np.abs(images - expected).max() <= TOLERANCE * max(1, np.abs(expected).max())
    assert expected.std() > 0
    assert "encoder.onnx" in found["graphs"]
    if family == "gan":  # a label is asked for as export.json says
        for label in range(4):
            given["y"] = np.where(np.arange(4) == label, np.float32(0.5), np.float32(0)) + np.zeros((7, 1), np.float32)
            with torch.no_grad():
                wanted = model.images.decode(model.net.decode(torch.from_numpy(given["z"]), torch.full((7,), label))).numpy()
            assert np.abs(onnx_of(tmp_path / "out" / "model.onnx", **given)[0] - wanted).max() <= TOLERANCE


def test_a_chain_as_the_onnx_of_its_denoiser_and_as_a_folder_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is an extra")
    from potstill.families.diffusion import UNet

    folder = saved(UNet((1, 8, 8), 8, steps=5), tmp_path / "model")
    net = build.pretrained(str(folder))
    noise = Noise((2,))
    expected = net.model().sample(4, noise)
    found = export(folder, "onnx", tmp_path / "onnx")
    x, chain = noise.normal("xT", (4, 1, 8, 8)).numpy(), found["chain"]
    for (t, _), (alpha, sigma, alpha_s, sigma_s) in zip(chain["links"], chain["levels"], strict=True):
        (eps,) = onnx_of(tmp_path / "onnx" / "model.onnx", x=x, t=np.full(4, t, np.float32))
        clean = np.clip((x - sigma * eps) / alpha, -1, 1)
        x = (alpha_s * clean + sigma_s * eps).astype(np.float32)
    assert np.abs((x / 2 + 0.5).clip(0, 1) - expected.numpy()).max() < 1e-4

    bounded = export(folder, "torch-export", tmp_path / "pt2")["graphs"]["model.pt2"]
    assert (bounded["most_rows"], bounded["compared_on"]) == (63, 63)

    export(folder, "diffusers", tmp_path / "pipeline")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.scheduler.set_timesteps(5)
    drawn = noise.normal("xT", (4, 1, 8, 8))
    with torch.no_grad():
        for t in pipeline.scheduler.timesteps:
            drawn = pipeline.scheduler.step(pipeline.unet(drawn, t).sample, t, drawn).prev_sample
    assert ((drawn / 2 + 0.5).clamp(0, 1) - expected).abs().max() < 1e-4
    assert torch.equal(build.denoiser(str(tmp_path / "pipeline"), 5).model().sample(4, noise), expected)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--to", "diffusers"], "diffusers' folders are of diffusion and flow models; this is a VAE"),
        (["--to", "torch-export", "--int8"], "int8 is of onnx"),
    ],
)
def test_what_does_not_fit(tmp_path, capsys, arguments, text):
    folder = saved(FAMILIES["vae"](), tmp_path / "model")
    assert cli.main(["export", str(folder), *arguments, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert text in err
    assert len(err.splitlines()) == 1
    assert out == ""
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_where_nothing_can_be_exported(place, capsys):
    assert cli.main(["export", "nowhere", "--to", "onnx"]) == 2
    assert capsys.readouterr().err == "potstill: nowhere: no such folder\n"
    assert cli.main(["export", "teacher", "--to", "onnx"]) == 2
    assert "say where to write with --out" in capsys.readouterr().err
    assert place.run("synthesize") == 0
    assert cli.main(["export", str(place.out), "--to", "onnx"]) == 2
    assert "no student in it; run the distill stage first" in capsys.readouterr().err
    with pytest.raises(BadInput, match="int8 of a model that generates nothing"):
        export(saved(FAMILIES["classifier"](), place.folder / "classifier"), "onnx", place.folder / "x", int8=True)
    assert not (place.folder / "x").exists()
    (place.folder / "full").mkdir()
    (place.folder / "full" / "mine.txt").write_text("kept")
    with pytest.raises(Refused, match="nothing is overwritten"):
        export("teacher", "onnx", place.folder / "full")


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    whole = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else whole(name, *rest))
    assert cli.main(["export", str(tmp_path), "--to", "onnx"]) == 2
    assert capsys.readouterr().err == "potstill: export to onnx needs onnxscript: pip install 'potstill[export]'\n"


def test_a_program_that_fixes_its_batch_is_told_how_not_to():
    net = nn.Linear(3, 4)
    model = Model(net, Images((1, 2, 2)), lambda sample: net(sample.normal("z", (3,))).reshape(len(sample.normal("y", (1,))), 1, 2, 2))
    (part,) = module._parts(model.frozen())
    with pytest.raises(BadInput, match=re.escape("write x.shape[0] instead of len(x)")):
        module._traced(part, part.draw(Noise(), 2))
    good = from_generator(nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 2, 2))), Images((1, 2, 2)), 3).frozen()
    (part,) = module._parts(good)
    exported = module._traced(part, part.draw(Noise(), 2))
    assert exported.module()(torch.zeros(5, 3))[0].shape == (5, 1, 2, 2)


def test_noise_of_two_kinds_under_one_name_is_refused():
    def generate(sample):
        return sample.normal("z", (4,)).reshape(-1, 1, 2, 2) + sample.noise.uniform("z", (sample.n, 1, 2, 2))

    with pytest.raises(BadInput, match="'z' asks for noise of two kinds"):
        module._parts(Model(nn.Identity(), Images((1, 2, 2)), generate))
    with pytest.raises(BadInput, match="takes no noise"):
        module._parts(Model(nn.Identity(), Images((1, 2, 2)), lambda sample: torch.zeros(sample.n, 1, 2, 2)))


def test_a_difference_that_is_not_a_number_is_no_equality(tmp_path, monkeypatch):
    folder = saved(FAMILIES["helmholtz"](), tmp_path / "model")
    whole = module._parts
    monkeypatch.setattr(module, "_parts", lambda m: [dataclasses.replace(p, plain=lambda x: [torch.zeros(1, 1)]) for p in whole(m)])
    with pytest.raises(Failed, match="differs from torch by nan"):
        export(folder, "torch-export", tmp_path / "out")


def test_what_is_said_of_an_export(finished):
    lines = summary(described(finished / "export" / "onnx"))
    assert lines[0].startswith("model.onnx: z3 16x1x1, z2 16x2x2, z1 16x4x4 -> image; max difference to torch ")
    assert lines[-1].startswith("int8: Fréchet distance ")


# ------------------------------------------------------------------ without torch


def recognized(grid):
    """How sure the zoo's classifier is of each of 64 digits of a picture ``(64, 64)`` in [0, 1], and how many classes it sees."""
    images = torch.from_numpy(grid.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 1, 8, 8)).float()
    with torch.no_grad():
        p = build.pretrained("zoo:digits-classifier")(images).softmax(1)
    return p.max(1).values.mean().item(), len(p.argmax(1).unique())


def test_the_example_draws_digits_with_numpy_alone(finished, tmp_path):
    for name in ("torch", "potstill", "PIL"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('{name} is not to be imported')")
    command = [sys.executable, str(EXAMPLES / "onnx_numpy.py"), str(finished / "export" / "onnx"), str(tmp_path / "grid.png")]
    subprocess.run(command, env=environment() | {"PYTHONPATH": str(tmp_path)}, check=True, timeout=120)
    with Image.open(tmp_path / "grid.png") as picture:
        sure, classes = recognized(np.asarray(picture) / 255)
    assert sure > 0.6
    assert classes >= 5
    lines = (EXAMPLES / "onnx_numpy.py").read_text().split('"""')[2].splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 30


@pytest.mark.parametrize("words", [[], ["folder"], ["folder", "a.png", "0", "more"]])
def test_the_example_says_how_it_is_called(words):
    pytest.importorskip("onnxruntime")
    done = subprocess.run([sys.executable, str(EXAMPLES / "onnx_numpy.py"), *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("usage: python ")
    assert done.stderr.count("\n") == 1


WATCH = """<!DOCTYPE html><meta charset="utf-8"><body><iframe id="page" src="index.html"></iframe><script>
const said = text => fetch("/said", { method: "POST", body: JSON.stringify(text) });
const timer = setInterval(() => {
  const page = document.getElementById("page").contentDocument, state = page?.body?.dataset.state;
  if (!state) return;
  clearInterval(timer);
  const canvas = page.getElementById("images");
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  said({ state, text: page.getElementById("said").textContent, size: [canvas.width, canvas.height], pixels: [...pixels] });
}, 50);
</script>"""


class Server(SimpleHTTPRequestHandler):
    def do_POST(self):
        self.server.said.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()
        self.server.heard.set()

    def log_message(self, *_):
        pass


@browser.needed
@pytest.mark.skipif(
    not (EXAMPLES / "browser" / "node_modules" / "onnxruntime-web").is_dir(),
    reason="no onnxruntime-web: npm install --ignore-scripts in examples/browser",
)
def test_a_browser_draws_digits_from_a_local_folder(finished, tmp_path):
    shutil.copyfile(EXAMPLES / "browser" / "index.html", tmp_path / "index.html")
    (tmp_path / "watch.html").write_text(WATCH)
    (tmp_path / "node_modules").symlink_to(EXAMPLES / "browser" / "node_modules")
    (tmp_path / "student").symlink_to(finished / "export" / "onnx")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=tmp_path))
    server.said, server.heard = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [*browser.COMMAND, f"--user-data-dir={tmp_path / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    command += ["--remote-debugging-port=0"]  # with which it does not end by itself
    try:
        with (tmp_path / "chromium.log").open("w") as log:
            running = subprocess.Popen([*command, f"http://127.0.0.1:{server.server_port}/watch.html"], stdout=log, stderr=log)
            try:
                heard = server.heard.wait(120)
            finally:
                running.terminate()
                running.wait(30)
    finally:
        server.shutdown()
        server.server_close()
    console = [line for line in (tmp_path / "chromium.log").read_text().splitlines() if "CONSOLE" in line]
    assert heard, console
    (found,) = server.said
    assert found["state"] == "drawn", found["text"]
    assert not console, "nothing was blocked, and nothing is on its console"
    assert found["size"] == [64, 64]
    assert re.fullmatch(r"64 images in [\d.]+ ms", found["text"])
    sure, classes = recognized(np.array(found["pixels"], np.float32).reshape(64, 64, 4)[..., 0] / 255)
    assert sure > 0.6
    assert classes >= 5
