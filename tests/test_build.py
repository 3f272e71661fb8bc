"""From a recipe to objects."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Normal

from potstill import build, config
from potstill.divergence import hinton, wasserstein2
from potstill.errors import BadInput
from potstill.evaluate.cost import parameters
from potstill.families.classifier import Classifier, ResNet
from potstill.families.gan import GAN
from potstill.families.lvae import LVAE
from potstill.families.vae import VAE
from potstill.state import digest_of, write_tensors

NETS = [
    config.LVAENet(kind="lvae", image=(1, 8, 8), width=4, levels=2, latent=2),
    config.VAENet(kind="vae", image=(1, 8, 8), width=4, latent=2),
    config.GANNet(kind="gan", image=(1, 8, 8), width=4, latent=2, classes=3, encoder=True),
    config.GANNet(kind="gan", image=(3, 7, 5), width=4, latent=2, arch="mlp"),
    config.ClassifierNet(kind="classifier", image=(1, 8, 8), classes=3, width=4),
    config.ResNetNet(kind="resnet", image=(1, 8, 8), classes=3, depth=8, width=4, mean=(0.25,), std=(0.5,)),
]


def small(seed=0):
    return build.born(seed, "net", lambda: LVAE((1, 8, 8), 4, 2, 2))


def test_a_model_is_shown_in_a_line():
    model = small().model()
    assert repr(model) == f"Model(LVAE, {parameters(model.net):,} parameters, images 1x8x8)"


@pytest.mark.parametrize("noise", [0, 7, "0", None])
def test_a_seed_alone_is_no_noise(noise):
    model = small().model()
    expected = rf"found a value of type {type(noise).__name__}; pass Noise\(\({noise if isinstance(noise, int) else 0},\)\)"
    with pytest.raises(TypeError, match=expected):
        model.sample(4, noise)
    with pytest.raises(TypeError, match=expected):
        model.reconstruct(torch.zeros(1, 1, 8, 8), noise)


def test_fresh_weights_come_from_the_seed_and_the_name_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a = small()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    digests = [digest_of(net) for net in (a, small(), small(1), build.born(0, "other", lambda: LVAE((1, 8, 8), 4, 2, 2)))]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_digest_sees_classes_names_types_and_values():
    class Other(LVAE):
        pass

    net, other = small(), build.born(0, "net", lambda: Other((1, 8, 8), 4, 2, 2))
    changed = small()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-6
    assert len({digest_of(n) for n in (net, other, changed, small().double())}) == 4


@pytest.mark.parametrize("section", NETS, ids=lambda s: s.kind)
def test_what_is_saved_is_loaded(tmp_path, section):
    net = build.born(0, "net", lambda: build.network(section))
    net.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["family"] == section.kind
    found = build.pretrained(str(tmp_path))
    assert type(found) is type(net)
    assert digest_of(found) == digest_of(net)
    assert not found.training


@pytest.mark.parametrize("name", sorted(path.parent.name for path in build.ZOO.glob("*/model.safetensors")))
def test_every_model_of_the_zoo_loads(name):
    net = build.pretrained(f"zoo:{name}")
    if isinstance(net, Classifier):
        assert net(torch.zeros(2, *net.image)).isfinite().all()
    else:
        model = build.teacher(config.Pretrained(kind="pretrained", path=f"zoo:{name}"), Path("nowhere"), ())
        assert not any(p.requires_grad for p in model.net.parameters())


@pytest.mark.parametrize(
    "net",
    [
        LVAE((1, 8, 8), 32, 3, 4),
        VAE((1, 8, 8), 24, 4),
        GAN((1, 8, 8), 16, 4),
        GAN((1, 8, 8), 24, 4, 10, "mlp"),
        Classifier((1, 8, 8), 10, 16),
        ResNet((1, 8, 8), 10, 8, 16),
    ],
    ids=["lvae", "vae", "gan", "gan mlp", "classifier", "resnet"],
)
@pytest.mark.parametrize("ratio", [1.5, 4, 12, 1e6])
def test_the_width_for_a_ratio_is_the_nearest(net, ratio):
    goal = parameters(net) / ratio
    sizes = {width: parameters(net.shrunk(width)) for width in range(1, net.width + 1)}
    found = build.width_for(net, ratio)
    assert abs(sizes[found] - goal) == min(abs(size - goal) for size in sizes.values())


def test_a_student_by_width_and_by_ratio():
    teacher = LVAE((1, 8, 8), 16, 2, 4).model()
    for section in (config.Student(width=4), config.Student(ratio=12.0)):
        student = build.student(section, teacher, 3, ())
        assert parameters(student.net) < parameters(teacher.net) / 8
        again, other = (build.student(section, teacher, seed, ()) for seed in (3, 4))
        assert digest_of(student.net) == digest_of(again.net) != digest_of(other.net)


def test_weights_that_are_missing_or_unknown_are_named_with_their_shapes(tmp_path):
    net = small()
    tensors = {f"model.{name}" if name.startswith("d1") else name: t for name, t in net.state_dict().items() if name != "u2.out.weight"}
    write_tensors(tmp_path / "w.safetensors", tensors)
    with pytest.raises(BadInput) as caught:
        build.load_weights(net, tmp_path / "w.safetensors")
    lacks, _, unknown = str(caught.value).partition("it lacks ")[2].partition(" and has unknown ")
    assert lacks.startswith("d1.net.0.bn1.bias (4,), d1.net.0.bn1.running_mean (4,), ")
    missing = [name for name in net.state_dict() if name.startswith("d1") and "num_batches" not in name] + ["u2.out.weight"]
    assert lacks.endswith(f" and {len(missing) - 5} more")
    assert lacks.count(", d1.") == 4
    assert unknown.startswith("model.d1.net.0.bn1.bias (4,), ")
    assert "u2" not in unknown


def test_the_student_of_a_gan_gets_an_encoder_where_it_is_asked_for():
    plain, full = GAN((1, 8, 8), 16, 4), GAN((1, 8, 8), 16, 4, encoder=True)
    without, given = (build.student(config.Student(width=4, encoder=encoder), plain.model(), 0, ()) for encoder in (False, True))
    assert without.infer is None
    assert given.infer is not None
    assert build.student(config.Student(width=4), full.model(), 0, ()).infer is not None
    # A ratio counts all that the student is.
    for encoder in (False, True):
        student = build.student(config.Student(ratio=6, encoder=encoder), plain.model(), 0, ())
        sizes = [parameters(plain.shrunk(student.net.width + step, encoder)) for step in (-1, 0, 1)]
        assert min(sizes, key=lambda size: abs(size - parameters(plain) / 6)) == parameters(student.net) == sizes[1]
    with pytest.raises(BadInput, match=r"student\.encoder: is for the student of a GAN; that of a LVAE"):
        build.student(config.Student(width=2, encoder=True), small().model(), 0, ())


def test_rules_become_functions():
    recipe = [config.Rule(nodes="z*", by="wasserstein2", weight=2.0, reduce="mean"), config.Rule(by="hinton", temperature=4.0)]
    first, second = build.rules(recipe)
    assert (first.nodes, first.by, first.weight, first.reduce) == ("z*", wasserstein2, 2.0, "mean")
    p, q = (Categorical(logits=torch.randn(5, 3)) for _ in range(2))
    assert torch.equal(second.by(p, q), hinton(4.0)(p, q))


@pytest.mark.parametrize("by", ["kl", "reverse_kl", "wasserstein2", "mse"])
def test_every_divergence_has_its_name(by):
    (rule,) = build.rules([config.Rule(by=by)])
    p, q = Normal(torch.zeros(2, 3), torch.ones(2, 3)), Normal(torch.ones(2, 3), 2 * torch.ones(2, 3))
    expected = {"kl": 3 * (torch.tensor(2.0).log() + 2 / 8 - 0.5), "reverse_kl": 3 * (-torch.tensor(2.0).log() + 5 / 2 - 0.5)}
    expected |= {"wasserstein2": torch.tensor(6.0), "mse": torch.tensor(3.0)}
    assert torch.allclose(rule.by(p, q), expected[by].expand(2))


def test_features_have_the_fingerprint_of_their_network(tmp_path):
    cpu, shape = torch.device("cpu"), (1, 8, 8)
    train = np.zeros((2, *shape), np.uint8)
    nets = [build.born(seed, "judge", lambda: Classifier(shape, 3, 2)) for seed in (0, 1)]
    for i, net in enumerate(nets):
        net.save_pretrained(tmp_path / str(i))
    found = [build.features(f"classifier:{tmp_path / name}", cpu, (), 4, train) for name in "010"]
    assert found[0].digest == found[2].digest != found[1].digest
    x = torch.rand(6, *shape)
    assert torch.allclose(torch.from_numpy(found[0].of(x)), nets[0].eval().features(x), atol=1e-6)
    net = build.born(0, "judge", lambda: ResNet(shape, 3, 8, 2, (0.5,), (0.25,)))
    net.save_pretrained(tmp_path / "resnet")
    seen = build.features(f"classifier:{tmp_path / 'resnet'}", cpu, (), 4, train).of(x)
    assert torch.allclose(torch.from_numpy(seen), net.eval().features((x - 0.5) / 0.25), atol=1e-6)
    assert build.features("pixels", cpu, (), 4, train).of(x).shape == (6, 64)
    with pytest.raises(BadInput, match=r"evaluate\.features: features 'pixels': found images in"):
        build.features("pixels", cpu, (), 4, train).of(2 + x)


@pytest.mark.parametrize(
    ("content", "expected"), [("150000 100000", 1), ("400000 100000", 4), ("max 100000", 64), ("odd", 64), ("50000 100000", 1)]
)
def test_the_cores_of_a_container(monkeypatch, content, expected):
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda _: content)
    assert build.cores() == expected


def test_a_student_of_another_architecture():
    teacher = VAE((1, 8, 8), 8, 3).model().frozen()
    section = config.Student.model_validate({"net": {"kind": "vae", "image": [1, 8, 8], "width": 2, "latent": 3}})
    student = build.student(section, teacher, 0, ())
    assert isinstance(student.net, VAE)
    assert (student.net.width, student.net.latent) == (2, 3)
    assert "net" in section.model_dump()
    assert "net" not in config.Student(width=2).model_dump()  # what was hashed of a recipe stays as it was
    other = config.Student.model_validate({"net": {"kind": "vae", "image": [1, 4, 4], "width": 2, "latent": 3}})
    with pytest.raises(BadInput, match=r"student: makes images of \(1, 4, 4\), the teacher of \(1, 8, 8\)"):
        build.student(other, teacher, 0, ())


def test_weights_of_ones_own_network_are_told_from_a_folder_of_ours(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match=r"no config\.json, so the weights are of a network of your own"):
        build.load(tmp_path)


def test_what_a_function_of_ones_own_is_not_given_is_told(tmp_path, monkeypatch):
    (tmp_path / "narrow.py").write_text("def student(width):\n    return width\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert build.resolve("narrow:student", ["narrow"], width=3) == 3
    for arguments, said in (({}, "missing a required argument: 'width'"), ({"wide": 3}, "missing a required argument: 'width'")):
        with pytest.raises(BadInput, match=f"narrow:student: {said}; it is called with what the recipe has as arguments"):
            build.resolve("narrow:student", ["narrow"], **arguments)
