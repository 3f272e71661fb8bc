"""What every family promises, over image sizes and depths: shapes, rows, replay, gradients, precisions, saving."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal

from potstill import build
from potstill.divergence import Match, compare, negative_elbo, total
from potstill.families.blocks import Down, Up
from potstill.families.classifier import Classifier, ResNet
from potstill.families.lvae import LVAE
from potstill.families.vae import VAE
from potstill.noise import Noise
from potstill.trace import run

LEVELS = {
    (1, 8, 8): (1, 2, 3),
    (1, 16, 16): (1, 2, 4),
    (1, 28, 28): (1, 3, 5),
    (2, 5, 12): (1, 2, 4),
    (3, 32, 32): (1, 4, 5),
    (3, 64, 64): (2, 5, 6),
}
LVAES = {
    f"lvae {height}x{width} {levels}": functools.partial(LVAE, (channels, height, width), 8, levels, 3, 0.3)
    for (channels, height, width), choices in LEVELS.items()
    for levels in choices
}
VAES = {
    f"vae {height}x{width}": functools.partial(VAE, (channels, height, width), 8, 5, 0.2)
    for channels, height, width in [(1, 8, 8), (1, 28, 28), (2, 5, 12), (3, 32, 32), (3, 64, 64)]
}
CLASSIFIERS = {
    f"classifier {height}x{width}": functools.partial(Classifier, (channels, height, width), 7, 4)
    for channels, height, width in [(1, 8, 8), (1, 28, 28), (2, 5, 12), (3, 32, 32)]
}
CLASSIFIERS |= {
    f"resnet {height}x{width}": functools.partial(ResNet, (channels, height, width), 7, 14, 4, mean, (0.3,))
    for channels, height, width, mean in [(1, 8, 8, (0.5,)), (2, 5, 12, (0.4, 0.6)), (3, 64, 64, (0.5,))]
}
GENERATORS = {**LVAES, **VAES}
ALL = {**GENERATORS, **CLASSIFIERS}
N = 5


@functools.cache
@torch.no_grad()
def _born(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = ALL[name]()
    # At birth a deep generator's images are all but the same; with BatchNorm statistics of its own they differ as a trained one's do.
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    run(net.infer, images(net, 32), noise=Noise())
    if name in GENERATORS:
        run(net.generate, noise=Noise(), n=32)
        last = net.up.out if isinstance(net, VAE) else net.d0.out
        last.weight *= 0.3 / run(net.eval().generate, noise=Noise(), n=32).out.dist.mean.std(0).mean()
    for norm in norms:
        norm.momentum = 0.1
    return net


def network(name):
    return copy.deepcopy(_born(name)).eval()


def images(net, n=N):
    return Noise((5,)).uniform("x", (n, *net.image))


def latents_of(net):
    """Names and shapes of the latents, in order."""
    if isinstance(net, VAE):
        return {"z": (net.latent,)}
    heights = {net.levels: (1, 1)}
    height, width = net.image[1:]
    for level in range(1, net.levels):
        height, width = (height + 1) // 2, (width + 1) // 2
        heights[level] = (height, width)
    return {f"z{level}": (net.latent, *heights[level]) for level in range(net.levels, 0, -1)}


def same_state(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", GENERATORS)
@torch.no_grad()
def test_shapes_and_ranges(name):
    net = network(name)
    model = net.model()
    assert model.images.shape == net.image
    assert model.net is net
    generated, inferred = run(model.generate, noise=Noise(), n=N), run(model.infer, images(net), noise=Noise())
    for trace in (generated, inferred):
        assert {k: tuple(node.value.shape) for k, node in trace.items()} == {
            **{k: (N, *shape) for k, shape in latents_of(net).items()},
            "out": (N, *net.image),
        }
        assert all(isinstance(node.dist, Normal) and (node.dist.scale > 0).all() for node in trace.values())
        assert trace.out.dist.scale.unique().tolist() == [pytest.approx(net.std)]
    top = generated[next(iter(generated))].dist
    assert (top.loc == 0).all()
    assert (top.scale == 1).all()
    for x in (model.sample(N, Noise()), model.reconstruct(images(net), Noise())):
        assert x.shape == (N, *net.image)
        assert x.dtype == torch.float32
        assert x.min() >= 0
        assert x.max() <= 1
        assert x.std() > 0.01
    assert not torch.equal(model.sample(N, Noise()), model.sample(N, Noise((1,))))


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_a_classifier_gives_a_distribution_over_its_classes(name):
    net = network(name)
    model = net.model()
    trace = run(model.infer, images(net), noise=Noise())
    assert list(trace) == ["out"]
    assert isinstance(trace.out.dist, Categorical)
    assert trace.out.dist.probs.shape == (N, 7)
    assert torch.allclose(trace.out.dist.logits, net(images(net)).log_softmax(1), atol=1e-6)
    assert net.features(images(net)).shape == (N, 16)
    head = net.head if isinstance(net, Classifier) else net.linear
    assert torch.allclose(head(net.features(images(net))), net(images(net)))
    assert trace.output.shape == (N,)
    for missing in ("generate", "link", "train"):
        with pytest.raises(ValueError, match=f"{type(net).__name__} has no program '{missing}'"):
            model.program(missing)


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(name):
    net = network(name)
    model = net.model()
    x = images(net)
    row = 3
    if name in GENERATORS:
        together, alone = model.sample(N, Noise().at(range(10, 10 + N))), model.sample(1, Noise().at([10 + row]))
        assert (together[row] - alone[0]).abs().max() < 1e-4  # convolutions of other batches add up in another order
        assert (together[row] - together[0]).abs().max() > 1e-2
    together, alone = (run(model.infer, x[part], noise=Noise().at(rows)) for part, rows in ((slice(None), range(N)), ([row], [row])))
    for k in together:
        assert (together[k].value[row] - alone[k].value[0]).abs().max() < 1e-3
    if name in CLASSIFIERS:
        assert (together.out.dist.logits[row] - alone.out.dist.logits[0]).abs().max() < 1e-5


@pytest.mark.parametrize("name", GENERATORS)
@torch.no_grad()
def test_replaying_its_own_values_changes_nothing(name):
    net = network(name)
    for program, inputs in ((net.generate, ()), (net.infer, (images(net),))):
        trace = run(program, *inputs, noise=Noise(), n=N)
        for pattern in ("*", "z*", "z1", "out"):
            again = run(program, *inputs, noise=Noise((99,)) if pattern in ("*", "z*") else Noise(), n=N, given=trace.values_of(pattern))
            assert torch.equal(again.out.dist.mean, trace.out.dist.mean)
            if pattern == "*":
                assert torch.equal(again.output, trace.output)
            assert all(loss.tolist() == [0.0] * N for loss in compare(trace, again).values())


def without_gradient(net):
    return {k for k, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()}


@pytest.mark.parametrize("name", GENERATORS)
def test_gradients_of_the_image_reach_every_parameter(name):
    """Through every latent: what is inferred, and what is generated."""
    net = network(name).train()
    negative_elbo(run(net.infer, images(net), noise=Noise()), images(net))["out"].sum().backward()
    assert without_gradient(net) == set()
    net.zero_grad()
    still = copy.deepcopy(net).requires_grad_(False)
    compare(run(still.generate, noise=Noise((2,)), n=N), run(net.generate, noise=Noise(), n=N))["out"].sum().backward()
    encoder = {id(p) for module in net.encoder() for p in module.parameters()}
    assert without_gradient(net) == {k for k, p in net.named_parameters() if id(p) in encoder}


@pytest.mark.parametrize("name", ["lvae 8x8 1", "lvae 16x16 4", "vae 8x8"])
@torch.no_grad()
def test_no_std_falls_to_0_whatever_the_network_says(name):
    net = network(name)
    for module in net.modules():
        if isinstance(module, (Down, Up)):
            module.out.weight *= 1e6
    for program, inputs in ((net.generate, ()), (net.infer, (images(net),))):
        scales = torch.cat([node.dist.scale.flatten() for node in run(program, *inputs, noise=Noise(), n=N).latents().values()])
        assert scales.min() > 1e-7
    assert scales.min() < 2e-6


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_gradients_reach_every_parameter_of_a_classifier(name):
    net = network(name).train()
    run(net.infer, images(net), noise=Noise()).out.dist.log_prob(torch.arange(N)).sum().backward()
    assert without_gradient(net) == set()


@pytest.mark.parametrize("name", ["lvae 16x16 4", "lvae 32x32 5", "vae 8x8"])
def test_under_bfloat16_autocast_losses_are_finite_and_near(name):
    net = network(name)

    def losses():
        t, s = (run(net.generate, noise=Noise((seed,)), n=N) for seed in (1, 2))
        parts = negative_elbo(run(net.infer, images(net), noise=Noise()), images(net))
        return torch.cat([*compare(t, s, (Match("out"),)).values(), total(parts)])

    exact = losses()
    with torch.autocast("cpu", torch.bfloat16):
        assert run(net.generate, noise=Noise(), n=N).out.dist.mean.dtype == torch.bfloat16
        rough = losses()
    rough.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert torch.allclose(rough.float(), exact, rtol=0.1)


@pytest.mark.parametrize("name", ["lvae 16x16 4", "lvae 32x32 5", "vae 8x8", "classifier 8x8"])
@torch.no_grad()
def test_inference_of_a_network_in_bfloat16(name):
    exact = run(network(name).infer, images(network(name)), noise=Noise())
    net = network(name).to(torch.bfloat16)
    trace = run(net.infer, images(net).bfloat16(), noise=Noise())
    for k, node in trace.items():
        if isinstance(node.dist, Normal):
            assert node.value.dtype == torch.bfloat16
            assert (node.dist.mean - exact[k].dist.mean).norm() < 0.25 * exact[k].dist.mean.norm()
        else:
            assert (node.dist.logits - exact[k].dist.logits).abs().max() < 0.1


@pytest.mark.parametrize("name", ["lvae 8x8 2", "lvae 28x28 5", "lvae 64x64 5", "vae 5x12", "vae 32x32", "classifier 5x12", "resnet 5x12"])
def test_saving_and_loading_give_the_same_network(name, tmp_path):
    net = network(name)
    net.save_pretrained(tmp_path / "first")
    for loaded in (type(net).from_pretrained(tmp_path / "first"), build.pretrained(str(tmp_path / "first"))):
        assert type(loaded) is type(net)
        assert not loaded.training
        assert same_state(net.state_dict(), loaded.state_dict())
        for attribute in ("image", "width", "latent", "levels", "std", "sizes", "classes", "depth", "mean"):
            assert getattr(loaded, attribute, None) == getattr(net, attribute, None)
        loaded.save_pretrained(tmp_path / "second")
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
        x = images(net)
        assert torch.equal(*(run(m.infer, x, noise=Noise()).output for m in (net, loaded)))
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config["family"] == type(net).__name__.lower()
    assert config["image"] == list(net.image)


@pytest.mark.parametrize("name", ["lvae 8x8 2", "lvae 64x64 5", "vae 5x12", "classifier 5x12", "resnet 5x12"])
def test_shrunk_changes_the_width_alone(name):
    net = network(name)
    before = copy.deepcopy(net.state_dict())
    small = net.shrunk(3)
    assert type(small) is type(net)
    assert small.width == 3
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    for attribute in ("image", "latent", "levels", "std", "sizes", "classes", "depth", "mean"):
        assert getattr(small, attribute, None) == getattr(net, attribute, None)
    assert small.state_dict().keys() == net.state_dict().keys()
    assert same_state(before, net.state_dict())
    if name in GENERATORS:
        t, s = (run(m.eval().generate, noise=Noise(), n=2) for m in (net, small))
        assert set(compare(t, s)) == {*latents_of(net), "out"}


@pytest.mark.parametrize("name", GENERATORS)
def test_the_encoder_is_what_generating_does_not_use(name):
    net = network(name)
    encoder = {id(p) for module in net.encoder() for p in module.parameters()}
    run(net.generate, noise=Noise(), n=N).out.dist.mean.sum().backward()
    assert {id(p) for p in net.parameters() if p.grad is None} == encoder


@pytest.mark.parametrize(
    "arguments",
    [
        {"width": 0},
        {"width": -8},
        {"latent": 0},
        {"std": 0.0},
        {"std": -0.1},
        {"std": float("nan")},
        {"image": (0, 8, 8)},
        {"image": (1, 1, 1)},
        {"image": (1, 0, 8)},
        {"image": (1, 8, -8)},
    ],
)
@pytest.mark.parametrize("family", [LVAE, VAE])
def test_numbers_that_make_no_network_are_refused(family, arguments):
    with pytest.raises(ValueError, match=rf"{family.__name__}\(image=.*must be positive"):
        family(**{"image": (1, 8, 8), "width": 4, **({"levels": 1} if family is LVAE else {}), **arguments})


@pytest.mark.parametrize(("image", "levels", "most"), [((1, 8, 8), 0, 3), ((1, 8, 8), 4, 3), ((3, 32, 32), 6, 5), ((1, 28, 28), -1, 5)])
def test_levels_beyond_the_halvings_are_refused(image, levels, most):
    with pytest.raises(ValueError, match=rf"has 1 to {most} levels, not {levels}"):
        LVAE(image, 4, levels)


@torch.no_grad()
def test_the_published_layout_at_64_pixels():
    """Five levels at 64 pixels: the top level takes two halvings, so u5 and d4 hold four blocks where others hold two."""
    net = LVAE((3, 64, 64), width=4)
    blocks = {name: len(net.get_submodule(name).net) for name in ("u2", "u3", "u4", "u5", "d4", "d3", "d2", "d1", "d0", "u1.1")}
    assert blocks == {"u2": 2, "u3": 2, "u4": 2, "u5": 4, "d4": 4, "d3": 2, "d2": 2, "d1": 2, "d0": 2, "u1.1": 2}
    keys = net.state_dict().keys()
    for i in range(4):
        assert f"u5.net.{i}.conv1.weight" in keys
        assert f"d4.net.{i}.conv2.weight" in keys
        assert (f"u5.net.{i}.downsample.weight" in keys) == (f"d4.net.{i}.upsample.weight" in keys) == (i in (0, 2))
    assert {key.split(".")[0] for key in keys} == {"u1", "u2", "u3", "u4", "u5", "d0", "d1", "d2", "d3", "d4"}
    assert {k: tuple(v.shape[2:]) for k, v in run(net.eval().generate, noise=Noise()).values_of("z*").items()} == {
        "z5": (1, 1),
        "z4": (4, 4),
        "z3": (8, 8),
        "z2": (16, 16),
        "z1": (32, 32),
    }
