"""Measuring without data: against what the teacher makes, from synthesize to report."""

import json

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Normal, kl_divergence

from potstill import cli, config, load
from potstill.data import floats
from potstill.evaluate.arms import posterior_agreement, samples
from potstill.evaluate.frechet import frechet
from potstill.evaluate.reference import of_teacher
from potstill.families.classifier import Classifier
from potstill.families.helmholtz import HelmholtzMachine
from potstill.families.vae import VAE
from potstill.model import Images, Model
from potstill.noise import Noise
from potstill.report.tables import BLIND, text_table, verdict
from potstill.synthesize import surrogate
from potstill.trace import run as traced

BY_TEACHER = {"reference": "teacher", "n": 24, "latency_repeats": 3}
BY_DATA = {"n": 24, "latency_repeats": 3}
DISTANCES = {"frechet", "frechet_sqrt", "kid", "emd", "energy_distance", "mmd", "one_nn", "precision", "recall", "density", "coverage"}


def metrics_of(place):
    return json.loads((place.out / "metrics.json").read_text())


def flat(images):
    return images.flatten(1).numpy()


@pytest.fixture
def done(place):
    """A run that was given no data at all."""
    assert place.run("run", data=None, evaluate=BY_TEACHER) == 0
    return place


# ------------------------------------------------------------------ a run without data


def test_a_run_without_data_is_measured_against_fresh_samples(done):
    found = metrics_of(done)
    teacher, student = load(done.folder / "teacher"), load(done.out / "student")
    fresh = teacher.sample(24, Noise((0, "reference")))
    drawn = {"teacher": teacher, "student_data_free": student}
    for arm, model in drawn.items():
        own = model.sample(24, Noise((0, 0, "evaluate")))
        assert found["arms"][arm]["frechet"]["mean"] == pytest.approx(frechet(flat(fresh), flat(own)), rel=1e-4)
        assert found["arms"][arm].keys() >= DISTANCES | {"reconstruction_mse", "nelbo", "kl"}
    others = teacher.sample(24, Noise((0, 0, "evaluate", "floor")))
    assert found["reference"]["floor"]["frechet"]["mean"] == pytest.approx(frechet(flat(fresh), flat(others)), rel=1e-4)
    assert set(found["reference"]["floor"]) == DISTANCES
    assert found["reference"] | {"floor": 0, "images": 0} == {
        "dimensions": 64,
        "kind": "teacher",
        "data": "the teacher's own making",
        "n": 24,
        "features": "pixels",
        "floor": 0,
        "images": 0,
    }


def test_agreement_of_reconstructions_is_of_the_two_on_the_same_images_and_noise(done):
    found = metrics_of(done)["arms"]
    teacher, student = load(done.folder / "teacher"), load(done.out / "student")
    fresh, noise = teacher.sample(24, Noise((0, "reference"))), Noise((0, 0, "evaluate"))
    seen = {name: model.reconstruct(fresh, noise) for name, model in (("teacher", teacher), ("student_data_free", student))}
    for name, images in seen.items():
        assert found[name]["reconstruction_mse"]["mean"] == pytest.approx((images - fresh).pow(2).mean().item(), rel=1e-4)
    apart = (seen["teacher"] - seen["student_data_free"]).pow(2).mean().item()
    assert found["student_data_free"]["reconstruction_agreement"]["mean"] == pytest.approx(apart, rel=1e-4)
    assert not {"reconstruction_agreement", "posterior_agreement"} & set(found["teacher"])


def test_the_page_the_table_and_the_verdict_say_what_cannot_be_known(done):
    page, found = (done.out / "report.html").read_text("utf-8"), metrics_of(done)
    assert "No real data was measured against." in page
    assert "Floor: teacher to teacher" in page
    assert "Reconstruction agreement, MSE" in page
    assert "eal test images" not in page
    assert "real images" not in page
    assert BLIND in text_table(found)
    assert "Floor (teacher to teacher)" in text_table(found)
    said = verdict(found)
    assert said.startswith("The data-free student")
    assert "not real data" in said
    assert BLIND in said
    assert "has nothing to compare with" not in said


def test_real_data_that_is_there_is_not_read(place):
    (place.folder / "data.npz").write_bytes(b"no images")
    assert place.run("run", evaluate=BY_TEACHER) == 0
    assert place.run("run", evaluate=BY_DATA, name="by-data") == 2


def test_a_student_of_real_data_may_stand_beside(place):
    assert place.run("run", evaluate=BY_TEACHER, arms=["data_free", "with_data"]) == 0
    found = metrics_of(place)
    assert {"posterior_agreement", "frechet"} <= set(found["arms"]["student_with_data"])
    assert "the student distilled with real data" in verdict(found)
    assert BLIND in verdict(found)


def test_as_many_images_as_are_not_given(place):
    assert place.run("run", data=None, evaluate={"reference": "teacher", "latency_repeats": 3}, report=None) == 0
    assert metrics_of(place)["reference"]["n"] == config.TEACHER_IMAGES


def test_it_is_done_again_to_the_bit_and_skipped_when_done(done, capsys):
    before = metrics_of(done)
    (done.out / "metrics.json").unlink()
    assert done.run("evaluate", data=None, evaluate=BY_TEACHER) == 0
    after = metrics_of(done)
    for arm, figures in before["arms"].items():
        assert {k: v for k, v in figures.items() if k in DISTANCES} == {k: v for k, v in after["arms"][arm].items() if k in DISTANCES}
    assert done.run("evaluate", evaluate=BY_DATA) == 2
    assert "differs: evaluate.reference" in capsys.readouterr().err


def test_the_reference_shares_no_image_with_the_floor_and_none_with_a_student():
    teacher = Model(nn.Linear(1, 1), Images((1, 8, 8)), generate=lambda sample: sample.normal("z", (1, 8, 8)).sigmoid())
    reference = of_teacher(teacher, 12, Noise((0, "reference")), 5)
    noise = Noise((0, 0, "evaluate"))
    sets = [reference.images, reference.others(noise), samples(teacher, 12, noise, 5), samples(teacher, 12, Noise((0, "surrogate")), 5)]
    whole = torch.cat(sets).flatten(1)
    assert len(whole.unique(dim=0)) == 48


# ------------------------------------------------------------------ teachers of other kinds


def test_a_classifier_is_measured_by_the_labels_of_its_teacher(place):
    torch.manual_seed(0)
    Classifier((1, 8, 8), 4, 4).eval().save_pretrained(place.folder / "teacher")
    sections = {"surrogate": {"kind": "uniform", "n": 40, "shard": 16}, "distill": {"generate": None, "infer": {"steps": 3, "batch": 8}}}
    assert place.run("run", data=None, evaluate=BY_TEACHER | {"n": 32}, **sections) == 0
    found = metrics_of(place)
    images = floats(surrogate.read(place.out / "surrogate")[:32])
    nets = [Classifier.from_pretrained(place.folder / "teacher").eval(), Classifier.from_pretrained(place.out / "student").eval()]
    with torch.no_grad():
        labels = [traced(net.model().program("infer"), images, noise=Noise()).out.dist.logits.argmax(1) for net in nets]
    share = (labels[0] == labels[1]).float().mean().item()
    assert found["arms"]["student_data_free"]["label_agreement"]["mean"] == pytest.approx(share)
    assert found["compared"] == "label_agreement"
    assert found["reference"]["data"] == "the surrogate (students may have learned on it)"
    assert "accuracy" not in found["arms"]["student_data_free"]
    assert "Classification timed" in (place.out / "report.html").read_text("utf-8")
    assert "Label agreement" in verdict(found)


def test_values_are_standardized_by_what_the_teacher_makes(place):
    torch.manual_seed(0)
    HelmholtzMachine((2, 1, 1), width=4).eval().save_pretrained(place.folder / "teacher")
    evaluate = BY_TEACHER | {"features": "standardized"}
    steps = {"steps": 3, "batch": 8, "rules": [{"nodes": "z*"}]}
    distill = {"generate": steps, "infer": steps | {"replay": "*", "elbo": 0}}
    assert place.run("run", data=None, evaluate=evaluate, distill=distill) == 0
    teacher = load(place.folder / "teacher")
    fresh, own = teacher.sample(24, Noise((0, "reference"))).flatten(1), teacher.sample(24, Noise((0, 0, "evaluate"))).flatten(1)
    scaled = [((x - fresh.mean(0)) / fresh.std(0)).numpy() for x in (fresh, own)]
    found = metrics_of(place)["arms"]
    assert found["teacher"]["frechet"]["mean"] == pytest.approx(frechet(*scaled), rel=1e-3)
    assert found["student_data_free"]["posterior_agreement"]["mean"] > 0


# ------------------------------------------------------------------ agreement of posteriors


def vae(seed, latent=3):
    torch.manual_seed(seed)
    return VAE((1, 8, 8), 4, latent, 0.1).model().frozen()


def test_agreement_of_posteriors_is_the_kl_of_the_two_encoders():
    teacher, student = vae(0), vae(1)
    x = Noise((3,)).uniform("x", (10, 1, 8, 8))
    with torch.no_grad():
        ours, theirs = (m.net.encode(m.images.encode(x)) for m in (teacher, student))
    expected = kl_divergence(Normal(ours.loc, ours.scale), Normal(theirs.loc, theirs.scale)).sum(1).mean().item()
    assert posterior_agreement(teacher, student, x, Noise((4,)), 4) == pytest.approx(expected, rel=1e-5)
    assert posterior_agreement(teacher, teacher, x, Noise((4,)), 4) == pytest.approx(0, abs=1e-6)


def chain(shift):
    """Two latents, the second normal around the first."""

    def infer(sample, x):
        first = sample("first", Normal(x.mean((1, 2, 3), keepdim=False)[:, None] + shift, 1.0))
        return sample("second", Normal(first + shift, 2.0))[:, :, None, None].expand_as(x)

    return Model(nn.Linear(1, 1), Images((1, 8, 8)), infer=infer)


def test_a_latent_below_another_is_compared_given_the_teachers_value():
    """Without that, the second latent would differ twice: by its own shift and by that of the first."""
    x = Noise((3,)).uniform("x", (6, 1, 8, 8))
    assert posterior_agreement(chain(0.0), chain(0.5), x, Noise((4,)), 4) == pytest.approx(0.5**2 / 2 + 0.5**2 / 8, rel=1e-5)


def test_what_has_other_latents_has_no_agreement():
    x = Noise((3,)).uniform("x", (6, 1, 8, 8))
    named = Model(nn.Linear(1, 1), Images((1, 8, 8)), infer=lambda s, x: s("y", Categorical(logits=x.flatten(1))).float() + x[:, 0, 0, 0])
    assert posterior_agreement(vae(0), vae(1, latent=2), x, Noise((4,)), 4) is None
    assert posterior_agreement(vae(0), named, x, Noise((4,)), 4) is None
    plain = Model(nn.Linear(1, 1), Images((1, 8, 8)), infer=lambda sample, x: x)
    assert posterior_agreement(plain, plain, x, Noise((4,)), 4) is None


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"evaluate": BY_DATA}, "evaluate: needs data to compare with; reference: teacher does without"),
        ({"evaluate": BY_TEACHER, "arms": ["data_free", "with_data"]}, "arms: with_data, scratch and continual need data"),
        ({"evaluate": BY_TEACHER | {"groups": {"even": [0, 2]}}}, "evaluate: groups are of labels"),
        ({"evaluate": BY_TEACHER | {"n": 8, "k": 8}}, "evaluate.k: 8 neighbors, but 8 reference images"),
        ({"evaluate": BY_TEACHER | {"features": "standardized"}}, "evaluate.features: standardized is for data that are no pictures"),
        ({"evaluate": BY_TEACHER | {"features": "classifier:zoo:nothing"}}, "zoo:nothing"),
        ({"evaluate": BY_TEACHER | {"reference": "student"}}, "evaluate.reference: "),
    ],
)
def test_what_cannot_be_measured_is_one_line_before_anything_is_written(place, capsys, sections, problem):
    assert place.run("run", data=None, **sections) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert err.count("\n") == 1
    assert not place.out.exists()


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"kind": "uniform", "n": 16}, "evaluate.n: 24 images, but 16 are in the surrogate"),
        (None, "evaluate.reference: the teacher generates no images; add a surrogate"),
    ],
)
def test_a_teacher_that_does_not_generate_needs_a_surrogate_that_is_large_enough(place, capsys, section, problem):
    Classifier((1, 8, 8), 4, 4).eval().save_pretrained(place.folder / "teacher")
    distill = {"generate": None, "infer": {"steps": 3, "batch": 8}} if section else {"generate": None, "scratch": {"steps": 3, "batch": 8}}
    arms = {} if section else {"arms": ["scratch"], "data": place.recipe["data"]}
    assert place.run("run", **({"data": None, "surrogate": section, "distill": distill, "evaluate": BY_TEACHER} | arms)) == 2
    assert problem in capsys.readouterr().err
    assert not place.out.exists()


def test_what_is_hashed_of_other_recipes_stays_as_it_was():
    assert "reference" not in config.Evaluate().model_dump()
    assert config.Evaluate(reference="teacher").model_dump()["reference"] == "teacher"


def test_runs_of_other_references_are_not_put_beside(tmp_path, capsys):
    def run(name, **reference):
        about = {"data": "the teacher's own making", "n": 64, "features": "pixels"} | reference
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"reference": about, "arms": {"teacher": {"frechet": 1.0}}}))
        return str(tmp_path / name)

    by_data, old, one, same, other = run("a", kind="data"), run("b"), *(run(n, kind="teacher", images=i) for n, i in ("c1", "d1", "e2"))
    assert cli.main(["compare", by_data, old]) == 0
    assert cli.main(["compare", one, same]) == 0
    assert BLIND in capsys.readouterr().out
    assert cli.main(["compare", by_data, one]) == 2
    assert "its reference, teacher, differ from data" in capsys.readouterr().err
    assert cli.main(["compare", one, other]) == 2
    assert "its teacher's images, 2, differ from 1" in capsys.readouterr().err
