"""Small runs for the tests of the command line and the pipeline: a recipe of seconds, its teacher, its data."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import torch

from potstill.cli import main
from potstill.distill import loop
from potstill.families.lvae import LVAE

STEPS = {"steps": 3, "batch": 8}
RECIPE = {
    "name": "tiny",
    "seeds": [0],
    "data": {"kind": "npz", "path": "data.npz", "test_fraction": 0.4},
    "teacher": {"kind": "pretrained", "path": "./teacher"},
    "student": {"width": 2},
    "surrogate": {"n": 16, "shard": 8},
    "distill": {"generate": STEPS, "infer": STEPS, "scratch": STEPS},
    "arms": ["data_free"],
    "evaluate": {"n": 16, "latency_repeats": 3},
    "report": {"images": 2},
    "compute": {"device": "cpu", "threads": 1, "workers": 1, "save_seconds": 0, "log_steps": 1},
}


def teacher(seed=0):
    """A small ladder VAE as the zoo has it."""
    torch.manual_seed(seed)
    return LVAE((1, 8, 8), 4, 2, 2, 0.1).eval()


def digits_like(n=60, shape=(1, 8, 8), seed=0):
    """Images that are no noise: a bright block somewhere, and where it is as a label."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (n, *shape)).astype(np.uint8)
    labels = rng.integers(0, 4, n)
    half = shape[1] // 2
    for image, label in zip(images, labels, strict=True):
        image[:, half * (label // 2) :, half * (label % 2) :][:, :half, :half] += 150
    return images, labels


class Place:
    """A folder with a recipe, a teacher and data, where ``potstill`` is run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.recipe = copy.deepcopy(RECIPE)
        images, labels = digits_like()
        np.savez(folder / "data.npz", images=images, labels=labels)
        teacher().save_pretrained(folder / "teacher")

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def write(self, **sections) -> Path:
        """The recipe with other sections, as a file."""
        path = self.folder / "recipe.yaml"
        path.write_text(json.dumps(self.recipe | sections))  # which is YAML too
        return path

    def run(self, command, *arguments, **sections) -> int:
        """Exit code of a command in this process."""
        return main([command, str(self.write(**sections)), "--out", str(self.out), "--quiet", *arguments])


def cut_at(monkeypatch, *updates):
    """Stop every training at those updates, counted over all of them."""
    whole, count = loop.total, [0]

    def cut(losses):
        count[0] += 1
        if count[0] in updates:
            raise KeyboardInterrupt
        return whole(losses)

    monkeypatch.setattr(loop, "total", cut)


def snapshot(folder):
    """Bytes and time of change of every file."""
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def results(folder):
    """What a run must make to the bit: weights and surrogate."""
    found = [*folder.rglob("*.safetensors"), *folder.glob("surrogate/*")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(found) if "state" not in p.relative_to(folder).parts}


def environment():
    """For a process of its own: not one of several of a ``torchrun``, whatever this one is."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"OMP_NUM_THREADS": "1"}


def interrupting(monkeypatch):
    """Make training end as by Ctrl-C, once ``left[0]`` updates have begun; returns ``left``, for the test to set."""
    from potstill.distill import loop

    real, left = loop.learning_rate, [0]

    def counted(*arguments):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(loop, "learning_rate", counted)
    return left
