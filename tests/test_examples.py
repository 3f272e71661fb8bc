"""The examples in docs/examples: executed, short enough, and what they say comes true."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def potstill_lines(path):
    """Between the two marks: what a user writes beside the network, its training and the figures."""
    part = path.read_text(encoding="utf-8").split("# ---- from here on: potstill\n")[1].split("# ---- to here\n")[0]
    return [line for line in part.splitlines() if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_needs_at_most_ten_lines(path):
    assert 1 <= len(potstill_lines(path)) <= 10
    assert "potstill" not in path.read_text(encoding="utf-8").split("# ---- from here on: potstill\n")[0].split('"""')[2]


def test_a_vae_of_ones_own():
    found = runpy.run_path(str(EXAMPLES / "own_vae.py"))
    assert found["apart"] < 0.5 * found["before"]
    teacher, student = found["errors"]
    assert student < 0.06  # a gray image has 0.14
    assert teacher < student


def test_a_gan_of_ones_own():
    found = runpy.run_path(str(EXAMPLES / "own_gan.py"))
    assert found["apart"] < 0.5 * found["before"]


def test_a_classifier_of_ones_own():
    found = runpy.run_path(str(EXAMPLES / "own_classifier.py"))
    teacher, student = found["accuracies"]
    assert teacher > 0.8
    assert student > 0.5  # chance is 0.1
