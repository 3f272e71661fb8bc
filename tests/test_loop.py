"""The training loop: its schedule, its batches, its log, and that a run cut anywhere ends in the same bits."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from potstill.config import Training
from potstill.distill.distiller import train_only
from potstill.distill.loop import Average, Log, Phase, Shuffled, Watch, accelerator, fit, learning_rate, rows_of, threads
from potstill.errors import BadInput, BrokenFile
from potstill.noise import Noise
from potstill.state import States, read_tensors

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(scope="module")
def engine():
    made = accelerator("cpu")
    p = nn.Parameter(torch.zeros(1))
    torch.optim.AdamW([p])  # its first use imports for seconds
    return made


# ------------------------------------------------------------------ the schedule


@pytest.mark.parametrize("decay", ["constant", "cosine"])
@pytest.mark.parametrize("warmup", [0, 4, 2.5, 30])
def test_learning_rate_in_closed_form(warmup, decay):
    training = Training(steps=20, lr=0.3, warmup=warmup, decay=decay)
    for step in range(20):
        rise = 1 if warmup == 0 or step + 1 >= warmup else (step + 1) / warmup
        fall = math.cos(math.pi * step / 40) ** 2 if decay == "cosine" else 1
        assert learning_rate(training, step) == pytest.approx(0.3 * rise * fall)
    assert learning_rate(training, 0) > 0


# ------------------------------------------------------------------ batches


@given(images=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=50)  # a busy machine is not an error
def test_an_epoch_holds_an_image_once(images, batch, seed):
    shuffled = Shuffled(images, batch, Noise((seed,)))
    size = min(batch, images)
    per_epoch = images // size
    for epoch in range(3):
        parts = [shuffled(epoch * per_epoch + i) for i in range(per_epoch)]
        assert all(part.shape == (size,) and part.dtype == torch.int64 for part in parts)
        together = torch.cat(parts).tolist()
        assert len(set(together)) == len(together) == per_epoch * size
        assert set(together) <= set(range(images))
        if images % size == 0:
            assert set(together) == set(range(images))


@given(steps=st.lists(st.integers(0, 60), min_size=1, max_size=8))
@settings(deadline=None, max_examples=30)
def test_batches_are_a_function_of_the_step(steps):
    used = Shuffled(10, 3, Noise((1,)))
    for step in steps:
        assert torch.equal(used(step), Shuffled(10, 3, Noise((1,)))(step))


def test_epochs_and_seeds_differ_in_order():
    shuffled = Shuffled(100, 100, Noise((1,)))
    orders = [shuffled(0), shuffled(1), Shuffled(100, 100, Noise((2,)))(0), torch.arange(100)]
    assert len({tuple(order.tolist()) for order in orders}) == 4


@given(batch=st.integers(0, 50), processes=st.integers(1, 9))
def test_processes_share_a_batch_out(batch, processes):
    parts = [rows_of(batch, i, processes) for i in range(processes)]
    assert [row for part in parts for row in part] == list(range(batch))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# ------------------------------------------------------------------ the average


def test_average_in_closed_form():
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    weights = [torch.tensor([[float(k**2)]]) for k in range(30)]
    net[0].weight.data = weights[0]
    average = Average(net, 0.8)
    expected = 0.0
    for step in range(1, 30):
        net[0].weight.data = weights[step]
        net[1].running_mean.fill_(step)
        net[1].num_batches_tracked.fill_(step)
        average.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights[step].item()
        assert average.shadow["0.weight"].item() == pytest.approx(expected, rel=1e-5)
        assert average.shadow["1.num_batches_tracked"].item() == step
    assert 20 < average.shadow["1.running_mean"].item() < 29
    assert net[0].weight.item() == 29**2
    assert not average.shadow["0.weight"].requires_grad


def test_an_average_goes_on_from_a_saved_one():
    net = nn.Linear(2, 1)
    one, other = Average(net, 0.9), Average(nn.Linear(2, 1), 0.9)
    saved = {name: t + 1 for name, t in one.shadow.items()}
    other.load(saved)
    for name, t in saved.items():
        assert torch.equal(other.shadow[name], t)
        assert other.shadow[name] is not t


# ------------------------------------------------------------------ the log


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_is_written_line_by_line_and_told(tmp_path):
    told = []
    log = Log(tmp_path / "deep" / "log.jsonl", told.append)
    log.rewind({})
    entries = [{"phase": "a", "step": i, "loss": 0.5} for i in range(3)]
    for i, entry in enumerate(entries):
        log.write(entry)
        assert lines_of(tmp_path / "deep" / "log.jsonl") == entries[: i + 1]
    assert told == entries


def test_rewinding_cuts_what_is_past_the_state_and_what_is_broken(tmp_path):
    path = tmp_path / "log.jsonl"
    kept = [{"phase": "first", "step": 900}, {"phase": "second", "step": 1}, {"phase": "second", "step": 3}]
    text = [
        json.dumps(kept[0]),
        "not json",
        json.dumps(kept[1]),
        "5",
        '{"phase": "second"}',
        '{"step": 1}',
        '{"phase": "second", "step": "1"}',
        "[]",
        "",
        json.dumps(kept[2]),
        json.dumps({"phase": "second", "step": 4}),
        json.dumps({"phase": "third", "step": 1}),
        '{"phase": "second", "st',
    ]
    path.write_bytes("\n".join(text).encode() + b"\xff\xfe")
    log = Log(path)
    log.rewind({"first": 1 << 60, "second": 3})
    assert lines_of(path) == kept
    log.write({"phase": "second", "step": 4})
    assert lines_of(path)[-1] == {"phase": "second", "step": 4}
    log.rewind({})
    assert path.read_text() == ""


# ------------------------------------------------------------------ fit


class Matched(nn.Module):
    """Losses of a network against a linear teacher, on noise or on images."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        y = self.net(x)
        return {"bias": (y.sum(1) - 1) ** 2, "out": ((y - x[:, :2].sin()) ** 2).sum(1)}


def born(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


class Crash(Exception):
    """The process dies."""


IMAGES = Noise((77,)).normal("images", (10, 3))
NAMES = ["noise", "images"]


def phases(net, ema, crash_at=(None, None), seen=None):
    """Two phases: all of the network on noise, then its last layer on images."""

    def phase(name):
        def loss(module, batch):
            if (name, batch.step) == crash_at:
                raise Crash
            if seen is not None:
                seen.append((name, batch))
            x = batch.noise.normal("x", (batch.n, 3)) if batch.index is None else IMAGES[batch.index]
            device = next(module.parameters()).device
            return module(x.to(device) + 0.1 * batch.noise.normal("jitter", (batch.n, 3), device))

        if name == "noise":
            training = Training(steps=6, batch=4, lr=0.02, warmup=3, ema=ema, clip=1.0)
            return Phase(name, Matched(net), loss, train_only(net, {k for k, _ in net.named_parameters()}), training)
        training = Training(steps=7, batch=4, lr=0.05, warmup=0, ema=ema, weight_decay=0.1)
        return Phase(name, Matched(net), loss, train_only(net, {"3.weight", "3.bias"}), training, len(IMAGES))

    return phase


def train(folder, engine, *, ema=0.0, seed=0, updates=10**9, crash_at=(None, None), seen=None, device="cpu", **arguments):
    """The network's state after at most so many updates of this process, and whether it was stopped."""
    net = born(seed).to(device)
    asked = iter(range(10**9))
    arguments = {"keep_going": lambda: next(asked) < updates, "save_seconds": 1e9, "log_steps": 2} | arguments
    stopped = False
    try:
        make = phases(net, ema, crash_at, seen)
        fit(net, make, NAMES, Noise((4,)), engine=engine, states=States(folder / "state"), log=Log(folder / "log.jsonl"), **arguments)
    except (KeyboardInterrupt, Crash):
        stopped = True
    return {name: t.cpu().clone() for name, t in net.state_dict().items()}, stopped


def bits(state):
    return {name: (t.dtype, t.numpy().tobytes()) for name, t in state.items()}


def logged(folder):
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines_of(folder / "log.jsonl")]


@pytest.fixture(scope="module")
def whole(engine, tmp_path_factory):
    """What an uninterrupted run ends in, by decay of the average."""
    made = {}
    for ema in (0.0, 0.9):
        folder = tmp_path_factory.mktemp("whole")
        state, stopped = train(folder, engine, ema=ema)
        assert not stopped
        made[ema] = bits(state), logged(folder)
    return made


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("updates", [0, 1, 2, 3, 5, 6, 7, 8, 12])
def test_a_run_stopped_after_any_update_goes_on_to_the_same_bits(engine, whole, tmp_path, updates, ema):
    _, stopped = train(tmp_path, engine, ema=ema, updates=updates)
    assert stopped
    state, complaints = States(tmp_path / "state").load()
    assert complaints == []
    assert (state["phase"], state["step"]) == (("noise", updates) if updates < 6 else ("images", updates - 6))
    final, stopped = train(tmp_path, engine, ema=ema, seed=1)  # whatever it is born with is not what it goes on from
    assert not stopped
    assert bits(final) == whole[ema][0]
    lines = {(line["phase"], line["step"]): line for line in logged(tmp_path)}
    assert all(lines[line["phase"], line["step"]] == line for line in whole[ema][1])
    assert len(lines) == len(logged(tmp_path))


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_stopped_again_and_again(engine, whole, tmp_path, ema):
    for seed in range(20):
        final, stopped = train(tmp_path, engine, ema=ema, seed=seed, updates=2)
        if not stopped:
            break
    assert seed == 6  # 13 updates by twos
    assert bits(final) == whole[ema][0]


@pytest.mark.parametrize("crash_at", [("noise", 5), ("images", 0), ("images", 3), ("images", 6)])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_that_dies_goes_on_from_its_last_state_to_the_same_bits(engine, whole, tmp_path, crash_at, ema):
    _, stopped = train(tmp_path, engine, ema=ema, crash_at=crash_at, save_seconds=0)
    assert stopped
    state, _ = States(tmp_path / "state").load()
    assert (state["phase"], state["step"]) == {
        ("noise", 5): ("noise", 4),
        ("images", 0): ("noise", 6),
        ("images", 3): ("images", 2),
        ("images", 6): ("images", 6),
    }[crash_at]
    final, _ = train(tmp_path, engine, ema=ema, seed=1, save_seconds=0)
    assert bits(final) == whole[ema][0]


def test_without_time_to_save_only_the_end_of_a_phase_is_saved(engine, tmp_path):
    train(tmp_path, engine, crash_at=("noise", 5))
    assert States(tmp_path / "state").load() == (None, [])
    train(tmp_path, engine, crash_at=("images", 6))
    state, _ = States(tmp_path / "state").load()
    assert (state["phase"], state["step"]) == ("noise", 6)


def test_a_spoiled_state_leaves_the_one_before_it(engine, whole, tmp_path):
    train(tmp_path, engine, crash_at=("images", 6), save_seconds=0)
    newest = sorted((tmp_path / "state").iterdir())[-1] / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")
    final, _ = train(tmp_path, engine, seed=1)
    assert bits(final) == whole[0.0][0]


@pytest.mark.parametrize("beginning", [b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"])
def test_a_file_of_tensors_may_begin_as_a_pickle_does(tmp_path, beginning):
    """The first two bytes are the length of the header, whatever that is; a pickle is refused by name all the same."""
    overhead = int.from_bytes(save({"": torch.ones(1)})[:8], "little")
    data = save({"n" * (int.from_bytes(beginning, "little") - overhead): torch.ones(1)})
    assert data.startswith(beginning)
    (tmp_path / "file").write_bytes(data)
    assert [t.tolist() for t in read_tensors(tmp_path / "file").values()] == [[1.0]]
    (tmp_path / "file").write_bytes(beginning + b"}q\x00X\x01\x00\x00\x00aq\x01K\x01s.")
    with pytest.raises(BrokenFile, match="a pickled checkpoint"):
        read_tensors(tmp_path / "file")


def test_a_finished_run_does_no_more_updates(engine, whole, tmp_path):
    train(tmp_path, engine, ema=0.9)
    before = logged(tmp_path)
    seen = []
    final, stopped = train(tmp_path, engine, ema=0.9, seed=1, seen=seen)
    assert not stopped
    assert seen == []
    assert bits(final) == whole[0.9][0]
    assert logged(tmp_path) == before


@pytest.mark.parametrize("device", DEVICES)
def test_going_on_works_on_every_device(tmp_path, device):
    made = accelerator(device)
    expected, _ = train(tmp_path / "whole", made, ema=0.9, device=device)
    train(tmp_path / "cut", made, ema=0.9, device=device, updates=4)
    final, _ = train(tmp_path / "cut", made, ema=0.9, device=device, seed=1)
    assert bits(final) == bits(expected)


def test_what_a_batch_is(engine, tmp_path):
    seen = []
    train(tmp_path, engine, seen=seen)
    assert [(name, batch.step) for name, batch in seen] == [("noise", i) for i in range(6)] + [("images", i) for i in range(7)]
    shuffled = Shuffled(10, 4, Noise((4, "images")))
    for name, batch in seen:
        assert batch.n == 4
        assert batch.noise == Noise((4, name, batch.step), range(4))
        if name == "noise":
            assert batch.index is None
        else:
            assert torch.equal(batch.index, shuffled(batch.step))


def test_the_second_phase_trains_its_parameters_alone(engine, tmp_path):
    _, stopped = train(tmp_path, engine, updates=6)
    before, _ = States(tmp_path / "state").load()
    final, _ = train(tmp_path, engine, seed=1)
    assert stopped
    moved = {name for name, t in final.items() if not torch.equal(t, before["net"][name])}
    assert moved == {"3.weight", "3.bias"}


def test_the_log_has_every_term_the_rate_and_the_speed(engine, tmp_path):
    train(tmp_path, engine)
    lines = lines_of(tmp_path / "log.jsonl")
    assert [(line["phase"], line["step"]) for line in lines] == [
        *(("noise", step) for step in (1, 2, 4, 6)),
        *(("images", step) for step in (1, 2, 4, 6, 7)),
    ]
    for line in lines:
        assert line["steps"] == (6 if line["phase"] == "noise" else 7)
        assert line["loss"] == pytest.approx(line["loss/bias"] + line["loss/out"])
        assert line["images_per_second"] > 0
    training = Training(steps=7, lr=0.05, warmup=0)
    assert [line["lr"] for line in lines[4:]] == [pytest.approx(learning_rate(training, step)) for step in (0, 1, 3, 5, 6)]
    # The first line is the loss before any update, on the first batch.
    noise = Noise((4, "noise", 0))
    net = born(0)
    losses = Matched(net)(noise.normal("x", (4, 3)) + 0.1 * noise.normal("jitter", (4, 3)))
    assert lines[0]["loss/out"] == pytest.approx(losses["out"].mean().item(), rel=1e-5)


# ------------------------------------------------------------------ one weight, whose way is known


class Scalar(nn.Module):
    """A network of one weight; ``slope(step)`` is the gradient that it gets."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0]))


def descend(engine, folder, slope, images=0, seen=None, **settings):
    """The weight after a phase whose loss is ``slope(step) w``."""
    net = Scalar()
    training = Training(**{"steps": 5, "batch": 2, "lr": 0.1, "warmup": 0, "decay": "constant"} | settings)

    def loss(module, batch):
        if seen is not None:
            seen.append(batch)
        return {"slope": slope(batch.step) * module.w * torch.ones(batch.n)}

    phase = Phase("only", net, loss, [net.w], training, images)
    states = States(folder / "state")
    fit(net, lambda name: phase, ["only"], Noise(), engine=engine, states=states, log=Log(folder / "log.jsonl"))
    return net.w.item()


def test_the_rate_of_every_update_is_the_schedules(engine, tmp_path):
    """Under a constant gradient Adam moves by the learning rate."""
    training = Training(steps=5, lr=0.1, warmup=3, decay="cosine")
    expected = 2 - sum(learning_rate(training, step) for step in range(5))
    assert descend(engine, tmp_path, lambda step: 3.0, warmup=3, decay="cosine") == pytest.approx(expected, abs=1e-5)


def test_weight_decay_is_decoupled(engine, tmp_path):
    assert descend(engine, tmp_path, lambda step: 0.0, weight_decay=0.5) == pytest.approx(2 * (1 - 0.1 * 0.5) ** 5)


def test_a_clipped_gradient_is_no_larger_than_asked(engine, tmp_path):
    def slope(step):
        return 1.0 if step < 3 else 1e6

    assert descend(engine, tmp_path / "clipped", slope, clip=1.0) == pytest.approx(1.5, abs=1e-4)
    assert descend(engine, tmp_path / "free", slope) > 1.5 + 1e-2


def test_the_average_is_what_is_kept(engine, tmp_path):
    expected = 2.0
    for step in range(1, 6):
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * (2 - 0.1 * step)
    assert descend(engine, tmp_path, lambda step: 3.0, ema=0.5) == pytest.approx(expected, abs=1e-5)
    state, _ = States(tmp_path / "state").load()
    assert state["net"]["w"].item() == pytest.approx(expected, abs=1e-5)


def test_fewer_images_than_a_batch(engine, tmp_path):
    seen = []
    descend(engine, tmp_path, lambda step: 1.0, images=3, seen=seen, batch=8)
    assert len(seen) == 5
    for batch in seen:
        assert batch.n == 3
        assert sorted(batch.index.tolist()) == [0, 1, 2]
        assert batch.noise.normal("x", (3, 1)).shape == (3, 1)


# ------------------------------------------------------------------ losses that are not finite


def spoiled(engine, folder, bad, *, updates=10**9, **arguments):
    """A run whose loss "sick" goes bad at the update after three."""
    net = Scalar()

    def loss(module, batch):
        sick = bad(module.w) if batch.step == 3 else module.w**2
        return {"sound": module.w * torch.ones(2), "sick": sick.expand(2)}

    asked = iter(range(10**9))
    phase = Phase("only", net, loss, [net.w], Training(steps=8, batch=2, warmup=0))
    arguments = {"keep_going": lambda: next(asked) < updates, "save_seconds": 0.0, "log_steps": 1} | arguments
    fit(net, lambda name: phase, ["only"], Noise(), engine=engine, states=States(folder / "s"), log=Log(folder / "log.jsonl"), **arguments)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_named_and_nothing_more_is_saved(engine, tmp_path, value):
    with pytest.raises(BadInput, match=r"only: the loss of sick is not finite at update 4; lower lr \(now 0.002\)"):
        spoiled(engine, tmp_path, lambda w: w * value)
    state, _ = States(tmp_path / "s").load()
    assert state["step"] == 3
    assert state["net"]["w"].isfinite().all()
    assert [line["step"] for line in lines_of(tmp_path / "log.jsonl")] == [1, 2, 3]


def test_it_is_found_at_the_next_line_of_the_log(engine, tmp_path):
    with pytest.raises(BadInput, match=r"the loss of sound, sick is not finite at update 6"):
        spoiled(engine, tmp_path, lambda w: w * math.nan, log_steps=3)
    state, _ = States(tmp_path / "s").load()
    assert state["step"] == 3


def test_weights_that_are_not_finite_are_not_saved_when_stopped_between_two_lines_of_the_log(engine, tmp_path):
    with pytest.raises(BadInput, match=r"only: w is not finite after 5 updates; lower lr"):
        spoiled(engine, tmp_path, lambda w: w * math.nan, log_steps=100, updates=5)
    state, _ = States(tmp_path / "s").load()
    assert state["step"] == 1  # the first update always writes a line of the log


def test_a_gradient_that_is_not_finite_spoils_no_state_though_its_loss_is_finite(engine, tmp_path):
    with pytest.raises(BadInput, match=r"only: w is not finite after 4 updates"):
        spoiled(engine, tmp_path, lambda w: (0 * w).sqrt())
    state, _ = States(tmp_path / "s").load()
    assert state["step"] == 3


def test_threads_are_put_back():
    before = torch.get_num_threads()

    def crash():
        with threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise Crash

    with pytest.raises(Crash):
        crash()
    assert torch.get_num_threads() == before
    with threads(None):
        assert torch.get_num_threads() == before


# ------------------------------------------------------------------ a loss that runs away


def watched(values, patience=1000, every=25):
    """The update at which a loss of those values is said to have diverged, if it is."""
    watch = Watch(patience)
    for i, value in enumerate(values):
        watch.add(every * i + 1, {"a": value})
        if watch.verdict(every * i + 1, {"a": value}):
            return every * i + 1
    return None


def test_a_loss_that_runs_away_is_told_from_one_that_does_not():
    falling = [100 / (i + 1) for i in range(20)]
    assert watched(falling + [2000.0] * 80) == 20 * 25 + 1 + 1000
    assert watched(falling + [2000.0] * 80, patience=None) is None
    assert watched(falling + [2000.0] * 40) is None  # not for long
    assert watched(falling + [2000.0] * 39 + [900.0] + [2000.0] * 39) is None  # it comes back
    assert watched(falling + [900.0] * 200) is None  # not far
    assert watched([0.0, 50.0, 40.0, 60.0] + [55.0] * 200) is None  # a student that starts with its teacher's weights
    assert watched([-v for v in falling] + [2000.0] * 80) is not None
    assert watched([float(2**i) for i in range(100)], patience=100) is not None
    assert watched([5.0] + [60.0] * 50, every=500) == 501 + 1000  # few lines: the first is the beginning


def diverging(net, seen=None, at=6):
    """A phase whose weight, and with it one of two losses, jumps at an update, and whose gradient leaves it there."""

    def loss(module, batch):
        if seen is not None:
            seen.append(batch.step)
        if batch.step == at:
            net.weight.data.fill_(1e4)
        own = net.weight.sum().expand(4)
        return {"good": 0 * own + 1.0, "bad": own - own.detach() + net.weight.detach().abs().sum()}

    return lambda name: Phase(name, net, loss, [net.weight], Training(steps=60, batch=4, lr=1e-3, warmup=0, decay="constant"))


def run_away(folder, engine, monkeypatch, **arguments):
    monkeypatch.setattr("potstill.distill.loop.FIRST_UPDATES", 3)
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(1.0)
    arguments = {"save_seconds": 0, "log_steps": 1, "patience": 20} | arguments
    make = diverging(net, arguments.pop("seen", None))
    fit(net, make, ["p"], Noise(), engine=engine, states=States(folder / "state"), log=Log(folder / "log.jsonl"), **arguments)
    return net


def test_a_training_that_diverges_stops_with_its_last_good_state(engine, tmp_path, monkeypatch):
    with pytest.raises(BadInput) as found:
        run_away(tmp_path, engine, monkeypatch)
    said = str(found.value)
    assert said.startswith("p: the loss of bad has diverged: 1e+04 at update 27, after 0.995; the whole has been more than 10 times")
    assert "for 20 updates; lower lr (now 0.001)" in said
    assert said.endswith("or go on with compute.divergence_patience=null")
    state, _ = States(tmp_path / "state").load()
    assert state["step"] == 6
    assert state["net"]["weight"].item() < 1
    seen = []
    with pytest.raises(BadInput, match=r"diverged: 1e\+04 at update 27"):  # again, from the good state
        run_away(tmp_path, engine, monkeypatch, seen=seen)
    assert seen[0] == 6
    assert run_away(tmp_path, engine, monkeypatch, patience=None).weight.item() > 1e3


def test_what_a_training_knows_of_its_loss_outlives_an_interruption(engine, tmp_path, monkeypatch):
    left = [5]

    def keep_going():
        left[0] -= 1
        return left[0] >= 0

    with pytest.raises(KeyboardInterrupt):
        run_away(tmp_path, engine, monkeypatch, keep_going=keep_going)
    left[0] = 12  # it stops while the loss is far, and does not save that
    with pytest.raises(KeyboardInterrupt):
        run_away(tmp_path, engine, monkeypatch, keep_going=keep_going)
    assert States(tmp_path / "state").load()[0]["step"] == 6
    with pytest.raises(BadInput, match=r"diverged: 1e\+04 at update 27, after 0.995"):
        run_away(tmp_path, engine, monkeypatch)
