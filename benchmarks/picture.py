"""The README's picture: the teacher and its students on the same noise, row above row.

python benchmarks/picture.py [runs/digits-demo ...] [--out docs/same-noise.png]

Of several runs, all of one teacher and the same seeds, each row is of the first that has it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

from potstill.state import read_json

matplotlib.use("Agg")
from matplotlib import pyplot

LABELS = {
    "teacher": "teacher",
    "teacher+calibrated": "teacher, calibrated noise",
    "calibrated+calibrated": "student, data-free, calibrated noise",
    "calibrated-longer+calibrated": "the same, three times the updates",
    "student_data_free": "student, data-free",
    "longer": "student, data-free, three times the updates",
    "student_with_data": "student, with data",
    "student_scratch": "student, from scratch",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", default=[Path("runs/digits-demo")])
    parser.add_argument("--out", type=Path, default=Path("docs/same-noise.png"))
    arguments = parser.parse_args()
    found = {}
    for run in reversed(arguments.runs):
        arms = read_json(run / "metrics.json")["arms"]
        with np.load(run / "evaluate" / "pictures.npz", allow_pickle=False) as pictures:
            found |= {name: (pictures[f"samples/{name}"], arms[name]["params"]) for name in LABELS if name in arms}
    rows = {LABELS[name]: found[name] for name in LABELS if name in found}
    columns = len(next(iter(rows.values()))[0])
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(9, 0.56 * len(rows)), dpi=120, layout="constrained")
    for axis, (label, (images, parameters)) in zip(axes, rows.items(), strict=True):
        channels, height = images.shape[1:3]
        strip = np.pad(images, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=255).transpose(2, 0, 3, 1).reshape(height, -1, channels)
        axis.imshow(strip if channels == 3 else strip[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axis.set_ylabel(f"{label}\n{parameters:,}", rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    figure.savefig(arguments.out, metadata={"Software": None})
    print(f"wrote {arguments.out}: {columns} columns")


if __name__ == "__main__":
    main()
