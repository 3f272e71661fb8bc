"""How good is a generative model? Distances between real features x (n, d) and generated features y (m, d).

Which features is the caller's choice, made in `potstill.evaluate.features`; time and size are in `potstill.evaluate.cost`.
`import potstill` does not import this package.
"""

from __future__ import annotations

import math
from typing import Any

from potstill.evaluate._arrays import comparison
from potstill.evaluate.emd import emd, emd_of
from potstill.evaluate.energy_distance import energy_distance, energy_distance_of
from potstill.evaluate.frechet import frechet
from potstill.evaluate.mmd import kid, mmd, mmd_of
from potstill.evaluate.one_nn import one_nn, one_nn_of
from potstill.evaluate.prdc import prdc, prdc_of

__all__ = ["distances", "emd", "energy_distance", "frechet", "kid", "mmd", "one_nn", "prdc"]


def distances(x: Any, y: Any, k: int = 5) -> dict[str, float]:
    """Every metric of generated features `y` (m, d) against real features `x` (n, d), under its name in metrics.json.

    Keys: `frechet`, `frechet_sqrt`, `kid`, `emd`, `mmd`, `energy_distance`, `one_nn`, `precision`, `recall`, `density`, `coverage`. The
    values are those of the functions of the same names, where their definitions stand; `frechet_sqrt` is the square root of `frechet`,
    and the last four are `prdc` with k neighbors. Pairwise distances are computed once and held: 8 (n² + n m + m²) bytes, 25 MB for
    1,024 rows each.

    Raises ValueError where x or y is not a finite array of that shape with at least two rows, the two differ in d, all rows of x are
    equal, or k is not a whole number from 1 to one less than the rows of each set; RuntimeError where `emd` finds no optimum.
    """
    sets = comparison(x, y, keep=True)
    # First, so that a wrong k is reported before the minutes that large sets take.
    shares = prdc_of(sets, k)
    squared = frechet(sets.x, sets.y)
    return {
        "frechet": squared,
        "frechet_sqrt": math.sqrt(squared),
        "kid": kid(sets.x, sets.y),
        "emd": emd_of(sets),
        "mmd": mmd_of(sets),
        "energy_distance": energy_distance_of(sets),
        "one_nn": one_nn_of(sets),
        **shares,
    }
