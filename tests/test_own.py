"""Somebody else's networks as models: how their outputs are read, and what is said of those that cannot be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import potstill
from potstill.doctor import examine
from potstill.errors import BadInput
from potstill.families.own import from_autoencoder, from_eps, from_generator, from_logits
from potstill.model import Images
from potstill.noise import Noise
from potstill.trace import Point, run

SHAPE = (3, 8, 8)
WIDE = Images.between(SHAPE, -1, 1)


class Encoder(nn.Module):
    """Means and log-variances of a latent map ``(2, 4, 4)``, in whatever form ``wrap`` gives them."""

    def __init__(self, wrap=lambda mean, spread: (mean, spread)):
        super().__init__()
        self.conv, self.norm, self.wrap = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), wrap

    def forward(self, x):
        return self.wrap(*self.norm(self.conv(x)).chunk(2, 1))


class Decoder(nn.Module):
    def __init__(self, wrap=lambda x: x):
        super().__init__()
        self.conv, self.wrap = nn.ConvTranspose2d(2, 3, 4, 2, 1), wrap

    def forward(self, z):
        return self.wrap(torch.tanh(self.conv(z)))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def parts(model, x):
    trace = run(model.infer, x, noise=Noise(), n=len(x))
    return trace["z"].dist, trace.out.dist


@pytest.mark.parametrize(
    "wrap",
    [
        lambda mean, spread: (mean, spread),
        lambda mean, spread: [mean, spread, "more"],
        lambda mean, spread: torch.cat([mean, spread], 1),
        lambda mean, spread: {"embedding": mean, "log_covariance": spread},
        lambda mean, spread: SimpleNamespace(embedding=mean, log_covariance=spread),
        lambda mean, spread: Normal(mean, (spread / 2).exp()),
    ],
    ids=["pair", "list", "tensor", "mapping", "object", "distribution"],
)
def test_every_form_of_a_posterior_is_read(wrap):
    encoder, x = Encoder(wrap), torch.rand(5, *SHAPE)
    model = from_autoencoder(encoder, Decoder(), WIDE).frozen()
    posterior, _ = parts(model, x)
    mean, spread = encoder.norm(encoder.conv(x)).chunk(2, 1)
    assert torch.equal(posterior.loc, mean)
    assert torch.equal(posterior.scale, (spread / 2).exp())
    assert run(model.generate, noise=Noise(), n=5)["z"].value.shape == (5, 2, 4, 4)


@pytest.mark.parametrize(("spread", "std"), [("log_variance", lambda r: (r / 2).exp()), ("log_std", torch.exp), ("std", torch.abs)])
def test_every_spread_is_read(spread, std):
    encoder = Encoder(lambda mean, raw: (mean, raw.abs() if spread == "std" else raw))
    model, x = from_autoencoder(encoder, Decoder(), WIDE, spread=spread).frozen(), torch.rand(5, *SHAPE)
    raw = encoder.norm(encoder.conv(x)).chunk(2, 1)[1]
    assert torch.allclose(parts(model, x)[0].scale, std(raw))


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: {"reconstruction": x}, lambda x: SimpleNamespace(sample=x)], ids=["tensor", "mapping", "object"]
)
def test_every_form_of_an_image_is_read(wrap):
    decoder = Decoder(wrap)
    model = from_autoencoder(Encoder(), decoder, Images(SHAPE, (0.5,), (0.5, 0.25, 1.0))).frozen()
    trace = run(model.generate, noise=Noise(), n=3)
    assert torch.equal(trace.out.dist.loc, torch.tanh(decoder.conv(trace["z"].value)))
    # 0.1 of an image in [0, 1] is twice as much of one in [-1, 1].
    assert torch.allclose(trace.out.dist.scale[0, :, 0, 0], torch.tensor([0.2, 0.4, 0.1]))
    plain = run(from_autoencoder(Encoder(), decoder, WIDE, std=None).frozen().generate, noise=Noise(), n=3)
    assert isinstance(plain.out.dist, Point)
    assert torch.equal(plain.output, trace.out.dist.loc)
    generator = run(from_generator(decoder, WIDE, (2, 4, 4)).frozen().generate, noise=Noise(), n=3)
    assert torch.equal(generator.output, trace.out.dist.loc)


def test_the_network_is_the_module_whose_methods_they_are():
    whole = Whole()
    model = from_autoencoder(whole.encode, whole.decode, WIDE)
    assert model.net is whole
    pair = from_autoencoder(whole.encoder, whole.decoder, WIDE)
    assert set(pair.net.state_dict()) == set(whole.state_dict())
    mine = from_autoencoder(lambda x: whole.encode(x), lambda z: whole.decode(z), WIDE, net=whole)
    assert mine.net is whole
    with pytest.raises(BadInput, match=r"encoder: <lambda> is no module, nor a method of one; give net"):
        from_autoencoder(lambda x: whole.encode(x), whole.decode, WIDE)


def test_looking_at_an_encoder_leaves_it_as_it_was():
    encoder = Encoder().train()
    encoder.norm.eval()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    from_autoencoder(encoder, Decoder(), WIDE)
    assert [encoder.training, encoder.norm.training] == [True, False]
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


class Last(nn.Module):
    """Whatever a network does, on images whose channels are last."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


class LastIn(Last):
    def forward(self, x):
        assert x.shape[-1] == 3
        return self.inner(x.permute(0, 3, 1, 2))


class LastOut(Last):
    def forward(self, z):
        return self.inner(z).permute(0, 2, 3, 1)


def test_channels_that_are_last_inside():
    encoder, decoder, x = Encoder(), Decoder(), torch.rand(4, *SHAPE)
    plain = from_autoencoder(encoder, decoder, WIDE).frozen()
    last = from_autoencoder(LastIn(encoder), LastOut(decoder), WIDE, channels_last=True).frozen()
    assert torch.equal(plain.reconstruct(x, Noise()), last.reconstruct(x, Noise()))
    assert torch.equal(from_generator(LastOut(decoder), WIDE, (2, 4, 4), channels_last=True).sample(4, Noise()), plain.sample(4, Noise()))
    head = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    found = [from_logits(head, WIDE), from_logits(LastIn(head), WIDE, channels_last=True)]
    logits = [run(model.infer, x, noise=Noise()).out.dist.logits for model in found]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "model",
    [
        lambda: from_autoencoder(Encoder(), Decoder(), WIDE),
        lambda: from_generator(nn.Sequential(nn.Linear(7, 192), nn.Tanh(), nn.Unflatten(1, SHAPE)), WIDE, 7),
        lambda: from_logits(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), WIDE),
    ],
)
def test_the_doctor_finds_nothing_in_them(model):
    assert examine(model().frozen()) == []


@pytest.mark.parametrize(
    ("wrap", "text"),
    [
        (lambda mean, spread: torch.cat([mean, spread[:, :1]], 1), r"Encoder returns \(2, 3, 4, 4\); mean and spread are expected"),
        (lambda mean, spread: (mean, spread[:, :1]), "Encoder returns a tuple; mean and spread of one shape"),
        (lambda mean, spread: (mean,), "Encoder returns a tuple; mean and spread of one shape"),
        (lambda mean, spread: {"mean": mean}, "Encoder returns a dict; mean and spread of one shape"),
    ],
)
def test_a_posterior_that_cannot_be_read(wrap, text):
    with pytest.raises(BadInput, match=text):
        from_autoencoder(Encoder(wrap), Decoder(), WIDE)


def test_an_encoder_of_other_images():
    with pytest.raises(BadInput, match=r"encoder: on images of \(1, 8, 8\): "):
        from_autoencoder(Encoder(), Decoder(), Images((1, 8, 8)))
    with pytest.raises(BadInput, match="spread 'variance': one of log_variance, std, log_std"):
        from_autoencoder(Encoder(), Decoder(), WIDE, spread="variance")


def test_an_image_that_cannot_be_read():
    model = from_autoencoder(Encoder(), Decoder(lambda x: {"image": x}), WIDE).frozen()
    (finding, *_) = examine(model)
    assert "Decoder returns a dict; images, or an object with reconstruction or sample, is expected" in str(finding)


class Oracle(nn.Module):
    """The noise in images of which every one is the same: what is left when that image is taken away."""

    def __init__(self, alphas):
        super().__init__()
        self.level, self.alphas = nn.Parameter(torch.tensor(0.25)), alphas

    def forward(self, x, t):
        a = self.alphas[t].view(-1, 1, 1, 1)
        return (x - a.sqrt() * self.level) / (1 - a).sqrt()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_denoiser_that_is_right_gives_its_image(sampler):
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.2, 50), 0)
    model = from_eps(Oracle(alphas), SHAPE, alphas, sampler=sampler, steps=5).frozen()
    assert torch.allclose(model.sample(3, Noise()), torch.full((3, *SHAPE), 0.625), atol=1e-4)
    trace = run(model.link, model.images.encode(torch.full((3, *SHAPE), 0.625)), noise=Noise())
    assert {"t", "xt", "prediction"} <= set(trace)
    with pytest.raises(BadInput, match="a chain of 51 steps; 1 to 50 are expected"):
        from_eps(Oracle(alphas), SHAPE, alphas, steps=51)


def test_the_library_gives_its_names_late():
    for name in potstill._HOME:
        assert getattr(potstill, name).__name__ == name
        assert name in dir(potstill)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = potstill.nope


def test_looking_at_a_model_in_train_mode_changes_nothing():
    """Samples and reconstructions are those of eval mode, and the statistics of BatchNorm are not those of what was looked at."""
    whole = Whole().train()
    model, before = from_autoencoder(whole.encode, whole.decode, WIDE), {k: v.clone() for k, v in whole.state_dict().items()}
    images = torch.rand(5, *SHAPE)
    drawn, again = model.sample(5, Noise((1,))), model.reconstruct(images, Noise((1,)))
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
    assert all(module.training for module in whole.modules())
    model.frozen()
    assert torch.equal(drawn, model.sample(5, Noise((1,))))
    assert torch.equal(again, model.reconstruct(images, Noise((1,))))


def test_one_network_that_encodes_and_decodes_is_enough():
    whole = Whole()
    one, two = from_autoencoder(whole, WIDE), from_autoencoder(whole.encode, whole.decode, WIDE)
    assert one.net is two.net is whole
    assert torch.equal(one.sample(3, Noise((2,))), two.sample(3, Noise((2,))))
    for wrong, said in (
        ((Encoder(), WIDE), "Encoder has no methods encode and decode"),
        ((whole.encode, whole.decode), "images: the shape and range of its images are expected"),
        ((whole.encode, WIDE, WIDE), "decode: a function of latents is expected, found Images"),
    ):
        with pytest.raises(BadInput, match=said):
            from_autoencoder(*wrong)
