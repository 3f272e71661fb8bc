"""The surrogate data set on disk: parquet shards that ``datasets`` reads as images, or as lists of numbers, and a manifest."""

from __future__ import annotations

import io
import json
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
from ..errors import BadInput, BrokenFile
from ..noise import Noise
from ..ranks import ALONE, Ranks
from ..state import read_json, replacing, sha256, write_json
from .synthesis import Made, Step

FORMAT = "potstill-surrogate/1"

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
    steps: Steps | None = None,
    progress: Callable[[int], None] = lambda done: None,
    keep_going: Callable[[], bool] = lambda: True,
    ranks: Ranks = ALONE,
) -> None:
    """Synthesize ``n`` images into shards. Shards that an earlier run of the same identity finished are kept.

    Of several processes, each makes every so many-th shard, and on return all of them are there.

    Args:
        folder: where shards and ``manifest.json`` go.
        synthesis: (rows, noise) to the images of those rows, and what is known of them.
        noise: of all images.
        n: images in all.
        batch: images at a time; the images do not depend on it.
        shard: images in a file.
        identity: fingerprint of all that the images depend on.
        source: what made them, for the manifest.
        pixels: whether they are pictures, kept as uint8; other values are kept as float32.
        steps: told of the steps of the first batch; kept as ``steps.npz``.
        progress: told the number of images done.
        keep_going: asked before every batch; when it says no, ``KeyboardInterrupt`` is raised. Whole shards stay.
        ranks: the processes that make it.

    Raises:
        BadInput: an image has a value that is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for i, start in enumerate(range(0, n, shard)):
        path = folder / shard_name(i)
        names.append(path)
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
            with replacing(path) as temporary:
                pq.write_table(table, temporary)
        progress(rows.stop)
    ranks.wait()
    if ranks.first:
        shards = [{"name": p.name, "sha256": sha256(p), "rows": min(shard, n - i * shard)} for i, p in enumerate(names)]
        write_json(folder / "manifest.json", {"format": FORMAT, "source": source, "images": n, "identity": identity, "shards": shards})
        progress(n)
    ranks.wait()


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


def _is_done(path: Path, identity: str, rows: int) -> bool:
    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException):
        return False
    return metadata.num_rows == rows and (metadata.metadata or {}).get(b"potstill") == identity.encode()


def _shards(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    path = folder / "manifest.json"
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not isinstance(manifest.get("shards"), list):
        raise BrokenFile(f"{path}: not a manifest of format {FORMAT}")
    for i, entry in enumerate(manifest["shards"]):
        # The name is built, not read: a manifest from elsewhere cannot point outside its folder.
        if not isinstance(entry, dict) or entry.get("name") != shard_name(i):
            raise BrokenFile(f"{path}: shard {i} should be named {shard_name(i)}")
        yield folder / shard_name(i), entry


def _checked(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path, entry in _shards(folder):
        if not path.is_file() or path.is_symlink():
            raise BrokenFile(f"{path}: no such file")
        if sha256(path) != entry.get("sha256"):
            raise BrokenFile(f"{path}: not the file that the manifest describes")
        yield path, entry


def _parts(folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[Path, int, dict[str, list[Any]]]]:
    """Those columns of a few rows at a time, with the number of the first in its shard. Each shard is checked against the manifest."""
    for path, entry in _checked(folder):
        try:
            with pq.ParquetFile(path) as shard:
                rows, schema = shard.metadata.num_rows, shard.schema_arrow
                if not _is_ours(schema) or rows != entry.get("rows"):
                    raise BrokenFile(f"{path}: not a shard of {entry.get('rows')} images; {rows} rows of {', '.join(schema.names)}")
                check_rows(rows, path.stat().st_size, str(path))
                first, names = 0, [name for name in schema.names if wanted(name)]
                for part in shard.iter_batches(_READ, columns=names) if names else ():
                    yield path, first, {name: part.column(name).to_pylist() for name in names}
                    first += part.num_rows
        except BadInput:
            raise
        except (pa.ArrowException, ValueError, OSError) as error:
            raise BrokenFile(f"{path}: not a parquet shard ({(str(error).splitlines() or [type(error).__name__])[0]})") from None


def read(folder: Path) -> Kept:
    """All images of a surrogate, ``(n, C, H, W)`` uint8, or float32 where they are no pictures, each shard checked against the manifest.

    Raises:
        BrokenFile: a shard is missing, changed, or no shard of ours; or the manifest is not one.
        BadInput: an image is corrupt or of another size.
    """
    images: list[npt.NDArray[Any]] = []
    unpacked, packed = 0, sum(path.stat().st_size for path, _ in _shards(folder) if path.is_file())
    for path, first, part in _parts(folder, lambda name: name in ("image", "values")):
        if "values" in part:
            images += _values(part["values"], path, images[0].shape if images else None)
            continue
        for row, cell in enumerate(part["image"], first):
            where = f"{path}, row {row}"
            if cell is None or cell["bytes"] is None:
                raise BrokenFile(f"{where}: no image")
            image = decode(cell["bytes"], where)
            if images and image.shape != images[0].shape:
                raise BadInput(f"{where}: image of shape {image.shape}, others are {images[0].shape}")
            images.append(image)
            unpacked += image.nbytes
            check_unpacked(unpacked, packed, str(folder))
    if not images:
        raise BrokenFile(f"{folder}: a surrogate without images")
    return np.stack(images)


def _values(cells: list[Any], path: Path, shape: tuple[int, ...] | None) -> list[npt.NDArray[np.float32]]:
    try:
        values = np.array(cells, dtype=np.float32)
    except (ValueError, TypeError):  # lists of unequal length, or nothing where a number should be
        raise BrokenFile(f"{path}: values of unequal shapes") from None
    if values.ndim != 4 or not np.isfinite(values).all() or shape not in (None, values.shape[1:]):
        raise BrokenFile(f"{path}: values of shape {values.shape}; finite ones of one shape (C, H, W) are expected")
    return list(values)


def columns(folder: Path) -> dict[str, list[Any]]:
    """What is known of a surrogate's images beside their pixels: ``label``, ``prompt`` and ``energy.NAME``, where they are.

    Raises:
        BrokenFile: as :func:`read`.
    """
    found: dict[str, list[Any]] = {}
    for _, _, part in _parts(folder, lambda name: name not in _FIELDS and name != "values"):
        for name, cells in part.items():
            found.setdefault(name, []).extend(cells)
    return found


def missing(folder: Path) -> Path | None:
    """The first shard that the manifest names and that is not there, if any.

    Raises:
        BrokenFile: the manifest is none.
    """
    return next((path for path, _ in _shards(folder) if not path.exists()), None)


def check(folder: Path) -> None:
    """See that every shard is the one that the manifest describes, without decoding it.

    Raises:
        BrokenFile: one is not, is missing, or the manifest is none.
    """
    for _ in _checked(folder):
        pass


def digest(folder: Path) -> str:
    """Hex digest of the manifest, which holds that of every shard."""
    return sha256(folder / "manifest.json")
