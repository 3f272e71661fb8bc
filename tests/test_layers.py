"""Which module may import which, and what the command line loads before it has work to do."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import potstill

SOURCE = Path(potstill.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# From left to right; each knows only those before it. Folders stand for all of their files.
ORDER = [
    "errors",
    "ranks",
    "noise",
    "trace",
    "divergence",
    "model",
    "store",
    "state",
    "config",
    "glyphs",
    "strokes",
    "data",
    "families",
    "importers",
    "energy",
    "synthesize",
    "distill",
    "evaluate",
    "report",
    "build",
    "doctor",
    "init",
    "simple",
    "jobs",
    "inventory",
    "progress",
    "worker",
    "pipeline",
    "plan",
    "export",
    "publish",
    "compare",
    "publish",
    "completion",
    "cli",
    "__main__",
]
CORE = {"errors", "noise", "trace", "divergence", "model"}
CORE_FROM_OUTSIDE = {"torch"}
DISTANCES = ("_arrays", "emd", "energy_distance", "frechet", "mmd", "one_nn", "prdc")


def name_of(file):
    """``families/lvae.py`` is ``families.lvae``; ``families/__init__.py`` is ``families``."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parsed(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports_of(tree, file):
    """Every ``(module, only for types)`` that a file imports, anywhere in it, as absolute dotted names.

    ``from a import b`` counts as ``a.b``, for ``b`` may be a module.
    """
    package = ("potstill", *file.relative_to(SOURCE).parent.parts)
    for_types = {id(inner) for node in ast.walk(tree) if is_type_checking(node) for part in node.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            found = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module", "import_module"):
            found = [node.args[0].value] if node.args and isinstance(node.args[0], ast.Constant) else []
        else:
            continue
        for name in found:
            yield name, id(node) in for_types


def imports(file, *, with_types=True):
    """As :func:`imports_of`, of a file of the library."""
    return {name for name, for_types in imports_of(parsed(file), file) if with_types or not for_types}


def siblings(file):
    """Top-level modules of the library that a file imports; ``""`` is the library itself, for its version."""
    for name in imports(file):
        if name.split(".")[0] == "potstill":
            first = name.split(".")[1] if "." in name else ""
            yield first if (SOURCE / first).is_dir() or (SOURCE / f"{first}.py").exists() else ""


def outsiders(file, *, with_types=True):
    """Packages of others that a file imports."""
    tops = {name.split(".")[0] for name in imports(file, with_types=with_types)}
    return tops - {"potstill"} - sys.stdlib_module_names


def test_the_reader_of_imports_sees_every_form():
    text = """
import os, torch.nn as nn
from . import tables
from .. import noise
from ..trace import run
if TYPE_CHECKING:
    from accelerate import Accelerator
def late():
    from .deep.er import thing
    __import__("numpy"), importlib.import_module("scipy.stats"), importlib.import_module(name)
"""
    found = dict(imports_of(ast.parse(text), SOURCE / "report" / "page.py"))
    assert found == {
        "os": False,
        "torch.nn": False,
        "potstill.report.tables": False,
        "potstill.noise": False,
        "potstill.trace.run": False,
        "accelerate.Accelerator": True,
        "potstill.report.deep.er.thing": False,
        "numpy": False,
        "scipy.stats": False,
    }


def test_every_module_has_its_place():
    found = {name_of(file).split(".")[0] for file in FILES} - {""}
    assert found <= set(ORDER), "give a new module its place in ORDER"
    assert set(ORDER) <= found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_leftwards(file):
    own = name_of(file).split(".")[0]
    if own == "":
        assert set(siblings(file)) == set()
        return
    wrong = {name for name in siblings(file) if name not in ("", own) and ORDER.index(name) > ORDER.index(own)}
    assert wrong == set(), f"{name_of(file)} may not know {wrong}"


@pytest.mark.parametrize("file", [file for file in FILES if name_of(file) in CORE], ids=name_of)
def test_the_core_needs_torch_alone(file):
    assert outsiders(file) <= CORE_FROM_OUTSIDE


@pytest.mark.parametrize("file", [file for file in FILES if name_of(file).startswith("report")], ids=name_of)
def test_the_report_knows_the_files_of_a_run_and_nothing_else_of_the_library(file):
    assert set(siblings(file)) <= {"report"}
    assert "torch" not in outsiders(file)


def test_the_tables_of_the_terminal_need_the_standard_library_alone():
    assert outsiders(SOURCE / "report" / "tables.py") == set()


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_functions_of_arrays(name):
    """They know no model and no image: of the library, only what stands beside them."""
    assert set(siblings(SOURCE / "evaluate" / f"{name}.py")) <= {"evaluate"}


def test_what_checks_recipes_imports_no_torch():
    for name in ("errors", "ranks", "config", "state", "store", "data", "cli", "__init__", "__main__"):
        body = parsed(SOURCE / f"{name}.py").body
        at_once = ast.Module([node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))], [])
        tops = {module.split(".")[0] for module, _ in imports_of(at_once, SOURCE / f"{name}.py")}
        assert not tops & {"torch", "safetensors", "accelerate", "matplotlib"}, name


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("diffusers", {"families.diffusion", "synthesize.prior"}),
        ("accelerate", {"distill.loop", "distill.trackers"}),
        ("pickle", set()),
        ("dill", set()),
    ],
)
def test_where_a_package_may_be_imported(package, allowed):
    assert {name_of(file) for file in FILES if package in {n.split(".")[0] for n in imports(file, with_types=False)}} <= allowed


@functools.cache
def every_call():
    """Every call in the library of something that has a name: its file, how it is spelled, its keywords."""
    return [
        (name_of(file), ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords})
        for file in FILES
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute))
    ]


def calls(function):
    """Every call of a function that is spelled so: its file and its keywords."""
    return [(name, keywords) for name, spelled, keywords in every_call() if spelled == function]


def test_nothing_that_is_read_can_run_code():
    assert calls("json.loads")  # calls are found
    assert [name for name, given in calls("torch.load") if given.get("weights_only") != "True"] == []
    assert [name for name, given in calls("np.load") if given.get("allow_pickle", "False") != "False"] == []
    assert [name for name, given in calls("numpy.load") if given.get("allow_pickle", "False") != "False"] == []
    assert [name for spelled in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec") for name, _ in calls(spelled)] == []
    for name, given in calls("yaml.load"):
        loader = operator.attrgetter(given["Loader"])(importlib.import_module(f"potstill.{name}"))
        assert issubclass(loader, yaml.SafeLoader)
    assert not any(name in ("torch.load", "numpy.load") for file in FILES for name in imports(file))  # nor by a name of its own


# ------------------------------------------------------------------ what is loaded, and when

HEAVY = ["torch", "numpy", "matplotlib", "pydantic", "scipy", "accelerate", "PIL", "yaml", "pyarrow", "safetensors", "fsspec"]
LOADED = f"import json; print(); print(json.dumps([name for name in {HEAVY} if name in sys.modules]))"


def loaded_by(code, folder):
    """What a fresh interpreter has loaded after ``code``."""
    program = f"import sys\ncode = 0\ntry:\n    {code}\nexcept SystemExit as stopped:\n    code = stopped.code\n{LOADED}\nsys.exit(code)"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("code", ["import potstill", "import potstill.cli", "import potstill.errors"])
def test_importing_the_library_loads_nothing_heavy(tmp_path, code):
    assert loaded_by(code, tmp_path)[1] == []


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["init", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(tmp_path, arguments):
    done, loaded = loaded_by(f"from potstill.cli import main; sys.exit(main({arguments}))", tmp_path)
    assert done.returncode == 0
    assert "potstill" in done.stdout
    assert loaded == []


def test_a_script_for_a_shell_is_printed_without_torch(tmp_path):
    done, loaded = loaded_by("from potstill.cli import main; sys.exit(main(['completion', 'bash']))", tmp_path)
    assert done.returncode == 0
    assert not {"torch", "numpy", "matplotlib"} & set(loaded)


@pytest.mark.parametrize("recipe", [None, "name: [", "nome: x"], ids=["missing", "no YAML", "wrong"])
def test_a_wrong_recipe_is_refused_without_torch(tmp_path, recipe):
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    done, loaded = loaded_by("from potstill.cli import main; sys.exit(main(['run', 'recipe.yaml']))", tmp_path)
    assert done.returncode == 2
    assert "recipe.yaml" in done.stderr or "nome" in done.stderr
    assert "Traceback" not in done.stderr
    assert not {"torch", "numpy", "matplotlib"} & set(loaded)
    assert "pydantic" in loaded  # what has been loaded is seen
