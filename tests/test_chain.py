"""Diffusion and flow: chains against diffusers' own and closed forms, links, the pool, and what a recipe makes of them."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal

from potstill import build, config, jobs
from potstill.distill.distiller import Distiller
from potstill.distill.loop import Log, Phase, accelerator, fit, rows_of
from potstill.distill.pool import OnlineLinks
from potstill.divergence import Match, compare, kl, mse, total
from potstill.errors import BadInput
from potstill.families.chain import Chain, DenoisingLoss
from potstill.families.diffusion import UNet, chain_of
from potstill.model import kept_for_gradient
from potstill.noise import FixedNoise, Noise
from potstill.state import States
from potstill.trace import Point, run

IMAGE = (1, 8, 8)
N = 3


def unet(seed=0, width=4, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet(IMAGE, width, **settings).eval()


def images(n=N):
    return Noise((7,)).uniform("x", (n, *IMAGE)) * 2 - 1


class Toy(nn.Module):
    """A network of two weights, whose prediction depends on image and time."""

    def __init__(self, a=0.3, b=0.1):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x, t):
        return self.a * x.tanh() + self.b * (t / 1000).view(-1, 1, 1, 1)


def alphas(schedule="linear"):
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_schedule=schedule).alphas_cumprod


def toy(prediction="epsilon", schedule="linear", a=0.3, **settings):
    return Chain(Toy(a), IMAGE, prediction, None if prediction == "flow" else alphas(schedule), **settings)


# ------------------------------------------------------------------ against diffusers

NAMES = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [1, 4, 25])
@torch.no_grad()
def test_a_deterministic_chain_is_diffusers_ddim(prediction, schedule, steps):
    from diffusers import DDIMScheduler

    net = unet(prediction=prediction, schedule=schedule, steps=steps)
    scheduler = DDIMScheduler(beta_schedule=schedule, prediction_type=NAMES[prediction], timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    trace = run(net.model().generate, noise=Noise(), n=N)
    x = trace["xT"].value
    for t, node in zip(scheduler.timesteps, [*trace][1:], strict=True):
        x = scheduler.step(net.chain.net(x, t).sample, t, x).prev_sample
        assert (trace[node].value - x).abs().max() < 1e-5
    assert x.std() > 0.1
    assert [*trace] == ["xT", *(f"x{t}" for t in scheduler.timesteps[1:].tolist()), "out"]


@torch.no_grad()
def test_a_chain_that_is_told_labels_is_diffusers_with_labels():
    from diffusers import DDIMScheduler

    net = unet(classes=3, steps=4)
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    trace = run(net.model().generate, noise=Noise(), n=8)
    x, labels = trace["xT"].value, trace["told"].value.long()
    assert set(labels.tolist()) == {0, 1, 2}
    for t in scheduler.timesteps:
        x = scheduler.step(net.chain.net(x, t, class_labels=labels).sample, t, x).prev_sample
    torch.testing.assert_close(trace.out.dist.mean, x, rtol=0, atol=1e-5)
    other = run(net.model().generate, noise=Noise(), n=8, given={"told": (trace["told"].value + 1) % 3})
    assert not torch.allclose(other.out.dist.mean, x, atol=1e-3)


def test_a_network_with_labels_is_loaded_from_diffusers_shrunk_and_saved(tmp_path):
    from diffusers import DDIMScheduler, UNet2DModel

    net = unet(classes=3)
    again = UNet.of(net.chain.net, DDIMScheduler(), steps=net.chain.steps)
    assert (again.chain.conditions, again.chain.net.config.num_class_embeds) == (3, 3)
    assert isinstance(again.chain.net, UNet2DModel)
    small = net.shrunk(4)
    assert (small.chain.conditions, small.width) == (3, 4)
    net.save_pretrained(tmp_path)
    loaded = UNet.from_pretrained(tmp_path)
    assert torch.equal(loaded.model().sample(2, Noise()), net.model().sample(2, Noise()))


def test_a_chain_that_is_told_labels_learns_them():
    net = unet(classes=2)
    x = torch.full((N, *IMAGE), 0.5)
    with pytest.raises(ValueError, match="told one of 2 conditions"):
        DenoisingLoss(net, net.chain)(Noise(), x)
    labels = torch.arange(N) % 2
    found, other = (DenoisingLoss(net, net.chain)(Noise(), x, told)["out"] for told in (labels, 1 - labels))
    assert not torch.allclose(found, other)
    assert torch.equal(found, net.chain.denoising(Noise(), 2 * x - 1, labels))


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [1, 10, 1000])
@torch.no_grad()
def test_a_random_chain_is_diffusers_ddpm(prediction, steps):
    from diffusers import DDPMScheduler

    chain = toy(prediction, sampler="ddpm", steps=steps)
    scheduler = DDPMScheduler(prediction_type=NAMES[prediction], timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    generator, x = torch.Generator().manual_seed(3), images()
    values = {"xT": x}
    for k, t in enumerate(scheduler.timesteps):
        before = generator.get_state()
        x = scheduler.step(chain.net(x, t.expand(N)), t, x, generator=generator).prev_sample
        name = f"x{scheduler.timesteps[k + 1]}" if k + 1 < steps else "out"
        again = torch.Generator().manual_seed(3)
        again.set_state(before)
        values[name] = torch.randn(x.shape, generator=again)
    trace = run(chain.generate, noise=FixedNoise(values), n=N)
    assert (trace.out.dist.mean - x).abs().max() < 1e-5
    assert all(isinstance(node.dist, Normal) for node in trace.values())


@pytest.mark.parametrize("steps", [1, 7, 50])
@torch.no_grad()
def test_a_flow_is_diffusers_euler(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    net = unet(prediction="flow", steps=steps)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - k / steps for k in range(steps)])
    trace = run(net.model().generate, noise=Noise(), n=N)
    x = trace["xT"].value
    for t in scheduler.timesteps:
        x = scheduler.step(net.chain.net(x, t).sample, t, x).prev_sample
    assert (trace.output - x).abs().max() < 1e-5
    assert isinstance(trace.out.dist, Point)


# ------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("prediction", [*NAMES, "flow"])
@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@torch.no_grad()
def test_the_oracle_of_one_image_leads_to_it_and_has_no_loss(prediction, steps, sampler):
    if (prediction, sampler) == ("flow", "ddpm"):
        pytest.skip("a flow is deterministic")
    x = images(1)

    class Oracle(nn.Module):
        def forward(self, noisy, t):
            alpha, sigma = chain.levels(t.float())
            eps = (noisy - alpha * x) / sigma.clamp_min(1e-9)
            return {"epsilon": eps, "v": alpha * eps - sigma * x, "sample": x.expand_as(noisy), "flow": eps - x}[prediction]

    chain = Chain(Oracle(), IMAGE, prediction, None if prediction == "flow" else alphas(), sampler, steps)
    assert (run(chain.generate, noise=Noise(), n=N).out.dist.mean - x).abs().max() < 2e-4
    assert chain.denoising(Noise(), x.expand(N, *IMAGE)).max() < 1e-6
    assert chain.denoising(Noise(), -x.expand(N, *IMAGE)).min() > 1e-6


@torch.no_grad()
def test_a_constant_predictions_loss_is_the_targets_power():
    x = images(2000)
    for prediction, expected in (("epsilon", 1.0), ("flow", 1 + x.square().mean().item()), ("sample", x.square().mean().item())):
        chain = Chain(Toy(0.0, 0.0), IMAGE, prediction, None if prediction == "flow" else alphas())
        assert chain.denoising(Noise(), x).mean().item() == pytest.approx(expected, rel=0.02)
    # alpha^2 + sigma^2 = 1, and noise and image are independent: the mean over times of alpha^2 + sigma^2 x^2.
    square = alphas().mean().item()
    loss = Chain(Toy(0.0, 0.0), IMAGE, "v", alphas()).denoising(Noise(), x).mean().item()
    assert loss == pytest.approx(square + (1 - square) * x.square().mean().item(), rel=0.03)


@torch.no_grad()
def test_a_chains_kl_is_that_of_its_links():
    """The chain rule: replay of the whole chain, and of its links one by one, each begun where the teacher stood."""
    teacher, student = (toy(sampler="ddpm", steps=6, clip=False, a=a) for a in (0.3, 0.5))
    own = run(teacher.generate, noise=Noise(), n=N)
    replayed = run(student.generate, noise=Noise(), n=N, given=own.values_of())
    whole = total(compare(own, replayed))
    parts = []
    for ends, name in zip(teacher.links, own, strict=False):
        given = {"t": ends.expand(N, 2), "xt": own[name].value}
        t, s = (run(chain.link, images(), noise=Noise(), given=given) for chain in (teacher, student))
        parts.append(kl(t.out.dist, s.out.dist))
    assert len(parts) == 6
    assert torch.allclose(torch.stack(parts).sum(0), whole, rtol=1e-4)
    assert (whole > 0.1).all()


@torch.no_grad()
def test_a_links_kl_is_the_weighted_error_of_the_noise():
    """Ho et al., equation 12: beta^2 / (2 variance alpha (1 - alphas)) times the squared error."""
    teacher, student = (toy(sampler="ddpm", steps=1000, clip=False, a=a) for a in (0.3, 0.5))
    t, s = (run(chain.link, images(64), noise=Noise((5,))) for chain in (teacher, student))
    time = t["t"].value[:, 0].long()
    assert len(time.unique()) > 50
    product = alphas().double()
    before = torch.cat([torch.ones(1, dtype=torch.float64), product])[time]
    beta = 1 - product[time] / before
    variance = torch.where(time > 0, (1 - before) / (1 - product[time]) * beta, beta)
    weight = beta**2 / (2 * variance * (1 - beta) * (1 - product[time]))
    error = mse(t["prediction"].dist, s["prediction"].dist)
    assert torch.allclose(kl(t.out.dist, s.out.dist).double(), weight * error, rtol=1e-3)


@torch.no_grad()
def test_every_link_is_drawn_as_often():
    chain = toy(steps=4)
    trace = run(chain.link, images(4000), noise=Noise())
    counts = [(trace["t"].value == ends).all(1).sum().item() for ends in chain.links]
    assert sum(counts) == 4000
    assert all(abs(count - 1000) < 110 for count in counts)  # four standard deviations
    alpha, sigma = chain.levels(trace["t"].value[:, 0])
    assert torch.equal(trace["xt"].dist.loc, alpha * images(4000))
    assert ((trace["xt"].value - alpha * images(4000)) / sigma).std().item() == pytest.approx(1, rel=0.01)


# ------------------------------------------------------------------ what a family promises

SETTINGS = [{"prediction": p, "steps": 4} for p in ("epsilon", "v", "sample", "flow")] + [{"sampler": "ddpm", "steps": 4}]
KINDS = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.get("prediction", "ddpm"))
MSE = (Match("prediction", mse),)


@KINDS
@torch.no_grad()
def test_shapes_rows_and_ranges(settings):
    net = unet(**settings)
    model = net.model()
    x = model.sample(5, Noise().at(range(10, 15)))
    assert x.shape == (5, *IMAGE)
    assert (x.min() >= 0) & (x.max() <= 1)
    assert (model.sample(1, Noise().at([13])) - x[3]).abs().max() < 1e-4
    assert (x[3] - x[0]).abs().max() > 1e-2
    both, alone = (run(model.link, images()[part], noise=Noise().at(rows)) for part, rows in ((slice(None), range(3)), ([2], [2])))
    for name in ("t", "xt", "prediction", "out"):
        assert (both[name].dist.mean[2] - alone[name].dist.mean[0]).abs().max() < 1e-4
    with pytest.raises(ValueError, match="UNet has no program 'infer'"):
        model.program("infer")


@KINDS
def test_a_student_equal_to_its_teacher_has_no_loss_and_gradients_reach_every_parameter(settings):
    teacher, same, other = unet(**settings).model().frozen(), unet(**settings).model(), unet(1, **settings).model()
    x = torch.rand(N, *IMAGE)
    for program, replay, rules, begun in (("link", "*", MSE, x), ("generate", "", (Match("out", mse),), None)):
        none = total(Distiller(teacher, same, rules, program, replay)(Noise(), begun, N))
        assert none.max() < 1e-8  # attention adds up in another order without a gradient
        other.net.zero_grad()
        losses = Distiller(teacher, other, rules, program, replay)(Noise(), begun, N)
        assert all(loss.shape == (N,) for loss in losses.values())
        total(losses).sum().backward()
        assert {k for k, p in other.net.named_parameters() if p.grad is None or not p.grad.any()} == set()


@KINDS
def test_saving_and_loading_give_the_same_network(settings, tmp_path):
    net = unet(clip=False, schedule="scaled_linear", betas=(1e-3, 0.03), times=200, arguments={"norm_eps": 1e-3}, **settings)
    net.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["family"] == "unet"
    for loaded in (UNet.from_pretrained(tmp_path), build.pretrained(str(tmp_path))):
        assert not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True))
        assert torch.equal(*(n.model().sample(2, Noise()) for n in (net, loaded)))
    small = net.shrunk(2, 3)
    assert [*run(small.chain.generate, noise=Noise())] != [*run(net.chain.generate, noise=Noise())]
    assert (small.width, small.chain.steps, small.chain.prediction) == (2, 3, net.chain.prediction)
    assert torch.equal(small.chain.alphas, net.chain.alphas)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("width", [1, 3, 6])
def test_any_width_makes_a_network(width):
    assert (
        unet(width=width, steps=2, arguments={"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]})
        .model()
        .sample(2, Noise())
        .isfinite()
        .all()
    )


def test_under_bfloat16_losses_are_finite_and_near():
    teacher, student = unet(prediction="v").model().frozen(), unet(1, prediction="v").model()
    distiller = Distiller(teacher, student, MSE, "link", "*")
    exact = total(distiller(Noise(), torch.rand(N, *IMAGE, generator=torch.manual_seed(0))))
    with torch.autocast("cpu", torch.bfloat16):
        rough = total(distiller(Noise(), torch.rand(N, *IMAGE, generator=torch.manual_seed(0))))
    assert torch.allclose(rough, exact, rtol=0.1)
    assert copy.deepcopy(student.net).to(torch.bfloat16).model().sample(2, Noise()).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "a chain of 0 steps; 1 to 1000"),
        ({"steps": 1001}, "a chain of 1001 steps"),
        ({"steps": 1001, "prediction": "flow"}, "a chain of 1001 steps"),
        ({"prediction": "flow", "sampler": "ddpm"}, "a flow is deterministic"),
        ({"multipliers": (1, 2, 2, 2, 2)}, "5 levels needs sides divisible by 16, not 8x8"),
        ({"width": 0}, "width=0.*: not positive"),
        ({"schedule": "no-such"}, "no-such"),
        ({"arguments": {"no_such": 1}}, "UNet2DModel: .*no_such"),
    ],
)
def test_numbers_that_make_no_network_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        unet(**{"width": 4, **settings})
    if settings.get("steps") != 0 and settings.get("width") != 0 and "schedule" not in settings:
        section = config.UNetNet(kind="unet", image=IMAGE, **{"width": 4, **settings})
        with pytest.raises(BadInput, match=said):
            build.network(section)


def test_a_chain_has_alphas_or_is_a_flow():
    for prediction, given in (("epsilon", None), ("flow", alphas())):
        with pytest.raises(ValueError, match=prediction):
            Chain(Toy(), IMAGE, prediction, given)


# ------------------------------------------------------------------ a diffusers folder as teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DDPM pipeline as diffusers saves it, of a layout of its own."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(2)
        net = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(4, 6),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=2,
            attention_head_dim=2,
            flip_sin_to_cos=False,
            freq_shift=1,
        )
    path = tmp_path_factory.mktemp("ddpm")
    DDPMPipeline(net, DDPMScheduler(num_train_timesteps=60, beta_end=0.3, beta_schedule="scaled_linear")).save_pretrained(path)
    return path


@torch.no_grad()
def test_a_diffusers_folder_is_a_teacher(folder, tmp_path):
    from diffusers import DDIMPipeline

    model = build.teacher(config.Pretrained(kind="pretrained", path=str(folder), chain=12, sampler="ddim"), tmp_path, ())
    pipeline = DDIMPipeline.from_pretrained(folder)
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.scheduler.set_timesteps(12)
    x = Noise().normal("xT", (N, *IMAGE))
    for t in pipeline.scheduler.timesteps:
        x = pipeline.scheduler.step(pipeline.unet(x, t).sample, t, x).prev_sample
    assert (model.sample(N, Noise()) - (x / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5
    whole = build.pretrained(str(folder))
    assert (whole.chain.sampler, whole.chain.steps, whole.chain.clip) == ("ddpm", 60, True)
    student = build.student(config.Student(width=2), model, 0, ())
    assert [*run(student.generate, noise=Noise())] == [*run(model.generate, noise=Noise())]
    assert student.net.multipliers == (1, 1.5)
    model.net.save_pretrained(tmp_path)
    again = build.pretrained(str(tmp_path)).model()
    assert (again.sample(2, Noise()) - model.sample(2, Noise())).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("part", "changed", "said"),
    [
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 60}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr True, which is not supported"),
        ("scheduler/scheduler_config.json", {"clip_sample_range": 2.0}, "clip_sample_range 2.0"),
        ("unet/config.json", {"sample_size": None}, "no sample_size"),
        ("unet/config.json", {"out_channels": 2}, "learned variances are not supported"),
    ],
)
def test_a_diffusers_folder_that_is_not_supported_says_why(folder, tmp_path, part, changed, said):
    import shutil

    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    described = json.loads((copied / part).read_text())
    (copied / part).write_text(json.dumps(described | changed))
    if "out_channels" in changed:
        from safetensors.torch import load_file, save_file

        weights = load_file(copied / "unet/diffusion_pytorch_model.safetensors")
        weights |= {k: torch.cat([weights[k]] * 2) for k in ("conv_out.weight", "conv_out.bias")}
        save_file(weights, copied / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=said):
        build.pretrained(str(copied))


def test_a_text_to_image_folder_is_no_teacher():
    with pytest.raises(BadInput, match="a diffusers pipeline of a UNet2DModel without autoencoder or text encoder is expected"):
        build.pretrained(str(build.ZOO / "glyphs-sd"))


def test_a_teachers_chain_is_another_where_the_recipe_says_so(tmp_path):
    unet(steps=4).save_pretrained(tmp_path)
    model = build.teacher(config.Pretrained(kind="pretrained", path=str(tmp_path), chain=7), tmp_path, ())
    assert chain_of(model).steps == 7
    assert all(torch.equal(a, b) for a, b in zip(model.net.state_dict().values(), unet(steps=4).state_dict().values(), strict=True))
    for section, said in (({"chain": 1001}, "teacher.chain: a chain of 1001"), ({"sampler": "ddpm"}, "teacher.sampler")):
        with pytest.raises(BadInput, match=said):
            build.teacher(config.Pretrained(kind="pretrained", path=str(tmp_path), **section), tmp_path, ())
    with pytest.raises(BadInput, match=r"teacher.chain: is of a diffusion or flow model; zoo:digits-lvae is a LVAE"):
        build.teacher(config.Pretrained(kind="pretrained", path="zoo:digits-lvae", chain=3), tmp_path, ())
    with pytest.raises(BadInput, match="an arm's chain is of a diffusion or flow model"):
        build.student(config.Student(width=2), build.pretrained("zoo:digits-lvae").model(), 0, (), 4)


# ------------------------------------------------------------------ the pool


def online(student, teacher=None, size=8, rules=MSE):
    teacher = (teacher or toy(steps=4)).model().frozen()
    return OnlineLinks(teacher, student.model(), teacher.net, rules, size, Noise((9,)), 3)


def test_the_pool_stands_on_the_teachers_own_chains():
    pool = online(toy(steps=4, a=0.5))
    own = run(pool._chain[0].generate, noise=Noise((9,)), n=8)
    begun = [own[name].value for name in own]
    before = pool.x.clone()
    pool(Noise(), torch.tensor([7, 1, 4]))
    assert pool.done.tolist() == [0, 1, 1, 1, 3, 2, 3, 0]  # two images at every time; the last was finished, and began again
    for i, done in enumerate(pool.done.tolist()[:-1]):
        assert (pool.x[i] - begun[done][i]).abs().max() < 1e-5
    assert not torch.equal(pool.x[7], before[7])
    assert abs(pool.x[7].std().item() - 1) < 0.3
    for step in range(4):
        pool(Noise((step,)), torch.arange(8))
    assert pool.done.tolist() == [0, 1, 1, 1, 3, 2, 3, 0]
    assert (pool.x[7] - begun[0][7]).abs().max() > 0.5


def test_the_loss_of_the_pool_is_that_of_the_teachers_links():
    student = toy(steps=4, a=0.5)
    pool = online(student)
    index = torch.tensor([6, 2, 5])
    pool(Noise(), torch.tensor([0]))
    x, t = pool.x[index].clone(), pool._chain[0].links[pool.done[index]][:, 0]
    losses = pool(Noise((1,)), index)
    expected = ((pool._chain[0](x, t) - student(x, t)) ** 2).flatten(1).sum(1)
    assert torch.allclose(losses["prediction"], expected)
    total(losses).sum().backward()
    assert student.net.a.grad != 0
    assert not pool.x.requires_grad
    assert all(p.grad is None for p in pool._chain[0].parameters())
    assert total(online(toy(steps=4))(Noise(), index)).tolist() == [0.0] * 3


def test_a_random_teacher_goes_on_by_its_own_noise():
    pool = online(toy(steps=4), toy(sampler="ddpm", steps=4))
    pool(Noise(), torch.arange(8))
    own = run(pool._chain[0].link, pool.x, noise=Noise((3,)), given={"t": pool._chain[0].links[pool.done], "xt": pool.x})
    going_on = pool.done < 3
    expected = own.output[going_on].clone()
    pool(Noise((3,)), torch.arange(8))
    assert torch.equal(pool.x[going_on], expected)


def test_a_student_of_another_chain_learns_the_links_of_its_teachers():
    short, same = toy(steps=2, a=0.5), toy(steps=4, a=0.5)
    index = torch.arange(5)
    a, b = (online(student)(Noise(), index)["prediction"] for student in (short, same))
    assert torch.equal(a, b)
    x = torch.rand(4, *IMAGE)
    a, b = (Distiller(toy(steps=4).model(), s.model(), MSE, "link", "*")(Noise(), x)["prediction"] for s in (short, same))
    assert torch.equal(a, b)


@pytest.mark.parametrize("updates", [0, 1, 3, 5])
def test_a_training_on_the_pool_goes_on_to_the_same_bits(tmp_path, updates):
    teacher = toy(sampler="ddpm", steps=4)
    engine = accelerator("cpu")

    def train(folder, updates, seed=0):
        student = toy(sampler="ddpm", steps=4, a=0.5 + seed)
        section = config.Training(steps=6, batch=3, lr=0.05, ema=0.5)
        pool = OnlineLinks(teacher.model(), student.model(), teacher, MSE, 8, Noise((9,)))

        def phase(name):
            return Phase(name, pool, lambda module, b: module(b.noise, b.index), list(student.parameters()), section, len(pool.x))

        asked = itertools.count()
        with contextlib.suppress(KeyboardInterrupt):
            fit(
                student,
                phase,
                ["link"],
                Noise((4,)),
                engine=engine,
                states=States(folder / "state"),
                log=Log(folder / "log.jsonl"),
                keep_going=lambda: next(asked) < updates,
            )
        return {k: v.clone() for k, v in (student.state_dict() | dict(pool.named_buffers(recurse=False))).items()}

    whole = train(tmp_path / "whole", 99)
    train(tmp_path / "parts", updates)
    found = train(tmp_path / "parts", 99, seed=1)
    assert all(torch.equal(whole[k], found[k]) for k in whole)
    other = train(tmp_path / "other", updates)
    assert not all(torch.equal(whole[k], other[k]) for k in whole)


def test_two_processes_keep_the_pool_of_one(monkeypatch):
    """Here threads, of which each knows its rows, and all what the others say."""
    own, said, together = threading.local(), [None, None], threading.Barrier(2)

    def of_all(rows):
        said[own.rank] = rows
        together.wait(60)
        every = torch.cat(said)
        together.wait(60)
        return every

    def train(pool, rows):
        index = [Noise((1, step)).permutation("order", 8)[:5] for step in range(9)]
        return torch.cat([total(pool(Noise((2, step)).at(rows), i[rows.start : rows.stop])).detach() for step, i in enumerate(index)])

    pools = [online(toy(steps=4, a=0.5), toy(sampler="ddpm", steps=4)) for _ in range(3)]
    losses = train(pools[2], range(5))
    monkeypatch.setattr("potstill.distill.pool.of_all", of_all)
    found = [None, None]

    def one(rank):
        own.rank = rank
        found[rank] = train(pools[rank], rows_of(5, rank, 2))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for pool in pools[:2]:
        assert torch.equal(pool.x, pools[2].x)
        assert torch.equal(pool.done, pools[2].done)
    assert torch.equal(torch.cat([part.view(9, -1) for part in found], 1), losses.view(9, 5))


# ------------------------------------------------------------------ chains too long to unroll


def test_what_is_kept_for_the_gradient_is_counted():
    w = nn.Parameter(torch.ones(10))
    assert kept_for_gradient(lambda: (torch.ones(10) * w).sum()) == 40
    assert kept_for_gradient(lambda: (torch.ones(10) * w).exp().sum()) == 80
    with torch.no_grad():
        assert kept_for_gradient(lambda: (torch.ones(10) * w).exp().sum()) == 0


def test_a_chain_too_long_to_unroll_names_link_and_the_memory(monkeypatch):
    student = unet(steps=1000).model()
    kept = kept_for_gradient(lambda: run(student.link, images(2), noise=Noise()).out.dist) // 2
    monkeypatch.setattr(jobs.psutil, "virtual_memory", lambda: SimpleNamespace(available=kept * 32 * 1000))
    jobs.check_unrolled(student, 32)
    with pytest.raises(BadInput, match=r"a chain of 1,000 links is too long to unroll.*batch of 33 keeps about .* GiB.*distill\.link"):
        jobs.check_unrolled(student, 33)
    assert f"{kept * 33 * 1000 / 2**30:,.1f} GiB"
    monkeypatch.setattr(jobs.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    jobs.check_unrolled(build.pretrained("zoo:digits-lvae").model(), 10**9)


# ------------------------------------------------------------------ recipes

SECTION = {
    "name": "chain",
    "seeds": [0],
    "data": {"kind": "npz", "path": "data.npz", "test_fraction": 0.4},
    "train": {"model": {"kind": "unet", "image": [1, 8, 8], "width": 4, "steps": 3}, "steps": 3, "batch": 8},
    "teacher": {"kind": "trained"},
    "student": {"width": 2},
    "surrogate": None,
    "surrogates": {"finished": {"n": 16}},
    "distill": {
        "link": {"steps": 3, "batch": 8, "pool": 12},
        "generate": {"steps": 2, "batch": 8, "rules": [{"nodes": "out", "by": "mse"}]},
        "infer": None,
        "scratch": {"steps": 3, "batch": 8},
    },
    "arms": [
        {"kind": "data_free", "name": "online", "generate": False},
        {"kind": "data_free", "name": "finished", "start": "finished", "generate": False},
        {"kind": "data_free", "name": "short", "chain": 2},
        {"kind": "scratch", "name": "samples", "surrogate": "finished"},
        {"kind": "scratch", "name": "data"},
        {"kind": "with_data", "generate": False},
    ],
}


def told(**sections):
    """The recipe with a network that is told which of four places an image shows."""
    train = SECTION["train"] | {"model": SECTION["train"]["model"] | {"classes": 4}}
    arms = [arm for arm in SECTION["arms"] if arm.get("name") != "samples"]
    return SECTION | {"train": train, "arms": arms} | sections


def test_a_recipe_with_labels(place):
    assert place.run("run", **told()) == 0
    metrics = json.loads((place.out / "metrics.json").read_text())
    assert set(metrics["arms"]) == {"teacher", "online", "finished", "short", "data", "student_with_data"}
    assert json.loads((place.out / "students" / "online" / "seed-0" / "config.json").read_text())["classes"] == 4


def test_what_has_no_labels_cannot_teach_them(place, capsys):
    assert place.run("run", **told(arms=[{"kind": "scratch", "name": "samples", "surrogate": "finished"}])) == 2
    assert "arm samples: a surrogate has no labels" in capsys.readouterr().err
    np.savez(place.folder / "data.npz", images=np.load(place.folder / "data.npz")["images"])
    assert place.run("run", **told()) == 2
    assert "data: has no labels" in capsys.readouterr().err


def test_a_recipe_of_every_arm(place):
    assert place.run("run", **SECTION) == 0
    metrics = json.loads((place.out / "metrics.json").read_text())
    assert metrics["compared"] == "frechet"
    info = metrics["arms_info"]
    assert {k: (v["updates"], v["data"]) for k, v in info.items() if k != "teacher"} == {
        "online": (3, "none"),
        "finished": (3, "none"),
        "short": (5, "none"),
        "samples": (3, "none"),
        "data": (3, "real"),
        "student_with_data": (3, "real"),
    }
    assert "links of the teacher's unfinished images" in info["online"]["note"]
    assert "links of noised surrogate images" in info["finished"]["note"]
    assert "the denoising loss of surrogate images" in info["samples"]["note"]
    described = {name: json.loads((place.out / "students" / name / "seed-0" / "config.json").read_text()) for name in ("online", "short")}
    assert {name: d["steps"] for name, d in described.items()} == {"online": 3, "short": 2}
    assert json.loads((place.out / "train" / "held_out.json").read_text())["denoising_mse"] > 0


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"arms": [{"kind": "data_free", "start": "nowhere"}]}, "surrogate nowhere is not among surrogates"),
        ({"arms": [{"kind": "data_free", "start": "surrogate"}]}, "distill.link: trains on surrogate images and needs a surrogate section"),
        ({"arms": [{"kind": "with_data", "surrogate": "finished"}]}, "start and surrogate are of data_free arms"),
        (
            {
                "data": None,
                "train": None,
                "teacher": {"kind": "pretrained", "path": "x"},
                "arms": ["scratch"],
                "evaluate": None,
                "report": None,
            },
            "with_data, scratch and continual need data",
        ),
        ({"distill": SECTION["distill"] | {"link": None}, "arms": [{"kind": "data_free", "generate": False}]}, "it has no phase"),
        ({"train": SECTION["train"] | {"model": SECTION["train"]["model"] | {"steps": 2000}}}, "a chain of 2000 steps"),
        ({"arms": [{"kind": "data_free", "chain": 2000}]}, "student: a chain of 2000 steps"),
    ],
)
def test_what_does_not_fit_is_refused(place, capsys, changed, said):
    assert place.run("run", **(SECTION | changed)) == 2
    assert said in capsys.readouterr().err
    assert not place.out.exists()


def test_links_of_a_teacher_without_a_chain_are_refused(place, capsys):
    distill = {"link": {"steps": 2, "batch": 8}, "generate": None, "infer": None}
    assert place.run("run", surrogate=None, distill=distill) == 2
    assert "distill.link.start: noise is for teachers with a chain of potstill's own" in capsys.readouterr().err


def test_a_classifier_from_scratch_needs_labels_that_a_surrogate_has_not(place, capsys):
    sections = {
        "teacher": {"kind": "pretrained", "path": "zoo:digits-classifier"},
        "surrogate": None,
        "surrogates": {"gray": {"kind": "uniform", "n": 16}},
        "distill": {"generate": None, "scratch": {"steps": 2, "batch": 8}},
        "arms": [{"kind": "scratch", "surrogate": "gray"}],
    }
    assert place.run("run", **sections) == 2
    assert "arm student_scratch: a surrogate has no labels, which a classifier needs" in capsys.readouterr().err


def test_a_chain_too_long_is_found_before_anything_is_written(place, capsys, monkeypatch):
    monkeypatch.setattr(jobs.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert place.run("run", **SECTION) == 2
    assert "a chain of 2 links is too long to unroll" in capsys.readouterr().err
    assert not place.out.exists()


def test_the_denoising_loss_is_of_the_images_in_the_networks_range():
    chain = toy()
    x = torch.rand(N, *IMAGE)
    assert torch.equal(DenoisingLoss(chain, chain)(Noise(), x)["out"], chain.denoising(Noise(), 2 * x - 1))
    net = unet()
    assert {k.split(".")[0] for k in DenoisingLoss(net, net.chain).state_dict()} == {"net"}
