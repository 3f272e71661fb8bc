"""Checkpoints of other projects: what they hold becomes a model, and what they should not hold is refused unread."""

from __future__ import annotations

import argparse
import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Categorical

from potstill import build, config
from potstill.cli import main
from potstill.doctor import examine
from potstill.errors import BadInput, BrokenFile
from potstill.families.lvae import LVAE
from potstill.importers import kd4dgm, pythae, read_checkpoint, transformers_classifier
from potstill.model import Images
from potstill.noise import FixedNoise, Noise
from potstill.trace import run

GOLDEN = Path(__file__).parent / "golden" / "lvae.safetensors"


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


# ------------------------------------------------------------------ files that torch.save wrote


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t,
        lambda t: OrderedDict(t),
        lambda t: {"state_dict": t, "epoch": 3},
        lambda t: {"model_state_dict": t},
        lambda t: {"epoch": 3, "model": {"state_dict": t}},
        lambda t: {f"module.{k}": v for k, v in t.items()},
        lambda t: {"state_dict": {f"module.{k}": v for k, v in t.items()}, "arch": "x"},
    ],
)
def test_a_state_dict_is_found_wherever_it_is(tmp_path, wrap):
    tensors = {"a.weight": torch.rand(2, 3), "module_b": torch.arange(4)}
    torch.save(wrap(tensors), tmp_path / "x.pth.tar")
    found = read_checkpoint(tmp_path / "x.pth.tar")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], t) for k, t in tensors.items())


class Evil:
    def __reduce__(self):
        return (os.abort, ())


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "x.pth.tar"

    def refused(content, expected):
        torch.save(content, path)
        with pytest.raises(BrokenFile, match=expected):
            read_checkpoint(path)

    weights = {"a": torch.zeros(2)}
    refused(
        {"state_dict": weights, "args": argparse.Namespace(lr=1)}, r"holds a argparse.Namespace, and reading it could run code; save the"
    )
    refused({"state_dict": weights, "evil": Evil()}, r"holds a posix.abort, and reading it could run code")
    refused(nn.Linear(1, 1), r"holds a torch.nn.modules.linear.Linear")
    refused({"epoch": 3, "loss": 0.5}, "a state dict of tensors is expected, also under .* it holds a mapping with epoch, loss")
    refused(torch.zeros(3), "it holds a Tensor")
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BrokenFile, match=r"not a file that torch.save wrote, or not whole"):
        read_checkpoint(path)
    with pytest.raises(BrokenFile, match=r"nope\.pth: no such file"):
        read_checkpoint(tmp_path / "nope.pth")


# ------------------------------------------------------------------ the published code


def test_a_published_checkpoint_gives_the_published_values(tmp_path):
    tensors = load_file(GOLDEN)
    torch.save({k.removeprefix("teacher."): t for k, t in tensors.items() if k.startswith("teacher.")}, tmp_path / "x-model.pth.tar")
    net = kd4dgm(tmp_path / "x-model.pth.tar")
    assert (net.image, net.width, net.levels, net.latent) == ((3, 32, 32), 16, 5, 16)
    noise = FixedNoise({f"z{i}": tensors[f"noise.{i}"] for i in range(1, 6)})
    with torch.no_grad():
        mean = run(net.generate, noise=noise, n=len(tensors["noise.1"])).out.dist.mean
    assert torch.allclose(mean, tensors["teacher_mean"], rtol=1e-5, atol=1e-5)
    assert not net.training


@pytest.mark.parametrize(
    ("image", "levels"), [((3, 64, 64), 5), ((3, 32, 32), 2), ((1, 8, 8), 1), ((1, 8, 8), 3), ((1, 28, 28), 3), ((2, 5, 12), 2)]
)
def test_every_shape_of_it_is_seen_in_its_weights(tmp_path, image, levels):
    net = seeded(lambda: LVAE(image, 4, levels, 3))
    torch.save({"state_dict": {f"module.{k}": t for k, t in net.state_dict().items()}}, tmp_path / "x.pth.tar")
    square = image[1] == image[2] and image[1].bit_count() == 1
    found = kd4dgm(tmp_path / "x.pth.tar", None if square else image, 0.5)
    assert (found.image, found.width, found.levels, found.latent, found.std) == (image, 4, levels, 3, 0.5)
    assert all(torch.equal(t, found.state_dict()[k]) for k, t in net.state_dict().items())


def test_a_published_checkpoint_that_is_none(tmp_path):
    path = tmp_path / "x.pth.tar"
    net = seeded(lambda: LVAE((3, 32, 32), 4, 5, 3))
    weights = net.state_dict()
    torch.save({k: v for k, v in weights.items() if not k.startswith("d3")}, path)
    with pytest.raises(BadInput, match=r"it lacks d3.net.0.bn1.bias \(4,\), (d3\S+ \(4,\),? ){4}and \d+ more"):
        kd4dgm(path)
    with pytest.raises(BadInput, match="not the weights of this LVAE"):
        kd4dgm(path, (3, 64, 64))
    torch.save({"fc.weight": torch.zeros(2, 3)}, path)
    with pytest.raises(
        BadInput, match=r"only an LVAE of KD4DGM is known by its weights, u1.0.weight and so on; here are fc.weight \(2, 3\)"
    ):
        kd4dgm(path)


# ------------------------------------------------------------------ pythae


class PythaeEncoder(nn.Module):
    """As pythae's own, written after its published layout: ``layers.0.0``, ``embedding``, ``log_var``."""

    def __init__(self, pixels, latent):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(pixels, 512), nn.ReLU())])
        self.embedding, self.log_var = nn.Linear(512, latent), nn.Linear(512, latent)

    def forward(self, x):
        h = self.layers[0](x.flatten(1))
        return {"embedding": self.embedding(h), "log_covariance": self.log_var(h)}


class PythaeDecoder(nn.Module):
    def __init__(self, pixels, latent, shape):
        super().__init__()
        first = nn.Sequential(nn.Linear(latent, 512), nn.ReLU())
        self.layers, self.shape = nn.ModuleList([first, nn.Sequential(nn.Linear(512, pixels), nn.Sigmoid())]), shape

    def forward(self, z):
        return {"reconstruction": self.layers[1](self.layers[0](z)).view(-1, *self.shape)}


@pytest.fixture
def saved(tmp_path):
    encoder, decoder = seeded(lambda: (PythaeEncoder(48, 5), PythaeDecoder(48, 5, (3, 4, 4))))
    weights = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).state_dict()
    torch.save({"model_state_dict": weights}, tmp_path / "model.pt")
    described = {"name": "VAEConfig", "input_dim": [3, 4, 4], "latent_dim": 5, "reconstruction_loss": "mse", "uses_default_encoder": True}
    (tmp_path / "model_config.json").write_text(json.dumps(described))
    return tmp_path, encoder, decoder


@torch.no_grad()
def test_pythaes_own_networks_need_no_code(saved):
    folder, encoder, decoder = saved
    model, x = pythae(folder), torch.rand(6, 3, 4, 4)
    trace = run(model.infer, x, noise=Noise())
    assert torch.allclose(trace["z"].dist.loc, encoder(x)["embedding"])
    assert torch.allclose(trace["z"].dist.scale, (encoder(x)["log_covariance"] / 2).exp())
    assert torch.allclose(trace.out.dist.mean, decoder(trace["z"].value)["reconstruction"])
    assert trace.out.dist.scale.unique().tolist() == [1.0]
    assert examine(model.frozen()) == []


@torch.no_grad()
def test_other_networks_of_pythae_are_given_as_modules(saved):
    folder, _, decoder = saved
    fresh = seeded(lambda: (PythaeEncoder(48, 5), PythaeDecoder(48, 5, (3, 4, 4))), 1)
    model = pythae(folder, *fresh, images=Images((3, 4, 4)), std=0.5)
    x = torch.rand(6, 3, 4, 4)
    assert torch.equal(model.reconstruct(x, Noise()), pythae(folder).reconstruct(x, Noise()))
    with pytest.raises(BadInput, match=r"encoder.embedding.weight is \(5, 512\), but this ModuleDict has \(4, 512\)"):
        pythae(folder, PythaeEncoder(48, 4), decoder)
    torch.save({"model_state_dict": {"encoder.conv.weight": torch.zeros(1)}}, folder / "model.pt")
    with pytest.raises(BadInput, match="its encoder is not pythae's dense one; give encoder and decoder"):
        pythae(folder)


def test_a_pythae_folder_without_a_shape(saved):
    (saved[0] / "model_config.json").write_text(json.dumps({"input_dim": None}))
    with pytest.raises(BadInput, match=r"model_config.json: input_dim is None; \[C, H, W\] is expected"):
        pythae(saved[0])


# ------------------------------------------------------------------ transformers


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    described = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=4, **sizes)
    net = seeded(lambda: transformers.ViTForImageClassification(described)).eval()
    net.save_pretrained(folder)
    return folder, net


def preprocessor(folder, **settings):
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


NORMAL = {"do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.5]}


@torch.no_grad()
def test_a_classifier_of_transformers(vit):
    folder, net = vit
    preprocessor(folder, size={"height": 16, "width": 16}, **NORMAL)
    model, x = transformers_classifier(str(folder)), torch.rand(3, 3, 16, 16)
    assert model.images == Images((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.5))
    out = run(model.infer, model.images.encode(x), noise=Noise()).out.dist
    assert isinstance(out, Categorical)
    mean, std = (torch.tensor(NORMAL[k]).view(3, 1, 1) for k in ("image_mean", "image_std"))
    assert torch.allclose(out.logits, net((x - mean) / std).logits.log_softmax(-1), atol=1e-5)
    assert examine(model.frozen()) == []
    section = config.Transformers(kind="transformers", path=str(folder), mean=(0.5,), std=(0.5,))
    assert build.teacher(section, Path(), ()).images == Images((3, 16, 16), (0.5,), (0.5,))


@pytest.mark.parametrize(
    ("told", "images"),
    [
        ({"size": 16}, Images((3, 16, 16), (0.5, 0.4, 0.3), (0.2, 0.3, 0.5))),
        ({"size": {"shortest_edge": 24}, "do_center_crop": True, "crop_size": {"height": 16, "width": 12}}, (3, 16, 12)),
        ({"size": {"shortest_edge": 24}, "crop_size": 16}, (3, 16, 16)),
        ({"size": {"shortest_edge": 24}, "do_center_crop": False, "crop_size": 16}, (3, 24, 24)),
        ({"size": 16, "do_normalize": False}, Images((3, 16, 16), (0.0,), (1.0,))),
        ({"size": 16, "do_rescale": False}, Images((3, 16, 16), (0.5 / 255, 0.4 / 255, 0.3 / 255), (0.2 / 255, 0.3 / 255, 0.5 / 255))),
        ({"size": 16, "do_normalize": False, "do_rescale": False}, Images((3, 16, 16), (0.0,), (1 / 255,))),
    ],
)
def test_what_a_preprocessor_says_of_its_images(vit, told, images):
    folder, _ = vit
    preprocessor(folder, **(NORMAL | told))
    found = transformers_classifier(str(folder)).images
    if isinstance(images, tuple):
        assert found.shape == images
        return
    assert found.shape == images.shape
    assert found.mean == pytest.approx(images.mean)
    assert found.std == pytest.approx(images.std)


def test_a_classifier_that_cannot_be_had(vit, tmp_path):
    folder, _ = vit
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    with pytest.raises(BadInput, match="does not say the mean and std of its images; give them"):
        transformers_classifier(str(folder))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(BadInput, match="no image classifier that transformers can load"):
        transformers_classifier(str(tmp_path))


# ------------------------------------------------------------------ by a recipe


def test_each_is_a_kind_of_teacher(place, capsys):
    net = seeded(lambda: LVAE((1, 8, 8), 4, 2, 2, 0.1))
    torch.save(net.state_dict(), place.folder / "model.pth.tar")
    assert place.run("synthesize", teacher={"kind": "kd4dgm", "path": "model.pth.tar", "std": 0.1}) == 0
    for kind in ("kd4dgm", "pythae"):
        capsys.readouterr()
        assert main(["synthesize", str(place.write(teacher={"kind": kind, "path": "nope"})), "--out", "other"]) == 2
        assert "no such file" in capsys.readouterr().err
