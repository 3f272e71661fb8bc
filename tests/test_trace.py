"""Running programs: what is recorded, when it is computed, and the noise behind given values."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Categorical, Gamma, Independent, Laplace, Normal

from potstill.noise import FixedNoise, Noise
from potstill.trace import Point, Trace, draw, noise_of, run, undraw


def shifted(scale, mean, std):
    """A conditional N(scale * mean, std), as a function for a lazy node."""
    return Normal(scale * mean, std)


class Counting:
    """Counts the calls of a function."""

    def __init__(self, function):
        self.function = function
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


def chain(conditional):
    """z2 -> z1 -> out, the last two lazy."""

    def program(sample):
        z = sample.normal("z2", (3,))
        z = sample("z1", conditional, 2.0, z, torch.full((sample.n, 3), 0.5))
        return Normal(z + 1, torch.full((sample.n, 3), 0.1))

    return program


def test_what_a_trace_held_is_free_at_once():
    """A cycle of references would keep every activation of an update until the next collection."""
    gc.collect()
    gc.disable()
    try:
        trace = run(chain(shifted), noise=Noise((1,)), n=4)
        (trace.output.sum() + trace["z2"].dist.mean.sum()).item()
        del trace
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_a_trace_holds_every_node_in_order_with_its_conditional_and_value():
    noise = Noise((1,))
    trace = run(chain(shifted), noise=noise, n=4)
    assert isinstance(trace, Trace)
    assert list(trace) == ["z2", "z1", "out"]
    assert len(trace) == 3
    z2 = noise.normal("z2", (4, 3))
    z1 = 2 * z2 + 0.5 * noise.normal("z1", (4, 3))
    out = z1 + 1 + 0.1 * noise.normal("out", (4, 3))
    for name, value in (("z2", z2), ("z1", z1), ("out", out)):
        assert torch.equal(trace[name].value, value)
    assert torch.equal(trace["z1"].dist.loc, 2 * z2)
    assert torch.equal(trace["z2"].dist.scale, torch.ones(4, 3))
    assert trace.out is trace["out"]
    assert trace.output is trace["out"].value
    assert list(trace.latents()) == ["z2", "z1"]


def test_a_conditional_whose_value_is_given_waits_until_it_is_read_and_is_made_once():
    conditional = Counting(shifted)
    value = torch.arange(12.0).view(4, 3)
    trace = run(chain(conditional), noise=Noise(), n=4, given={"z1": value})
    assert torch.equal(trace.output, run(chain(shifted), noise=Noise(), n=4, given={"z1": value}).output)
    assert trace.values_of("z1")["z1"] is not None
    assert conditional.calls == 0
    assert repr(trace["z1"]) == "Node(z1, not yet computed)"
    assert trace["z1"].value is value
    first = trace["z1"].dist
    assert trace["z1"].dist is first
    assert conditional.calls == 1
    assert repr(trace["z1"]) == "Node(z1, Normal)"
    assert torch.equal(first.loc, 2 * trace["z2"].value)


def test_a_conditional_that_is_drawn_from_is_made_once():
    conditional = Counting(shifted)
    trace = run(chain(conditional), noise=Noise(), n=4)
    assert conditional.calls == 1
    assert trace["z1"].dist.scale[0, 0] == 0.5
    assert conditional.calls == 1


def test_the_output_is_drawn_only_when_it_is_read():
    class Asked(Noise):
        asked: list[str] = []

        def normal(self, name, shape, device="cpu"):
            self.asked.append(name)
            return super().normal(name, shape, device)

    trace = run(chain(shifted), noise=Asked(), n=2)
    assert trace.out.dist.mean.shape == (2, 3)
    assert Asked.asked == ["z2", "z1"]
    assert trace.output.shape == (2, 3)
    assert Asked.asked == ["z2", "z1", "out"]


def test_nodes_read_late_are_made_in_the_grad_mode_of_their_run():
    weight = torch.ones(3, requires_grad=True)

    def program(sample):
        ones = torch.ones(sample.n, 3)
        sample("z", lambda: Normal(weight * ones, ones))
        return Normal(weight * ones, ones)

    given = {"z": torch.zeros(2, 3)}
    with torch.no_grad():
        silent = run(program, noise=Noise(), n=2, given=given)
    assert not silent["z"].dist.loc.requires_grad
    assert not silent.output.requires_grad
    loud = run(program, noise=Noise(), n=2, given=given)
    with torch.no_grad():
        assert loud["z"].dist.loc.requires_grad
        assert loud.output.requires_grad
        assert not torch.is_grad_enabled()


def test_two_nodes_of_one_name_are_refused():
    def program(sample):
        sample.normal("z", (1,))
        return sample.normal("z", (1,))

    with pytest.raises(ValueError, match="two nodes of the program are named 'z'"):
        run(program, noise=Noise())

    def named_out(sample):
        sample.normal("out", (1,))
        return sample.normal("z", (1,)) * 2

    with pytest.raises(ValueError, match="'out'"):
        run(named_out, noise=Noise())
    with pytest.raises(ValueError, match="'z1'"):
        run(chain(shifted), noise=Noise(), rename={"z2": "z1"})


def test_a_renamed_node_draws_replays_and_is_recorded_under_its_new_name():
    trace = run(chain(shifted), noise=Noise((4,)), n=2, rename={"z2": "top", "out": "image"})
    assert list(trace) == ["top", "z1", "image"]
    assert torch.equal(trace["top"].value, Noise((4,)).normal("top", (2, 3)))
    assert trace.out.name == "image"
    given = torch.ones(2, 3)
    replayed = run(chain(shifted), noise=Noise((4,)), n=2, rename={"z2": "top"}, given={"top": given, "z2": -given})
    assert replayed["top"].value is given
    assert torch.equal(replayed["z1"].dist.loc, 2 * given)


def test_a_returned_tensor_is_all_mass_on_that_value():
    trace = run(lambda sample: sample.normal("z", (2,)) * 3, noise=Noise(), n=5)
    assert list(trace) == ["z", "out"]
    assert isinstance(trace.out.dist, Point)
    assert torch.equal(trace.output, trace["z"].value * 3)
    assert trace.out.dist.mean is trace.output
    assert trace.out.dist.batch_shape == (5, 2)


def test_the_returned_value_of_a_node_is_the_output():
    def program(sample):
        z = sample.normal("z", (2,))
        return sample("x", shifted, 1.0, z, torch.ones(sample.n, 2))

    trace = run(program, noise=Noise(), n=5)
    assert list(trace) == ["z", "x"]
    assert trace.out is trace["x"]
    assert list(trace.latents()) == ["z"]
    replayed = run(program, noise=Noise(), n=5, given={"x": torch.zeros(5, 2)})
    assert list(replayed) == ["z", "x"]
    assert torch.equal(replayed.output, torch.zeros(5, 2))


def test_batch_and_device_come_from_the_first_input():
    def shape_and_device(*inputs, **arguments):
        output = run(lambda sample, *_: torch.zeros((sample.n, 2), device=sample.device), *inputs, noise=Noise(), **arguments).output
        return tuple(output.shape), output.device.type

    x = torch.zeros(7, 2)
    assert shape_and_device(x) == ((7, 2), "cpu")
    assert shape_and_device(x, n=3) == ((3, 2), "cpu")
    assert shape_and_device() == ((1, 2), "cpu")
    assert shape_and_device("a label", x) == ((1, 2), "cpu")
    assert shape_and_device(x.to("meta")) == ((7, 2), "meta")
    assert shape_and_device(x, device="meta") == ((7, 2), "meta")


def test_values_are_picked_by_pattern_and_detached():
    weight = torch.ones(3, requires_grad=True)

    def program(sample):
        z = sample("z1", Normal(weight.expand(sample.n, 3), 1.0))
        z = sample("z2", Normal(z, 1.0))
        return sample("y", Normal(z, 1.0))

    trace = run(program, noise=Noise(), n=2)
    assert trace["z2"].value.requires_grad
    assert list(trace.values_of()) == ["z1", "z2", "y"]
    assert list(trace.values_of("z*")) == ["z1", "z2"]
    assert list(trace.values_of("[!z]")) == ["y"]
    assert trace.values_of("Z*") == {}
    assert not any(value.requires_grad for value in trace.values_of().values())
    assert torch.equal(trace.values_of()["z2"], trace["z2"].value)


def distribution(kind, parameters):
    """A distribution of shape (n, 2) for each kind that can be drawn and undrawn."""
    a = torch.tensor(parameters)
    return {
        "normal": lambda: Normal(3 * a, (a / 2).exp()),
        "bernoulli": lambda: Bernoulli(logits=a),
        "bernoulli of probabilities": lambda: Bernoulli(a.sigmoid()),
        "independent": lambda: Independent(Normal(a, 0.1 + a.abs()), 1),
        "independent bernoulli": lambda: Independent(Bernoulli(logits=2 * a), 1),
    }[kind]()


@pytest.mark.parametrize("kind", ["normal", "bernoulli", "bernoulli of probabilities", "independent", "independent bernoulli"])
@settings(deadline=None, max_examples=50)  # a busy machine is not an error
@given(parameters=st.lists(st.tuples(*[st.floats(-8, 8, width=32)] * 2), min_size=1, max_size=4), seed=st.integers(0, 2**31))
def test_undraw_is_the_inverse_of_draw(kind, parameters, seed):
    dist = distribution(kind, parameters)
    value = draw(dist, "z", Noise((seed,)))
    assert value.shape == dist.batch_shape + dist.event_shape
    inferred = undraw(dist, value, "z", Noise((seed, "another")))
    again = draw(dist, "z", FixedNoise({"z": inferred}))
    assert (again - value).abs().max() <= 1e-5 * (1 + value.abs().max())
    if "bernoulli" in kind:
        assert torch.equal(again, value)
        assert inferred.min() >= 0
        assert inferred.max() <= 1
    else:
        assert (inferred - Noise((seed,)).normal("z", value.shape)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coins_fall_as_often_as_they_should_whatever_the_precision(dtype):
    dist = Bernoulli(torch.tensor([0.0, 0.03125, 0.5, 0.99609375, 1.0], dtype=dtype).expand(40000, 5))
    value = draw(dist, "z", Noise((3,)))
    assert value.dtype == dtype
    assert value.unique().tolist() == [0, 1]
    p = dist.probs[0].double()
    assert ((value.double().mean(0) - p).abs() <= 4 * (p * (1 - p) / 40000).sqrt()).all()
    assert torch.equal(draw(dist, "z", FixedNoise({"z": undraw(dist, value, "z", Noise((4,)))})), value)


def test_the_noise_of_a_coin_is_uniform_on_its_side():
    dist = Bernoulli(torch.full((20000, 1), 0.25))
    for side, low, high in ((1.0, 0.0, 0.25), (0.0, 0.25, 1.0)):
        u = undraw(dist, torch.full((20000, 1), side), "z", Noise((2,)))
        assert u.min() >= low
        assert u.max() <= high
        assert u.mean().item() == pytest.approx((low + high) / 2, abs=0.01)
        assert u.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.02)


def test_the_noise_behind_a_category_gives_it_again_and_is_uniform():
    p = torch.tensor([0.5, 0.25, 0.2, 0.05, 1e-9]).expand(40000, 5)
    for values in (torch.arange(40000) % 5, draw(Categorical(p), "y", Noise((6, 1)))):
        u = undraw(Categorical(p), values, "y", Noise((7, 1)))
        assert torch.equal(draw(Categorical(p), "y", FixedNoise({"y": u})), values)
    # Behind categories that come as often as they should, it is as any other noise: uniform, and each number by itself.
    within = (torch.arange(1, 40001) / 40000)[:, None]
    assert (u.sort(0).values - within).abs().max() < 1.63 / 40000**0.5  # Kolmogorov and Smirnov, at 1 %
    assert (torch.corrcoef(u.T) - torch.eye(5)).abs().max() < 0.02


def test_categories_come_as_often_as_they_should():
    p = torch.tensor([0.5, 0.25, 0.2, 0.05, 0.0])
    drawn = draw(Categorical(p.expand(40000, 5)), "y", Noise((6,)))
    assert drawn.shape == (40000,)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=5) / 40000
    assert ((counts - p).abs() <= 4 * (p * (1 - p) / 40000).sqrt()).all()


def test_a_category_at_the_lowest_noise_is_the_likeliest():
    assert draw(Categorical(logits=torch.tensor([[0.0, 1.0, 2.0]])), "y", FixedNoise({"y": torch.zeros(1, 3)})).tolist() == [2]


def test_two_models_share_the_noise_of_a_category():
    logits = torch.randn((2000, 6), generator=torch.Generator().manual_seed(0))
    one = draw(Categorical(logits=logits), "y", Noise((6,)))
    assert torch.equal(one, draw(Categorical(logits=logits + 7), "y", Noise((6,))))  # the same distribution
    near = draw(Categorical(logits=logits + 0.1 * logits.flip(0)), "y", Noise((6,)))
    own = draw(Categorical(logits=logits), "y", Noise((7,)))
    assert (one == near).float().mean() > 0.9
    assert (one == own).float().mean() < 0.5


def test_an_unknown_distribution_is_named():
    def program(sample):
        return sample("w", Gamma(torch.ones(sample.n, 1), torch.ones(sample.n, 1)))

    with pytest.raises(TypeError, match=r"node 'w': no rule to draw a Gamma .*@draw.register"):
        run(program, noise=Noise())
    trace = run(program, noise=Noise(), given={"w": torch.ones(1, 1)})
    assert trace.output.item() == 1

    def two(sample):
        return program(sample) * 2

    with pytest.raises(TypeError, match=r"node 'w': no rule to infer the noise of a Gamma .*@undraw.register"):
        noise_of(run(two, noise=Noise(), given={"w": torch.ones(1, 1)}), Noise())


def test_a_user_registers_a_distribution():
    class Triangle(Laplace):
        pass

    @draw.register(Triangle)
    def _(dist, name, noise):
        return dist.loc + dist.scale * (noise.uniform(name, dist.loc.shape) + noise.uniform(f"{name} again", dist.loc.shape) - 1)

    trace = run(lambda sample: sample("t", Triangle(torch.full((sample.n, 1), 5.0), 2.0)), noise=Noise(), n=1000)
    assert trace.output.min() >= 3
    assert trace.output.max() <= 7
    assert trace.output.mean().item() == pytest.approx(5, abs=0.1)


def mixed(sample):
    """A program of every kind of node whose noise can be inferred."""
    z = sample.normal("z", (3,))
    coin = sample("coin", Independent(Bernoulli(logits=2 * z), 1))
    doubled = sample("doubled", Point(2 * coin))
    w = sample("w", shifted, 0.5, doubled + z, torch.full((sample.n, 3), 0.3))
    return Normal(w * coin + z, torch.full((sample.n, 3), 0.2))


def test_the_noise_behind_given_values_regenerates_them():
    generator = torch.Generator().manual_seed(1)
    given = {"z": torch.randn((50, 3), generator=generator), "coin": torch.randint(2, (50, 3), generator=generator).float()}
    given["w"] = torch.randn((50, 3), generator=generator)
    trace = run(mixed, noise=Noise((1,)), n=50, given=given)
    noise = noise_of(trace, Noise((2,)))
    assert sorted(noise.values) == ["coin", "w", "z"]  # a point takes no noise, and the output is not a latent
    again = run(mixed, noise=_With(noise, Noise((1,))), n=50)
    assert torch.equal(again["coin"].value, given["coin"])
    for name in ("z", "w", "doubled", "out"):
        assert (again[name].value - trace[name].value).abs().max() < 1e-5


def test_the_noise_behind_drawn_values_is_the_noise_that_drew_them():
    trace = run(mixed, noise=Noise((9,)), n=50)
    noise = noise_of(trace, Noise((2,)))
    assert torch.equal(noise.values["z"], Noise((9,)).normal("z", (50, 3)))
    assert (noise.values["w"] - Noise((9,)).normal("w", (50, 3))).abs().max() < 1e-5


class _With(Noise):
    """Fixed noise where there is some, other noise elsewhere."""

    def __init__(self, fixed, other):
        self.fixed, self.other = fixed, other

    def normal(self, name, shape, device="cpu"):
        return (self.fixed if name in self.fixed.values else self.other).normal(name, shape, device)

    uniform = normal
