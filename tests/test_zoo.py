"""What ships: the prior's digits are readable, by the eyes of a classifier that knows handwriting alone."""

import pytest
import torch

from potstill import build
from potstill.energy.view import Energy, Look
from potstill.noise import Noise
from potstill.synthesize.guided import Guided, fitted
from potstill.synthesize.prior import Prior, Prompts

pytest.importorskip("diffusers")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.mark.slow
def test_the_glyph_priors_digits_are_what_was_asked_for():
    classifier = build.pretrained("zoo:digits-classifier").model().frozen()
    prior = Prior.from_pretrained(build.ZOO / "glyphs-sd")
    assert prior.image_shape == (3, 32, 32)
    labels = torch.arange(100) % 10
    prompts = Prompts(tuple((f"the digit {name}",) for name in DIGITS))
    images = Guided(prior, prior.image_shape, 10, "off", prompts=prompts, guidance_scale=2.0)(
        Energy(), Look(classifier, labels=labels), 100, Noise((1,))
    )
    with torch.no_grad():
        found = classifier.net(fitted(images, (1, 8, 8))).argmax(1)
    assert (found == labels).float().mean() > 0.7


def test_the_zoo_is_small():
    assert sum(path.stat().st_size for path in build.ZOO.rglob("*") if path.is_file()) < 8 * 2**20
