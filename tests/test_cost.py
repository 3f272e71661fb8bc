"""Time, parameters and size: the clock is replaced, so that no test depends on the machine."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from potstill.evaluate.cost import Latency, file_mib, latency, needed, parameters

cost = importlib.import_module("potstill.evaluate.cost")


class Clock:
    """A clock that stands still but for the work done: call number i takes `durations[i]` seconds, the last one ever after."""

    def __init__(self, durations):
        self.durations = durations
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def work(self, batch):
        self.now += self.durations[min(len(self.calls), len(self.durations) - 1)]
        self.calls.append(batch)


@pytest.fixture
def clock(monkeypatch):
    def start(*durations):
        made = Clock(durations)
        monkeypatch.setattr(cost, "perf_counter", made)
        return made

    return start


def test_quantiles_in_milliseconds_without_the_warmup(clock):
    made = clock(9.0, 9.0, 0.001, 0.002, 0.003, 0.004, 0.005)
    found = latency(made.work, 64, device="cpu", repeats=5, warmup=2, min_seconds=0)
    assert made.calls == [64] * 7
    assert (found.median_ms, found.iqr_ms, found.p95_ms) == pytest.approx((3.0, 2.0, 4.8))
    assert (found.repeats, found.batch, found.threads) == (5, 64, torch.get_num_threads())


def test_short_calls_are_repeated_until_they_add_up(clock):
    made = clock(0.25)
    assert latency(made.work, 1, device="cpu", repeats=3, warmup=0, min_seconds=2.0).repeats == 8
    assert latency(made.work, 1, device="cpu", repeats=10, warmup=0, min_seconds=2.0).repeats == 10


def test_the_defaults_are_ten_calls_of_warmup_fifty_that_count_and_a_fifth_of_a_second(clock):
    made = clock(1.0)
    assert latency(made.work, 1, device="cpu").repeats == 50
    assert len(made.calls) == 60
    assert latency(clock(2**-10).work, 1, device="cpu").repeats == 205  # 204.8 calls of 2**-10 s are 0.2 s


def test_throughput_is_images_per_second(clock):
    assert latency(clock(0.5).work, 64, device="cpu", repeats=1, warmup=0).throughput == pytest.approx(128.0)


def test_a_cuda_device_is_waited_for_before_each_reading_of_the_clock(monkeypatch):
    events = []
    monkeypatch.setattr(cost, "perf_counter", lambda: events.append("clock") or float(len(events)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(str(device)))
    latency(lambda batch: events.append("call"), 1, device="cuda:1", repeats=2, warmup=1, min_seconds=0)
    assert events == ["call"] + ["cuda:1", "clock", "call", "cuda:1", "clock"] * 2


def test_another_accelerator_is_waited_for_too_and_the_cpu_is_not(monkeypatch, clock):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: waited.append(device.type))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append("cuda"))
    made = clock(1.0)
    latency(made.work, 1, device=torch.device("cpu"), repeats=1, warmup=0)
    assert waited == []
    latency(made.work, 1, device="mps", repeats=1, warmup=0)
    assert waited == ["mps", "mps"]


def test_calls_run_without_gradients_and_gradients_are_on_again(clock):
    made = clock(1.0)
    enabled = []

    def call(batch):
        enabled.append(torch.is_grad_enabled())
        made.work(batch)

    latency(call, 1, device="cpu", repeats=1, warmup=1)
    assert enabled == [False, False]
    assert torch.is_grad_enabled()


def test_a_real_call_takes_time():
    found = latency(lambda batch: torch.ones(batch, 8).sum(), 2, device="cpu", repeats=3, warmup=1, min_seconds=0.001)
    assert isinstance(found, Latency)
    assert 0 < found.median_ms <= found.p95_ms
    assert found.iqr_ms >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "latency: found batch 0, expected 1 or more"),
        ({"repeats": 0}, "latency: found repeats 0, expected 1 or more"),
        ({"warmup": -1}, "latency: found warmup -1, expected 0 or more"),
        ({"min_seconds": float("nan")}, "latency: found min_seconds nan, expected 0 or more"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        latency(lambda batch: None, **{"batch": 1, "device": "cpu", **arguments})


def test_parameters_count_frozen_ones_and_shared_ones_once_and_no_buffers():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    assert parameters(net) == 12 + 6 + 12
    net[2].weight = net[0].weight
    net[0].bias.requires_grad_(False)
    assert parameters(net) == 12 + 6 + 3


def test_file_size_in_mib(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(3 * 2**19))
    assert file_mib(path) == file_mib(str(path)) == 1.5
    with pytest.raises(FileNotFoundError, match="absent"):
        file_mib(tmp_path / "absent")
    with pytest.raises(ValueError, match="is not a file; expected the file that holds the weights"):
        file_mib(tmp_path)


# ------------------------------------------------------------------ memory


def test_what_is_needed_is_what_is_kept_or_what_the_largest_layer_passes_on():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.zeros(2, 4)
    with needed() as held, torch.no_grad():
        net(x)
        assert held() == 4 * 2 * (8 + 8)  # of the ReLU; of the whole it is less
    with needed() as held:
        kept = net(x)
        assert held() == 4 * 2 * (4 + 8 + 8)  # the input, and what each ReLU gives; a weight is kept anyhow
    with needed() as held:
        pass
    assert held() == 0
    assert kept.requires_grad
