"""What the terminal shows while something runs: bars on a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .errors import shown

LINE_SECONDS = 20.0


class Board:
    """Progress of several tasks.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False):
        self.console = Console(file=sys.stderr, highlight=False, quiet=quiet)
        self._bars = self.console.is_terminal and not quiet
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
        self._begun: dict[str, tuple[float, int]] = {}
        self._line = time.monotonic()

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """One line, whatever the bars do."""
        self.console.print(shown(text), markup=False, highlight=False, soft_wrap=True)

    def update(self, label: str, done: int, total: int, detail: str = "") -> None:
        """Set how far the task of that label is; the first call starts it, and the one that reaches the total removes it."""
        now = time.monotonic()
        begun, first = self._begun.setdefault(label, (now, done))
        if self._bars:
            if label not in self._tasks:
                self._tasks[label] = self._progress.add_task(label, total=total, detail=detail)
            self._progress.update(self._tasks[label], completed=done, total=total, detail=detail, visible=done < total)
        elif now - self._line >= LINE_SECONDS:
            self._line = now
            left = (now - begun) * (total - done) / max(done - first, 1)
            self.say(f"  {label}: {done}/{total} {detail}, about {left:.0f} s left")

    def training(self, label: str, entry: dict[str, Any]) -> None:
        """Show a line of a training's log."""
        detail = f"loss {entry['loss']:.4g}, {entry['images_per_second']:.0f} images/s"
        self.update(f"{label} {entry['phase']}", entry["step"], entry["steps"], detail)


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
