"""Trackers of other projects, such as TensorBoard, through accelerate: they are told every line of a training's log, each once."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, BrokenFile, Failed
from ..state import fingerprint, read_json, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

_PLACE = ("phase", "step", "steps")  # of a line in its training; the rest are figures


def check(names: Sequence[str]) -> None:
    """See that the packages of those trackers are there.

    Raises:
        BadInput: one is not; it says how to install it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise BadInput(f"compute.trackers: {name} is not installed; pip install {name}, or potstill[{name}]")


@contextlib.contextmanager
def tracked(
    engine: Accelerator, names: Sequence[str], folder: Path, project: str, title: str, counts: Mapping[str, int]
) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """Gives what is to be told each line of a training's log; ``None`` without trackers, and in all processes but the first.

    A step counts from the beginning of the first phase. How far the trackers have been told is kept beside their files, so that a
    training that goes on tells them nothing twice.

    Args:
        engine: of the training.
        names: of the trackers.
        folder: where they keep files, and how far they have been told.
        project: what the trainings belong to.
        title: of this one.
        counts: updates of each phase, in order.

    Raises:
        Failed: a tracker does not start, or does not take what it is told.
    """
    if not names or not engine.is_main_process:
        yield None
        return
    sent, begins = folder / title / "sent.json", dict(zip(counts, accumulate(counts.values(), initial=0), strict=False))
    last = _last(sent)

    def tell(entry: dict[str, Any]) -> None:
        nonlocal last
        step = begins[entry["phase"]] + entry["step"]
        if step <= last:
            return
        try:
            for tracker in started:
                tracker.log({f"{entry['phase']}/{k}": v for k, v in entry.items() if k not in _PLACE}, step=step)
        except Exception as error:
            raise _failed("take a line of the log", error) from None
        last = step
        write_json(sent, {"step": step})

    started = _start(engine, names, folder, project, title)
    try:
        yield tell
    finally:
        for tracker in started:
            with contextlib.suppress(Exception):  # what it has been told is told; the training is not to fail for its farewell
                tracker.finish()


def _last(sent: Path) -> int:
    try:
        return int(read_json(sent)["step"]) if sent.exists() else 0
    except (BrokenFile, KeyError, TypeError, ValueError):  # it is told again, which is better than not at all
        return 0


def _start(engine: Accelerator, names: Sequence[str], folder: Path, project: str, title: str) -> list[Any]:
    from accelerate.tracking import filter_trackers

    os.environ.setdefault("WANDB_SILENT", "true")  # the last line of a worker is its own
    # A training that goes on adds to its own record, and those of students that are trained together to one each.
    record = {"name": title, "id": fingerprint([str(folder.resolve()), title])[:16], "resume": "allow", "dir": str(folder)}
    record["reinit"] = "create_new"
    started: list[Any] = []
    engine.project_configuration.logging_dir = str(folder)
    for name in dict.fromkeys(names):
        try:
            engine.trackers, engine.log_with = [], filter_trackers([name], str(folder))
            if not engine.log_with:
                raise ImportError(f"accelerate finds no {name} that it can use")
            # One knows projects, the other folders by the name of what is in them.
            engine.init_trackers(project if name == "wandb" else title, init_kwargs={"wandb": record} if name == "wandb" else {})
        except Exception as error:
            raise _failed(f"start {name}", error) from None
        started += engine.trackers
        engine.trackers = []  # an engine has those of one training, and may be of several at once
    return started


def _failed(what: str, error: Exception) -> Failed:
    said = (str(error).splitlines() or [""])[0]
    return Failed(f"compute.trackers: could not {what} ({type(error).__name__}: {said}); compute.trackers=[] goes on without")
