"""Real images from disk, checked: every one of the same size and mode, none corrupt, none missing.

Everything that is read is data from outside: a wrong file ends in one :class:`~potstill.errors.BadInput` that names it.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .config import DigitsData, FileData
from .errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MAX_PIXELS = 4096 * 4096


@dataclass(frozen=True)
class Split:
    """Images ``(n, C, H, W)`` uint8, and their labels ``(n,)`` where there are some."""

    images: Pixels
    labels: Labels | None

    def digest(self) -> str:
        """Hex digest of the pixels and labels."""
        hasher = hashlib.sha256(repr(self.images.shape).encode())
        hasher.update(np.ascontiguousarray(self.images).data)
        if self.labels is not None:
            hasher.update(np.ascontiguousarray(self.labels).data)
        return hasher.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Training images and held-out ones."""

    name: str
    train: Split
    test: Split


def decode(data: bytes, where: str, mode: str | None = None, size: int | None = None) -> npt.NDArray[np.uint8]:
    """One encoded image to ``(C, H, W)`` uint8.

    Args:
        data: the bytes of a png, jpg, webp or bmp file.
        where: what to call it in an error.
        mode: "L" or "RGB" to convert to; without it, another mode than these is an error.
        size: side to resize to, if any.

    Raises:
        BadInput: it is corrupt, too large, animated, or of another mode.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP", "BMP")) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadInput(f"{where}: {image.width}x{image.height} pixels; at most {MAX_PIXELS} are read")
                if getattr(image, "n_frames", 1) > 1:
                    raise BadInput(f"{where}: animated; one picture is expected")
                image.load()
                return _pixels(image, where, mode, size)
    except BadInput:
        raise
    except (UnidentifiedImageError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadInput(f"{where}: not an image that can be read ({error})") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        raise BadInput(f"{where}: corrupt image ({error})") from None


def _pixels(image: Image, where: str, mode: str | None, size: int | None) -> npt.NDArray[np.uint8]:
    if mode is None and image.mode not in ("L", "RGB"):
        raise BadInput(f"{where}: mode {image.mode}; L (gray) or RGB is expected. Set data.mode to convert")
    if mode is not None and image.mode != mode:
        image = image.convert(mode)
    if size is not None and image.size != (size, size):
        from PIL.Image import Resampling

        image = image.resize((size, size), Resampling.BOX if min(image.size) > size else Resampling.BICUBIC)
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _stack(items: Iterable[tuple[str, npt.NDArray[np.uint8]]], source: str) -> Pixels:
    images: list[npt.NDArray[np.uint8]] = []
    first = ""
    for where, image in items:
        if images and image.shape != images[0].shape:
            raise BadInput(
                f"{where}: {_size(image)}, but {first} is {_size(images[0])}; all must be alike. Set data.size or data.mode to convert"
            )
        first = first or where
        images.append(image)
    if not images:
        raise BadInput(f"{source}: no images in it ({', '.join(sorted(SUFFIXES))})")
    return np.stack(images)


def _size(image: npt.NDArray[np.uint8]) -> str:
    channels, height, width = image.shape
    return f"{width}x{height} {'gray' if channels == 1 else 'color'}"


def _read_folder(path: Path, data: FileData) -> Split:
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    images = _stack(((str(p), decode(p.read_bytes(), str(p), data.mode, data.size)) for p in files), str(path))
    parents = [p.parent.relative_to(path).as_posix() for p in files]
    names = sorted(set(parents))
    # One subfolder per class, as torchvision's ImageFolder has it; labels are then the names' order, and nothing else is read from it.
    labels = np.array([names.index(p) for p in parents]) if len(names) > 1 and "." not in names else None
    return Split(images, labels)


def _read_parquet(path: Path, data: FileData) -> Split:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise BadInput(f"{path}: no parquet files in it")
    items: list[tuple[str, npt.NDArray[np.uint8]]] = []
    labels: list[int] = []
    labeled = True
    for file in files:
        try:
            names = pq.read_schema(file).names
            column = _choose(names, data.image, ("image", "img", "images"), file, "image")
            label = data.label or next((n for n in ("label", "labels") if n in names), None)
            table = pq.read_table(file, columns=[column, *([label] if label else [])])
        except (pa.ArrowException, KeyError, OSError) as error:
            raise BadInput(f"{file}: not a parquet file that can be read ({error})") from None
        for row, cell in enumerate(table[column].to_pylist()):
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            if not isinstance(content, bytes):
                raise BadInput(f"{file}: column {column!r}, row {row}: encoded image bytes are expected, found {type(content).__name__}")
            where = f"{file}, row {row}"
            items.append((where, decode(content, where, data.mode, data.size)))
        values = [v for v in table[label].to_pylist() if isinstance(v, int)] if label else []
        labeled = labeled and len(values) == len(table)
        labels += values
    return Split(_stack(items, str(path)), np.array(labels, dtype=np.int64) if labeled else None)


def _choose(names: list[str], wanted: str | None, usual: tuple[str, ...], path: Path, what: str) -> str:
    if wanted is not None and wanted in names:
        return wanted
    found = next((n for n in usual if n in names), None) if wanted is None else None
    if found is None:
        raise BadInput(f"{path}: no {what} column {wanted or ' or '.join(usual)}; it has {', '.join(names)}. Set data.{what}")
    return found


def _read_npz(path: Path, data: FileData) -> Split:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            images = archive[_choose(names, data.image, ("image", "images", "img", "x", "arr_0"), path, "image")]
            label = data.label or next((n for n in ("label", "labels", "y") if n in names), None)
            labels = np.asarray(archive[label]).astype(np.int64) if label else None
    except BadInput:
        raise
    except Exception as error:  # numpy raises whatever the zip, the header or the pickle inside provokes
        raise BadInput(f"{path}: not an npz file of plain arrays ({error})") from None
    return Split(quantized(np.asarray(images), str(path)), labels)


def quantized(images: npt.NDArray[Any], where: str) -> Pixels:
    """``(n, H, W)``, ``(n, H, W, C)`` or ``(n, C, H, W)``, uint8 or float in [0, 1], to ``(n, C, H, W)`` uint8.

    Raises:
        BadInput: another shape or type, NaN, or values outside [0, 1].
    """
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise BadInput(f"{where}: images of shape {images.shape}; (n, C, H, W) or (n, H, W, C) with 1 or 3 channels is expected")
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        raise BadInput(f"{where}: images of type {images.dtype}; uint8, or floats in [0, 1], are expected")
    if not np.isfinite(images).all():
        raise BadInput(f"{where}: NaN or infinite pixels in image {int(np.argwhere(~np.isfinite(images))[0][0])}")
    if images.min() < 0 or images.max() > 1:
        raise BadInput(f"{where}: pixels from {images.min():g} to {images.max():g}; floats must lie in [0, 1]")
    return np.round(images * 255).astype(np.uint8)


def _shuffled(n: int, seed: int) -> Labels:
    from .noise import Noise  # late, for it brings torch

    order: Labels = Noise((seed, "split")).permutation("order", n).numpy()
    return order


def _digits(data: DigitsData) -> Dataset:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise BadInput("data: kind digits needs scikit-learn; install potstill[demo]") from None
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    order = _shuffled(len(images), data.seed)
    train, test = order[: data.train], order[data.train :]
    labels = digits.target.astype(np.int64)
    return Dataset(f"digits (seed {data.seed})", Split(images[train], labels[train]), Split(images[test], labels[test]))


def load(data: DigitsData | FileData) -> Dataset:
    """Read and check the images that a recipe names.

    Raises:
        BadInput: a file is missing, corrupt, empty, or its images are not alike.
    """
    if isinstance(data, DigitsData):
        return _digits(data)
    read = {"folder": _read_folder, "parquet": _read_parquet, "npz": _read_npz}[data.kind]
    paths = [Path(p) for p in (data.path, data.test_path) if p is not None]
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
        if data.kind == "folder" and not path.is_dir():
            raise BadInput(f"{path}: a folder of images is expected")
    splits = [read(path, data) for path in paths]
    for path, split in zip(paths, splits, strict=True):
        if split.labels is not None and len(split.labels) != len(split.images):
            raise BadInput(f"{path}: {len(split.images)} images but {len(split.labels)} labels")
    if len(splits) == 2:
        train, test = splits
        if train.images.shape[1:] != test.images.shape[1:]:
            raise BadInput(f"{paths[1]}: {_size(test.images[0])}, but {paths[0]} is {_size(train.images[0])}")
        return Dataset(paths[0].name, train, test)
    (whole,) = splits
    n = len(whole.images)
    held = max(1, round(n * data.test_fraction))
    if held >= n:
        raise BadInput(f"{paths[0]}: {n} images are too few to hold some out for a test")
    order = _shuffled(n, data.seed)
    parts = [
        Split(whole.images[i], None if whole.labels is None else whole.labels[i]) for i in (np.sort(order[held:]), np.sort(order[:held]))
    ]
    return Dataset(paths[0].name, parts[0], parts[1])
