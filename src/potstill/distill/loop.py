"""The one training loop: any objective, resumable to the bit from any update, on whatever accelerate runs it on."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, distributed, nn

from ..config import Training
from ..divergence import total
from ..errors import BadInput, Failed
from ..noise import Noise
from ..state import States, write_text
from .rows import synchronized

Objective = Callable[..., dict[str, Tensor]]

# A loss has run away when it is above its smallest value by so many times its largest size in so many first updates.
FAR, FIRST_UPDATES = 10.0, 100


class Stopped(KeyboardInterrupt):
    """A training was asked to stop, and has saved its state, unless its loss was far from where it should be."""


@dataclass(frozen=True)
class Batch:
    """What an objective is given at one update.

    Args:
        noise: addressed by this process's rows of the batch.
        index: positions in the data set, ``(batch,)`` int64 on the CPU, or ``None`` where there is no data.
        n: samples of this process.
        step: updates done before this one.
    """

    noise: Noise
    index: Tensor | None
    n: int
    step: int


@dataclass(frozen=True)
class HeldOut:
    """What a phase is measured on beside its batches, so that it can end when that gets no better.

    Args:
        measure: the loss of the network as it is now, on samples that are always the same; the same in every process.
        every: updates between two measurements.
        patience: measurements on end without a smaller one, after which the phase ends.
    """

    measure: Callable[[], float]
    every: int
    patience: int


@dataclass(frozen=True)
class Phase:
    """One stretch of updates.

    Args:
        name: in the log and the state.
        objective: a module whose forward gives losses by name, each ``(batch,)``. Buffers of its own are kept in the state.
        loss: calls the (wrapped) objective on a batch.
        parameters: what learns.
        training: updates, batch size, learning rate and so on.
        images: size of the data set that indices are drawn from; 0 where batches are of noise alone.
        split: whether several processes share out the rows of a batch; where a loss is of the batch as a whole, each takes all of them.
        held_out: what may end the phase before all its updates are made. The network then ends with the weights that were best there.
    """

    name: str
    objective: nn.Module
    loss: Callable[[nn.Module, Batch], dict[str, Tensor]]
    parameters: list[nn.Parameter]
    training: Training
    images: int = 0
    split: bool = True
    held_out: HeldOut | None = None


def learning_rate(training: Training, step: int) -> float:
    """Learning rate of the update after ``step`` updates: a linear rise, then a cosine to 0 or a constant."""
    rise = min(1.0, (step + 1) / training.warmup) if training.warmup else 1.0
    fall = 0.5 * (1 + math.cos(math.pi * step / training.steps)) if training.decay == "cosine" else 1.0
    return training.lr * rise * fall


class Shuffled:
    """Batches of indices, epoch by epoch in an order drawn from the noise: a function of the step, so it needs no state."""

    def __init__(self, images: int, batch: int, noise: Noise):
        self._images, self._batch, self._noise = images, min(batch, images), noise
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __call__(self, step: int) -> Tensor:
        """Indices of the batch after ``step`` updates, ``(batch,)`` int64; a last part smaller than a batch is left out."""
        per_epoch = self._images // self._batch
        epoch, position = divmod(step, per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._noise.fold("epoch", epoch).permutation("order", self._images)
        return self._order[position * self._batch : (position + 1) * self._batch]


class Average:
    """Exponential moving average of a network's weights and BatchNorm statistics."""

    def __init__(self, net: nn.Module, decay: float):
        self._net, self._decay = net, decay
        self.shadow = {name: t.detach().clone() for name, t in net.state_dict().items()}

    def load(self, shadow: dict[str, Tensor]) -> None:
        """Go on from a saved average, on the device where the network is."""
        for name, t in shadow.items():
            self.shadow[name].copy_(t)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the network, faster at first, when the average would still remember the random start."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, t in self._net.state_dict().items():
            if t.is_floating_point():
                self.shadow[name].lerp_(t, 1 - decay)
            else:
                self.shadow[name].copy_(t)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within the block the network has the average's values."""
        own = {name: t.clone() for name, t in self._net.state_dict().items()}
        self._net.load_state_dict(self.shadow)
        try:
            yield
        finally:
            self._net.load_state_dict(own)


class Best:
    """The weights that a held-out loss was smallest with, and how many later measurements found none smaller."""

    def __init__(self) -> None:
        self.least, self.since = math.inf, 0
        self.weights: dict[str, Tensor] = {}

    def add(self, value: float, net: nn.Module) -> None:
        """Take note of a measurement of the network as it is now."""
        self.since += 1
        if value < self.least:
            self.least, self.since = value, 0
            self.weights = {name: t.detach().clone() for name, t in net.state_dict().items()}

    def load(self, tree: dict[str, Any]) -> None:
        """Go on from what :meth:`tree` gave."""
        self.least, self.since, self.weights = tree["least"], tree["since"], tree["weights"]

    def tree(self) -> dict[str, Any]:
        """As it is saved."""
        return {"least": self.least, "since": self.since, "weights": self.weights}


class Log:
    """``log.jsonl``: one JSON object a line. What a killed run wrote past its last state is cut off when it resumes."""

    def __init__(self, path: Path, *told: Callable[[dict[str, Any]], None] | None):
        self._path, self._told = path, [tell for tell in told if tell is not None]

    def rewind(self, done: dict[str, int]) -> list[dict[str, Any]]:
        """Keep the lines of phases in ``done`` up to their step, and of no other phase; returns what they say."""
        kept, entries = [], []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    if entry["step"] <= done.get(entry["phase"], 0):
                        kept.append(line)
                        entries.append(entry)
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
        write_text(self._path, "".join(line + "\n" for line in kept))
        return entries

    def last_steps(self) -> dict[str, int]:
        """The last step of each phase of which it tells."""
        entries = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return {entry["phase"]: entry["step"] for entry in entries}

    def write(self, entry: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for tell in self._told:
            tell(entry)


class Watch:
    """Tells a loss that has run away from one that is only noisy.

    It compares with the training's own beginning, so that it needs no scale: a loss is far when it is above its smallest value by more
    than ``FAR`` times its largest size in the first ``FIRST_UPDATES`` updates. One that is far for ``patience`` updates on end, without
    a single line of the log between, has diverged. That is late, on purpose: a student that starts with its teacher's weights has its
    smallest loss first, and an adversary's loss may rise for long.
    """

    def __init__(self, patience: int | None):
        self._patience, self._size = patience, 0.0
        self._least: dict[str, float] = {}
        self._lowest = math.inf
        self._since: int | None = None

    def add(self, step: int, parts: dict[str, float]) -> None:
        """Take note of the loss after ``step`` updates, by terms."""
        value = sum(parts.values())
        if step <= FIRST_UPDATES or not self._least:
            self._size = max(self._size, abs(value))
        self._lowest = min(self._lowest, value)
        self._least |= {name: min(part, self._least.get(name, part)) for name, part in parts.items()}
        if value <= self._lowest + FAR * self._size:
            self._since = None
        elif self._since is None:
            self._since = step

    @property
    def calm(self) -> bool:
        """Whether the loss is where a state is worth saving."""
        return self._patience is None or self._since is None

    def verdict(self, step: int, parts: dict[str, float]) -> str | None:
        """What is to be said of a loss that has diverged."""
        if self._patience is None or self._since is None or step - self._since < self._patience:
            return None
        name = max(parts, key=lambda k: parts[k] - self._least[k])
        return (
            f"the loss of {name} has diverged: {parts[name]:.4g} at update {step}, after {self._least[name]:.4g}; the whole has been more "
            f"than {FAR:g} times its first size above its smallest value for {step - self._since} updates"
        )


def accelerator(device: str = "auto") -> Accelerator:
    """An accelerator for this process; on a machine without CUDA it says so, or CPU ranks would each believe they are alone."""
    # Buffers need no copying from the first process: BatchNorm's come from the rows of all.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    return Accelerator(cpu=device == "cpu" or (device == "auto" and not torch.cuda.is_available()), kwargs_handlers=[ddp])


def backward(engine: Accelerator, loss: torch.Tensor) -> None:
    """As ``engine.backward``, which looks at every call for packages that may be installed: a third of a millisecond each time."""
    if engine.scaler is None:
        loss.backward()
    else:
        engine.backward(loss)


def descend(engine: Accelerator, optimizer: AcceleratedOptimizer) -> None:
    """As the optimizer's ``step`` and ``zero_grad``, which look for packages too, and at signatures: a quarter of a millisecond."""
    own = optimizer if engine.scaler is not None else optimizer.optimizer
    own.step()
    own.zero_grad(set_to_none=True)


def rows_of(batch: int, process: int, processes: int) -> range:
    """This process's rows of a batch: together the processes hold each row once."""
    return range(batch * process // processes, batch * (process + 1) // processes)


class Agreed:
    """A ``keep_going`` that has one answer in all processes, which ask each other about once in ``seconds``.

    Each call is an update, and they all make the same calls, so it is enough that they agree on the next call that asks.
    """

    def __init__(self, keep_going: Callable[[], bool], seconds: float = 1.0):
        self._keep_going, self._seconds = keep_going, seconds
        self._calls, self._asks, self._since = 0, 1, time.monotonic()

    def __call__(self) -> bool:
        self._calls += 1
        if self._calls < self._asks:
            return True
        now = time.monotonic()
        # On the CPU: the processes wait for each other, but none for its device.
        told = torch.tensor([not self._keep_going(), (now - self._since) / self._calls], dtype=torch.float64)
        distributed.all_reduce(told, distributed.ReduceOp.MAX)
        stop, pace = told.tolist()
        # No more than twice as far as the last time: the pace of the first calls tells little.
        self._calls, self._since, self._asks = 0, now, max(1, min(2 * self._asks, int(self._seconds / max(pace, 1e-9))))
        return not stop


def fit(
    net: nn.Module,
    phases: Callable[[str], Phase],
    names: list[str],
    noise: Noise,
    *,
    engine: Accelerator,
    states: States,
    log: Log,
    save_seconds: float = 30.0,
    log_steps: int = 25,
    patience: int | None = None,
    keep_going: Callable[[], bool] = lambda: True,
) -> None:
    """Train ``net`` through its phases, in place. A run that was killed goes on from its last state to the same bits.

    Args:
        net: what is saved and averaged.
        phases: makes a phase by name, when it begins; it decides what learns.
        names: the phases, in order.
        noise: folded by phase and step.
        engine: where it runs.
        states: where the state is kept.
        log: where losses go.
        save_seconds: least time between two saved states.
        log_steps: updates between two lines of the log.
        patience: updates on end that a loss may be far above its smallest (see :class:`Watch`), or ``None`` for any number.
        keep_going: asked before every update; when it says no, the state is saved and :class:`Stopped` raised.

    Raises:
        BadInput: a loss or a weight is not finite, or a loss has diverged; it names the term or the weight, and the update. Nothing is
            saved then, nor while a loss is far above its smallest: the last state is from before.
    """
    training = fitting(
        net,
        phases,
        names,
        noise,
        engine=engine,
        states=states,
        log=log,
        save_seconds=save_seconds,
        log_steps=log_steps,
        patience=patience,
        keep_going=keep_going,
    )
    for _ in training:
        pass


def fitting(
    net: nn.Module,
    phases: Callable[[str], Phase],
    names: list[str],
    noise: Noise,
    *,
    engine: Accelerator,
    states: States,
    log: Log,
    save_seconds: float = 30.0,
    log_steps: int = 25,
    patience: int | None = None,
    keep_going: Callable[[], bool] = lambda: True,
) -> Iterator[tuple[int, int]]:
    """:func:`fit` for who asks for one update after another: before each it tells where it is, the phase's position and the step."""
    saved, _ = states.load()
    first, done = 0, dict[str, int]()
    if saved:
        net.load_state_dict(saved["net"])
        first = names.index(saved["phase"])
        done = {**dict.fromkeys(names[:first], 1 << 60), names[first]: saved["step"]}
    several = engine.num_processes > 1
    if several:
        _check_same(states, torch.tensor([first, saved["step"] if saved else 0]))
        keep_going = Agreed(keep_going)
    before = log.rewind(done) if engine.is_main_process else []
    with synchronized(net) if several else nullcontext():
        for position in range(first, len(names)):
            resumed = saved if saved and position == first else None
            watch = Watch(patience)
            for line in before if resumed else ():
                if line["phase"] == names[position] and (parts := _parts_of(line)):
                    watch.add(line["step"], parts)
            phase = phases(names[position])
            for step in _fit_phase(net, phase, noise, resumed, engine, states, log, save_seconds, log_steps, keep_going, position, watch):
                yield position, step


def _parts_of(line: dict[str, Any]) -> dict[str, float]:
    """The terms of a loss that a line of the log tells."""
    found = {k.removeprefix("loss/"): v for k, v in line.items() if k.startswith("loss/")}
    return {k: v for k, v in found.items() if isinstance(v, float) and math.isfinite(v)}


def abreast(trainings: Iterable[Iterator[tuple[int, int]]]) -> None:
    """Go through several :func:`fitting` at once, always on with the one that is furthest behind, so that all are at the same batch.

    Raises:
        Stopped: one was asked to stop; by then all were, each as it says.
    """
    at = dict.fromkeys(trainings, (-1, 0))
    stopped = False
    while at:
        behind = min(at, key=at.__getitem__)
        try:
            at[behind] = next(behind)
        except StopIteration:
            del at[behind]
        except Stopped:
            stopped = True
            del at[behind]
    if stopped:
        raise Stopped


def _check_same(states: States, begins: Tensor) -> None:
    every = [torch.empty_like(begins) for _ in range(distributed.get_world_size())]
    distributed.all_gather(every, begins)
    if any(not torch.equal(other, begins) for other in every):
        raise Failed(f"{states.folder}: not every process sees the same state there; the folder of a run must be shared by all machines")


def _fit_phase(
    net: nn.Module,
    phase: Phase,
    noise: Noise,
    saved: dict[str, Any] | None,
    engine: Accelerator,
    states: States,
    log: Log,
    save_seconds: float,
    log_steps: int,
    keep_going: Callable[[], bool],
    position: int,
    watch: Watch,
) -> Iterator[int]:
    training = phase.training
    optimizer = torch.optim.AdamW(
        phase.parameters, training.lr, (training.beta1, training.beta2), weight_decay=training.weight_decay, foreach=True
    )
    average = Average(net, training.ema) if training.ema else None
    held_out, best = phase.held_out, Best()
    start = 0
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
        if average:
            average.load(saved["average"])
        if "best" in saved:
            best.load(saved["best"])
        for name, buffer in phase.objective.named_buffers(recurse=False):
            if name in saved.get("objective", {}):
                buffer.copy_(saved["objective"][name])
        start = saved["step"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # its successor is new in torch 2.13
        objective, optimizer = engine.prepare(phase.objective, optimizer)
    source = noise.fold(phase.name)
    batch = min(training.batch, phase.images) if phase.images else training.batch
    processes = engine.num_processes
    if batch < processes:
        raise BadInput(f"{phase.name}: a batch of {batch} cannot be split among {processes} processes; start fewer, or raise batch")
    rows = rows_of(batch, engine.process_index, processes) if phase.split else range(batch)
    share = len(rows) * processes / batch if phase.split else 1.0  # of the mean over the batch, where DDP takes that over the processes
    shuffled = Shuffled(phase.images, batch, source) if phase.images else None

    remedy = f"lower lr (now {training.lr:g}), set clip, or look at the teacher's weights"

    def save(step: int) -> None:
        bad = [name for name, t in net.state_dict().items() if not t.isfinite().all()]
        if bad:
            raise BadInput(f"{phase.name}: {bad[0]} is not finite after {step} updates; {remedy}")
        if engine.is_main_process:
            plain = optimizer.optimizer.state_dict()
            tree = {"phase": phase.name, "step": step, "net": dict(net.state_dict()), "optimizer": plain}
            own = {name: buffer for name, buffer in phase.objective.named_buffers(recurse=False) if name in phase.objective.state_dict()}
            tree |= {"average": average.shadow} if average else {}
            tree |= {"best": best.tree()} if best.weights else {}
            states.save((position << 24) + step, tree | ({"objective": own} if own else {}))

    since_log, since_save, logged = time.perf_counter(), time.monotonic(), start
    for step in range(start, training.steps):
        yield step
        if not keep_going():
            if watch.calm:
                save(step)
            engine.wait_for_everyone()  # or the processes that have nothing to write would end, and with them the one that has
            raise Stopped
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        index = shuffled(step)[rows.start : rows.stop] if shuffled else None
        with engine.autocast():
            losses = phase.loss(objective, Batch(source.fold(step).at(rows), index, len(rows), step))
            loss = total(losses).mean()
        backward(engine, loss if processes == 1 else loss * share)
        if training.clip is not None:
            engine.clip_grad_norm_(phase.parameters, training.clip)
        descend(engine, optimizer)
        done = step + 1
        if average:
            average.update(done)
        measured = None
        if held_out and (done % held_out.every == 0 or done == training.steps):
            with average.shown() if average else nullcontext():
                measured = held_out.measure()
                if not math.isfinite(measured):
                    raise BadInput(f"{phase.name}: the loss on held-out samples is not finite at update {done}; {remedy}")
                best.add(measured, net)
        last = done == training.steps or (held_out is not None and best.since >= held_out.patience)
        if done % log_steps == 0 or last or step == start or measured is not None:
            # The loss is read, and so the device waited for, only when a line is written; weights that it spoiled are never saved.
            means = torch.stack([value.detach().float().mean() for value in losses.values()])
            parts = dict(zip(losses, (means if processes == 1 else engine.reduce(means * share, "mean")).tolist(), strict=True))
            value = sum(parts.values())
            if not math.isfinite(value):
                bad = [name for name, part in parts.items() if not math.isfinite(part)]
                raise BadInput(f"{phase.name}: the loss of {', '.join(bad)} is not finite at update {done}; {remedy}")
            now = time.perf_counter()
            speed = (done - logged) * batch / max(now - since_log, 1e-9)
            since_log, logged = now, done
            if engine.is_main_process:
                entry = {
                    "phase": phase.name,
                    "step": done,
                    "steps": training.steps,
                    "loss": value,
                    **{f"loss/{k}": v for k, v in parts.items()},
                    **({} if measured is None else {"held_out": measured}),
                }
                log.write(entry | {"lr": learning_rate(training, step), "images_per_second": round(speed, 1)})
                watch.add(done, parts)
                if said := watch.verdict(done, parts):
                    raise BadInput(f"{phase.name}: {said}; {remedy}, or go on with compute.divergence_patience=null")
            if last:
                break
            if watch.calm and time.monotonic() - since_save >= save_seconds:
                save(done)
                since_save = time.monotonic()
    if best.weights:
        net.load_state_dict(best.weights)
    elif average:
        net.load_state_dict(average.shadow)
    save(training.steps)  # of a phase that ended before, too: when the run goes on, nothing of it is left to do


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Torch's threads on the CPU within the block; ``None`` leaves them."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
