"""kill -9 at random moments of whole runs, by one process and by two: gone on with, each must end in the bytes of a run left alone.

A run is killed after a time drawn evenly from what a whole one takes, gone on with by the same command, killed again, and so on until
it ends; then its weights, its surrogate and its figures are compared with those of a run that nobody killed, and another one begins.
Half of the kills are of each kind, which go on side by side.

    python benchmarks/chaos.py [--kills 100] [--seed 0] [--runs FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from common import write
from potstill.inventory import damage

STEPS = {"steps": 30, "batch": 8, "ema": 0.9}
RECIPE = {
    "name": "chaos",
    "seeds": [0, 1],
    "data": {"kind": "digits", "train": 200},
    "train": {"model": {"kind": "lvae", "image": [1, 8, 8], "width": 4, "levels": 2, "latent": 2, "std": 0.1}} | STEPS,
    "teacher": {"kind": "trained"},
    "calibrate": STEPS | {"steps": 10},
    "student": {"width": 2},
    "surrogate": {"n": 600, "shard": 20, "batch": 10},
    "distill": {"generate": STEPS, "infer": STEPS, "scratch": STEPS},
    "arms": ["data_free", "with_data", "scratch", {"kind": "data_free", "name": "calibrated", "start": "calibrated"}],
    "evaluate": {"n": 64, "latency_repeats": 3},
    "report": {"images": 4},
    "compute": {"device": "cpu", "threads": 1, "workers": 1, "save_seconds": 0, "log_steps": 5},
}
SINGLE = [sys.executable, "-m", "potstill"]
COMMANDS = {"one": SINGLE, "two": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *SINGLE[1:]]}


def start(how: str, recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    """The run as a process of its own."""
    command = [*COMMANDS[how], "run", str(recipe), "--out", str(out), "--quiet"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """Kill it with all of its children; whether it was still alive."""
    lived = process.poll() is None
    try:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs([member for member in family if member.pid != process.pid], timeout=60)
    process.wait()
    return lived


def at_work(out: Path) -> str:
    """The stage that was begun last."""
    begun = [(p.stat().st_mtime, p.parent.name) for p in out.glob("*/begun.json") if not (p.parent / "done.json").exists()]
    return max(begun)[1] if begun else "between stages"


def bytes_of(out: Path) -> dict[str, Any]:
    """What must be the same: weights and surrogate to the byte, and every figure that is no time."""
    found: dict[str, Any] = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors") if "state" not in p.parts}
    found |= {str(p.relative_to(out)): p.read_bytes() for p in (out / "surrogate").iterdir()}
    arms = json.loads((out / "metrics.json").read_text())["arms"]
    timed = ("latency", "throughput")
    found["metrics"] = {arm: {k: v for k, v in figures.items() if not k.startswith(timed)} for arm, figures in arms.items()}
    return found


def survive(how: str, goal: int, seed: int, runs: Path, recipe: Path) -> dict[str, Any]:
    """Kill runs of one kind until there were so many kills, and say what became of them."""
    rng = random.Random(f"{seed}/{how}")
    whole = runs / f"{how}-whole"
    began = time.perf_counter()
    if start(how, recipe, whole).wait():
        raise SystemExit(f"the run left alone failed: {whole}")
    longest = time.perf_counter() - began
    expected, kills, stages, ended, alike, sound = bytes_of(whole), 0, Counter[str](), 0, 0, 0
    while kills < goal or ended == 0:
        out, here = runs / f"{how}-{ended}", 0
        while True:
            process = start(how, recipe, out)
            # Past its goal, or where chance would never let it end, a run is left alone.
            if kills < goal and here < 10:
                try:
                    process.wait(timeout=rng.uniform(0, longest))
                except subprocess.TimeoutExpired:
                    stage = at_work(out)
                    if kill(process):
                        kills, here = kills + 1, here + 1
                        stages[stage] += 1
                        continue
            if process.wait() == 0:
                break
            raise SystemExit(f"{out}: a run that was gone on with failed")
        ended += 1
        alike += bytes_of(out) == expected
        sound += not damage(out)
        print(f"{how}: {kills} kills, {ended} runs ended, {alike} identical, {sound} sound", file=sys.stderr, flush=True)
        shutil.rmtree(out)
    return {"processes": how, "kills": kills, "runs": ended, "identical": alike, "sound": sound, "stages": dict(stages)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, help="where the runs go; by default a temporary folder that is removed")
    arguments = parser.parse_args()
    runs = arguments.runs or Path(tempfile.mkdtemp(prefix="chaos-"))
    runs.mkdir(parents=True, exist_ok=True)
    recipe = runs / "recipe.yaml"
    recipe.write_text(json.dumps(RECIPE), encoding="utf-8")
    with ThreadPoolExecutor() as both:
        goal = arguments.kills // len(COMMANDS)
        rows = list(both.map(lambda how: survive(how, goal, arguments.seed, runs, recipe), COMMANDS))
    if arguments.runs is None:
        shutil.rmtree(runs)
    figures = {"kills": sum(r["kills"] for r in rows), "identical": sum(r["identical"] for r in rows) / sum(r["runs"] for r in rows)}
    print(f"wrote {write('chaos', figures, rows)}")


if __name__ == "__main__":
    main()
