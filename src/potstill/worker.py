"""One of several processes that train a run's students side by side: ``python -m potstill.worker RUN IDENTITY PARENT [MODULE ...]``.

Every worker goes through the same list and takes the jobs that nobody holds a lock on, so that workers need no queue,
and one that is killed leaves its job to the next. The last line that it prints says what went wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import BadInput, Failed

INTERRUPTED = 130


@contextmanager
def stoppable(patient: bool = False) -> Iterator[Callable[[], bool]]:
    """A ``keep_going`` that says no after Ctrl-C or SIGTERM, so that a training ends between two updates and saves its state.

    A second signal acts as it did before the block; where patient, it does nothing, as for a process whose launcher passes on
    what the terminal has sent already, and will kill it when it takes too long.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield lambda: True
        return
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(*_: object) -> None:
        stopped.set()
        if not patient:
            restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):  # what nohup has set stays
            before[number] = handler
            signal.signal(number, stop)
    try:
        yield lambda: not stopped.is_set()
    finally:
        restore()


def work(run: Path, identity: str, allowed: tuple[str, ...], keep_going: Callable[[], bool]) -> None:
    """Train every student of the run that is not done and that no other worker is at."""
    import torch

    from . import build, config
    from .distill.loop import accelerator
    from .jobs import Workshop, make_students

    recipe = config.read(run / "recipe.yaml")
    build.allow(allowed)
    if recipe.compute.threads:
        torch.set_num_threads(recipe.compute.threads)
    shop = Workshop(recipe, run, allowed)
    make_students(shop, identity, accelerator(str(shop.device)), keep_going=keep_going)


def verdict(output: str) -> str | None:
    """What a worker that ended with an error said of it, from all that it printed."""
    last = (output.splitlines() or [""])[-1]
    try:
        return str(json.loads(last)["potstill"])
    except (ValueError, KeyError, TypeError):
        return None


def main() -> int:
    """Exit codes as of the command line."""
    run, identity, parent, *allowed = sys.argv[1:]
    try:
        # Patient, for a terminal sends Ctrl-C to the workers too, and then the parent asks them again, maybe in the middle of a save.
        with stoppable(patient=True) as keep_going:
            work(Path(run), identity, tuple(allowed), lambda: keep_going() and os.getppid() == int(parent))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BadInput as error:
        print(json.dumps({"potstill": str(error)}), flush=True)
        return 2
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(json.dumps({"potstill": text}), flush=True)
        return 1
    except Failed as error:
        print(json.dumps({"potstill": str(error)}), flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
