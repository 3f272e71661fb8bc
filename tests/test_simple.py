"""compress: what the one call leaves behind, beside a trained student (tests/test_examples.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import potstill
from potstill.errors import BadInput
from potstill.model import Images

WIDE = Images.between((1, 8, 8), -1, 1)
STEPS = 7


class VAE(nn.Module):
    """With a BatchNorm in both halves, whose statistics say how often it was run in train mode."""

    def __init__(self, hidden):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 8))
        self.decoder = nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 64), nn.Tanh())

    def encode(self, x):
        return self.encoder(x).chunk(2, 1)

    def decode(self, z):
        return self.decoder(z).reshape(-1, 1, 8, 8)


def pair():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [potstill.from_autoencoder(vae.encode, vae.decode, WIDE) for vae in (VAE(16), VAE(8))]


def norms(model):
    return [module for module in model.net.modules() if isinstance(module, nn.BatchNorm1d)]


def test_a_batchnorm_sees_the_updates_and_nothing_else():
    teacher, student = pair()
    teacher.frozen()
    found = potstill.compress(teacher, student, steps=STEPS, batch=8)
    assert [int(norm.num_batches_tracked) for norm in norms(found)] == [STEPS, STEPS]
    assert [int(norm.num_batches_tracked) for norm in norms(teacher)] == [0, 0]


def test_the_student_comes_back_in_eval_mode_and_can_be_trained_on():
    found = potstill.compress(*pair(), steps=2, batch=4)
    assert not any(module.training for module in found.net.modules())
    assert all(p.requires_grad for p in found.net.parameters())


def test_the_same_seed_gives_the_same_bits_and_another_others():
    weights = []
    for seed in (0, 0, 1):
        found = potstill.compress(*pair(), steps=3, batch=4, seed=seed)
        weights.append(torch.cat([p.flatten() for p in found.net.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_images_of_another_size_are_named():
    with pytest.raises(BadInput, match=r"\(1, 9, 9\).*\(1, 8, 8\)"):
        potstill.compress(*pair(), images=torch.rand(4, 1, 9, 9), steps=2)


def test_models_without_a_program_in_common():
    teacher, student = pair()
    with pytest.raises(BadInput, match="no program in common: VAE has generate, and VAE has infer"):
        potstill.compress(replace(teacher, infer=None), replace(student, generate=None), steps=2)


def test_the_teacher_is_frozen():
    teacher, student = pair()
    before = {name: value.clone() for name, value in teacher.net.state_dict().items()}
    potstill.compress(teacher, student, steps=3, batch=4)
    assert not any(p.requires_grad for p in teacher.net.parameters())
    after = teacher.net.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
