"""What a shell offers at a press of the tab key, asked of a real bash, and a real fish, with the scripts that they are given."""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from potstill import cli, config
from potstill.completion import SHELLS, script

ZOO = {"zoo:digits-classifier", "zoo:digits-lvae", "zoo:glyphs-sd"}
# As readline calls it: the whole line, and as second argument what stands after the last blank, colon or equals sign.
ASK = r"""
source ./potstill.bash
COMP_LINE=$1 COMP_POINT=${#1}
part=${1##*[[:space:]:=]}
_potstill potstill "$part"
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "fish"):
        (folder / f"potstill.{shell}").write_text(script(shell, cli._parser()))
    (folder / "recipe.yaml").write_text("")
    (folder / "runs" / "a run").mkdir(parents=True)
    return folder


@pytest.fixture
def offered(place):
    """What bash offers after a line."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")

    def ask(line):
        command = ["bash", "--norc", "--noprofile", "-c", ASK, "bash", line]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")
        return {word for word in done.stdout.splitlines() if word}

    return ask


def parsers():
    (commands,) = [action for action in cli._parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return commands.choices


def test_commands_and_their_options(offered):
    assert offered("potstill ") == set(parsers())
    assert offered("potstill e") == {"evaluate", "export"}
    assert offered("potstill --") == {"--help", "--version"}
    for name in ("run", "export", "doctor"):
        expected = {option for action in parsers()[name]._actions for option in action.option_strings if option.startswith("--")}
        assert offered(f"potstill {name} --") == expected
    assert offered("potstill nope --") == set()


def test_what_options_and_arguments_take(offered):
    assert offered("potstill export runs --to ") == {"onnx", "torch-export", "diffusers"}
    assert offered("potstill completion ") == set(SHELLS)
    assert offered("potstill run ") == {"potstill.bash", "potstill.fish", "recipe.yaml", "runs"}
    assert offered("potstill run rec") == {"recipe.yaml"}
    assert offered("potstill run recipe.yaml --out ") == {"runs"}
    assert offered("potstill compare runs/") == {"runs/a run"}
    assert offered("potstill run --import ") == set()


def test_models_of_the_zoo_in_spite_of_the_colon(offered):
    assert offered("potstill init ") == ZOO | {"potstill.bash", "potstill.fish", "recipe.yaml", "runs"}
    assert offered("potstill init zoo:digits") == {"digits-classifier", "digits-lvae"}  # what comes after the colon is replaced
    assert offered("potstill doctor --teacher z") == ZOO


def test_keys_of_the_recipe_a_part_at_a_time(offered):
    top = offered("potstill run recipe.yaml ")
    assert {"name=", "seeds=", "distill.", "compute.", "surrogates="} <= top
    assert not any(word.count(".") > 1 for word in top)
    assert {key.rstrip(".=") for key in top} == set(config.Recipe.model_fields)
    assert offered("potstill run recipe.yaml distill.ge") == {"distill.generate."}
    assert offered("potstill run --quiet recipe.yaml seed=3 --out x distill.generate.lr") == {"distill.generate.lr="}
    assert offered("potstill demo compute.thr") == {"compute.threads="}
    assert offered("potstill zoo compute.thr") == set()


def leaves(tree, path=""):
    """Dotted names of what a resolved recipe sets, but for names of the user's own."""
    if not isinstance(tree, dict) or path in ("surrogates", "evaluate.groups") or path.endswith("arguments"):
        yield f"{path}="
        return
    for key, value in tree.items():
        yield from leaves(value, f"{path}.{key}" if path else key)


@pytest.mark.parametrize("recipe", [cli.DEMO, *sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))], ids=lambda path: path.stem)
def test_every_key_that_a_recipe_sets_is_offered(recipe):
    known = config.recipe_keys()
    sections = {key.rpartition(".")[0] + "=" for key in known}
    found = {key for key in leaves(config.read(recipe).model_dump(mode="json")) if key not in sections}  # a section may be null
    assert found - set(known) - {f"{name}=" for name in config.Recipe.model_fields} == set()


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("potstill e", {"evaluate", "export"}),
        ("potstill run --l", {"--log-json"}),
        ("potstill export runs --to ", {"onnx", "torch-export", "diffusers"}),
        ("potstill run rec", {"recipe.yaml"}),
        ("potstill run recipe.yaml --out ", {"runs/"}),
        ("potstill run recipe.yaml --import ", set()),
        ("potstill init zoo:digits-l", {"zoo:digits-lvae"}),
        ("potstill run recipe.yaml distill.generate.st", {"distill.generate.start=", "distill.generate.steps="}),
    ],
)
def test_fish_offers_the_same(place, line, expected):
    command = ["fish", "--no-config", "-c", "source potstill.fish; complete -C $argv[1]", line]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert {offer.partition("\t")[0] for offer in done.stdout.splitlines()} == expected


@pytest.mark.parametrize("shell", SHELLS)
def test_the_scripts_are_whole(place, capsys, shell):
    assert cli.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for word in (*parsers(), "zoo:digits-lvae", "distill.generate.lr="):
        assert word in text
    assert "dry-run" in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = place / f"whole.{shell}"
    path.write_text(text)
    done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_wrong_shell(capsys):
    with pytest.raises(SystemExit):
        cli.main(["completion", "csh"])
    assert "invalid choice: 'csh'" in capsys.readouterr().err
