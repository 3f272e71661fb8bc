"""Energies in closed form, their composition, the view that they share, and the guidance that does nothing, caught."""

from __future__ import annotations

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.distributions import Categorical, Normal

from potstill.divergence import negative_elbo, total
from potstill.energy import (
    DeadEnergy,
    Energy,
    Look,
    Term,
    View,
    activation_summary,
    batchnorm,
    cross_entropy,
    disagreement,
    diversity,
    diversity_at,
    energy,
    finite,
    gradient,
    l2,
    posterior_kl,
    posterior_kl_at,
    reconstruction,
    relative_batchnorm,
    total_variation,
    typicality,
)
from potstill.energy.statistics import FILE, load, record, save
from potstill.errors import BadInput, BrokenFile
from potstill.families.classifier import Classifier
from potstill.families.lvae import LVAE
from potstill.families.vae import VAE
from potstill.model import Images, Model
from potstill.noise import Noise
from potstill.trace import run

IMAGE, N = (1, 8, 8), 4


def born(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().frozen()


@pytest.fixture(scope="module")
def vae():
    return born(lambda: VAE(IMAGE, 4, 3, 0.3).model())


@pytest.fixture(scope="module")
def lvae():
    return born(lambda: LVAE(IMAGE, 4, 3, 2, 0.3).model())


def classifier(seed=0, classes=5):
    return born(lambda: Classifier(IMAGE, classes, 4).model(), seed)


def images(n=N, seed=5, image=IMAGE):
    return Noise((seed,)).uniform("x", (n, *image))


def says(program, image=IMAGE, **more):
    """A model of an inference program without parameters."""
    return Model(nn.Identity(), Images(image), infer=program, **more).frozen()


def classes_of(logits):
    """A classifier that says the same of every image."""
    return says(lambda sample, x: Categorical(logits=torch.tensor(logits).float() + 0 * x.flatten(1).sum(1, keepdim=True)))


BLIND = says(lambda sample, x: x)


# ------------------------------------------------------------------ pixels


def test_total_variation_by_hand():
    x = torch.tensor([[[[0.0, 1.0], [0.25, 0.5]]], [[[0.7, 0.7], [0.7, 0.7]]]])
    # down: |0.25 - 0| + |0.5 - 1|, right: |1 - 0| + |0.5 - 0.25|
    assert total_variation(View(x, says(None, (1, 2, 2)))).tolist() == [2.0, 0.0]


def test_l2_is_measured_in_the_teachers_range():
    teacher = replace(BLIND, images=Images((2, 8, 8), mean=(0.5, 0.25), std=(0.5, 2.0)))
    x = torch.tensor([0.5, 0.25]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    assert l2(View(x, teacher)).tolist() == [0.0]
    assert l2(View(x + 1, teacher)).tolist() == [0.5 * 64 * (4 + 0.25)]


def test_diversity_of_two_images_by_hand():
    x = torch.zeros(2, *IMAGE)
    for difference, scale in ((0.0, 0.1), (0.3, 0.1), (1.0, 0.5)):
        x[1] = difference
        assert torch.allclose(diversity_at(scale)(View(x, BLIND)), torch.full((2,), 1 / (1 + difference / scale)))
    assert torch.equal(diversity(View(x, BLIND)), diversity_at(0.35)(View(x, BLIND)))
    assert diversity(View(x[:1], BLIND)).tolist() == [0.0]
    with pytest.raises(ValueError, match="it must be above 0"):
        diversity_at(0.0)


def test_diversity_is_the_mean_over_pairs():
    x = images(5)
    pairs = [1 / (1 + ((x[i] - x[j]) ** 2).mean().sqrt() / 0.35) for i in range(5) for j in range(5) if i != j]
    assert torch.allclose(diversity(View(x, BLIND)), torch.stack(pairs).mean().expand(5))


def test_near_copies_are_driven_apart():
    x = images(3)
    x[1] = x[0] + 0.1 * (images(1, 6)[0] - 0.5)
    x.requires_grad_()
    g, _ = gradient(diversity, View(x, BLIND), x)
    size = g.flatten(1).norm(dim=1)
    assert size[:2].min() > 1.5 * size[2]
    assert F.cosine_similarity(-g[0].flatten(), (x[0] - x[1]).flatten(), 0) > 0.8
    still = torch.zeros(1, *IMAGE, requires_grad=True)
    assert not gradient(diversity, View(still, BLIND), still)[0].any()


# ------------------------------------------------------------------ labels


def test_cross_entropy_is_torchs():
    teacher, labels = classifier(), torch.tensor([3, 0, 4, 1])
    found = cross_entropy(View(images(), teacher, y=labels))
    assert torch.allclose(found, F.cross_entropy(teacher.net(images()), labels, reduction="none"))


def test_disagreement_by_hand():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    m = (p + q) / 2
    divergence = 0.5 * ((p[:2] * (p / m)[:2].log2()).sum() + (q * (q / m).log2()).sum())
    teacher, student = classes_of([0.0, 0.0, -100.0]), classes_of([0.0, 0.0, math.log(2)])
    for a, b in ((teacher, student), (student, teacher)):
        assert torch.allclose(disagreement(View(images(), a, student=b)), (1 - divergence).expand(N))


def test_disagreement_has_bounds_that_it_reaches():
    teacher = classifier()
    assert disagreement(View(images(), teacher, student=teacher)).tolist() == [1.0] * N
    x = images().requires_grad_()
    contradicting = View(x, classes_of([200.0, 0.0, 0.0]), student=classes_of([0.0, 0.0, 200.0]))
    found, parts = gradient(disagreement, contradicting, x)
    assert parts["disagreement"].tolist() == [0.0] * N
    assert found.isfinite().all()
    between = disagreement(View(images(), teacher, student=classifier(1)))
    assert (between > 0).all()
    assert (between < 1).all()


def test_labels_must_fit():
    for y in (torch.tensor([0, 1, 2, 5]), torch.tensor([0, 1, 2, -1])):
        with pytest.raises(ValueError, match=r"labels from -?\d to \d; the teacher has classes 0 to 4"):
            cross_entropy(View(images(), classifier(), y=y))
    for y in (torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.zeros(N, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="one whole number is expected for each of 4 images"):
            View(images(), classifier(), y=y)
    with pytest.raises(ValueError, match="the teacher has 5 classes, the student 3; disagreement wants the same"):
        disagreement(View(images(), classifier(), student=classifier(classes=3)))


def test_what_is_missing_is_named(vae):
    with pytest.raises(ValueError, match="asks for labels y, and the view has none"):
        cross_entropy(View(images(), classifier()))
    with pytest.raises(ValueError, match=r"asks for a student .* and the view has none"):
        disagreement(View(images(), classifier()))
    with pytest.raises(ValueError, match="cross_entropy wants a teacher that classifies; this one infers a Normal"):
        cross_entropy(View(images(), vae, y=torch.zeros(N, dtype=torch.int64)))
    with pytest.raises(ValueError, match="disagreement wants a student that classifies; this one infers a Normal"):
        disagreement(View(images(), classifier(), student=vae))
    with pytest.raises(ValueError, match=r"posterior_kl at '\*' wants a teacher with such latents; this one infers \[\]"):
        posterior_kl(View(images(), classifier()))
    with pytest.raises(ValueError, match=r"posterior_kl at 'z9' wants .* infers \['z'\]"):
        posterior_kl_at("z9")(View(images(), vae))
    with pytest.raises(ValueError, match=r"wants a teacher that decodes images; this one gives a Categorical of shape \(4,\)"):
        reconstruction(View(images(), classifier()))
    with pytest.raises(ValueError, match="wants a teacher with BatchNorm layers"):
        batchnorm(View(images(), BLIND))
    with pytest.raises(ValueError, match="has no program 'infer'"):
        batchnorm(View(images(), says(None)))


# ------------------------------------------------------------------ likelihood


def test_posterior_kl_of_a_vae_by_hand(vae):
    found = posterior_kl(View(images(), vae))
    q = vae.net.encode(images())
    assert torch.allclose(found, 0.5 * (q.loc**2 + q.scale**2 - 1 - 2 * q.scale.log()).sum(1), rtol=1e-5)


def test_reconstruction_of_a_vae_by_hand(vae):
    teacher = replace(vae, images=Images(IMAGE, mean=(0.5,), std=(0.25,)))
    seen = View(images(), teacher, noise=Noise((9,)))
    encoded = 4 * (images() - 0.5)
    q = vae.net.encode(encoded)
    mean = vae.net.decode(q.loc + q.scale * Noise((9,)).normal("z", (N, 3))).loc
    expected = ((encoded - mean) ** 2 / (2 * 0.3**2) + math.log(0.3) + 0.5 * math.log(2 * math.pi)).sum((1, 2, 3))
    assert torch.allclose(reconstruction(seen), expected, rtol=1e-4)


@pytest.mark.parametrize("family", ["vae", "lvae"])
def test_together_they_are_the_negative_elbo(family, request):
    teacher = replace(request.getfixturevalue(family), images=Images(IMAGE, mean=(0.5,), std=(0.25,)))
    seen = View(images(), teacher, noise=Noise((9,)))
    encoded = teacher.images.encode(images())
    parts = negative_elbo(run(teacher.infer, encoded, noise=Noise((9,))), encoded)
    levels = sum((posterior_kl_at(name) for name in parts if name != "out"), reconstruction)
    assert torch.allclose((posterior_kl + reconstruction)(seen), total(parts), rtol=1e-6)
    found = levels.parts(seen)
    assert {name.removeprefix("posterior_kl "): e.tolist() for name, e in found.items()} == {
        {"out": "reconstruction"}.get(name, name): e.tolist() for name, e in parts.items()
    }
    assert torch.equal(posterior_kl_at("z*")(seen), posterior_kl(seen))


def test_a_plain_tensor_is_scored_by_half_the_squared_error():
    seen = View(images(), says(lambda sample, x: 0.5 * x))
    assert torch.allclose(reconstruction(seen), 0.5 * ((0.5 * images()) ** 2).sum((1, 2, 3)))


# ------------------------------------------------------------------ statistics


def of_layers(*layers):
    net = nn.Sequential(*layers)
    return Model(net, Images(IMAGE), infer=lambda sample, x: Categorical(logits=net(x)))


def normed():
    return born(lambda: of_layers(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(108, 4)))


@torch.no_grad()
def test_batchnorm_by_hand():
    teacher = normed()
    conv, norm = teacher.net[:2]
    fed = conv(images())
    for of_mean, of_variance in (([3.0, 0.0, 4.0], [0.0, 5.0, 12.0]), ([0.0] * 3, [0.0] * 3)):
        norm.running_mean.copy_(fed.mean((0, 2, 3)) + torch.tensor(of_mean))
        norm.running_var.copy_(fed.var((0, 2, 3), correction=0) + torch.tensor(of_variance))
        expected = math.hypot(*of_mean) + math.hypot(*of_variance)  # 5 + 13, and 0 where the batch has the running moments
        assert batchnorm(View(images(), teacher)).tolist() == pytest.approx([expected] * N, abs=1e-5)
    x = images().requires_grad_()
    assert gradient(batchnorm, View(x, teacher), x)[0].isfinite().all()


def test_relative_batchnorm_by_hand():
    teacher = normed()
    conv, norm = teacher.net[:2]
    halves = [conv(images()[start::2]) for start in range(2)]
    norm.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 0.25]))
    std = (norm.running_var + norm.eps).sqrt()
    (m1, s1), (m2, s2) = (
        ((h.mean((0, 2, 3)) - norm.running_mean) / std, (h.var((0, 2, 3), correction=0) + norm.eps).sqrt() / std - 1) for h in halves
    )
    expected = float((m1 * m2 + s1 * s2).mean())
    assert relative_batchnorm(View(images(), teacher)).tolist() == pytest.approx([expected] * N, abs=1e-5)
    x = images().requires_grad_()
    assert gradient(relative_batchnorm, View(x, teacher), x)[0].isfinite().all()
    alone = conv(images()[:1])
    mean, std_of = (alone.mean((0, 2, 3)) - norm.running_mean) / std, (alone.var((0, 2, 3), correction=0) + norm.eps).sqrt() / std - 1
    assert float(relative_batchnorm(View(images()[:1], teacher))) == pytest.approx(float((mean**2 + std_of**2).mean()), rel=1e-4)


def test_relative_batchnorm_is_0_on_average_for_the_layers_own_data_and_batchnorm_is_not():
    """Small batches of the very images that the moments are of: what is left is sampling noise, which has no sign."""
    teacher = normed()
    conv, norm = teacher.net[:2]
    many = Noise((5,)).uniform("x", (4096, *images().shape[1:]))
    fed = conv(many)
    norm.running_mean.copy_(fed.mean((0, 2, 3)))
    norm.running_var.copy_(fed.var((0, 2, 3), correction=0))
    found = torch.tensor([float(relative_batchnorm(View(part, teacher))[0]) for part in many.split(8)])
    assert abs(float(found.mean())) < 4 * float(found.std()) / len(found) ** 0.5
    assert (found < 0).any()
    assert min(float(batchnorm(View(part, teacher))[0]) for part in many.split(8)) > 0


@pytest.mark.parametrize("with_graph", [False, True])
def test_moments_are_those_of_what_each_layer_was_fed(with_graph):
    teacher = normed()
    seen = View(images().requires_grad_(with_graph), teacher)
    conv, norm, relu, flatten, linear = teacher.net
    hidden = conv(images())
    ((layer, mean, variance),) = seen.moments
    assert layer is norm
    assert torch.allclose(mean, hidden.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(variance, hidden.var((0, 2, 3), correction=0))
    flat = flatten(relu(norm(hidden)))
    fed = {"0": images().flatten(1).reshape(-1, 1), "4": flat, "top layer": linear(flat).log_softmax(1)}
    assert list(seen.activations) == list(fed)
    for name, h in fed.items():
        assert torch.allclose(seen.activations[name][0], h.mean(0), atol=1e-6)
        assert torch.allclose(seen.activations[name][1], h.var(0, correction=0), atol=1e-6)
        assert seen.activations[name][0].requires_grad == with_graph


def test_a_layer_used_twice_is_told_apart():
    conv = nn.Conv2d(1, 1, 3, padding=1)
    seen = View(images(), born(lambda: of_layers(conv, nn.Tanh(), conv, nn.Flatten())))
    assert list(seen.activations) == ["0", "0:1", "top layer"]
    assert torch.allclose(seen.activations["0:1"][0], conv(images()).tanh().mean())


@pytest.mark.parametrize("batch", [7, 64])
def test_recorded_statistics_are_those_of_the_whole_set(batch, lvae):
    for teacher in (classifier(), lvae):
        x = images(20)
        summary = record(teacher, x, Noise((2,)), batch)
        whole = View(x, teacher, noise=Noise((2,)).at(range(20))).activations
        assert {name.rpartition(".")[0] for name in summary} == set(whole)
        assert len(summary) == 2 * len(whole)
        for name, (mean, variance) in whole.items():
            assert torch.allclose(summary[f"{name}.mean"], mean, rtol=1e-4, atol=1e-5)
            assert torch.allclose(summary[f"{name}.std"], variance.sqrt(), rtol=1e-4, atol=1e-5)


def test_recording_leaves_a_network_in_training_as_it_was():
    net = Classifier(IMAGE, 5, 4)
    net.head.eval()
    before = copy.deepcopy(net.state_dict())
    record(net.model(), images())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert net.training
    assert net.body.training
    assert not net.head.training


def test_activation_summary_by_hand():
    teacher = born(lambda: of_layers(nn.Flatten(), nn.Linear(64, 4)))
    x = images()
    mean, std = x.flatten(1).mean(0), x.flatten(1).std(0, correction=0)
    assert activation_summary(record(teacher, x))(View(x, teacher)).abs().max() < 1e-5
    found = activation_summary({"1.mean": mean + 2 * std, "1.std": 0.5 * std})(View(x, teacher))
    assert torch.allclose(found, torch.tensor((2**2 + 0.5**2) / 0.5**2).expand(N), rtol=1e-4)
    summary = record(teacher, x)
    one = activation_summary({k: v for k, v in summary.items() if k.startswith("1")})
    other = activation_summary({k: v for k, v in summary.items() if k.startswith("top")})
    seen = View(images(seed=6), teacher)
    assert torch.allclose(activation_summary(summary)(seen), one(seen) + other(seen))
    assert (one(seen) > 0.1).all()
    assert (other(seen) > 0.1).all()


def test_activation_summary_of_one_image_and_of_dead_units_has_a_finite_gradient():
    teacher = born(lambda: of_layers(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 4)))
    with torch.no_grad():
        teacher.net[0].bias[0] = -100.0
    x = images(1).requires_grad_()
    found, parts = gradient(activation_summary(record(teacher, images())), View(x, teacher), x, check=True)
    assert found.isfinite().all()
    assert finite(parts).all()


def test_activation_summary_refuses_another_network(lvae):
    with pytest.raises(BadInput, match=r"its layer 'body.0' of 1 channels is not one of the teacher's"):
        activation_summary(record(classifier(), images()))(View(images(), lvae))
    with pytest.raises(BadInput, match=r"its layer 'top layer' of 3 channels is not one of the teacher's"):
        activation_summary(record(classifier(classes=3), images()))(View(images(), classifier()))
    with pytest.raises(ValueError, match="of no images"):
        record(lvae, images()[:0])


def test_statistics_survive_the_disk(tmp_path):
    summary = record(classifier(), images())
    save(summary, tmp_path)
    loaded = load(tmp_path)
    assert loaded.keys() == summary.keys()
    assert all(torch.equal(loaded[name], summary[name]) for name in summary)


PAIR = {"a.b.mean": torch.zeros(3), "a.b.std": torch.ones(3)}


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({}, "statistics of no layer"),
        ({"a.mean": torch.zeros(3)}, "'a.mean'; a pair LAYER.mean and LAYER.std is expected"),
        (PAIR | {"a.b.max": torch.ones(3)}, "'a.b.max'; a pair"),
        (PAIR | {".mean": torch.zeros(3), ".std": torch.ones(3)}, r"'\.(mean|std)'; a pair"),
        (PAIR | {"a.b.std": torch.ones(2)}, "a float32 vector as long as its pair"),
        (PAIR | {"a.b.std": torch.ones(3, dtype=torch.int64)}, "torch.int64 of shape"),
        ({"a.mean": torch.zeros(1, 3), "a.std": torch.ones(1, 3)}, r"of shape \(1, 3\)"),
        ({"a.mean": torch.zeros(0), "a.std": torch.ones(0)}, r"of shape \(0,\)"),
        (PAIR | {"a.b.mean": torch.tensor([0.0, math.nan, 0.0])}, "'a.b.mean' holds NaN"),
        (PAIR | {"a.b.std": torch.tensor([1.0, -1.0, 1.0])}, "'a.b.std' holds .* negative values"),
    ],
)
def test_hostile_statistics_are_refused(tmp_path, tensors, complaint):
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(BrokenFile, match=rf"{FILE}: .*{complaint}"):
        load(tmp_path)


def test_statistics_that_are_missing_or_no_safetensors_are_refused(tmp_path):
    with pytest.raises(BrokenFile, match="no such file"):
        load(tmp_path)
    (tmp_path / FILE).write_bytes(pickle.dumps({"a.mean": 1}))
    with pytest.raises(BrokenFile, match="pickled"):
        load(tmp_path)


# ------------------------------------------------------------------ typicality

WIDE = (1, 4, 16)


def factor_analysis(std=0.05, spread=0.05):
    """p(z) = N(0, 1), p(x | z) = N(0.5 + spread z, std), pixel by pixel, with its exact posterior."""

    def decode(z):
        return Normal(0.5 + spread * z, std * torch.ones_like(z), validate_args=False)

    def infer(sample, x):
        precision = 1 + (spread / std) ** 2
        mean = (x - 0.5) * spread / std**2 / precision
        return decode(sample("z", Normal(mean, precision**-0.5 * torch.ones_like(x), validate_args=False)))

    return says(infer, WIDE, generate=lambda sample: decode(sample.normal("z", WIDE)))


def nelbo(teacher, x, noise=Noise()):
    return (posterior_kl + reconstruction)(View(x, teacher, noise=noise))


def samples(teacher, n, seed=8):
    return run(teacher.generate, noise=Noise((seed,)), n=n).output.clamp(0, 1)


@pytest.mark.parametrize("per_node", [False, True])
def test_typicality_prefers_samples_where_the_elbo_prefers_the_blank_image(per_node):
    teacher = factor_analysis()
    typical = typicality(teacher, Noise((1,)), 256, per_node)
    noise = Noise((2,))
    blank, own = torch.full((2000, *WIDE), 0.5), samples(teacher, 2000)
    assert nelbo(teacher, blank).mean() < nelbo(teacher, own).quantile(0.01)
    # Two independent draws of one distribution differ by twice its variance: of what is halved and divided by it, 1 a node is left.
    assert typical(View(own, teacher, noise=noise)).mean().item() == pytest.approx(2.0 if per_node else 1.0, rel=0.15)
    assert typical(View(blank, teacher, noise=noise)).mean() > 8


def test_targets_are_the_values_of_samples():
    teacher, n, rows = factor_analysis(), 256, 2000
    typical, noise = typicality(teacher, Noise((1,)), n), Noise((2,))
    # Of two images above every target, (value - target) / sd is known, and so is the difference of the values: that gives both.
    far, farther = torch.full((rows, *WIDE), 0.8), torch.full((rows, *WIDE), 0.9)
    (z, value), (z_of_farther, value_of_farther) = (
        ((2 * typical(View(x, teacher, noise=noise)).double()).sqrt(), nelbo(teacher, x, noise).double()) for x in (far, farther)
    )
    sd = ((value_of_farther - value) / (z_of_farther - z)).mean()
    targets = value - sd * z
    own = nelbo(teacher, samples(teacher, rows)).double()
    assert targets.max() < value.min()
    assert sd.item() == pytest.approx(own.std().item(), rel=0.1)
    assert targets.mean().item() == pytest.approx(own.mean().item(), abs=0.2 * own.std().item())
    assert targets.std().item() == pytest.approx(sd.item(), rel=0.1)
    assert n / 2 < len((targets * 20).round().unique()) <= n  # all of them are used, and no other


def test_a_target_goes_with_its_row():
    teacher = factor_analysis()
    typical = typicality(teacher, Noise((1,)), 64)
    x = samples(teacher, 8)
    together = typical(View(x, teacher, noise=Noise((2,)).at(range(10, 18))))
    alone = typical(View(x[3:4], teacher, noise=Noise((2,)).at([13])))
    assert torch.allclose(together[3:4], alone, rtol=1e-3)
    assert not torch.allclose(typical(View(x, teacher, noise=Noise((2,)))), together, rtol=1e-3)


def test_typicality_does_not_depend_on_how_its_samples_were_batched():
    teacher = factor_analysis()
    found = [typicality(teacher, Noise((1,)), 50, batch=batch)(View(samples(teacher, 8), teacher)) for batch in (7, 64)]
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4)


def test_samples_are_drawn_or_averaged():
    """Drawn ones have noise that the reconstruction must explain: of the other kind, no image is typical."""
    teacher = factor_analysis(std=0.05, spread=1e-3)
    drawn, means = typicality(teacher, Noise((1,)), 256), typicality(teacher, Noise((1,)), 256, observe="mean")
    seen = {
        "drawn": View(samples(teacher, 64), teacher, noise=Noise((2,))),
        "mean": View(run(teacher.generate, noise=Noise((8,)), n=64).out.dist.mean, teacher, noise=Noise((2,))),
    }
    assert drawn(seen["drawn"]).mean() < 2
    assert means(seen["mean"]).mean() < 2
    assert drawn(seen["mean"]).mean() > 10
    assert means(seen["drawn"]).mean() > 10


def test_a_teacher_that_always_says_the_same_is_measured_in_nats():
    def infer(sample, x):
        sample("z", Normal(0 * x, torch.ones_like(x)))
        return x  # a plain tensor: no error, no spread

    teacher = says(lambda sample, x: infer(sample, x) + 0.5, WIDE, generate=lambda sample: torch.full((sample.n, *WIDE), 0.5))
    found = typicality(teacher, Noise((1,)), 4)(View(torch.rand(2, *WIDE), teacher))
    assert found.abs().max() < 1e-3


def test_typicality_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="typicality from 1 samples; at least 2"):
        typicality(factor_analysis(), Noise(), 1)
    with pytest.raises(ValueError, match="has no program 'generate'"):
        typicality(classifier(), Noise())
    with pytest.raises(BadInput, match="is NaN or infinite; look at its weights"):
        typicality(factor_analysis(spread=math.nan), Noise(), 4)


# ------------------------------------------------------------------ composition


@energy
def brightness(view):
    return view.x.mean((1, 2, 3))


@energy
def constant(view):
    return torch.ones(len(view))


def test_weights_and_schedules_are_data():
    whole = 0.5 * (2 * brightness + l2.between(0.25, 0.5)) + -diversity
    assert [(t.name, t.weight, t.start, t.stop) for t in whole.terms] == [
        ("brightness", 1.0, 0.0, 1.0),
        ("l2", 0.5, 0.25, 0.5),
        ("diversity", -1.0, 0.0, 1.0),
    ]
    assert whole == 0.5 * (2 * brightness + l2.between(0.25, 0.5)) + -diversity
    assert repr(brightness) == "Energy(terms=(Term(name='brightness', weight=1.0, start=0.0, stop=1.0),))"
    assert list(whole.parts(View(images(), BLIND, progress=0.3))) == ["brightness", "l2", "diversity"]
    assert list(whole.parts(View(images(), BLIND, progress=0.6))) == ["brightness", "diversity"]
    assert list(whole.parts(View(images(), BLIND, progress=0.6), every=True)) == ["brightness", "l2", "diversity"]


def test_sums_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="two energies of one sum are named brightness;"):
        brightness + l2 + 2 * brightness
    with pytest.raises(ValueError, match="'brightness' has weight nan"):
        math.nan * brightness
    for start, stop in ((0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="0 <= start <= stop <= 1"):
            brightness.between(start, stop)
    for shape in ((N, 1), (1,), (N - 1,)):
        wrong = Energy((Term("wrong", lambda view, shape=shape: torch.zeros(shape)),))
        with pytest.raises(ValueError, match=r"energy 'wrong' has shape .*; \(4,\), one per image, or \(\) is expected"):
            wrong(View(images(), BLIND))


@pytest.mark.parametrize(
    "off", [Energy(), 0.0 * (posterior_kl + batchnorm), posterior_kl.between(0.5, 1)], ids=["empty", "weight 0", "later"]
)
def test_guidance_off_costs_nothing_and_moves_nothing(off):
    def fails(sample, x):
        raise AssertionError("the teacher was asked")

    x = images().requires_grad_()
    seen = View(x, says(fails), progress=0.1)
    found, parts = gradient(off, seen, x, check=True)
    assert torch.equal(found, torch.zeros_like(x))
    assert not found.requires_grad
    assert parts == {}
    assert off.parts(seen) == {}
    assert off(seen).tolist() == [0.0] * N
    assert finite(parts).item() is True


def test_a_batch_energy_counts_once_per_image():
    whole = Energy((Term("whole", lambda view: view.x.sum()),))
    x = images().requires_grad_()
    assert torch.allclose((2 * whole)(View(x, BLIND)), 2 * x.sum().expand(N))
    assert torch.equal(gradient(whole, View(x, BLIND), x)[0], torch.full_like(x, N))


def test_finite_tells_the_images_apart():
    parts = {"a": torch.tensor([1.0, math.nan, 2.0, 3.0]), "b": torch.tensor([1.0, 1.0, 1.0, -math.inf])}
    assert finite(parts).tolist() == [True, False, True, False]


def test_a_gradient_by_hand_through_what_makes_the_images():
    latent = torch.rand(N, 1, 4, 4, requires_grad=True)
    x = F.interpolate(latent, scale_factor=2, mode="nearest")
    found, parts = gradient(3 * brightness, View(x, BLIND), latent)
    assert torch.allclose(found, torch.full_like(latent, 3 * 4 / 64))
    assert torch.allclose(parts["brightness"], 3 * x.detach().mean((1, 2, 3)))


# ------------------------------------------------------------------ guidance that does nothing


@energy
@torch.no_grad()
def unguided(view):
    return view.x.mean((1, 2, 3))


def test_a_score_under_no_grad_is_dead_and_named():
    x = images().requires_grad_()
    with pytest.raises(DeadEnergy, match=r"^energy 'unguided' has no gradient with respect to what is guided; .* torch\.no_grad\(\)"):
        gradient(brightness + unguided, View(x, BLIND), x)
    with pytest.raises(DeadEnergy, match="energy 'unguided', 'constant' has no gradient"):
        gradient(unguided + brightness + constant, View(x, BLIND), x)


def test_images_decoded_under_no_grad_are_dead(vae):
    """The published bug: the scheduler's step, and with it the decoding, ran under no_grad."""
    latent = images().requires_grad_()
    with torch.no_grad():
        x = latent.sigmoid()
    for check in (False, True):
        with pytest.raises(DeadEnergy, match="energy 'posterior_kl', 'brightness' has no gradient"):
            gradient(posterior_kl + brightness, View(x, vae), latent, check)
    with pytest.raises(DeadEnergy):
        gradient(brightness, View(images(), BLIND), images())


def test_a_graph_that_does_not_lead_to_the_images_is_dead(vae):
    """A teacher that was not frozen gives every score a graph."""
    net = copy.deepcopy(vae.net).requires_grad_(True)
    x = images().requires_grad_()
    with pytest.raises(DeadEnergy, match="energy 'posterior_kl', 'reconstruction' has no gradient"):
        gradient(posterior_kl + reconstruction, View(x.detach() * net.stem.bias[0], net.model()), x)
    cut = View(x, net.model())
    detached = Energy((Term("detached", lambda view: net.stem.bias.sum() * view.x.detach().mean((1, 2, 3))),))
    with pytest.raises(DeadEnergy, match="energy 'detached' has no gradient"):
        gradient(brightness + detached, cut, x, check=True)


def test_a_gradient_that_is_0_everywhere_is_dead_when_checked():
    x = torch.full((N, *IMAGE), 0.5, requires_grad=True)
    assert not gradient(total_variation, View(x, BLIND), x)[0].any()
    with pytest.raises(DeadEnergy, match=r"energy 'total_variation' has no gradient .* or constant"):
        gradient(total_variation + brightness, View(x, BLIND), x, check=True)


def test_images_that_do_not_depend_on_what_is_guided_are_dead_when_checked():
    latent = images().requires_grad_()
    x = latent * 0 + 0.5
    assert not gradient(brightness, View(x, BLIND), latent)[0].any()
    x = latent * 0 + 0.5
    with pytest.raises(DeadEnergy, match="energy 'brightness' has no gradient"):
        gradient(brightness, View(x, BLIND), latent, check=True)


def test_a_gradient_can_be_had_inside_no_grad(vae):
    """As a sampler's loop runs; also after an energy was logged there."""
    x = images().requires_grad_()
    expected = gradient(posterior_kl + batchnorm, View(x, vae), x)[0]
    seen = View(x, vae)
    with torch.no_grad():
        assert not posterior_kl(seen).requires_grad
        assert len(seen.moments) > 3
        found = gradient(posterior_kl + batchnorm, seen, x, check=True)[0]
    assert torch.equal(found, expected)


# ------------------------------------------------------------------ the view


def test_images_of_another_shape_are_refused(vae):
    for shape in ((1, 8, 8), (N, 3, 8, 8), (N, 1, 8, 9)):
        with pytest.raises(ValueError, match=r"the teacher takes \(batch, \*\(1, 8, 8\)\)"):
            View(torch.zeros(shape), vae)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_network_in_train_mode_is_not_looked_with(who):
    learning = Classifier(IMAGE, 5, 4).model()
    before = copy.deepcopy(learning.net.state_dict())
    models = {"teacher": classifier(), "student": classifier()} | {who: learning}
    with pytest.raises(ValueError, match=rf"the {who} is in train mode, .* call \.eval\(\)"):
        disagreement(View(images(), models["teacher"], student=models["student"]))
    assert all(torch.equal(t, before[name]) for name, t in learning.net.state_dict().items())


def test_hooks_are_removed_when_the_network_fails(vae):
    def fails(sample, x):
        vae.net.infer(sample, x)
        raise RuntimeError("boom")

    seen = View(images(), replace(vae, infer=fails))
    with pytest.raises(RuntimeError, match="boom"):
        posterior_kl(seen)
    assert not any(module._forward_pre_hooks for module in vae.net.modules())


def test_a_failed_look_leaves_nothing_behind(vae):
    attempts = []

    def fails_once(sample, x):
        found = vae.net.infer(sample, x)
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError("boom")
        return found

    seen = View(images(), replace(vae, infer=fails_once))
    with pytest.raises(RuntimeError, match="boom"):
        batchnorm(seen)
    assert torch.equal(batchnorm(seen), batchnorm(View(images(), vae)))


def test_a_look_hands_over_all_it_has():
    teacher, student, labels = classifier(), classifier(1), torch.tensor([3, 0, 4, 1])
    look = Look(teacher, student, labels, Noise((7,)))
    seen = look(images(), 0.25)
    assert (seen.teacher, seen.student, seen.noise, seen.progress) == (teacher, student, Noise((7,)), 0.25)
    assert torch.equal(seen.y, labels)
    assert torch.equal(seen.x, images())
    assert len(seen) == N
    assert look(images()).progress == 1.0
    assert Look(teacher)(images()).y is None
    assert seen.trace is seen.trace
    assert seen.rival is seen.rival
