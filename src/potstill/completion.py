"""Scripts that make a shell complete the command line: commands, options, what they take, and the keys of a recipe.

A script has all of it in itself, so that a press of the tab key starts no Python.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .config import recipe_keys

SHELLS = ("bash", "zsh", "fish")
# What an argument takes, by what the help calls it. Others are the user's own names, which nothing can complete.
_TAKES = {
    "DIR": "folder",
    "RUN_DIR": "folder",
    "FOLDER": "folder",
    "folder": "folder",
    "FILE": "file",
    "recipe": "file",
    "MODEL": "model",
    "a.b=value": "key",
}


@dataclass(frozen=True)
class _Value:
    """What an argument takes: a "folder", a "file", a "model" (which is either, or of the zoo), a recipe's "key", "choice" or "own"."""

    kind: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Command:
    """A command as its help has it.

    Args:
        help: in a line.
        options: by name, with what follows them; ``None`` where nothing does.
        arguments: in order.
        repeats: whether the last of them may be given again and again.
    """

    help: str
    options: dict[str, _Value | None]
    arguments: tuple[_Value, ...]
    repeats: bool


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for a shell.

    Args:
        shell: one of ``SHELLS``.
        parser: of the command line.
    """
    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    zoo = sorted(f"zoo:{card.parent.name}" for card in (Path(__file__).parent / "zoo").glob("*/README.md"))
    return "\n".join(write(_commands(parser), zoo, recipe_keys())) + "\n"


def _commands(parser: argparse.ArgumentParser) -> dict[str, _Command]:
    (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    helps = {action.dest: action.help or "" for action in commands._choices_actions}
    found = {}
    for name, sub in commands.choices.items():
        named = [action for action in sub._actions if action.option_strings]
        options = {option: None if action.nargs == 0 else _value(action) for action in named for option in action.option_strings}
        placed = [action for action in sub._actions if not action.option_strings]
        repeats = bool(placed) and placed[-1].nargs in ("*", "+")
        found[name] = _Command(helps[name], options, tuple(map(_value, placed)), repeats)
    return found


def _value(action: argparse.Action) -> _Value:
    if action.choices is not None:
        return _Value("choice", tuple(map(str, action.choices)))
    return _Value(_TAKES.get(str(action.metavar or action.dest), "own"))


# ------------------------------------------------------------------ bash


_BASH = r"""# potstill: completion for bash. Put this into ~/.bashrc: eval "$(potstill completion bash)"
_potstill_offer() {  # those of the words that begin with the word at the cursor
    local word
    for word in $1; do
        [[ $word == "$current"* ]] && COMPREPLY+=("$word")
    done
}
_potstill_paths() {  # $1: -f for files, -d for folders
    local path
    compopt -o filenames 2>/dev/null
    while IFS= read -r path; do COMPREPLY+=("$path"); done < <(compgen "$1" -- "$current")
}
_potstill_keys() {  # one more part of a dotted key at a time
    local key rest before=" "
    for key in @KEYS@; do
        [[ $key == "$current"* ]] || continue
        rest=${key#"$current"}
        [[ $rest == *.* ]] && key=$current${rest%%.*}.
        [[ $before == *" $key "* ]] && continue
        before+="$key "
        COMPREPLY+=("$key")
    done
    compopt -o nospace 2>/dev/null
}
_potstill_place() {  # $1: the command, and an option that wants a value, or the number of the argument
    case $1 in
@PLACES@
    esac
}
_potstill() {
    local current words word command="" option="" i=1 count=0
    read -ra words <<<"${COMP_LINE:0:COMP_POINT}"
    [[ ${COMP_LINE:0:COMP_POINT} == *[[:space:]] ]] && words+=("")
    current=${words[${#words[@]} - 1]}
    for ((; i < ${#words[@]} - 1; i++)); do
        word=${words[i]}
        if [[ -n $option ]]; then
            option=""
        elif [[ $word == -* ]]; then
            case "$command $word" in
                @TAKING@) option=$word ;;
            esac
        elif [[ -z $command ]]; then
            command=$word
        else
            count=$((count + 1))
        fi
    done
    COMPREPLY=()
    if [[ -n $option ]]; then
        _potstill_place "$command $option"
    elif [[ $current == -* ]]; then
        _potstill_place "$command -"
    elif [[ -z $command ]]; then
        _potstill_offer "@COMMANDS@"
    else
        _potstill_place "$command $count"
    fi
    # The shell replaces what stands after the last : or =, which is its own second argument, and not the whole word.
    local prefix=${current%"$2"}
    for i in "${!COMPREPLY[@]}"; do COMPREPLY[i]=${COMPREPLY[i]#"$prefix"}; done
}
complete -F _potstill potstill"""


def _bash(commands: Mapping[str, _Command], zoo: Sequence[str], keys: Sequence[str]) -> Iterator[str]:
    actions = {
        "folder": "_potstill_paths -d",
        "file": "_potstill_paths -f",
        "model": f'_potstill_offer "{" ".join(zoo)}"; _potstill_paths -f',
        "key": "_potstill_keys",
        "own": ":",
    }

    def action(value: _Value) -> str:
        return f'_potstill_offer "{" ".join(value.choices)}"' if value.kind == "choice" else actions[value.kind]

    places, taking = [], []
    for name, command in commands.items():
        places.append((f'"{name} -"', f'_potstill_offer "{" ".join(command.options)}"'))
        for option, value in command.options.items():
            if value is not None:
                places.append((f'"{name} {option}"', action(value)))
                taking.append(f'"{name} {option}"')
        for i, value in enumerate(command.arguments):
            more = command.repeats and i == len(command.arguments) - 1
            places.append((f'"{name} "[{i}-9]*' if more else f'"{name} {i}"', action(value)))
    places.append(('" -"', '_potstill_offer "-h --help --version"'))
    text = _BASH.replace("@PLACES@", "\n".join(f"        {place}) {what} ;;" for place, what in places))
    yield text.replace("@TAKING@", " | ".join(taking)).replace("@COMMANDS@", " ".join(commands)).replace("@KEYS@", " ".join(keys))


# ------------------------------------------------------------------ zsh


def _zsh(commands: Mapping[str, _Command], zoo: Sequence[str], keys: Sequence[str]) -> Iterator[str]:
    actions = {"folder": "_files -/", "file": "_files", "model": "_potstill_models", "key": "_potstill_keys", "own": " "}

    def action(value: _Value) -> str:
        return f"({' '.join(value.choices)})" if value.kind == "choice" else actions[value.kind]

    yield "#compdef potstill"
    yield '# potstill: completion for zsh. Put this into ~/.zshrc, after compinit: eval "$(potstill completion zsh)"'
    yield f"_potstill_models() {{ compadd -- {' '.join(zoo)}; _files }}"
    yield f"_potstill_keys() {{ compadd -S '' -- {' '.join(keys)} }}"
    yield "_potstill() {"
    yield f"    if (( CURRENT == 2 )); then compadd -- {' '.join(commands)}; return; fi"
    yield "    shift words; (( CURRENT-- ))"
    yield "    case $words[1] in"
    for name, command in commands.items():
        specs = [f"*{option}" if value is None else f"*{option}:value:{action(value)}" for option, value in command.options.items()]
        last = len(command.arguments) - 1
        specs += [f"{'*' if command.repeats and i == last else i + 1}:value:{action(value)}" for i, value in enumerate(command.arguments)]
        yield f"        {name}) _arguments {' '.join(map(shlex.quote, specs))} ;;"
    yield "    esac"
    yield "}"
    yield "compdef _potstill potstill"


# ------------------------------------------------------------------ fish


def _fish(commands: Mapping[str, _Command], zoo: Sequence[str], keys: Sequence[str]) -> Iterator[str]:
    folders = "-a '(__fish_complete_directories)'"
    actions = {"folder": folders, "file": "-F", "model": f"-F -a '{' '.join(zoo)}'", "key": f"-a '{' '.join(keys)}'", "own": ""}

    def action(value: _Value) -> str:
        return f"-a '{' '.join(value.choices)}'" if value.kind == "choice" else actions[value.kind]

    yield "# potstill: completion for fish. Put this into ~/.config/fish/config.fish: potstill completion fish | source"
    yield "complete -c potstill -f"
    for name, command in commands.items():
        help = command.help.replace("\\", "\\\\").replace("'", "\\'")
        yield f"complete -c potstill -n __fish_use_subcommand -a {name} -d '{help}'"
        seen = f"__fish_seen_subcommand_from {name}"
        for option, value in command.options.items():
            flag = f"-l {option[2:]}" if option.startswith("--") else f"-s {option[1:]}"
            takes = "-r" if value and value.kind in ("file", "model") else "-x"  # -x: no files beside what is named
            yield f"complete -c potstill -n '{seen}' {flag}" + (f" {takes} {action(value)}" if value else "")
        for i, value in enumerate(command.arguments):
            more = command.repeats and i == len(command.arguments) - 1
            # The words before the cursor, of which potstill and the command are two; options are counted as well.
            reached = f"test (count (commandline -opc)) {'-ge' if i or more else '-eq'} {i + 2}"
            if value.kind != "own":
                yield f"complete -c potstill -n '{seen}; and {reached}' {action(value)}"
