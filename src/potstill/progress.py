"""What is shown while something runs: bars on a terminal, a line a minute elsewhere, JSON for a program, nothing when quiet."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .errors import redacted, shown

LINE_SECONDS = 60.0
PACE_SECONDS = 60.0  # of the past that a pace is measured over: what was done before a run went on is no measure
MEMORY_SECONDS = 1.0  # between two looks at the memory


def memory() -> int:
    """Bytes of memory that this process and those it has started have at this moment."""
    found = 0
    with suppress(psutil.Error):
        own = psutil.Process()
        for process in (own, *own.children(recursive=True)):
            with suppress(psutil.Error):
                found += process.memory_info().rss
    return found


def span(seconds: float) -> str:
    """A stretch of time for a reader: seconds, minutes, hours or days."""
    for size, unit, least in ((86400.0, "days", 2.0), (3600.0, "h", 2.0), (60.0, "min", 2.0)):
        if seconds >= least * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def gib(size: float) -> str:
    """Bytes for a reader."""
    return f"{size / 2**30:.1f} GiB"


class _Pace:
    """How fast a count grows."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def __call__(self, now: float, done: int) -> float:
        """Per second, over the last ``PACE_SECONDS``; 0 while nothing is known."""
        self._seen.append((now, done))
        while len(self._seen) > 2 and (now - self._seen[1][0] >= PACE_SECONDS or self._seen[0][1] > done):
            self._seen.popleft()
        since, first = self._seen[0]
        return (done - first) / (now - since) if now > since else 0.0


class Board:
    """Progress of several tasks.

    Args:
        quiet: show nothing.
        log_json: everything as a JSON object on a line of stderr: ``time`` and ``event``, which is ``say`` with a ``text``, or
            ``progress`` with ``task``, ``done``, ``total``, ``images_per_second`` and ``seconds_left`` where they are known,
            ``memory_bytes``, and of a training ``loss``.
    """

    def __init__(self, quiet: bool = False, log_json: bool = False):
        self._json = log_json and not quiet
        self.console = Console(file=sys.stderr, highlight=False, quiet=quiet)
        self._bars = self.console.is_terminal and not quiet and not log_json
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self._bars,
        )
        self._tasks: dict[str, TaskID] = {}
        self._paces: dict[str, _Pace] = {}
        self._line = time.monotonic()
        self._memory = (-MEMORY_SECONDS, 0)

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line, whatever the bars do."""
        if self._json:
            tell("say", text=shown(text.strip()))
        else:
            self.console.print(shown(text), markup=False, highlight=False, soft_wrap=True)

    def update(self, label: str, done: int, total: int, detail: str = "", **known: float) -> None:
        """Set how far the task of that label is; the first call starts it, and the one that reaches the total removes it.

        Args:
            label: of the task.
            done: so far.
            total: to be done.
            detail: what is counted, or what else there is to say.
            known: figures of a training: ``loss``, ``images_per_second``.
        """
        now = time.monotonic()
        pace = self._paces.setdefault(label, _Pace())(now, done)
        if detail == "images" and pace:
            known = {"images_per_second": pace} | known
        left = (total - done) / pace if pace else None
        if self._json:
            rounded = {k: float(f"{v:.6g}") for k, v in known.items()} | ({} if left is None else {"seconds_left": round(left, 1)})
            tell("progress", task=label, done=done, total=total, memory_bytes=self._held(now), **rounded)
            return
        if not self._bars and now - self._line < LINE_SECONDS:
            return
        parts = [detail] if detail else []
        parts += [f"loss {known['loss']:.4g}"] if "loss" in known else []
        parts += [f"{known['images_per_second']:.3g} images/s"] if "images_per_second" in known else []
        if self._bars:
            shown = ", ".join([*parts, gib(self._held(now))])
            if label not in self._tasks:
                self._tasks[label] = self._progress.add_task(label, total=total, detail=shown)
            self._progress.update(self._tasks[label], completed=done, total=total, detail=shown, visible=done < total)
            return
        self._line = now
        parts += [] if left is None else [f"about {span(left)} left"]
        self.say(f"  {label}: {done}/{total} {', '.join([*parts, gib(self._held(now))])}")

    def training(self, label: str, entry: dict[str, Any]) -> None:
        """Show a line of a training's log."""
        known = {"loss": entry["loss"], "images_per_second": entry["images_per_second"]}
        self.update(f"{label} {entry['phase']}", entry["step"], entry["steps"], **known)

    def _held(self, now: float) -> int:
        if now - self._memory[0] >= MEMORY_SECONDS:
            self._memory = now, memory()
        return self._memory[1]


class Together:
    """Shows several trainings as one, and each of them, so that what is left is of all. One alone is shown as it is.

    Args:
        board: to show them on.
        phases: each training's phases by its name, with the updates of each, in order.
    """

    label = "all students"

    def __init__(self, board: Board, phases: Mapping[str, Mapping[str, int]]):
        self._board, self._phases = board, phases
        self._done = dict.fromkeys(phases, 0)
        self._total = sum(sum(steps.values()) for steps in phases.values())

    def training(self, name: str, entry: dict[str, Any]) -> None:
        """Show a line of the log of one of them."""
        if len(self._phases) == 1:
            self._board.training(name, entry)
            return
        phases = self._phases[name]
        before = [*phases][: [*phases].index(entry["phase"])]
        self._done[name] = sum(phases[phase] for phase in before) + entry["step"]
        at = f"updates; {name} {entry['phase']} {entry['step']}/{entry['steps']}"
        self._board.update(self.label, sum(self._done.values()), self._total, at, loss=entry["loss"])
        self._board.training(name, entry)

    def end(self) -> None:
        """They are all done, though some may have ended early."""
        if len(self._phases) > 1:
            self._board.update(self.label, self._total, self._total)


def tell(event: str, **content: Any) -> None:
    """One event as a JSON object on a line of stderr, without secrets."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
    line |= {key: redacted(value) if isinstance(value, str) else value for key, value in content.items()}
    print(json.dumps(line), file=sys.stderr, flush=True)


class LogTail:
    """Reads what other processes add to their logs."""

    def __init__(self, path: Path):
        self._path, self._at = path, 0

    def last(self) -> dict[str, Any] | None:
        """The newest whole entry that was not there at the call before."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                self._at = min(self._at, size)  # a resumed training cuts its log
                file.seek(self._at)
                data = file.read()
        except OSError:
            return None
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in reversed(whole.splitlines()):
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict):
                return entry
        return None
