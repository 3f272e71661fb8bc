"""Several processes as one run, as ``torchrun -m potstill`` starts them: who does what, waiting for each other, one end for all.

They talk through torch's key-value store and ask it again and again, so that a process that waits, for minutes or hours, still
hears a signal, and that another has failed.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .errors import Failed

if TYPE_CHECKING:
    from torch.distributed import Store

T = TypeVar("T")
Ending = tuple[int, str | None]  # an exit code and what to say of it

_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun, and every launcher like it, tells a process
_FAILED, _TOLD, _LEFT = "failed", "told", "left"
_GONE = "is gone; run the same command again to go on"
WATCH_SECONDS = 0.5
# Until a process that another's failure has not ended by itself is ended: it may sit in a collective that nobody will complete.
GRACE_SECONDS = 5.0
# Until the others take it that the first process cannot say what went wrong.
SAY_SECONDS = 8.0


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; by default the only one. All of them make the same calls in the same order.

    Args:
        index: from 0; the first process decides, writes what is written once, and alone prints.
        count: of processes.
        store: through which they talk.
    """

    index: int = 0
    count: int = 1
    store: Store | None = None
    _turn: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False, compare=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that decides."""
        return self.index == 0

    def wait(self) -> None:
        """Until every process is here.

        Raises:
            Failed: one of them has failed.
        """
        if self.store is not None:
            store, key = self.store, f"wait/{next(self._turn)}"
            store.add(key, 1)
            self._until(lambda: store.add(key, 0) >= self.count)

    def share(self, make: Callable[[], T]) -> T:
        """What ``make`` gives in the first process, where alone it is called: anything that JSON can hold.

        Raises:
            Failed: a process has failed.
        """
        if self.store is None:
            return make()
        store, key = self.store, f"share/{next(self._turn)}"
        if self.first:
            value = make()
            store.set(key, json.dumps(value))
            return value
        self._until(lambda: store.check([key]))
        shared: T = json.loads(store.get(key))
        return shared

    def each(self, items: Iterator[T]) -> Iterator[T]:
        """The items of the first process, where alone they are asked for."""
        while (item := self.share(lambda: next(items, None))) is not None:
            yield item

    def failure(self) -> Ending | None:
        """How the process that failed first has ended, if any has."""
        if self.store is None:
            return None
        try:
            found = json.loads(self.store.get(_FAILED)) if self.store.check([_FAILED]) else None
        except RuntimeError:  # torch's errors of the network are
            return 1, f"the first process of the run {_GONE}"
        return found and (found[0], found[1])

    def _until(self, ready: Callable[[], bool]) -> None:
        pause = 0.001
        while not ready():
            if self.failure():
                raise Failed("another process of the run has failed")
            time.sleep(pause)
            pause = min(2 * pause, 0.1)


ALONE = Ranks()


def launched() -> bool:
    """Whether this process is one of several of a ``torchrun``."""
    return all(os.environ.get(name) for name in _LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


def together(work: Callable[[Ranks], Ending], say: Callable[[str], None]) -> int:
    """Do the work as one of the processes that ``torchrun`` started; when it fails in one, it ends in all.

    The first process says what went wrong where it went wrong first, and every process has the exit code of that.

    Args:
        work: gives its exit code and what to say.
        say: prints a message for the user.
    """
    ranks = _join()
    ended = threading.Event()
    threading.Thread(target=_watch, args=(ranks, ended, say), daemon=True).start()
    with contextlib.ExitStack() as quiet:
        if not ranks.first:
            nowhere = quiet.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
            quiet.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            code, text = work(ranks)
        except SystemExit as stop:  # argparse has printed its own message
            code, text = (stop.code if isinstance(stop.code, int) else 1), None
        except BaseException as error:
            lost = isinstance(error, RuntimeError) and "by peer" in str(error)  # as gloo and NCCL say it, in many words
            code, text = 1, f"another process of the run {_GONE}" if lost else traceback.format_exc()
    ended.set()
    for number in (signal.SIGINT, signal.SIGTERM):  # the launcher sends them when the first of us has gone
        signal.signal(number, signal.SIG_IGN)
    if code:
        _leave(ranks, (code, text), say)
    try:
        _bye(ranks)
    except Failed:
        _leave(ranks, (1, None), say)
    return 0


def _join() -> Ranks:
    index, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // beside)))  # before torch is imported
    import torch
    from torch import distributed

    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", index)) % gpus)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(*address, is_master=False, wait_for_workers=False)
    return Ranks(index, count, distributed.PrefixStore("potstill", store))


def _watch(ranks: Ranks, ended: threading.Event, say: Callable[[str], None]) -> None:
    """End this process when another has failed: first as a signal would."""
    while not ended.wait(WATCH_SECONDS):
        if ranks.failure():
            _thread.interrupt_main(signal.SIGTERM)
            if not ended.wait(GRACE_SECONDS):
                _leave(ranks, (1, None), say)
            return


def _leave(ranks: Ranks, ending: Ending, say: Callable[[str], None]) -> None:
    """End this process, which has failed, or another has. Does not return: what torch still waits for would hold up an exit."""
    assert ranks.store is not None
    code, text = ending
    try:
        own = json.dumps(ending)
        mine = ranks.store.compare_set(_FAILED, "", own).decode() == own
        code, text = ranks.failure() or ending
        if ranks.first:
            if text is not None:
                say(text)
            ranks.store.set(_TOLD, "1")
        else:
            until = time.monotonic() + SAY_SECONDS
            while not ranks.store.check([_TOLD]) and time.monotonic() < until:
                time.sleep(0.05)
            if mine and text is not None and not ranks.store.check([_TOLD]):
                say(text)
    except RuntimeError:  # the store is gone, with the launcher or with the first process, which has had its say
        if ranks.first and text is not None:
            say(text)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _bye(ranks: Ranks) -> None:
    """Leave when all is done; the first process last, for the store may be its own."""
    from torch import distributed

    assert ranks.store is not None
    ranks.wait()
    ranks.store.add(_LEFT, 1)
    until = time.monotonic() + GRACE_SECONDS
    while ranks.first and ranks.store.add(_LEFT, 0) < ranks.count and time.monotonic() < until:
        time.sleep(0.01)
    distributed.destroy_process_group()
