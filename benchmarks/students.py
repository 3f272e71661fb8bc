"""What do three students of one teacher cost, trained together, against the dearest of them alone?

One update of all three, which share the teacher's trace and noise, and one of the widest on its own take turns in one process. Both are
the training loop's own updates (``potstill.distill.loop.fitting``), without logging and saving, on one thread; what is counted is the
processor's time, which says nothing of what else the machine does. The teacher is a ladder VAE of width 64 on 3x32x32 pictures with
random weights, and so are the students, of three widths; the phase is "generate" with the rules that a recipe has by default.

    python benchmarks/students.py [--repeats 60] [--batch 32]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from common import write
from potstill.build import rules
from potstill.config import Generator
from potstill.distill.distiller import UNSHARED, Distiller, Shared, reached, train_only
from potstill.distill.loop import Log, Phase, accelerator, fitting
from potstill.families.lvae import LVAE
from potstill.noise import Noise
from potstill.state import States

IMAGE, TEACHER = (3, 32, 32), 64
CASES = ((4, 8, 16), (8, 16, 32))
WARM = 5


def training(teacher: LVAE, width: int, section: Generator, shared: Shared, folder: Path) -> Iterator[tuple[int, int]]:
    """Of one student, an update at a time."""
    torch.manual_seed(0)
    net = teacher.shrunk(width).to(memory_format=torch.channels_last)
    model = net.model()

    def phase(name: str) -> Phase:
        objective = Distiller(teacher.model(), model, rules(section.rules), shared=shared)
        return Phase(name, objective, lambda module, b: module(b.noise, None, b.n), train_only(net, reached(model, name)), section)

    place = folder / str(width)
    engine, states, log = accelerator("cpu"), States(place), Log(place / "log.jsonl")
    return fitting(net, phase, ["generate"], Noise(), engine=engine, states=states, log=log, save_seconds=1e9, log_steps=10**9)


def seconds(trainings: list[Iterator[tuple[int, int]]]) -> float:
    """Of the processor's time that one update of each takes."""
    start = time.process_time()
    for one in trainings:
        next(one)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    teacher = LVAE(IMAGE, TEACHER).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    section = Generator(steps=10**6, batch=arguments.batch)
    rows = []
    for widths in CASES:
        with tempfile.TemporaryDirectory() as place:
            shared = Shared()
            sides = {
                "three": [training(teacher, width, section, shared, Path(place) / "three") for width in widths],
                "apart": [training(teacher, width, section, UNSHARED, Path(place) / "apart") for width in widths],
                "dearest": [training(teacher, widths[-1], section, UNSHARED, Path(place) / "dearest")],
            }
            found: dict[str, list[float]] = {name: [] for name in sides}
            for i in range(WARM + arguments.repeats):
                for name, side in sides.items():
                    taken = seconds(side)
                    if i >= WARM:
                        found[name].append(taken)
        ratios = {name: statistics.median(a / b for a, b in zip(found[name], found["dearest"], strict=True)) for name in ("three", "apart")}
        medians = {f"{name}_ms": round(1e3 * statistics.median(values), 2) for name, values in found.items()}
        case = f"LVAE {IMAGE[0]}x{IMAGE[1]}x{IMAGE[2]}, width {TEACHER} to {', '.join(map(str, widths))}, batch {arguments.batch}"
        rows.append({"case": case, "repeats": arguments.repeats, **medians, **{f"{k}_over_dearest": v for k, v in ratios.items()}})
        print(
            f"{case}: the widest alone {medians['dearest_ms']:.1f} ms an update, three together {medians['three_ms']:.1f} ms "
            f"(ratio {ratios['three']:.2f}), one after the other {medians['apart_ms']:.1f} ms (ratio {ratios['apart']:.2f})"
        )
    figures = {
        "three_over_dearest": max(row["three_over_dearest"] for row in rows),
        "apart_over_dearest": max(row["apart_over_dearest"] for row in rows),
    }
    print(f"wrote {write('students', figures, rows)}")


if __name__ == "__main__":
    main()
