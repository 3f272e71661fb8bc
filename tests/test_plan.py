"""The dry run: it tells what a run would do and what it would refuse, counts what that costs, and writes nothing."""

from __future__ import annotations

import re
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from potstill import config, jobs
from potstill.evaluate.cost import Operations, parameters
from potstill.families.lvae import LVAE
from potstill.jobs import Workshop
from potstill.state import lock
from runs import STEPS, cut_at, snapshot

# Two linear maps without bias: what an update of the student takes can be counted by hand.
OWN = """
    from torch import nn

    from potstill.model import Images, Model

    def _linear(inner):
        net = nn.Sequential(nn.Linear(4, inner, bias=False), nn.Linear(inner, 64, bias=False))

        def generate(sample):
            return net(sample.normal("z", (4,))).view(-1, 1, 8, 8)

        return Model(net, Images((1, 8, 8)), generate)

    def teacher():
        return _linear(32)

    def student():
        return _linear(2)
"""


def everything(folder):
    """Every file and folder, so that an empty folder that is left behind is seen too."""
    return snapshot(folder), sorted(str(p) for p in folder.rglob("*"))


@pytest.fixture
def dry(place, capsys):
    """The lines of a dry run, which must leave the disk as it was."""

    def run(command="run", *arguments, code=0, **sections):
        place.write(**sections)
        before = everything(place.folder)
        capsys.readouterr()
        assert place.run(command, "--dry-run", *arguments, **sections) == code
        out, err = capsys.readouterr()
        after = everything(place.folder)
        assert after[1] == before[1]
        assert {k: v[0] for k, v in after[0].items()} == {k: v[0] for k, v in before[0].items()}
        return (out if code == 0 else err).splitlines()

    return run


def stages(lines):
    """What a plan says of each stage."""
    return dict(line.split(": ", 1) for line in lines if line.split(":")[0] in ("train", "synthesize", "distill", "evaluate", "report"))


def test_a_plan_of_what_is_still_to_be_done(dry, place):
    lines = dry(seeds=[0, 3], arms=["data_free", "scratch"])
    assert lines[0] == f"tiny: a dry run of what would be done in {place.out}; nothing is written"
    count = parameters(LVAE((1, 8, 8), 4, 2, 2))
    assert any(line.startswith(f"teacher: LVAE, {count:,} parameters") for line in lines)
    assert stages(lines) == dict.fromkeys(("synthesize", "distill", "evaluate", "report"), "to do")
    assert any("surrogate: 16 images, ancestral" in line for line in lines)
    assert any(line.strip() == "4 students: 2 arms x 2 seeds (0, 3), one after the other" for line in lines)
    assert any(re.search(r"student_data_free: generate 3 updates of 8, \S+ \w*FLOP each; infer 3 updates of 8", line) for line in lines)
    assert any("the teacher and 2 rows of students, at 2 seeds, on 16 held-out images; pixels" in line for line in lines)
    assert any(re.search(r"about \d+\.\d GiB of memory", line) for line in lines)


def test_one_student_is_not_told_to_be_beside_others(dry):
    assert "1 student: 1 arm x 1 seed (0)" in [line.strip() for line in dry()]


def test_one_stage(dry):
    lines = dry("synthesize")
    assert stages(lines) == {"synthesize": "to do"}
    assert not any("student" in line for line in lines)
    assert dry("distill", code=2) == ["potstill: distill: no surrogate yet; run the synthesize stage first"]


def test_how_far_a_run_is(dry, place, monkeypatch):
    assert place.run("synthesize") == 0
    assert stages(dry()) == {"synthesize": "done already", "distill": "to do", "evaluate": "to do", "report": "to do"}
    with monkeypatch.context() as patched:
        cut_at(patched, 4)
        assert place.run("run") == 130
    found = stages(dry())
    assert (found["synthesize"], found["distill"], found["evaluate"]) == ("done already", "going on", "to do")
    assert place.run("run") == 0
    assert set(stages(dry()).values()) == {"done already"}
    (place.out / "surrogate" / "shard-00000.parquet").unlink()
    found = stages(dry())
    assert found["synthesize"] == "surrogate/shard-00000.parquet is gone or has changed, again"
    assert found["distill"] == "begun; goes on with what synthesize makes"


def test_what_a_run_would_refuse(dry, place, capsys):
    assert place.run("run") == 0
    other = {"student": {"width": 3}}
    refused = dry(code=2, **other)
    assert "was begun here from other inputs (differs: student.width)" in refused[0]
    capsys.readouterr()
    assert place.run("run", **other) == 2
    assert capsys.readouterr().err.splitlines() == refused


def test_the_teachers_weights_are_compared_too(dry, place):
    assert place.run("synthesize") == 0
    torch.manual_seed(1)
    LVAE((1, 8, 8), 4, 2, 2, 0.1).save_pretrained(place.folder / "teacher")
    assert "stage synthesize was begun here from other inputs (differs: weights)" in dry(code=2)[0]


def test_what_is_wrong_with_a_recipe(dry):
    assert dry(code=2, data={"kind": "npz", "path": "nope.npz"}) == ["potstill: nope.npz: no such file or folder"]
    assert dry(code=2, student={"width": 5}) == ["potstill: student: width 5 is wider than the teacher's 4"]
    assert dry("run", "distill.generate.lr=x", code=2) == ["potstill: distill.generate.lr: a number is expected (found 'x')"]


def test_a_folder_where_another_process_works(dry, place):
    with lock(place.out / "state" / "run.lock"):
        assert dry(code=2) == [f"potstill: {place.out}: another potstill process is working in this folder"]
    assert stages(dry())["synthesize"] == "to do"


def test_a_teacher_that_is_still_to_be_trained(dry):
    train = STEPS | {"model": {"kind": "lvae", "image": [1, 8, 8], "width": 4, "levels": 2, "latent": 2}}
    lines = dry(train=train, teacher={"kind": "trained"})
    assert set(stages(lines).values()) == {"to do"}
    assert any(re.search(r"  3 updates of 8 of 36 images, \S+ \w*FLOP each", line) for line in lines)
    count = parameters(LVAE((1, 8, 8), 4, 2, 2))
    assert any(line.startswith(f"  LVAE, {count:,} parameters") for line in lines)


def test_code_that_is_imported_leaves_nothing_behind(dry, place):
    (place.folder / "own.py").write_text(textwrap.dedent(OWN))
    sections = {
        "teacher": {"kind": "python", "target": "own:teacher"},
        "student": {"target": "own:student"},
        "distill": {"generate": STEPS | {"rules": [{"nodes": "out", "by": "mse"}]}, "infer": None},
        "evaluate": None,
        "report": None,
    }
    lines = dry("run", "--import", "own", **sections)
    assert any(line.startswith("student: Sequential, 136 parameters") for line in lines)  # everything() has seen no __pycache__


def test_operations_are_those_of_the_two_networks(place):
    (place.folder / "own.py").write_text(textwrap.dedent(OWN))
    tree = {
        "name": "counted",
        "teacher": {"kind": "python", "target": "own:teacher"},
        "student": {"target": "own:student"},
        "distill": {"generate": STEPS | {"rules": [{"nodes": "out", "by": "mse"}]}, "infer": None},
    }
    sys.path.insert(0, str(place.folder))
    shop = Workshop(config.check(tree), place.out, ("own",))
    teacher, student = 4 * 32 + 32 * 64, 4 * 2 + 2 * 64
    # The student's forward pass, and back: to all of its weights, and to what stands before the second map, not to the noise.
    expected = 2 * (teacher + student + student + 2 * 64)
    assert jobs.flops(shop, shop.teacher) == {"student_data_free": {"generate": expected}}


def test_operations_as_torch_counts_them():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)), torch.rand(2, 3, 8, 8)
    with Operations() as operations:
        net(x).sum().backward()
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    assert operations.count == counter.get_total_flops() > 0


def test_operations_of_attention():
    query, key = (torch.rand(2, 3, n, 4, requires_grad=True) for n in (5, 7))
    with Operations() as operations:
        out = torch.nn.functional.scaled_dot_product_attention(query, key, key)
    products = 2 * (2 * 3 * 5 * 7 * 4)  # of queries and keys, and of those and values
    assert operations.count == 2 * products
    with Operations() as operations:
        out.sum().backward()
    assert operations.count == 5 * products  # the first product is done again


def test_disk_is_enough_for_what_is_written(dry, place):
    lines = "\n".join(dry())
    limit = float(re.search(r"surrogate: 16 images, ancestral, at most (\S+) MiB on disk", lines)[1])
    students = float(re.search(r"(\S+) MiB of students on disk", lines)[1])
    assert place.run("synthesize") == 0
    assert place.run("distill") == 0
    assert sum(p.stat().st_size for p in place.out.glob("surrogate/*.parquet")) <= limit * 2**20
    weights = sum(p.stat().st_size for p in [*place.out.glob("students/**/*.safetensors"), *place.out.glob("student/*.safetensors")])
    assert students * 2**20 == pytest.approx(weights, rel=0.01)


def test_the_time_is_that_of_an_update_of_each_phase(dry, monkeypatch):
    asked = []

    def timed(update):
        asked.append(len(next(iter(update().values()))))
        return 0.5 if len(asked) == 1 else 0.01

    monkeypatch.setattr(jobs, "_timed", timed)
    lines = dry("run", distill={"generate": STEPS, "infer": STEPS | {"batch": 64}})
    assert asked == [2, 2, 32]  # two samples that take long are enough
    # Three updates of 8 samples at 0.5 s for two, and three of 64 at 0.01 s for 32.
    assert "about 6 s on this machine, as an update of each is timed now" in {line.strip() for line in lines}
