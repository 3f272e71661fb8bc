"""The LVAE against values of the published code, to 1e-5: conditionals, outputs, losses and the negative ELBO.

The repository holds one of the eight samples. With the environment variable ``POTSTILL_GOLDEN`` naming a folder that holds the
whole ``lvae.safetensors`` and ``lvae.json``, all eight and their means are compared too.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from potstill.divergence import Match, compare, negative_elbo, total, wasserstein2
from potstill.families.lvae import LVAE
from potstill.noise import FixedNoise
from potstill.trace import run

PUBLISHED = (Match("z5", weight=0), Match("z*", wasserstein2, 0.1, "mean"), Match("out"))


@dataclass
class Golden:
    tensors: dict[str, torch.Tensor]
    figures: dict[str, Any]

    def under(self, prefix):
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}

    def noise(self, prefix):
        return FixedNoise({f"z{level}": t for level, t in self.under(prefix).items()})

    def net(self, role):
        net = LVAE((3, 32, 32), self.figures[f"{role}_width"])
        net.load_state_dict(self.under(f"{role}."), strict=True)
        return net.eval()

    @torch.no_grad()
    def generated(self, role):
        return run(self.net(role).generate, noise=self.noise("noise."), n=len(self.tensors["noise.1"]))

    @torch.no_grad()
    def elbo(self):
        x = self.tensors["elbo.x"]
        return negative_elbo(run(self.net("teacher").infer, x, noise=self.noise("elbo.noise.")), x)


def read(folder):
    return Golden(load_file(folder / "lvae.safetensors"), json.loads((folder / "lvae.json").read_text(encoding="utf-8")))


def whole():
    folder = os.environ.get("POTSTILL_GOLDEN")
    if not folder:
        pytest.skip("POTSTILL_GOLDEN names no folder")
    return read(Path(folder))


@pytest.fixture(scope="module", params=["one sample", "whole"])
def golden(request):
    return read(Path(__file__).parent / "golden") if request.param == "one sample" else whole()


def assert_agree(found, expected):
    """To 1e-5 of the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_conditionals_and_outputs(golden, role):
    trace = golden.generated(role)
    assert list(trace) == ["z5", "z4", "z3", "z2", "z1", "out"]
    for level in range(1, 5):
        dist = trace[f"z{level}"].dist
        stored = golden.tensors[f"{role}_prior.{level}.mean"]
        apart = dist.loc.shape[-1] // stored.shape[-1]
        assert_agree(dist.loc[..., ::apart, ::apart], stored)
        assert_agree(dist.scale[..., ::apart, ::apart], golden.tensors[f"{role}_prior.{level}.std"])
    assert_agree(trace.out.dist.mean, golden.tensors[f"{role}_mean"])
    assert trace.out.dist.scale.unique().tolist() == pytest.approx([golden.figures["decoder_std"]])


def test_distillation_loss_of_each_sample(golden):
    teacher, student = golden.generated("teacher"), golden.generated("student")
    losses = compare(teacher, student, PUBLISHED)
    assert list(losses) == ["z4", "z3", "z2", "z1", "out"]
    assert total(losses).tolist() == pytest.approx(golden.figures["loss_per_sample"], rel=1e-5)


def test_negative_elbo_of_each_sample(golden):
    parts = golden.elbo()
    assert total(parts).tolist() == pytest.approx(golden.figures["nelbo_per_sample"], rel=1e-5)
    assert parts["out"].tolist() == pytest.approx(golden.figures["nll_per_sample"], rel=1e-5)


def test_means_over_the_batch():
    golden = whole()
    losses = compare(golden.generated("teacher"), golden.generated("student"), (Match("z*", wasserstein2, reduce="mean"), Match("out")))
    parts = golden.elbo()
    for level in range(1, 5):
        assert losses[f"z{level}"].mean().item() == pytest.approx(golden.figures["latent_w2_mean"][level - 1], rel=1e-5)
    for level in range(1, 6):
        assert parts[f"z{level}"].mean().item() == pytest.approx(golden.figures["kl_per_level_mean"][level - 1], rel=1e-5)
    assert losses["out"].mean().item() == pytest.approx(golden.figures["output_kl_mean"], rel=1e-5)


@pytest.mark.parametrize(("width", "count"), [(128, 5_386_496), (32, 366_656), (8, 30_416)])
def test_number_of_parameters_of_the_published_widths(width, count):
    with torch.device("meta"):
        net = LVAE((3, 32, 32), width)
    assert sum(p.numel() for p in net.parameters()) == count
