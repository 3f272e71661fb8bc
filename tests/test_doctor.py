"""The checker of models: each thing that it finds, in a model made wrong in that one way, and nothing in models that are right."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

from potstill import build
from potstill.cli import main
from potstill.doctor import examine, summary
from potstill.families.classifier import Classifier
from potstill.families.helmholtz import HelmholtzMachine
from potstill.families.lvae import LVAE
from potstill.families.vae import VAE
from potstill.families.vrnn import VRNN
from potstill.model import Images, Model

IMAGE = (1, 8, 8)


class Net(nn.Module):
    """A VAE in a style of its own: an encoder of means and log-variances, tanh images."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 8))
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 64), nn.Tanh(), nn.Unflatten(1, IMAGE))
        with torch.no_grad():
            self.decoder[2].weight *= 3
            self.encoder[4].weight *= 3

    def encode(self, x):
        mean, logvar = self.encoder(x).chunk(2, 1)
        return mean, logvar - 2


def made(seed=0, **parts):
    """The right model, with some of its parts exchanged: ``decode(net, z)``, ``posterior(net, x)``, ``generate``, ``infer``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = parts.get("net", Net)()

    def posterior(net, x):
        mean, logvar = net.encode(x)
        return Normal(mean, (logvar / 2).exp())

    decode = parts.get("decode", lambda net, z: Normal(net.decoder(z), 0.2))
    posterior = parts.get("posterior", posterior)
    generate = parts.get("generate", lambda net, sample: decode(net, sample.normal("z", (4,))))
    infer = parts.get("infer", lambda net, sample, x: decode(net, sample(parts.get("latent", "z"), posterior(net, x))))
    model = Model(
        net,
        parts.get("images", Images.between(IMAGE, -1, 1)),
        generate and (lambda sample: generate(net, sample)),
        infer and (lambda sample, x: infer(net, sample, x)),
    )
    if parts.get("frozen", True):
        model.frozen()
    return model


def classifier(forward, net=None, **images):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = net or nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    return Model(net.eval(), Images(IMAGE, **images), infer=lambda sample, x: forward(net, x))


def found(model):
    return {(f.check, f.program) for f in examine(model)}


def only(model, check, program, *texts):
    """The one finding is of that check and program, and says those texts."""
    findings = examine(model)
    assert [(f.check, f.program) for f in findings] == [(check, program)], [str(f) for f in findings]
    for text in texts:
        assert text in str(findings[0])
    assert "\n" not in str(findings[0])


# ------------------------------------------------------------------ nothing is wrong


RIGHT = {
    "own": made,
    "independent": lambda: made(decode=lambda net, z: Independent(Normal(net.decoder(z), 0.2), 3)),
    "point": lambda: made(decode=lambda net, z: net.decoder(z)),
    "gan": lambda: made(decode=lambda net, z: net.decoder(z), infer=None),
    "bernoulli": lambda: made(decode=lambda net, z: Bernoulli(logits=net.decoder(z)), images=Images(IMAGE)),
    "sigmoid": lambda: made(decode=lambda net, z: net.decoder(z).sigmoid(), images=Images(IMAGE)),
    "autoencoder": lambda: made(generate=None, infer=lambda net, sample, x: net.decoder(net.encode(x)[0])),
    "classifier": lambda: classifier(lambda net, x: Categorical(logits=net(x))),
    "zoo lvae": lambda: build.pretrained("zoo:digits-lvae").model().frozen(),
    "zoo classifier": lambda: build.pretrained("zoo:digits-classifier").model().frozen(),
}


@pytest.mark.parametrize("name", RIGHT)
def test_nothing_is_found_in_what_is_right(name):
    model = RIGHT[name]()
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    modes = [module.training for module in model.net.modules()]
    assert [str(f) for f in examine(model)] == []
    assert all(torch.equal(v, before[k]) for k, v in model.net.state_dict().items())
    assert [module.training for module in model.net.modules()] == modes
    assert len(summary(model)) == 1 + (model.generate is not None) + (model.infer is not None)


def test_of_a_long_chain_the_summary_has_the_first_nodes_and_the_last():
    def generate(sample):
        z = sample.normal("z0", (4,))
        for i in range(1, 30):
            z = sample(f"z{i}", Normal(z, 1.0))
        return z.view(-1, 1, 2, 2)

    model = Model(nn.Identity(), Images((1, 2, 2)), generate)
    line = summary(model)[1]
    assert line.startswith("generate: z0 Normal 4, z1 Normal 4, ")
    named = re.findall(r"(z\d+) ", line)
    assert line.endswith(f"{30 - len(named)} more, out Point 1x2x2")


@pytest.mark.parametrize("make", [lambda: LVAE(IMAGE, 8, 2, 4), lambda: VAE(IMAGE, 8, 4), lambda: Classifier(IMAGE, 4, 4)])
def test_a_fresh_network_has_learned_neither_a_range_nor_a_posterior(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert {check for check, _ in found(make().model().frozen())} <= {"range", "posterior"}


# ------------------------------------------------------------------ range


@pytest.mark.parametrize("make", [lambda: HelmholtzMachine(mean=(3.5, 71.0), scale=(1.1, 13.6)), lambda: VRNN((3, 4, 1), 5, 6, 2)])
def test_values_that_are_no_pixels_have_no_range_and_coins_no_gradient(make):
    torch.manual_seed(0)
    model = make().eval().model()
    assert not {finding.check for finding in examine(model)} & {"range", "gradient"}
    pictures = replace(model, images=replace(model.images, pixels=True))
    assert "range" in {finding.check for finding in examine(pictures)}


def test_tanh_images_taken_for_those_of_0_to_1():
    only(made(images=Images(IMAGE), infer=None), "range", "generate", "pixels from -", "Images.between(shape, -1, 1) would fit")


def test_images_between_two_values():
    x = torch.rand(2, *IMAGE)
    for low, high in ((-1.0, 1.0), (0.0, 255.0), (-0.5, 3.0)):
        images = Images.between(IMAGE, low, high)
        assert torch.allclose(images.encode(x), low + (high - low) * x, atol=1e-5 * high)
        assert torch.allclose(images.decode(images.encode(x)), x, atol=1e-6)
    with pytest.raises(ValueError, match="between 1 and 1"):
        Images.between(IMAGE, 1, 1)


def test_sigmoid_images_taken_for_those_of_a_tanh():
    model = made(decode=lambda net, z: (4 * net.decoder(z) - 2).sigmoid(), infer=None)
    only(model, "range", "generate", "pixels from 0.5", "Images.between(shape, 0, 1) would fit")


def test_images_of_0_to_255():
    model = made(decode=lambda net, z: 127.5 * (1 + net.decoder(z)), images=Images(IMAGE), infer=None)
    only(model, "range", "generate", "Images.between(shape, 0, 255) would fit")


def test_statistics_of_0_to_255():
    only(classifier(lambda net, x: Categorical(logits=net(x)), mean=(123.7,), std=(58.4,)), "range", "model", "divide both by 255")


def test_statistics_of_another_number_of_channels():
    model = classifier(lambda net, x: Categorical(logits=net(x.mean(1, keepdim=True))), mean=(0.5, 0.5), std=(0.5, 0.0))
    assert ("range", "model") in found(model)


# ------------------------------------------------------------------ std


def test_a_log_variance_taken_for_a_std():
    model = made(posterior=lambda net, x: Normal(*net.encode(x)))
    only(model, "std", "infer", "as a log-variance would be", "(log_variance / 2).exp()")
    unchecked = made(posterior=lambda net, x: Normal(*net.encode(x), validate_args=False))
    assert ("std", "infer") in found(unchecked)


def test_a_std_taken_for_a_log_variance():
    def posterior(net, x):
        mean, raw = net.encode(x)
        return Normal(mean, (F.softplus(raw) / 2).exp())

    only(made(posterior=posterior), "std", "infer", "wider than its prior for every image", "do not take exp()")


def test_an_absurd_std():
    model = made(decode=lambda net, z: Normal(net.decoder(z), torch.full((1,), 20.0).exp()), infer=None)
    only(model, "std", "generate", "goes up to 4.85e+08")


# ------------------------------------------------------------------ train mode


def test_batch_norm_left_in_train_mode():
    only(made(frozen=False), "train mode", "model", "encoder.2 is in train mode", "net.eval()")


def test_a_program_that_calls_train():
    def infer(net, sample, x):
        net.train()
        return Normal(net.decoder(sample("z", Normal(net.encode(x)[0], 0.5))), 0.2)

    findings = examine(made(infer=infer))
    assert findings[0].check == "train mode"
    assert "BatchNorm1d of it run in train mode" in str(findings[0])
    assert {f.check for f in findings} == {"train mode", "rows"}


def test_a_program_that_changes_statistics():
    def posterior(net, x):
        h = F.batch_norm(net.encoder[1](x.flatten(1)), net.encoder[2].running_mean, net.encoder[2].running_var, training=True)
        return Normal(net.encoder[4](h)[:, :4], 0.5)

    model = made(posterior=posterior)
    before = model.net.encoder[2].running_mean.clone()
    assert ("train mode", "infer") in found(model)
    assert "running it changes encoder.2.running_mean" in str(examine(model)[0])
    assert torch.equal(model.net.encoder[2].running_mean, before)


# ------------------------------------------------------------------ shapes


@pytest.mark.parametrize(
    ("decode", "texts"),
    [
        (lambda net, z: net.decoder(z).permute(0, 2, 3, 1), ["(8, 8, 8, 1)", "(8, 1, 8, 8)", ".permute(0, 3, 1, 2)"]),
        (lambda net, z: net.decoder(z).flatten(1), ["(8, 64)", "(8, 1, 8, 8)", ".view(-1, 1, 8, 8)"]),
        (lambda net, z: net.decoder(z[:1]), ["(1, 1, 8, 8)", "(8, 1, 8, 8)", "sample.n"]),
        (lambda net, z: net.decoder(z).expand(-1, 2, -1, -1), ["(8, 2, 8, 8)", "(8, 1, 8, 8)", "it has 2 channels"]),
        (lambda net, z: net.decoder(z)[..., :4], ["(8, 1, 8, 4)", "(8, 1, 8, 8)", "the shape in Images"]),
    ],
)
def test_another_shape(decode, texts):
    only(made(decode=decode, infer=None), "shape", "generate", *texts)


def test_logits_of_another_shape():
    only(classifier(lambda net, x: Categorical(logits=net(x)[:, None])), "shape", "infer", "(8, 1, 5)", "(8, classes)")


def test_latents_of_two_names_or_shapes():
    only(made(latent="code"), "names", "model", "infer names its latents code, and generate z")

    def infer(net, sample, x):
        z = sample("z", Normal(net.encode(x)[0][:, :, None], 0.5))
        return Normal(net.decoder(z[:, :, 0]), 0.2)

    only(made(infer=infer), "names", "model", "node 'z' is (4,) in generate and (4, 1) in infer")


# ------------------------------------------------------------------ noise and rows


@pytest.mark.parametrize(
    "decode",
    [
        lambda net, z: net.decoder(z + 0.01 * torch.randn_like(z)),
        lambda net, z: net.decoder(F.dropout(z, 0.5, training=True)),
        lambda net, z: Normal(net.decoder(z), 0.1 + 0.1 * torch.rand(())),
    ],
)
def test_randomness_of_its_own(decode):
    only(made(decode=decode, infer=None), "noise", "generate", "comes out otherwise the second time", "torch.randn or dropout")


def test_noise_that_is_not_used():
    only(made(decode=lambda net, z: net.decoder(0 * z), infer=None), "noise", "generate", "the same, whatever the noise")
    zeros = made(generate=lambda net, sample: net.decoder(torch.zeros(sample.n, 4)), infer=None)
    only(zeros, "noise", "generate", "draws no latent", "sample.normal")


def test_nodes_that_come_and_go():
    count = iter(range(100))

    def generate(net, sample):
        return net.decoder(sample.normal(f"z{next(count)}", (4,)))

    only(made(generate=generate, infer=None), "noise", "generate", "its nodes differ from run to run")


def test_rows_that_depend_on_their_batch():
    only(made(decode=lambda net, z: net.decoder(z - z.mean(0)), infer=None), "rows", "generate", "changes with the samples beside it")
    squeezed = made(decode=lambda net, z: net.decoder(z.squeeze()), infer=None)
    only(squeezed, "rows", "generate", "it fails for a single sample")


# ------------------------------------------------------------------ gradient


@pytest.mark.parametrize(
    ("forward", "text"),
    [
        (lambda net, x: net(x.detach()), "no gradient goes from out to the image"),
        (lambda net, x: torch.no_grad()(net)(x), "no gradient goes from out to the image"),
        (lambda net, x: net(torch.from_numpy(x.numpy())), "it fails when a gradient is asked for"),
        (lambda net, x: net((255 * x).round() / 255), "the gradient from out to the image is 0 everywhere"),
        (lambda net, x: net(x) + (0 * x).sqrt().sum((2, 3)), "the gradient from out to the image is NaN"),
    ],
)
def test_a_gradient_that_is_cut(forward, text):
    weights = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    weights.requires_grad_(False)
    model = classifier(lambda net, x: Categorical(logits=forward(net, x)), weights)
    assert text in "\n".join(map(str, examine(model)))
    assert found(model) <= {("gradient", "infer")}


def test_a_posterior_without_a_gradient():
    def infer(net, sample, x):
        z = sample("z", Normal(net.encode(x.detach())[0], 0.3))
        return Normal(net.decoder(z) + 0.01 * x, 0.2)

    only(made(infer=infer), "gradient", "infer", "from its latents to the image")


# ------------------------------------------------------------------ posterior


def test_a_posterior_that_has_collapsed():
    model = made(posterior=lambda net, x: Normal(1e-3 * net.encode(x)[0], 1.0))
    only(model, "posterior", "infer", "the same for every image", "train again on their sum")


def test_a_posterior_that_is_a_point():
    only(made(posterior=lambda net, x: Normal(net.encode(x)[0], 1e-6)), "posterior", "infer", "is a point", "without a distribution")


# ------------------------------------------------------------------ NaN, failures, parts outside


def test_nan():
    model = made(infer=None)
    with torch.no_grad():
        model.net.decoder[0].weight[0, 0] = float("nan")
    findings = examine(model)
    assert [f.check for f in findings] == ["finite"]
    only(made(decode=lambda net, z: net.decoder(z) / 0, infer=None), "finite", "generate", "at node 'out'")


def test_a_program_that_fails():
    def generate(net, sample):
        return net.decoder(sample.normal("z", (5,)))

    only(made(generate=generate, infer=None), "programs", "generate", "it fails: ", "called as generate(sample), here for 8 samples")
    only(Model(nn.Linear(1, 1), Images(IMAGE)), "programs", "model", "no program")


def test_a_part_that_is_not_in_the_network():
    outside = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    only(
        made(decode=lambda net, z: net.decoder(outside(z)), infer=None), "net", "generate", "BatchNorm1d, Linear", "no part of Model's net"
    )


def test_a_link_is_run_too():
    def link(sample, x):
        return sample("eps", Normal(torch.randn_like(x), 1.0))

    net = nn.Linear(1, 1)
    assert [(f.check, f.program) for f in examine(Model(net.eval(), Images(IMAGE), link=link))] == [("noise", "link")]


def test_too_few_samples():
    with pytest.raises(ValueError, match="n=1"):
        examine(made(), n=1)


# ------------------------------------------------------------------ the command

OWN = """
import torch
from torch.distributions import Normal
from potstill.model import Images, Model

def make(range_=1.0):
    net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Tanh(), torch.nn.Unflatten(1, (1, 8, 8)))
    with torch.no_grad():
        net[0].weight.copy_(torch.linspace(-3, 3, 256).view(64, 4))
    return Model(net, Images.between((1, 8, 8), -range_, range_), lambda sample: net(sample.normal("z", (4,))))
"""


@pytest.fixture
def own(place):
    (place.folder / "own.py").write_text(textwrap.dedent(OWN))
    return place


def test_the_command_on_what_is_right(own, capsys):
    recipe = own.write(teacher={"kind": "pretrained", "path": "zoo:digits-lvae"})
    for teacher in (str(recipe), "zoo:digits-classifier", str(build.locate("zoo:digits-classifier"))):
        assert main(["doctor", "--teacher", teacher]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines()[-1] == "nothing wrong was found"
        assert err == ""
    assert main(["doctor", "--teacher", "own:make", "--import", "own"]) == 0
    assert "generate: z Normal 4, out Point 1x8x8" in capsys.readouterr().out


def test_the_command_on_what_is_wrong(own, capsys):
    teacher = {"kind": "python", "target": "own:make", "arguments": {"range_": 0.2}}
    path = own.write(teacher=teacher)
    assert main(["doctor", "--teacher", str(path), "--import", "own"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("potstill: generate: pixels from -2 to 3, and [0, 1] is expected")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("own:make", "own:make: a recipe does not run code unless you allow its module: add --import own"),
        ("./nope", "./nope: no such folder"),
        ("nope.yaml", "nope.yaml: no such file"),
        ("none.json", "none.json: the recipe names no teacher"),
        ("own:", "teacher.target: "),
    ],
)
def test_the_command_on_nothing(own, capsys, teacher, expected):
    (own.folder / "none.json").write_text(json.dumps({"name": "a"}))
    assert main(["doctor", "--teacher", teacher]) == 2
    assert capsys.readouterr().err.startswith(f"potstill: {expected}")
