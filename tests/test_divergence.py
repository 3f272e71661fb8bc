"""Divergences against torch and closed forms; comparing traces; the negative ELBO."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Categorical, Independent, Normal, kl_divergence

from potstill.divergence import Match, compare, hinton, kl, latent_kl, mse, negative_elbo, per_sample, reverse_kl, total, wasserstein2
from potstill.families.lvae import LVAE
from potstill.noise import FixedNoise, Noise
from potstill.trace import Point, run


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PAIRS = {
    "normal": lambda seed: Normal(random(5, 3, 2, seed=seed), random(5, 3, 2, seed=seed + 1).exp()),
    "bernoulli": lambda seed: Bernoulli(logits=3 * random(5, 3, seed=seed)),
    "bernoulli of probabilities": lambda seed: Bernoulli(random(5, 3, seed=seed).sigmoid()),
    "categorical": lambda seed: Categorical(logits=2 * random(5, 7, seed=seed)),
    "pixels of categories": lambda seed: Categorical(logits=2 * random(5, 3, 7, seed=seed)),
    "independent normal": lambda seed: Independent(Normal(random(5, 3, seed=seed), random(5, 3, seed=seed + 1).exp()), 1),
    "independent bernoulli": lambda seed: Independent(Bernoulli(logits=3 * random(5, 3, 2, seed=seed)), 2),
    "independent categorical": lambda seed: Independent(Categorical(logits=random(5, 3, 7, seed=seed)), 1),
}


@pytest.mark.parametrize("name", PAIRS)
def test_kl_is_torchs(name):
    p, q = PAIRS[name](0), PAIRS[name](10)
    forward, backward = kl(p, q), reverse_kl(p, q)
    assert forward.shape == (5,)
    assert torch.allclose(forward, per_sample(kl_divergence(p, q)), rtol=1e-9)
    assert torch.allclose(backward, per_sample(kl_divergence(q, p)), rtol=1e-9)
    assert (forward - backward).abs().min() > 1e-3
    assert (forward > 0).all()


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-6, 4), st.floats(-6, 4))
@settings(deadline=None, max_examples=100)  # a busy machine is not an error
def test_kl_of_normals_is_torchs_and_never_negative(mean_p, mean_q, log_p, log_q):
    p, q = (Normal(torch.tensor([[m]]), torch.tensor([[s]]).exp()) for m, s in ((mean_p, log_p), (mean_q, log_q)))
    expected = kl_divergence(Normal(p.loc.double(), p.scale.double()), Normal(q.loc.double(), q.scale.double())).item()
    assert kl(p, q).item() == pytest.approx(expected, rel=1e-4, abs=2e-6)
    assert kl(p, q).item() >= -1e-6


def test_kl_of_a_very_narrow_normal_is_finite():
    """The ratio of the stds squared underflows float32; its logarithm does not."""
    p, q = (Normal(torch.zeros(1, 1), torch.full((1, 1), std)) for std in (1e-25, 1.0))
    assert kl(p, q).item() == pytest.approx(25 * math.log(10) - 0.5, rel=1e-6)


def test_kl_of_sure_coins_is_finite():
    p, q = (Bernoulli(logits=torch.tensor([[a, -a]])) for a in (80.0, -80.0))
    assert kl(p, q).item() == pytest.approx(160)
    assert kl(p, p).item() == 0


def test_kl_of_points_is_half_the_squared_error():
    p, q = Point(random(5, 3, 2)), Point(random(5, 3, 2, seed=1))
    assert torch.allclose(kl(p, q), 0.5 * ((p.value - q.value) ** 2).sum((1, 2)))


def test_wasserstein2_is_that_of_gaussians():
    p, q = PAIRS["normal"](0), PAIRS["normal"](10)
    expected = torch.zeros(5, dtype=torch.float64)
    for i in range(3):
        for j in range(2):  # in one dimension: the mean over u of (F^-1(u) - G^-1(u))^2
            u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
            quantile = math.sqrt(2) * torch.erfinv(2 * u - 1)
            for k in range(5):
                difference = p.loc[k, i, j] + p.scale[k, i, j] * quantile - q.loc[k, i, j] - q.scale[k, i, j] * quantile
                expected[k] += (difference**2).mean()
    assert torch.allclose(wasserstein2(p, q), expected, rtol=1e-3)


def test_mse_is_of_the_means():
    p, q = PAIRS["normal"](0), PAIRS["normal"](10)
    assert torch.allclose(mse(p, q), ((p.loc - q.loc) ** 2).sum((1, 2)))
    coins = PAIRS["bernoulli"](0), PAIRS["bernoulli"](10)
    assert torch.allclose(mse(*coins), ((coins[0].probs - coins[1].probs) ** 2).sum(1))
    points = Point(random(5, 3)), Point(random(5, 3, seed=1))
    assert torch.allclose(mse(*points), ((points[0].value - points[1].value) ** 2).sum(1))


# ------------------------------------------------------------------ equal arguments give exactly 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("by", "names"),
    [
        (kl, [*PAIRS, "point"]),
        (reverse_kl, [*PAIRS, "point"]),
        (wasserstein2, ["normal"]),
        (mse, ["normal", "bernoulli", "point"]),
        (hinton(1), ["categorical"]),
        (hinton(7.3), ["categorical"]),
    ],
)
def test_equal_conditionals_are_exactly_0_apart(by, names, dtype):
    for name in names:
        for seed in range(20):
            pair = []
            for _ in range(2):  # made twice, so that nothing passes because it is one object
                made = Point(random(5, 3, seed=seed)) if name == "point" else PAIRS[name](seed)
                base = made.base_dist if isinstance(made, Independent) else made
                for attribute in ("loc", "scale", "logits", "probs", "value"):
                    if attribute in vars(base):
                        setattr(base, attribute, getattr(base, attribute).to(dtype))
                pair.append(made)
            assert by(*pair).abs().max().item() == 0.0


@pytest.fixture(scope="module")
def lvae():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LVAE((1, 8, 8), width=8, levels=3, latent=4).eval().requires_grad_(False)


@pytest.mark.parametrize("replay", ["", "*", "z[12]", "out"])
@pytest.mark.parametrize("by", [kl, reverse_kl, wasserstein2, mse])
def test_a_copy_of_the_teacher_is_exactly_0_from_it(lvae, replay, by):
    student = copy.deepcopy(lvae)
    noise = Noise((3,))
    t = run(lvae.generate, noise=noise, n=4)
    s = run(student.generate, noise=noise, n=4, given=t.values_of(replay))
    losses = compare(t, s, (Match(by=by),))
    assert list(losses) == ["z3", "z2", "z1", "out"]
    assert all(loss.tolist() == [0.0] * 4 for loss in losses.values())
    with torch.no_grad():
        student.d1.out.weight.mul_(1.001)
    s = run(student.generate, noise=noise, n=4, given=t.values_of(replay))
    losses = compare(t, s, (Match(by=by),))
    assert [name for name, loss in losses.items() if (loss > 0).all()] == (["z1", "out"] if replay in ("", "out") else ["z1"])


# ------------------------------------------------------------------ linear-Gaussian chains, where everything is known


class Chain:
    """x0 ~ N(0, 1), x1 ~ N(a x0 + b, s), out ~ N(c x1 + d, t), all scalar, in float64."""

    def __init__(self, a, b, s, c, d, t):
        self.a, self.b, self.s, self.c, self.d, self.t = a, b, s, c, d, t

    def __call__(self, sample):
        one = torch.ones((sample.n, 1), dtype=torch.float64)
        x0 = sample("x0", Normal(0 * one, one))
        x1 = sample("x1", Normal(self.a * x0 + self.b, self.s * one))
        return Normal(self.c * x1 + self.d, self.t * one)

    def joint(self):
        """Mean and covariance of (x0, x1, out)."""
        mean = torch.tensor([0, self.b, self.c * self.b + self.d], dtype=torch.float64)
        rows = [[1, 0, 0], [self.a, self.s, 0], [self.c * self.a, self.c * self.s, self.t]]
        loadings = torch.tensor(rows, dtype=torch.float64)
        return mean, loadings @ loadings.T


TEACHER, STUDENT = Chain(0.8, 0.3, 0.5, -1.2, 0.1, 0.4), Chain(1.1, -0.2, 0.7, -0.9, 0.4, 0.6)

# Equally weighted points with the mean and covariance of standard noise: they integrate a quadratic exactly.
SIGNS = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=torch.float64)
QUADRATURE = FixedNoise({name: SIGNS[:, i : i + 1] for i, name in enumerate(("x0", "x1", "out"))})


def kl_of_joints(p, q):
    """KL between two multivariate normals, in closed form."""
    (mean_p, covariance_p), (mean_q, covariance_q) = p, q
    precision, difference = covariance_q.inverse(), mean_q - mean_p
    trace = (precision @ covariance_p).trace() + difference @ precision @ difference
    return (0.5 * (trace - len(mean_p) + covariance_q.logdet() - covariance_p.logdet())).item()


def chains(teacher, student, replay):
    t = run(teacher, noise=QUADRATURE, n=8)
    return t, run(student, noise=QUADRATURE, n=8, given=t.values_of(replay))


def test_kl_under_replay_sums_to_that_of_the_joint():
    t, s = chains(TEACHER, STUDENT, "*")
    found = total(compare(t, s)).mean().item()
    assert found == pytest.approx(kl_of_joints(TEACHER.joint(), STUDENT.joint()), rel=1e-12)
    free = total(compare(*chains(TEACHER, STUDENT, ""))).mean().item()
    assert abs(free - found) > 0.1  # another loss


def distance_of_outputs(teacher, student):
    """Squared 2-Wasserstein distance of the two outputs' marginals."""
    (mean_t, covariance_t), (mean_s, covariance_s) = teacher.joint(), student.joint()
    return ((mean_t[2] - mean_s[2]) ** 2 + (covariance_t[2, 2].sqrt() - covariance_s[2, 2].sqrt()) ** 2).item()


def test_the_free_run_bounds_the_distance_of_the_outputs_from_above():
    losses = compare(*chains(TEACHER, STUDENT, ""), (Match("out", wasserstein2),))
    exact = distance_of_outputs(TEACHER, STUDENT)
    bound = losses["out"].mean().item()
    assert bound > exact + 0.01
    # It is the expected squared difference of two outputs that share their noise.
    t, s = chains(TEACHER, STUDENT, "")
    assert bound == pytest.approx(((t.output - s.output) ** 2).mean().item(), rel=1e-12)


def test_the_bound_is_reached_where_the_student_is_the_teacher_stretched():
    student = Chain(TEACHER.a, TEACHER.b, TEACHER.s, 2 * TEACHER.c, 0.7, 2 * TEACHER.t)
    bound = compare(*chains(TEACHER, student, ""), (Match("out", wasserstein2),))["out"].mean().item()
    assert bound == pytest.approx(distance_of_outputs(TEACHER, student), rel=1e-12)


# ------------------------------------------------------------------ Hinton


def reference(teacher, student, temperature):
    """Hinton et al. (2015) as torch writes it."""
    p, q = F.softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)
    return temperature**2 * F.kl_div(q, p, reduction="none").sum(-1)


@pytest.mark.parametrize("temperature", [1, 2, 4.0, 20])
def test_hinton_is_the_reference_at_every_temperature(temperature):
    """torchdistill drops the squared temperature in some settings: the loss is then 400 times too small at 20."""
    a, b = 3 * random(6, 10), 3 * random(6, 10, seed=1)
    found = hinton(temperature)(Categorical(logits=a), Categorical(logits=b))
    assert found.shape == (6,)
    assert torch.allclose(found, reference(a, b, temperature), rtol=1e-9)


def test_hintons_gradient_keeps_its_size_as_the_temperature_rises():
    a = random(6, 10)

    def gradient(temperature):
        b = random(6, 10, seed=1).requires_grad_()
        hinton(temperature)(Categorical(logits=a), Categorical(logits=b)).sum().backward()
        return b.grad

    limit = random(6, 10, seed=1) - a  # section 2.1 of the paper: (the difference of centered logits) / classes
    limit = (limit - limit.mean(1, keepdim=True)) / 10
    for temperature in (1e3, 1e4):
        assert torch.allclose(gradient(temperature), limit, rtol=1e-2, atol=1e-3)
    assert 0.5 < (gradient(4).norm() / gradient(1).norm()).item() < 2


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="must be above 0"):
        hinton(temperature)


# ------------------------------------------------------------------ compare


def two_nodes(width=3, scale=1.0, names=("z2", "z1")):
    def program(sample):
        z = sample.normal(names[0], (2,))
        z = sample(names[1], Normal(scale * z, torch.ones_like(z)))
        return Point(scale * z.sum(1, keepdim=True).expand(sample.n, width))

    return program


def pair(**student):
    return run(two_nodes(), noise=Noise(), n=4), run(two_nodes(**{"scale": 2.0} | student), noise=Noise(), n=4)


def test_every_node_is_compared_by_default():
    t, s = pair()
    losses = compare(t, s)
    assert list(losses) == ["z2", "z1", "out"]
    for name, loss in losses.items():
        assert torch.equal(loss, kl(t[name].dist, s[name].dist))
    assert torch.allclose(total(losses), losses["z2"] + losses["z1"] + losses["out"])


def test_the_first_rule_that_matches_wins_and_weighs():
    t, s = pair()
    losses = compare(t, s, (Match("z1", wasserstein2, 3.0), Match("z*", kl, 5.0), Match("*", mse, 7.0)))
    assert torch.allclose(losses["z1"], 3 * wasserstein2(t["z1"].dist, s["z1"].dist))
    assert torch.allclose(losses["z2"], 5 * kl(t["z2"].dist, s["z2"].dist))
    assert torch.allclose(losses["out"], 7 * mse(t.out.dist, s.out.dist))
    assert list(compare(t, s, (Match("z[1]"),))) == ["z1"]


def test_weight_0_leaves_a_node_out_unread():
    t, s = pair()
    assert list(compare(t, s, (Match("z1", weight=0), Match("*")))) == ["z2", "out"]

    def fails(p, q):
        raise AssertionError("called")

    assert list(compare(t, s, (Match("z*", fails, 0), Match("out")))) == ["out"]
    t, s = pair(names=("z2", "y"))
    assert list(compare(t, s, (Match("z1", weight=0), Match("*")))) == ["z2", "out"]  # the student need not have it


def test_the_mean_over_a_nodes_elements():
    t, s = pair()
    summed, averaged = (compare(t, s, (Match("*", mse, 2.0, reduce),)) for reduce in ("sum", "mean"))
    for name, size in (("z2", 2), ("z1", 2), ("out", 3)):
        assert torch.allclose(averaged[name], summed[name] / size)


def test_a_node_that_the_student_lacks_is_named():
    t, s = pair(names=("z2", "y"))
    with pytest.raises(KeyError, match=r"the student has no node 'z1'; it has \['z2', 'y', 'out'\]"):
        compare(t, s)


def test_nodes_of_different_shapes_are_refused():
    t, s = pair(width=1)  # would broadcast in silence
    with pytest.raises(ValueError, match=r"node 'out' is \(4, 3\) in the teacher and \(4, 1\) in the student"):
        compare(t, s)


@pytest.mark.parametrize("rules", [(Match("y*"),), (Match("*", weight=0),), ()])
def test_nothing_matched_is_refused(rules):
    with pytest.raises(ValueError, match=r"no rule matches any of the teacher's nodes \['z2', 'z1', 'out'\]"):
        compare(*pair(), rules)


# ------------------------------------------------------------------ the negative ELBO


def encoder(prior):
    """An inference program with two latents, the second with a prior of the program's own where ``prior`` is given."""

    def program(sample, x):
        z = sample("z1", Normal(0.3 * x, torch.full_like(x, 0.5)))
        z = sample("z0", Normal(z, torch.full_like(x, 0.7)), prior=prior(z) if prior else None)
        return Normal(2 * z, torch.full_like(x, 0.2))

    return program


@pytest.mark.parametrize("prior", [None, lambda z: Normal(-z, torch.full_like(z, 1.5))], ids=["standard", "handed over"])
def test_negative_elbo_is_the_direct_formula(prior):
    x = random(5, 3)
    trace = run(encoder(prior), x, noise=Noise())
    parts = negative_elbo(trace, x)
    assert list(parts) == ["z1", "z0", "out"]
    z1, z0 = trace["z1"].value, trace["z0"].value
    assert torch.allclose(parts["z1"], 0.5 * ((0.3 * x) ** 2 + 0.25 - 1 - math.log(0.25)).sum(1))
    mean, variance = (-z1, 2.25) if prior else (0.0, 1.0)
    assert torch.allclose(parts["z0"], 0.5 * (((z1 - mean) ** 2 + 0.49) / variance - 1 - math.log(0.49 / variance)).sum(1))
    assert torch.allclose(parts["out"], (0.5 * ((x - 2 * z0) / 0.2) ** 2 + math.log(0.2) + 0.5 * math.log(2 * math.pi)).sum(1))
    assert list(latent_kl(trace)) == ["z1", "z0"]
    assert list(latent_kl(trace, "z[0]")) == ["z0"]


def test_the_elbo_is_the_evidence_where_the_posterior_is_exact():
    """p(z) = N(0, 1), p(x | z) = N(2 z, 1): the posterior is N(2 x / 5, 1 / 5) and the evidence N(0, 5)."""

    def program(sample, x):
        return Normal(2 * sample("z", Normal(0.4 * x, torch.full_like(x, 5**-0.5))), torch.ones_like(x))

    x = random(3, 1).repeat_interleave(2, 0)
    signs = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).repeat(3, 1)  # a quadrature of two points per image
    bound = total(negative_elbo(run(program, x, noise=FixedNoise({"z": signs})), x))
    assert torch.allclose(bound.view(3, 2).mean(1), -Normal(0.0, 5**0.5).log_prob(x[::2, 0]))


def test_a_latent_without_a_prior_must_be_normal():
    def program(prior):
        return lambda sample, x: Normal(sample("y", Bernoulli(logits=x), prior=prior), 1.0)

    x = random(5, 3)
    with pytest.raises(ValueError, match=r"node 'y' is a Bernoulli without a prior; .*sample\('y', q, prior=p\)"):
        negative_elbo(run(program(None), x, noise=Noise()), x)
    prior = Bernoulli(logits=torch.zeros_like(x))
    parts = negative_elbo(run(program(prior), x, noise=Noise()), x)
    assert torch.allclose(parts["y"], kl_divergence(Bernoulli(logits=x), prior).sum(1))


def test_an_output_without_a_likelihood_is_refused():
    x = random(5, 3)
    trace = run(lambda sample, x: sample("z", Normal(x, 1.0)) * 2, x, noise=Noise())
    with pytest.raises(ValueError, match="returns a plain tensor, which has no likelihood"):
        negative_elbo(trace, x)
