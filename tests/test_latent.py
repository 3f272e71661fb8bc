"""Text-to-image teachers: their chain is diffusers' own, students learn what guidance makes of each text, and nothing else differs."""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import priors
from potstill import build, config, jobs
from potstill.distill.distiller import Distiller, reached
from potstill.distill.pool import OnlineLinks
from potstill.divergence import Match, mse
from potstill.doctor import examine
from potstill.errors import BadInput
from potstill.families.diffusion import chain_of
from potstill.families.latent import Told
from potstill.noise import FixedNoise, Noise
from potstill.trace import run
from runs import Place, cut_at, results

N, STEPS = 4, 5
TEXTS = ["a digit", "the letter b", "nothing at all"]
MSE = (Match("prediction", mse, reduce="mean"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Stable Diffusion on 8x8 pictures."""
    from diffusers import DDIMScheduler

    path = tmp_path_factory.mktemp("prior") / "sd"
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing", steps_offset=1)
    return priors.text_to_image(path, scheduler)[1]


def section(folder, **more):
    return config.Pretrained.model_validate({"kind": "pretrained", "path": str(folder), "prompts": TEXTS, "chain": STEPS} | more)


def teacher(folder, **more):
    return build.text_to_image_teacher(section(folder, **more)).model().frozen()


def student(model, width=4, seed=0):
    return build.student(config.Student(width=width), model, seed, ())


@pytest.mark.parametrize("strength", [1.0, 3.5])
@torch.no_grad()
def test_it_draws_what_diffusers_draws(folder, strength):
    from diffusers import StableDiffusionPipeline

    model = teacher(folder, guidance_scale=strength, negative="blur")
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    latents = Noise((5,)).normal("xT", (N, *model.net.chain.image))
    told = torch.tensor([0, 2, 1, 1])
    chance = (told.float() + 0.5) / len(TEXTS)
    found = run(model.generate, noise=FixedNoise({"xT": latents, "told": chance[:, None]}), n=N)
    assert torch.equal(found["told"].value.long(), told)
    expected = pipeline(
        [TEXTS[i] for i in told],
        negative_prompt=["blur"] * N,
        num_inference_steps=STEPS,
        guidance_scale=strength,
        latents=latents.clone(),
        output_type="pt",
    ).images
    torch.testing.assert_close(model.images.decode(found.out.dist.mean).clamp(0, 1), expected, rtol=0, atol=1e-5)


def test_its_parameters_are_the_denoisers_and_each_is_reached(folder):
    model = teacher(folder, guidance_scale=2.0)
    names = {name for name, _ in model.net.named_parameters()}
    assert names == {f"chain.net.unet.{name}" for name, _ in model.net.unet.named_parameters()}
    assert reached(model, "link") == names
    assert tuple(model.images.shape) == (3, 8, 8)
    assert tuple(chain_of(model).image) == (4, 4, 4)


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(folder):
    model = teacher(folder, guidance_scale=2.0)
    together, alone = model.sample(N, Noise().at(range(10, 14))), model.sample(1, Noise().at([12]))
    torch.testing.assert_close(together[2], alone[0], rtol=0, atol=1e-5)


def test_an_identical_student_loses_nothing_and_a_guided_teacher_is_another(folder):
    plain, guided = teacher(folder), teacher(folder, guidance_scale=3.0)
    twin = build.student(config.Student(start="teacher"), plain, 0, ())
    x = torch.rand(N, 3, 8, 8)
    for of, expected in ((plain, True), (guided, False)):
        loss = Distiller(of, twin, MSE, "link", replay="*")(Noise((1,)), x, N)["prediction"]
        assert (loss.detach().abs().max() < 1e-10) == expected
    same = Distiller(plain, twin, (Match("z", mse),), "generate")(Noise((2,)), None, N)["z"]
    assert same.detach().abs().max() < 1e-10


def test_a_student_is_narrower_knows_the_texts_and_needs_no_guidance(folder):
    model = teacher(folder, guidance_scale=3.0)
    small = student(model)
    assert small.net.unet.config.block_out_channels == (4, 8)
    assert (small.net.chain.net.strength, small.net.chain.conditions) == (1.0, len(TEXTS))
    own, its = dict(small.net.named_buffers()), dict(model.net.named_buffers())
    assert torch.equal(own["chain.net.told0"], its["chain.net.told0"])
    assert all(key.startswith("chain.net.unet.") for key in small.net.state_dict())
    losses = Distiller(model, small, MSE, "link", replay="*")(Noise((1,)), torch.rand(N, 3, 8, 8), N)
    sum(losses.values()).sum().backward()
    assert all(p.grad is not None for p in small.net.parameters())
    assert all(p.grad is None for p in model.net.parameters())
    assert all(p.grad is None for p in model.net.chain.vae.parameters())


def test_the_texts_differ(folder):
    chain = teacher(folder, guidance_scale=3.0).net.chain
    x, t = Noise((1,)).normal("x", (3, *chain.image)), torch.full((3,), 500.0)
    same = x[:1].expand_as(x)
    with torch.no_grad():
        found = chain(same, t, torch.arange(3).float())
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[1], found[2])


def test_arguments_within_arguments_reach_the_denoiser():
    """As Stable Diffusion XL has them."""
    seen = {}

    class Denoiser(torch.nn.Module):
        def forward(self, x, t, return_dict, **arguments):
            seen.update(arguments)
            return (x * arguments["added"]["scale"].view(-1, 1, 1, 1),)

    told = {"states": torch.arange(6.0).view(3, 2), "added": {"scale": torch.tensor([1.0, 2.0, 3.0])}}
    nothing = {"states": torch.zeros(1, 2), "added": {"scale": torch.zeros(1)}}
    x, text = torch.ones(2, 1, 1, 1), torch.tensor([2, 0])
    found = Told(Denoiser(), told, nothing, 2.0)(x, torch.zeros(2), text)
    assert found.flatten().tolist() == [6.0, 2.0]
    assert torch.equal(seen["states"], torch.tensor([[0.0, 0.0], [0.0, 0.0], [4.0, 5.0], [0.0, 1.0]]))
    assert Told(Denoiser(), told).smaller(Denoiser())(x, torch.zeros(2), text).flatten().tolist() == [3.0, 1.0]


def test_in_the_pool_a_text_stays_with_its_image_until_that_is_finished(folder):
    model = teacher(folder)
    small = student(model)
    pool = OnlineLinks(model, small, model.net.chain, MSE, 12, Noise((9,)), 3)
    index = torch.arange(12)
    pool(Noise((1,)), index)
    told, done = pool.told.clone(), pool.done.clone()
    for i in range(2 * STEPS):
        pool(Noise((2, i)), index)
        stayed = done + 1 < STEPS
        assert torch.equal(pool.told[stayed], told[stayed])
        assert torch.equal(pool.done, torch.where(stayed, done + 1, 0))
        told, done = pool.told.clone(), pool.done.clone()
    assert set(told.tolist()) <= {0, 1, 2}
    assert len(set(told.tolist())) > 1


@torch.no_grad()
def test_an_image_on_its_way_through_the_pool_is_what_the_chain_draws(folder):
    model = teacher(folder, guidance_scale=2.0)
    chain = model.net.chain
    pool = OnlineLinks(model, student(model), chain, MSE, STEPS, Noise((9,)), 3)
    pool(Noise((1,)), torch.arange(STEPS))
    begun = int((pool.done == 1).nonzero()[0])  # it began at pure noise, and has one link behind it
    x = Noise((9,)).normal("xT", (STEPS, *chain.image))[begun : begun + 1]
    chance = (pool.told[begun].float() + 0.5) / len(TEXTS)
    whole = run(model.generate, noise=FixedNoise({"xT": x, "told": chance.view(1, 1)}), n=1)
    for i in range(STEPS - 2):
        pool(Noise((2, i)), torch.arange(STEPS))
    name = f"x{round(chain.links[STEPS - 1][0].item())}"
    torch.testing.assert_close(pool.x[begun], whole[name].value[0], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ whole runs

LINK = {"steps": 4, "batch": 4, "pool": 8}
SHORT = {"steps": 2, "batch": 4, "rules": [{"nodes": "z", "by": "mse"}]}
SECTIONS = {
    "student": {"width": 4},
    "surrogate": None,
    "distill": {"link": LINK, "generate": SHORT, "infer": None},
    "arms": [{"kind": "data_free", "generate": False}, {"kind": "data_free", "name": "short", "chain": 2}],
    "evaluate": {"n": 12, "k": 2, "latency_repeats": 3},
    "report": {"images": 2},
}


@pytest.fixture
def place(tmp_path, monkeypatch, folder):
    import numpy as np

    monkeypatch.chdir(tmp_path)
    found = Place(tmp_path)
    pictures = np.random.default_rng(0).integers(0, 255, (40, 3, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "data.npz", images=pictures)
    found.recipe |= SECTIONS | {"teacher": {"kind": "pretrained", "path": str(folder), "prompts": TEXTS, "chain": 3, "guidance_scale": 2.0}}
    return found


def test_a_run_and_the_students_denoiser_in_diffusers(place):
    from diffusers import UNet2DConditionModel

    assert place.run("run") == 0
    metrics = json.loads((place.out / "metrics.json").read_text())
    assert metrics["arms"]["student_data_free"]["params"] < metrics["arms"]["teacher"]["params"]
    assert metrics["arms"]["short"]["frechet"]["mean"] > 0
    loaded = UNet2DConditionModel.from_pretrained(place.out / "student" / "unet")
    model = build.loaded(config.Pretrained.model_validate(place.recipe["teacher"]), place.out, ())
    small = student(model)
    build.load_weights(small.net, place.out / "student" / "model.safetensors")
    for (name, a), b in zip(loaded.named_parameters(), small.net.unet.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_run_that_is_cut_short_goes_on_to_the_same_bits(place, monkeypatch):
    import shutil

    assert place.run("distill") == 0
    expected = results(place.out)
    shutil.rmtree(place.out)
    cut_at(monkeypatch, 3, 7)
    assert [place.run("distill") for _ in range(3)] == [130, 130, 0]
    assert results(place.out) == expected


def test_other_texts_or_another_autoencoder_are_another_teacher(place, folder):
    def digest(**more):
        recipe = config.check(place.recipe | {"teacher": place.recipe["teacher"] | more})
        return jobs.Workshop(recipe, place.out).teacher_digest

    first = digest()
    assert digest() == first
    assert digest(prompts=TEXTS[:2]) != first
    shop = jobs.Workshop(config.check(place.recipe), place.out)
    next(shop.teacher.net.chain.vae.parameters()).data.add_(1)
    assert shop.teacher_digest != first


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"teacher": {"prompts": None}}, "teacher.prompts: "),
        ({"arms": ["scratch"]}, "scratch is not for text-to-image students"),
        ({"arms": ["continual"]}, "continual is for teachers that generate and infer"),
        ({"student": {"width": 64}}, "student: width 64 is wider than the teacher's 8"),
        ({"teacher": {"sampler": "ddpm", "chain": 2000}}, "a chain of 2000 steps"),
    ],
)
def test_bad_input_is_one_line(place, capsys, sections, expected):
    more = sections.get("teacher")
    whole = sections | ({"teacher": place.recipe["teacher"] | more} if more else {})
    assert place.run("run", **whole) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert "Traceback" not in said
    assert not (place.out / "students").exists()


def test_a_teacher_without_text_is_given_none(place, capsys):
    assert place.run("run", teacher={"kind": "pretrained", "path": "zoo:digits-lvae", "prompts": ["a"]}) == 2
    assert "are of text-to-image teachers; zoo:digits-lvae reads no text" in capsys.readouterr().err


def test_the_doctor_finds_nothing_wrong(folder):
    assert examine(teacher(folder, guidance_scale=2.0)) == []


def test_a_pipeline_without_its_text_encoder_is_refused(folder, tmp_path):
    import shutil

    broken = tmp_path / "sd"
    shutil.copytree(folder, broken)
    index = json.loads((broken / "model_index.json").read_text())
    for name in ("text_encoder", "tokenizer"):
        index[name] = [None, None]
    (broken / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BadInput, match="with an AutoencoderKL and a text encoder is expected"):
        teacher(broken)


def test_a_model_can_be_copied(folder):
    model = teacher(folder)
    again = copy.deepcopy(model.net).model()
    assert torch.equal(again.sample(2, Noise((1,))), model.sample(2, Noise((1,))))
