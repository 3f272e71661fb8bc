"""What does the framework cost? One update of ``Distiller`` as the training loop makes it, against the same update written by hand.

The two take turns in one process, so a machine whose speed drifts slows both. The hand-written loop calls the networks' layers
directly, writes the losses out, and uses torch's optimizer; it is given the same noise, or draws its own by ``torch.randn``.

    python benchmarks/step_cost.py [--repeats 200]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common import write
from potstill.distill.distiller import Distiller, reached, train_only
from potstill.distill.loop import accelerator
from potstill.divergence import Match, total, wasserstein2
from potstill.families.lvae import LVAE
from potstill.noise import Noise

RULES = (Match("z*", wasserstein2, 0.1, "mean"), Match("out"))
Case = tuple[tuple[int, int, int], int, int, int, int]
CASES: dict[str, Case] = {
    "digits 8x8, width 32 to 8, batch 128": ((1, 8, 8), 3, 32, 8, 128),
    "CIFAR 32x32, width 64 to 16, batch 32": ((3, 32, 32), 5, 64, 16, 32),
}


def _nets(case: Case) -> tuple[LVAE, LVAE]:
    image, levels, wide, narrow, _ = case
    torch.manual_seed(0)
    teacher = LVAE(image, wide, levels).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    return teacher, LVAE(image, narrow, levels).to(memory_format=torch.channels_last)


def framework(case: Case) -> Callable[[int], None]:
    """An update as ``potstill.distill.loop.fit`` makes it, without logging and saving."""
    teacher, student = _nets(case)
    model, engine, batch = student.model(), accelerator("cpu"), case[-1]
    parameters = train_only(student, reached(model, "generate"))
    optimizer = torch.optim.AdamW(parameters, 1e-3, foreach=True)
    objective, optimizer = engine.prepare(Distiller(teacher.model(), model, RULES), optimizer)

    def step(i: int) -> None:
        with engine.autocast():
            loss = total(objective(Noise((0,)).fold(i).at(range(batch)), None, batch)).mean()
        engine.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def by_hand(case: Case, own_noise: bool) -> Callable[[int], None]:
    """The same update without programs, traces, rules or accelerate."""
    teacher, student = _nets(case)
    batch, levels, latent, channels = case[-1], teacher.levels, teacher.latent, case[0][0]
    shapes = [(batch, latent, *size) for size in teacher.sizes]
    train_only(student, reached(student.model(), "generate"))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 1e-3, foreach=True)

    def forward(net: LVAE, noise: list[Tensor]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        z, priors = noise[-1], []
        for level in range(levels - 1, 0, -1):
            mean, raw = getattr(net, f"d{level}")(z).chunk(2, 1)
            std = F.softplus(raw) / 0.6931 + 1e-6
            priors.append((mean, std))
            z = mean + std * noise[level - 1]
        return priors, net.d0(z)[:, :channels]

    def step(i: int) -> None:
        if own_noise:
            noise = [torch.randn(shape) for shape in shapes]
        else:
            source = Noise((0,)).fold(i).at(range(batch))
            noise = [source.normal(f"z{level + 1}", shape) for level, shape in enumerate(shapes)]
        with torch.no_grad():
            priors, target = forward(teacher, noise)
        found, output = forward(student, noise)
        loss = ((target - output) ** 2 / (2 * student.std**2)).flatten(1).sum(1)
        for (mean, std), (mean_student, std_student) in zip(priors, found, strict=True):
            loss = loss + 0.1 * ((mean - mean_student) ** 2 + (std - std_student) ** 2).flatten(1).mean(1)
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    rows = []
    for name, case in CASES.items():
        steps = {"framework": framework(case), "by_hand": by_hand(case, own_noise=False), "by_hand_randn": by_hand(case, own_noise=True)}
        seconds: dict[str, list[float]] = {key: [] for key in steps}
        for i in range(repeats + 10):
            for key, step in steps.items():
                start = time.perf_counter()
                step(i)
                if i >= 10:
                    seconds[key].append(time.perf_counter() - start)
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        ours = seconds["framework"]
        ratios = {key: statistics.median(a / b for a, b in zip(ours, values, strict=True)) for key, values in seconds.items()}
        rows.append(
            {
                "case": name,
                "repeats": repeats,
                **{f"{key}_ms": round(1e3 * value, 3) for key, value in medians.items()},
                "step_ratio": ratios["by_hand"],
                "step_ratio_randn": ratios["by_hand_randn"],
            }
        )
        print(
            f"{name}: framework {1e3 * medians['framework']:.2f} ms, "
            f"by hand {1e3 * medians['by_hand']:.2f} ms (ratio {ratios['by_hand']:.3f}), "
            f"by hand with torch.randn {1e3 * medians['by_hand_randn']:.2f} ms (ratio {ratios['by_hand_randn']:.3f})"
        )
    figures = {"step_ratio": max(r["step_ratio"] for r in rows), "step_ratio_randn": max(r["step_ratio_randn"] for r in rows)}
    print(f"wrote {write('step_cost', figures, rows)}")


if __name__ == "__main__":
    main()
