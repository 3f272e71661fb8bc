"""What every benchmark writes: ``benchmarks/results/NAME.json``, with the machine and the versions behind its figures."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch

from potstill.pipeline import describe
from potstill.state import write_json

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The checkout's commit, with a mark where files differ from it."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def gain_in_sds(off: dict[str, float], on: dict[str, float]) -> float:
    """By how many pooled standard deviations one figure's mean lies above another's; each has ``mean`` and ``sd`` over the seeds."""
    spread = max(((off["sd"] ** 2 + on["sd"] ** 2) / 2) ** 0.5, 1e-12)
    return (on["mean"] - off["mean"]) / spread


def write(name: str, figures: dict[str, float], rows: list[dict[str, Any]]) -> Path:
    """Write the results of one benchmark and return the file."""
    machine = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    path = RESULTS / f"{name}.json"
    content = {
        "format": "potstill-benchmark/1",
        "commit": commit(),
        "machine": {k: machine[k] for k in ("platform", "cpu", "cores", "device")} | {"threads": torch.get_num_threads()},
        "versions": machine["versions"] | {"potstill": machine["potstill"], "python": machine["python"]},
        "figures": figures,
        "rows": rows,
    }
    write_json(path, content)
    return path
