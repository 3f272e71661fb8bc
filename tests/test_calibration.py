"""A teacher's latents recalibrated by what its layers remember of its data: what is learned, and a run that does it."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from potstill import cli, config, pipeline
from potstill.distill.calibration import Calibrated, Calibration
from potstill.energy import relative_batchnorm
from potstill.errors import BadInput
from potstill.families.classifier import Classifier
from potstill.families.gan import GAN
from potstill.families.lvae import LVAE
from potstill.noise import Noise
from potstill.trace import run
from runs import results
from test_pipeline import RECIPE as WHOLE

RECIPE = {
    **WHOLE,
    "name": "calibrated",
    "calibrate": {"steps": 4, "batch": 8, "ema": 0.5},
    "arms": ["data_free", {"kind": "data_free", "name": "calibrated", "calibrated": True}],
}


def born(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().model().frozen()


@pytest.fixture
def teacher():
    return born(lambda: LVAE((1, 8, 8), 4, 2, 2, std=0.1))


def execute(folder, **sections):
    pipeline.execute(config.check(RECIPE | sections), folder, quiet=True)


def test_at_first_it_is_the_teacher(teacher):
    net = Calibrated(teacher)
    assert net.latents == ("z2", "z1")
    assert {name: tuple(p.shape) for name, p in net.state_dict().items()} == {
        "maps.0.weight": (2, 2, 1, 1),
        "maps.0.bias": (2,),
        "maps.1.weight": (2, 2, 3, 3),
        "maps.1.bias": (2,),
    }
    assert torch.equal(net.model().sample(5, Noise((1,))), teacher.sample(5, Noise((1,))))
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(net.model().reconstruct(x, Noise((1,))), teacher.reconstruct(x, Noise((1,))))


def test_noise_is_mapped_in_units_of_each_latents_own_std(teacher):
    net, noise = Calibrated(teacher), Noise((3,))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in net.maps[1].parameters():
            parameter.normal_()
        before, after = (run(m.program("generate"), noise=noise, n=4) for m in (teacher, net.model()))
        standard = noise.normal("z1", (4, 2, 4, 4))
        given = before["z1"].dist
        expected = given.loc + given.scale * (standard + F.conv2d(standard, net.maps[1].weight, net.maps[1].bias, padding=1))
    assert torch.equal(before["z2"].value, after["z2"].value)
    assert torch.allclose(after["z1"].value, expected, atol=1e-5)
    assert torch.equal(after["z1"].dist.scale, given.scale)


@pytest.mark.parametrize("make", [lambda: GAN((1, 8, 8), 4, latent=3), lambda: LVAE((1, 8, 8), 4, 2, 2, std=0.1)])
def test_every_normal_latent_of_a_family(make):
    given = born(make)
    net = Calibrated(given)
    assert torch.equal(net.model().sample(3, Noise((1,))), given.sample(3, Noise((1,))))
    net.model().sample(3, Noise((1,))).sum()


def test_a_shift_of_the_latents_is_found_again(teacher):
    """The moments are of the teacher's samples with moved latents; the move is all that has to be found."""
    with torch.no_grad():
        wide = Calibrated(teacher)
        for of in wide.maps:
            of.bias.fill_(1.0)
        x = wide.model().sample(512, Noise((1,)))
        for module in teacher.net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
                module.reset_running_stats()
                module.train()
        # Statistics of inference alone, of the first layer on: that of a layer changes what the next is fed.
        for _ in range(3):
            run(teacher.program("infer"), x, noise=Noise((2,)))
        teacher.net.eval()
    net = Calibrated(teacher)
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
    from potstill.model import Images, Model

    net = torch.nn.Conv2d(1, 1, 1)
    model = Model(net, Images((1, 8, 8)), lambda sample: net(torch.zeros(sample.n, 1, 8, 8))).frozen()
    with pytest.raises(ValueError, match="draws no latent from a normal"):
        Calibrated(model)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"calibrate": None}, "arm calibrated: calibrated needs a section calibrate"),
        ({"calibrate": {"energy": []}}, "calibrate.energy"),
        ({"arms": [{"kind": "with_data", "calibrated": True}]}, "calibrated is of data_free arms"),
        ({"arms": [{"kind": "data_free", "calibrated": True, "start": "surrogate"}]}, "calibrated goes with start: noise"),
        ({"arms": [{"kind": "data_free", "name": "teacher_calibrated"}]}, "cannot be named teacher_calibrated"),
    ],
)
def test_recipes_that_are_refused(changes, problem):
    with pytest.raises(BadInput, match=problem):
        config.check(RECIPE | changes)


def test_an_arm_that_is_not_calibrated_is_hashed_as_before():
    assert "calibrated" not in config.check(WHOLE).arms[0].model_dump(mode="json")


@pytest.mark.slow
def test_a_run(tmp_path, capsys):
    execute(tmp_path / "a")
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert list(metrics["arms"]) == ["teacher", "teacher_calibrated", "student_data_free", "calibrated"]
    assert metrics["arms"]["teacher_calibrated"]["paired_mse"]["mean"] > 0
    assert metrics["arms"]["student_data_free"]["frechet"] != metrics["arms"]["calibrated"]["frechet"]
    page = (tmp_path / "a" / "report.html").read_text()
    assert "teacher, calibrated" in page
    assert "Teacher, its calibration" in page
    assert json.loads((tmp_path / "a" / "calibrated" / "config.json").read_text()) == {"latents": ["z2", "z1"]}
    execute(tmp_path / "a")  # nothing left to do
    shutil.rmtree(tmp_path / "a" / "students")
    before = (tmp_path / "a" / "calibrated" / "model.safetensors").read_bytes()
    execute(tmp_path / "b")
    assert (tmp_path / "b" / "calibrated" / "model.safetensors").read_bytes() == before
    with pytest.raises(BadInput, match=r"differs: calibrate\.lr"):
        execute(tmp_path / "b", calibrate=RECIPE["calibrate"] | {"lr": 0.5})


@pytest.mark.slow
def test_stage_by_stage_and_in_the_wrong_order(tmp_path, capsys):
    path, out = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(json.dumps(RECIPE))
    for stage in ("train", "synthesize"):
        assert cli.main([stage, str(path), "--out", str(out), "--quiet"]) == 0
    assert cli.main(["distill", str(path), "--out", str(out), "--quiet"]) == 2
    assert "no calibrated teacher yet; run the calibrate stage first" in capsys.readouterr().err
    for stage in ("calibrate", "distill", "evaluate"):
        assert cli.main([stage, str(path), "--out", str(out), "--quiet"]) == 0
    execute(tmp_path / "whole")
    assert results(out) == results(tmp_path / "whole")


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
    objective = Calibration(teacher, Calibrated(teacher), relative_batchnorm)
    with pytest.raises(ValueError, match="none that keep statistics"):
        objective(Noise(), 4)
