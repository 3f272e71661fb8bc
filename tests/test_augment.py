"""Augmentation: what it does to an image, and that an image's row alone decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from potstill import config, jobs
from potstill.distill.augment import augmented
from potstill.distill.loop import Batch
from potstill.noise import FixedNoise, Noise


def pictures(n=6, shape=(2, 5, 7)):
    return Noise((3,)).uniform("x", (n, *shape))


def drawn(*rows):
    return FixedNoise({"augment": torch.tensor(rows)})


@pytest.mark.parametrize("padding", ["zero", "reflect"])
@pytest.mark.parametrize("shift", [1, 3])
def test_every_shift_is_a_crop_of_the_padded_image(padding, shift):
    section = config.Augment(shift=shift, padding=padding)
    side = 2 * shift + 1
    for down in range(side):
        for right in range(side):
            (found,) = augmented(pictures(1), section, drawn([(down + 0.5) / side, (right + 0.5) / side, 0.0]))
            edges = ((0, 0), (shift, shift), (shift, shift))
            padded = np.pad(pictures(1)[0].numpy(), edges, mode="constant" if padding == "zero" else "reflect")
            assert np.array_equal(found.numpy(), padded[:, down : down + 5, right : right + 7])
    # The middle leaves it, and the extremes of the noise stay within the padding.
    (same,) = augmented(pictures(1), section, drawn([0.5, 0.5, 0.0]))
    assert torch.equal(same, pictures(1)[0])
    assert augmented(pictures(1), section, drawn([1 - 2**-24, 0.0, 0.0])).shape == (1, 2, 5, 7)


def test_every_other_image_is_mirrored_left_to_right():
    x = pictures(3)
    found = augmented(x, config.Augment(flip=True), drawn([0.9, 0.9, 0.49], [0.9, 0.9, 0.51], [0.1, 0.1, 0.0]))
    assert torch.equal(found, torch.stack([x[0].flip(2), x[1], x[2].flip(2)]))
    many = pictures(400)
    share = (augmented(many, config.Augment(flip=True), Noise((1,))) != many).flatten(1).any(1).float().mean()
    assert 0.4 < share < 0.6


def test_an_images_row_alone_decides():
    x, section = pictures(), config.Augment(shift=2, padding="reflect", flip=True)
    together = augmented(x, section, Noise((4,)).at(range(10, 16)))
    order = [3, 0, 5]
    assert torch.equal(augmented(x[order], section, Noise((4,)).at([13, 10, 15])), together[order])
    assert torch.equal(augmented(x[3:], section, Noise((4,)).at(range(13, 16))), together[3:])
    assert not torch.equal(augmented(x, section, Noise((5,)).at(range(10, 16))), together)
    changes = {tuple(a.flatten().tolist()) for a in augmented(x[:1].expand(40, -1, -1, -1), section, Noise())}
    assert len(changes) > 20


def test_each_way_and_length_comes_as_often():
    x = torch.zeros(3000, 1, 7, 7)
    x[:, :, 3, 3] = 1
    rows = augmented(x, config.Augment(shift=2), Noise()).flatten(1).argmax(1)
    for places in (rows // 7, rows % 7):
        counts = torch.bincount(places, minlength=7)
        assert counts[[0, 6]].tolist() == [0, 0]
        assert counts[1:6].min() > 500  # of 600 that are expected each


def test_it_is_off_by_default_and_drawn_anew_at_every_update():
    images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 1, 8, 8)

    def loaded(augment, step, rows=range(4), index=(2, 0, 3, 1)):
        batch = Batch(Noise((1,)).fold(step).at(rows), torch.tensor(index), len(index), step)
        return jobs._loader(images, torch.device("cpu"), augment)(batch)

    plain = loaded(None, 0)
    assert torch.equal(plain, torch.from_numpy(images)[[2, 0, 3, 1]].float() / 255)
    assert torch.equal(loaded(config.Augment(), 0), plain)
    section = config.Augment(shift=3, flip=True)
    assert not torch.equal(loaded(section, 0), plain)
    assert not torch.equal(loaded(section, 0), loaded(section, 1))
    assert torch.equal(loaded(section, 1, range(2, 4), (3, 1)), loaded(section, 1)[2:])  # a process's part of the batch


@pytest.mark.parametrize("phase", ["generate", "infer", "scratch"])
def test_every_phase_takes_it(phase):
    distill = config.Distill(**{phase: {"augment": {"shift": 2, "flip": True}}})
    assert getattr(distill, phase).augment == config.Augment(shift=2, flip=True)
    assert all(getattr(distill, other).augment is None for other in {"generate", "infer", "scratch"} - {phase})
