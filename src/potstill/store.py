"""Folders by their address: on this machine, or on object storage through fsspec. What an address may be is checked here.

An address never holds a secret: credentials and endpoints come from the environment, as the storage's own package reads them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .errors import BadInput, Failed, redacted

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# What each kind of storage takes beside fsspec; the user installs it.
PACKAGES = {"file": None, "memory": None, "s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub"}

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def is_url(path: str) -> bool:
    """Whether a text is an address with a protocol, rather than a path on this machine."""
    return _URL.match(path) is not None or ("::" in path and "://" in path)


def checked(url: str) -> str:
    """See that an address is one that can be used, without asking for anything there.

    Raises:
        ValueError: it is not. The address itself is not repeated, for it may hold a secret.
    """
    found = _URL.fullmatch(url)
    known = ", ".join(f"{name}://" for name in PACKAGES)
    if found is None or "::" in url:
        raise ValueError(f"an address of one storage is expected, such as s3://bucket/folder; known are {known}")
    protocol, rest = found[1], found[2]
    bucket, _, path = rest.partition("/")
    if protocol in ("http", "https"):
        raise ValueError(f"{protocol}:// is no storage that can be listed and written; known are {known}")
    if protocol not in PACKAGES:
        raise ValueError(f"{protocol[:20]}:// is no storage that is known; known are {known}")
    if "@" in rest or ":" in bucket:
        raise ValueError(f"no user, password or port within an address; {protocol}:// takes its credentials from the environment")
    if "?" in rest or "#" in rest:
        raise ValueError("no ? or # within an address, where tokens travel; credentials come from the environment")
    if protocol == "file":
        if bucket or not path:
            raise ValueError("three slashes and a path are expected after file:")
    elif not _BUCKET.fullmatch(bucket):
        raise ValueError(f"the name of a bucket or folder is expected after {protocol}://")
    if (
        not rest.isprintable()
        or re.search(r"[\\*\[\]]", rest)
        or any(part in ("", ".", "..") for part in path.rstrip("/").split("/") if path)
    ):
        raise ValueError("plain names between single slashes are expected in an address")
    return url.rstrip("/")


@contextlib.contextmanager
def _asked(place: object) -> Iterator[None]:
    """One error for whatever a storage's own package raises.

    Raises:
        Failed: it is not a missing file.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(2, "no such file", str(place)) from None
    except (BadInput, Failed, MemoryError):
        raise
    except Exception as error:  # each package has its own
        said = redacted((str(error).splitlines() or [""])[0])
        raise Failed(f"{place}: the storage does not answer as it should ({type(error).__name__}{': ' if said else ''}{said})") from None


@dataclass(frozen=True)
class Remote:
    """A file or folder on object storage, with those methods of :class:`pathlib.Path` that reading takes.

    Args:
        url: checked.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def protocol(self) -> str:
        return self.url.partition(":")[0]

    @property
    def _files(self) -> AbstractFileSystem:
        import fsspec

        # The files of memory:// are of this process; those of others may have been changed by anyone since they were listed.
        options: dict[str, Any] = {} if self.protocol == "memory" else {"use_listings_cache": False}
        try:
            return fsspec.filesystem(self.protocol, **options)
        except ImportError:
            package = PACKAGES[self.protocol]
            raise BadInput(f"{self.url}: {self.protocol}:// needs {package}; install it: pip install {package}") from None

    def is_file(self) -> bool:
        with _asked(self):
            return bool(self._files.isfile(self.url))

    def is_dir(self) -> bool:
        with _asked(self):
            return bool(self._files.isdir(self.url))

    def exists(self) -> bool:
        with _asked(self):
            return bool(self._files.exists(self.url))

    def is_symlink(self) -> bool:
        return False

    def read_bytes(self) -> bytes:
        with _asked(self):
            return bytes(self._files.cat_file(self.url))

    def read_text(self, encoding: str) -> str:
        return self.read_bytes().decode(encoding)

    @contextlib.contextmanager
    def open(self, mode: str = "rb") -> Iterator[Any]:
        """The file, to be read in any order: only what is asked for is fetched. What the block raises counts as the storage's."""
        with _asked(self), self._files.open(self.url, mode) as file:
            yield file

    def fetch(self, path: Path) -> None:
        """Copy the file to this machine."""
        with _asked(self):
            self._files.get_file(self.url, str(path))

    def put(self, path: Path) -> None:
        """Copy a file from this machine. A storage shows an object whole or not at all."""
        with _asked(self):
            self._files.put_file(str(path), self.url)
            if self._files.size(self.url) != path.stat().st_size:
                raise Failed(f"{self.url}: {self._files.size(self.url)} bytes have arrived of {path.stat().st_size}")

    def find(self) -> list[tuple[PurePosixPath, Remote]]:
        """Every file below this folder, with its path from here, in the order in which paths sort."""
        with _asked(self):
            files = self._files
            top = str(files._strip_protocol(self.url)).rstrip("/") + "/"
            names = [str(key)[len(top) :] for key in files.find(self.url) if str(key).startswith(top)]
        return sorted((PurePosixPath(name), self / name) for name in names)


Place = Path | Remote


def place(path: str | Path | Remote) -> Place:
    """What a path or an address stands for; ``file://`` is a path like any other.

    Raises:
        BadInput: an address cannot be used.
    """
    if isinstance(path, Remote):
        return path
    if isinstance(path, Path) or not is_url(path):
        return Path(path).expanduser()
    try:
        url = checked(path)
    except ValueError as error:
        raise BadInput(f"{redacted(path)[:80]}: {error}") from None
    return Path(url.removeprefix("file://")) if url.startswith("file://") else Remote(url)


@contextlib.contextmanager
def fetched(file: Place, beside: Path) -> Iterator[Path]:
    """A file on this machine for as long as the block lasts: itself, or a copy of one that is elsewhere.

    Args:
        file: to be had.
        beside: an existing folder for the copy.
    """
    if isinstance(file, Path):
        yield file
        return
    copy = beside / f".{file.name}.{os.getpid()}.tmp"
    try:
        file.fetch(copy)
        yield copy
    finally:
        copy.unlink(missing_ok=True)


@contextlib.contextmanager
def sending(file: Remote, beside: Path) -> Iterator[Path]:
    """A temporary path on this machine; what is there when the block ends well is copied to the storage."""
    beside.mkdir(parents=True, exist_ok=True)
    copy = beside / f".{file.name}.{os.getpid()}.tmp"
    try:
        yield copy
        file.put(copy)
    finally:
        copy.unlink(missing_ok=True)
