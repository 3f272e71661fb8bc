"""What a model costs to use: time per call, parameters, size on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..model import keeping
from ..state import plain_tensors


@dataclass(frozen=True)
class Latency:
    """How long one call takes. Times are in milliseconds of wall clock, over `repeats` calls of `batch` images each.

    `iqr_ms` is the distance between the quartiles, `p95_ms` the 95th percentile, `threads` the CPU threads that torch could use.
    """

    median_ms: float
    iqr_ms: float
    p95_ms: float
    repeats: int
    batch: int
    threads: int

    @property
    def throughput(self) -> float:
        """Images per second at the median."""
        return 1000 * self.batch / self.median_ms


def latency(
    call: Callable[[int], object],
    batch: int,
    *,
    device: str | torch.device,
    repeats: int = 50,
    warmup: int = 10,
    min_seconds: float = 0.2,
) -> Latency:
    """The time of `call(batch)`, which makes `batch` images on `device`, measured one call at a time without gradients.

    After `warmup` calls that do not count, there are `repeats` calls, and more until they add up to `min_seconds`, so that a call of
    microseconds is not judged by a few. A device other than the CPU runs behind the program: it is waited for before each reading of the
    clock, so a figure includes the launch of the work and its end.
    Raises ValueError where batch or repeats is below 1, or warmup or min_seconds is below 0; and what `call` raises.
    """
    for name, value, least in (("batch", batch, 1), ("repeats", repeats, 1), ("warmup", warmup, 0), ("min_seconds", min_seconds, 0)):
        if not value >= least:
            raise ValueError(f"latency: found {name} {value}, expected {least} or more")
    where = torch.device(device)
    seconds: list[float] = []
    total = 0.0
    with torch.no_grad():
        for _ in range(warmup):
            call(batch)
        while len(seconds) < repeats or total < min_seconds:
            _wait_for(where)
            start = perf_counter()
            call(batch)
            _wait_for(where)
            seconds.append(perf_counter() - start)
            total += seconds[-1]
    first, median, third, late = (1000 * float(value) for value in numpy.percentile(seconds, [25, 50, 75, 95]))
    return Latency(median, third - first, late, len(seconds), batch, int(torch.get_num_threads()))


def parameters(net: nn.Module) -> int:
    """The number of parameters of `net`: trainable and frozen, each shared one once, buffers not."""
    return sum(parameter.numel() for parameter in net.parameters())


def size_mib(net: nn.Module) -> float:
    """The size in MiB that `net` has as a safetensors file: parameters and buffers, each shared one as often as it has names."""
    from safetensors.torch import save

    return len(save(plain_tensors(net.state_dict()))) / 2**20


def file_mib(path: str | Path) -> float:
    """The size of the file at `path` in MiB (2**20 bytes).

    Raises FileNotFoundError where there is none, and ValueError where it is a folder, whose own size says nothing.
    """
    file = Path(path)
    size = file.stat().st_size
    if not file.is_file():
        raise ValueError(f"file_mib: found {file}, which is not a file; expected the file that holds the weights")
    return size / 2**20


@contextmanager
def needed() -> Iterator[Callable[[], int]]:
    """Gives the bytes that the calls of networks in the block have needed so far: what is kept for their gradients, parameters aside, or
    where there are none the input and output of the largest layer. What a layer needs within itself is not seen."""
    largest = 0

    def listen(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal largest
        largest = max(largest, _bytes(inputs) + _bytes(output))

    handle = register_module_forward_hook(listen)
    try:
        with keeping() as kept:
            yield lambda: max(largest, sum(kept.values()))
    finally:
        handle.remove()


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(slope: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> int:
    return int(sdpa_backward_flop_count(slope.shape, query.shape, key.shape, value.shape))


# Torch's own list has fused attention on a GPU alone.
_FORMULAS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Operations(TorchDispatchMode):
    """Within its block the floating-point operations of matrix products, convolutions and attention are counted; a product and a sum are
    two. It is torch's ``FlopCounterMode`` without the count by modules, which does not allow gradients of gradients."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count what it takes, if it is one of those."""
        given = kwargs or {}
        out = func(*args, **given)
        if formula := _FORMULAS.get(func._overloadpacket):
            self.count += formula(*args, **given, out_val=out)
        return out


def _bytes(found: object) -> int:
    if isinstance(found, Tensor):
        return int(found.nbytes)
    return sum(map(_bytes, found)) if isinstance(found, (tuple, list)) else 0


def _wait_for(device: torch.device) -> None:
    """Return when all work queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)
