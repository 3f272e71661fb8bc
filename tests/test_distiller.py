"""What is trained: the teacher stays as it is, noise is shared, inferred or one's own, and the right parameters learn."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli, Independent, Normal

from potstill.distill.distiller import Classification, Distiller, Elbo, PartlyShared, likelihood, reached, train_only
from potstill.divergence import Match, mse, negative_elbo, total, wasserstein2
from potstill.energy.statistics import batchnorm
from potstill.energy.view import Look
from potstill.families.classifier import Classifier
from potstill.families.lvae import LVAE
from potstill.families.vae import VAE
from potstill.model import Images, Model
from potstill.noise import FixedNoise, Noise
from potstill.trace import run

IMAGE = (1, 8, 8)


def born(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def lvae(width=4, seed=0):
    return born(lambda: LVAE(IMAGE, width, levels=3, latent=2), seed).model()


def frozen_lvae():
    model = lvae(6)
    for module in model.net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean += 0.1
    return model.frozen()


def copied(model):
    return copy.deepcopy(model.net).requires_grad_(True).model()


def images(n=6):
    return Noise((8,)).uniform("x", (n, *IMAGE))


def state(net):
    return {name: t.clone() for name, t in net.state_dict().items()}


def changed(before, net):
    after = net.state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@torch.no_grad()
def descend(parameters):
    """One step of 0.01 against the sign of each gradient: Adam's first, without the seconds that importing torch.optim takes."""
    for p in parameters:
        if p.grad is not None:
            p -= 0.01 * p.grad.sign()
            p.grad = None


# ------------------------------------------------------------------ the teacher stays as it is


@pytest.mark.parametrize(
    ("arguments", "x"),
    [
        ({}, None),
        ({"replay": "*"}, None),
        ({}, images()),
        ({"program": "infer", "elbo": 1.0}, images()),
        ({"program": "infer", "replay": "z*"}, images()),
    ],
)
def test_training_leaves_the_teacher_bit_for_bit(arguments, x):
    """KD4DGM leaves its teacher in train mode, and distillation then moves its BatchNorm statistics."""
    teacher, student = frozen_lvae(), lvae()
    before, at_birth = state(teacher.net), state(student.net)
    objective = Distiller(teacher, student, **arguments)
    for step in range(12):
        objective.train()
        student.net.train()
        total(objective(Noise((step,)), x, 6)).mean().backward()
        descend(student.net.parameters())
    assert changed(before, teacher.net) == set()
    assert not any(module.training for module in teacher.net.modules())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.net.parameters())
    moved = changed(at_birth, student.net)
    assert "d0.out.weight" in moved
    assert "d0.net.0.bn1.running_mean" in moved


@pytest.mark.parametrize(("program", "x"), [("generate", None), ("generate", images()), ("infer", images())])
def test_no_gradient_enters_a_teacher_that_is_not_frozen(program, x):
    teacher, student = lvae(6), lvae()
    total(Distiller(teacher, student, program=program)(Noise(), x, 6)).sum().backward()
    assert all(p.grad is None for p in teacher.net.parameters())
    assert student.net.d0.out.weight.grad.any()


def test_the_teacher_is_no_part_of_what_is_trained_or_saved():
    teacher, student = frozen_lvae(), lvae()
    objective = Distiller(teacher, student)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in student.net.parameters()}
    assert objective.state_dict().keys() == {f"net.{name}" for name in student.net.state_dict()}


def test_freezing_a_model_puts_it_in_eval_mode_without_gradients():
    model = lvae()
    assert any(module.training for module in model.net.modules())
    assert model.frozen() is model
    assert not any(module.training for module in model.net.modules())
    assert not any(p.requires_grad for p in model.net.parameters())


# ------------------------------------------------------------------ what the student is given


@pytest.mark.parametrize("replay", ["", "*"])
@pytest.mark.parametrize("x", [None, images()], ids=["noise", "images"])
def test_every_parameter_of_the_generator_gets_a_gradient_and_no_other(replay, x):
    teacher, student = frozen_lvae(), lvae(seed=1)
    total(Distiller(teacher, student, replay=replay)(Noise(), x, 6)).sum().backward()
    alive = {name for name, p in student.net.named_parameters() if p.grad is not None and p.grad.any()}
    assert alive == reached(student, "generate")
    assert alive == {name for name, _ in student.net.named_parameters() if name.startswith("d")}


def test_a_student_equal_to_its_teacher_has_no_loss():
    teacher = frozen_lvae()
    losses = Distiller(teacher, copied(teacher))(Noise(), n=4)
    assert {name: loss.tolist() for name, loss in losses.items()} == dict.fromkeys(("z3", "z2", "z1", "out"), [0.0] * 4)
    losses = Distiller(teacher, copied(teacher), program="infer")(Noise(), images(4))
    assert {name: loss.tolist() for name, loss in losses.items()} == dict.fromkeys(("z3", "z2", "z1", "out"), [0.0] * 4)


def test_the_loss_is_of_the_batchs_rows():
    student = lvae()
    student.net.eval()
    distiller = Distiller(frozen_lvae(), student)
    together = total(distiller(Noise().at(range(10, 14)), n=4))
    alone = torch.cat([total(distiller(Noise().at([row]), n=1)) for row in range(10, 14)])
    assert torch.allclose(together, alone, rtol=1e-3)
    assert not torch.allclose(together, total(distiller(Noise(), n=4)), rtol=1e-2)


@pytest.mark.parametrize(
    ("share", "same"),
    [
        ("*", ["z3", "z2", "z1", "out"]),
        ("z*", ["z3", "z2", "z1", "out"]),
        ("z[23]", ["z3", "z2", "z1"]),
        ("z3", ["z3", "z2"]),
        ("", ["z3"]),
    ],
)
def test_noise_is_shared_where_the_pattern_says(share, same):
    """The top level's conditional is always standard; each other one tells whether the noise above it was shared."""
    teacher = frozen_lvae()
    losses = Distiller(teacher, copied(teacher), (Match(by=wasserstein2),), share=share)(Noise(), n=4)
    assert [name for name, loss in losses.items() if not loss.any()] == same
    replayed = Distiller(teacher, copied(teacher), replay="*", share=share)(Noise(), n=4)
    assert not any(loss.any() for loss in replayed.values())


def test_the_noise_that_two_models_share_is_computed_once(monkeypatch):
    teacher, names = frozen_lvae(), []
    words = Noise._words
    monkeypatch.setattr(Noise, "_words", lambda self, name, *a: (names.append(name), words(self, name, *a))[1])
    Distiller(teacher, lvae())(Noise(), n=4)
    assert names == ["z3", "z2", "z1"]


def test_partly_shared_noise():
    noise = PartlyShared(Noise((1,)), Noise((2,)), "z*")
    for kind in ("normal", "uniform"):
        for name, seed in (("z1", 1), ("out", 2)):
            assert torch.equal(getattr(noise, kind)(name, (3, 2)), getattr(Noise((seed,)), kind)(name, (3, 2)))


def test_the_students_own_noise_is_another_at_every_update():
    seen = []

    def generate(sample):
        seen.append(sample.normal("z", (3,)))
        return seen[-1] * 2

    model = Model(nn.Linear(1, 1), Images(IMAGE), generate)
    distiller = Distiller(model, model, share="")
    for seed in (0, 1):
        distiller(Noise((seed,)), n=5)
    assert len({tuple(z.flatten().tolist()) for z in seen}) == 4


class Recorded:
    """Programs of a linear-Gaussian model, z1 given z2 ~ N(slope z2, std), that keep what they saw."""

    def __init__(self, slope, std, mean=0.0, scale=1.0):
        self.slope, self.std = slope, std
        self.seen = []
        self.model = Model(nn.Linear(1, 1), Images(IMAGE, (mean,), (scale,)), self.generate, self.infer)

    def generate(self, sample):
        z2 = sample.normal("z2", (2,))
        z1 = sample("z1", Normal(self.slope * z2, torch.full_like(z2, self.std)))
        self.seen.append((z2, z1))
        return z1 + 0

    def infer(self, sample, x):
        self.seen.append(x)
        mean = x.flatten(1)[:, :2]
        z2 = sample("z2", Normal(mean, torch.full_like(mean, 0.1)))
        z1 = sample("z1", Normal(3 * mean, torch.full_like(mean, 0.2)))
        return z1 + z2


def test_with_images_the_generator_runs_on_the_noise_behind_them():
    teacher, student = Recorded(2.0, 0.5, mean=0.5, scale=0.25), Recorded(-1.0, 0.25)
    losses = Distiller(teacher.model, student.model, (Match("z*"), Match("out", mse)))(Noise((3,)), images(4))
    mean = (images(4).flatten(1)[:, :2] - 0.5) / 0.25
    z2 = mean + 0.1 * Noise((3,)).normal("z2", (4, 2))
    z1 = 3 * mean + 0.2 * Noise((3,)).normal("z1", (4, 2))
    assert torch.allclose(teacher.seen[1][0], z2)
    assert torch.allclose(teacher.seen[1][1], z1)
    ((s2, s1),) = student.seen
    assert torch.allclose(s2, z2, atol=1e-6)
    assert torch.allclose(s1, -z2 + 0.25 * (z1 - 2 * z2) / 0.5, atol=1e-5)
    assert torch.allclose(losses["out"], ((z1 - s1) ** 2).sum(1), rtol=1e-4)


def test_with_images_a_student_equal_to_its_teacher_has_all_but_no_loss():
    teacher, x = frozen_lvae(), images(4)
    losses = Distiller(teacher, copied(teacher))(Noise(), x)
    assert total(losses).max() < 1e-6
    # It is the images that decide: a student elsewhere is told apart at other latents than those of fresh noise.
    student = lvae(seed=1)
    student.net.eval()
    with_images, with_others, without = (total(Distiller(teacher, student)(Noise(), y, 4)) for y in (x, 1 - x, None))
    assert not torch.allclose(with_images, with_others, rtol=1e-3)
    assert not torch.allclose(with_images, without, rtol=1e-3)


def test_each_network_sees_images_in_its_own_range():
    teacher, student = Recorded(1.0, 1.0, mean=0.5, scale=0.5), Recorded(1.0, 1.0, mean=0.25, scale=2.0)
    Distiller(teacher.model, student.model, program="infer")(Noise(), images(4))
    assert torch.allclose(teacher.seen[0], (images(4) - 0.5) / 0.5)
    assert torch.allclose(student.seen[0], (images(4) - 0.25) / 2)


def test_replay_hands_over_the_teachers_values_at_the_pattern():
    teacher, student = Recorded(2.0, 0.5), Recorded(-1.0, 0.25)
    Distiller(teacher.model, student.model, replay="z1")(Noise(), n=4)
    ((t2, t1),), ((s2, s1),) = teacher.seen, student.seen
    assert torch.equal(s1, t1)
    assert torch.equal(s2, t2)  # standard in both, on shared noise
    Distiller(teacher.model, student.model, replay="z2", share="z1")(Noise(), n=4)
    assert torch.equal(student.seen[1][0], teacher.seen[1][0])
    assert torch.allclose(student.seen[1][1], -t2 + 0.25 * Noise().normal("z1", (4, 2)))


def test_the_students_own_elbo_is_added_with_its_weight():
    teacher, student = frozen_lvae(), lvae()
    student.net.eval()
    x = images(4)
    alone = Distiller(teacher, student, (Match(weight=0),), "infer", elbo=0.5)(Noise(), x)
    parts = negative_elbo(run(student.infer, x, noise=Noise()), x)
    assert list(alone) == [f"elbo.{name}" for name in parts]
    for name, part in parts.items():
        assert torch.allclose(alone[f"elbo.{name}"], 0.5 * part)
    both = Distiller(teacher, student, program="infer", elbo=0.5)(Noise(), x)
    assert list(both) == [*parts, *alone]


@pytest.mark.parametrize("program", ["generate", "link"])
def test_an_elbo_without_inference_is_refused(program):
    with pytest.raises(ValueError, match=f"elbo goes with program 'infer', not '{program}'"):
        Distiller(frozen_lvae(), lvae(), program=program, elbo=1.0)


def test_images_are_compared_as_the_teacher_sees_them():
    teacher, student, rules = frozen_lvae(), lvae(4, seed=1), (Match("z*", wasserstein2, 0.5),)
    noise = Noise((3,)).at(range(6))
    losses = Distiller(teacher, student, (Match(weight=0.0),), perceptual=rules)(noise, n=6)
    assert set(losses) == {"perceptual.z1", "perceptual.z2", "perceptual.z3"}
    pictures = [model.images.decode(run(model.program("generate"), noise=noise, n=6).out.dist.mean) for model in (teacher, student)]
    seen = [run(teacher.program("infer"), teacher.images.encode(x), noise=noise.fold("perceptual")) for x in pictures]
    for name in ("z1", "z2", "z3"):
        expected = 0.5 * wasserstein2(seen[0][name].dist, seen[1][name].dist)
        assert torch.allclose(losses[f"perceptual.{name}"], expected, rtol=1e-5)
    assert total(losses).max() > 0
    total(losses).mean().backward()
    assert all(p.grad is None for p in teacher.net.parameters())
    assert any(p.grad is not None and p.grad.any() for p in student.net.parameters())
    same = Distiller(teacher, copied(teacher), (Match(weight=0.0),), perceptual=rules).eval()(noise, n=6)
    assert total(same).abs().max() < 1e-6


def test_the_teacher_is_asked_about_the_students_images_by_themselves():
    teacher, student, noise = frozen_lvae(), lvae(4, seed=1), Noise((3,)).at(range(6))
    losses = Distiller(teacher, student, energy=0.5 * batchnorm)(noise, n=6)
    x = student.images.decode(run(student.program("generate"), noise=noise, n=6).out.dist.mean)
    expected = 0.5 * batchnorm(Look(teacher, noise=noise.fold("energy"))(x))
    assert torch.allclose(losses["energy.batchnorm"], expected.expand(6), rtol=1e-5)
    losses["energy.batchnorm"].mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in student.net.parameters())
    assert all(p.grad is None for p in teacher.net.parameters())


def test_what_a_teacher_sees_needs_images_and_a_teacher_that_is_frozen():
    with pytest.raises(ValueError, match="program 'generate'"):
        Distiller(frozen_lvae(), lvae(), program="infer", perceptual=(Match("z*"),))
    with pytest.raises(ValueError, match="frozen"):
        Distiller(lvae(), lvae(), perceptual=(Match("z*"),))
    with pytest.raises(ValueError, match="program 'generate'"):
        Distiller(frozen_lvae(), lvae(), program="infer", energy=batchnorm)
    with pytest.raises(ValueError, match="frozen"):
        Distiller(lvae(), lvae(), energy=batchnorm)


def test_a_teacher_that_nothing_is_compared_to_is_not_run():
    def fails(sample, *inputs):
        raise AssertionError("called")

    teacher = Model(nn.Linear(1, 1), Images(IMAGE), fails, fails)
    assert Distiller(teacher, lvae(), (Match(weight=0),), "infer", elbo=1.0)(Noise(), images()).keys() == {
        "elbo.z3",
        "elbo.z2",
        "elbo.z1",
        "elbo.out",
    }


def test_distillation_brings_the_student_closer():
    teacher, student = frozen_lvae(), lvae(seed=1)
    objective = Distiller(teacher, student)
    learning = train_only(student.net, reached(student, "generate"))
    losses = []
    for step in range(15):
        loss = total(objective(Noise((step,)), n=8)).mean()
        loss.backward()
        descend(learning)
        losses.append(loss.item())
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])


# ------------------------------------------------------------------ which parameters learn


@pytest.mark.parametrize("make", [lvae, lambda: born(lambda: VAE(IMAGE, 4, 3)).model()], ids=["lvae", "vae"])
def test_generator_and_encoder_share_no_parameter_and_leave_none_out(make):
    model = make()
    encoder = {id(p) for module in model.net.encoder() for p in module.parameters()}
    expected = {name for name, p in model.net.named_parameters() if id(p) in encoder}
    generator, inferred = reached(model, "generate"), reached(model, "infer")
    assert inferred - generator == expected
    assert generator | inferred == {name for name, _ in model.net.named_parameters()}
    assert generator
    assert expected


def test_finding_out_leaves_the_network_as_it_was():
    model = lvae()
    train_only(model.net, {"u1.0.weight", "d0.net.0.bn1.weight", "d1.out.weight"})
    before = state(model.net)
    modes = [module.training for module in model.net.modules()]
    learns = [p.requires_grad for p in model.net.parameters()]
    assert True in modes[1:]
    assert False in modes[1:]
    with torch.no_grad():
        found = reached(model, "infer")
    assert len(found) == len(learns)
    assert changed(before, model.net) == set()
    assert [module.training for module in model.net.modules()] == modes
    assert [p.requires_grad for p in model.net.parameters()] == learns
    assert all(p.grad is None for p in model.net.parameters())


def test_a_failing_program_leaves_the_network_as_it_was_too():
    model = lvae()

    def fails(sample):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        reached(Model(model.net.requires_grad_(False), model.images, fails), "generate")
    assert model.net.training
    assert not any(p.requires_grad for p in model.net.parameters())


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Independent(d, 1)], ids=["plain", "independent"])
def test_parameters_of_a_coin_are_found_though_no_gradient_passes_it(wrap):
    net = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(4, 64), "unused": nn.Linear(1, 1)})

    def generate(sample):
        coin = sample("y", wrap(Bernoulli(logits=net["first"](sample.normal("z", (3,))))))
        return net["second"](coin).view(-1, *IMAGE)

    found = reached(Model(net, Images(IMAGE), generate), "generate")
    assert found == {"first.weight", "first.bias", "second.weight", "second.bias"}


def test_a_program_without_parameters_reaches_none():
    assert reached(Model(nn.Linear(1, 1), Images(IMAGE), lambda sample: sample.normal("z", IMAGE)), "generate") == set()


def test_a_classifiers_inference_reaches_all_of_it():
    model = Classifier(IMAGE, 3, 4).model()
    assert reached(model, "infer") == {name for name, _ in model.net.named_parameters()}


def test_what_is_frozen_stays_bit_for_bit_in_train_mode_and_the_rest_learns():
    student = lvae()
    encoder = reached(student, "infer") - reached(student, "generate")
    learning = train_only(student.net, encoder)
    assert [id(p) for p in learning] == [id(p) for name, p in student.net.named_parameters() if name in encoder]
    assert student.net.training
    for name, module in student.net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == name.startswith("u")
    before = state(student.net)
    objective = Distiller(frozen_lvae(), student, program="infer", elbo=1.0)
    for step in range(3):
        total(objective(Noise((step,)), images())).mean().backward()
        descend(student.net.parameters())
    moved = changed(before, student.net)
    assert all(name.startswith("u") for name in moved)
    assert "u1.1.net.0.bn1.running_var" in moved
    assert encoder <= moved
    # The other way round: what was frozen learns again.
    train_only(student.net, reached(student, "generate"))
    assert student.net.d0.net[0].bn1.training
    assert not student.net.u2.net[0].bn1.training
    assert student.net.d0.out.weight.requires_grad
    assert not student.net.u2.out.weight.requires_grad


# ------------------------------------------------------------------ training without a teacher


def test_elbo_is_the_negative_elbo_with_the_latents_weighed():
    model = lvae()
    model.net.eval()
    x = images(4)
    parts = negative_elbo(run(model.infer, x, noise=Noise()), x)
    for beta, warmup in ((1.0, 1.0), (2.0, 1.0), (2.0, 0.25), (1.0, 0.0)):
        found = Elbo(model, beta)(Noise(), x, warmup)
        assert list(found) == ["z3", "z2", "z1", "out"]
        for name, loss in found.items():
            assert torch.allclose(loss, parts[name] * (1.0 if name == "out" else beta * warmup))
    assert torch.equal(Elbo(model)(Noise(), x)["z1"], parts["z1"])


def test_elbo_is_of_the_images_in_the_networks_range():
    seen = []

    def infer(sample, x):
        seen.append(x)
        return Normal(sample("z", Normal(0 * x, torch.ones_like(x))), 1.0)

    found = Elbo(Model(nn.Linear(1, 1), Images(IMAGE, (0.5,), (0.25,)), infer=infer))(FixedNoise({"z": torch.zeros(4, *IMAGE)}), images(4))
    x = (images(4) - 0.5) / 0.25
    assert torch.allclose(seen[0], x)
    assert torch.allclose(found["out"], -Normal(0.0, 1.0).log_prob(x).sum((1, 2, 3)))
    assert found["z"].tolist() == [0.0] * 4


def test_classification_is_cross_entropy_and_learns():
    labels = torch.arange(12) % 3
    x = 0.2 * Noise((1,)).uniform("x", (12, *IMAGE))
    for i, label in enumerate(labels.tolist()):
        x[i, :, 2 * label : 2 * label + 3] += 0.7  # a bright band whose place is the label
    model = born(lambda: Classifier(IMAGE, 3, 4)).model()
    objective = Classification(model)
    assert {id(p) for p in objective.parameters()} == {id(p) for p in model.net.parameters()}
    model.net.eval()
    first = objective(Noise(), x, labels)["out"]
    assert torch.allclose(first, F.cross_entropy(model.net(x), labels, reduction="none"), atol=1e-6)
    learning = train_only(model.net, reached(model, "infer"))
    for step in range(30):
        objective(Noise((step,)), x, labels)["out"].mean().backward()
        descend(learning)
    assert objective(Noise(), x, labels)["out"].mean() < 0.2 * first.mean()
    assert (model.net(x).argmax(1) == labels).all()


def test_asking_how_a_model_learns_leaves_it_as_it_was():
    """Also its BatchNorm statistics, or a training that goes on would have seen one batch more."""
    model = LVAE((1, 8, 8), 2, 2, 2, 0.1).model()
    model.net.train()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    assert isinstance(likelihood(model), Elbo)
    assert model.net.training
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())
