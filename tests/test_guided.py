"""Diffusion sampling: exact for a perfect denoiser, equal to diffusers without guidance, and alive with it."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import priors
from potstill.energy.image import l2
from potstill.energy.view import DeadEnergy, Energy, Look, energy
from potstill.errors import BadInput
from potstill.model import Images, Model
from potstill.noise import Noise
from potstill.synthesize.guided import Guided, fitted
from potstill.synthesize.inversion import Inversion, LatentInversion
from potstill.synthesize.prior import SCHEDULERS, Prior, Prompts, affine

diffusers = pytest.importorskip("diffusers")
SHAPE = (1, 8, 8)
PREDICTIONS = {"flow_euler": ["flow_prediction"], "euler_ancestral": ["epsilon", "v_prediction"]}  # all that diffusers has for them
KINDS = [(name, p) for name in SCHEDULERS for p in PREDICTIONS.get(name, ["epsilon", "v_prediction", "sample"])]
NAMES = ["-".join(kind) for kind in KINDS]


def scheduler(name, prediction="epsilon"):
    made = getattr(diffusers, SCHEDULERS[name])
    if name == "flow_euler":
        return made()
    known = inspect.signature(made.__init__).parameters
    wanted = {"clip_sample": False, "set_alpha_to_one": True, "prediction_type": prediction, "beta_schedule": "scaled_linear"}
    return made(**{k: v for k, v in wanted.items() if k in known})


class Oracle(nn.Module):
    """Knows the clean sample, and predicts what a perfect network would; in the textbook's formulas, not the library's."""

    def __init__(self, clean, schedule, name, prediction):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.clean, self.schedule, self.name, self.prediction = clean, schedule, name, prediction
        self.config = SimpleNamespace(in_channels=clean.shape[1], out_channels=clean.shape[1], sample_size=clean.shape[-1])

    def forward(self, seen, t, return_dict=False):
        if self.name == "flow_euler":
            return ((seen - self.clean) / (t / 1000),)
        product = self.schedule.alphas_cumprod[t.long()].double()
        alpha, sigma = product.sqrt(), (1 - product).sqrt()
        # Euler's network sees its exploding sample scaled to variance one, which is the preserving one.
        noise = (seen.double() - alpha * self.clean) / sigma
        found = {"epsilon": noise, "v_prediction": alpha * noise - sigma * self.clean, "sample": self.clean.double()}[self.prediction]
        return (found.float(),)


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize(("name", "prediction"), KINDS, ids=NAMES)
def test_a_perfect_denoiser_is_recovered(name, prediction, steps):
    clean = Noise((5,)).normal("clean", (3, *SHAPE)).clamp(-1, 1)
    schedule = scheduler(name, prediction)
    sampler = Guided(Prior(Oracle(clean, schedule, name, prediction), schedule), SHAPE, steps, "off")
    found = sampler.latents(Energy(), Look(tiny_teacher()), 3, Noise((1,)))
    assert (found - clean).abs().max() < 1e-5


def tiny_teacher():
    """A linear autoencoder: brightness is its latent."""
    net = nn.Linear(1, 1)
    return Model(net, Images(SHAPE), infer=lambda sample, x: Normal(x * net.weight, 1.0)).frozen()


@energy
def darkness(view):
    return 200 * view.x.flatten(1).mean(1)


@energy
def dead(view):
    with torch.no_grad():
        return view.x.flatten(1).mean(1)


def pixel_prior(name="ddim", prediction="epsilon", classes=None):
    return Prior(priors.pixels(classes=classes), scheduler(name, prediction))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return priors.text_to_image(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(("name", "prediction"), KINDS, ids=NAMES)
@pytest.mark.parametrize("mode", ["off", "full", "clean"])
def test_without_a_term_the_images_are_plain_diffusions_to_the_bit(name, prediction, mode):
    prior, noise = pixel_prior(name, prediction), Noise((3,))
    found = Guided(prior, SHAPE, 4, mode)(0.0 * darkness, Look(tiny_teacher()), 3, noise)
    plain = scheduler(name, prediction)
    plain.set_timesteps(4)
    words = noise.uniform("scheduler", (3, 2)).double().mul(2**24).long().tolist()
    generators = [torch.Generator().manual_seed(a * 2**24 + b) for a, b in words]
    z = noise.normal("latents", (3, *SHAPE)) * getattr(plain, "init_noise_sigma", 1.0)
    with torch.no_grad():
        for t in plain.timesteps:
            seen = plain.scale_model_input(z, t) if hasattr(plain, "scale_model_input") else z
            z = plain.step(prior.unet(seen, t).sample, t, z, generator=generators).prev_sample
    assert torch.equal(found, (z * 0.5 + 0.5).clamp(0, 1))


@pytest.mark.parametrize(("name", "prediction"), KINDS, ids=NAMES)
@pytest.mark.parametrize("mode", ["full", "clean"])
def test_guidance_is_alive_and_lowers_the_energy(name, prediction, mode):
    prior, look = pixel_prior(name, prediction), Look(tiny_teacher())
    off, on = (Guided(prior, SHAPE, 6, m)(darkness, look, 4, Noise((3,))) for m in ("off", mode))
    assert not torch.equal(off, on)
    assert darkness(look(on)).mean() < darkness(look(off)).mean()


def test_the_move_is_clipped_to_the_noise_level():
    prior, look, seen = pixel_prior(), Look(tiny_teacher()), []

    def outputs(scale, clip):
        seen.clear()
        Guided(prior, SHAPE, 1, "clean", scale, clip)(darkness, look, 2, Noise(), lambda step: seen.append(step))
        return seen[0].images

    start = Guided(prior, SHAPE, 1, "off")
    start(darkness, look, 2, Noise(), lambda step: seen.append(step))
    still, level = seen[0].images, seen[0].level
    for clip in (0.01, 0.1):
        moved = (outputs(1e6, clip) - still).mul(2).flatten(1).pow(2).mean(1).sqrt()  # latents are twice the images
        assert torch.allclose(moved, torch.full_like(moved, clip * level), rtol=1e-3)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", "euler_ancestral"])
def test_an_image_does_not_depend_on_its_batch(name):
    sampler, look = Guided(pixel_prior(name), SHAPE, 3, "clean"), Look(tiny_teacher())
    noise = Noise((4,))
    together = sampler(darkness, look, 4, noise.at(range(10, 14)))
    apart = torch.cat([sampler(darkness, look, len(rows), noise.at(rows)) for rows in (range(10, 11), range(11, 14))])
    assert torch.allclose(together, apart, atol=1e-5)
    assert not torch.allclose(together, sampler(darkness, look, 4, noise.at(range(4))), atol=1e-2)


@pytest.mark.parametrize("mode", ["full", "clean"])
def test_a_dead_energy_is_named(mode):
    with pytest.raises(DeadEnergy, match="dead"):
        Guided(pixel_prior(), SHAPE, 2, mode)(darkness + dead, Look(tiny_teacher()), 2, Noise())


def test_a_dead_term_is_found_when_its_time_comes():
    with pytest.raises(DeadEnergy, match="dead"):
        Guided(pixel_prior(), SHAPE, 4)(darkness + dead.between(0.5, 1.0), Look(tiny_teacher()), 2, Noise())


def test_looking_for_dead_terms_takes_no_backward_pass_of_the_denoiser():
    prior, passes = pixel_prior(), []
    prior.unet.conv_in.register_full_backward_hook(lambda *_: passes.append(1))
    Guided(prior, SHAPE, 3, "full")(darkness + l2, Look(tiny_teacher()), 2, Noise())
    assert len(passes) == 3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_parts_give_the_pipelines_own_pictures(text, guidance):
    pipeline, folder = text
    noise = Noise((9,))
    prior = Prior.from_pretrained(folder)
    texts = ["a seven", "b"]
    sampler = Guided(prior, (3, 8, 8), 5, "off", prompts=Prompts((("a seven",), ("b",)), "bad"), guidance_scale=guidance)
    found = sampler(Energy(), Look(tiny_teacher(), labels=torch.tensor([0, 1])), 2, noise)
    latents = noise.normal("latents", (2, 4, 4, 4))
    theirs = pipeline(
        texts, 8, 8, 5, guidance_scale=guidance, negative_prompt=["bad"] * 2 if guidance > 1 else None, latents=latents, output_type="pt"
    ).images
    assert torch.allclose(found, theirs, atol=1e-5)


def test_texts_reach_the_denoiser_and_are_encoded_once(text, monkeypatch):
    prior = Prior.from_pretrained(text[1])
    calls, encode = [], prior.texts[0][1].forward
    monkeypatch.setattr(prior.texts[0][1], "forward", lambda *a, **k: (calls.append(1), encode(*a, **k))[1])
    sampler = Guided(prior, (3, 8, 8), 2, "off", prompts=Prompts((("one",), ("two",))))
    look = Look(tiny_teacher(), labels=torch.tensor([0, 1, 0, 1]))
    noise = Noise().at([5, 5, 6, 6])
    found = sampler(Energy(), look, 4, noise)
    assert len(calls) == 2
    assert not torch.equal(found[0], found[1])


def test_wordings_follow_the_row():
    prompts = Prompts((("a", "b"), ("c",)))
    labels = torch.tensor([0, 1] * 50)
    found = prompts.of(labels, Noise(), 100)
    assert set(found[::2]) == {"a", "b"}
    assert set(found[1::2]) == {"c"}
    assert prompts.of(labels[4:10], Noise().at(range(4, 10)), 6) == found[4:10]
    assert set(Prompts((("x", "y"),)).of(None, Noise(), 50)) == {"x", "y"}


@pytest.mark.parametrize("decode", ["vae", "linear"])
@pytest.mark.parametrize("mode", ["full", "clean"])
def test_text_to_image_is_guided_too(text, mode, decode):
    prior, look = Prior.from_pretrained(text[1]), Look(tiny_teacher(), labels=torch.tensor([0, 0]))
    prompts = Prompts((("one",),))
    on = Guided(prior, SHAPE, 6, mode, clip=1.0, decode=decode, prompts=prompts, guidance_scale=2.0)
    if decode == "linear":
        assert prior.linear_rest is None
    off = Guided(prior, SHAPE, 6, "off", prompts=prompts, guidance_scale=2.0)
    images = [sampler(darkness, look, 2, Noise((3,))) for sampler in (off, on)]
    assert images[0].shape == (2, *SHAPE)
    assert decode == "vae" or 0 <= prior.linear_rest < 1
    assert not torch.equal(*images)
    if decode == "vae":  # a linear map says little of a random decoder; see below for one that it fits
        assert darkness(look(images[1])).mean() < darkness(look(images[0])).mean()


class LinearDecoder(nn.Module):
    """Colors are a linear map of latents."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = Noise().normal("w", (3, 4)), torch.tensor([0.1, 0.2, 0.3])
        self.config = SimpleNamespace(scaling_factor=0.5, shift_factor=None, block_out_channels=(1,), out_channels=3)

    def decode(self, z, return_dict=False):
        return (torch.einsum("oc,nchw->nohw", self.weight, z) + self.bias.view(1, 3, 1, 1),)


def test_a_linear_decode_is_the_least_squares_fit(text):
    prior = Prior.from_pretrained(text[1])
    prior = Prior(prior.unet, prior.scheduler, LinearDecoder(), prior.texts)
    with pytest.raises(RuntimeError, match="fit_linear"):
        prior.decode(torch.zeros(1, 4, 4, 4), "linear")
    z = Noise().normal("z", (8, 4, 4, 4))
    assert prior.fit_linear(z) < 1e-6
    assert torch.allclose(prior.decode(z, "linear"), prior.decode(z), atol=1e-4)
    look, prompts = Look(tiny_teacher(), labels=torch.tensor([0, 0])), Prompts((("one",),))
    whole, cheap = (Guided(prior, (1, 4, 4), 4, "clean", decode=d, prompts=prompts) for d in ("vae", "linear"))
    small = Look(Model(look.teacher.net, Images((1, 4, 4)), infer=look.teacher.infer), labels=look.labels)
    assert torch.allclose(whole(darkness, small, 2, Noise()), cheap(darkness, small, 2, Noise()), atol=1e-3)


def test_classes_condition_the_denoiser():
    prior, look = pixel_prior(classes=3), Look(tiny_teacher(), labels=torch.tensor([0, 2]))
    found = Guided(prior, SHAPE, 2, "off")(Energy(), look, 2, Noise().at([1, 1]))
    assert not torch.equal(found[0], found[1])
    with pytest.raises(BadInput, match="label 3, but it knows 3 classes"):
        Guided(prior, SHAPE, 2, "off")(Energy(), Look(tiny_teacher(), labels=torch.tensor([0, 3])), 2, Noise())
    with pytest.raises(BadInput, match="conditioned on 3 classes"):
        Guided(prior, SHAPE, 2, "off")(Energy(), Look(tiny_teacher()), 2, Noise())


def test_repeated_moves_lower_the_energy_further():
    prior, look = pixel_prior(), Look(tiny_teacher())
    energies = [darkness(look(Guided(prior, SHAPE, 4, "clean", clip=0.1, repeats=r)(darkness, look, 4, Noise()))).mean() for r in (1, 4)]
    assert energies[1] < energies[0]


@pytest.mark.parametrize(
    ("found", "wanted", "what"),
    [((4, 8, 8), (3, 8, 8), "4 channels"), ((3, 8, 8), (1, 8, 16), "8x8"), ((2, 8, 8), (1, 8, 8), "2 channels")],
)
def test_a_prior_that_cannot_fit_is_refused(found, wanted, what):
    prior = SimpleNamespace(image_shape=found)
    with pytest.raises(BadInput, match=what):
        Guided(prior, wanted)


def test_fitting_is_the_mean_over_areas_and_luma():
    x = Noise().uniform("x", (2, 3, 8, 8))
    gray = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    assert torch.allclose(fitted(x, (1, 4, 4)), gray.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)))
    assert torch.equal(fitted(x, (3, 8, 8)), x)
    assert fitted(x[:, :1], (3, 16, 16)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"unet": ["diffusers", "Exec"]}, "unet is a Exec"),
        ({"transformer": ["diffusers", "DiTTransformer2DModel"]}, "a part 'transformer'"),
        ({"unet": None}, "no unet"),
        ({"scheduler": None}, "no scheduler"),
        ({"tokenizer": None}, "no tokenizer"),
        ({"text_encoder": ["os", "system"]}, "text_encoder is a system"),
    ],
)
def test_an_unknown_layout_is_refused(text, tmp_path, change, what):
    import json
    import shutil

    folder = shutil.copytree(text[1], tmp_path / "p")
    index = json.loads((folder / "model_index.json").read_text()) | change
    (folder / "model_index.json").write_text(json.dumps({k: v for k, v in index.items() if v is not None}))
    with pytest.raises(BadInput, match=what):
        Prior.from_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: not JSON"),
        (lambda f: (f / "model_index.json").unlink(), "model_index.json: no such file"),
        (lambda f: next((f / "unet").glob("*.safetensors")).write_bytes(b"x" * 10**6), "cannot be loaded"),
        (lambda f: next((f / "unet").glob("*.safetensors")).unlink(), "cannot be loaded"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config.json: no such file"),
    ],
)
def test_a_broken_folder_is_one_clear_error(text, tmp_path, spoil, what):
    import shutil

    folder = shutil.copytree(text[1], tmp_path / "p")
    spoil(folder)
    with pytest.raises(BadInput, match=what):
        Prior.from_pretrained(folder)


def test_a_missing_folder():
    with pytest.raises(BadInput, match="no such folder"):
        Prior.from_pretrained("./nowhere")


def test_affine_is_the_schedulers_own_prediction():
    """Against the clean sample that diffusers' schedulers report themselves."""
    for name, prediction in KINDS:
        made = scheduler(name, prediction)
        made.set_timesteps(5)
        z, output = (Noise().normal(k, (2, *SHAPE)) for k in ("z", "output"))
        at = affine(made, 0)
        if hasattr(made, "scale_model_input"):
            made.scale_model_input(z, made.timesteps[0])
        result = made.step(output, made.timesteps[0], z)
        if hasattr(result, "pred_original_sample"):
            assert torch.allclose(at.skip * z + at.out * output, result.pred_original_sample, rtol=1e-4, atol=1e-4), (name, prediction)
        assert 0 < at.level <= 1


def test_inversion_lowers_the_energy_and_is_addressed_by_row():
    look = Look(tiny_teacher())
    sampler = Inversion(SHAPE, steps=20, jitter=1)
    found = sampler(darkness, look, 4, Noise((1,)).at(range(4)))
    start = Inversion(SHAPE, steps=0)(darkness, look, 4, Noise((1,)).at(range(4)))
    assert (darkness(look(found)) < darkness(look(start))).all()
    assert torch.allclose(found[2:], sampler(darkness, look, 2, Noise((1,)).at([2, 3])), atol=1e-6)
    assert torch.equal(Inversion(SHAPE, steps=9)(0.0 * darkness, look, 4, Noise((1,)).at(range(4))), start)
    with pytest.raises(DeadEnergy):
        sampler(dead, look, 2, Noise())


def test_latent_inversion_lowers_the_energy_and_the_pull_keeps_the_noise_near():
    net = nn.Linear(5, 64)
    with torch.no_grad():
        net.weight.copy_(Noise().normal("w", (64, 5)) * 0.1)
        net.bias.fill_(0.5)

    def generate(sample):
        z = torch.cat([sample.normal("a", (2,)), sample.normal("b", (3,))], 1)
        return net(z).view(-1, *SHAPE)

    model, look, noise = Model(net, Images(SHAPE), generate).frozen(), Look(tiny_teacher()), Noise((1,))
    start = LatentInversion(model, SHAPE, 0)(darkness, look, 4, noise)
    assert torch.allclose(start, model.sample(4, noise))
    far = LatentInversion(model, SHAPE, 30, pull=0.0)(darkness, look, 4, noise)
    near = LatentInversion(model, SHAPE, 30, pull=1000.0)(darkness, look, 4, noise)
    assert (darkness(look(far)) < darkness(look(start))).all()
    assert darkness(look(near)).mean() > darkness(look(far)).mean()
    with pytest.raises(DeadEnergy):
        LatentInversion(model, SHAPE, 2)(dead, look, 2, noise)


def test_discrete_noise_cannot_be_inverted():
    from torch.distributions import Bernoulli

    def generate(sample):
        return sample("z", Bernoulli(torch.full((sample.n, 64), 0.5))).view(-1, *SHAPE)

    model = Model(nn.Linear(1, 1), Images(SHAPE), generate).frozen()
    with pytest.raises(ValueError, match="'z' is discrete"):
        LatentInversion(model, SHAPE, 2)(darkness, Look(tiny_teacher()), 2, Noise())


def test_memory_counts_what_the_gradient_keeps(text):
    prior, look = Prior.from_pretrained(text[1]), Look(tiny_teacher(), labels=torch.tensor([0, 0]))
    kept = {}
    for mode, decode in (("off", "vae"), ("clean", "linear"), ("clean", "vae"), ("full", "vae")):
        sampler = Guided(prior, SHAPE, 3, mode, decode=decode, prompts=Prompts((("one",),)))
        weights, kept[mode, decode] = sampler.memory(darkness, look, Noise())
        assert weights == 4 * prior.parameters()
    assert kept["off", "vae"] == 0
    assert 0 < kept["clean", "linear"] < kept["clean", "vae"] < kept["full", "vae"]


def test_memory_can_be_saved_for_the_same_images(text):
    look, prompts = Look(tiny_teacher(), labels=torch.tensor([0, 0])), Prompts((("one",),))
    plain, saving = Prior.from_pretrained(text[1]), Prior.from_pretrained(text[1])
    saving.save_memory()
    a, b = (Guided(p, SHAPE, 2, prompts=prompts) for p in (plain, saving))
    assert torch.allclose(a(darkness, look, 2, Noise()), b(darkness, look, 2, Noise()), atol=1e-5)
    assert b.memory(darkness, look, Noise())[1] < a.memory(darkness, look, Noise())[1]


def test_a_digest_tells_weights_and_schedules_apart(text):
    first, same = (Prior.from_pretrained(text[1]) for _ in range(2))
    assert first.digest() == same.digest()
    assert first.digest() != Prior.from_pretrained(text[1], scheduler="euler").digest()
    next(same.unet.parameters()).data[0] += 1
    assert first.digest() != same.digest()
