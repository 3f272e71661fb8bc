"""The surrogate data set: parquet shards that ``datasets`` reads as images, or as lists of numbers, and a manifest.

They lie in a folder of this machine or on object storage. A run whose shards are elsewhere has their manifest in its own folder, and the
address beside it.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from ..data import Kept, check_rows, check_unpacked, decode
from ..errors import BadInput, BrokenFile, Refused
from ..noise import Noise
from ..ranks import ALONE, Ranks
from ..state import read_json, replacing, sha256, write_json
from ..store import Place, Remote, fetched, is_url, place, sending
from .synthesis import Made, Step

FORMAT = "potstill-surrogate/1"
STORED = "store.json"  # beside a manifest whose shards are elsewhere: where
CLAIM = "identity.json"  # beside shards that are elsewhere: whose they are, from before the first is there

# What the datasets library stores in a parquet file it writes itself, so that it decodes the column as images.
_IMAGE = {"image": {"_type": "Image"}}
_FIELDS = {"image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]), "row": pa.int64()}
# What is no picture: a list of C lists of H lists of W numbers stands for the image.
_VALUES = pa.list_(pa.list_(pa.list_(pa.float32())))
# Of a shard's other columns: labels and texts that its images were made for, and an energy each.
_MORE = {"label": pa.int64(), "prompt": pa.string()}
_ENERGY = "energy."
_READ = 64  # rows of a shard that are in memory as encoded images: a forged one may repeat a large one endlessly


def to_uint8(x: Tensor) -> npt.NDArray[np.uint8]:
    """Images ``(n, C, H, W)`` in [0, 1] to uint8, rounded to nearest."""
    pixels: npt.NDArray[np.uint8] = x.mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
    return pixels


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def shard_name(i: int) -> str:
    """File name of the shard with that number."""
    return f"shard-{i:05d}.parquet"


class Steps:
    """The course of a synthesis, of its first batch: what the report's curves and strips of pictures are made of."""

    def __init__(self, pictures: int = 6, columns: int = 8):
        self._pictures, self._columns = pictures, columns
        self.level: list[float] = []
        self.energy: dict[str, list[float]] = {}
        self.at: list[int] = []
        self.images: list[npt.NDArray[np.uint8]] = []

    def watch(self, step: Step) -> None:
        """Told after each step. One of which it is not told, since no term was active, counts as NaN."""
        for _ in range(step.index - len(self.level)):
            self._add(float("nan"), {})
        self._add(step.level, step.parts)
        if not self.at or step.index % max(1, step.steps // self._columns) == 0 or step.index == step.steps - 1:
            self.at.append(step.index)
            self.images.append(to_uint8(step.images[: self._pictures].float().nan_to_num().clamp(0, 1)))

    def _add(self, level: float, parts: dict[str, Tensor]) -> None:
        self.level.append(level)
        for name, part in parts.items():
            self.energy.setdefault(name, [float("nan")] * (len(self.level) - 1)).append(part.mean().item())
        for values in self.energy.values():
            values += [float("nan")] * (len(self.level) - len(values))

    def save(self, path: Path) -> None:
        """Write an npz file: ``level`` (steps,), ``energy.NAME`` (steps,), ``at`` (shown,), ``images`` (shown, pictures, C, H, W)."""
        arrays: dict[str, Any] = {_ENERGY + name: np.array(values) for name, values in self.energy.items()}
        arrays |= {"level": np.array(self.level), "at": np.array(self.at), "images": np.stack(self.images)}
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)


def write(
    folder: Path,
    synthesis: Callable[[Sequence[int], Noise], Made],
    noise: Noise,
    *,
    n: int,
    batch: int,
    shard: int,
    identity: str,
    source: str,
    pixels: bool = True,
    store: str | None = None,
    steps: Steps | None = None,
    progress: Callable[[int], None] = lambda done: None,
    keep_going: Callable[[], bool] = lambda: True,
    ranks: Ranks = ALONE,
) -> None:
    """Synthesize ``n`` images into shards. Shards that an earlier run of the same identity finished are kept.

    Of several processes, each makes every so many-th shard, and on return all of them are there.

    Args:
        folder: where shards and ``manifest.json`` go; with a store, the manifest and the address alone.
        synthesis: (rows, noise) to the images of those rows, and what is known of them.
        noise: of all images.
        n: images in all.
        batch: images at a time; the images do not depend on it.
        shard: images in a file.
        identity: fingerprint of all that the images depend on.
        source: what made them, for the manifest.
        pixels: whether they are pictures, kept as uint8; other values are kept as float32.
        store: an address for the shards and a copy of the manifest, one shard at a time; its folder is empty, or holds the same images.
        steps: told of the steps of the first batch; kept as ``steps.npz``.
        progress: told the number of images done.
        keep_going: asked before every batch; when it says no, ``KeyboardInterrupt`` is raised. Whole shards stay.
        ranks: the processes that make it.

    Raises:
        BadInput: an image has a value that is not finite.
        Refused: the store holds something else.
        Failed: the store does not take a shard, or does not answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    home = folder if store is None else place(store)
    if store is not None:
        if ranks.first:
            _claim(home, identity, folder)
        ranks.wait()
    paths: list[Place] = []
    sent: dict[Place, str] = {}
    for i, start in enumerate(range(0, n, shard)):
        path = home / shard_name(i)
        paths.append(path)
        if i % ranks.count != ranks.index:
            continue
        rows = range(start, min(start + shard, n))
        if not _is_done(path, identity, len(rows)):
            columns: dict[str, list[Any]] = {}
            for first in range(rows.start, rows.stop, batch):
                if not keep_going():
                    raise KeyboardInterrupt
                part = range(first, min(first + batch, rows.stop))
                made = synthesis(part, noise)
                if not made.images.isfinite().all():
                    raise BadInput("surrogate: the teacher gives NaN or infinite pixels; look at its weights")
                for name, values in _columns(part, made, pixels).items():
                    columns.setdefault(name, []).extend(values)
                progress(part.stop)
            table = _table(columns)
            table = table.replace_schema_metadata({"huggingface": json.dumps(_features(table.schema)), "potstill": identity})
            if steps and steps.level and not i:
                steps.save(folder / "steps.npz")
            with _whole(path, folder) as temporary:
                pq.write_table(table, temporary)
                if isinstance(path, Remote):
                    sent[path] = sha256(temporary)
        progress(rows.stop)
    ranks.wait()
    if ranks.first:
        # What this process has sent itself need not be fetched to be known.
        shards = [{"name": p.name, "sha256": sent.get(p) or sha256(p), "rows": min(shard, n - i * shard)} for i, p in enumerate(paths)]
        manifest = {"format": FORMAT, "source": source, "images": n, "identity": identity, "shards": shards}
        if store is not None:
            with _whole(home / "manifest.json", folder) as temporary:
                write_json(temporary, manifest)
            write_json(folder / STORED, {"url": store})
        write_json(folder / "manifest.json", manifest)
        progress(n)
    ranks.wait()


def _whole(path: Place, folder: Path) -> contextlib.AbstractContextManager[Path]:
    """A temporary path for a file that appears whole or not at all, here or elsewhere."""
    return replacing(path) if isinstance(path, Path) else sending(path, folder)


def _claim(home: Place, identity: str, folder: Path) -> None:
    """Take an empty folder for a surrogate, or go on in one that was taken for the same.

    Raises:
        Refused: something else is there.
    """
    mark, content = home / CLAIM, {"format": FORMAT, "identity": identity}
    if mark.is_file():
        if read_json(mark) != content:
            raise Refused(f"{home}: holds another surrogate; nothing is overwritten: choose another store")
        return
    if home.is_file() or (any(home.iterdir()) if isinstance(home, Path) and home.is_dir() else home.is_dir()):
        raise Refused(f"{home}: holds something that is no surrogate of potstill's; nothing is overwritten: choose another store")
    with _whole(mark, folder) as temporary:
        write_json(temporary, content)


def _columns(rows: Sequence[int], made: Made, pixels: bool) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    if pixels:
        columns["image"] = [{"bytes": _png(p), "path": f"{row:08d}.png"} for row, p in zip(rows, to_uint8(made.images), strict=True)]
    else:
        columns["values"] = made.images.float().tolist()
    columns["row"] = list(rows)
    columns |= {name: values for name, values in (("label", made.labels), ("prompt", made.prompts)) if values is not None}
    return columns | {_ENERGY + name: part.float().tolist() for name, part in made.energies.items()}


def _type(name: str) -> pa.DataType:
    return pa.float32() if name.startswith(_ENERGY) else (_FIELDS | _MORE | {"values": _VALUES})[name]


def _table(columns: dict[str, list[Any]]) -> pa.Table:
    return pa.table({name: pa.array(values, _type(name)) for name, values in columns.items()})


def _features(schema: pa.Schema) -> dict[str, Any]:
    lists: dict[str, Any] = {"dtype": "float32", "_type": "Value"}
    for _ in range(3):
        lists = {"feature": lists, "_type": "Sequence"}
    special = _IMAGE | {"values": lists}
    plain = {f.name: {"dtype": str(f.type).replace("float", "float32"), "_type": "Value"} for f in schema if f.name not in special}
    return {"info": {"features": {f.name: special.get(f.name) or plain[f.name] for f in schema}}}


def _is_ours(schema: pa.Schema) -> bool:
    known = {*_FIELDS, *_MORE, "values"}
    names = schema.names
    if len(set(names)) < len(names):
        return False
    whole = "row" in names and ("image" in names) != ("values" in names)
    return whole and all((n in known or n.startswith(_ENERGY)) and schema.field(n).type == _type(n) for n in names)


def _is_done(path: Place, identity: str, rows: int) -> bool:
    try:
        with path.open("rb") as file:
            try:
                metadata = pq.read_metadata(file)
            except pa.ArrowException:
                return False
    except OSError:
        return False
    return metadata.num_rows == rows and (metadata.metadata or {}).get(b"potstill") == identity.encode()


def _home(folder: Place) -> Place:
    """Where the shards of a manifest in that folder are."""
    path = folder / STORED
    if isinstance(path, Remote) or not path.exists():  # an address leads no further
        return folder
    found = read_json(path)
    url = found.get("url") if isinstance(found, dict) else None
    if not isinstance(url, str) or not is_url(url):
        raise BrokenFile(f"{path}: the address of a storage is expected in it")
    return place(url)


def _shards(folder: Place) -> Iterator[tuple[Place, dict[str, Any]]]:
    path, home = folder / "manifest.json", _home(folder)
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not isinstance(manifest.get("shards"), list):
        raise BrokenFile(f"{path}: not a manifest of format {FORMAT}")
    for i, entry in enumerate(manifest["shards"]):
        # The name is built, not read: a manifest from elsewhere cannot point outside its folder.
        if not isinstance(entry, dict) or entry.get("name") != shard_name(i):
            raise BrokenFile(f"{path}: shard {i} should be named {shard_name(i)}")
        yield home / shard_name(i), entry


def _checked(folder: Place) -> Iterator[tuple[Place, Path, dict[str, Any]]]:
    """Each shard, and the file that it can be read from until the next one is asked for."""
    with contextlib.ExitStack() as stack:
        beside = folder if isinstance(folder, Path) else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for path, entry in _shards(folder):
            if not path.is_file() or path.is_symlink():
                raise BrokenFile(f"{path}: no such file")
            with fetched(path, beside) as file:
                if sha256(file) != entry.get("sha256"):
                    raise BrokenFile(f"{path}: not the file that the manifest describes")
                yield path, file, entry


def _cells(path: Place, file: Path, entry: dict[str, Any], wanted: Callable[[str], bool]) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Those columns of a shard, a few rows at a time, with the number of the first of them."""
    try:
        with pq.ParquetFile(file) as shard:
            rows, schema = shard.metadata.num_rows, shard.schema_arrow
            if not _is_ours(schema) or rows != entry.get("rows"):
                raise BrokenFile(f"{path}: not a shard of {entry.get('rows')} images; {rows} rows of {', '.join(schema.names)}")
            check_rows(rows, file.stat().st_size, str(path))
            first, names = 0, [name for name in schema.names if wanted(name)]
            for part in shard.iter_batches(_READ, columns=names) if names else ():
                yield first, {name: part.column(name).to_pylist() for name in names}
                first += part.num_rows
    except BadInput:
        raise
    except (pa.ArrowException, ValueError, OSError) as error:
        raise BrokenFile(f"{path}: not a parquet shard ({(str(error).splitlines() or [type(error).__name__])[0]})") from None


def read(folder: str | Path | Remote) -> Kept:
    """All images of a surrogate, ``(n, C, H, W)`` uint8, or float32 where they are no pictures, each shard checked against the manifest.

    Those that come from a storage are kept in a nameless file on this machine's disk, and need not fit in its memory.

    Args:
        folder: with the manifest: a path, or an address such as ``s3://bucket/folder``.

    Raises:
        BrokenFile: a shard is missing, changed, or no shard of ours; or the manifest is not one.
        BadInput: an image is corrupt or of another size; the address cannot be used.
        Failed: the storage does not answer.
    """
    source = place(folder)
    if isinstance(_home(source), Remote):
        return _on_disk(parts(source), source)
    found: list[Any] = list(parts(source))
    if not found:
        raise BrokenFile(f"{source}: a surrogate without images")
    return found[0] if len(found) == 1 else np.concatenate(found)


def parts(folder: str | Path | Remote) -> Iterator[Kept]:
    """The images of a surrogate, one shard at a time. Arguments and errors are those of :func:`read`."""
    first: Kept | None = None
    unpacked = packed = 0
    for path, file, entry in _checked(place(folder)):
        packed += file.stat().st_size
        images: list[npt.NDArray[Any]] = []
        for row, cells in _cells(path, file, entry, lambda name: name in ("image", "values")):
            shape = first.shape[1:] if first is not None else images[0].shape if images else None
            found = _values(cells["values"], path, shape) if "values" in cells else _decoded(cells["image"], path, row, shape)
            for image in found:
                images.append(image)
                unpacked += image.nbytes
                check_unpacked(unpacked, packed, str(folder))
        if not images:
            continue
        part = np.stack(images)
        if first is not None and part.dtype != first.dtype:
            raise BrokenFile(f"{path}: {part.dtype}, others are {first.dtype}")
        first = part if first is None else first
        yield part


def _on_disk(found: Iterator[Kept], source: Place) -> Kept:
    first, n = None, 0
    with tempfile.TemporaryFile(dir=source if isinstance(source, Path) else None) as file:
        for part in found:
            file.write(np.ascontiguousarray(part).data)
            first, n = (part[:1] if first is None else first), n + len(part)
        if first is None:
            raise BrokenFile(f"{source}: a surrogate without images")
        file.flush()
        # Copied on write, for torch takes no array that cannot be written.
        kept: Kept = np.memmap(file, first.dtype, "c", shape=(n, *first.shape[1:]))
        return kept


def _decoded(cells: list[Any], path: Place, first: int, shape: tuple[int, ...] | None) -> Iterator[npt.NDArray[np.uint8]]:
    for row, cell in enumerate(cells, first):
        where = f"{path}, row {row}"
        if cell is None or cell["bytes"] is None:
            raise BrokenFile(f"{where}: no image")
        image = decode(cell["bytes"], where)
        shape = image.shape if shape is None else shape
        if image.shape != shape:
            raise BadInput(f"{where}: image of shape {image.shape}, others are {shape}")
        yield image


def _values(cells: list[Any], path: Place, shape: tuple[int, ...] | None) -> npt.NDArray[np.float32]:
    try:
        values = np.array(cells, dtype=np.float32)
    except (ValueError, TypeError):  # lists of unequal length, or nothing where a number should be
        raise BrokenFile(f"{path}: values of unequal shapes") from None
    if values.ndim != 4 or not np.isfinite(values).all() or shape not in (None, values.shape[1:]):
        raise BrokenFile(f"{path}: values of shape {values.shape}; finite ones of one shape (C, H, W) are expected")
    return values


def columns(folder: str | Path | Remote) -> dict[str, list[Any]]:
    """What is known of a surrogate's images beside their pixels: ``label``, ``prompt`` and ``energy.NAME``, where they are.

    Raises:
        BrokenFile: as :func:`read`.
    """
    found: dict[str, list[Any]] = {}
    for path, file, entry in _checked(place(folder)):
        for _, cells in _cells(path, file, entry, lambda name: name not in _FIELDS and name != "values"):
            for name, values in cells.items():
                found.setdefault(name, []).extend(values)
    return found


def missing(folder: Path) -> Path | None:
    """The first shard that the manifest names and that is not there, if any. A storage is not asked: what it holds is looked at when read.

    Raises:
        BrokenFile: the manifest is none.
    """
    return next((path for path, _ in _shards(folder) if isinstance(path, Path) and not path.exists()), None)


def check(folder: str | Path | Remote) -> None:
    """See that every shard is the one that the manifest describes, without decoding it.

    Raises:
        BrokenFile: one is not, is missing, or the manifest is none.
        Failed: the storage does not answer.
    """
    for _ in _checked(place(folder)):
        pass


def digest(folder: Path) -> str:
    """Hex digest of the manifest, which holds that of every shard."""
    return sha256(folder / "manifest.json")
