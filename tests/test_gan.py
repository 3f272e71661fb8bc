"""GANs: the family's contract, the adversary's two sides, the encoder, and whole recipes that are cut short."""

from __future__ import annotations

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Normal

from potstill.distill.adversary import AdversarialTraining, Adversary
from potstill.distill.distiller import Distiller, Encoding, reached, train_only
from potstill.divergence import Match, kl, latent_kl, mse, total
from potstill.families.gan import GAN, Discriminator
from potstill.model import Images, Model
from potstill.noise import Noise
from potstill.state import digest_of
from potstill.trace import Point, run
from runs import digits_like, interrupting, results

IMAGE = (1, 8, 8)
KINDS = [(arch, classes) for arch in ("conv", "mlp") for classes in (0, 3)]
EVERY_KIND = pytest.mark.parametrize(("arch", "classes"), KINDS)


def born(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def gan(width=6, seed=0, classes=0, arch="conv", encoder=False, image=IMAGE):
    return born(lambda: GAN(image, width, 4, classes, arch, encoder), seed).model()


def copied(model):
    return copy.deepcopy(model.net).requires_grad_(True).model()


def images(n=6, seed=8):
    return Noise((seed,)).uniform("x", (n, *IMAGE))


def labels(n=6):
    return torch.arange(n) % 3


def adversary(classes=0, arch="conv", seed=5, **weights):
    return Adversary(born(lambda: Discriminator(IMAGE, 4, classes, arch), seed), **weights)


def gradients(net):
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}


# ------------------------------------------------------------------ the family's contract


@EVERY_KIND
def test_a_student_equal_to_its_teacher_has_no_loss(arch, classes):
    teacher = gan(classes=classes, arch=arch, encoder=True).frozen()
    student = copied(teacher)
    nodes = ["z", "y", "out"] if classes else ["z", "out"]
    assert {k: v.tolist() for k, v in Distiller(teacher, student)(Noise(), n=4).items()} == dict.fromkeys(nodes, [0.0] * 4)
    found = Distiller(teacher, student, program="infer")(Noise(), images(4))
    assert {k: v.tolist() for k, v in found.items()} == dict.fromkeys(nodes, [0.0] * 4)


@EVERY_KIND
def test_gradients_reach_every_parameter_of_the_generator_and_no_other(arch, classes):
    teacher, student = gan(8, classes=classes, arch=arch).frozen(), gan(4, 1, classes, arch, encoder=True)
    before = digest_of(teacher.net)
    Distiller(teacher, student, (Match("out", mse),))(Noise(), n=32)["out"].sum().backward()
    alive = set(gradients(student.net))
    assert alive == reached(student, "generate") == {name for name, _ in student.net.named_parameters() if name.startswith("generator.")}
    assert reached(student, "infer") - alive == {name for name, _ in student.net.named_parameters() if name.startswith("encoder.")}
    assert digest_of(teacher.net) == before


@EVERY_KIND
@pytest.mark.parametrize("training", [True, False])
def test_an_image_does_not_depend_on_its_batch(arch, classes, training):
    model = gan(classes=classes, arch=arch)
    model.net.train(training)
    together = model.sample(6, Noise((3,)).at(range(10, 16)))
    alone = torch.cat([model.sample(1, Noise((3,)).at([row])) for row in range(10, 16)])
    assert torch.allclose(together, alone, atol=1e-5)
    assert together.flatten(1).std(0).max() > 1e-3


@EVERY_KIND
def test_replay_of_its_own_values_gives_the_output(arch, classes):
    model = gan(classes=classes, arch=arch)
    trace = run(model.generate, noise=Noise(), n=4)
    given = {name: node.value for name, node in trace.latents().items()}
    assert torch.equal(run(model.generate, noise=Noise((1,)), n=4, given=given).output, trace.output)
    assert not torch.equal(run(model.generate, noise=Noise((1,)), n=4).output, trace.output)


@EVERY_KIND
def test_what_is_saved_is_loaded(tmp_path, arch, classes):
    model = gan(classes=classes, arch=arch, encoder=True)
    model.net.save_pretrained(tmp_path)
    again = GAN.from_pretrained(tmp_path)
    assert digest_of(again) == digest_of(model.net)
    assert torch.equal(again.model().sample(3, Noise()), model.sample(3, Noise()))
    described = json.loads((tmp_path / "config.json").read_text())
    assert (described["family"], described["arch"], described["classes"], described["encoder"]) == ("gan", arch, classes, True)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_finite_in_single_and_half_precision(arch, classes, dtype):
    model = gan(classes=classes, arch=arch, encoder=True)
    judge = adversary(classes, arch, features=1.0)
    y = labels() if classes else None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = AdversarialTraining(model, judge)(Noise(), images(), y)
        losses |= Distiller(gan(8, 2, classes, arch).frozen(), model, (Match("out", mse),))(Noise(), n=6)
        losses |= Encoding(gan(8, 2, classes, arch).frozen(), model)(Noise(), n=6)
    total(losses).sum().backward()
    assert all(loss.shape == (6,) and loss.isfinite().all() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in (*model.net.parameters(), *judge.parameters()))
    assert model.sample(2, Noise()).isfinite().all()


@pytest.mark.parametrize("image", [(1, 2, 2), (3, 7, 5), (1, 28, 28), (3, 32, 20)])
@pytest.mark.parametrize("arch", ["conv", "mlp"])
def test_images_of_any_size(image, arch):
    model = gan(2, arch=arch, encoder=True, image=image)
    x = model.sample(2, Noise())
    assert x.shape == (2, *image)
    assert x.min() >= 0
    assert x.max() <= 1
    assert model.reconstruct(x, Noise()).shape == x.shape
    logits, hidden = Discriminator(image, 2, arch=arch)(x)
    assert logits.shape == (2,)
    assert len(hidden) >= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"width": 0}, "all must be positive"), ({"classes": -1}, "classes may be 0"), ({"arch": "transformer"}, "conv or mlp is expected")],
)
def test_numbers_that_make_no_network_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        GAN(IMAGE, **arguments)


def test_a_gan_without_an_encoder_does_not_infer():
    assert gan().infer is None
    with pytest.raises(ValueError, match="no encoder"):
        gan().net.encode(images())


# ------------------------------------------------------------------ labels


def test_the_label_is_drawn_by_shared_noise_and_shown_to_the_generator():
    teacher, student = gan(8, classes=3).frozen(), gan(4, 1, classes=3)
    a, b = (run(m.generate, noise=Noise((2,)), n=300) for m in (teacher, student))
    assert torch.equal(a["y"].value, b["y"].value)
    assert torch.bincount(a["y"].value).min() > 60  # each label is as likely
    shown = [run(teacher.generate, noise=Noise(), n=1, given={"y": torch.tensor([i])}).output for i in range(3)]
    assert all((x - y).abs().max() > 1e-3 for x, y in itertools.combinations(shown, 2))


def test_a_discriminator_reads_the_label():
    net = born(lambda: Discriminator(IMAGE, 4, 3))
    x = images(1).expand(3, *IMAGE)
    logits, hidden = net(x, torch.arange(3))
    assert len(set(logits.tolist())) == 3
    projection = net.label.weight @ hidden[-1][0]
    assert torch.allclose(logits - projection, net.head(hidden[-1])[:, 0], atol=1e-6)


def test_the_noise_behind_images_is_inferred_with_their_label():
    teacher = gan(8, classes=3, encoder=True).frozen()
    student = copied(teacher)
    assert total(Distiller(teacher, student)(Noise(), images(8))).max() < 1e-6
    seen = run(teacher.infer, 2 * images(8) - 1, noise=Noise())["y"].value
    losses = Distiller(teacher, student, (Match("y"),))(Noise(), images(8))
    assert torch.equal(losses["y"], torch.zeros(8))
    assert len(seen.unique()) > 1


# ------------------------------------------------------------------ the adversary


class Linear(nn.Module):
    """A discriminator in closed form: the logit is <w, x>, which is the one hidden layer too."""

    classes = 0

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(0.1 * Noise((4,)).normal("w", (1, 64))[0])

    def forward(self, x, labels=None):
        logits = x.flatten(1) @ self.w
        return logits, [logits[:, None]]


def test_losses_in_closed_form():
    net = Linear()
    real, fake = images(seed=1), images(seed=2)
    found = Adversary(net, weight=0.5, features=2.0, r1=3.0)(real, fake)
    a, b = real.flatten(1) @ net.w, fake.flatten(1) @ net.w
    expected = {
        "adversarial": 0.5 * (1 + (-b).exp()).log(),
        "features": 2.0 * (a - b) ** 2,
        "discriminator": (1 + (-a).exp()).log() + (1 + b.exp()).log(),
        "r1": (1.5 * (net.w**2).sum()).expand(6),
    }
    assert list(found) == list(expected)
    for name, loss in found.items():
        assert torch.allclose(loss, expected[name], rtol=1e-4), name
    (slope,) = torch.autograd.grad(found["r1"].sum(), net.w)
    assert torch.allclose(slope, 18 * net.w, rtol=1e-5)  # 6 images, each w^2 * 3 / 2


@EVERY_KIND
def test_each_side_is_held_constant_in_the_others_losses(arch, classes):
    y = labels() if classes else None
    own = {"discriminator": False, "r1": False, "adversarial": True, "features": True}
    for name, generators in own.items():
        model, judge = gan(classes=classes, arch=arch), adversary(classes, arch, features=1.0)
        trace = run(model.generate, noise=Noise(), n=6)
        fake = model.images.decode(trace.output)
        judge(images(), fake, y, judge.labels_of(trace))[name].sum().backward()
        sides = {True: set(gradients(model.net)), False: set(gradients(judge))}
        assert sides[generators], name
        assert sides[not generators] == set(), name
    assert sides[True] == {name for name, _ in model.net.named_parameters()}


def test_the_discriminators_loss_reaches_all_of_it():
    judge = adversary(3)
    total(judge(images(), images(seed=3), labels(), labels())).sum().backward()
    assert set(gradients(judge)) == {name for name, _ in judge.named_parameters()}


def test_terms_without_weight_are_left_out():
    real, fake = images(seed=1), images(seed=2)
    assert list(adversary(weight=0.0, features=1.0)(real, fake)) == ["features", "discriminator", "r1"]
    assert list(adversary(r1=0.0)(real, fake)) == ["adversarial", "discriminator"]
    assert not adversary(features=1.0)(real, real)["features"].any()


def test_a_student_beside_an_adversary_leaves_the_rules_and_adds_its_terms():
    teacher, student = gan(8, classes=3).frozen(), gan(4, 1, classes=3)
    judge = adversary(3, features=0.5)
    plain = Distiller(teacher, student)(Noise(), n=5)
    found = Distiller(teacher, student, adversary=judge)(Noise(), n=5)
    assert list(found) == [*plain, "adversarial", "features", "discriminator", "r1"]
    assert all(torch.equal(found[name], loss) for name, loss in plain.items())
    alone = Distiller(teacher, student, (Match(weight=0.0),), adversary=judge)(Noise(), n=5)
    traces = [run(m.generate, noise=Noise(), n=5) for m in (teacher, student)]
    real, fake = (F.relu(t.output * 0.5 + 0.5) for t in traces)
    expected = judge(real, fake, traces[0]["y"].value, traces[1]["y"].value)
    assert all(torch.allclose(alone[name], loss, atol=1e-6) for name, loss in expected.items())
    with pytest.raises(ValueError, match="goes with program 'generate', not 'infer'"):
        Distiller(teacher, student, program="infer", adversary=judge)


def test_training_against_a_discriminator_moves_the_images_to_the_real_ones():
    bright = torch.full((16, *IMAGE), 0.9)
    model, judge = gan(), adversary()
    objective = AdversarialTraining(model, judge)
    first = model.sample(16, Noise()).mean()
    learning = [*train_only(model.net, reached(model, "generate")), *judge.parameters()]
    for step in range(40):
        total(objective(Noise((step,)), bright)).mean().backward()
        with torch.no_grad():
            for p in learning:
                p -= 0.01 * p.grad.sign()
                p.grad = None
    assert (model.sample(16, Noise()).mean() - 0.9).abs() < 0.5 * (first - 0.9).abs()


# ------------------------------------------------------------------ the encoder


@EVERY_KIND
def test_the_encoder_is_told_what_the_teachers_image_was_made_from(arch, classes):
    teacher, student = gan(8, classes=classes, arch=arch).frozen(), gan(4, 1, classes, arch, encoder=True)
    losses = Encoding(teacher, student)(Noise((6,)), n=5)
    made = run(teacher.generate, noise=Noise((6,)), n=5)
    q_z, q_y = student.net.encode(made.output)
    assert torch.allclose(losses["z"], -q_z.log_prob(made["z"].value).sum(1), rtol=1e-5)
    if classes:
        assert torch.allclose(losses["y"], F.cross_entropy(q_y.logits, made["y"].value, reduction="none"), rtol=1e-5)
    assert list(losses) == (["z", "y", "out"] if classes else ["z", "out"])
    z = q_z.loc + q_z.scale * Noise((6,)).fold("the student's own").normal("z", (5, 4))
    y = None if q_y is None else run(student.infer, made.output, noise=Noise((6,)).fold("the student's own"))["y"].value
    assert torch.allclose(losses["out"], ((student.net.decode(z, y) - made.output) ** 2).flatten(1).sum(1) / 2, rtol=1e-4)


def test_a_student_cannot_pass_the_teachers_noise_through():
    """One whose posterior is the prior would else reconstruct perfectly, without a look at the image."""
    teacher = gan().frozen()

    def blind(sample, x):
        return teacher.net.decode(sample("z", Normal(torch.zeros(len(x), 4), torch.ones(len(x), 4))), None)

    losses = Encoding(teacher, Model(teacher.net, teacher.images, infer=blind))(Noise(), n=8)
    assert losses["out"].min() > 0.01


def test_each_network_sees_the_image_in_its_own_range():
    seen = []

    def infer(sample, x):
        seen.append(x)
        return sample("z", Normal(x.flatten(1)[:, :4], torch.ones(len(x), 4)))

    teacher = gan().frozen()
    Encoding(teacher, Model(nn.Linear(1, 1), Images(IMAGE, (0.25,), (2.0,)), infer=infer), (Match("z"),))(Noise(), n=3)
    expected = run(teacher.generate, noise=Noise(), n=3).output * 0.5 + 0.5
    assert torch.allclose(seen[0], (expected - 0.25) / 2, atol=1e-6)


def test_an_encoder_learns_from_the_teachers_images_alone():
    student = gan(16, arch="mlp", encoder=True)
    with torch.no_grad():
        for p in student.net.generator.parameters():
            p *= 3  # a fresh network's images hardly tell the noise
    teacher = copied(student).frozen()
    objective, learning = Encoding(teacher, student), train_only(student.net, reached(student, "infer") - reached(student, "generate"))
    generator = digest_of(student.net.generator)
    found = []
    for step in range(60):
        losses = objective(Noise((step,)), n=64)
        total(losses).mean().backward()
        with torch.no_grad():
            for p in learning:
                p -= 0.02 * (1 - step / 60) * p.grad.sign()
                p.grad = None
        found.append(torch.stack([losses["z"].mean(), losses["out"].mean()]).detach())
    first, last = torch.stack(found[:5]).mean(0), torch.stack(found[-5:]).mean(0)
    assert last[0] < 0.8 * first[0]  # the noise, which is 5.7 nats to whom knows nothing
    assert last[1] < 0.5 * first[1]
    assert digest_of(student.net.generator) == generator


def test_the_divergence_of_a_point_is_the_negative_log_likelihood():
    z, y = torch.tensor([[0.5, -1.0]]), torch.tensor([1])
    assert kl(Point(z), Normal(torch.zeros(1, 2), 2 * torch.ones(1, 2))).item() == pytest.approx(
        math.log(2 * math.pi) + 2 * math.log(2) + (0.25 + 1) / 8
    )
    assert kl(Point(y), Categorical(probs=torch.tensor([[0.5, 0.25, 0.25]]))).item() == pytest.approx(math.log(4))


def test_the_latents_kl_of_an_inferred_label_is_to_equally_likely_ones():
    model = gan(classes=3, encoder=True)
    found = latent_kl(run(model.infer, 2 * images() - 1, noise=Noise()))
    q = model.net.encode(2 * images() - 1)[1].probs
    assert torch.allclose(found["y"], (q * (3 * q).log()).sum(1), atol=1e-5)
    assert list(found) == ["z", "y"]


def test_a_model_with_an_encoder_trains_it_on_its_own_images():
    model, judge = gan(classes=3, encoder=True), adversary(3)
    losses = AdversarialTraining(model, judge)(Noise(), images(), labels())
    (losses["encoder.z"] + losses["encoder.y"]).sum().backward()
    assert set(gradients(model.net)) == {name for name, _ in model.net.named_parameters() if name.startswith("encoder.")}


# ------------------------------------------------------------------ whole recipes

NET = {"kind": "gan", "image": [1, 8, 8], "width": 4, "latent": 3, "classes": 4, "encoder": False}
STEPS = {"steps": 3, "batch": 8, "beta1": 0}
JUDGE = {"width": 4}
SECTIONS = {
    "train": {"model": NET, **STEPS, "discriminator": JUDGE},
    "teacher": {"kind": "trained"},
    "student": {"width": 2, "encoder": True},
    "surrogate": None,
    "distill": {
        "generate": STEPS | {"rules": [{"nodes": "out", "by": "mse"}]},
        "infer": STEPS | {"start": "noise"},
        "scratch": STEPS | {"discriminator": JUDGE},
    },
    "arms": ["data_free", {"kind": "data_free", "name": "adversarial", "adversarial": JUDGE | {"features": 1}}, "scratch"],
}


@pytest.fixture
def gans(place):
    """A place whose recipe trains a conditional GAN and makes students of it."""
    pixels, found = digits_like()
    np.savez(place.folder / "data.npz", images=pixels, labels=found)
    place.recipe |= SECTIONS
    return place


@pytest.mark.slow
def test_a_recipe_trains_distils_and_measures(gans):
    assert gans.run("run", report=None) == 0
    assert json.loads((gans.out / "train" / "held_out.json").read_text())["frechet_of_pixels"] > 0
    arms = json.loads((gans.out / "metrics.json").read_text())["arms"]
    assert list(arms) == ["teacher", "student_data_free", "adversarial", "student_scratch"]
    assert all(arms[name]["reconstruction_mse"]["mean"] > 0 for name in list(arms)[1:])
    assert "reconstruction_mse" not in arms["teacher"]
    folder = gans.out / "students" / "adversarial" / "seed-0"
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    terms = {name for line in log if line["phase"] == "generate" for name in line if name.startswith("loss/")}
    assert terms == {"loss/out", "loss/adversarial", "loss/features", "loss/discriminator", "loss/r1"}
    # The discriminator is of the training alone.
    assert sorted(p.name for p in (gans.out / "teacher").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert GAN.from_pretrained(folder).encoder is not None


def test_a_run_that_is_cut_short_goes_on_to_the_same_bits(gans, monkeypatch):
    sections = {"evaluate": None, "report": None}
    assert gans.run("run", **sections) == 0
    whole = results(gans.out)
    assert {"teacher/model.safetensors", "students/adversarial/seed-0/model.safetensors"} < set(whole)
    gans.out.rename(gans.folder / "whole")
    left = interrupting(monkeypatch)
    codes = []
    for after in (2, 6, 7, 9, 1 << 30):
        left[0] = after
        codes.append(gans.run("run", **sections))
    assert codes == [130, 130, 130, 130, 0]
    assert results(gans.out) == whole


def test_an_adversary_needs_no_data(gans):
    gan(4, classes=4).net.save_pretrained(gans.folder / "made")
    arm = SECTIONS["arms"][1]
    changes = {"train": None, "data": None, "teacher": {"kind": "pretrained", "path": "./made"}, "arms": [arm], "evaluate": None}
    assert gans.run("distill", **changes, report=None) == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"student": {"width": 2}},
            "arm student_data_free, infer: the student has no encoder; set student.encoder: true, or infer: null",
        ),
        (
            {"arms": ["with_data"]},
            "arm student_with_data, generate: begins with images, but the teacher, a GAN, does not infer the noise behind them",
        ),
        ({"train": {"model": NET | {"classes": 2}, **STEPS}}, "data: label 3, but train.model.classes is 2"),
        ({"student": {"target": "own:made", "encoder": True}}, "student: encoder goes with width, ratio or budget"),
        ({"train": {"model": NET | {"arch": "unet"}, **STEPS}}, "train.model.arch: input should be 'conv' or 'mlp'"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(gans, capsys, changes, said):
    assert gans.run("run", **changes) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (gans.out / "teacher").exists()


def test_a_conditional_gan_needs_labels(gans, capsys):
    np.savez(gans.folder / "data.npz", images=digits_like()[0])
    assert gans.run("train") == 2
    assert "data: has no labels" in capsys.readouterr().err


def test_a_generator_of_ones_own_is_trained_against_a_discriminator_from_scratch(gans, capsys):
    (gans.folder / "own.py").write_text(
        "import torch\nfrom potstill.model import Images, Model\n"
        "def made():\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Sigmoid(), torch.nn.Unflatten(1, (1, 8, 8)))\n"
        "    return Model(net, Images((1, 8, 8)), lambda sample: net(sample.normal('z', (3,))))\n"
    )
    own = {"kind": "python", "target": "own:made"}
    changes = {"train": None, "teacher": own, "student": {"target": "own:made"}, "arms": ["scratch"], "evaluate": None, "report": None}
    assert gans.run("distill", "--import", "own", **changes) == 0
    log = (gans.out / "students" / "student_scratch" / "seed-0" / "log.jsonl").read_text()
    assert "loss/discriminator" in log
