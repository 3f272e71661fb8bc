"""What a run's folder should hold: each stage lists its files with their digests when it is done, so that damage is found by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import BadInput, BrokenFile, Failed
from .state import fingerprint, read_json, sha256, spoiled_states, write_json
from .synthesize import surrogate

MADE = {
    "train": ("teacher", "train"),
    "calibrate": ("calibrated",),
    "synthesize": ("surrogate", "surrogates"),
    "distill": ("students", "student"),
    "evaluate": ("evaluate", "metrics.json"),
    "report": ("report.html",),
}
"""Files and folders of each stage, in a run's folder."""

_SEAL = "# sha256 "
_MARKS = ("begun.json", "done.json")


def sealed(text: str) -> str:
    """A text of lines with its own digest as a comment in the end."""
    return f"{text}{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n"


def finish(folder: Path, stage: str, content: dict[str, Any]) -> None:
    """Write the mark that a stage is done, with all of its files. Shards of a surrogate are left to its manifest."""
    files = {str(path.relative_to(folder)): sha256(path) for path in _files(folder, stage)}
    whole = content | {"files": files}
    write_json(folder / stage / "done.json", whole | {"sha256": fingerprint(whole)})


def _files(folder: Path, stage: str) -> Iterator[Path]:
    for name in MADE[stage]:
        place = folder / name
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            parts = path.relative_to(folder).parts
            hidden = any(part.startswith(".") for part in parts)
            if path.is_file() and not path.is_symlink() and not hidden and path.name not in _MARKS and path.suffix != ".parquet":
                yield path


def changed(folder: Path, stage: str, names: Sequence[str]) -> str | None:
    """The first of a stage's files, among those of the names or within folders of them, that is gone or not as it was written.

    Nothing where the stage has left no list of its files that can be read: :func:`damage` tells.
    """
    try:
        files: dict[str, str] = read_json(folder / stage / "done.json")["files"]
        ours = {name: digest for name, digest in files.items() if any(Path(name).is_relative_to(own) for own in names)}
        return next((name for name, digest in ours.items() if not (folder / name).is_file() or sha256(folder / name) != digest), None)
    except (BrokenFile, KeyError, TypeError, AttributeError):
        return None


def damage(folder: Path) -> list[str]:
    """Everything in a run's folder that is not as it was written, a line each; none where all is well.

    Raises:
        BadInput: it is no folder of a run.
    """
    if not (folder / "recipe.yaml").is_file() and not any((folder / stage / "begun.json").is_file() for stage in MADE):
        raise BadInput(f"{folder}: no folder of a run; it has no recipe.yaml and no stage was begun in it")
    found = list(_recipe(folder / "recipe.yaml"))
    done = [stage for stage in MADE if (folder / stage / "done.json").exists()]
    for stage in MADE:
        found += _stage(folder, stage)
        later = [name for name in done if [*MADE].index(name) > [*MADE].index(stage)]
        if later and stage not in done and (folder / stage / "begun.json").exists():
            found.append(f"{folder / stage / 'done.json'}: gone, though stage {later[0]} is done")
    for manifest in sorted(folder.rglob("manifest.json")):
        if "state" not in manifest.relative_to(folder).parts and not manifest.is_symlink():
            try:
                surrogate.check(manifest.parent)
            except (BadInput, OSError, Failed) as error:
                found.append(str(error))
    return list(dict.fromkeys(found + spoiled_states(folder / "state")))


def _recipe(path: Path) -> Iterator[str]:
    try:
        text, seal, _ = path.read_text(encoding="utf-8").rpartition(_SEAL)
        if not seal or path.read_text(encoding="utf-8") != sealed(text):
            yield f"{path}: not as it was written"
    except (OSError, ValueError) as error:
        yield f"{path}: cannot be read ({error})"


def _stage(folder: Path, stage: str) -> Iterator[str]:
    begun, done = (folder / stage / name for name in _MARKS)
    if not begun.exists():
        if done.exists():
            yield f"{begun}: gone"
        return
    try:
        mark = read_json(begun)
        if mark["fingerprint"] != fingerprint(mark["depends"]) or set(mark) != {"fingerprint", "depends"}:
            yield f"{begun}: not as it was written"
    except BrokenFile as error:
        yield str(error)
    except (KeyError, TypeError):
        yield f"{begun}: not what potstill wrote there"
    if not done.exists():
        return
    try:
        whole = read_json(done)
        seal, files = whole.pop("sha256"), whole["files"]
        if seal != fingerprint(whole):
            yield f"{done}: not as it was written"
            return
        for name, digest in files.items():
            path = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                yield f"{done}: names {name}, which is no file of the run"
            elif not path.is_file() or path.is_symlink():
                yield f"{path}: gone"
            elif sha256(path) != digest:
                yield f"{path}: not as stage {stage} wrote it"
    except BrokenFile as error:
        yield str(error)
    except (KeyError, TypeError, AttributeError):
        yield f"{done}: not what potstill wrote there"
