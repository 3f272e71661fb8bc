"""What is released: a wheel and a source archive, and the demo from the wheel alone, in an environment that has nothing of the checkout."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import potstill

pytest.importorskip("hatchling")
pytest.importorskip("sklearn")

ROOT = Path(__file__).parents[1]
FEW = [
    "seeds=[0]",
    "surrogate.n=128",
    "surrogates.swept.n=128",
    "surrogates.swept.sweeps=1",
    *(f"distill.{phase}.steps=2" for phase in ("generate", "infer", "scratch")),
    "evaluate.n=64",
    "evaluate.latency_repeats=3",
]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The folder of both archives, built from what is tracked and what is not ignored."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, capture_output=True)
    return folder


def test_the_archives_hold_what_is_needed_and_no_more(released):
    (wheel,), (source,) = released.glob("*.whl"), released.glob("*.tar.gz")
    assert wheel.name == f"potstill-{potstill.__version__}-py3-none-any.whl"
    inside = set(zipfile.ZipFile(wheel).namelist())
    here = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src" / "potstill").rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert {name for name in inside if name.startswith("potstill/")} == here
    assert {
        "potstill/py.typed",
        "potstill/demo.yaml",
        "potstill/zoo/digits-lvae/model.safetensors",
        "potstill/report/page.html.j2",
    } <= inside
    with tarfile.open(source) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "pyproject.toml", "tests/test_release.py"} <= names
    assert not any(name.startswith(("runs", ".venv", "benchmarks/results")) or "__pycache__" in name for name in names)
    assert source.stat().st_size < 20 << 20


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_alone(released, tmp_path, monkeypatch):
    """Its dependencies are those of this environment, the package is the wheel's."""
    (wheel,) = released.glob("*.whl")
    venv.create(tmp_path / "env", with_pip=False)
    python = str(tmp_path / "env" / "bin" / "python")
    (own,) = (tmp_path / "env").glob("lib/python*/site-packages")
    # A folder that stands in a .pth file is searched, but its own .pth files, the checkout's among them, are not read.
    (own / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    where = subprocess.run(
        [python, "-c", "import potstill; print(potstill.__file__)"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert Path(where.stdout.strip()).is_relative_to(own)
    command = [str(tmp_path / "env" / "bin" / "potstill"), "demo", "--quiet", *FEW]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Student, data-free" in done.stdout
    assert (tmp_path / "runs" / "digits-demo" / "report.html").stat().st_size > 50_000
