"""Several runs in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import BadInput
from .report.tables import arms_of
from .state import read_json

# What the references of runs must have in common: in words, and what those are that do not say.
_SHARED: dict[str, tuple[str, Any]] = {
    "kind": ("reference", "data"),
    "data": ("data", None),
    "n": ("number of held-out images", None),
    "features": ("features", None),
    "images": ("teacher's images", None),
}


def merged(folders: Sequence[Path]) -> dict[str, Any]:
    """The metrics of several runs as if they were of one, each arm named with its run.

    Raises:
        BadInput: a folder has no metrics, is named twice, or measures against other images or by other features than the first: its
            figures then say nothing about those of the others.
    """
    names = _distinguished(folders)
    whole: dict[str, Any] = {"arms": {}, "arms_info": {}}
    for folder, name in zip(folders, names, strict=True):
        if not (folder / "metrics.json").exists():
            raise BadInput(f"{folder}: nothing measured; run the evaluate stage there first")
        metrics = read_json(folder / "metrics.json")
        reference = metrics.get("reference") if isinstance(metrics, dict) else None
        if not isinstance(reference, dict):
            raise BadInput(f"{folder / 'metrics.json'}: not what potstill wrote there")
        first = whole.setdefault("reference", reference)
        for key, (what, usual) in _SHARED.items():
            if (own := reference.get(key, usual)) != (others := first.get(key, usual)):
                raise BadInput(
                    f"{folder}: its {what}, {own}, differ from {others} of {folders[0]}; figures measured against "
                    "other images or features cannot be compared"
                )
        for arm in arms_of(metrics):
            key = f"{name}/{arm.key}"
            whole["arms"][key] = metrics["arms"][arm.key]
            whole["arms_info"][key] = {"label": f"{name}: {arm.label}", "data": "none" if arm.kind == "free" else "real"}
    return whole


def _distinguished(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all of them apart."""
    parts = [folder.absolute().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise BadInput("compare: a folder is named twice")
    length = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(p[-length:]) for p in parts]
