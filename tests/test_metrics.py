"""The metrics of potstill.evaluate: against published values, closed forms, other implementations, and by hand."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from potstill.evaluate import _arrays, distances, emd, energy_distance, frechet, kid, mmd, one_nn, prdc
from potstill.evaluate.features import Features, from_network, pixels

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metrics.json").read_text())
METRICS = [frechet, emd, mmd, energy_distance, kid, one_nn, prdc, distances]
BLOCKWISE = [mmd, energy_distance, kid, one_nn, prdc]


def draw(seed, n, m, d, shift=0.0, scale=1.0):
    """Two sets of normal features, (n, d) and (m, d), drawn as the published values were."""
    random = numpy.random.default_rng(seed)
    x = random.standard_normal((n, d)).astype("float32")
    y = (shift + scale * random.standard_normal((m, d))).astype("float32")
    return x, y


def with_moments(mean, covariance, n, seed=0):
    """A sample (n, d) whose own mean and unbiased covariance are exactly those given."""
    z = numpy.random.default_rng(seed).standard_normal((n, len(mean)))
    z -= z.mean(axis=0)
    white = z @ numpy.linalg.inv(numpy.linalg.cholesky(numpy.cov(z.T))).T
    return white @ numpy.linalg.cholesky(covariance).T + mean


def squared(x, y):
    """Squared distances, (n, m), from the definition."""
    return numpy.square(numpy.float64(x)[:, None] - numpy.float64(y)[None]).sum(axis=2)


sizes = st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(1, 8))
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True)
def _slow_imports():
    """POT (with sklearn and pandas behind it) and the oracle take seconds to import, which is no test's time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("ot")
        with contextlib.suppress(ImportError):
            importlib.import_module("torchmetrics.image.kid")


# The published implementation


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"seed{case['seed']}")
def test_published_values(case):
    x, y = draw(*(case[key] for key in ("seed", "n", "m", "d", "shift", "scale")))
    assert math.sqrt(frechet(x, y)) == pytest.approx(case["frechet_sqrt"], rel=1e-4)
    assert emd(x, y) == pytest.approx(case["emd"], rel=1e-4)
    assert mmd(x, y) == pytest.approx(case["mmd"], rel=1e-4)
    assert one_nn(x, y) == case["one_nn"]


def test_distances_are_the_single_metrics_bit_for_bit():
    x, y = draw(5, 40, 30, 6, shift=0.3)
    assert distances(x, y, k=3) == {
        "frechet": frechet(x, y),
        "frechet_sqrt": math.sqrt(frechet(x, y)),
        "kid": kid(x, y),
        "emd": emd(x, y),
        "mmd": mmd(x, y),
        "energy_distance": energy_distance(x, y),
        "one_nn": one_nn(x, y),
        **prdc(x, y, k=3),
    }
    assert distances(x, y)["recall"] == prdc(x, y, k=5)["recall"]


def test_distances_compute_each_pairwise_matrix_once(monkeypatch):
    calls = []

    def counted(a, b, metric):
        calls.append((len(a), len(b)))
        return real(a, b, metric)

    real = _arrays.cdist
    monkeypatch.setattr(_arrays, "cdist", counted)
    distances(*draw(5, 20, 20, 3))
    assert calls == [(20, 20)] * 3


# Fréchet


def test_frechet_by_hand():
    # Means 0 and 2, variances 2 and 8: 2² + (sqrt 8 - sqrt 2)².
    assert frechet([[-1.0], [1.0]], [[0.0], [4.0]]) == pytest.approx(6.0, rel=1e-14)


@pytest.mark.parametrize(("n", "m"), [(30, 30), (5, 9), (9, 100)])
def test_frechet_of_known_gaussians(n, m):
    mean_x, mean_y = numpy.array([1.0, -2.0, 0.5, 0.0]), numpy.array([0.0, 1.0, 0.5, 3.0])
    variance_x, variance_y = numpy.array([1.0, 4.0, 9.0, 0.25]), numpy.array([4.0, 1.0, 16.0, 0.0625])
    x, y = with_moments(mean_x, numpy.diag(variance_x), n), with_moments(mean_y, numpy.diag(variance_y), m, seed=1)
    expected = 19.0 + numpy.square(numpy.sqrt(variance_x) - numpy.sqrt(variance_y)).sum()
    assert frechet(x, y) == pytest.approx(expected, rel=1e-10)


def test_frechet_against_scipy_square_root_of_the_product():
    x, y = draw(7, 60, 45, 6, shift=0.5, scale=2.0)
    random = numpy.random.default_rng(0)
    x, y = x @ random.standard_normal((6, 6)), y @ random.standard_normal((6, 6))  # covariances that do not commute
    a, b = numpy.cov(x.T), numpy.cov(y.T)
    root = scipy.linalg.sqrtm(a @ b)
    expected = numpy.square(x.mean(axis=0) - y.mean(axis=0)).sum() + numpy.trace(a + b - 2 * numpy.real(root))
    assert frechet(x, y) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(20, 25), (20, 60), (60, 25), (90, 60)])
def test_frechet_below_and_above_the_width_agree(n, m):
    """Embedded in 40 dimensions and rotated, features of width 8 are as far apart; the covariances there are singular."""
    x, y = draw(8, n, m, 8, shift=0.5, scale=2.0)
    rotation = scipy.stats.ortho_group.rvs(40, random_state=0)
    wide_x, wide_y = numpy.pad(x, ((0, 0), (0, 32))) @ rotation, numpy.pad(y, ((0, 0), (0, 32))) @ rotation
    assert frechet(wide_x, wide_y) == pytest.approx(frechet(x, y), rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(5, 7), (5, 30), (30, 5)])
def test_frechet_of_singular_covariances_against_an_eigendecomposition(n, m):
    x, y = draw(9, n, m, 12, shift=1.0, scale=0.5)
    a, b = numpy.cov(numpy.float64(x.T)), numpy.cov(numpy.float64(y.T))
    values, vectors = numpy.linalg.eigh(a)
    root = (vectors * numpy.sqrt(values.clip(0))) @ vectors.T
    trace = numpy.sqrt(numpy.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    expected = numpy.square(x.mean(axis=0, dtype="d") - y.mean(axis=0, dtype="d")).sum() + numpy.trace(a + b) - 2 * trace
    assert frechet(x, y) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(6, 9, 30), (6, 50, 30), (50, 9, 30), (50, 40, 30)])
def test_frechet_decomposes_nothing_larger_than_it_must(n, m, d, monkeypatch):
    shapes = []
    svd = numpy.linalg.svd
    monkeypatch.setattr(numpy.linalg, "svd", lambda matrix, **options: shapes.append(matrix.shape) or svd(matrix, **options))
    monkeypatch.setattr(numpy.linalg, "qr", lambda matrix, mode, qr=numpy.linalg.qr: shapes.append(matrix.shape) or qr(matrix, mode=mode))
    frechet(*draw(28, n, m, d))
    assert shapes == [(rows, d) for rows in (n, m) if rows > d] + [(min(n, d), min(m, d))]


def test_frechet_of_orthogonal_supports_and_of_dead_features():
    x, y = numpy.zeros((6, 4)), numpy.zeros((6, 4))
    x[:, 0] = y[:, 2] = [-1, 1, -1, 1, -1, 1]
    assert frechet(x, y) == pytest.approx(2 * 1.2, rel=1e-14)  # both variances in full: 6 / 5 each
    assert frechet(numpy.zeros((6, 4)), numpy.ones((6, 4))) == pytest.approx(4.0, rel=1e-14)


def test_frechet_keeps_its_digits_far_from_zero():
    x, y = draw(10, 50, 50, 5, shift=0.5)
    near = frechet(x, y)
    assert frechet(numpy.float64(x) + 1e6, numpy.float64(y) + 1e6) == pytest.approx(near, rel=1e-8)


@settings(max_examples=40, deadline=None)
@given(sizes, seeds)
def test_frechet_is_symmetric_zero_on_itself_and_at_least_the_gap_of_the_means(size, seed):
    x, y = draw(seed, *size, shift=0.5, scale=3.0)
    there, back = frechet(x, y), frechet(y, x)
    assert there == pytest.approx(back, rel=1e-9)
    gap = numpy.square(x.mean(axis=0, dtype="d") - y.mean(axis=0, dtype="d")).sum()
    assert there >= gap * (1 - 1e-9)
    assert 0 <= frechet(x, x) <= 1e-12 * numpy.square(x).sum()


# Earth mover's distance


def test_emd_by_hand():
    # Both cross assignments of 0, 1 to 5, 3 cost 7; halved, as each row weighs 1/2.
    assert emd([[0.0], [1.0]], [[5.0], [3.0]]) == pytest.approx(3.5, rel=1e-14)
    # 0 and 6 each keep 1/3 of the weight in place and send the rest of their 1/2, which is 1/6, to 3.
    assert emd([[0.0], [6.0]], [[0.0], [3.0], [6.0]]) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(("n", "m"), [(12, 12), (12, 7), (5, 20)])
def test_emd_in_one_dimension_against_scipy(n, m):
    x, y = draw(11, n, m, 1, shift=0.5)
    assert emd(x, y) == pytest.approx(scipy.stats.wasserstein_distance(x[:, 0], y[:, 0]), rel=1e-6)


def test_emd_of_unequal_sizes_is_that_of_the_sets_repeated_to_equal_size():
    x, y = draw(12, 8, 12, 3, shift=0.5)
    assert emd(x, y) == pytest.approx(emd(numpy.repeat(x, 3, axis=0), numpy.repeat(y, 2, axis=0)), rel=1e-12)


def test_emd_of_equal_sizes_against_pot():
    ot = importlib.import_module("ot")
    x, y = draw(13, 30, 30, 4, shift=0.2)
    assert emd(x, y) == pytest.approx(float(ot.emd2([], [], numpy.sqrt(squared(x, y)))), rel=1e-10)


@settings(max_examples=40, deadline=None)
@given(sizes, seeds)
def test_emd_moves_with_a_translation_and_is_symmetric(size, seed):
    n, m, d = size
    x, y = (numpy.float64(each) for each in draw(seed, n, m, d))
    step = numpy.random.default_rng(seed).standard_normal(d)
    assert emd(x, x + step) == pytest.approx(numpy.linalg.norm(step), rel=1e-10)
    there = emd(x, y)
    assert there == pytest.approx(emd(y, x), rel=1e-10)
    assert there >= numpy.linalg.norm(x.mean(axis=0) - y.mean(axis=0)) * (1 - 1e-10)


def test_emd_says_when_the_simplex_stops_early(monkeypatch):
    monkeypatch.setattr(importlib.import_module("potstill.evaluate.emd"), "ITERATIONS", 2)
    with pytest.raises(RuntimeError, match=r"emd: the transport problem of 30 x 40 rows was not solved within 2 iterations"):
        emd(*draw(14, 30, 40, 3))
    assert emd(*draw(14, 30, 30, 3)) > 0  # equal sizes do without it


# Kernel distances


def test_mmd_by_hand():
    # s = (0 + 4 + 4 + 0) / 4 = 2, so k(0, 2) = exp(-1); the means are (1 + 1/e) / 2, 1, and (1 + 1/e) / 2.
    assert mmd([[0.0], [2.0]], [[0.0], [0.0]]) == pytest.approx(math.sqrt((1 - math.exp(-1)) / 2), rel=1e-14)


def test_mmd_from_the_definition_with_x_as_the_reference():
    x, y = draw(15, 20, 13, 4, shift=0.5, scale=2.0)
    width = squared(x, x).mean()
    xx, xy, yy = (numpy.exp(-squared(a, b) / (2 * width)).mean() for a, b in ((x, x), (x, y), (y, y)))
    assert mmd(x, y) == pytest.approx(math.sqrt(xx + yy - 2 * xy), rel=1e-12)
    assert mmd(y, x) != pytest.approx(mmd(x, y), rel=1e-3)


def test_mmd_is_zero_on_itself_and_needs_a_reference_with_a_width():
    x, _ = draw(16, 9, 2, 3)
    assert mmd(x, x) == 0.0
    with pytest.raises(ValueError, match=r"x: found 9 equal rows, expected rows that differ"):
        mmd(numpy.full((9, 3), 0.1), x)
    assert mmd(x, numpy.full((9, 3), 0.1)) > 0.1


def test_energy_distance_by_hand():
    # Between: 1, 3, 0, 2. Within: 0, 1, 1, 0 and 0, 2, 2, 0.
    assert energy_distance([[0.0], [1.0]], [[1.0], [3.0]]) == pytest.approx(2 * 6 / 4 - 2 / 4 - 4 / 4)


def test_energy_distance_in_one_dimension_is_twice_the_squared_distance_of_distribution_functions():
    """Székely's identity: 2 times the integral of (F - G)²."""
    x, y = draw(31, 40, 25, 1, shift=0.4)
    grid = numpy.sort(numpy.concatenate([x, y]).ravel()).astype(float)
    f, g = (numpy.searchsorted(numpy.sort(s.ravel()), grid[:-1], side="right") / len(s) for s in (x, y))
    assert energy_distance(x, y) == pytest.approx(2 * float(((f - g) ** 2 * numpy.diff(grid)).sum()), rel=1e-5)
    assert energy_distance(x, x[::-1]) == pytest.approx(0, abs=1e-12)
    assert energy_distance(x, y) == pytest.approx(energy_distance(y, x), rel=1e-12)


def test_kid_from_the_definition():
    x, y = draw(17, 7, 5, 3, shift=0.5, scale=2.0)

    def kernel(a, b):
        return (float(numpy.float64(a) @ numpy.float64(b)) / 3 + 1) ** 3

    within_x = numpy.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = numpy.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    across = numpy.mean([kernel(a, b) for a in x for b in y])
    assert kid(x, y) == pytest.approx(within_x + within_y - 2 * across, rel=1e-12)
    assert kid(y, x) == pytest.approx(kid(x, y), rel=1e-12)


def test_kid_against_torchmetrics():
    oracle = pytest.importorskip("torchmetrics.image.kid")
    x, y = draw(18, 50, 50, 8, shift=0.5)
    expected = oracle.poly_mmd(torch.from_numpy(x).double(), torch.from_numpy(y).double())
    assert kid(x, y) == pytest.approx(float(expected), rel=1e-10)


def test_kid_is_unbiased():
    values = [kid(*draw(seed, 10, 15, 4)) for seed in range(300)]
    error = numpy.std(values) / math.sqrt(len(values))
    assert abs(numpy.mean(values)) < 3 * error
    # With the diagonals left in, the mean would be above 1, so this is a test that can tell.
    assert 3 * error < 0.3


# 1-nearest-neighbor


def published_one_nn(x, y):
    """The rule of the published code on exact distances: stack, diagonal at infinity, the neighbor's label, float32 mean."""
    stacked = torch.from_numpy(numpy.concatenate([x, y])).double()
    matrix = (stacked[:, None] - stacked[None]).square().sum(2)
    matrix.fill_diagonal_(math.inf)
    label = torch.cat([torch.ones(len(x)), torch.zeros(len(y))])
    return float((label[matrix.topk(1, 0, False).indices[0]] == label).float().mean())


@pytest.mark.parametrize("d", [1, 2, 3])
def test_one_nn_breaks_ties_as_published(d):
    random = numpy.random.default_rng(d)
    x, y = random.integers(0, 6, (70, d)).astype("float32"), random.integers(0, 6, (50, d)).astype("float32")
    assert one_nn(x, y) == published_one_nn(x, y)
    assert one_nn(x, y) != one_nn(y, x)  # or the grid had no tie that matters


def test_one_nn_tie_goes_to_x():
    # 0 is as near to 2, of its own set, as to -2, and counts as right; -2 is nearest to 0, and is the only one that is wrong.
    assert one_nn([[0.0], [2.0]], [[-2.0], [-100.0], [-101.0]]) == numpy.float32(4 / 5)
    # Now 0 is of y, and its tie goes to -2 of x.
    assert one_nn([[-2.0], [-100.0], [-101.0]], [[0.0], [2.0]]) == numpy.float32(3 / 5)


def test_one_nn_of_one_distribution_of_two_and_of_copies():
    x, y = draw(19, 500, 500, 3)
    assert one_nn(x, y) == pytest.approx(0.5, abs=0.05)
    assert one_nn(x, y + 100) == 1.0
    assert one_nn(x, x) == 0.0


# Precision, recall, density, coverage


def test_prdc_by_hand():
    # Balls reach 1, 1, 2 around 0, 1, 3, and 9.5, 0.5, 0.5 around 0.5, 10, 10.5.
    x, y = [[0.0], [1.0], [3.0]], [[0.5], [10.0], [10.5]]
    assert prdc(x, y, k=1) == pytest.approx({"precision": 1 / 3, "recall": 1.0, "density": 2 / 3, "coverage": 2 / 3}, rel=1e-15)
    # The other way round: 0, 1 and 3 lie in the one ball of 9.5, and 0.5 in two of the small ones.
    assert prdc(y, x, k=1) == pytest.approx({"precision": 1.0, "recall": 1 / 3, "density": 1.0, "coverage": 1 / 3}, rel=1e-15)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_from_the_definition(k):
    x, y = draw(20, 30, 20, 2, shift=0.7, scale=0.6)
    radius_x, radius_y = numpy.sort(squared(x, x))[:, k], numpy.sort(squared(y, y))[:, k]
    across = squared(x, y)
    inside = across <= radius_x[:, None]
    assert prdc(x, y, k) == pytest.approx(
        {
            "precision": inside.any(axis=0).mean(),
            "recall": (across <= radius_y).any(axis=1).mean(),
            "density": inside.sum() / (k * 20),
            "coverage": inside.any(axis=1).mean(),
        },
        rel=1e-15,
    )
    assert 0 < prdc(x, y, k)["coverage"] < 1


def test_prdc_of_copies_counts_duplicated_rows():
    x = numpy.repeat(draw(21, 5, 2, 3)[0], 4, axis=0)  # balls of radius 0 at k = 3
    assert prdc(x, x, k=3) == {"precision": 1.0, "recall": 1.0, "density": 4 / 3, "coverage": 1.0}


@pytest.mark.parametrize("k", [0, 10, 2.0])
def test_prdc_refuses_k(k):
    x, y = draw(22, 12, 10, 2)
    for metric in (prdc, distances):
        with pytest.raises(ValueError, match=rf"k: found {k!r}, expected a whole number from 1 to 9"):
            metric(x, y, k=k)
    assert prdc(x, y, k=9)["precision"] > 0


# What they share


@pytest.mark.parametrize("metric", BLOCKWISE)
@pytest.mark.parametrize("rows", [1, 7])
def test_the_size_of_a_block_changes_nothing(metric, rows, monkeypatch):
    x, y = draw(23, 33, 21, 4, shift=0.3)
    expected = metric(x, y)
    monkeypatch.setattr(_arrays, "BLOCK_BYTES", 8 * 21 * rows)
    assert len(list(_arrays.row_blocks(33, 21))) == math.ceil(33 / rows)
    # The products of kid come from BLAS, which may add in another order.
    assert metric(x, y) == (pytest.approx(expected, rel=1e-12) if metric is kid else expected)


@pytest.mark.parametrize("metric", BLOCKWISE)
def test_memory_is_bounded_by_the_block(metric, monkeypatch):
    x, y = draw(24, 1200, 1200, 2)
    monkeypatch.setattr(_arrays, "BLOCK_BYTES", 200_000)
    tracemalloc.start()
    try:
        metric(x, y)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000  # one pairwise matrix is 11,520,000


@pytest.mark.parametrize("metric", METRICS)
def test_tensors_lists_and_any_real_type_are_read_alike(metric):
    random = numpy.random.default_rng(25)
    x, y = random.integers(0, 9, (8, 3)), random.integers(0, 9, (8, 3))
    expected = metric(x, y)
    assert metric(x.tolist(), y.astype("float32")) == expected
    assert metric(torch.from_numpy(x), torch.from_numpy(y)) == expected
    assert metric(torch.from_numpy(x).bfloat16(), torch.from_numpy(y).double().requires_grad_()) == expected


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", numpy.zeros(8), r"x: found shape \(8,\), expected \(n, d\)"),
        ("y", numpy.zeros((8, 1, 3)), r"y: found shape \(8, 1, 3\), expected \(n, d\)"),
        ("y", numpy.zeros((1, 3)), r"y: found shape \(1, 3\), expected at least 2 rows"),
        ("x", numpy.zeros((8, 0)), r"x: found shape \(8, 0\), expected at least 2 rows and 1 column"),
        ("y", numpy.zeros((8, 4)), r"x and y: found 3 and 4 features per row, expected the same number"),
        ("x", numpy.array([[0, 0, 0], [0, numpy.nan, numpy.inf]]), r"x: found 2 values that are not finite, the first in row 1"),
        ("y", numpy.zeros((8, 3), dtype=complex), r"y: found values of type complex128, expected real numbers"),
        ("x", [[1.0, 2.0], [3.0]], r"x: found rows of different lengths, expected an array of shape \(n, d\)"),
        ("y", [["a", "b", "c"]] * 8, r"y: found values of type <U1, expected real numbers"),
    ],
)
def test_wrong_arguments_are_named(metric, name, wrong, message):
    good = draw(26, 8, 2, 3)[0]
    with pytest.raises(ValueError, match=message):
        metric(**{"x": good, "y": good, name: wrong})


@pytest.mark.parametrize("metric", METRICS)
def test_arguments_are_left_as_they_were(metric):
    x, y = (numpy.float64(each) for each in draw(27, 9, 8, 3))
    before = x.copy(), y.copy()
    metric(x, y)
    assert (x == before[0]).all()
    assert (y == before[1]).all()


def test_importing_potstill_does_not_import_the_metrics():
    script = "import sys, potstill; sys.exit('potstill.evaluate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# Features


def images(n=5, seed=0):
    return torch.randint(0, 256, (n, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class Spy(nn.Module):
    """Two features per image, and a record of what it was called with."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.seen = []

    def forward(self, x):
        self.seen.append((tuple(x.shape), x.dtype, self.training, torch.is_grad_enabled()))
        return self.drop(self.norm(x)).flatten(1)[:, :2]


def test_pixels_are_the_images_flattened():
    found = pixels()(images())
    assert pixels().name == "pixels"
    assert found.dtype == numpy.float32
    assert (found == images().numpy().reshape(5, 48) / numpy.float32(255)).all()
    assert (pixels()(images().double() / 255) == found).all()


def test_a_network_runs_in_eval_mode_in_batches_without_gradients_and_is_left_as_it_was():
    network = Spy().train()
    network.norm.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    features = from_network("spy", network, batch=2)
    found = features(images())
    assert features.name == "spy"
    assert network.seen == [((size, 3, 4, 4), torch.float32, False, False) for size in (2, 2, 1)]
    assert (network.training, network.norm.training, network.drop.training) == (True, False, True)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    numpy.testing.assert_allclose(found, images().flatten(1)[:, :2].numpy() / 255, rtol=1e-4)  # batch norm at its start divides by 1 + 5e-6
    assert found.dtype == numpy.float32
    assert (from_network("spy", network, batch=256)(images()) == found).all()


def test_the_network_and_its_images_go_to_the_device():
    network = Spy()
    found = []

    def look(x):
        found.append(x.device.type)
        return torch.zeros(len(x), 2)

    from_network("spy", network, device="meta")
    from_network("look", look, device="meta")(images())
    assert next(network.parameters()).device.type == "meta"
    assert found == ["meta"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: x, r"found shape \(5, 3, 4, 4\), expected a finite floating tensor of shape \(5, d\)"),
        (lambda x: x.flatten(1)[:4], r"found shape \(4, 48\), expected .*\(5, d\), one row per image"),
        (lambda x: x.flatten(1)[:, :0], r"found shape \(5, 0\), expected"),
        (lambda x: x.flatten(1).numpy(), r"found ndarray, expected a finite floating tensor"),
        (lambda x: x.flatten(1).argmax(1, keepdim=True), r"found type torch.int64, expected a finite floating"),
        (lambda x: x.flatten(1) / 0, r"found \d+ values that are not finite in float32"),
        (lambda x: (1 + x.flatten(1)).double() * 1e300, r"found 240 values that are not finite in float32"),
    ],
)
def test_a_wrong_feature_network_is_named(output, message):
    with pytest.raises(ValueError, match="feature network 'mine': " + message):
        from_network("mine", output)(images())


def test_features_that_change_width_between_batches_are_refused():
    with pytest.raises(ValueError, match=r"feature network 'mine': found shape \(1, 1\), expected .*\(1, 2\)"):
        from_network("mine", lambda x: x.flatten(1)[:, : len(x)], batch=2)(images(3))


def test_an_error_inside_the_network_says_which_network_and_what_it_read():
    network = nn.Sequential(nn.Conv2d(1, 2, 3)).train()
    with pytest.raises(RuntimeError) as caught:
        from_network("gray", network)(images())
    assert caught.value.__notes__ == ["This happened while the feature network 'gray' read images of shape (5, 3, 4, 4)."]
    assert network.training


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (images()[0], r"found images as shape \(3, 4, 4\), expected a tensor \(n, C, H, W\)"),
        (images()[:0], r"found images as shape \(0, 3, 4, 4\), expected .* at least one image"),
        (images().numpy(), r"found images as ndarray, expected a tensor"),
        (images().long(), r"found images of type torch.int64, expected uint8, or floating in \[0, 1\]"),
        (images().float(), r"found images in \[0, 254\], expected \[0, 1\]; clamp or rescale"),
        (images() / 127.5 - 1, r"found images in \[-\S+, \S+\], expected \[0, 1\]"),
        (images() / 255 * math.nan, r"found images in \[nan, nan\], expected \[0, 1\]"),
    ],
)
def test_wrong_images_are_refused(wrong, message):
    with pytest.raises(ValueError, match="features 'pixels': " + message):
        pixels()(wrong)


def test_features_need_a_name_and_a_batch():
    with pytest.raises(ValueError, match="found an empty name"):
        Features("", nn.Flatten())
    with pytest.raises(ValueError, match="features 'mine': found batch 0, expected 1 image or more"):
        from_network("mine", nn.Flatten(), batch=0)
