"""What every energy promises, over the families it can look with: shape, gradient, descent, rows, weights, schedules, cost."""

from __future__ import annotations

import copy
import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from potstill.energy import ENERGIES, Energy, View, diversity_at, gradient, posterior_kl_at, typicality
from potstill.energy.statistics import record
from potstill.families.classifier import Classifier
from potstill.families.lvae import LVAE
from potstill.families.vae import VAE
from potstill.model import Images
from potstill.noise import Noise
from potstill.trace import run

IMAGE, N = (3, 8, 8), 4
RANGE = Images(IMAGE, mean=(0.4, 0.5, 0.6), std=(0.5, 0.4, 0.3))
FAMILIES = {
    "vae": functools.partial(VAE, IMAGE, 4, 3, 0.3),
    "lvae": functools.partial(LVAE, IMAGE, 4, 3, 2, 0.3),
    "classifier": functools.partial(Classifier, IMAGE, 5, 4),
}
EVERYWHERE = ("batchnorm", "relative_batchnorm", "activation_summary", "total_variation", "l2", "diversity", "diversity at 0.1")
WITH_LATENTS = ("posterior_kl", "reconstruction", "typicality", "typicality per node")
NAMES = {
    "vae": (*EVERYWHERE, *WITH_LATENTS),
    "lvae": (*EVERYWHERE, *WITH_LATENTS, "posterior_kl z2"),
    "classifier": (*EVERYWHERE, "cross_entropy", "disagreement"),
}
CASES = [(family, name) for family, names in NAMES.items() for name in names]
COUPLED = {"batchnorm", "relative_batchnorm", "activation_summary", "diversity", "diversity at 0.1"}


def images(n=N, seed=5):
    return Noise((seed,)).uniform("x", (n, *IMAGE))


@functools.cache
def _born(family, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = FAMILIES[family]().train()
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0  # statistics of images, for those of birth say nothing
    with torch.no_grad():
        run(net.infer, RANGE.encode(images(32, seed)), noise=Noise())
    return net


def model(family, seed=1):
    return replace(copy.deepcopy(_born(family, seed)).model(), images=RANGE).frozen()


@functools.cache
def _energy(family, name):
    match name:
        case "activation_summary":
            return ENERGIES[name](record(model(family), images(32, 7)))
        case "typicality":
            return ENERGIES[name](model(family), Noise((3,)), 16)
        case "typicality per node":
            return typicality(model(family), Noise((3,)), 16, per_node=True)
        case "diversity at 0.1":
            return diversity_at(0.1)
        case "posterior_kl z2":
            return posterior_kl_at("z2")
    return ENERGIES[name]


def view(family, x, rows=None, progress=1.0, teacher=None):
    rows = range(len(x)) if rows is None else rows
    return View(
        x,
        teacher or model(family),
        y=torch.tensor([row % 5 for row in rows]),
        student=model(family, 2),
        noise=Noise((4,)).at(rows),
        progress=progress,
    )


def test_every_energy_is_under_contract():
    assert set(ENERGIES) <= {name for _, name in CASES}


@pytest.mark.parametrize(("family", "name"), CASES)
def test_shape_and_type(family, name):
    energy = _energy(family, name)
    seen = view(family, images())
    (term,) = energy.terms
    assert tuple(term.score(seen).shape) == (() if name in COUPLED else (N,))
    (part,) = energy.parts(seen).values()
    for e in (part, energy(seen)):
        assert e.shape == (N,)
        assert e.dtype == torch.float32
        assert e.isfinite().all()
        assert e.any()
    assert torch.equal(energy(view(family, images())), part)  # nothing is left to chance


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_gradient_reaches_every_image_and_following_it_lowers_the_energy(family, name):
    energy, x = _energy(family, name), images()
    values = []
    for _ in range(6):
        x = x.detach().requires_grad_()
        g, parts = gradient(energy, view(family, x), x, check=True)
        assert g.shape == x.shape
        assert g.isfinite().all()
        assert (g.flatten(1).abs().sum(1) > 0).all()
        assert not any(part.requires_grad for part in parts.values())
        values.append(sum(parts.values()).sum().item())
        x = x - 1e-3 * abs(values[0]) * g / g.square().sum()  # to first order, a thousandth of the energy
    falls = [(a - b) / abs(values[0]) for a, b in itertools.pairwise(values)]
    assert all(2e-4 < fall < 3e-3 for fall in falls), falls


@pytest.mark.parametrize(("family", "name"), CASES)
def test_what_an_image_depends_on(family, name):
    """An image alone has the energy it has in a batch; where the batch counts as a whole, it has not."""
    energy, x = _energy(family, name), images()
    together = energy(view(family, x, range(10, 10 + N)))
    alone = energy(view(family, x[2:3], [12]))
    assert torch.allclose(together[2:3], alone, rtol=1e-3) == (name not in COUPLED)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_step_does_not_depend_on_the_batch_size(family, name):
    """The same images twice over: each has the gradient it had, also where the energy is the batch's."""
    energy, gradients = _energy(family, name), []
    for times in (1, 2):
        x = images().repeat(times, 1, 1, 1).requires_grad_()
        gradients.append(gradient(energy, view(family, x, [*range(N)] * times), x)[0][:N])
    if name.startswith("diversity"):  # a copy of each is beside it now, but the size is as before
        assert 0.5 < (gradients[1].norm() / gradients[0].norm()).item() < 2
    else:
        assert torch.allclose(*gradients, rtol=1e-2, atol=1e-3 * gradients[0].abs().max().item())


@pytest.mark.parametrize(("family", "name"), CASES)
def test_weights_and_schedules(family, name):
    energy = _energy(family, name)
    x = images().requires_grad_()
    whole, thrice = (gradient(e, view(family, x), x) for e in (energy, 3 * energy))
    assert torch.allclose(thrice[0], 3 * whole[0], rtol=1e-4, atol=1e-6 * thrice[0].abs().max().item())
    (term,) = energy.terms
    assert torch.equal(thrice[1][term.name], 3 * whole[1][term.name])
    assert torch.equal((-energy)(view(family, x)), -energy(view(family, x)))
    late = energy.between(0.5, 1.0)
    for progress, active in ((0.0, False), (0.49, False), (0.5, True), (1.0, True)):
        seen = view(family, x, progress=progress)
        assert bool(late.parts(seen)) == active
        assert torch.equal(late(seen, every=True), energy(seen))
        assert torch.equal(gradient(late, view(family, x, progress=progress), x)[0], whole[0] if active else 0 * whole[0])


@pytest.mark.parametrize(("family", "name"), CASES)
def test_energies_are_exact_under_autocast(family, name):
    energy, exact, rough = _energy(family, name), images().requires_grad_(), images().requires_grad_()
    expected = gradient(energy, view(family, exact), exact)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient(energy, view(family, rough), rough)
        assert (rough.flatten(1) @ rough.flatten(1).T).dtype == torch.bfloat16
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][k], expected[1][k]) for k in expected[1])
    half = images().bfloat16()
    assert torch.equal(energy(view(family, half)), energy(view(family, half.float())))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_of_the_teacher_for_all_and_no_trace_of_it(family):
    teacher, calls = model(family), []
    hooks = [module._forward_pre_hooks for module in teacher.net.modules()]
    before = copy.deepcopy(teacher.net.state_dict())

    def counted(sample, x):
        calls.append(len(x))
        return teacher.net.infer(sample, x)

    x = images().requires_grad_()
    seen = view(family, x, teacher=replace(teacher, infer=counted))
    whole = sum((_energy(family, name) for name in NAMES[family] if name not in ("diversity at 0.1", "typicality per node")), Energy())
    assert len(gradient(whole, seen, x, check=True)[1]) == len(whole.terms) > 5
    assert calls == [N]
    assert not any(hooks)
    after = teacher.net.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(p.grad is None for p in teacher.net.parameters())
    assert x.grad is None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sum_is_that_of_the_parts(family):
    x = images().requires_grad_()
    names = [name for name in NAMES[family] if name not in ("diversity at 0.1", "typicality per node")]
    weights = {name: 0.1 * (i + 1) for i, name in enumerate(names)}
    whole = sum((weights[name] * _energy(family, name) for name in names), Energy())
    g, parts = gradient(whole, view(family, x), x)
    alone = {name: gradient(weights[name] * _energy(family, name), view(family, x), x) for name in names}
    assert list(parts) == names
    for name in names:
        assert torch.allclose(parts[name], alone[name][1][name], rtol=1e-5)
    assert torch.allclose(whole(view(family, x)), sum(parts.values()), rtol=1e-6)
    assert torch.allclose(g, sum(found[0] for found in alone.values()), rtol=1e-3, atol=1e-4 * g.abs().max().item())
