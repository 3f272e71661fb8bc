"""The command line: exit codes, one clear line for each mistake, no traceback, and nothing written when the input is wrong."""

import argparse
import io
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from potstill import __version__, cli
from potstill.build import load
from potstill.config import Recipe, read
from potstill.errors import BadInput
from potstill.families.classifier import Classifier
from potstill.families.vae import VAE
from potstill.state import lock, read_tensors, write_tensors
from runs import digits_like, environment, results, snapshot

ROOT = Path(__file__).parents[1]


@pytest.fixture
def refused(place, capsys):
    """Run a command that must fail with exit code 2, one line for each expected text, and without a trace on disk."""

    def run(*expected, command="run", arguments=(), written=False, code=2, **sections):
        capsys.readouterr()
        assert place.run(command, *arguments, **sections) == code
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert len(lines) == len(expected), err
        for line, text in zip(lines, expected, strict=True):
            assert line.startswith("potstill: ")
            assert text in line, f"{text!r} is not in {line!r}"
        assert "Traceback" not in out + err
        assert out == ""
        assert place.out.exists() == written
        return err

    return run


def module(place, name, text):
    (place.folder / f"{name}.py").write_text(textwrap.dedent(text))


# ------------------------------------------------------------------ recipes


def test_a_wrong_recipe(refused):
    refused("studnet: unknown key; did you mean student?", studnet=None)
    refused("seed: a number is expected (found 'x')", seed="x")
    refused("seed: a number is expected (found 'x')", "teachr: unknown key; did you mean teacher?", seed="x", teachr=1)
    refused("distill.generate.lr: input should be greater than 0 (found 0.0)", arguments=["distill.generate.lr=0e0"])
    refused("report: needs evaluate", evaluate=None)


def test_a_missing_recipe(place, capsys):
    assert cli.main(["run", "nope.yaml"]) == 2
    assert capsys.readouterr().err == "potstill: nope.yaml: no such file\n"
    assert sorted(os.listdir(place.folder)) == ["data.npz", "teacher"]


def test_a_recipe_cannot_act_on_the_terminal(place, capsys):
    (place.folder / "recipe.yaml").write_text('name: a\n"\\e[2J\\e]0;title": 1\n')
    assert cli.main(["run", "recipe.yaml"]) == 2
    assert capsys.readouterr().err == "potstill: \\x1b[2J\\x1b]0;title: unknown key\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run"], "the following arguments are required: recipe"),
        (["run", "x", "--ouT", "y"], "unrecognized arguments: --ouT y; did you mean --out?"),
        (["run", "x", "--dryrun"], "unrecognized arguments: --dryrun; did you mean --dry-run?"),
        (["run", "x", "--xyz"], "unrecognized arguments: --xyz"),
        (["run", "x", "--steps", "10"], "--steps; values of the recipe are written such as distill.generate.steps=10"),
        (["run", "x", "--steps=10"], "--steps; values of the recipe are written such as distill.generate.steps=10"),
        (["run", "x", "--steps"], "--steps; values of the recipe are written such as distill.generate.steps=VALUE"),
        (["run", "x", "--surrogate.n", "10"], "--surrogate.n; values of the recipe are written such as surrogate.n=10"),
        (["run", "x", "distill.generate.steps", "20"], "an override is written a.b=value; write distill.generate.steps=20"),
        (["run", "x", "--out", "y", "seed=1", "distill.generate.steps", "20"], "; write distill.generate.steps=20"),
        (["run", "x", "--out", "y", "z"], "unrecognized arguments: z"),
        (["export", "x", "--to", "onnx", "--steps", "10"], "unrecognized arguments: --steps 10"),
        (["zoo", "a=1"], "unrecognized arguments: a=1"),
    ],
)
def test_wrong_arguments(capsys, arguments, expected):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"usage: potstill {arguments[0]} ")
    assert said[-1].endswith(expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["runn", "x"], "runn: no such command; did you mean run?"),
        (["xyz"], "xyz: no such command; there are init, demo, run, train, calibrate, "),
        (["--verbose"], "a command is expected first: init, demo, run, train, "),
    ],
)
def test_a_wrong_command(capsys, arguments, expected):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"potstill: error: {expected}")


def test_without_a_command_the_help_is_shown(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == cli._parser().format_help()


def test_a_folder_in_place_of_a_recipe(place, capsys):
    run = place.folder / "runs" / "mine"
    run.mkdir(parents=True)
    assert cli.main(["report", "runs/mine"]) == 2
    assert capsys.readouterr().err == "potstill: runs/mine: is a folder; a recipe's file is expected\n"
    (run / "recipe.yaml").write_text("name: mine\n")
    assert cli.main(["run", "runs/mine"]) == 2
    assert capsys.readouterr().err == "potstill: runs/mine: is a folder; a run's recipe is runs/mine/recipe.yaml\n"


def test_overrides_may_stand_anywhere(refused):
    refused("seed: a number is expected (found 'x')", arguments=["seed=x"])  # after --out and --quiet


def test_a_recipe_without_the_section_of_a_stage(refused):
    refused("tiny: the recipe has no train section", command="train")
    refused("tiny: the recipe has no distill section", command="distill", distill=None, evaluate=None, report=None)
    nothing = dict.fromkeys(("surrogate", "distill", "evaluate", "report"))
    refused("tiny: the recipe has no stage in it: train, calibrate, surrogate, distill, evaluate, report", **nothing)


# ------------------------------------------------------------------ data


def data(kind, path, **options):
    return {"kind": kind, "path": str(path), **options}


def test_missing_and_empty_data(refused, place):
    (place.folder / "empty").mkdir()
    refused("nope.npz: no such file or folder", data=data("npz", "nope.npz"))
    refused("empty: no images in it", data=data("folder", "empty"))


def test_images_of_another_size_or_mode(refused, place):
    for name, shape in (("size", (1, 7, 8)), ("mode", (3, 8, 8))):
        np.savez(place.folder / f"{name}.npz", digits_like(20, shape)[0])
    takes = "the teacher takes 1 channels, 8x8"
    refused(f"data: images of 1 channels, 7x8; {takes}", data=data("npz", "size.npz"))
    refused(f"data: images of 3 channels, 8x8; {takes}", data=data("npz", "mode.npz"))


def test_broken_data(refused, place):
    images = digits_like(20)[0] / 255
    images[3, 0, 0, 0] = np.nan
    np.savez(place.folder / "nan.npz", images)
    refused("nan.npz: NaN or infinite pixels in image 3", data=data("npz", "nan.npz"))
    folder = place.folder / "images"
    folder.mkdir()
    for i, pixels in enumerate(digits_like(20)[0]):
        Image.fromarray(pixels[0]).save(folder / f"{i:02d}.png")
    content = (folder / "05.png").read_bytes()
    (folder / "05.png").write_bytes(content[: len(content) // 2])
    refused("05.png: corrupt image", data=data("folder", folder))


def test_data_that_is_too_small(refused, place):
    np.savez(place.folder / "two.npz", digits_like(12)[0])
    few = data("npz", "two.npz", test_fraction=0.92)
    refused("data: one training image; BatchNorm needs two", data=few, arms=["scratch"], evaluate={"n": 8})
    refused("evaluate.n: 100 images, but 24 are held out", evaluate={"n": 100})
    refused("evaluate.k: 20 neighbors, but 16 held-out images", evaluate={"n": 16, "k": 20})


def test_labels_that_a_classifier_needs(refused, place):
    train = {"model": {"kind": "classifier", "image": [1, 8, 8], "classes": 3}, "steps": 2, "batch": 4}
    alone = dict.fromkeys(("teacher", "student", "surrogate", "distill", "evaluate", "report"))
    refused("data: label 3, but train.model.classes is 3", train=train, **alone)
    np.savez(place.folder / "plain.npz", digits_like(20)[0])
    refused("data: has no labels, which a classifier needs", train=train, data=data("npz", "plain.npz"), **alone)


# ------------------------------------------------------------------ teachers


class Evil:
    def __reduce__(self):
        return (os.abort, ())


def spoil(path, how):
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Evil()))
    elif how == "torch":
        torch.save(read_tensors(path), path)
    elif how == "missing":
        path.unlink()
    else:
        tensors = read_tensors(path)
        if how == "nan":
            tensors["u2.out.weight"][0, 0] = float("nan")
        elif how == "shape":
            tensors["u2.out.weight"] = tensors["u2.out.weight"][:, :2].contiguous()
        elif how == "type":
            tensors["u2.out.weight"] = tensors["u2.out.weight"].int()
        elif how == "lacks":
            del tensors["u2.out.weight"]
        else:
            tensors["extra"] = torch.zeros(1)
        write_tensors(path, tensors)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("truncated", "model.safetensors: not a whole safetensors file"),
        ("pickle", "model.safetensors: a pickled checkpoint, which can run code when it is read; convert it to safetensors"),
        ("torch", "model.safetensors: a pickled checkpoint"),
        ("missing", "model.safetensors: no such file"),
        ("nan", "model.safetensors: u2.out.weight holds NaN or infinite values"),
        ("shape", "model.safetensors: u2.out.weight is (4, 2, 1, 1), but this LVAE has (4, 4, 1, 1)"),
        ("type", "model.safetensors: u2.out.weight is torch.int32, but this LVAE has torch.float32"),
        ("lacks", "model.safetensors: not the weights of this LVAE: it lacks u2.out.weight"),
        ("extra", "model.safetensors: not the weights of this LVAE: it has unknown extra"),
    ],
)
def test_a_broken_checkpoint(refused, place, how, expected):
    spoil(place.folder / "teacher" / "model.safetensors", how)
    refused(expected)
    net = {"kind": "lvae", "image": [1, 8, 8], "width": 4, "levels": 2, "latent": 2, "std": 0.1}
    refused(expected, teacher={"kind": "weights", "path": "teacher/model.safetensors", "net": net})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"family": "gna"}, "config.json: family: Input tag 'gna'"),
        ({"family": None}, "config.json: family: "),
        ({"width": "x"}, "config.json: width: "),
        ({"wdith": 3}, "config.json: wdith: Extra inputs are not permitted"),
        ({"width": 2**15}, "but this LVAE has"),  # of terabytes, which are never allocated
        ({"width": 2**30}, "a lvae of these numbers cannot be made"),
        ({"image": [1, 4096, 4096], "levels": 12}, "not the weights of this LVAE"),
        ({"levels": 9}, "an LVAE on 8x8 images has 1 to 3 levels, not 9"),
    ],
)
def test_a_wrong_description_of_a_checkpoint(refused, place, changes, expected):
    path = place.folder / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refused(expected)


def test_a_teacher_that_is_not_there(refused, place):
    names = "digits-classifier, digits-lvae, glyphs-sd"
    refused(f"zoo:nope: no such model in the zoo; it has {names}", teacher={"kind": "pretrained", "path": "zoo:nope"})
    refused("zoo:../zoo/digits-lvae: no such model in the zoo", teacher={"kind": "pretrained", "path": "zoo:../zoo/digits-lvae"})
    refused("./nope: no such folder", teacher={"kind": "pretrained", "path": "./nope"})
    refused("data.npz: a folder with config.json and model.safetensors is expected", teacher={"kind": "pretrained", "path": "data.npz"})
    (place.folder / "empty").mkdir()
    refused("config.json: no such file", teacher={"kind": "pretrained", "path": "./empty"})


def test_a_teacher_from_the_hub(place, refused, monkeypatch):
    asked = []

    def download(name, **options):
        asked.append((name, options))
        if name == "some/model":
            return str(place.folder / "teacher")
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    expected = "other/model: there is no such folder, and the Hub was asked and not reached (no network?)"
    refused(expected, teacher={"kind": "pretrained", "path": "other/model"})
    for path in ("/other/model", "./other", "../model", "~/model", "a/b/c"):
        refused(f"{path}: no such folder", teacher={"kind": "pretrained", "path": path})
    assert place.run("synthesize", teacher={"kind": "pretrained", "path": "some/model"}) == 0
    files = {"allow_patterns": ["config.json", "model.safetensors", "noise_map.safetensors", "model_index.json"], "ignore_patterns": None}
    assert asked == [("other/model", files), ("some/model", files)]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("RepositoryNotFoundError", "the Hub was asked and knows no such model; a private one needs hf auth login"),
        ("GatedRepoError", "the Hub gives the model of that name only to those who accept its terms"),
        ("LocalEntryNotFoundError", "the Hub was asked and not reached (no network?)"),
    ],
)
def test_what_the_hub_does_not_give(capsys, monkeypatch, error, expected):
    from huggingface_hub import errors

    def download(name, **options):
        kind = getattr(errors, error)
        raise kind.__new__(kind)  # what they are made from differs between versions of the Hub's package

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert cli.main(["export", "runs/nope", "--to", "torch-export"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"potstill: runs/nope: there is no such folder, and {expected}")
    assert "Error" not in said


def test_a_name_that_the_hub_cannot_have(capsys):
    assert cli.main(["export", "runs/no such", "--to", "torch-export"]) == 2
    assert capsys.readouterr().err == "potstill: runs/no such: there is no such folder, and no model of the Hub can have that name\n"


def test_a_disk_that_is_full_is_not_taken_for_the_network(capsys, monkeypatch):
    def download(name, **options):
        raise OSError(28, "No space left on device", "cache/model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert cli.main(["export", "some/model", "--to", "torch-export"]) == 1
    assert capsys.readouterr().err == "potstill: cache/model: No space left on device\n"


def test_a_run_is_not_its_student(place, refused):
    run = place.folder / "mine"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: mine\n")
    refused("./mine: this is a run; it has no student yet: its distill stage makes one", teacher={"kind": "pretrained", "path": "./mine"})
    shutil.copytree(place.folder / "teacher", run / "student")
    with pytest.raises(BadInput, match=re.escape(f"{run}: this is a run; load {run}/student") + "$"):
        load(run)
    load(run / "student")
    shutil.rmtree(run / "student")
    for size in ("w2", "w4"):
        shutil.copytree(place.folder / "teacher", run / "student" / size)
    with pytest.raises(BadInput, match=re.escape(f"load {run}/student/w2 or {run}/student/w4") + "$"):
        load(run)


def test_a_teacher_that_does_not_generate(refused, place):
    Classifier((1, 8, 8), 4, 2).save_pretrained(place.folder / "judge")
    judge = {"kind": "pretrained", "path": "./judge"}
    none = "surrogate: kind ancestral draws from the teacher's own prior, but a Classifier does not generate"
    refused(none, teacher=judge, distill={"generate": None})
    with_data = {"teacher": judge, "arms": ["with_data"], "surrogate": None}
    refused("distill.generate: the teacher, a Classifier, does not generate; set generate: null", **with_data)
    elbo = {"generate": None, "infer": {"elbo": 0.5}}
    refused("distill.infer.elbo: a classifier has no ELBO; leave it out", distill=elbo, **with_data)
    refused("distill.infer.augment.shift: 8 pixels, but images are 8x8", distill={"infer": {"augment": {"shift": 8}}})


@pytest.mark.parametrize("arms", [["scratch"], ["with_data"]])
def test_labels_that_do_not_fit_a_classifier(refused, place, arms):
    Classifier((1, 8, 8), 3, 2).save_pretrained(place.folder / "judge")
    sections = {"teacher": {"kind": "pretrained", "path": "./judge"}, "distill": {"generate": None}, "surrogate": None, "arms": arms}
    refused("data: label 3, but the teacher's labels are 3", **sections)
    np.savez(place.folder / "plain.npz", digits_like(40)[0])
    refused("data: has no labels, which a classifier needs", data=data("npz", "plain.npz"), **sections)
    module(place, "other", "from potstill.families.classifier import Classifier\ndef four(): return Classifier((1, 8, 8), 4, 2).model()")
    student = {"student": {"target": "other:four"}, "arguments": ["--import", "other"]}
    alone = {"evaluate": None, "report": None, "arms": ["with_data"]}
    refused("student: it tells 4 labels apart, its teacher 3", **(sections | student | alone))


# ------------------------------------------------------------------ students


def test_a_student_that_does_not_fit(refused):
    refused("student: width 5 is wider than the teacher's 4", student={"width": 5})
    vae = {"kind": "vae", "image": [1, 8, 8], "width": 2}
    refused("student: width 5 is wider than the teacher's 2", student={"width": 5}, train={"model": vae}, teacher={"kind": "trained"})


@pytest.mark.parametrize(
    ("distill", "expected"),
    [
        ({"generate": {"rules": [{"nodes": "y*"}]}}, "arm student_data_free, generate: no rule matches any of the teacher's nodes"),
        ({"generate": {"rules": []}}, "arm student_data_free, generate: "),
        ({"generate": {"rules": [{"by": "hinton"}]}}, "arm student_data_free, generate: "),
        ({"infer": {"elbo": 0}}, "arm student_data_free, infer: no rule has a weight, so there is no loss"),
    ],
)
def test_rules_that_do_not_fit_are_found_before_anything_is_made(refused, distill, expected):
    refused(expected, distill=distill)


# ------------------------------------------------------------------ code of one's own

OWN = """
import torch
from torch.distributions import Normal
from potstill.model import Images, Model


class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.Tanh(), torch.nn.Linear(width, 4))
        self.decoder = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Tanh(), torch.nn.Linear(width, 64))
        self.decoder.bias = self.decoder[2].bias  # one parameter under two names, as tied weights are


def model(width=16, shape=(1, 8, 8), infer=True):
    net = Net(width)

    def decode(z):
        return Normal(net.decoder(z).view(-1, 1, 8, 8), 0.2, validate_args=False)

    def generate(sample):
        return decode(sample.normal("z", (2,)))

    def inference(sample, x):
        mu, logvar = net.encoder(x).chunk(2, 1)
        return decode(sample("z", Normal(mu, (logvar / 2).exp(), validate_args=False)))

    return Model(net, Images(tuple(shape), (0.5,), (0.5,)), generate, inference if infer else None)


class Features(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, ::4]


def wrong():
    return 3


def broken(**_):
    raise IndexError("list index out of range")


def unfinished(**_):
    def generate(sample):
        return sample.normal("z", (2,)) @ torch.zeros(3, 3)

    return Model(Net(2), Images((1, 8, 8)), generate)


def flat():
    net = Net(2)
    return Model(net, Images((1, 8, 8)), lambda sample: net.decoder(sample.normal("z", (2,))))


def nan():
    return Model(Net(2), Images((1, 8, 8)), lambda sample: sample.normal("z", (1, 8, 8)) / 0)


class Sum(torch.nn.Module):
    def forward(self, x):
        return x.sum()


class Fails(torch.nn.Module):
    def forward(self, x):
        raise AttributeError("no such thing")


number = 7
"""


def python(name, **arguments):
    return {"kind": "python", "target": f"own:{name}", "arguments": arguments}


@pytest.mark.slow
def test_code_of_ones_own(place, capsys):
    module(place, "own", OWN)
    own = {"teacher": python("model"), "student": {"target": "own:model", "arguments": {"width": 3}}}
    evaluate = place.recipe["evaluate"] | {"features": "python:own:Features"}
    arms = ["data_free", "with_data", "scratch"]
    assert place.run("run", "--import", "own", evaluate=evaluate, arms=arms, **own) == 0, capsys.readouterr().err
    metrics = json.loads((place.out / "metrics.json").read_text())
    assert metrics["reference"]["features"] == "python:own:Features"
    assert metrics["arms"]["student_data_free"]["params"] < metrics["arms"]["teacher"]["params"]
    assert set(read_tensors(place.out / "student" / "model.safetensors")) == set(sys.modules["own"].Net(3).state_dict())


def test_code_runs_only_from_modules_that_were_allowed(refused, place):
    module(place, "own", "raise SystemExit('it ran')")
    allow = "a recipe does not run code unless you allow its module: add --import own"
    refused(f"own:model: {allow}", teacher=python("model"))
    refused(f"own:model: {allow}", student={"target": "own:model"})
    refused(f"own:Net: {allow}", evaluate={"features": "python:own:Net"})
    refused("os:system: a recipe does not run code", teacher={"kind": "python", "target": "os:system", "arguments": {"command": "true"}})
    assert "own" not in sys.modules


def test_a_module_that_cannot_be_imported(refused, place):
    where = f"in the current directory, {place.folder}, or elsewhere on sys.path; run potstill where it is"
    refused(f"--import nope: there is no module nope {where}", arguments=["--import", "nope"])
    refused(f"--import nope.mine: there is no module nope {where}", arguments=["--import", "nope.mine"])
    for file, name in (("nope.py", "nope"), ("./sub/nope.py", "sub.nope"), ("/else/where/nope.py", "nope"), ("../nope.py", "nope")):
        expected = f"--import {file}: a module is expected, not its file; write --import {name}"
        assert refused(expected, arguments=["--import", file]).endswith(f" {name}\n")
    module(place, "needs", "import nope")
    refused("--import needs: cannot be imported: ModuleNotFoundError: No module named 'nope'", arguments=["--import", "needs"])
    module(place, "wrong_syntax", "def")
    refused("--import wrong_syntax: cannot be imported: SyntaxError", arguments=["--import", "wrong_syntax"])
    module(place, "fails", "\n\n1 / 0")
    refused("--import fails: cannot be imported: ZeroDivisionError: division by zero (fails.py, line 3)", arguments=["--import", "fails"])
    module(place, "exits", "raise SystemExit(3)")
    refused("--import exits: cannot be imported: SystemExit: 3", arguments=["--import", "exits"])


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"teacher": python("nope")}, "own:nope: module own has no 'nope'"),
        ({"teacher": python("number")}, "own:number: not a function"),
        ({"teacher": python("wrong")}, "own:wrong: returned a int; a potstill.model.Model is expected"),
        ({"teacher": python("broken")}, "own:broken: IndexError: list index out of range (own.py, line "),
        (
            {"teacher": python("model", wdith=3)},
            "own:model: got an unexpected keyword argument 'wdith'; it is called with what the recipe has as arguments",
        ),
        ({"teacher": python("unfinished")}, "teacher: its generate program fails: RuntimeError: mat1 and mat2 shapes"),
        ({"teacher": python("flat")}, "teacher: for 2 images of (1, 8, 8) it generates (2, 64)"),
        ({"teacher": python("nan")}, "teacher: it generates NaN or infinite pixels"),
        (
            {"teacher": python("model")},
            "student: width, ratio, budget and start are for potstill's own families; the teacher is a Net.",
        ),
        (
            {"student": {"target": "own:model", "arguments": {"shape": [3, 8, 8]}}},
            "student: makes images of (3, 8, 8), the teacher of (1, 8, 8)",
        ),
        ({"student": {"target": "own:model"}}, "arm student_data_free, generate: the student has no node 'z2'"),
        (
            {"teacher": python("model", infer=False), "student": {"target": "own:model"}, "arms": ["with_data"]},
            "arm student_with_data, generate: begins with images, but the teacher, a Net, does not infer the noise behind them",
        ),
        (
            {"teacher": python("model"), "student": {"target": "own:model", "arguments": {"infer": False}}},
            "arm student_data_free, infer: Net has no program 'infer'",
        ),
        ({"evaluate": {"features": "python:own:nope"}}, "own:nope: module own has no 'nope'"),
        ({"evaluate": {"features": "python:own"}}, "own: module own has no ''"),
        ({"evaluate": {"features": "python:own:wrong"}}, "evaluate.features: own:wrong returned a int; a torch.nn.Module is expected"),
        ({"evaluate": {"features": "python:own:Sum"}}, "evaluate.features: feature network 'python:own:Sum': found shape ()"),
        ({"evaluate": {"features": "python:own:Fails"}}, "evaluate.features: AttributeError: no such thing (own.py, line "),
    ],
)
def test_wrong_code_is_named_with_its_line(refused, place, sections, expected):
    module(place, "own", OWN)
    refused(expected, arguments=["--import", "own"], **sections)


def test_the_working_directory_is_searched_for_allowed_modules_alone(refused, place):
    """A folder from elsewhere may hold a file with the name of a library that is about to be imported."""
    sys.path[:] = [p for p in sys.path if p not in ("", str(place.folder))]
    before = list(sys.path)
    refused("./nope: no such folder", teacher={"kind": "pretrained", "path": "./nope"})
    assert sys.path == before
    module(place, "own", OWN)
    refused("own:nope: module own has no 'nope'", arguments=["--import", "own"], teacher=python("nope"))
    assert sys.path == [str(place.folder), *before]


# ------------------------------------------------------------------ features


def test_features_that_do_not_fit(refused, place):
    Classifier((1, 9, 9), 4, 2).save_pretrained(place.folder / "judge")
    VAE((1, 8, 8), 2, 2).save_pretrained(place.folder / "vae")
    judge = "evaluate.features: the classifier ./judge takes images of (1, 9, 9), the data's are (1, 8, 8)"
    refused(judge, evaluate={"features": "classifier:./judge"})
    refused("evaluate.features: ./vae is a VAE; a classifier is expected", evaluate={"features": "classifier:./vae"})
    refused(
        "evaluate.features: 'inception'; pixels, standardized, classifier:PATH or python:module:name is expected",
        evaluate={"features": "inception"},
    )
    refused("zoo:nope: no such model in the zoo", evaluate={"features": "classifier:zoo:nope"})


# ------------------------------------------------------------------ folders


def test_stages_in_the_wrong_order(refused):
    refused("distill: no surrogate yet; run the synthesize stage first", command="distill")
    refused("evaluate: not every student is trained yet; run the distill stage first", command="evaluate")
    refused("report: nothing measured yet; run the evaluate stage first", command="report")
    trained = {"teacher": {"kind": "trained"}, "train": {"model": {"kind": "vae", "image": [1, 8, 8], "width": 2}}}
    for command in ("synthesize", "distill", "evaluate"):
        refused("teacher: not trained yet; run the train stage first", command=command, **trained)


def test_a_folder_for_the_run_that_is_something_else(place, capsys):
    recipe = str(place.write())
    before = snapshot(place.folder)
    assert cli.main(["run", recipe, "--out", str(place.folder)]) == 2  # its recipe.yaml is the user's own
    assert "holds a recipe.yaml that is not of a run; nothing is overwritten: choose another --out" in capsys.readouterr().err
    assert cli.main(["run", recipe, "--out", "data.npz"]) == 2
    assert "data.npz: a folder for the run is expected; it is a file" in capsys.readouterr().err
    assert snapshot(place.folder) == before


@pytest.mark.parametrize("out", ["/proc/potstill", "data.npz/deeper"])
def test_a_folder_that_cannot_be_written(place, capsys, out):
    if not os.path.isdir("/proc"):
        pytest.skip("needs a folder that even root cannot write to")
    assert cli.main(["synthesize", str(place.write()), "--out", out, "--quiet"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"potstill: {out.partition('/deeper')[0]}")


def test_a_full_disk(place, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "out/surrogate/shard-00000.parquet")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    assert place.run("synthesize") == 1
    assert capsys.readouterr().err == "potstill: out/surrogate/shard-00000.parquet: No space left on device\n"
    assert [p.name for p in (place.out / "surrogate").iterdir()] == []


def test_memory_that_runs_out(place, capsys, monkeypatch):
    for error, expected in (
        (MemoryError(), "out of memory; lower batch (of the surrogate: or mode clean, decode linear, save_memory), or compute.workers"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "out of memory; lower batch (of the surrogate: or mode clean, decode linear, save_memory), or compute.workers "
            "(CUDA out of memory. Tried)",
        ),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("potstill.pipeline.surrogate.write", fail)
        assert place.run("synthesize") == 1
        assert capsys.readouterr().err == f"potstill: {expected}\n"


def test_another_process_at_work_in_the_folder(place, capsys):
    with lock(place.out / "state" / "run.lock"):
        assert place.run("synthesize") == 2
    assert capsys.readouterr().err == f"potstill: {place.out}: another potstill process is working in this folder\n"
    assert sorted(os.listdir(place.out)) == ["state"]
    assert place.run("synthesize") == 0  # the file that is left does not matter


# ------------------------------------------------------------------ while it runs


def test_a_loss_that_is_not_finite(refused, place):
    err = refused(
        "student_data_free/seed-0: generate: ", distill={"generate": {"steps": 4, "batch": 8, "lr": 1e30, "warmup": 0}}, written=True
    )
    assert "not finite" in err
    assert "update" in err
    assert "lower lr (now 1e+30)" in err
    assert list(place.out.rglob("model.safetensors")) == []
    assert not (place.out / "student").exists()


def test_a_teacher_whose_loss_is_not_finite(refused, place):
    train = {"model": {"kind": "vae", "image": [1, 8, 8], "width": 2}, "steps": 4, "batch": 8, "lr": 1e30, "warmup": 0}
    alone = dict.fromkeys(("teacher", "student", "surrogate", "distill", "evaluate", "report"))
    err = refused("train: ", train=train, written=True, **alone)
    assert "not finite" in err
    assert list(place.out.rglob("model.safetensors")) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_training_with_its_state_saved(place, capsys, number):
    """In this process, between two updates, as Ctrl-C does; then the run goes on to the same bits."""
    assert place.run("run", evaluate=None, report=None) == 0
    expected = results(place.out)
    place.out.rename(place.folder / "whole")
    raised = []

    def interrupt(self, label, entry):
        if entry["phase"] == "infer" and entry["step"] == 1 and not raised:
            raised.append(True)
            signal.raise_signal(number)

    before = signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("potstill.progress.Board.training", interrupt)
        assert place.run("run", "compute.save_seconds=999", evaluate=None, report=None) == 130
    assert signal.getsignal(number) is before
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("potstill: interrupted; go on with: potstill run ")
    assert err.endswith("compute.save_seconds=999")
    steps = sorted(place.out.glob("state/students/student_data_free/seed-0/step-*"))
    assert [p.name for p in steps] == ["step-00000003", f"step-{(1 << 24) + 1:08d}"]  # the end of the first phase, and in the second
    assert not (place.out / "student").exists()
    if number == signal.SIGTERM:  # and a disk that has spoiled the newest
        (steps[1] / "state.safetensors").write_bytes(b"")
    recipe = str(place.write(evaluate=None, report=None))
    assert cli.main(["run", recipe, "--out", str(place.out), "compute.save_seconds=999"]) == 0
    said = (
        f"  {steps[1] / 'state.safetensors'}: not the file that its manifest describes; it is left out, and the one before it gone on with"
    )
    assert (said in capsys.readouterr().err.splitlines()) == (number == signal.SIGTERM)
    assert results(place.out) == expected
    assert os.listdir(place.out / "state") == ["run.lock"]


def test_sigterm_interrupts_other_work_too(place, capsys, monkeypatch):
    monkeypatch.setattr("potstill.pipeline.surrogate.write", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert place.run("synthesize") == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err.startswith("potstill: interrupted; go on with: potstill synthesize ")


@pytest.mark.slow
def test_ctrl_c(place):
    """In a process of its own, while two workers train."""
    recipe = place.write(
        seeds=[0, 1], distill={"generate": {"steps": 100_000, "batch": 8}}, compute=place.recipe["compute"] | {"workers": 2}
    )
    command = [sys.executable, "-m", "potstill", "run", str(recipe), "--out", "out", "--quiet"]
    with subprocess.Popen(command, cwd=place.folder, env=environment(), stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stderr is not None
        until = time.monotonic() + 120
        while len({p.parent for p in place.out.glob("state/students/*/*/step-*")}) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all of them
        err = process.stderr.read().decode()
    assert process.returncode == 130
    assert err == f"potstill: interrupted; go on with: potstill run {recipe} --out out --quiet\n"
    assert len({p.parent for p in place.out.glob("state/students/*/*/step-*")}) == 2
    assert list(place.out.rglob(".*.tmp")) == []


# ------------------------------------------------------------------ the other commands


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"potstill        {__version__}" in lines
    assert f"torch           {torch.__version__}" in lines
    assert any(line.startswith("torch threads ") for line in lines)
    assert any(line.startswith("[demo] ") for line in lines)


def test_zoo(capsys):
    assert cli.main(["zoo"]) == 0
    out = capsys.readouterr().out
    for name in ("digits-lvae", "digits-classifier", "glyphs-sd"):
        assert f"zoo:{name}  (" in out
    assert "MiB)" in out


def test_schema(capsys):
    assert cli.main(["schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(Recipe.model_fields)


def test_a_terminal_without_accents(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(cli, "_zoo", lambda: print("Fréchet 1 ± 2"))
    assert cli.main(["zoo"]) == 0
    out.seek(0)
    assert out.read() == "Fr?chet 1 ? 2\n"


def test_a_reader_that_has_enough_of_the_output():
    command = [sys.executable, "-c", "import sys; from potstill.cli import main; sys.exit(main(['schema']))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.slow
def test_a_run_prints_its_table(place, capsys):
    assert place.run("run") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Student, data-free" in out
    assert out.splitlines()[-1] == f"report: {place.out / 'report.html'}"
    assert place.run("report") == 0
    assert capsys.readouterr().out == f"report: {place.out / 'report.html'}\n"
    assert place.run("evaluate") == 0
    assert "Student, data-free" in capsys.readouterr().out


def test_progress_is_shown_unless_quiet(place, capsys):
    assert cli.main(["synthesize", str(place.write()), "--out", str(place.out)]) == 0
    assert re.fullmatch(r"synthesize\n  surrogate: about \d+\.\d GiB of memory\n", capsys.readouterr().err)
    assert cli.main(["synthesize", str(place.write()), "--out", str(place.out)]) == 0
    assert capsys.readouterr().err == "synthesize: done already\n"
    assert cli.main(["distill", str(place.write()), "--out", str(place.out)]) == 0
    assert "  1 student\n" in capsys.readouterr().err


# ------------------------------------------------------------------ help


def commands():
    (found,) = [action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return list(found.choices)


@pytest.mark.parametrize("command", commands())
def test_the_examples_of_the_help_work(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    examples = capsys.readouterr().out.partition("\nfor example:\n")[2].splitlines()
    assert examples
    for example in examples:
        assert example.startswith("  ")
        _, _, words = example.removeprefix('  eval "$(').removesuffix(')"').strip().partition("potstill ")
        arguments = cli._arguments(shlex.split(words))
        assert arguments.command == command
        if hasattr(arguments, "overrides"):
            read(ROOT / arguments.recipe if command != "demo" else cli.DEMO, arguments.overrides)
