"""What the families promise whose data are points and strokes, and the published losses, recomputed from their formulas."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from potstill import build
from potstill.distill.distiller import Distiller, Elbo, WakeSleep, likelihood, reached
from potstill.divergence import Match, compare, has_priors, latent_kl, log_density, negative_elbo, sampled_kl, total
from potstill.evaluate.arms import reconstructions, samples
from potstill.families.helmholtz import HelmholtzMachine
from potstill.families.vrnn import VRNN, Stroke
from potstill.noise import FixedNoise, Noise
from potstill.trace import draw, noise_of, run, undraw

N, STEPS = 5, 4
MAKE = {
    "helmholtz": lambda: HelmholtzMachine(width=5, latent=2, std=0.4, mean=(3.0, 70.0), scale=(1.5, 12.0)),
    "vrnn": lambda: VRNN((3, STEPS, 1), 6, 7, 2, 0.5, 0.7, (0.1, 0.0), (0.2, 0.3)),
    "vrnn, published": lambda: VRNN((3, STEPS, 1), 6, 7, 2, 1.0, 0.0),
}
ALL = pytest.mark.parametrize("name", MAKE)
OBSERVED = {"helmholtz": "y*", "vrnn": "x*", "vrnn, published": "x*"}
RULES = (Match("z*"), Match("[xy]*"))


def network(name, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MAKE[name]().eval()


def data(net, n=N):
    """Values like a model's own."""
    return net.model().sample(n, Noise((77,)))


@ALL
@torch.no_grad()
def test_nodes_and_shapes(name):
    net = network(name)
    model = net.model()
    latent = {"helmholtz": ["z4", "z3", "z2", "z1"]}.get(name, [f"z{t}" for t in range(STEPS)])
    seen = {"helmholtz": ["y1", "y2"]}.get(name, [f"x{t}" for t in range(STEPS)])
    generated = run(net.generate, noise=Noise(), n=N)
    turns = ["z4", "z3", "y2", "z2", "z1", "y1"] if name == "helmholtz" else [*itertools.chain(*zip(latent, seen, strict=True))]
    assert list(generated) == [*turns, "out"]
    inferred = run(net.infer, model.images.encode(data(net)), noise=Noise())
    assert {*inferred} == {*generated}
    for trace in (generated, inferred):
        assert {trace[k].value.shape for k in latent} == {(N, 2)}
        assert {trace[k].value.shape for k in seen} == {(N, 1 if name == "helmholtz" else 3)}
    assert generated.output.shape == (N, *net.image)
    assert torch.equal(inferred.out.dist.log_prob(generated.output).isfinite().all(), torch.tensor(True))
    x = model.sample(64, Noise())
    assert x.shape == (64, *net.image)
    assert (x < 0).any() or (x > 1).any()  # in units of the data, not clipped
    if name != "helmholtz":
        assert {*x[:, 0].unique().tolist()} == {0.0, 1.0}
    assert torch.equal(model.sample(N, Noise()), model.images.decode(generated.output))


@ALL
@torch.no_grad()
def test_what_is_observed_is_the_data(name):
    net = network(name)
    x = torch.randn(N, *net.image)
    found = run(net.infer, x, noise=Noise()).values_of(OBSERVED[name])
    if name == "helmholtz":
        assert torch.equal(torch.cat([found["y1"], found["y2"]], 1), x[..., 0, 0])
    else:
        assert torch.equal(torch.stack([found[f"x{t}"] for t in range(STEPS)], 2), x[..., 0])


@ALL
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(name):
    net = network(name)
    x = net.model().images.encode(data(net))
    together, alone = run(net.generate, noise=Noise().at(range(10, 15)), n=N), run(net.generate, noise=Noise().at([13]), n=1)
    assert torch.allclose(together.output[3], alone.output[0], atol=1e-5)
    together, alone = run(net.infer, x, noise=Noise().at(range(10, 15))), run(net.infer, x[3:4], noise=Noise().at([13]))
    assert torch.allclose(together.out.dist.mean[3], alone.out.dist.mean[0], atol=1e-5)


@ALL
@torch.no_grad()
def test_replaying_its_own_values_changes_nothing_and_an_identical_student_loses_nothing(name):
    net = network(name)
    for program, inputs in ((net.generate, ()), (net.infer, (net.model().images.encode(data(net)),))):
        trace = run(program, *inputs, noise=Noise(), n=N)
        for pattern in ("*", "z*", OBSERVED[name]):
            again = run(program, *inputs, noise=Noise((99,)) if pattern == "*" else Noise(), n=N, given=trace.values_of(pattern))
            assert all(loss.tolist() == [0.0] * N for loss in compare(trace, again, RULES).values())
            assert torch.equal(again.out.dist.mean, trace.out.dist.mean)


@ALL
@torch.no_grad()
def test_the_noise_behind_a_trace_gives_it_again(name):
    net = network(name)
    trace = run(net.generate, noise=Noise(), n=N)
    again = run(net.generate, noise=noise_of(trace, Noise((5,))), n=N)
    assert torch.allclose(again.output, trace.output, atol=1e-4)


@ALL
@pytest.mark.parametrize("images", [False, True], ids=["noise", "data"])
def test_distillation_reaches_the_generator_and_wants_the_teachers_values(name, images):
    teacher, student = network(name).model().frozen(), network(name, 1).model()
    x = data(teacher.net) if images else None
    losses = Distiller(teacher, student, RULES, replay=OBSERVED[name])(Noise(), x, N)
    assert set(losses) == {*run(teacher.generate, noise=Noise()).latents()}
    total(losses).sum().backward()
    encoder = {id(p) for module in student.net.encoder() for p in module.parameters()}
    # A ReLU of few units may be dead for all of a batch: what is reached has a gradient, be it zero.
    assert {id(p) for p in student.net.parameters() if p.grad is None} == encoder
    assert all((loss >= -1e-6).all() for loss in losses.values())
    assert all(p.grad is None for p in teacher.net.parameters())


@ALL
def test_generating_and_inferring_reach_what_they_should(name):
    model = network(name).model()
    encoder = {id(p) for module in model.net.encoder() for p in module.parameters()}
    names = {k for k, p in model.net.named_parameters() if id(p) in encoder}
    assert reached(model, "infer") - reached(model, "generate") == names
    assert reached(model, "generate") == {k for k, _ in model.net.named_parameters()} - names


@ALL
def test_training_reaches_every_parameter_and_lowers_the_loss(name):
    net = network(name)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * Noise((3,)).normal(str(p.shape), (1, *p.shape))[0]  # or units of so small a network may be dead
    model = net.model()
    objective, x = likelihood(model), data(net, 64)
    assert isinstance(objective, WakeSleep if name == "helmholtz" else Elbo)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    means = []
    for step in range(24):
        loss = total(objective(Noise((step,)), x)).mean()
        optimizer.zero_grad()
        loss.backward()
        assert not [k for k, p in net.named_parameters() if p.grad is None]
        optimizer.step()
        means.append(loss.item())
    assert sum(means[-4:]) < sum(means[:4])


@ALL
def test_under_bfloat16_autocast_losses_are_finite_and_near(name):
    teacher, student = network(name).model().frozen(), network(name, 1).model()
    distiller = Distiller(teacher, student, RULES, replay="*")
    exact = total(distiller(Noise(), n=64)).mean()
    with torch.autocast("cpu", torch.bfloat16):
        rough = total(distiller(Noise(), n=64)).mean()
    rough.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.net.parameters())
    assert rough.item() == pytest.approx(exact.item(), rel=0.15)


@ALL
def test_saving_and_loading_give_the_same_network(name, tmp_path):
    net = network(name)
    net.save_pretrained(tmp_path)
    for loaded in (type(net).from_pretrained(tmp_path), build.pretrained(str(tmp_path))):
        assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True))
        assert loaded.model().images == net.model().images
        assert torch.equal(loaded.model().sample(3, Noise()), net.model().sample(3, Noise()))
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["family"] == {"HelmholtzMachine": "helmholtz", "VRNN": "vrnn"}[type(net).__name__]


@ALL
def test_shrunk_changes_the_width_alone(name):
    net = network(name)
    small = net.shrunk(3)
    assert (small.width, small.model().images) == (3, net.model().images)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in net.parameters())
    assert set(compare(*(run(m.generate, noise=Noise(), n=2) for m in (net, small)))) >= {"z1", "out"}
    assert all(getattr(small, k) == getattr(net, k) for k in ("latent", "std", "mean", "scale", "image"))
    assert build.width_for(net, sum(p.numel() for p in net.parameters()) / sum(p.numel() for p in small.parameters())) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HelmholtzMachine((3, 1, 1)), r"points of two values, \(2, 1, 1\), not \(3, 1, 1\)"),
        (lambda: HelmholtzMachine(width=0), "must be positive"),
        (lambda: HelmholtzMachine(std=0.0), "must be positive"),
        (lambda: HelmholtzMachine(scale=(1.0, 0.0)), "must be positive"),
        (lambda: HelmholtzMachine(mean=(1.0, 2.0, 3.0)), "one number or two"),
        (lambda: VRNN((2, 8, 1)), r"\(3, steps, 1\), not \(2, 8, 1\)"),
        (lambda: VRNN((3, 8, 8)), r"\(3, steps, 1\), not \(3, 8, 8\)"),
        (lambda: VRNN(hidden=0), "must be positive"),
        (lambda: VRNN(std=float("nan")), "must be positive"),
        (lambda: VRNN(temperature=-1.0), "must be positive"),
    ],
)
def test_numbers_that_make_no_network_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------ the published losses, from their formulas


def _dense(layers, x):
    return layers[2](F.relu(layers[0](x)))


def _bce(logits, p):
    """The publication's "KL" of a coin: binary cross-entropy, which is the KL plus the entropy of the teacher's coin."""
    return F.binary_cross_entropy_with_logits(logits, p, reduction="none").sum(1)


def _entropy(p):
    return Bernoulli(probs=p).entropy().sum(1)


def test_the_published_loss_of_the_helmholtz_machine():
    """Chen et al., section 4: both machines draw z by the same uniforms, the student goes on from the teacher's y, std 0.5."""
    torch.manual_seed(0)
    t, s = HelmholtzMachine(width=8), HelmholtzMachine(width=2)
    noise = Noise((4,))
    u = {k: noise.uniform(k, (N, 2)) for k in ("z1", "z2", "z3", "z4")}
    e = {k: noise.normal(k, (N, 1)) for k in ("y1", "y2")}
    parts, values = {}, {}
    for who, net in (("t", t), ("s", s)):
        g = net.gennet
        logit = {"z4": g[0].weight.T.expand(N, 2)}
        z = (u["z4"] < logit["z4"].sigmoid()).float()
        logit["z3"] = _dense(g[1], z)
        z = (u["z3"] < logit["z3"].sigmoid()).float()
        mean = {"y2": _dense(g[2], z)}
        y2 = values.setdefault("y2", mean["y2"].detach() + 0.5 * e["y2"])
        logit["z2"] = _dense(g[3], y2)
        z = (u["z2"] < logit["z2"].sigmoid()).float()
        logit["z1"] = _dense(g[4], z)
        z = (u["z1"] < logit["z1"].sigmoid()).float()
        mean["y1"] = _dense(g[5], z)
        values.setdefault("y1", mean["y1"].detach() + 0.5 * e["y1"])
        parts[who] = logit, mean
    (logit_t, mean_t), (logit_s, mean_s) = parts["t"], parts["s"]
    p = {k: v.detach().sigmoid() for k, v in logit_t.items()}
    published = sum(_bce(logit_s[k], p[k]) for k in u)
    published = published + sum(kl_divergence(Normal(mean_t[k].detach(), 0.5), Normal(mean_s[k], 0.5)).sum(1) for k in e)
    ours = total(Distiller(t.model().frozen(), s.model(), RULES, replay="y*")(noise, n=N))
    # What the publication adds does not depend on the student: the gradients are the same.
    assert torch.allclose(ours, published - sum(_entropy(p[k]) for k in u), atol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), s.gennet.parameters()) for loss in (ours, published)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))
    generated = run(t.generate, noise=noise, n=N)
    assert torch.allclose(generated.output.flatten(1), torch.cat([values["y1"], values["y2"]], 1), atol=1e-6)


def _twice(layers, x):
    return F.relu(layers.linear1(F.relu(layers.linear0(x))))


def _cell(rnn, x, h, c):
    i, f, g, o = F.linear(x, rnn.weight_ih_l0, rnn.bias_ih_l0).add(F.linear(h, rnn.weight_hh_l0, rnn.bias_hh_l0)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def test_the_published_loss_of_the_vrnn():
    """Chen et al., section 4: z by the same noise, x the teacher's, drawn without the offsets' noise; mean over steps, lambda 1e-3."""
    torch.manual_seed(0)
    t, s = VRNN((3, STEPS, 1), 9, 8, 3, 1.0, 0.0), VRNN((3, STEPS, 1), 4, 5, 3, 1.0, 0.0)
    noise, weight = Noise((4,)), 1e-3
    x, logit, mean, prior = [], {}, {}, {}
    for who, net in (("t", t), ("s", s)):
        h = c = torch.zeros(N, net.hidden)
        for step in range(STEPS):
            found = _twice(net.mlp_h_z, h)
            mu, logvar = net.prior_mean(found), net.prior_logvar(found)
            prior[who, step] = Normal(mu, (0.5 * logvar).exp())
            z = _twice(net.feature_extractor_z, mu + (0.5 * logvar).exp() * noise.normal(f"z{step}", (N, 3)))
            y = net.gen_linear(_twice(net.mlp_hz_x, torch.cat([z, h], 1)))
            logit[who, step], mean[who, step] = y[:, :1], y[:, 1:]
            if who == "t":
                u = Normal(0.0, 1.0).cdf(noise.normal(f"x{step}", (N, 3))[:, :1])
                x.append(torch.cat([(u < y[:, :1].sigmoid()).float(), y[:, 1:]], 1).detach())
            h, c = _cell(net.rnn, torch.cat([_twice(net.feature_extractor_x, x[step]), z], 1), h, c)
    coins = [logit["t", i].detach().sigmoid() for i in range(STEPS)]
    pen = sum(_bce(logit["s", i], p) for i, p in enumerate(coins)) / STEPS
    offset = sum(kl_divergence(Normal(mean["t", i].detach(), 1.0), Normal(mean["s", i], 1.0)).sum(1) for i in range(STEPS)) / STEPS
    fixed = [Normal(prior["t", i].loc.detach(), prior["t", i].scale.detach()) for i in range(STEPS)]
    latent = sum(kl_divergence(fixed[i], prior["s", i]).sum(1) for i in range(STEPS)) / STEPS
    published = pen + offset + weight * latent
    rules = (Match("z*", weight=weight), Match("x*"))
    ours = total(Distiller(t.model().frozen(), s.model(), rules, replay="x*")(noise, n=N)) / STEPS
    assert torch.allclose(ours, published - sum(map(_entropy, coins)) / STEPS, atol=1e-5)
    learns = [p for k, p in s.named_parameters() if k in reached(s.model(), "generate")]
    gradients = [torch.autograd.grad(loss.sum(), learns) for loss in (ours, published)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))
    assert torch.allclose(run(t.generate, noise=noise, n=N).output[..., 0], torch.stack(x, 2), atol=1e-5)


def test_the_published_wake_and_sleep():
    """Awake, -log p of the data and of what is inferred of them; asleep, -log q of what was dreamed."""
    torch.manual_seed(0)
    net = HelmholtzMachine(width=3)
    g, q, noise, x = net.gennet, net.infnet, Noise((6,)), torch.randn(N, 2, 1, 1)
    losses = WakeSleep(net.model())(noise, x)
    y1, y2 = x[:, :1, 0, 0], x[:, 1:, 0, 0]

    def coin(source, name, logits):
        return (source.uniform(name, (N, 2)) < logits.sigmoid()).float()

    def posterior(y1, y2, z1, z3):
        return [_dense(q[0], torch.cat([y1, y2], 1)), _dense(q[1], torch.cat([y2, z1], 1)), _dense(q[2], y2), _dense(q[3], z3)]

    wake, dream, zeros = noise.fold("wake"), noise.fold("dream"), torch.zeros(N, 2)
    z1, z3 = (coin(wake, f"z{i}", posterior(y1, y2, zeros, zeros)[i - 1]) for i in (1, 3))
    z2, z4 = (coin(wake, f"z{i}", posterior(y1, y2, z1, z3)[i - 1]) for i in (2, 4))
    expected = _bce(g[0].weight.T.expand(N, 2), z4) + _bce(_dense(g[1], z4), z3) + _bce(_dense(g[3], y2), z2) + _bce(_dense(g[4], z2), z1)
    expected = expected - (Normal(_dense(g[2], z3), 0.5).log_prob(y2) + Normal(_dense(g[5], z1), 0.5).log_prob(y1))[:, 0]
    assert torch.allclose(losses["wake"], expected, atol=1e-5)
    d = run(net.generate, noise=dream, n=N).values_of()
    inferred = posterior(d["y1"], d["y2"], d["z1"], d["z3"])
    assert torch.allclose(losses["sleep"], sum(_bce(logits, d[f"z{i}"]) for i, logits in enumerate(inferred, 1)), atol=1e-5)
    for part, learns, rests in (("wake", g, q), ("sleep", q, g)):
        net.zero_grad()
        losses[part].sum().backward(retain_graph=True)
        assert all(p.grad is not None for p in learns.parameters())
        assert all(p.grad is None for p in rests.parameters())


# ------------------------------------------------------------------ likelihoods


@torch.no_grad()
def test_the_sampled_bound_of_a_helmholtz_machine_bounds_the_likelihood():
    """All 256 states of the latents, summed: the average of the estimates is the exact bound, and above -log p(x)."""
    net = network("helmholtz")
    x = net.model().images.encode(data(net, 1))
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8))).view(256, 4, 2)
    given = {f"z{i + 1}": states[:, i] for i in range(4)}
    posterior = run(net.infer, x.expand(256, -1, -1, -1), noise=Noise(), given=given)
    generative = run(net.generate, noise=Noise(), n=256, given={**posterior.values_of("[zy]*")})
    log_q = log_density(posterior[k] for k in given)
    assert log_q.exp().sum().item() == pytest.approx(1, abs=1e-5)
    nll = -log_density(n for k, n in generative.items()).logsumexp(0)
    kl = sampled_kl(posterior, generative)
    distortion = -posterior.out.dist.log_prob(x.expand(256, -1, -1, -1)).flatten(1).sum(1)
    bound = (log_q.exp() * (kl + distortion)).sum()
    assert bound >= nll
    n = 4000
    many = run(net.infer, x.expand(n, -1, -1, -1), noise=Noise((1,)))
    estimate = sampled_kl(many, run(net.generate, noise=Noise(), n=n, given=many.values_of("[zy]*")))
    estimate = estimate - many.out.dist.log_prob(x).flatten(1).sum(1)
    assert abs(estimate.mean() - bound) < 4 * estimate.std() / n**0.5
    assert not has_priors(posterior)
    with pytest.raises(ValueError, match="node 'z1' is a Bernoulli without a prior"):
        latent_kl(posterior)


@torch.no_grad()
def test_the_elbo_of_a_vrnn_is_what_sampling_says():
    net = network("vrnn")
    x = net.model().images.encode(data(net, 1)).expand(3000, -1, -1, -1)
    posterior = run(net.infer, x, noise=Noise())
    assert has_priors(posterior)
    parts = negative_elbo(posterior, x)
    assert set(parts) == {*(f"z{t}" for t in range(STEPS)), "out"}  # what is observed has no KL
    generative = run(net.generate, noise=Noise(), n=3000, given=posterior.values_of("[zx]*"))
    assert torch.allclose(-log_density(generative[f"x{t}"] for t in range(STEPS)), parts["out"], atol=1e-3)
    gap = sampled_kl(posterior, generative) - total({k: v for k, v in parts.items() if k != "out"})
    assert abs(gap.mean()) < 4 * gap.std() / 3000**0.5


@ALL
@torch.no_grad()
def test_reconstructions_and_samples_are_in_units_of_the_data(name):
    net = network(name)
    model, x = net.model(), data(net, 12)
    outputs, figures = reconstructions(model, x, Noise(), 5)
    assert set(figures) == {"reconstruction_mse", "kl", "nelbo"}
    assert figures["reconstruction_mse"] == pytest.approx((outputs - x).double().pow(2).mean().item(), rel=1e-5)
    assert all(torch.isfinite(torch.tensor(v)) for v in figures.values())
    assert torch.allclose(samples(model, 7, Noise(), 3), model.sample(7, Noise()), atol=1e-4)


# ------------------------------------------------------------------ a stroke


def test_a_stroke_is_a_coin_and_a_gaussian():
    logits, loc = torch.tensor([[0.3], [-1.0]]), torch.randn(2, 2)
    p = Stroke(logits, Normal(loc, torch.full_like(loc, 0.4)))
    q = Stroke(logits + 0.5, Normal(loc - 1, torch.full_like(loc, 0.3)))
    value = torch.tensor([[1.0, 0.2, 0.1], [0.0, -0.3, 2.0]])
    expected = torch.cat([Bernoulli(logits=logits).log_prob(value[:, :1]), Normal(loc, 0.4).log_prob(value[:, 1:])], 1)
    assert torch.allclose(p.log_prob(value), expected)
    parts = kl_divergence(Bernoulli(logits=logits), Bernoulli(logits=logits + 0.5)).sum(1)
    parts = parts + kl_divergence(Normal(loc, 0.4), Normal(loc - 1, 0.3)).sum(1)
    assert torch.allclose(kl_divergence(p, q), parts, atol=1e-5)
    assert torch.allclose(p.mean, torch.cat([logits.sigmoid(), loc], 1))


def test_strokes_are_drawn_as_often_and_as_far_as_they_say_and_their_noise_is_found_again():
    n, temperature = 20000, 0.5
    p = Stroke(torch.full((n, 1), -0.8), Normal(torch.full((n, 2), 2.0), torch.full((n, 2), 0.4)), temperature)
    value = draw(p, "x", Noise())
    assert value[:, 0].mean().item() == pytest.approx(torch.tensor(-0.8).sigmoid().item(), abs=0.012)
    assert value[:, 1:].mean().item() == pytest.approx(2.0, abs=0.01)
    assert value[:, 1:].std().item() == pytest.approx(0.4 * temperature, rel=0.02)
    found = undraw(p, value, "x", Noise((1,)))
    assert torch.allclose(draw(p, "x", FixedNoise({"x": found})), value, atol=1e-5)
    assert found.mean(0).abs().max() < 0.03  # of a coin the noise is inferred anew, but it is standard noise
    assert (found.std(0) - 1).abs().max() < 0.03


def test_a_teachers_state_is_left_as_it_was():
    teacher, student = network("vrnn").model().frozen(), network("vrnn", 1).model()
    before = copy.deepcopy(teacher.net.state_dict())
    total(Distiller(teacher, student, RULES, replay="x*")(Noise(), n=N)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before.values(), teacher.net.state_dict().values(), strict=True))


def test_a_model_of_priors_learns_by_the_elbo():
    net = nn.Linear(2, 2)

    def infer(sample, x):
        return Normal(sample("z", Normal(net(x.flatten(1)), 1.0)).view_as(x), 1.0)

    model = network("helmholtz").model()
    assert isinstance(likelihood(type(model)(net, model.images, infer=infer)), Elbo)
