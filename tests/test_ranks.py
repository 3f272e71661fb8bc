"""Several processes as one run: what they say to each other, and whole runs under torchrun."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributions import Categorical

from potstill import build, cli, config, worker
from potstill.distill.loop import Agreed
from potstill.distill.rows import synchronized
from potstill.errors import BadInput, Failed
from potstill.families.classifier import Classifier
from potstill.families.diffusion import UNet
from potstill.families.gan import GAN
from potstill.families.lvae import LVAE
from potstill.noise import Noise
from potstill.ranks import ALONE, Ranks, launched
from potstill.synthesize import surrogate
from potstill.synthesize.synthesis import Made
from potstill.trace import run
from runs import environment

PATIENCE = 240


def all_of(count, act):
    """What ``act`` returns or raises for each of so many ranks, here threads over one store."""
    store, found = distributed.HashStore(), [None] * count

    def one(index):
        try:
            found[index] = act(Ranks(index, count, store))
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return found


# ------------------------------------------------------------------ what they say to each other


def test_nobody_goes_on_before_all_are_there():
    here = []

    def act(ranks):
        for turn in range(3):
            here.append(turn)
            ranks.wait()
            assert here.count(turn) == ranks.count
        return "done"

    assert all_of(3, act) == ["done"] * 3


def test_what_the_first_makes_all_have():
    made = []

    def act(ranks):
        one = ranks.share(lambda: made.append(ranks.index) or ["a", ranks.index])
        rest = list(ranks.each(iter(["x", "y"]) if ranks.first else iter(())))
        return one, rest, ranks.share(lambda: None)

    assert all_of(3, act) == [(["a", 0], ["x", "y"], None)] * 3
    assert made == [0]


@pytest.mark.parametrize("say", [lambda ranks: ranks.wait(), lambda ranks: ranks.share(lambda: 1)])
def test_a_failure_ends_the_waiting(say):
    def act(ranks):
        if ranks.first:
            assert ranks.failure() is None
            ranks.store.set("failed", json.dumps([2, "why"]))
            return ranks.failure()
        return say(ranks)

    first, *others = all_of(3, act)
    assert first == (2, "why")
    assert [type(other) for other in others] == [Failed] * 2


def test_a_store_that_is_gone_is_a_failure():
    class Gone:
        def check(self, keys):
            raise distributed.DistNetworkError("Connection reset by peer")

    code, text = Ranks(1, 2, Gone()).failure()
    assert code == 1
    assert "first process of the run is gone" in text


def test_alone_nothing_is_waited_for():
    ALONE.wait()
    assert ALONE.first
    assert ALONE.failure() is None
    assert ALONE.share(lambda: 3) == 3
    assert list(ALONE.each(iter("ab"))) == ["a", "b"]


def test_launched_when_all_is_told(monkeypatch):
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name in told:
        monkeypatch.delenv(name, raising=False)
    assert not launched()
    for name, value in told.items():
        assert not launched()
        monkeypatch.setenv(name, value)
    assert launched()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launched()


def test_the_second_signal_of_a_launcher_does_nothing():
    with worker.stoppable(patient=True) as keep_going:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        assert not keep_going()


# ------------------------------------------------------------------ a surrogate by several


def synthesis(bad=None):
    def make(rows, noise):
        if bad in rows:
            raise BadInput("a bad row")
        return Made(noise.at(rows).uniform("x", (len(rows), 1, 4, 4)), [row % 3 for row in rows])

    return make


def write(folder, ranks=ALONE, make=None):
    options = {"n": 30, "batch": 3, "shard": 8, "identity": "i", "source": "here"}
    surrogate.write(folder, make or synthesis(), Noise((1,)), ranks=ranks, **options)
    return contents(folder)


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_several_write_the_bytes_of_one(tmp_path, count):
    made = [[] for _ in range(count)]

    def act(ranks):
        make = synthesis()
        return write(tmp_path / "several", ranks, lambda rows, noise: made[ranks.index].extend(rows) or make(rows, noise))

    assert all_of(count, act) == [write(tmp_path / "one")] * count
    assert sorted(itertools.chain(*made)) == list(range(30))
    assert [rows[0] for rows in made if rows] == [0, 8, 16, 24][:count]


def test_what_others_have_left_is_gone_on_with_by_any_number(tmp_path):
    def act(ranks):
        if ranks.index == 1:
            raise BadInput("dead before its first shard")
        write(tmp_path / "s", Ranks(ranks.index, ranks.count, Dead()))

    class Dead(distributed.HashStore):
        def add(self, key, amount):
            raise distributed.DistNetworkError("Connection reset by peer")

    assert [type(error) for error in all_of(2, act)] == [distributed.DistNetworkError, BadInput]
    assert [p.name for p in sorted((tmp_path / "s").iterdir())] == ["shard-00000.parquet", "shard-00002.parquet"]
    marks = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").iterdir()}
    assert write(tmp_path / "s") == write(tmp_path / "one")
    assert {p: p.stat().st_mtime_ns for p in marks} == marks


# ------------------------------------------------------------------ what a training says


@pytest.fixture
def group():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(3), (5, 3)),
        (nn.BatchNorm2d(3), (4, 3, 2, 5)),
        (nn.BatchNorm2d(3, momentum=None, eps=0.3), (4, 3, 1, 1)),
        (nn.BatchNorm1d(3, affine=False), (5, 3, 2)),
        (nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 2, 2)),
    ],
)
def test_batchnorm_over_all_is_batchnorm(group, norm, shape):
    noise = Noise((5,))
    start = {k: v.clone() for k, v in norm.state_dict().items()}

    def passed(wrap):
        norm.load_state_dict(start)
        inputs = [(noise.normal(f"x{i}", shape) * 3 + 1).requires_grad_() for i in range(3)]
        norm.zero_grad()
        norm.train()
        if wrap:
            with synchronized(norm):
                outputs = [norm(x) for x in inputs[:2]]
        else:
            outputs = [norm(x) for x in inputs[:2]]
        norm.eval()
        if wrap:
            with synchronized(norm):
                outputs.append(norm(inputs[2]))
        else:
            outputs.append(norm(inputs[2]))
        sum((y * noise.normal("w", shape)).sum() for y in outputs).backward()
        return [*outputs, *(x.grad for x in inputs), *(p.grad for p in norm.parameters()), *norm.state_dict().values()]

    whole, split = passed(False), passed(True)
    assert len(whole) == len(split)
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(norm)


def test_they_ask_each_other_about_once_a_second(group, monkeypatch):
    monkeypatch.setattr("potstill.distill.loop.time.monotonic", lambda: now[0])
    now, asked = [0.0], []

    def going():
        asked.append(now[0])
        return now[0] < 30

    agreed = Agreed(going, seconds=1.0)
    while now[0] < 100:
        now[0] += 1 / 16  # an update
        if not agreed():
            break
    assert 30 <= now[0] <= 31
    assert all(0 < b - a <= 1 for a, b in itertools.pairwise(asked))
    assert len(asked) < 40


def test_slow_updates_are_asked_about_each(group, monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr("potstill.distill.loop.time.monotonic", lambda: now[0])
    agreed = Agreed(lambda: asked.append(now[0]) or True, seconds=1.0)
    for _ in range(5):
        now[0] += 7.0
        assert agreed()
    assert len(asked) == 5


# ------------------------------------------------------------------ under torchrun


def torchrun(*words, processes=2, more=("--standalone",)):
    """``torchrun`` of a module or a script, as a process of its own, with all of its output."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*launch, *map(str, words)], env=environment(), start_new_session=True, **pipes)


def ended(process):
    """What it printed, once it has ended."""
    try:
        return process.communicate(timeout=PATIENCE)[0]
    finally:
        for child in psutil.Process(process.pid).children() if process.poll() is None else []:
            child.kill()  # the launcher gives each a session of its own
        process.kill()


def codes(output):
    """Exit codes of the processes, as the launcher reports them."""
    return sorted(int(line.split(":")[1].split()[0]) for line in output.splitlines() if line.strip().startswith("exitcode  :"))


def said(output):
    return [line for line in output.splitlines() if line.startswith("potstill:")]


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def close(folder, expected):
    """See that all students are the same functions up to the order of sums.

    Not the same weights: where a gradient is zero, such as of a bias before a BatchNorm, its sign is that of a rounding error, and
    Adam takes a whole step that way.
    """
    files = sorted(p.parent.relative_to(expected) for p in expected.glob("students/*/*/model.safetensors"))
    assert files
    for file in files:
        found, whole = (LVAE.from_pretrained(root / file).eval().model() for root in (folder, expected))
        images = [model.sample(16, Noise((7,))) for model in (found, whole)]
        torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5, msg=lambda text, file=file: f"{file}: {text}")
        again = [model.reconstruct(images[1], Noise((8,))) for model in (found, whole)]
        torch.testing.assert_close(again[0], again[1], rtol=0, atol=1e-5, msg=lambda text, file=file: f"{file}: {text}")


STEPS = {"steps": 5, "batch": 7}  # which two cannot share evenly
SECTIONS = {
    "surrogate": {"n": 20, "shard": 4, "batch": 3},
    "distill": {"generate": STEPS | {"ema": 0.5}, "infer": STEPS | {"clip": 1.0}, "scratch": STEPS},
    "arms": ["data_free", "with_data", "scratch"],
    "evaluate": None,
    "report": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_two_processes_make_what_one_makes(place, nodes):
    recipe = place.write(**SECTIONS)
    one = place.folder / "one"
    assert cli.main(["run", str(recipe), "--out", str(one), "--quiet"]) == 0
    port = free_port()
    nodes_of = [["--nnodes", "2", "--node-rank", str(i), "--master-addr", "localhost", "--master-port", str(port)] for i in range(2)]
    launches = [["--standalone"]] if nodes == 1 else nodes_of
    started = [torchrun("-m", "potstill", "run", recipe, "--out", place.out, processes=2 // nodes, more=more) for more in launches]
    outputs = [ended(process) for process in started]
    assert [process.returncode for process in started] == [0] * nodes, outputs
    lines = "".join(outputs).splitlines()
    for line in ("synthesize", "distill", "  3 students, each by 2 processes"):
        assert lines.count(line) == 1
    assert contents(place.out / "surrogate") == contents(one / "surrogate")
    close(place.out, one)
    texts = [(folder / "students/student_scratch/seed-0/log.jsonl").read_text() for folder in (place.out, one)]
    log, whole = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert [entry["step"] for entry in log] == [entry["step"] for entry in whole]
    assert [entry["loss"] for entry in log] == pytest.approx([entry["loss"] for entry in whole], rel=1e-5)
    assert os.listdir(place.out / "state") == ["run.lock"]


LONG = {"steps": 100000, "batch": 7}


@pytest.mark.slow
def test_a_teacher_in_two_parts_teaches_the_same(place):
    """With everything that a student hears of its teacher: its latents, its images, its encoder's view, its layers' statistics."""
    generate = {"perceptual": [{"nodes": "z*", "by": "wasserstein2"}], "energy": [{"kind": "batchnorm", "weight": 0.1}]}
    arms = [{"kind": "data_free", **generate}, "with_data", {"kind": "data_free", "name": "calibrated", "start": "calibrated"}]
    recipe = place.write(**SECTIONS | {"arms": arms, "calibrate": STEPS})
    process = torchrun("-m", "potstill", "run", recipe, "--out", place.out)
    assert ended(process) is not None
    whole, parts = place.out, place.folder / "parts"
    process = torchrun("-m", "potstill", "run", recipe, "compute.shard_teacher=true", "--out", parts)
    output = ended(process)
    assert process.returncode == 0, output
    close(parts, whole)
    assert cli.main(["doctor", str(parts)]) == 0
    # The map is of a loss of the batch as a whole, which nobody shares out.
    assert cli.main(["calibrate", str(recipe), "--out", str(place.folder / "one"), "--quiet"]) == 0
    one, two = (load_file(root / "calibrated" / "model.safetensors") for root in (place.folder / "one", whole))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)


SHARDED = """
import os
import torch
from torch import distributed
from potstill.distill.sharding import shard
from potstill.families.lvae import LVAE
from potstill.noise import Noise

distributed.init_process_group("gloo")
torch.manual_seed(0)
nets = [LVAE((1, 8, 8), 8, 2, 2, 0.1) for _ in range(2)]
nets[1].load_state_dict(nets[0].state_dict())
models = [net.model().frozen() for net in nets]
shard(nets[0], torch.device("cpu"), 2)
rank = distributed.get_rank()
images = [model.sample(4, Noise((1,)).at(range(4 * rank, 4 * rank + 4))) for model in models]
held, whole = sum(p.to_local().numel() for p in nets[0].parameters()), sum(p.numel() for p in nets[1].parameters())
os.write(1, f"rank {rank} {torch.equal(*images)} {2 * held <= 1.01 * whole}\\n".encode())  # in one piece: the other writes there too
"""


@pytest.mark.slow
def test_each_of_two_holds_half_of_the_weights(tmp_path):
    (tmp_path / "script.py").write_text(SHARDED)
    output = ended(torchrun(tmp_path / "script.py"))
    assert sorted(line for line in output.splitlines() if line.startswith("rank")) == ["rank 0 True True", "rank 1 True True"], output


@pytest.mark.parametrize("sections", [{"student": {"start": "teacher"}}, {"distill": {"link": STEPS, "generate": None, "infer": None}}])
def test_what_is_not_taught_in_parts_says_so(sections, place):
    tree = json.loads(place.write(**SECTIONS | sections).read_text())
    with pytest.raises(BadInput, match="shard_teacher: is not for students that start"):
        config.check({**tree, "compute": {"shard_teacher": True}})


def begun(process, folder, pattern):
    """Wait until there is such a file, and give the ranks' processes."""
    until = time.monotonic() + PATIENCE
    while not list(folder.glob(pattern)) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    found = psutil.Process(process.pid).children(recursive=True)
    return {child.environ()["RANK"]: child for child in found if "RANK" in child.environ()}


@pytest.mark.slow
def test_killed_and_gone_on_with_by_one(place):
    steps = {"steps": 40, "batch": 7}
    sections = SECTIONS | {"distill": {"generate": steps, "infer": STEPS}, "arms": ["data_free"]}
    recipe = place.write(**sections)
    one = place.folder / "one"
    assert cli.main(["run", str(recipe), "--out", str(one), "--quiet"]) == 0
    process = torchrun("-m", "potstill", "run", recipe, "--out", place.out, "--quiet")
    for rank in begun(process, place.out, "state/students/*/*/step-0000000[5-9]").values():
        rank.kill()
    process.kill()
    ended(process)
    left = [int(p.name[5:]) for p in place.out.glob("state/students/*/*/step-*")]
    assert left
    assert max(left) < 40
    assert cli.main(["run", str(recipe), "--out", str(place.out), "--quiet"]) == 0
    close(place.out, one)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_one_update(place):
    recipe = place.write(**SECTIONS | {"distill": {"generate": LONG, "infer": STEPS}, "arms": ["data_free"]})
    process = torchrun("-m", "potstill", "run", recipe, "--out", place.out, "--quiet", "compute.save_seconds=1000")
    begun(process, place.out, "students/*/*/log.jsonl")["1"].send_signal(signal.SIGTERM)
    output = ended(process)
    assert codes(output) == [130, 130], output
    [line] = said(output)
    assert "interrupted; go on with the same command, or in one process with: potstill run" in line
    assert len(list(place.out.glob("state/students/*/*/step-*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("surrogate.m=3", "potstill: surrogate.m: unknown key"),
        ("distill.generate.batch=2", "potstill: student_data_free/seed-0: generate: a batch of 2 cannot be split among 3 processes"),
    ],
)
def test_what_is_wrong_is_said_once(place, word, expected):
    recipe = place.write(**SECTIONS)
    output = ended(torchrun("-m", "potstill", "run", recipe, "--out", place.out, word, processes=3))
    assert set(codes(output)) <= {2, -signal.SIGTERM}  # the launcher ends those that are still at it when the first has gone
    assert 2 in codes(output)
    assert len(said(output)) == 1
    assert said(output)[0].startswith(expected)


ONE_FAILS = """
import os, sys, time, torch
from torch import distributed
from potstill.cli import _complain
from potstill.errors import BadInput
from potstill.ranks import together

def work(ranks):
    how, who = sys.argv[1:]
    print("by", ranks.index)
    if ranks.index == int(who):
        open("failed", "w").close()
        if how == "sleep":
            return 5, "this one failed"
        raise OSError("this one failed")
    if how == "sleep":
        time.sleep(100)
    elif how == "wait":
        ranks.wait()
    else:
        distributed.all_reduce(torch.zeros(1))

sys.exit(together(work, _complain))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "who"), [("sleep", 1), ("wait", 0), ("collective", 1)])
def test_when_one_fails_all_end_soon(tmp_path, monkeypatch, how, who):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.write_text(ONE_FAILS)
    output = ended(torchrun(script, how, str(who), processes=3))
    assert time.time() - (tmp_path / "failed").stat().st_mtime < 50
    assert output.count("this one failed") == (1 if how == "sleep" else 2), output  # in a traceback, its line of code is quoted too
    assert output.count("by 0") == 1
    assert "by 1" not in output
    assert set(codes(output)) - {-signal.SIGTERM} == ({5} if how == "sleep" else {1})


def gan():
    return GAN((1, 8, 8), 4, 3, 0, "mlp")


def unet():
    return UNet((1, 8, 8), 4, (1, 2), steps=3, arguments={"norm_num_groups": 2})


def classifier():
    return Classifier((1, 8, 8), 4, 4)


THREE = {"steps": 3, "batch": 5}
JUDGE = {"width": 4, "arch": "mlp", "r1": 0.1}
# A teacher, and what of the recipe differs: each trains something beside the student, or makes images while it trains.
BESIDE = {
    "adversary": (
        gan,
        {
            "student": {"width": 2},
            "distill": {"generate": THREE | {"rules": [{"nodes": "out", "by": "mse"}], "adversarial": JUDGE}, "infer": None},
        },
    ),
    "pool": (unet, {"student": {"width": 2}, "distill": {"link": THREE | {"pool": 10}, "generate": None, "infer": None}}),
    "rounds": (
        classifier,
        {
            "student": {"width": 2},
            "surrogate": {
                "kind": "inversion",
                "n": 12,
                "batch": 3,
                "shard": 4,
                "steps": 2,
                "classes": ["a", "b", "c", "d"],
                "energy": [{"kind": "cross_entropy"}, {"kind": "disagreement"}],
            },
            "distill": {"generate": None, "infer": THREE | {"steps": 4}, "rounds": 2},
        },
    ),
    "continual": (None, {"student": {"start": "teacher"}, "distill": {"continual": THREE}, "arms": ["continual"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BESIDE)
def test_two_processes_share_what_is_trained_beside_the_student(place, name):
    make, sections = BESIDE[name]
    if make is not None:
        torch.manual_seed(0)
        make().eval().save_pretrained(place.folder / "teacher")
    recipe = place.write(**{"surrogate": None, "arms": ["data_free"], "evaluate": None, "report": None} | sections)
    one = place.folder / "one"
    assert cli.main(["run", str(recipe), "--out", str(one), "--quiet"]) == 0
    process = torchrun("-m", "potstill", "run", recipe, "--out", place.out, "--quiet")
    output = ended(process)
    assert process.returncode == 0, output
    made = sorted(p.parent.relative_to(one) for p in one.rglob("manifest.json"))
    assert len(made) == {"rounds": 2}.get(name, 0)
    if made:  # the second round's are made against a student that is the same up to rounding
        assert contents(place.out / "surrogate") == contents(one / "surrogate")
        images = [surrogate.read(root / made[0]).astype(int) for root in (place.out, one)]
        assert abs(images[0] - images[1]).max() <= 1
    [file] = [p.parent.relative_to(one) for p in one.glob("students/*/*/model.safetensors")]
    found, whole = (build.pretrained(str(root / file)).eval().model() for root in (place.out, one))
    x = Noise((8,)).uniform("x", (16, 1, 8, 8))
    for program in ("generate", "infer", "link"):
        if getattr(whole, program):
            inputs = () if program == "generate" else (whole.images.encode(x),)
            a, b = (run(getattr(model, program), *inputs, noise=Noise((7,)), n=16).out.dist for model in (found, whole))
            a, b = (d.logits if isinstance(d, Categorical) else d.mean for d in (a, b))
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=lambda text, program=program: f"{program}: {text}")
