"""The command line. Help and recipe errors come without importing torch."""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import BadInput, Failed, meant, shown
from .ranks import ALONE, Ranks, launched, together
from .store import is_url
from .worker import INTERRUPTED

if TYPE_CHECKING:
    from .config import Recipe

STAGES = {
    "train": "train a teacher or a feature network on real data (the data owner's side)",
    "calibrate": "find the noise that the data would have behind it, by what the teacher's layers remember",
    "synthesize": "make the surrogate data set from the teacher",
    "distill": "train the students of every arm and seed",
    "evaluate": "measure the teacher and every student against held-out real images, or fresh ones of the teacher",
    "report": "write report.html",
}
DEMO = Path(__file__).parent / "demo.yaml"
EXAMPLES = {
    "init": ("potstill init zoo:digits-lvae", "potstill init path/to/model.pth.tar --out student.yaml"),
    "demo": ("potstill demo", "potstill demo distill.generate.steps=1200 --out runs/longer"),
    "run": (
        "potstill run recipes/digits-vae.yaml --dry-run",
        "potstill run recipes/digits-vae.yaml student.ratio=20 --out runs/small",
    ),
    "train": ("potstill train recipes/digits-classifier.yaml",),
    "calibrate": ("potstill calibrate recipes/cifar10-lvae.yaml calibrate.steps=800",),
    "synthesize": ("potstill synthesize recipes/digits-guided.yaml surrogates.guided.n=256",),
    "distill": ("potstill distill recipes/digits-guided.yaml compute.workers=1 --log-json",),
    "evaluate": ("potstill evaluate recipes/digits-guided.yaml",),
    "report": ("potstill report recipes/digits-guided.yaml report.images=8",),
    "export": ("potstill export runs/digits-demo --to onnx --int8",),
    "compare": ("potstill compare runs/digits-demo runs/longer",),
    "push": (
        "potstill push runs/digits-demo --folder to-look-at",
        "potstill push runs/digits-demo user/digits-student",
    ),
    "completion": ("potstill completion bash", 'eval "$(potstill completion bash)"'),
    "schema": ("potstill schema",),
    "zoo": ("potstill zoo",),
    "doctor": ("potstill doctor runs/digits-demo", "potstill doctor --teacher mine:teacher --import mine"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="potstill",
        description="Make a small generative model out of a large one, without the data that it was trained on.",
        epilog="Exit codes: 0 done, 1 the run failed, 2 the recipe or an argument is wrong, 130 interrupted (run it again to go on).",
    )
    parser.add_argument("--version", action="version", version=f"potstill {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def with_run(name: str, help: str, recipe: bool = True) -> None:
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        if recipe:
            command.add_argument("recipe", help="a YAML file; see potstill schema")
        command.add_argument("overrides", nargs="*", default=[], metavar="a.b=value", help="values that replace the recipe's")
        command.add_argument("--out", metavar="DIR", help="folder of the run; by default runs/NAME")
        command.add_argument("--dry-run", action="store_true", help="check everything, print the plan and its cost, write nothing")
        command.add_argument(
            "--import", dest="modules", action="append", default=[], metavar="MODULE", help="allow the recipe to run code of this module"
        )
        shown = command.add_mutually_exclusive_group()
        shown.add_argument("--quiet", action="store_true", help="show no progress")
        shown.add_argument(
            "--log-json",
            action="store_true",
            help="progress, and what goes wrong, as one JSON object on each line of stderr: time, event (say, progress or error) and keys "
            "of its own, such as task, done, total, images_per_second, seconds_left, memory_bytes and loss; stdout stays as it is",
        )

    init = commands.add_parser("init", help="look at a checkpoint, and write a recipe for it that runs as it is")
    init.add_argument(
        "model",
        metavar="MODEL",
        help="a folder of potstill's, of diffusers, of transformers or of pythae, zoo:NAME, a Hub id, a KD4DGM checkpoint, or module:name",
    )
    init.add_argument("--out", type=Path, default=Path("recipe.yaml"), metavar="FILE", help="by default recipe.yaml; never overwritten")
    init.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE", help="allow code of this module")
    with_run("demo", "the embedded example: a digits LVAE from the zoo becomes 12 times smaller, offline", recipe=False)
    with_run("run", "every stage that the recipe has")
    for name, help in STAGES.items():
        with_run(name, help)
    export = commands.add_parser("export", help="write the student of a finished run for other programs: ONNX, torch.export, diffusers")
    export.add_argument("run", metavar="RUN_DIR", help="folder of a run, or of a model")
    export.add_argument("--to", required=True, choices=("onnx", "torch-export", "diffusers"), help="what is written")
    export.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder; by default export/TO in the run's")
    export.add_argument("--int8", action="store_true", help="of onnx, also one in 8 bits, calibrated without data; says what it costs")
    export.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE", help="allow code of this module")
    compare = commands.add_parser("compare", help="the figures of several runs in one table")
    compare.add_argument("runs", metavar="RUN_DIR", nargs="+", type=Path, help="folder of a run, measured on the same held-out images")
    push = commands.add_parser("push", help="put a finished student, or its surrogate, on the Hub or into a folder, with its card")
    push.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of a run")
    push.add_argument("repo", metavar="USER/NAME", nargs="?", help="on the Hub; the token is the one that hf auth login has left")
    push.add_argument("--folder", type=Path, help="a new folder to write to; without a name on the Hub nothing is sent")
    push.add_argument("--surrogate", action="store_true", help="the surrogate's images, as a data set, in place of the student")
    push.add_argument("--license", metavar="ID", help="such as apache-2.0; nobody but you knows what the teacher's allows")
    push.add_argument("--public", action="store_true", help="if the repository is new; by default it is private")
    completion = commands.add_parser("completion", help="print a script with which a shell completes this command line")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), help="the script says where to put it")
    commands.add_parser("schema", help="print the recipe's JSON schema")
    commands.add_parser("zoo", help="list the models that come with potstill")
    doctor = commands.add_parser("doctor", help="what works here; what is damaged in a run's folder; what is wrong with a model")
    doctor.add_argument(
        "run", nargs="?", type=Path, metavar="DIR", help="folder of a run: look for files that are not as they were written"
    )
    doctor.add_argument(
        "--teacher",
        metavar="MODEL",
        help="look at this one: a folder, zoo:NAME, a Hub id, a recipe with a teacher, or module:name of a function that returns a Model",
    )
    doctor.add_argument("--import", dest="modules", action="append", default=[], metavar="MODULE", help="allow code of this module")
    for name, command in commands.choices.items():
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.epilog = "\n  ".join(["for example:", *EXAMPLES[name]])
    return parser


def _run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    from . import config

    path = DEMO if arguments.command == "demo" else arguments.recipe
    recipe = config.read(path, arguments.overrides)
    if arguments.out and is_url(arguments.out):
        raise BadInput("--out: a folder of this machine is expected; images go elsewhere by surrogate.store")
    folder = Path(arguments.out) if arguments.out else Path("runs") / recipe.name
    if arguments.modules:
        sys.path.insert(0, os.getcwd())  # where an allowed module is looked for first, as python -m does
    stages = None if arguments.command in ("demo", "run") else (arguments.command,)
    if arguments.dry_run:
        _dry_run(recipe, folder, stages, tuple(arguments.modules), ranks)
        return
    from . import pipeline
    from .report.tables import text_table, verdict
    from .state import read_json

    pipeline.execute(recipe, folder, stages, tuple(arguments.modules), arguments.quiet, ranks, arguments.log_json)
    metrics = folder / "metrics.json"
    if arguments.command in ("demo", "run", "evaluate") and metrics.exists():
        found = read_json(metrics)
        print(text_table(found))
        print(verdict(found))
    if (folder / "report.html").exists() and arguments.command in ("demo", "run", "report"):
        print(f"report: {folder / 'report.html'}")


def _dry_run(recipe: Recipe, folder: Path, stages: tuple[str, ...] | None, modules: tuple[str, ...], ranks: Ranks) -> None:
    if ranks.first:
        from .plan import plan

        print(shown("\n".join(plan(recipe, folder, stages, modules))))
    ranks.wait()


def _zoo() -> None:
    for card in sorted((Path(__file__).parent / "zoo").glob("*/README.md")):
        text = card.read_text(encoding="utf-8").split("---\n")[-1]
        lines = [line for line in text.splitlines() if line and not line.startswith(("#", "```", "{"))]
        size = sum(path.stat().st_size for path in card.parent.rglob("*.safetensors")) / 2**20
        print(f"zoo:{card.parent.name}  ({size:.2f} MiB)\n  {lines[0]}")


# What is installed by name, with the modules that it brings and what they are for.
_EXTRAS = {
    "demo": (("sklearn",), "the demo, and data: {kind: digits}"),
    "diffusion": (("diffusers", "transformers"), "guided synthesis, and teachers of diffusers and transformers"),
    "export": (("onnx", "onnxscript", "onnxruntime"), "export --to onnx"),
    "data": (("datasets",), "load_dataset on a surrogate"),
    "tensorboard": (("tensorboard",), "compute.trackers: [tensorboard]"),
    "wandb": (("wandb",), "compute.trackers: [wandb]"),
}


def _doctor(run: Path | None, teacher: str | None, allowed: Sequence[str]) -> None:
    if run is not None:
        from .inventory import damage

        if damaged := damage(run):
            raise BadInput("\n".join(damaged))
        print(f"{run}: every file is as it was written")
    if teacher is not None:
        _examine(teacher, allowed)
    if run is not None or teacher is not None:
        return
    import importlib.util

    from . import pipeline

    torch: Any = __import__("torch")
    found = pipeline.describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for key in ("potstill", "python", "platform", "cpu", "cores"):
        print(f"{key:<16}{found[key]}")
    print(f"{'torch threads':<16}{torch.get_num_threads()}")
    for name, present in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        print(f"{name:<16}{'yes' if present else 'no'}")
    for package, number in found["versions"].items():
        print(f"{package:<16}{number}")
    for extra, (modules, use) in _EXTRAS.items():
        there = all(importlib.util.find_spec(module) for module in modules)
        print(f"{f'[{extra}]':<16}{'installed' if there else 'not installed'}: {use}")


def _examine(teacher: str, modules: Sequence[str]) -> None:
    """Look at a model; all that is wrong with it is one error, a line each."""
    from . import config

    trained = Path()
    if Path(teacher).suffix in (".yaml", ".yml", ".json"):
        recipe = config.read(teacher)
        if recipe.teacher is None:
            raise BadInput(f"{teacher}: the recipe names no teacher")
        section, trained = recipe.teacher, Path("runs") / recipe.name / "teacher"
    else:
        own = ":" in teacher and not teacher.startswith("zoo:")
        described = {"kind": "python", "target": teacher} if own else {"kind": "pretrained", "path": teacher}
        checked = config.check({"name": "doctor", "teacher": described}).teacher
        assert checked is not None
        section = checked
    if modules:
        sys.path.insert(0, os.getcwd())
    from . import build
    from .doctor import examine, summary

    build.allow(modules)
    model = build.loaded(section, trained, modules)
    if findings := examine(model):
        raise BadInput("\n".join(map(str, findings)))
    print("\n".join([*summary(model), "nothing wrong was found"]))


def _init(model: str, out: Path, modules: Sequence[str]) -> None:
    if modules:
        sys.path.insert(0, os.getcwd())
    from .init import init

    print(shown("\n".join(init(model, out, modules))))


def _export(arguments: argparse.Namespace) -> None:
    if arguments.modules:
        sys.path.insert(0, os.getcwd())
    from .export import export, summary

    print("\n".join(summary(export(arguments.run, arguments.to, arguments.out, arguments.int8, arguments.modules))))


def _compare(runs: Sequence[Path]) -> None:
    from .compare import merged
    from .report.tables import text_table

    print(text_table(merged(runs)))


def _push(arguments: argparse.Namespace) -> None:
    from .publish import publish

    what: Any = "surrogate" if arguments.surrogate else "student"
    print(publish(arguments.run, arguments.repo, arguments.folder, what, arguments.license, not arguments.public))


def _completion(shell: str) -> None:
    from .completion import script

    print(script(shell, _parser()), end="")


def _schema() -> None:
    from .config import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=1))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    words = sys.argv[1:] if argv is None else argv
    (commands,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not words:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if not words[0].startswith("-") and words[0] not in commands:
        parser.error(f"{words[0]}: no such command{meant(words[0], commands) or '; there are ' + ', '.join(commands)}")
    arguments, rest = parser.parse_known_args(words)
    if arguments.command is None:
        parser.error("a command is expected first: " + ", ".join(commands))
    command = commands[arguments.command]
    # argparse takes positional arguments in one stretch; overrides may also stand after an option.
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(arguments, "overrides")]
    if hasattr(arguments, "overrides") and (hint := _override_meant([*arguments.overrides, *rest])):
        command.error(hint)
    if unknown:
        option = unknown[0].partition("=")[0]
        names = [name[2:] for name in command._option_string_actions if name.startswith("--")]
        suggestion = meant(option.lstrip("-"), names, "--") if option.startswith("-") else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{suggestion}")
    if rest:
        arguments.overrides += rest
    return arguments


def _override_meant(words: Sequence[str]) -> str | None:
    """How to write what looks like an override: a recipe's key as an option, or one apart from its value."""
    if all("=" in word and not word.startswith("-") for word in words):
        return None
    from .config import recipe_keys  # late, for it brings pydantic

    keys = recipe_keys()
    sections = {key.rstrip("=").partition(".")[0] for key in keys}
    for word, value in zip(words, [*words[1:], None], strict=True):
        key, equals, given = word.partition("=")
        value = given if equals else value
        if word.startswith("-"):
            # Of keys with the same end, that of the first phase is meant most often.
            ends = [known for known in keys if f".{known}".endswith(f".{key.lstrip('-')}=")]
            if ends:
                known = min(ends, key=lambda known: not known.startswith("distill.generate."))
                return f"unrecognized arguments: {key}; values of the recipe are written such as {known}{value or 'VALUE'}"
        elif not equals and key.partition(".")[0] in sections and value is not None and "=" not in value:
            return f"{word}: an override is written a.b=value; write {word}={value}"
    return None


@contextmanager
def _terminated(once: bool) -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, so that workers are stopped and the command to go on is shown.

    Args:
        once: after the first of either, more of them do nothing: a launcher passes on what the terminal has sent already.
    """
    before: dict[signal.Signals, Any] = {}

    def interrupt(*_: object) -> None:
        if once:
            for number in before:
                signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in (signal.SIGINT, signal.SIGTERM) if once else (signal.SIGTERM,):
        before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _complain(text: str, log_json: bool = False) -> None:
    if log_json:
        from .progress import tell  # late, for it brings rich

        tell("error", text=text)
        return
    for line in text.splitlines() or [""]:
        print("potstill:", shown(line), file=sys.stderr)  # a message may quote a file


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    complain = partial(_complain, log_json=any(len(word) > 2 and "--log-json".startswith(word) for word in words))  # as argparse has it
    if launched():
        return together(lambda ranks: _ended(words, ranks), complain)
    code, text = _ended(words, ALONE)
    if text is not None:
        complain(text)
    return code


def _ended(words: Sequence[str], ranks: Ranks) -> tuple[int, str | None]:
    """The exit code of a command, and what to say of it."""
    arguments = _arguments(words)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without é or ± gets a question mark, not an error
    try:
        with _terminated(once=ranks.count > 1):
            match arguments.command:
                case "completion":
                    _completion(arguments.shell)
                case "schema":
                    _schema()
                case "zoo":
                    _zoo()
                case "doctor":
                    _doctor(arguments.run, arguments.teacher, arguments.modules)
                case "init":
                    _init(arguments.model, arguments.out, arguments.modules)
                case "export":
                    _export(arguments)
                case "compare":
                    _compare(arguments.runs)
                case "push":
                    _push(arguments)
                case _:
                    _run(arguments, ranks)
            sys.stdout.flush()
    except BadInput as error:
        return 2, str(error)
    except KeyboardInterrupt:
        how = "go on with" if ranks.count == 1 else "go on with the same command, or in one process with"
        return INTERRUPTED, f"interrupted; {how}: {shlex.join(['potstill', *words])}"
    except BrokenPipeError:  # whoever read the output, such as head, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes at exit
        return 1, None
    except OSError as error:
        return 1, f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except Failed as error:
        return 1, str(error)
    except MemoryError:
        return 1, "out of memory"
    return 0, None


if __name__ == "__main__":
    sys.exit(main())
