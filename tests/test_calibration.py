"""A teacher's latents recalibrated by what its layers remember of its data: what is learned, and a run that does it."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file

import potstill
from potstill import build, cli, config, pipeline
from potstill.distill.calibration import Calibration, NoiseMap
from potstill.distill.distiller import Distiller
from potstill.divergence import Match, mse, total
from potstill.energy import relative_batchnorm
from potstill.errors import BadInput
from potstill.families.classifier import Classifier
from potstill.families.gan import GAN
from potstill.families.helmholtz import HelmholtzMachine
from potstill.families.lvae import LVAE
from potstill.inventory import damage
from potstill.model import Images, Model
from potstill.noise import Noise
from potstill.trace import run
from runs import results
from test_pipeline import RECIPE as WHOLE

RECIPE = {
    **WHOLE,
    "name": "calibrated",
    "calibrate": {"steps": 4, "batch": 8, "ema": 0.5},
    "arms": ["data_free", {"kind": "data_free", "name": "calibrated", "start": "calibrated"}],
}


def born(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().model().frozen()


@pytest.fixture
def teacher():
    return born(lambda: LVAE((1, 8, 8), 4, 2, 2, std=0.1))


def load_map(run_folder, model):
    net = NoiseMap(model)
    build.load_weights(net, run_folder / "calibrated" / "model.safetensors")
    return net


def execute(folder, **sections):
    pipeline.execute(config.check(RECIPE | sections), folder, quiet=True)


def test_at_first_noise_is_as_it_was(teacher):
    net = NoiseMap(teacher)
    assert net.latents == ("z2", "z1")
    assert {name: tuple(p.shape) for name, p in net.state_dict().items()} == {
        "maps.0.weight": (2, 2, 1, 1),
        "maps.0.bias": (2,),
        "maps.1.weight": (2, 2, 3, 3),
        "maps.1.bias": (2,),
    }
    assert torch.equal(teacher.sample(5, net(Noise((1,)))), teacher.sample(5, Noise((1,))))
    assert torch.equal(net(Noise((1,))).uniform("u", (3, 2)), Noise((1,)).uniform("u", (3, 2)))


def stirred(teacher):
    net = NoiseMap(teacher)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return net.requires_grad_(False)


def test_the_noise_of_each_latent_goes_through_its_own_map(teacher):
    net, noise = stirred(teacher), Noise((3,))
    standard = noise.normal("z1", (4, 2, 4, 4))
    expected = standard + F.conv2d(standard, net.maps[1].weight, net.maps[1].bias, padding=1)
    assert torch.equal(net(noise).normal("z1", (4, 2, 4, 4)), expected)
    assert torch.equal(net(noise).normal("out", (4, 2)), noise.normal("out", (4, 2)))


def test_a_model_that_maps_its_noise_by_itself(teacher):
    net, noise = stirred(teacher), Noise((3,))
    found, expected = net.onto(teacher).sample(5, noise), teacher.sample(5, net(noise))
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, teacher.sample(5, noise), atol=1e-3)
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(net.onto(teacher).reconstruct(x, noise), teacher.reconstruct(x, noise))


def test_teacher_and_student_get_the_same_mapped_noise(teacher):
    """A student that is the teacher: no difference, whatever the map, and the batch is what the teacher makes of mapped noise."""
    net = stirred(teacher)
    student = born(lambda: LVAE((1, 8, 8), 4, 2, 2, std=0.1))
    student.net.load_state_dict(teacher.net.state_dict())
    assert float(total(Distiller(teacher, student, calibrated=net)(Noise((1,)), None, 4)).abs().max()) < 1e-4
    rules = (Match(nodes="out", by=mse, reduce="mean"),)
    gray = born(lambda: LVAE((1, 8, 8), 2, 2, 2, std=0.1))
    found = Distiller(teacher, gray, rules, calibrated=net)(Noise((1,)), None, 4)["out"]
    with torch.no_grad():
        ours, theirs = (run(m.program("generate"), noise=net(Noise((1,))), n=4).out.dist.mean for m in (teacher, gray))
    assert torch.allclose(found, (ours - theirs).pow(2).mean((1, 2, 3)), rtol=1e-4)


@pytest.mark.parametrize("make", [lambda: GAN((1, 8, 8), 4, latent=3), lambda: HelmholtzMachine((2, 1, 1), 8, 3)])
def test_vectors_have_matrices(make):
    net = NoiseMap(born(make))
    assert all(isinstance(one, torch.nn.Linear) for one in net.maps)


def test_a_shift_of_the_latents_is_found_again(teacher):
    """The moments are of the teacher's samples with moved latents; the move is all that has to be found."""
    with torch.no_grad():
        wide = NoiseMap(teacher)
        for of in wide.maps:
            of.bias.fill_(1.0)
        x = teacher.sample(512, wide(Noise((1,))))
        for module in teacher.net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
                module.train()
        # Statistics of inference alone, of the first layer on: that of a layer changes what the next is fed.
        for _ in range(3):
            run(teacher.program("infer"), x, noise=Noise((2,)))
        teacher.net.eval()
    net = NoiseMap(teacher)
    objective, optimizer = Calibration(teacher, net, relative_batchnorm), torch.optim.Adam(net.parameters(), 0.05)

    def far(net):
        with torch.no_grad():
            return float(sum(Calibration(teacher, net, relative_batchnorm)(Noise((9,)), 512).values())[0])

    first = far(net)
    for step in range(40):
        optimizer.zero_grad()
        sum(objective(Noise((0, step)), 64).values()).mean().backward()
        optimizer.step()
    assert far(net) < 0.5 * first


def test_a_teacher_without_latents_is_refused():
    net = torch.nn.Conv2d(1, 1, 1)
    model = Model(net, Images((1, 8, 8)), lambda sample: net(torch.zeros(sample.n, 1, 8, 8))).frozen()
    with pytest.raises(ValueError, match="draws no latent from a normal"):
        NoiseMap(model)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"calibrate": None}, "arm calibrated: start: calibrated needs a section calibrate"),
        ({"calibrate": {"energy": []}}, "calibrate.energy"),
        ({"surrogates": {"calibrated": {"n": 8}}}, "surrogates.calibrated: a name that start has another meaning for"),
    ],
)
def test_recipes_that_are_refused(changes, problem):
    with pytest.raises(BadInput, match=problem):
        config.check(RECIPE | changes)


@pytest.mark.slow
def test_a_run(tmp_path, capsys):
    execute(tmp_path / "a")
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert list(metrics["arms"]) == ["teacher", "teacher+calibrated", "student_data_free", "calibrated", "calibrated+calibrated"]
    plain, mapped = (metrics["arms"][name] for name in ("calibrated", "calibrated+calibrated"))
    assert plain["frechet"] != mapped["frechet"]
    assert plain["reconstruction_mse"] == mapped["reconstruction_mse"]
    assert mapped["params"] - plain["params"] == 2 * 2 + 2 + 2 * 2 * 9 + 2  # of both maps
    assert metrics["arms"]["student_data_free"]["frechet"] != metrics["arms"]["calibrated"]["frechet"]
    page = (tmp_path / "a" / "report.html").read_text()
    assert "teacher, calibrated noise" in page
    assert "Teacher, its calibration" in page
    assert json.loads((tmp_path / "a" / "calibrated" / "config.json").read_text()) == {"latents": ["z2", "z1"]}
    with pytest.raises(BadInput, match=r"differs: calibrate\.lr"):
        execute(tmp_path / "a", calibrate=RECIPE["calibrate"] | {"lr": 0.5})


@pytest.mark.slow
def test_stage_by_stage_and_in_the_wrong_order(tmp_path, capsys):
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(json.dumps(RECIPE))
    for stage in ("train", "synthesize"):
        assert cli.main([stage, str(path), "--out", str(out), "--quiet"]) == 0
    assert cli.main(["distill", str(path), "--out", str(out), "--quiet"]) == 2
    assert "no calibrated noise yet; run the calibrate stage first" in capsys.readouterr().err
    for stage in ("calibrate", "distill", "evaluate"):
        assert cli.main([stage, str(path), "--out", str(out), "--quiet"]) == 0
    execute(tmp_path / "whole")
    assert results(out) == results(tmp_path / "whole")


def test_the_student_that_is_taken_away_maps_its_noise_by_itself(tmp_path, capsys):
    execute(tmp_path / "run", arms=RECIPE["arms"][1:])
    folder = tmp_path / "run" / "student"
    assert cli.main(["export", str(tmp_path / "run"), "--to", "torch-export"]) == 0
    maps = load_file(folder / "noise_map.safetensors")
    count = sum(tensor.size for tensor in maps.values())
    assert f"a map of it of {count:,} numbers" in (folder / "README.md").read_text()

    noise, student, plain = Noise((5,)), potstill.load(folder), build.pretrained(str(folder)).model()
    expected = student.sample(6, noise)
    assert torch.equal(expected, load_map(tmp_path / "run", plain).onto(plain).sample(6, noise))
    assert not torch.equal(expected, plain.sample(6, noise))
    about = json.loads((tmp_path / "run" / "export" / "torch-export" / "export.json").read_text())
    graph = about["graphs"]["model.pt2"]
    exported = torch.export.load(tmp_path / "run" / "export" / "torch-export" / "model.pt2").module()
    found = exported(*(noise.normal(i["name"], (6, *i["shape"][1:])) for i in graph["inputs"]))
    assert (found[0] - expected).abs().max() < 1e-5
    assert about["params"] == sum(p.numel() for p in plain.net.parameters()) + count
    assert damage(tmp_path / "run") == []

    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "noise_map.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert cli.main(["export", str(tmp_path / "other"), "--to", "torch-export", "--out", str(tmp_path / "e")]) == 2
    assert "noise_map.safetensors" in capsys.readouterr().err


def test_a_student_of_plain_noise_has_no_map(tmp_path):
    execute(tmp_path / "run")
    assert not (tmp_path / "run" / "student" / "noise_map.safetensors").exists()
    folder, noise = tmp_path / "run" / "student", Noise((5,))
    plain = build.pretrained(str(folder)).model()
    assert torch.equal(potstill.load(str(folder)).sample(6, noise), plain.sample(6, noise))


def test_a_classifier_has_nothing_to_calibrate(tmp_path):
    folder = tmp_path / "teacher"
    net = Classifier((1, 8, 8), 10, 4)
    net.save_pretrained(folder)
    recipe = {
        "name": "none",
        "teacher": {"kind": "pretrained", "path": str(folder)},
        "calibrate": {},
    }
    with pytest.raises(BadInput, match="calibrate: "):
        pipeline.execute(config.check(recipe), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_energies_that_want_what_is_not_there(teacher):
    for module in teacher.net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    objective = Calibration(teacher, NoiseMap(teacher), relative_batchnorm)
    with pytest.raises(ValueError, match="none that keep statistics"):
        objective(Noise(), 4)
