"""A first recipe: for each kind of checkpoint one that is checked, planned, and for one of them run, as it is."""

from __future__ import annotations

import re
import textwrap

import pytest
import torch

from potstill import cli, config
from potstill.build import load
from potstill.errors import BadInput
from potstill.families.classifier import Classifier
from potstill.families.gan import GAN
from potstill.families.helmholtz import HelmholtzMachine
from potstill.families.lvae import LVAE
from potstill.families.vae import VAE
from potstill.families.vrnn import VRNN
from potstill.importers import OWN_NETWORK
from potstill.state import write_tensors
from test_importers import NORMAL, preprocessor, saved, vit  # noqa: F401

OWN = """
    import torch
    from torch import nn
    from potstill.model import Images
    from potstill.families.own import from_autoencoder, from_generator

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 6)

        def forward(self, x):
            return self.net(x.flatten(1))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(3, 64)

        def forward(self, z):
            return self.net(z).sigmoid().view(-1, 1, 8, 8)

    def vae():
        torch.manual_seed(0)
        return from_autoencoder(Encoder(), Decoder(), Images((1, 8, 8)))

    def generator():
        torch.manual_seed(0)
        return from_generator(Decoder(), Images((1, 8, 8)), 3)

    def student():
        return generator()
"""


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


@pytest.fixture
def written(tmp_path, monkeypatch, capsys):
    """The recipe that ``init`` writes, which a dry run must take as it is."""
    monkeypatch.chdir(tmp_path)

    def make(model, *modules):
        code = [word for module in modules for word in ("--import", module)]
        assert cli.main(["init", str(model), *code]) == 0, capsys.readouterr().err
        out = capsys.readouterr().out
        assert out.startswith(f"recipe.yaml: a recipe for {model}\n")
        assert cli.main(["run", "recipe.yaml", "--dry-run", *code]) == 0, capsys.readouterr().err
        assert "in all about" in capsys.readouterr().out
        assert not (tmp_path / "runs").exists()
        return config.read("recipe.yaml")

    return make


FAMILIES = {
    "lvae": (lambda: LVAE((1, 8, 8), 8, 2, 3), "ancestral", {"generate", "infer"}),
    "vae": (lambda: VAE((3, 8, 8), 8, 3), "ancestral", {"generate", "infer"}),
    "gan": (lambda: GAN((1, 8, 8), 8, 3), None, {"generate"}),
    "gan with an encoder": (lambda: GAN((1, 8, 8), 8, 3, encoder=True), "ancestral", {"generate", "infer"}),
    "helmholtz": (lambda: HelmholtzMachine(width=8), "ancestral", {"generate", "infer"}),
    "vrnn": (lambda: VRNN((3, 6, 1), 8, 8, 2), "ancestral", {"generate", "infer"}),
    "classifier": (lambda: Classifier((1, 8, 8), 3, 8), "inversion", {"infer"}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_ours(written, tmp_path, name):
    make, surrogate, phases = FAMILIES[name]
    seeded(make).save_pretrained(tmp_path / "teacher")
    recipe = written(tmp_path / "teacher")
    assert recipe.name == "teacher-student"
    assert recipe.teacher == config.Pretrained(kind="pretrained", path=str(tmp_path / "teacher"))
    assert recipe.student == config.Student(ratio=10)
    assert (recipe.surrogate and recipe.surrogate.kind) == surrogate
    assert {phase for phase in ("link", "generate", "infer") if getattr(recipe.distill, phase)} == phases
    assert [arm.kind for arm in recipe.arms] == ["data_free"]


def test_the_zoos_classifier_names_its_classes(written):
    recipe = written("zoo:digits-classifier")
    assert recipe.name == "digits-classifier-student"
    assert recipe.surrogate.classes == tuple("0123456789")
    assert [term.kind for term in recipe.surrogate.energy] == ["cross_entropy", "batchnorm", "total_variation"]


def test_a_diffusers_folder_of_pixels(written, tmp_path):
    pytest.importorskip("diffusers")
    from potstill.families.diffusion import UNet

    seeded(lambda: UNet((1, 8, 8), 8, steps=3)).save_pipeline(tmp_path / "pipeline")
    recipe = written(tmp_path / "pipeline")
    assert recipe.surrogate is None
    assert recipe.distill.link
    assert recipe.distill.generate is None


def test_a_text_to_image_pipeline_gets_prompts(written, tmp_path):
    pytest.importorskip("diffusers")
    from priors import text_to_image

    _, folder = text_to_image(tmp_path / "sd")
    recipe = written(folder)
    assert recipe.teacher.prompts
    assert recipe.distill.link
    assert recipe.surrogate is None


def test_a_classifier_of_transformers(written, vit):  # noqa: F811
    folder, _ = vit
    preprocessor(folder, size={"height": 16, "width": 16}, **NORMAL)
    recipe = written(folder)
    assert recipe.teacher == config.Transformers(kind="transformers", path=str(folder))
    net = recipe.student.net
    assert (net.kind, net.image, net.classes, net.mean) == ("resnet", (3, 16, 16), 4, (0.5, 0.4, 0.3))
    assert [term.kind for term in recipe.surrogate.energy] == ["cross_entropy", "total_variation"]  # it has no BatchNorm


def test_a_folder_of_pythae(written, saved):  # noqa: F811
    recipe = written(saved[0])
    assert recipe.teacher == config.Pythae(kind="pythae", path=str(saved[0]))
    assert recipe.student.net == config.VAENet(kind="vae", image=(3, 4, 4), latent=5, std=1.0, width=recipe.student.net.width)


def test_a_checkpoint_of_the_published_code(written, tmp_path):
    torch.save(seeded(lambda: LVAE((3, 32, 32), 4, 5, 3)).state_dict(), tmp_path / "x.pth.tar")
    recipe = written(tmp_path / "x.pth.tar")
    assert recipe.teacher == config.KD4DGM(kind="kd4dgm", path=str(tmp_path / "x.pth.tar"))
    assert recipe.student == config.Student(ratio=10)


def test_functions_of_ones_own(written, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(textwrap.dedent(OWN))
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = written("mine:vae", "mine")
    assert recipe.teacher == config.Python(kind="python", target="mine:vae")
    assert (recipe.student.net.kind, recipe.student.net.latent, recipe.student.net.std) == ("vae", 3, 0.1)
    (tmp_path / "recipe.yaml").unlink()
    recipe = written("mine:generator", "mine")
    assert recipe.student.target == "mine:student"


def test_a_function_is_told_to_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text(textwrap.dedent(OWN).replace("def student", "def pupil"))
    assert cli.main(["init", "theirs:generator", "--import", "theirs", "--out", "x.yaml"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "x.yaml: a recipe for theirs:generator",
        "first write theirs:student: a function that returns the student as a potstill Model",
        "look at it, then: potstill run x.yaml --import theirs --dry-run",
    ]


def test_a_function_that_is_there_is_not_told_to_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "both.py").write_text(textwrap.dedent(OWN))
    assert cli.main(["init", "both:generator", "--import", "both", "--out", "x.yaml"]) == 0
    assert "first write" not in capsys.readouterr().out


def told_to_uncomment(text):
    """The recipe after what its comment says: the # of as many lines as it names is taken away."""
    lines = text.splitlines(keepends=True)
    (at,) = [i for i, line in enumerate(lines) if line.startswith("# Take the # away from the next ")]
    count = int(re.search(r"next (\d+) lines", lines[at])[1])
    taken = lines[at + 1 : at + 1 + count]
    assert all(line.startswith("#") for line in taken)
    assert not lines[at + 1 + count].startswith("#")
    return "".join([*lines[: at + 1], *(line.removeprefix("#") for line in taken), *lines[at + 1 + count :]])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_commented_out_is_a_recipe_too(written, tmp_path, name):
    seeded(FAMILIES[name][0]).save_pretrained(tmp_path / "teacher")
    found = written(tmp_path / "teacher")
    text = told_to_uncomment((tmp_path / "recipe.yaml").read_text())
    recipe = config.parse(text, "recipe.yaml")
    with_data = [] if set(FAMILIES[name][2]) == {"generate"} else ["with_data"]
    assert [arm.kind for arm in recipe.arms] == ["data_free", *with_data, "scratch"]
    assert recipe.data.kind == ("folder" if name not in ("helmholtz", "vrnn") else "values")
    assert recipe.evaluate.reference == "teacher"
    measured = re.sub(r"^  reference: teacher .*\n", "", text, flags=re.MULTILINE)
    assert config.parse(measured, "recipe.yaml").evaluate.reference == "data"
    updates = sum(getattr(found.distill, phase).steps for phase in FAMILIES[name][2])
    assert found.distill.scratch.steps == updates
    assert ("# as many as both phases" in text) == (len(FAMILIES[name][2]) == 2)


def test_that_three_seeds_give_a_spread_is_said(written, tmp_path):
    assert written("zoo:digits-lvae").seeds == (0,)
    (line,) = [line for line in (tmp_path / "recipe.yaml").read_text().splitlines() if line.startswith("seeds:")]
    assert "[0, 1, 2], give a spread" in line


@pytest.mark.parametrize("name", ["vae.pt", "vae.safetensors", "a.onnx", "folder"])
def test_weights_of_ones_own_network_lead_to_the_two_functions(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    weights = {"encoder.weight": torch.zeros(2, 3)}
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.onnx").write_text("x")
    torch.save(weights, tmp_path / "vae.pt")
    write_tensors(tmp_path / "vae.safetensors", weights)
    assert cli.main(["init", name]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"potstill: {name}: ")
    assert told.endswith(f"{OWN_NETWORK}\n")
    assert "weights alone do not say what the network is" in told or not name.startswith("vae")
    for word in ("teacher and student", "potstill init mine:teacher --import mine", "docs/guides/own-vae.md"):
        assert word in told


def test_weights_as_a_pretrained_teacher_lead_there_too(tmp_path):
    write_tensors(tmp_path / "vae.safetensors", {"encoder.weight": torch.zeros(2, 3)})
    with pytest.raises(BadInput, match=f"weights alone do not say what the network is: {re.escape(OWN_NETWORK)}$"):
        load(tmp_path / "vae.safetensors")


def test_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("mine")
    assert cli.main(["init", "zoo:digits-lvae"]) == 2
    expected = "potstill: recipe.yaml: is there already, and nothing is overwritten; choose another --out\n"
    assert capsys.readouterr().err == expected
    assert (tmp_path / "recipe.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("zoo:nope", "zoo:nope: no such model in the zoo"),
        ("empty", "empty: a folder of config.json and model.safetensors, zoo:NAME, a folder of diffusers"),
        ("notes.txt", "this is another file"),
        ("broken.pt", "not a file that torch.save wrote"),
        ("mine:teacher", "add --import mine"),
    ],
)
def test_what_is_no_teacher(tmp_path, monkeypatch, capsys, model, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.pt").write_text("x")
    assert cli.main(["init", model]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "recipe.yaml").exists()


def test_the_recipe_of_the_zoos_lvae_runs(written, tmp_path, capsys):
    written("zoo:digits-lvae")
    few = [
        "surrogate.n=16",
        "evaluate.n=16",
        "evaluate.latency_repeats=3",
        *(f"distill.{phase}.{key}" for phase in ("generate", "infer") for key in ("steps=2", "batch=4")),
    ]
    assert cli.main(["run", "recipe.yaml", "--quiet", "--out", "out", *few]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "student" / "model.safetensors").exists()
    assert (tmp_path / "out" / "report.html").exists()
