"""The surrogate data set on disk: parquet shards that ``datasets`` reads as images, and a manifest."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from ..data import decode
from ..errors import BadInput, BrokenFile
from ..noise import Noise
from ..state import read_json, replacing, sha256, write_json

FORMAT = "potstill-surrogate/1"

# What the datasets library stores in a parquet file it writes itself, so that it decodes the column as images.
_FEATURES = {"info": {"features": {"image": {"_type": "Image"}, "row": {"dtype": "int64", "_type": "Value"}}}}
_SCHEMA = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("row", pa.int64())])


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


def write(
    folder: Path,
    synthesizer: Callable[[int, Noise], Tensor],
    noise: Noise,
    *,
    n: int,
    batch: int,
    shard: int,
    identity: str,
    source: str,
    progress: Callable[[int], None] = lambda done: None,
    keep_going: Callable[[], bool] = lambda: True,
) -> None:
    """Synthesize ``n`` images into shards. Shards that an earlier run of the same identity finished are kept.

    Args:
        folder: where shards and ``manifest.json`` go.
        synthesizer: (number of images, noise addressed by their rows) to images ``(n, C, H, W)`` in [0, 1].
        noise: image ``i`` is row ``i`` of it.
        n: images in all.
        batch: images at a time; the images do not depend on it.
        shard: images in a file.
        identity: fingerprint of all that the images depend on.
        source: what made them, for the manifest.
        progress: told the number of images done.
        keep_going: asked before every batch; when it says no, ``KeyboardInterrupt`` is raised. Whole shards stay.

    Raises:
        BadInput: the synthesizer gave a value that is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for i, start in enumerate(range(0, n, shard)):
        path = folder / shard_name(i)
        names.append(path)
        rows = range(start, min(start + shard, n))
        if not _is_done(path, identity, len(rows)):
            images: list[dict[str, Any]] = []
            for first in range(rows.start, rows.stop, batch):
                if not keep_going():
                    raise KeyboardInterrupt
                part = range(first, min(first + batch, rows.stop))
                x = synthesizer(len(part), noise.at(part))
                if not x.isfinite().all():
                    raise BadInput("surrogate: the teacher gives NaN or infinite pixels; look at its weights")
                images += [{"bytes": _png(p), "path": f"{row:08d}.png"} for row, p in zip(part, to_uint8(x), strict=True)]
                progress(part.stop)
            table = pa.Table.from_arrays([pa.array(images, _SCHEMA.field("image").type), pa.array(list(rows), pa.int64())], schema=_SCHEMA)
            table = table.replace_schema_metadata({"huggingface": json.dumps(_FEATURES), "potstill": identity})
            with replacing(path) as temporary:
                pq.write_table(table, temporary)
        progress(rows.stop)
    shards = [{"name": p.name, "sha256": sha256(p), "rows": min(shard, n - i * shard)} for i, p in enumerate(names)]
    write_json(folder / "manifest.json", {"format": FORMAT, "source": source, "images": n, "identity": identity, "shards": shards})


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


def read(folder: Path) -> npt.NDArray[np.uint8]:
    """All images of a surrogate, ``(n, C, H, W)`` uint8, each shard checked against the manifest.

    Raises:
        BrokenFile: a shard is missing, changed, or no shard of ours; or the manifest is not one.
        BadInput: an image is corrupt or of another size.
    """
    images: list[npt.NDArray[np.uint8]] = []
    for path, entry in _shards(folder):
        if not path.is_file() or path.is_symlink():
            raise BrokenFile(f"{path}: no such file")
        if sha256(path) != entry.get("sha256"):
            raise BrokenFile(f"{path}: not the file that the manifest describes")
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, ValueError, OSError) as error:
            raise BrokenFile(f"{path}: not a parquet shard ({str(error).splitlines()[0]})") from None
        if not table.schema.equals(_SCHEMA) or table.num_rows != entry.get("rows"):
            raise BrokenFile(f"{path}: not a shard of {entry.get('rows')} images; {table.num_rows} rows of {', '.join(table.schema.names)}")
        for row, cell in enumerate(table["image"].to_pylist()):
            where = f"{path}, row {row}"
            if cell is None or cell["bytes"] is None:
                raise BrokenFile(f"{where}: no image")
            image = decode(cell["bytes"], where)
            if images and image.shape != images[0].shape:
                raise BadInput(f"{where}: image of shape {image.shape}, others are {images[0].shape}")
            images.append(image)
    if not images:
        raise BrokenFile(f"{folder}: a surrogate without images")
    return np.stack(images)


def digest(folder: Path) -> str:
    """Hex digest of the manifest, which holds that of every shard."""
    return sha256(folder / "manifest.json")
