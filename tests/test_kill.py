"""kill -9 at any moment of any stage: run again, and the result is the same to the bit.

``POTSTILL_KILLS`` sets how many kills there are.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from potstill import cli
from runs import environment, results

KILLS = int(os.environ.get("POTSTILL_KILLS", "8"))
PATIENCE = 120

STEPS = {"steps": 8, "batch": 8}
CHANGES = {
    "train": {
        "model": {"kind": "lvae", "image": [1, 8, 8], "width": 4, "levels": 2, "latent": 2, "std": 0.1},
        "steps": 24,
        "batch": 8,
        "ema": 0.9,
    },
    "teacher": {"kind": "trained"},
    "surrogate": {"n": 300, "shard": 15, "batch": 5},
    "distill": {"generate": STEPS | {"ema": 0.9}, "infer": STEPS},
    "arms": ["data_free", "with_data"],
    "seeds": [0, 1],
    "evaluate": {"n": 24, "latency_repeats": 3},
    "compute": {"device": "cpu", "threads": 1, "workers": 2, "save_seconds": 0, "log_steps": 1},
}

# (stage, whole group or the parent alone, what to wait for once the stage has begun, longest delay in seconds after it)
MOMENTS = [
    ("train", "group", "state/train/step-*", 0.5),
    ("distill", "parent", "", 3.0),  # the workers are still importing torch
    ("synthesize", "group", "surrogate/shard-*", 0.3),
    ("distill", "group", "state/students/*/*/step-*", 0.5),
    ("evaluate", "group", "", 1.0),
    ("distill", "parent", "state/students/*/*/step-*", 0.5),
    ("train", "group", "", 0.5),
    ("synthesize", "group", "", 0.5),
]
ORDER = ["train", "synthesize", "distill", "evaluate"]


def alive(group):
    """Processes of a group that are more than an entry in a table."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def files(folder, pattern):
    return {(p, p.stat().st_mtime_ns) for p in folder.glob(pattern)} if pattern else set()


def interrupted(recipe, out, stage, whom, pattern, delay):
    """Start the run, kill it in that stage, and say whether it was alive until then; and its process group."""
    command = [sys.executable, "-m", "potstill", "run", str(recipe), "--out", str(out)]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        assert process.stderr is not None
        said = b""
        for line in process.stderr:  # a line for each stage as it begins
            said += line
            if line.startswith(stage.encode()) and b"done already" not in line:
                break
        else:
            pytest.fail(f"{stage} never began:\n{said.decode()}")
        before, until = files(out, pattern), time.monotonic() + PATIENCE
        while pattern and process.poll() is None and files(out, pattern) <= before and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(delay)
        lived = process.poll() is None
        if whom == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    return lived, process.pid


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_the_same(place):
    recipe = place.write(**CHANGES)
    whole = place.folder / "whole"
    assert cli.main(["run", str(recipe), "--out", str(whole), "--quiet", "compute.workers=1", "evaluate=null", "report=null"]) == 0
    rng = random.Random(0)
    moments = [MOMENTS[i % len(MOMENTS)] for i in range(KILLS)]
    killed, groups = [], []
    for stage in ORDER:
        for _, whom, pattern, longest in (moment for moment in moments if moment[0] == stage):
            if (place.out / stage / "done.json").exists():
                continue  # the one before came so late that the stage was done
            lived, group = interrupted(recipe, place.out, stage, whom, pattern, rng.uniform(0, longest))
            killed += [(stage, whom)] if lived else []
            groups.append(group)
        # Now to its end. Workers that the last kill has left may still be at it, and are waited for.
        assert cli.main([stage, str(recipe), "--out", str(place.out), "--quiet", "compute.workers=1"]) == 0
    assert results(place.out) == results(whole)
    assert len(json.loads((place.out / "metrics.json").read_text())["arms"]) == 3
    assert os.listdir(place.out / "state") == ["run.lock"]
    assert list(place.out.rglob(".*")) == []
    until = time.monotonic() + PATIENCE
    while any(alive(group) for group in groups) and time.monotonic() < until:
        time.sleep(0.1)
    assert [alive(group) for group in groups if alive(group)] == []
    assert len(killed) >= KILLS / 2, killed
