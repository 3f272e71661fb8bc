"""Files that survive: atomic writes, hashed folders of tensors, locks. No pickle anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BrokenFile, Locked

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "potstill-state/1"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """Hex digest of anything that JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _flush(path: Path) -> None:
    # A rename is only durable when the folder that holds the name is flushed too.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, with the permissions that a new file has, so that a crash leaves the old file or the new one."""
    mask = os.umask(0)
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)  # safetensors and tempfile write 0600
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes ``path`` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON whole or not at all. NaN is refused: other programs could not read it."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        BrokenFile: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BrokenFile(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BrokenFile(f"{path}: not JSON ({error})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        BrokenFile: it is missing, truncated, or something else, such as a pickle.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BrokenFile(f"{path}: no such file") from None
    except IsADirectoryError:
        raise BrokenFile(f"{path}: a folder, not a safetensors file") from None
    if data[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        raise BrokenFile(f"{path}: a pickled checkpoint, which can run code when it is read; convert it to safetensors")
    try:
        return dict(load(data))
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise BrokenFile(f"{path}: not a whole safetensors file ({error})") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, metadata)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that becomes it when the block ends well. The name must be free.

    Raises:
        FileExistsError: ``folder`` is there already and not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        os.replace(temporary, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _split(tree: Any, prefix: str) -> tuple[dict[str, Tensor], Any]:
    import torch

    if isinstance(tree, torch.Tensor):
        return {prefix: tree.detach().cpu().contiguous()}, {"$tensor": prefix}
    if isinstance(tree, dict):
        parts = [(key, *_split(value, f"{prefix}/{key}")) for key, value in tree.items()]
        return {n: t for _, tensors, _ in parts for n, t in tensors.items()}, {"$dict": [[key, skeleton] for key, _, skeleton in parts]}
    if isinstance(tree, (list, tuple)):
        children = [_split(value, f"{prefix}/{i}") for i, value in enumerate(tree)]
        return {n: t for tensors, _ in children for n, t in tensors.items()}, [skeleton for _, skeleton in children]
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return {}, tree
    raise TypeError(f"cannot save a {type(tree).__name__} at {prefix!r}: only tensors, numbers, strings, dicts and lists")


def _join(tensors: dict[str, Tensor], skeleton: Any) -> Any:
    if isinstance(skeleton, dict):
        if "$tensor" in skeleton:
            return tensors[skeleton["$tensor"]]
        return {key: _join(tensors, value) for key, value in skeleton["$dict"]}
    if isinstance(skeleton, list):
        return [_join(tensors, value) for value in skeleton]
    return skeleton


class States:
    """The states of one training run: ``folder/step-00000200/{state.safetensors, manifest.json}``.

    The newest two are kept, so that one that a crash or a disk has spoiled leaves the one before it.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self._keep = folder, keep

    def save(self, step: int, tree: dict[str, Any]) -> None:
        """Write the state of ``step`` whole or not at all: a nest of dicts and lists of tensors, numbers and strings."""
        from safetensors.torch import save_file

        tensors, skeleton = _split(tree, "")
        target = self.folder / f"step-{step:08d}"
        if target.exists():
            shutil.rmtree(target)
        with new_folder(target) as temporary:
            save_file(tensors, temporary / "state.safetensors")
            digest = sha256(temporary / "state.safetensors")
            manifest = {"format": FORMAT, "step": step, "files": {"state.safetensors": digest}, "state": skeleton}
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for old in self._steps()[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest state that is whole, or ``None``; and what was wrong with each newer one."""
        complaints: list[str] = []
        for folder in reversed(self._steps()):
            try:
                manifest = read_json(folder / "manifest.json")
                if manifest["format"] != FORMAT:
                    raise BrokenFile(f"{folder}: format {manifest['format']!r}, not {FORMAT!r}")
                path = folder / "state.safetensors"
                if sha256(path) != manifest["files"]["state.safetensors"]:
                    raise BrokenFile(f"{path}: not the file that its manifest describes")
                return _join(read_tensors(path), manifest["state"]), complaints
            except (BrokenFile, OSError, KeyError, TypeError) as error:
                complaints.append(str(error))
        return None, complaints

    def clear(self) -> None:
        """Remove all of them, when what they led to is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []


@contextlib.contextmanager
def lock(path: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold a file lock, which the system lets go when the process dies, however it dies.

    Raises:
        Locked: another process holds it for longer than ``wait_seconds``.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows, where a second run in one folder is then not noticed
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Locked(f"{path.parent}: another potstill process is working in this folder") from None
                time.sleep(0.1)
        yield
