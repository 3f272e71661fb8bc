"""What does the framework cost? One update of ``Distiller`` as the training loop makes it, against the same update written by hand.

The two take turns in one process, so a machine whose speed drifts slows both. The hand-written loop calls the networks' layers
directly, writes the losses out, and uses torch's optimizer; it is given the same noise, or draws its own by ``torch.randn``.
The floor is what no loop can do without: the teacher's pass, the student's both ways and the optimizer, of noise that is there
already and of a loss that costs nothing. Peak memory is that of a process of its own.

    python benchmarks/step_cost.py [--repeats 200]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common import write
from potstill.distill.distiller import Distiller, reached, train_only
from potstill.distill.loop import accelerator, backward, descend
from potstill.divergence import Match, total, wasserstein2
from potstill.families.lvae import LVAE
from potstill.noise import FixedNoise, Noise
from potstill.trace import run

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
        backward(engine, loss)
        descend(engine, optimizer)

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


def floor(case: Case) -> Callable[[int], None]:
    """The networks and the optimizer alone."""
    teacher, student = _nets(case)
    noise = FixedNoise({f"z{i + 1}": torch.randn(case[-1], teacher.latent, *size) for i, size in enumerate(teacher.sizes)})
    train_only(student, reached(student.model(), "generate"))
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], 1e-3, foreach=True)
    alone = torch.ones(())

    def step(i: int) -> None:
        with torch.no_grad():
            run(teacher.generate, noise=noise, n=case[-1]).out.dist.mean  # noqa: B018
        output = run(student.generate, noise=noise, n=case[-1]).out.dist.mean
        output.backward(alone.expand_as(output))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def convolution_peak() -> float:
    """Operations per second of this machine's fastest convolution among some of 3x3 pixels, forward."""
    best = 0.0
    for channels in (32, 64, 128, 256):
        net = torch.nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False).to(memory_format=torch.channels_last)
        x = torch.randn(32, channels, 32, 32).to(memory_format=torch.channels_last)
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            net(x)
            seconds.append(time.perf_counter() - start)
        best = max(best, 2 * 9 * channels**2 * x[:, 0].numel() / min(seconds))
    return best


def operations(step: Callable[[int], None]) -> int:
    """Floating point operations of the matrix products and convolutions of one update."""
    with FlopCounterMode(display=False) as counter:
        step(0)
    return int(counter.get_total_flops())


STEPS: dict[str, Callable[[Case], Callable[[int], None]]] = {
    "framework": framework,
    "by_hand": lambda case: by_hand(case, own_noise=False),
    "by_hand_randn": lambda case: by_hand(case, own_noise=True),
    "floor": floor,
}


def peak(name: str, which: str) -> float:
    """MiB that a process holds at most while it makes some updates, above what it held before them."""
    command = [sys.executable, __file__, "--child", name, which]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def child(name: str, which: str) -> None:
    """Print the peak of one loop."""
    torch.nn.Conv2d(1, 1, 3)(torch.randn(1, 1, 8, 8)).sum().backward()  # what libraries load is in memory in either case
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    step = STEPS[which](CASES[name])
    for i in range(5):
        step(i)
    lines = Path("/proc/self/status").read_text().splitlines()
    print((int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 - before) / 2**20)


def noise_over_randn(n: int, width: int = 16, repeats: int = 5) -> float:
    """How many times longer addressed noise of ``n`` rows takes than a stream of as many numbers."""
    taken: dict[str, list[float]] = {"addressed": [], "stream": []}
    inner = max(1, 10**5 // n)
    for i in range(repeats):
        noise = Noise((i,))
        for how, draw in (("addressed", lambda noise=noise: noise.normal("z", (n, width))), ("stream", lambda: torch.randn(n, width))):
            start = time.perf_counter()
            for _ in range(inner):
                draw()
            taken[how].append(time.perf_counter() - start)
    return statistics.median(taken["addressed"]) / statistics.median(taken["stream"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--child", nargs=2, metavar=("CASE", "LOOP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    repeats = arguments.repeats
    torch.set_num_threads(1)
    if arguments.child:
        child(*arguments.child)
        return
    best = convolution_peak()
    rows = []
    for name, case in CASES.items():
        steps = {key: make(case) for key, make in STEPS.items()}
        work = operations(steps["framework"])
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
                "floor_fraction": 1 / ratios["floor"],
                "memory_ratio": peak(name, "framework") / peak(name, "by_hand"),
                "of_convolution_peak": work / medians["framework"] / best,
            }
        )
        print(
            f"{name}: framework {1e3 * medians['framework']:.2f} ms, "
            f"by hand {1e3 * medians['by_hand']:.2f} ms (ratio {ratios['by_hand']:.3f}), "
            f"by hand with torch.randn {1e3 * medians['by_hand_randn']:.2f} ms (ratio {ratios['by_hand_randn']:.3f}), "
            f"floor {1e3 * medians['floor']:.2f} ms ({1 / ratios['floor']:.3f}), memory {rows[-1]['memory_ratio']:.3f}, "
            f"{rows[-1]['of_convolution_peak']:.0%} of the best convolution's speed"
        )
    figures = {key: max(r[key] for r in rows) for key in ("step_ratio", "step_ratio_randn", "memory_ratio")}
    figures |= {"floor_fraction": min(r["floor_fraction"] for r in rows), "convolution_peak_gflops": best / 1e9}
    figures |= {f"noise_over_randn_{n}_rows": noise_over_randn(n) for n in (128, 10**6)}
    print(f"wrote {write('step_cost', figures, rows)}")


if __name__ == "__main__":
    main()
