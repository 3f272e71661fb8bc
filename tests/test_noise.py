"""Noise as a function of (seed, name, row): known answers, independence of everything else, distributions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import potstill.noise as noise_module
from potstill.noise import DrawnOnce, FixedNoise, Noise, philox

KINDS = ("normal", "uniform")


# Random123's kat_vectors for philox4x32, 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = torch.tensor([int(word, 16) for word in counter.split()])
    first, second = (int(word, 16) for word in key.split())
    assert [f"{word:08x}" for word in philox(words, (first, second)).tolist()] == expected.split()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (0, r"a tuple such as \(0,\), where 0 is the seed; found a value of type int"),
        ([0], r"found a value of type list"),
        ((0, 1.5), "of ints and strings; found a value of type float in it"),
    ],
)
def test_a_key_that_is_none(key, expected):
    with pytest.raises(TypeError, match=expected):
        Noise(key)


def test_philox_of_many_counters_is_that_of_each():
    counters = torch.tensor([[0, 2**32 - 1, 7], [1, 2, 3], [4, 5, 2**31], [6, 0, 9]])
    together = philox(counters, (11, 2**32 - 1))
    for i in range(3):
        assert together[:, i].tolist() == philox(counters[:, i], (11, 2**32 - 1)).tolist()


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=50)  # a busy machine is not an error
@given(rows=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6), shape=st.lists(st.integers(1, 4), max_size=3))
def test_a_row_depends_on_its_index_alone(kind, rows, shape):
    together = getattr(Noise((3,)).at(rows), kind)("z", (len(rows), *shape))
    assert together.shape == (len(rows), *shape)
    assert together.dtype == torch.float32
    for i, row in enumerate(rows):
        alone = getattr(Noise((3,)).at([row]), kind)("z", (1, *shape))
        assert torch.equal(together[i], alone[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_begins_alike_whatever_its_length(kind):
    long, short = (getattr(Noise(), kind)("z", (3, length)) for length in (50, 7))
    assert torch.equal(long[:, :7], short)


@pytest.mark.parametrize("kind", KINDS)
def test_without_rows_they_are_numbered(kind):
    free = getattr(Noise((5,)), kind)("z", (6, 3))
    for rows in (range(6), list(range(6))):
        assert torch.equal(free, getattr(Noise((5,)).at(rows), kind)("z", (6, 3)))
    assert torch.equal(free[[5, 1]], getattr(Noise((5,)).at([5, 1]), kind)("z", (2, 3)))
    assert torch.equal(free[1::2], getattr(Noise((5,)).at(range(1, 6, 2)), kind)("z", (3, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_names_seeds_folds_rows_and_kinds_differ(kind):
    def draw(noise, name="z"):
        return getattr(noise, kind)(name, (4, 4000))

    samples = [
        draw(Noise((0,))),
        draw(Noise((0,)), "z1"),
        draw(Noise((1,))),
        draw(Noise(("0",))),
        draw(Noise((0,)).fold("z")),
        draw(Noise((0,)).fold(1)),
        draw(Noise((0,)).fold(1, 2)),
        draw(Noise((0,)).fold(12)),
        draw(Noise((0,)).at(range(4, 8))),
        draw(Noise((0,)).at(range(2**32, 2**32 + 4))),
        draw(Noise((0,)).at(range(2**40, 2**40 + 4))),
    ]
    correlations = torch.corrcoef(torch.stack(samples).flatten(0, 1).double()) - torch.eye(4 * len(samples), dtype=torch.float64)
    assert correlations.abs().max() < 5 / math.sqrt(4000)
    assert torch.equal(draw(Noise((0,)).fold(1).fold(2)), draw(Noise((0,)).fold(1, 2)))


def test_folding_and_addressing_leave_the_rest():
    noise = Noise((7, "a"), rows=(1, 2))
    assert noise.fold("b", 3) == Noise((7, "a", "b", 3), rows=(1, 2))
    assert noise.at([4, 5, 6]) == Noise((7, "a"), rows=(4, 5, 6))
    assert noise.at(range(3)).rows == range(3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", [Noise((4,)), Noise((4,)).at(range(3, 303, 3)), Noise((4,)).at([*range(50), *range(2**40, 2**40 + 50)])])
def test_many_rows_in_parts_are_those_at_once(kind, source, monkeypatch):
    whole = getattr(source, kind)("z", (100, 3, 2))
    for part in (1, 7, 64, 10**9):
        monkeypatch.setattr(noise_module, "_IN_CACHE", part)
        assert torch.equal(getattr(source, kind)("z", (100, 3, 2)), whole)
    assert getattr(source, kind)("z", (100,)).shape == (100,)


@pytest.mark.parametrize("seed", [0, 7])
def test_chi_square(seed):
    """Counts in equal cells: of single numbers, of pairs within a row, and of the same place in rows that follow each other."""
    x = Noise((seed,)).uniform("z", (4000, 64)).double()
    cells = (x * 32).long()
    assert stats.chisquare(torch.bincount(cells.flatten(), minlength=32).numpy()).pvalue > 1e-3
    for first, second in ((cells[:, :-1], cells[:, 1:]), (cells[:-1], cells[1:])):
        pairs = torch.bincount((first * 32 + second).flatten(), minlength=1024)
        assert stats.chisquare(pairs.numpy()).pvalue > 1e-3
    whole = stats.norm.cdf(Noise((seed,)).normal("z", (4000, 64)).double().numpy())
    assert stats.chisquare(torch.bincount(torch.from_numpy(whole * 256).long().flatten(), minlength=256).numpy()).pvalue > 1e-3


def test_cross_correlation():
    """Of streams that differ in seed, name, fold or rows, at every shift: none stands out of what independent ones have."""
    one = Noise((1,))
    streams = [
        one.normal("z", (1, 4096)),
        Noise((2,)).normal("z", (1, 4096)),
        one.normal("z1", (1, 4096)),
        one.fold(0).normal("z", (1, 4096)),
        one.at([1]).normal("z", (1, 4096)),
        one.at([2**32]).normal("z", (1, 4096)),
    ]
    spectra = torch.stack([torch.fft.rfft(x[0].double()) for x in streams])
    for i in range(len(streams)):
        for j in range(i + 1):
            found = torch.fft.irfft(spectra[i] * spectra[j].conj(), n=4096) / 4096
            if i == j:
                assert abs(float(found[0]) - 1) < 5 * math.sqrt(2 / 4096)
                found = found[1:]
            assert float(found.abs().max()) < 5.5 / math.sqrt(4096)  # the largest of 4,096 standard normals passes 5.5 once in 6,000


@pytest.mark.parametrize("seed", [0, 1, 20240607])
@pytest.mark.parametrize(("kind", "cdf", "moments"), [("normal", stats.norm.cdf, (0, 1, 0, 3)), ("uniform", stats.uniform.cdf, None)])
def test_distribution(seed, kind, cdf, moments):
    x = getattr(Noise((seed,)), kind)("z", (100, 401)).double()  # 401: the last block of four is cut
    n = x.numel()
    assert stats.kstest(x.flatten().numpy(), cdf).pvalue > 1e-3
    # Each position within Philox's block of four and each row by itself.
    assert min(stats.kstest(x[:, i::4].flatten().numpy(), cdf).pvalue for i in range(4)) > 1e-3
    assert stats.kstest(x.mean(1).numpy(), "norm", (x.mean().item(), x.std().item() / math.sqrt(401))).pvalue > 1e-3
    if moments:
        found = [x.pow(k).mean().item() for k in (1, 2, 3, 4)]
        # Standard deviations of the sample moments of a standard normal: sqrt(E x^2k - (E x^k)^2) / sqrt(n).
        assert found == [pytest.approx(m, abs=5 * s / math.sqrt(n)) for m, s in zip(moments, (1, 2**0.5, 15**0.5, 96**0.5), strict=True)]
    neighbors = torch.corrcoef(torch.stack([x[:, :-4].flatten(), *(x[:, k : k - 4 or None].flatten() for k in range(1, 5))]))
    assert (neighbors - torch.eye(5)).abs().max() < 5 / math.sqrt(n)


def test_uniform_lies_in_0_to_1_on_a_grid_of_24_bits(monkeypatch):
    x = Noise().uniform("z", (64, 1024))
    assert x.min() >= 0
    assert x.max() < 1
    assert torch.equal((x * 2.0**24).round() * 2.0**-24, x)
    words = torch.tensor([0, 2**32 - 1, 2**32 - 129, 255]).view(4, 1, 1)
    monkeypatch.setattr("potstill.noise.philox", lambda counter, key: words)
    assert Noise().uniform("z", (1, 4)).tolist() == [[0.0, 1 - 2.0**-24, 1 - 2.0**-24, 0.0]]


def test_normal_is_finite_at_the_ends_of_the_generator(monkeypatch):
    words = torch.tensor([0, 0, 2**32 - 1, 2**32 - 1]).view(4, 1, 1)
    monkeypatch.setattr("potstill.noise.philox", lambda counter, key: words)
    x = Noise().normal("z", (1, 4))[0].tolist()
    assert x[0] == pytest.approx(math.sqrt(64 * math.log(2)))  # the largest of all: 6.66
    assert x[1:] == pytest.approx([0, 0, 0], abs=1e-4)


def test_rows_beyond_32_bits_differ_from_those_within():
    rows = [5, 5 + 2**32, 5 + 2**33, 2**63 - 1, 2**62]
    x = Noise().at(rows).normal("z", (5, 64))
    assert x.isfinite().all()
    assert len({tuple(row) for row in x.tolist()}) == 5


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 1000])
def test_permutation(n):
    order = Noise((2,)).permutation("order", n)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(order, Noise((2,)).at([8, 9]).permutation("order", n))  # rows do not enter
    if n == 1000:
        for other in (Noise((2,)).permutation("another", n), Noise((3,)).permutation("order", n), torch.arange(n)):
            assert (order == other).sum() < 10  # 1 is expected of a random order


def test_permutations_are_uniform():
    counts = torch.zeros(4, 4)
    for seed in range(500):
        counts[torch.arange(4), Noise((seed,)).permutation("order", 4)] += 1
    assert stats.chisquare(counts.flatten().numpy(), ddof=6).pvalue > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_rows_than_addressed_is_refused(kind):
    with pytest.raises(ValueError, match=r"'z3' asks for 4 rows of noise, but 3 rows"):
        getattr(Noise().at(range(3)), kind)("z3", (4, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_noise(kind):
    value = torch.arange(6.0).view(2, 3)
    fixed = getattr(FixedNoise({"z": value, "a": value}), kind)
    assert torch.equal(fixed("z", (2, 3)), value)
    assert torch.equal(fixed("z", torch.Size((2, 3))), value)
    with pytest.raises(KeyError, match=r"no noise for node 'y'; there is noise for \['a', 'z'\]"):
        fixed("y", (2, 3))
    with pytest.raises(ValueError, match=r"'z' is \(2, 3\), but the node is \(2, 4\)"):
        fixed("z", (2, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_once_is_the_sources_noise_computed_once(kind, monkeypatch):
    source, count = Noise((3,)).at(range(5, 9)), []
    words = Noise._words
    monkeypatch.setattr(Noise, "_words", lambda *a: (count.append(a), words(*a))[1])
    once = DrawnOnce(source)
    drawn = [getattr(once, kind)(name, shape) for name, shape in [("z", (4, 2)), ("y", (4, 2)), ("z", (4, 3)), ("z", torch.Size((4, 2)))]]
    assert len(count) == 3
    assert drawn[0] is drawn[3]
    for value, (name, shape) in zip(drawn, [("z", (4, 2)), ("y", (4, 2)), ("z", (4, 3)), ("z", (4, 2))], strict=True):
        assert torch.equal(value, getattr(source, kind)(name, shape))
    other = KINDS[1 - KINDS.index(kind)]
    assert torch.equal(getattr(once, other)("z", (4, 2)), getattr(source, other)("z", (4, 2)))
