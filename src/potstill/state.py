"""Files that survive: atomic writes, hashed folders of tensors, locks. No pickle anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import BadInput, BrokenFile, Locked
from .store import Place

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = "potstill-state/1"
_CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f]")
MAX_LAYERS, MAX_TIMES = 256, 1 << 16
MAX_JSON_BYTES = 1 << 24  # of marks and manifests, which have a line for a tensor or a file; as Python's objects they are 20 times larger

# Every temporary name in a run: of a file, with the process that wrote it; of a folder, with tempfile's eight characters.
_TEMPORARY = re.compile(r"\..+\.(\d+|[a-z0-9_]{8})\.tmp")


def check_plain(path: Place) -> None:
    """See that a path is no pipe, which would be waited for, and no device, which may have no end. What is not there is left to the reader.

    Raises:
        BrokenFile: it is one.
    """
    if not isinstance(path, Path):
        return
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise BrokenFile(f"{path}: a pipe or a device; a file is expected")


def sha256(path: Place) -> str:
    """Hex digest of a file's bytes.

    Raises:
        BrokenFile: it is a pipe or a device.
    """
    check_plain(path)
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


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, with the permissions that a new file has, so that a crash leaves the old file or the new one."""
    temporary.chmod(0o666 & ~_mask())  # safetensors and tempfile write 0600
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


def read_json(path: Place) -> Any:
    """Read JSON.

    Raises:
        BrokenFile: the file is missing, cannot be read, is too large, or is not JSON.
    """
    check_plain(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise BrokenFile(f"{path}: more than {MAX_JSON_BYTES} bytes, which is too much for what should be there")
        return json.loads(data.decode("utf-8"))
    except BrokenFile:
        raise
    except FileNotFoundError:
        raise BrokenFile(f"{path}: no such file") from None
    except OSError as error:
        raise BrokenFile(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise BrokenFile(f"{path}: not JSON ({error})") from None


def read_description(path: Path) -> dict[str, Any]:
    """The JSON in which somebody else's library describes a network or a schedule, before anything is made of it.

    Raises:
        BrokenFile: it cannot be read, is no mapping, has control characters, which the library might show on the terminal, or describes
            more layers, blocks or times than there are anywhere: making them one by one would take hours.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise BrokenFile(f"{path}: a mapping is expected")
    for key, value in _pairs(found):
        if _CONTROL.search(f"{key}{value if isinstance(value, str) else ''}"):
            raise BrokenFile(f"{path}: {key!r} has control characters in it")
        if ("layers" in key or "depth" in key) and isinstance(value, (int, float)) and value > MAX_LAYERS:
            raise BrokenFile(f"{path}: {key} is {value:g}; at most {MAX_LAYERS} are read")
        if "block" in key and isinstance(value, list) and len(value) > MAX_LAYERS:
            raise BrokenFile(f"{path}: {key} has {len(value)} entries; at most {MAX_LAYERS} are read")
        if "timesteps" in key and isinstance(value, (int, float)) and value > MAX_TIMES:
            raise BrokenFile(f"{path}: {key} is {value:g}; at most {MAX_TIMES} are read")
    return found


def _pairs(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value within plain data with the key that it, or the list that it is in, stands under."""
    yield key, tree
    for name, value in tree.items() if isinstance(tree, dict) else [(key, v) for v in tree] if isinstance(tree, list) else ():
        yield from _pairs(value, name)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        BrokenFile: it is missing, truncated, or something else, such as a pickle.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    check_plain(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BrokenFile(f"{path}: no such file") from None
    except IsADirectoryError:
        raise BrokenFile(f"{path}: a folder, not a safetensors file") from None
    except OSError as error:
        raise BrokenFile(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return dict(load(data))
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        # Only now: a safetensors file begins with its header's length, which may be the same two bytes.
        if data[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise BrokenFile(f"{path}: a pickled checkpoint, which can run code when it is read; convert it to safetensors") from None
        raise BrokenFile(f"{path}: not a whole safetensors file ({error})") from None


def check_weights(tensors: Mapping[str, Tensor], net: nn.Module, path: str | Path) -> None:
    """See that tensors are the weights of a network, by name, shape and kind, and finite.

    Raises:
        BadInput: they are not; it names the first five that are missing or unknown, with their shapes.
    """
    expected = net.state_dict()
    # BatchNorm's counter of batches, which older checkpoints lack, has no part in what a network computes.
    needed = {name for name in expected if not name.endswith("num_batches_tracked")}
    missing, extra = sorted(needed - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        parts = [_listed(*part) for part in (("lacks", missing, expected), ("has unknown", extra, tensors)) if part[1]]
        raise BadInput(f"{path}: not the weights of this {type(net).__name__}: it {' and '.join(parts)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise BadInput(f"{path}: {name} is {tuple(tensor.shape)}, but this {type(net).__name__} has {tuple(expected[name].shape)}")
        if tensor.is_floating_point() != expected[name].is_floating_point() or tensor.is_complex():
            raise BadInput(f"{path}: {name} is {tensor.dtype}, but this {type(net).__name__} has {expected[name].dtype}")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():  # 8-bit floats have no isfinite of their own
            raise BadInput(f"{path}: {name} holds NaN or infinite values")


def _listed(what: str, names: Sequence[str], tensors: Mapping[str, Tensor]) -> str:
    """The first five of those tensors, with their shapes, and how many more there are."""
    first = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names[:5])
    return f"{what} {first}{f' and {len(names) - 5} more' if len(names) > 5 else ''}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        OSError: it cannot be written, such as on a full disk.
    """
    with replacing(path) as temporary:
        save_tensors(tensors, temporary, metadata)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, as it comes. Tensors that share memory, such as tied weights, are written each in full.

    Raises:
        OSError: it cannot be written; safetensors has an exception of its own for that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(plain_tensors(tensors), path, metadata)
    except SafetensorError as error:
        raise os_error(error, path) from None


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What safetensors can hold: on the CPU, contiguous, no two in the same memory."""
    plain, memory = {}, set()
    for name, tensor in tensors.items():
        plain[name] = tensor.detach().cpu().contiguous()
        if (address := plain[name].untyped_storage().data_ptr()) in memory:
            plain[name] = plain[name].clone()
        memory.add(address)
    return plain


def os_error(error: Exception, path: Path) -> OSError:
    """The system's error that safetensors or pyarrow tells of in a text, such as "No space left on device (os error 28)"."""
    number = re.search(r"(?:os error|errno) (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else OSError(f"{path}: {error}")


def sweep(folder: Path) -> None:
    """Remove the temporary files and folders that killed processes left. Only for a folder in which nothing else is at work."""
    for path in [p for p in folder.rglob(".*.tmp") if _TEMPORARY.fullmatch(p.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that becomes it when the block ends well. The name must be free.

    Raises:
        FileExistsError: ``folder`` is there already and not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        yield temporary
        mask = _mask()
        for path in [*temporary.rglob("*"), temporary]:
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
            _flush(path)
        os.replace(temporary, folder)
        _flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _split(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The tree as JSON, its tensors moved to ``tensors``, each under a name that nothing else has."""
    import torch

    if isinstance(tree, torch.Tensor):
        name = path
        while name in tensors:  # {1: a, "1": b} and {"a/b": a, "a": {"b": b}} give one path to two
            name += "+"
        tensors[name] = tree
        return {"$tensor": name}
    if isinstance(tree, dict):
        for key in tree:
            if not (key is None or isinstance(key, (bool, int, float, str))):
                raise TypeError(f"cannot save the key {key!r} at {path!r}: only numbers and strings")
        return {"$dict": [[key, _split(value, f"{path}/{key}", tensors)] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        items = [_split(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]
        return items if isinstance(tree, list) else {"$tuple": items}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"cannot save a {type(tree).__name__} at {path!r}: only tensors, numbers, strings, dicts and lists")


def _join(tensors: dict[str, Tensor], skeleton: Any) -> Any:
    if isinstance(skeleton, dict):
        if "$tensor" in skeleton:
            return tensors[skeleton["$tensor"]]
        if "$tuple" in skeleton:
            return tuple(_join(tensors, value) for value in skeleton["$tuple"])
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
        """Write the state of ``step`` whole or not at all: a nest of dicts, lists and tuples of tensors, numbers and strings."""
        tensors: dict[str, Tensor] = {}
        skeleton = _split(tree, "", tensors)
        target = self.folder / f"step-{step:08d}"
        if target.exists():
            shutil.rmtree(target)
        with new_folder(target) as temporary:
            save_tensors(tensors, temporary / "state.safetensors")
            digest = sha256(temporary / "state.safetensors")
            manifest = {"format": FORMAT, "step": step, "files": {"state.safetensors": digest}, "state": skeleton}
            manifest["sha256"] = fingerprint(manifest)
            (temporary / "manifest.json").write_text(
                json.dumps(manifest), encoding="utf-8"
            )  # on one line: indenting takes ten times as long
        for old in self._steps()[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)

    def load(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest state that is whole, or ``None``; and what was wrong with each newer one."""
        complaints: list[str] = []
        for folder in reversed(self._steps()):
            try:
                return _whole(folder), complaints
            except (BrokenFile, OSError) as error:
                complaints.append(str(error))
        return None, complaints

    def clear(self) -> None:
        """Remove all of them, when what they led to is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[Path]:
        found = [p for p in self.folder.glob("step-*") if p.name[5:].isdecimal()] if self.folder.is_dir() else []
        return sorted(found, key=lambda p: int(p.name[5:]))


def spoiled_states(folder: Path) -> list[str]:
    """What is wrong with each saved state below a folder, a line each."""
    found = []
    for step in sorted(p for p in folder.rglob("step-*") if p.is_dir() and not p.is_symlink()):
        try:
            _whole(step)
        except (BrokenFile, OSError) as error:
            found.append(str(error))
    return found


def _whole(folder: Path) -> dict[str, Any]:
    """The state that was saved in a folder.

    Raises:
        BrokenFile: it is not as it was written.
    """
    try:
        manifest = read_json(folder / "manifest.json")
        if manifest["format"] != FORMAT:
            raise BrokenFile(f"{folder}: format {manifest['format']!r}, not {FORMAT!r}")
        path = folder / "state.safetensors"
        if sha256(path) != manifest["files"]["state.safetensors"]:
            raise BrokenFile(f"{path}: not the file that its manifest describes")
        if manifest.get("sha256") != fingerprint({k: v for k, v in manifest.items() if k != "sha256"}):
            raise BrokenFile(f"{folder / 'manifest.json'}: not as it was written")
        tree: dict[str, Any] = _join(read_tensors(path), manifest["state"])
        return tree
    except BrokenFile:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise BrokenFile(f"{folder / 'manifest.json'}: not a manifest of format {FORMAT} ({error!r})") from None


@contextlib.contextmanager
def lock(path: Path, wait_seconds: float = 0.0, what: str = "", keep_going: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Hold a file lock, which the system lets go when the process dies, however it dies. The empty file stays.

    Args:
        path: of the file.
        wait_seconds: how long to wait for another process that holds it.
        what: is locked, for the error; by default the file's folder.
        keep_going: asked while waiting; when it says no, ``KeyboardInterrupt`` is raised.

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
                if not keep_going():
                    raise KeyboardInterrupt from None
                if time.monotonic() >= deadline:
                    raise Locked(f"{what or path.parent}: another potstill process is working in this folder") from None
                time.sleep(0.1)
        yield


def check_unlocked(path: Path, what: str) -> None:
    """See that nobody holds a :func:`lock`; nothing is written.

    Raises:
        Locked: another process does.
    """
    try:
        import fcntl
    except ImportError:
        return
    if not path.exists():
        return
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Locked(f"{what}: another potstill process is working in this folder") from None


def digest_of(net: nn.Module) -> str:
    """Hex digest of a network's class and state."""
    import torch

    hasher = hashlib.sha256(type(net).__name__.encode())
    for name, tensor in sorted(net.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()
