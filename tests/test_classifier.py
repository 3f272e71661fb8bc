"""Classifiers: the published ResNet, its checkpoints, and distillation of labels from end to end.

With the environment variable ``POTSTILL_SHARED`` naming a folder that holds ``pretrained/cifar10_resnet{20,56}.safetensors`` and
``data/cifar10/test.parquet``, those two networks are judged on those pictures.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Normal

from potstill import build, config, jobs, pipeline
from potstill.data import load
from potstill.distill.distiller import Distiller
from potstill.distill.loop import accelerator
from potstill.divergence import hinton, total
from potstill.errors import BadInput
from potstill.evaluate.arms import accuracy, cost
from potstill.families.classifier import Classifier, ResNet, classes_of
from potstill.families.lvae import LVAE
from potstill.families.own import from_logits
from potstill.families.vae import VAE
from potstill.model import Images, Model
from potstill.noise import Noise
from potstill.state import digest_of, save_tensors
from potstill.synthesize import surrogate
from potstill.trace import run

IMAGE = (1, 8, 8)


def born(make, seed=0):
    return build.born(seed, "net", make)


@torch.no_grad()
def lived(net):
    """With BatchNorm statistics and biases that are not those of birth."""
    for name, t in net.state_dict().items():
        if t.is_floating_point() and t.ndim == 1:
            t += 0.3 * Noise((1,)).uniform(name, (1, len(t)))[0]
    return net.eval()


def uniform(shape, n=5):
    return Noise((2,)).uniform("x", (n, *shape))


# ------------------------------------------------------------------ the published network


def reference(tensors, x, blocks):
    """He et al.'s network from its weights alone, written a second time."""

    def normalized(name, h):
        mean, var, weight, bias = (tensors[f"{name}.{k}"].view(1, -1, 1, 1) for k in ("running_mean", "running_var", "weight", "bias"))
        return (h - mean) / (var + 1e-5).sqrt() * weight + bias

    h = normalized("bn1", F.conv2d(x, tensors["conv1.weight"], padding=1)).clamp_min(0)
    for stage in (1, 2, 3):
        for i in range(blocks):
            name, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            inner = normalized(f"{name}.bn1", F.conv2d(h, tensors[f"{name}.conv1.weight"], stride=stride, padding=1)).clamp_min(0)
            inner = normalized(f"{name}.bn2", F.conv2d(inner, tensors[f"{name}.conv2.weight"], padding=1))
            skip = torch.zeros_like(inner)
            first = (inner.shape[1] - h.shape[1]) // 2
            skip[:, first : first + h.shape[1]] = h[:, :, ::stride, ::stride]
            h = (inner + skip).clamp_min(0)
    return h.flatten(2).mean(2) @ tensors["linear.weight"].T + tensors["linear.bias"]


@pytest.mark.parametrize(
    ("image", "depth", "width"), [((1, 8, 8), 8, 3), ((2, 9, 13), 14, 4), ((3, 32, 32), 20, 16), ((3, 64, 64), 8, 5)], ids=str
)
@torch.no_grad()
def test_the_network_is_the_published_one(image, depth, width):
    net = lived(born(lambda: ResNet(image, 7, depth, width)))
    x = uniform(image)
    expected = reference(net.state_dict(), x, depth // 6)
    assert expected.std(0).mean() > 1e-2
    assert torch.allclose(net(x), expected, rtol=1e-4, atol=1e-5)


def test_published_sizes_and_names():
    """0.27 and 0.85 million parameters (He et al., table 6)."""
    counts = {20: 269_722, 56: 853_018}
    for depth, count in counts.items():
        net = ResNet(depth=depth)
        assert sum(p.numel() for p in net.parameters()) == count
        names = {name for name, _ in net.named_parameters()}
        block = r"layer[123]\.\d+\.(conv[12]\.weight|bn[12]\.(weight|bias))"
        assert all(re.fullmatch(rf"conv1\.weight|bn1\.(weight|bias)|{block}|linear\.(weight|bias)", name) for name in names)
        assert len(names) == 5 + 6 * 3 * (depth // 6)


@torch.no_grad()
def test_a_shortcut_keeps_every_second_pixel_and_adds_channels_of_zeros():
    block = ResNet(IMAGE, 3, 8, 3).eval().layer2[0]
    block.bn2.weight.zero_()
    x = uniform((3, 7, 8))
    found = block(x)
    assert found.shape == (5, 6, 4, 4)
    assert torch.equal(found[:, 1:4], x[:, :, ::2, ::2])
    assert not found[:, [0, 4, 5]].any()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"depth": 18}, "6 n \\+ 2 layers, such as 8, 20 or 56; not 18"),
        ({"depth": 2}, "not 2"),
        ({"width": 0}, "must be positive"),
        ({"mean": (0.5, 0.5)}, "one number or 3 are expected"),
        ({"std": (0.5, 0.0, 0.5)}, "std above 0"),
    ],
)
def test_numbers_that_make_no_network_are_refused(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        ResNet(**arguments)


def test_every_network_sees_images_in_the_range_that_it_was_trained_on():
    net = born(lambda: ResNet(IMAGE, 3, 8, 2, (0.5,), (0.25,))).eval()
    x = uniform(IMAGE)
    found = run(net.model().infer, net.model().images.encode(x), noise=Noise()).out.dist.logits
    assert torch.allclose(found, net((x - 0.5) / 0.25).log_softmax(1), atol=1e-6)
    small = net.shrunk(1)
    assert small.model().images == net.model().images


def test_a_checkpoint_without_counters_of_batches_loads(tmp_path):
    net = lived(born(lambda: ResNet(IMAGE, 3, 8, 2)))
    tensors = {name: t for name, t in net.state_dict().items() if "num_batches" not in name}
    save_tensors(tensors, tmp_path / "weights.safetensors")
    section = config.ResNetNet(kind="resnet", image=IMAGE, classes=3, depth=8, width=2, mean=(0.5,), std=(0.25,))
    weights = config.Weights(kind="weights", path=str(tmp_path / "weights.safetensors"), net=section)
    teacher = build.teacher(weights, tmp_path, ())
    assert digest_of(teacher.net) == digest_of(net)
    assert teacher.images == Images(IMAGE, (0.5,), (0.25,))
    save_tensors({name: t for name, t in tensors.items() if name != "bn1.running_var"}, tmp_path / "weights.safetensors")
    with pytest.raises(BadInput, match=r"not the weights of this ResNet: it lacks bn1\.running_var"):
        build.teacher(weights, tmp_path, ())


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "expected"), [(20, 0.810), (56, 0.832)])
def test_networks_that_others_trained_are_as_good_as_they_say(depth, expected):
    folder = os.environ.get("POTSTILL_SHARED")
    if not folder:
        pytest.skip("POTSTILL_SHARED names no folder")
    net = config.ResNetNet(kind="resnet", image=(3, 32, 32), classes=10, depth=depth, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    path = Path(folder) / "pretrained" / f"cifar10_resnet{depth}.safetensors"
    teacher = build.teacher(config.Weights(kind="weights", path=str(path), net=net), path.parent, ())
    pictures = str(Path(folder) / "data" / "cifar10" / "test.parquet")
    test = load(config.FileData(kind="parquet", path=pictures, test_path=pictures)).test
    assert test.labels is not None
    found = accuracy(teacher, torch.from_numpy(test.images).float() / 255, test.labels, 500)
    assert found == pytest.approx(expected, abs=6e-4)


# ------------------------------------------------------------------ anybody's own


class Own(nn.Module):
    """A network whose output is made by ``wrap``."""

    def __init__(self, wrap, classes=3):
        super().__init__()
        self.linear, self.wrap = nn.Linear(64, classes), wrap

    def forward(self, x):
        return self.wrap(self.linear(x.flatten(1)))


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: SimpleNamespace(logits=y, loss=None)], ids=["tensor", "output"])
def test_anybodys_classifier_becomes_a_model(wrap):
    net = Own(wrap)
    model = from_logits(net, Images(IMAGE, (0.5,), (0.25,)))
    x = uniform(IMAGE)
    trace = run(model.program("infer"), model.images.encode(x), noise=Noise())
    assert isinstance(trace.out.dist, Categorical)
    assert torch.allclose(trace.out.dist.logits, net.linear(((x - 0.5) / 0.25).flatten(1)).log_softmax(1), atol=1e-6)
    assert model.generate is None
    assert classes_of(model) == 3


@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (lambda y: {"prediction": y}, "Own returns a dict; a tensor"),
        (lambda y: y[:, :, None], r"Own returns logits of shape \(2, 3, 1\)"),
        (lambda y: SimpleNamespace(logits=None), "Own returns a SimpleNamespace"),
    ],
)
def test_what_has_no_logits_is_named(wrap, expected):
    with pytest.raises(ValueError, match=expected):
        classes_of(from_logits(Own(wrap), Images(IMAGE)))


def test_a_teacher_of_labels_is_looked_at_before_it_is_used(monkeypatch):
    section = config.Python(kind="python", target="own:make")

    def teacher(model):
        monkeypatch.setattr(build, "resolve", lambda *_: model)
        return build.teacher(section, Path(), ())

    assert teacher(from_logits(Own(lambda y: y), Images(IMAGE))).infer is not None
    for model, expected in (
        (from_logits(Own(lambda y: {}), Images(IMAGE)), "teacher: its infer program fails: Own returns a dict"),
        (from_logits(Own(lambda y: y / 0), Images(IMAGE)), "teacher: it infers NaN or infinite logits"),
        (Model(nn.Linear(1, 1), Images(IMAGE)), "teacher: the Linear has neither a generate nor an infer program"),
        (
            Model(nn.Linear(1, 1), Images(IMAGE), infer=lambda sample, x: x[:, :, :4]),
            r"for 2 images of \(1, 8, 8\) it infers \(2, 1, 4, 8\)",
        ),
    ):
        with pytest.raises(BadInput, match=expected):
            teacher(model)


def test_how_many_labels_a_model_tells_apart():
    nets = (LVAE(IMAGE, 4, 2, 2), VAE(IMAGE, 4, 2), Classifier(IMAGE, 7, 2), ResNet(IMAGE, 4, 8, 2))
    assert [classes_of(net.model()) for net in nets] == [None, None, 7, 4]
    net = nets[1]
    assert classes_of(Model(net, Images(IMAGE), infer=net.infer)) is None


# ------------------------------------------------------------------ figures


def test_accuracy_is_the_share_of_right_labels():
    x, labels = uniform(IMAGE, 7), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    images = Images(IMAGE, (0.5,), (2.0,))

    def infer(sample, z):
        assert torch.allclose(z.abs().max(), ((x - 0.5) / 2).abs().max(), atol=0.05)
        index = (images.decode(z)[:, 0, 0, 0, None] - x[None, :, 0, 0, 0]).abs().argmin(1)
        return Categorical(logits=F.one_hot((index + (index > 4)) % 3, 3).float())  # wrong for the last two alone

    assert accuracy(Model(nn.Linear(1, 1), images, infer=infer), x, labels.numpy(), 3) == pytest.approx(5 / 7)


def test_a_model_that_does_not_generate_is_timed_as_it_is_used():
    seen = []

    def infer(sample, x):
        seen.append(len(x))
        return Normal(x + 0 * sample.normal("z", IMAGE), 1.0)

    found = cost(Model(nn.Linear(1, 1), Images(IMAGE), infer=infer), 1, 3)
    assert set(seen) == {1, 64}
    assert set(found) == {"latency_ms_b1", "latency_ms_b64", "latency_iqr_ms_b1", "latency_iqr_ms_b64", "throughput"}


# ------------------------------------------------------------------ distillation

STEPS = {"steps": 3, "batch": 16}
RECIPE = {
    "name": "labels",
    "data": {"kind": "digits", "train": 400},
    "teacher": {"kind": "pretrained", "path": "zoo:digits-classifier"},
    "student": {"width": 4},
    "surrogate": {},
    "distill": {"generate": None, "infer": STEPS, "scratch": STEPS},
    "arms": ["data_free", "with_data", "scratch"],
    "seeds": [0],
    "evaluate": {"latency_repeats": 3},
    "report": {"images": 4},
    "compute": {"device": "cpu", "threads": 1, "workers": 1, "log_steps": 1},
}


def workshop(folder, **sections):
    return jobs.Workshop(config.check(RECIPE | {"evaluate": None, "report": None} | sections), folder)


@pytest.fixture
def noise_images(monkeypatch):
    """The surrogate of every run."""
    monkeypatch.setattr(surrogate, "read", lambda folder: surrogate.to_uint8(uniform(IMAGE, 64)))


def write_vae(folder):
    """A small teacher that generates, and its section of a recipe."""
    born(lambda: VAE(IMAGE, 4, 2)).save_pretrained(folder)
    return {"kind": "pretrained", "path": str(folder)}


def trained(shop, index=0):
    """A student as it was born, and as an arm of the recipe makes it."""
    job = jobs.jobs(shop.recipe)[index]
    for _ in jobs.make_student(shop, job, "identity", accelerator("cpu")):
        pass
    found = shop.student(job)
    build.load_weights(found.net, jobs.student_folder(shop.folder, job) / "model.safetensors")
    return shop.student(job), found


def moved(before, after):
    a, b = before.net.state_dict(), after.net.state_dict()
    return {name for name, _ in before.net.named_parameters() if not torch.equal(a[name], b[name])}


def test_a_classifier_is_distilled_by_hinton_at_temperature_4_unless_told_otherwise(tmp_path):
    shop = workshop(tmp_path)
    student, x = shop.student(jobs.jobs(shop.recipe)[0]), uniform(IMAGE)
    student.net.eval()
    logits = [model.net(x) for model in (shop.teacher, student)]
    objective = jobs._objective(shop.recipe.distill, shop.recipe.arms[1], "infer", shop.teacher, student, None)
    assert isinstance(objective, Distiller)
    (name, loss), *rest = objective(Noise(), x).items()
    assert (name, rest) == ("out", [])
    soft = [y.div(4).softmax(1) for y in logits]
    assert torch.allclose(loss, 16 * (soft[0] * (soft[0] / soft[1]).log()).sum(1), rtol=1e-4)
    rules = {"rules": [{"nodes": "out", "by": "hinton", "temperature": 2.0, "weight": 0.5}]}
    told = config.Distill(generate=None, infer=config.Encoder(**rules))
    (loss,) = jobs._objective(told, shop.recipe.arms[1], "infer", shop.teacher, student, None)(Noise(), x).values()
    assert torch.allclose(loss, 0.5 * hinton(2.0)(*(Categorical(logits=y) for y in logits)), rtol=1e-4)


def test_what_a_generators_inference_is_distilled_by_when_the_recipe_does_not_say():
    assert jobs._inference(config.Distill(), False) == ((config.Rule(weight=0.0),), 1.0)
    rules = (config.Rule(nodes="z*"),)
    assert jobs._inference(config.Distill(infer=config.Encoder(rules=rules, elbo=0.0)), False) == (rules, 0.0)


@pytest.mark.usefixtures("noise_images")
@pytest.mark.parametrize("arm", ["data_free", "with_data", "scratch"])
def test_every_arm_trains_all_of_a_classifier_and_leaves_the_teacher_bit_for_bit(tmp_path, arm):
    shop = workshop(tmp_path, arms=[{"kind": arm, "steps": 2}])
    before = shop.teacher_digest
    born, found = trained(shop)
    assert moved(born, found) == {name for name, _ in found.net.named_parameters()}
    assert digest_of(shop.teacher.net) == before
    done = json.loads((tmp_path / "students" / f"student_{arm}" / "seed-0" / "job.json").read_text())
    assert done["updates"] == {"scratch" if arm == "scratch" else "infer": 2}


@pytest.mark.usefixtures("noise_images")
@pytest.mark.parametrize("what", ["data_free", "with_data", "scratch", "train"])
def test_augmentation_reaches_every_training(tmp_path, what):
    digests = set()
    for name, augment in (("plain", None), ("zero", {"shift": 0}), ("moved", {"shift": 2, "padding": "reflect", "flip": True})):
        steps = STEPS | {"augment": augment}
        train = {"model": {"kind": "resnet", "image": IMAGE, "classes": 10, "depth": 8, "width": 2}, **steps}
        arms = [what] if what != "train" else ["scratch"]
        shop = workshop(tmp_path / name, distill={"generate": None, "infer": steps, "scratch": steps}, train=train, arms=arms)
        model = jobs.make_teacher(shop, accelerator("cpu")) if what == "train" else trained(shop)[1]
        digests.add(digest_of(model.net))
    assert len(digests) == 2  # no shift is no change


def test_a_distilled_classifier_agrees_with_its_teacher(tmp_path):
    infer = {"steps": 60, "batch": 64, "lr": 2e-2, "warmup": 5}
    shop = workshop(tmp_path, arms=["with_data"], surrogate=None, distill={"generate": None, "infer": infer})
    test = shop.real.test
    x = torch.from_numpy(test.images).float() / 255
    right = [accuracy(model.frozen(), x, test.labels, 512) for model in (shop.teacher, *trained(shop))]
    assert right[0] > 0.97
    assert right[1] < 0.35
    assert right[2] > 0.8


@pytest.mark.usefixtures("noise_images")
@pytest.mark.parametrize("infer", [{}, {"rules": [{"nodes": "z*"}, {"nodes": "out", "by": "mse"}], "elbo": 0}], ids=["elbo", "rules"])
def test_without_a_generator_phase_inference_trains_encoder_and_decoder(tmp_path, infer):
    """An autoencoder whose prior cannot be sampled."""
    sections = {"teacher": write_vae(tmp_path / "vae"), "student": {"width": 2}, "arms": ["data_free"]}
    shop = workshop(tmp_path, **sections, distill={"generate": None, "infer": STEPS | infer})
    born, found = trained(shop)
    assert moved(born, found) == {name for name, _ in found.net.named_parameters()}
    # With one, inference leaves the generator as that phase made it.
    (arm,) = shop.recipe.arms
    both = workshop(tmp_path / "both", **sections, distill={"generate": STEPS, "infer": STEPS | infer})
    assert jobs._learns(both.recipe.distill, arm, found, "infer") < jobs._learns(shop.recipe.distill, arm, found, "infer")


def test_steps_of_an_arm_are_of_its_first_phase():
    arm = config.Arm(kind="data_free", steps=5)
    for distill, expected in (
        ({"generate": {"steps": 1}, "infer": {"steps": 2}}, {"generate": 5, "infer": 2}),
        ({"generate": None, "infer": {"steps": 2}}, {"infer": 5}),
        ({"generate": {"steps": 1}, "infer": None}, {"generate": 5}),
    ):
        recipe = config.check(RECIPE | {"distill": distill})
        assert jobs.updates(recipe, arm) == expected


@pytest.mark.slow
def test_from_training_a_classifier_to_the_report(tmp_path):
    model = {"kind": "resnet", "image": IMAGE, "classes": 10, "depth": 8, "width": 4, "mean": [0.3], "std": [0.37]}
    train = {"model": model, "steps": 60, "batch": 64, "lr": 1e-2, "warmup": 5, "augment": {"shift": 1}}
    content = RECIPE | {"teacher": {"kind": "trained"}, "train": train, "student": {"width": 2}, "seeds": [0, 1]}
    recipe = config.check(content)
    with pytest.raises(BadInput, match="surrogate: kind ancestral draws from the teacher's own prior, but a ResNet does not generate"):
        pipeline.execute(recipe, tmp_path, quiet=True)
    pipeline.execute(recipe, tmp_path, ("train",), quiet=True)
    held_out = json.loads((tmp_path / "train" / "held_out.json").read_text())
    source = config.check({"name": "elsewhere", "teacher": write_vae(tmp_path / "vae"), "surrogate": {"n": 32}})
    pipeline.execute(source, tmp_path / "elsewhere", quiet=True)
    shutil.copytree(tmp_path / "elsewhere" / "surrogate", tmp_path / "surrogate")
    weights = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    pipeline.execute(recipe, tmp_path, ("distill", "evaluate", "report"), quiet=True)
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == weights
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["compared"] == "accuracy"
    assert metrics["reference"] | {"n": 0} == {"kind": "data", "data": "digits (seed 0)", "n": 0, "features": None, "floor": {}}
    costs = {"latency_ms_b1", "latency_ms_b64", "latency_iqr_ms_b1", "latency_iqr_ms_b64", "throughput", "params", "size_mib"}
    assert all(set(arm) == {"accuracy", *costs} for arm in metrics["arms"].values())
    assert metrics["arms"]["teacher"]["accuracy"] == {"mean": pytest.approx(held_out["accuracy"]), "sd": 0.0}
    assert held_out["accuracy"] > 0.5
    test = load(recipe.data).test
    for arm in ("student_data_free", "student_scratch"):
        figures = []
        for seed in (0, 1):
            net = ResNet.from_pretrained(tmp_path / "students" / arm / f"seed-{seed}").eval()
            labels = net((torch.from_numpy(test.images).float() / 255 - 0.3) / 0.37).argmax(1).numpy()
            figures.append((labels == test.labels).mean())
        found = metrics["arms"][arm]["accuracy"]
        assert found["mean"] == pytest.approx(sum(figures) / 2)
        assert found["sd"] == pytest.approx(abs(figures[0] - figures[1]) / 2**0.5)
    notes = {name: about["note"] for name, about in metrics["arms_info"].items()}
    assert notes["student_data_free"] == "surrogate images; 3 infer updates"
    assert notes["student_scratch"] == "cross-entropy of the labels of real images, no teacher; 3 scratch updates"
    page = (tmp_path / "report.html").read_text()
    assert "Accuracy" in page
    assert "Classification timed" in page
    assert "distances on features" not in page


@pytest.mark.slow
def test_an_autoencoder_without_a_generator_phase_is_compared_by_its_reconstructions(tmp_path):
    sections = {"teacher": write_vae(tmp_path / "vae"), "student": {"width": 2}, "surrogate": {"n": 32}, "arms": ["data_free", "scratch"]}
    pipeline.execute(config.check(RECIPE | sections), tmp_path / "run", quiet=True)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["compared"] == "reconstruction_mse"
    assert all({"frechet", "reconstruction_mse"} < set(arm) for arm in metrics["arms"].values())
    assert metrics["reference"]["features"] == "pixels"
    assert "Reconstruction MSE from zero" in (tmp_path / "run" / "report.html").read_text()


def test_cross_entropy_takes_each_image_with_its_own_label(tmp_path):
    shop = workshop(tmp_path, arms=["scratch"])
    student = shop.student(jobs.jobs(shop.recipe)[0])
    phase = jobs._from_scratch(shop, student, None, config.Scratch(batch=8), "scratch", True, shop.real.train)("scratch")
    index = torch.tensor([5, 0, 9])
    student.net.eval()
    batch = jobs.Batch(Noise().at(range(3)), index, 3, 0)
    train = shop.real.train
    expected = F.cross_entropy(
        student.net(torch.from_numpy(train.images)[index].float() / 255), torch.from_numpy(train.labels)[index], reduction="none"
    )
    assert torch.allclose(total(phase.loss(phase.objective, batch)), expected, atol=1e-6)
