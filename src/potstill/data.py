"""Real images from disk, checked: every one of the same size and mode, none corrupt, none missing.

Everything that is read is data from outside: a wrong file ends in one :class:`~potstill.errors.BadInput` that names it.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .config import Data, DigitsData, FileData, GlyphsData, OldFaithfulData, StrokesData, ValuesData
from .errors import BadInput, Failed
from .noise import Noise
from .state import check_plain
from .store import Place, Remote, fetched, place

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]
Kept = Pixels | Values  # pixels, or what is no picture
Labels = npt.NDArray[np.int64]
Classes = list[str]
Item = tuple[str, Pixels, int]  # what an image is called, the image, and bytes of its file that no image before it has counted

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
MAX_PIXELS = 4096 * 4096
MAX_VALUES = 2**28
MAX_CSV_BYTES = 2**28
MAX_LABEL = 2**31
# What a file may unpack to: that much, or so many times its size where that is more. A few kilobytes can hold terabytes of one color.
MAX_UNPACKED, MAX_RATIO = 2**28, 100
MAX_SCANS = 100  # of a JPEG, each of which is a pass over all of its pixels; progressive ones have about ten
_FEW_ROWS = 10_000
_FEW_BYTES = 2**20
_DECODED = 64  # rows of a parquet file that are in memory as encoded images
# What Pillow turns into 8-bit gray or color without losing range: 16-bit images would be clipped to white.
_CONVERTIBLE = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"}


@dataclass(frozen=True)
class Split:
    """Images ``(n, C, H, W)`` uint8, or other values float32; and their labels ``(n,)`` and captions where there are some."""

    images: Kept
    labels: Labels | None
    captions: tuple[str, ...] | None = None

    def of(self, labels: Sequence[int] | None) -> Split:
        """The images of those labels; all of them where there are none.

        Raises:
            BadInput: no image has a label, or none has one of these.
        """
        if labels is None:
            return self
        if self.labels is None:
            raise BadInput("data: has no labels to choose images by")
        chosen = np.flatnonzero(np.isin(self.labels, labels))
        if len(chosen) < 2:
            raise BadInput(f"data: {len(chosen)} images of the labels {', '.join(map(str, labels))}; two or more are needed")
        captions = None if self.captions is None else tuple(self.captions[i] for i in chosen)
        return Split(self.images[chosen], self.labels[chosen], captions)

    def digest(self) -> str:
        """Hex digest of the pixels and labels."""
        hasher = hashlib.sha256(repr(self.images.shape).encode())
        hasher.update(np.ascontiguousarray(self.images).data)
        if self.labels is not None:
            hasher.update(np.ascontiguousarray(self.labels).data)
        if self.captions is not None:
            hasher.update("\n".join(self.captions).encode())
        return hasher.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """Training images and held-out ones."""

    name: str
    train: Split
    test: Split


def floats(images: Kept) -> Tensor:
    """What is kept as an array as the library works on it: pixels in [0, 1], other values as they are; float32."""
    import torch  # late, for what reads recipes does without

    x = torch.from_numpy(images)
    return x.float().div_(255) if x.dtype == torch.uint8 else x


def check_unpacked(unpacked: int, packed: int, where: str) -> None:
    """See that a file, or several, do not hold far more than their size tells.

    Args:
        unpacked: bytes that are, or would be, in memory.
        packed: bytes on disk.
        where: what to call them in an error.

    Raises:
        BadInput: they do.
    """
    if unpacked > max(MAX_UNPACKED, MAX_RATIO * packed):
        raise BadInput(
            f"{where}: {packed} bytes that unpack to {unpacked} or more, over {MAX_RATIO} times as many; if that is meant, "
            "store it unpacked, as numpy.savez does"
        )


def check_rows(rows: int, packed: int, where: str) -> None:
    """See that a file does not repeat a few images endlessly, which takes next to no room there.

    Raises:
        BadInput: it does.
    """
    if rows > max(_FEW_ROWS, packed // 16):
        raise BadInput(f"{where}: {rows} images in {packed} bytes; none are that small")


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

    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise BadInput(f"{where}: a JPEG of {data.count(bytes((255, 218)))} scans; at most {MAX_SCANS} are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's advice on palettes and broken metadata is not for the user
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
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadInput(f"{where}: not an image that is read ({error})") from None
    except UnidentifiedImageError:
        raise BadInput(f"{where}: not a png, jpg, webp or bmp image") from None
    except Exception as error:  # Pillow's decoders raise whatever the bytes provoke: OSError, SyntaxError, struct.error, ...
        raise BadInput(f"{where}: corrupt image ({error})") from None


def _pixels(image: Image, where: str, mode: str | None, size: int | None) -> npt.NDArray[np.uint8]:
    if mode is None and image.mode not in ("L", "RGB"):
        raise BadInput(f"{where}: mode {image.mode}; L (gray) or RGB is expected. Set data.mode to convert")
    if image.mode not in _CONVERTIBLE:
        raise BadInput(f"{where}: mode {image.mode}; convert it to 8 bits a channel first")
    if mode is not None and image.mode != mode:
        image = image.convert(mode)
    if size is not None and image.size != (size, size):
        from PIL.Image import Resampling

        image = image.resize((size, size), Resampling.BOX if min(image.size) > size else Resampling.BICUBIC)
    array = np.asarray(image, dtype=np.uint8)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _stack(items: Iterable[Item], source: str) -> Pixels:
    images: list[npt.NDArray[np.uint8]] = []
    first, unpacked, packed = "", 0, 0
    for where, image, size in items:
        unpacked, packed = unpacked + image.nbytes, packed + size
        check_unpacked(unpacked, packed, source)
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


def _read_folder(path: Place, data: FileData) -> tuple[Pixels, Classes | None]:
    files = [(name, p) for name, p in _below(path) if name.suffix.lower() in SUFFIXES]

    def decoded() -> Iterator[Item]:
        for _, file in files:
            content = _bytes(file)
            yield str(file), decode(content, str(file), data.mode, data.size), len(content)

    images = _stack(decoded(), str(path))
    parents = [name.parent.as_posix() for name, _ in files]
    return images, parents if len(set(parents)) > 1 and "." not in parents else None  # one subfolder per class


def _below(path: Place) -> list[tuple[PurePosixPath, Place]]:
    """Every file below a folder, with its path from there, in the order of their paths."""
    if isinstance(path, Remote):
        return [*path.find()]
    return [(PurePosixPath(p.relative_to(path).as_posix()), p) for p in sorted(path.rglob("*")) if p.is_file()]


def _bytes(path: Place) -> bytes:
    check_plain(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def _numbered(classes: list[Classes | None], paths: Sequence[Place]) -> list[Labels | None]:
    """Labels from the names of subfolders, which mean the same in the training and the held-out folder.

    A name that is a number is the label itself, so that 10 does not come before 2; others count in the order of their names.
    """
    names = sorted(set(classes[0] or ()))
    numeric = all(name.isascii() and name.isdigit() and len(name) < 10 for name in names)
    known = {name: int(name) if numeric else i for i, name in enumerate(names)}
    for found, path in zip(classes, paths, strict=True):
        if unknown := sorted(set(found or ()) - known.keys()):
            raise BadInput(f"{path}: class folder {unknown[0]}, which {paths[0]} has not")
    return [None if found is None else np.array([known[name] for name in found], dtype=np.int64) for found in classes]


def _read_parquet(path: Place, data: FileData) -> tuple[Pixels, Labels | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(path, Remote):
        files: list[Place] = (
            [p for name, p in path.find() if name.suffix == ".parquet" and len(name.parts) == 1] if path.is_dir() else [path]
        )
    else:
        files = [*sorted(path.glob("*.parquet"))] if path.is_dir() else [path]
    if not files:
        raise BadInput(f"{path}: no parquet files in it")
    labels: list[Labels | None] = []

    def decoded(file: Place) -> Iterator[Item]:
        try:
            check_plain(file)
            with _here(file) as local, local.open("rb") as content, pq.ParquetFile(content) as source:
                names = source.schema_arrow.names
                column = _choose(names, data.image, ("image", "img", "images"), file, "image")
                label = _choose(names, data.label, ("label", "labels"), file, "label", needed=data.label is not None)
                packed = content.seek(0, 2)
                check_rows(source.metadata.num_rows, packed, str(file))
                row = repeated = 0
                # A few at a time: a column that says one picture again and again is as large in memory as all of them.
                for part in source.iter_batches(_DECODED, columns=[column]):
                    for cell in part.column(column).to_pylist():
                        where = f"{file}, row {row}"
                        encoded = cell.get("bytes") if isinstance(cell, dict) else cell
                        if not isinstance(encoded, bytes):
                            found = type(encoded).__name__
                            raise BadInput(f"{file}: column {column!r}, row {row}: encoded image bytes are expected, found {found}")
                        repeated += len(encoded)
                        if repeated > max(_FEW_BYTES, MAX_RATIO * packed):  # what is encoded is not packed much further
                            raise BadInput(f"{file}: {packed} bytes with more than {repeated} of encoded images, which are the same ones")
                        yield where, decode(encoded, where, data.mode, data.size), 0 if row else packed
                        row += 1
                values = source.read(columns=[label])[label].to_pylist() if label else None
        except BadInput:
            raise
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            raise BadInput(f"{file}: not a parquet file that can be read ({_first_line(error)})") from None
        wanted = f"{file}: column {label!r}"
        labels.append(_labels(values, row, wanted) if label and (data.label or _whole(values)) else None)

    images = _stack((item for file in files for item in decoded(file)), str(path))
    found = [part for part in labels if part is not None]
    return images, np.concatenate(found) if len(found) == len(labels) else None


@contextmanager
def _here(file: Place) -> Iterator[Path]:
    """A file on this machine, for as long as the block lasts."""
    if isinstance(file, Path):
        yield file
        return
    with tempfile.TemporaryDirectory() as folder, fetched(file, Path(folder)) as local:
        yield local


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _whole(values: Any) -> bool:
    return np.issubdtype(_as_array(values).dtype, np.integer)


def _as_array(values: Any) -> npt.NDArray[Any]:
    """The values as numpy takes them; lists of unequal lengths as objects."""
    try:
        return np.asarray(values)
    except ValueError:
        return np.empty(len(values), dtype=object)


def _labels(values: Any, images: int, where: str) -> Labels:
    array = _as_array(values)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise BadInput(f"{where}: one whole number per image is expected, found {array.dtype} of shape {array.shape}")
    if len(array) != images:
        raise BadInput(f"{where}: {len(array)} labels for {images} images")
    if images and array.min() < 0:
        raise BadInput(f"{where}: label {array.min()}; labels count from 0")
    if images and array.max() >= MAX_LABEL:
        raise BadInput(f"{where}: label {array.max()}; labels are below {MAX_LABEL}")
    return array.astype(np.int64)


def _choose(names: list[str], wanted: str | None, usual: tuple[str, ...], path: Place, what: str, needed: bool = True) -> str | None:
    if wanted is not None and wanted in names:
        return wanted
    found = next((n for n in usual if n in names), None) if wanted is None else None
    if found is None and needed:
        raise BadInput(f"{path}: no {what} column {wanted or ' or '.join(usual)}; it has {', '.join(names) or 'none'}. Set data.{what}")
    return found


def _member(archive: Any, name: str, packed: int, where: str) -> npt.NDArray[Any]:
    """An array of an npz file that does not unpack to far more than its size tells."""
    entries = [entry.file_size for entry in archive.zip.infolist() if entry.filename in (name, f"{name}.npy")]
    check_unpacked(max(entries), packed, where)
    return np.asarray(archive[name])


def _read_npz(path: Place, data: FileData) -> tuple[Pixels, Labels | None]:
    check_plain(path)
    try:
        with _here(path) as local, local.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = list(archive.files)
            column = _choose(names, data.image, ("image", "images", "img", "x", "arr_0"), path, "image")
            label = _choose(names, data.label, ("label", "labels", "y"), path, "label", needed=data.label is not None)
            assert column is not None  # needed
            packed = file.seek(0, 2)
            images, values = (_member(archive, name, packed, str(path)) if name else None for name in (column, label))
            assert images is not None
    except (BadInput, Failed):
        raise
    except Exception as error:  # numpy raises whatever the zip, the header or the pickle inside provokes
        raise BadInput(f"{path}: not an npz file of plain arrays ({_first_line(error)})") from None
    pixels = quantized(images, str(path))
    check_rows(len(pixels), packed, str(path))
    if data.mode is not None or data.size is not None:
        pixels = _stack(((str(path), _converted(image, str(path), data.mode, data.size), image.nbytes) for image in pixels), str(path))
    labeled = label and (data.label or _whole(values))
    return pixels, _labels(values, len(pixels), f"{path}: array {label!r}") if labeled else None


def _converted(pixels: npt.NDArray[np.uint8], where: str, mode: str | None, size: int | None) -> npt.NDArray[np.uint8]:
    from PIL import Image

    return _pixels(Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)), where, mode, size)


def quantized(images: npt.NDArray[Any], where: str) -> Pixels:
    """``(n, H, W)``, ``(n, H, W, C)`` or ``(n, C, H, W)``, uint8 or float in [0, 1], to ``(n, C, H, W)`` uint8.

    Raises:
        BadInput: another shape or type, NaN, or values outside [0, 1].
    """
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not images.size:
        raise BadInput(f"{where}: images of shape {images.shape}; (n, C, H, W) or (n, H, W, C) with 1 or 3 channels is expected")
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        raise BadInput(f"{where}: images of type {images.dtype}; uint8, or floats in [0, 1], are expected")
    if not np.isfinite(images).all():
        raise BadInput(f"{where}: NaN or infinite pixels in image {_first_not_finite(images)}")
    if images.min() < 0 or images.max() > 1:
        raise BadInput(
            f"{where}: pixels from {images.min():g} to {images.max():g}; floats must lie in [0, 1]; data of kind values may have any"
        )
    return np.round(images * 255).astype(np.uint8)


def _first_not_finite(values: npt.NDArray[Any]) -> int:
    return int(np.isfinite(values).all(axis=tuple(range(1, values.ndim))).argmin())


def _read_values(path: Place, array: str | None) -> Values:
    """Points or sequences from a csv or npz file, ``(n, C, H, W)`` float32.

    Raises:
        BadInput: it cannot be read, or holds something else than finite numbers of one of the shapes.
    """
    if path.suffix.lower() == ".csv":
        return _checked(_read_csv(path), str(path))
    check_plain(path)
    try:
        with _here(path) as local, local.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            names = list(archive.files)
            column = names[0] if array is None and len(names) == 1 else array or "x"
            if column not in names:
                raise BadInput(f"{path}: no array {column}; it has {', '.join(names) or 'none'}. Set data.array")
            found = _member(archive, column, file.seek(0, 2), str(path))
    except (BadInput, Failed):
        raise
    except Exception as error:  # numpy raises whatever the zip, the header or the pickle inside provokes
        raise BadInput(f"{path}: neither a csv file nor an npz file of plain arrays ({_first_line(error)})") from None
    return _checked(found, f"{path}: array {column}")


def _read_csv(path: Place) -> npt.NDArray[np.float64]:
    content = _bytes(path)
    if len(content) > MAX_CSV_BYTES:
        raise BadInput(f"{path}: {len(content)} bytes; at most {MAX_CSV_BYTES} are read. Bring it to an npz file")
    try:
        lines = [line for line in content.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not a csv file ({error.reason} in byte {error.start})") from None
    rows: list[list[float]] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            rows.append([float(cell) for cell in line.split(",")])
        except ValueError:
            raise BadInput(f"{path}, row {number}: numbers between commas are expected, found {line[:60]!r}") from None
        if len(rows[-1]) != len(rows[0]):
            raise BadInput(f"{path}, row {number}: {len(rows[-1])} columns, but the first row has {len(rows[0])}")
    return np.array(rows)


def _checked(values: npt.NDArray[Any], where: str) -> Values:
    """``(n, C)``, ``(n, C, steps)`` or ``(n, C, H, W)``, any real numbers, to ``(n, C, H, W)`` float32."""
    if values.ndim not in (2, 3, 4) or not values.size:
        raise BadInput(f"{where}: values of shape {values.shape}; (n, C), (n, C, steps) or (n, C, H, W) is expected")
    if values.size > MAX_VALUES:
        raise BadInput(f"{where}: {values.size} values; at most {MAX_VALUES} are read")
    if values.dtype.kind not in "fiu":
        raise BadInput(f"{where}: values of type {values.dtype}; real numbers are expected")
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(values.reshape(*values.shape, *[1] * (4 - values.ndim)), dtype=np.float32)
    if not np.isfinite(found).all():
        raise BadInput(f"{where}: a value that is no finite number of 32 bits in row {_first_not_finite(found)}")
    return found


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


def _glyphs(data: GlyphsData) -> Dataset:
    from .glyphs import glyphs

    splits = []
    for name, n in (("train", data.n), ("test", data.test)):
        drawn = glyphs(range(n), Noise((data.seed, name)), data.size, data.digits)
        splits.append(Split(drawn.images, drawn.labels, drawn.captions))
    return Dataset(f"glyphs (seed {data.seed})", *splits)


def _strokes(data: StrokesData) -> Dataset:
    from .strokes import strokes

    drawn = [strokes(range(n), Noise((data.seed, name)), data.steps) for name, n in (("train", data.n), ("test", data.test))]
    return Dataset(f"strokes (seed {data.seed})", *(Split(values, labels) for values, labels in drawn))


def _parted(name: str, whole: Split, where: str, fraction: float, seed: int) -> Dataset:
    """One set in two by the seed."""
    n = len(whole.images)
    held = max(1, round(n * fraction))
    if held >= n:
        raise BadInput(f"{where}: {n} images are too few to hold some out for a test")
    order = _shuffled(n, seed)
    parts = [
        Split(whole.images[i], None if whole.labels is None else whole.labels[i]) for i in (np.sort(order[held:]), np.sort(order[:held]))
    ]
    return Dataset(name, parts[0], parts[1])


def places(data: Data) -> list[Place]:
    """The files or folders that a recipe names for its images, the held-out ones last; none for data that potstill has or makes.

    Raises:
        BadInput: one is not there.
    """
    paths = [place(p) for p in (data.path, data.test_path) if p is not None] if isinstance(data, FileData | ValuesData) else []
    for path in paths:
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder")
        if data.kind == "folder" and not path.is_dir():
            raise BadInput(f"{path}: a folder of images is expected")
    return paths


def load(data: Data) -> Dataset:
    """Read and check the images that a recipe names.

    Raises:
        BadInput: a file is missing, corrupt, empty, or its images are not alike.
    """
    if isinstance(data, DigitsData):
        return _digits(data)
    if isinstance(data, GlyphsData):
        return _glyphs(data)
    if isinstance(data, StrokesData):
        return _strokes(data)
    if isinstance(data, OldFaithfulData):
        own = Path(__file__).with_name("old_faithful.csv")
        name = f"old faithful (seed {data.seed})"
        return _parted(name, Split(_read_values(own, None), None), str(own), data.test_fraction, data.seed)
    paths = places(data)
    if data.kind == "folder":
        images, classes = zip(*(_read_folder(path, data) for path in paths), strict=True)
        splits = [Split(*pair) for pair in zip(images, _numbered(list(classes), paths), strict=True)]
    elif isinstance(data, ValuesData):
        splits = [Split(_read_values(path, data.array), None) for path in paths]
    else:
        read = _read_parquet if data.kind == "parquet" else _read_npz
        splits = [Split(*read(path, data)) for path in paths]
    if len(splits) == 2:
        train, test = splits
        if train.images.shape[1:] != test.images.shape[1:]:
            sizes = [str(s.images.shape[1:]) if data.kind == "values" else _size(s.images[0]) for s in (test, train)]
            raise BadInput(f"{paths[1]}: {sizes[0]}, but {paths[0]} is {sizes[1]}")
        if (train.labels is None) != (test.labels is None):
            with_labels, without = (paths[0], paths[1]) if test.labels is None else (paths[1], paths[0])
            raise BadInput(f"{without}: has no labels, but {with_labels} has")
        return Dataset(paths[0].name, train, test)
    return _parted(paths[0].name, splits[0], str(paths[0]), data.test_fraction, data.seed)
