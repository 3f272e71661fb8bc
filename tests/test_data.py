"""Real images from disk: every kind of file, and everything that can be wrong with one."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from potstill import data
from potstill.config import DigitsData, FileData
from potstill.errors import BadInput

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (6, 1, 5, 4), dtype=np.uint8)  # (n, C, H, W), no two sizes alike
COLOR = RNG.integers(0, 256, (6, 3, 5, 4), dtype=np.uint8)


def encoded(pixels, kind="PNG", mode=None):
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


def folder(path, images, names=None):
    for i, pixels in enumerate(images):
        file = path / (names[i] if names else f"{i}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(pixels))
    return path


def section(kind, path, **options):
    return FileData(kind=kind, path=str(path), **options)


def load(kind, path, **options):
    return data.load(section(kind, path, **options))


def everything(dataset):
    """All images and labels of both splits, in an order that does not depend on the split."""
    images = np.concatenate([dataset.train.images, dataset.test.images])
    order = np.lexsort(images.reshape(len(images), -1).T)
    if dataset.train.labels is None:
        return images[order], None
    return images[order], np.concatenate([dataset.train.labels, dataset.test.labels])[order]


def sorted_like(images, labels=None):
    order = np.lexsort(images.reshape(len(images), -1).T)
    return images[order], None if labels is None else np.asarray(labels)[order]


def same(found, expected):
    return np.array_equal(found[0], expected[0]) and (
        (found[1] is None and expected[1] is None) or (found[1] is not None and np.array_equal(found[1], expected[1]))
    )


# ------------------------------------------------------------------ folders


@pytest.mark.parametrize("images", [GRAY, COLOR], ids=["gray", "color"])
def test_a_folder_of_images(tmp_path, images):
    folder(tmp_path / "set", images, [f"deep/{i}.PNG" if i else "0.png" for i in range(6)])
    (tmp_path / "set" / "notes.txt").write_text("not an image")
    found = load("folder", tmp_path / "set")
    assert same(everything(found), sorted_like(images))
    assert found.train.images.dtype == np.uint8
    assert found.name == "set"
    assert len(found.test.images) == 1  # a tenth, and never none


@pytest.mark.parametrize("kind", ["png", "bmp", "webp", "jpg"])
def test_every_format(tmp_path, kind):
    for i, level in enumerate((0, 100, 255)):
        path = tmp_path / f"{i}.{kind}"
        Image.new("RGB", (4, 5), (level, level, level)).save(path)
    images, _ = everything(load("folder", tmp_path))
    assert images.shape == (3, 3, 5, 4)
    assert np.allclose(images[:, 0, 0, 0], [0, 100, 255], atol=2)  # jpg is not exact


def test_subfolders_are_classes_and_a_number_is_the_label_itself(tmp_path):
    names = ["10/a.png", "2/a.png", "2/b.png", "0/a.png", "10/b.png", "0/b.png"]
    found = load("folder", folder(tmp_path, GRAY, names))
    assert same(everything(found), sorted_like(GRAY, [10, 2, 2, 0, 10, 0]))
    assert found.train.labels.dtype == np.int64


def test_other_class_names_count_in_their_order(tmp_path):
    found = load("folder", folder(tmp_path, GRAY, ["cat/a.png", "ant/a.png", "bee/a.png", "bee/b.png", "10/a.png", "ant/b.png"]))
    assert same(everything(found), sorted_like(GRAY, [3, 1, 2, 2, 0, 1]))


def test_classes_mean_the_same_in_the_held_out_folder(tmp_path):
    folder(tmp_path / "train", GRAY[:4], ["a/0.png", "b/0.png", "c/0.png", "c/1.png"])
    folder(tmp_path / "test", GRAY[4:], ["b/0.png", "c/0.png"])
    found = load("folder", tmp_path / "train", test_path=str(tmp_path / "test"))
    assert found.train.labels.tolist() == [0, 1, 2, 2]
    assert found.test.labels.tolist() == [1, 2]
    folder(tmp_path / "test", GRAY[4:5], ["d/0.png"])
    with pytest.raises(BadInput, match=r"test: class folder d, which .*train has not"):
        load("folder", tmp_path / "train", test_path=str(tmp_path / "test"))


def test_images_outside_of_subfolders_have_no_labels(tmp_path):
    assert load("folder", folder(tmp_path, GRAY, ["x.png", "a/0.png", "a/1.png", "b/0.png", "b/1.png", "b/2.png"])).train.labels is None


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder(tmp_path / "set", GRAY)
    assert load("folder", "~/set").name == "set"


# ------------------------------------------------------------------ splits


def test_the_seed_decides_what_is_held_out(tmp_path):
    images = RNG.integers(0, 256, (40, 1, 3, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(40))
    splits = [load("npz", tmp_path / "a.npz", seed=seed, test_fraction=0.25) for seed in (0, 0, 1)]
    held = [s.test.labels.tolist() for s in splits]
    assert [len(h) for h in held] == [10, 10, 10]
    assert held[0] == held[1] != held[2]
    for s in splits:
        assert sorted([*s.train.labels, *s.test.labels]) == list(range(40))
        assert np.array_equal(images[s.train.labels], s.train.images)  # each label is still beside its image
        assert np.array_equal(images[s.test.labels], s.test.images)
    assert splits[0].train.digest() == splits[1].train.digest() != splits[2].train.digest()


def test_a_digest_tells_shapes_pixels_and_labels_apart():
    images = np.zeros((2, 1, 2, 3), np.uint8)
    splits = [
        data.Split(images, None),
        data.Split(images.reshape(2, 1, 3, 2), None),
        data.Split(images + np.uint8(1), None),
        data.Split(images, np.array([0, 1])),
        data.Split(images, np.array([1, 0])),
    ]
    assert len({s.digest() for s in splits}) == len(splits)
    assert data.Split(images[::-1], None).digest() == splits[0].digest()  # a view with other strides


def test_a_held_out_file_is_taken_as_it_is(tmp_path):
    np.savez(tmp_path / "train.npz", images=GRAY)
    np.savez(tmp_path / "test.npz", images=GRAY[::-1])
    found = load("npz", tmp_path / "train.npz", test_path=str(tmp_path / "test.npz"))
    assert np.array_equal(found.train.images, GRAY)
    assert np.array_equal(found.test.images, GRAY[::-1])


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ({"images": GRAY[:, :, :4]}, "test.npz: 4x4 gray, but .*train.npz is 4x5 gray"),
        ({"images": COLOR}, "test.npz: 4x5 color, but .*train.npz is 4x5 gray"),
        ({"images": GRAY, "labels": np.arange(6)}, "train.npz: has no labels, but .*test.npz has"),
    ],
)
def test_a_held_out_file_must_be_alike(tmp_path, test, expected):
    np.savez(tmp_path / "train.npz", images=GRAY)
    np.savez(tmp_path / "test.npz", **test)
    with pytest.raises(BadInput, match=expected):
        load("npz", tmp_path / "train.npz", test_path=str(tmp_path / "test.npz"))


def test_one_image_cannot_be_split(tmp_path):
    with pytest.raises(BadInput, match="1 images are too few"):
        load("folder", folder(tmp_path, GRAY[:1]))


def test_digits():
    found = data.load(DigitsData(kind="digits", train=1000, seed=1))
    assert found.train.images.shape == (1000, 1, 8, 8)
    assert found.test.images.shape == (797, 1, 8, 8)
    assert found.train.images.max() == 255
    assert set(found.train.labels) == set(range(10))
    again, other = (data.load(DigitsData(kind="digits", train=1000, seed=s)) for s in (1, 2))
    assert found.train.digest() == again.train.digest() != other.train.digest()


# ------------------------------------------------------------------ sizes and modes


def test_images_are_resized_and_converted_on_request(tmp_path):
    folder(tmp_path, [*GRAY[:2], *COLOR[:2]])
    for mode, channels in (("L", 1), ("RGB", 3)):
        images, _ = everything(load("folder", tmp_path, mode=mode, size=2))
        assert images.shape == (4, channels, 2, 2)


def test_a_smaller_image_is_the_mean_of_its_boxes():
    pixels = np.zeros((1, 4, 4), np.uint8)
    pixels[0, :2, :2] = 200
    assert data.decode(encoded(pixels), "x", size=2)[0].tolist() == [[200, 0], [0, 0]]


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_sizes_and_modes_of_arrays_too(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        np.savez(path, images=COLOR)
    else:
        pq.write_table(pa.table({"image": [encoded(x) for x in COLOR]}), path)
    assert load(kind, path, size=3, mode="L").train.images.shape == (5, 1, 3, 3)
    assert load(kind, path).train.images.shape == (5, 3, 5, 4)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1"])
def test_another_mode_is_an_error_unless_it_may_be_converted(mode):
    content = encoded(COLOR[0], mode=mode)
    with pytest.raises(BadInput, match=rf"x: mode {mode}; L \(gray\) or RGB is expected. Set data.mode to convert"):
        data.decode(content, "x")
    assert data.decode(content, "x", mode="RGB").shape == (3, 5, 4)


def test_a_deep_image_is_not_clipped_to_white():
    buffer = io.BytesIO()
    Image.fromarray((np.arange(16, dtype=np.uint16) * 4000).reshape(4, 4)).save(buffer, "PNG")
    with pytest.raises(BadInput, match="mode I;16; convert it to 8 bits a channel first"):
        data.decode(buffer.getvalue(), "x", mode="L")


def test_images_of_two_sizes_or_modes_are_named(tmp_path):
    folder(tmp_path / "sizes", [GRAY[0], GRAY[1, :, :4]])
    with pytest.raises(BadInput, match=r"1\.png: 4x4 gray, but .*0\.png is 4x5 gray; all must be alike. Set data\.size or data\.mode"):
        load("folder", tmp_path / "sizes")
    folder(tmp_path / "modes", [GRAY[0], COLOR[0]])
    with pytest.raises(BadInput, match=r"1\.png: 4x5 color, but .*0\.png is 4x5 gray"):
        load("folder", tmp_path / "modes")


# ------------------------------------------------------------------ broken images


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def header(width, height):
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return start + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")


def animated(kind):
    buffer = io.BytesIO()
    frames = [Image.fromarray(x[0]).convert("RGB") for x in GRAY[:2]]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


WHOLE = encoded(RNG.integers(0, 256, (1, 32, 32), dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", "not a png, jpg, webp or bmp image", id="empty"),
        pytest.param(b"hello", "not a png, jpg, webp or bmp image", id="text"),
        pytest.param(WHOLE[: len(WHOLE) // 2], "corrupt image", id="truncated"),
        pytest.param(WHOLE[:400] + b"XXXX" + WHOLE[404:], "corrupt image", id="corrupt"),
        pytest.param(header(4, 4)[:25], "corrupt image|not a png", id="a header alone"),
        pytest.param(header(60000, 60000), "not an image that is read .*exceeds limit", id="a bomb"),
        pytest.param(header(10000, 9000), "not an image that is read .*exceeds limit", id="nearly a bomb"),
        pytest.param(header(5000, 5000), "5000x5000 pixels; at most 16777216 are read", id="large"),
        pytest.param(animated("PNG"), "animated; one picture is expected", id="animated png"),
        pytest.param(animated("WEBP"), "animated; one picture is expected", id="animated webp"),
        pytest.param(encoded(COLOR[0], "GIF"), "not a png, jpg, webp or bmp image", id="another format"),
        pytest.param(pickle.dumps([1]), "not a png, jpg, webp or bmp image", id="pickle"),
    ],
)
def test_a_broken_image_is_named(tmp_path, content, expected):
    folder(tmp_path, GRAY[:2])
    (tmp_path / "9.png").write_bytes(content)
    with pytest.raises(BadInput, match=rf"9\.png: ({expected})"):
        load("folder", tmp_path)


@settings(max_examples=60, deadline=None, database=None)
@given(
    start=st.sampled_from([encoded(COLOR[0], kind) for kind in ("PNG", "JPEG", "WEBP", "BMP")]),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.integers(1, 500),
)
def test_only_bad_input_escapes_from_mutated_images(start, changes, cut):
    content = bytearray(start)
    for at, value in changes:
        content[at % len(content)] = value
    try:
        found = data.decode(bytes(content[:cut]), "x", mode="L", size=4)
    except BadInput:
        return
    assert found.shape == (1, 4, 4)


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("folder", "nope", "nope: no such file or folder"),
        ("npz", "nope", "nope: no such file or folder"),
        ("parquet", "nope", "nope: no such file or folder"),
        ("folder", "empty", r"empty: no images in it \(.*\.png"),
        ("parquet", "empty", "empty: no parquet files in it"),
        ("npz", "empty", "empty: not an npz file"),
        ("folder", "file", "file: a folder of images is expected"),
        ("parquet", "file", "file: not a parquet file that can be read"),
        ("npz", "file", "file: not an npz file of plain arrays"),
    ],
)
def test_a_missing_or_wrong_path_is_named(tmp_path, kind, name, expected):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"hello")
    with pytest.raises(BadInput, match=expected):
        load(kind, tmp_path / name)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    folder(tmp_path, GRAY[:2])
    (tmp_path / "1.png").chmod(0)
    with pytest.raises(BadInput, match=r"1\.png: cannot be read"):
        load("folder", tmp_path)


# ------------------------------------------------------------------ npz


def test_shapes_and_types_of_an_npz(tmp_path):
    for name, images in {
        "planes": GRAY[:, 0],
        "first": COLOR,
        "last": COLOR.transpose(0, 2, 3, 1),
        "float": COLOR / 255,
        "half": GRAY.astype(np.float32) / 255,
    }.items():
        np.savez(tmp_path / f"{name}.npz", x=images, y=np.arange(6, dtype=np.uint8))
        found = load("npz", tmp_path / f"{name}.npz")
        expected = GRAY if name in ("planes", "half") else COLOR
        assert same(everything(found), sorted_like(expected, range(6))), name


def test_arrays_are_named_in_the_recipe(tmp_path):
    np.savez(tmp_path / "a.npz", pictures=GRAY, digits=np.arange(6), x=COLOR, y=np.zeros(6, int))
    found = load("npz", tmp_path / "a.npz", image="pictures", label="digits")
    assert same(everything(found), sorted_like(GRAY, range(6)))


def test_what_only_looks_like_labels_is_left_out(tmp_path):
    np.savez(tmp_path / "a.npz", x=GRAY, y=np.linspace(0, 1, 6))
    assert load("npz", tmp_path / "a.npz").train.labels is None


FLOATS = GRAY / 255


@pytest.mark.parametrize(
    ("arrays", "options", "expected"),
    [
        ({"x": np.where(np.arange(6)[:, None, None, None] == 4, np.nan, FLOATS)}, {}, "NaN or infinite pixels in image 4"),
        ({"x": FLOATS * 2}, {}, "pixels from 0.* to [12].*; floats must lie in"),
        ({"x": FLOATS - 0.5}, {}, "pixels from -0.5 to"),
        ({"x": GRAY.astype(int)}, {}, "images of type int64; uint8, or floats in"),
        ({"x": GRAY.astype(complex)}, {}, "images of type complex128"),
        ({"x": GRAY[:0]}, {}, r"images of shape \(0, 1, 5, 4\)"),
        ({"x": GRAY[:, :, :0]}, {}, r"images of shape \(6, 1, 0, 4\)"),
        ({"x": np.zeros((6, 2, 5, 4))}, {}, r"images of shape \(6, 2, 5, 4\); \(n, C, H, W\) or"),
        ({"x": np.zeros(6)}, {}, r"images of shape \(6,\)"),
        ({"z": GRAY}, {}, "no image column image or images or img or x or arr_0; it has z. Set data.image"),
        ({"x": GRAY}, {"image": "z"}, "no image column z; it has x. Set data.image"),
        ({"x": GRAY}, {"label": "z"}, "no label column z; it has x. Set data.label"),
        ({"x": GRAY, "y": np.arange(5)}, {}, "array 'y': 5 labels for 6 images"),
        ({"x": GRAY, "y": np.zeros((6, 1), int)}, {}, r"array 'y': one whole number per image is expected, found int64 of shape \(6, 1\)"),
        ({"x": GRAY, "y": np.arange(6) / 2}, {"label": "y"}, "array 'y': one whole number per image is expected, found float64"),
        ({"x": GRAY, "y": np.array(list("abcdef"))}, {"label": "y"}, "array 'y': one whole number per image is expected, found <U1"),
        ({"x": GRAY, "y": np.arange(6) - 1}, {}, "array 'y': label -1; labels count from 0"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, arrays, options, expected):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(BadInput, match=rf"a\.npz: {expected}"):
        load("npz", tmp_path / "a.npz", **options)


class Evil:
    def __reduce__(self):
        return (os.abort, ())


def test_a_pickle_in_an_npz_is_never_run(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([Evil()] * 4, dtype=object))
    with pytest.raises(BadInput, match="not an npz file of plain arrays"):
        load("npz", tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadInput, match="not an npz file of plain arrays"):
        load("npz", tmp_path / "b.npz")


def test_a_truncated_npz_and_a_single_array_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=GRAY)
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[:-30])
    with pytest.raises(BadInput, match="not an npz file of plain arrays"):
        load("npz", tmp_path / "a.npz")
    with (tmp_path / "b.npz").open("wb") as file:
        np.save(file, GRAY)
    with pytest.raises(BadInput, match="not an npz file of plain arrays"):
        load("npz", tmp_path / "b.npz")


# ------------------------------------------------------------------ parquet


def table(images, **columns):
    return pa.table({"image": [encoded(x) for x in images], **columns})


def test_a_parquet_file_of_bytes_with_labels(tmp_path):
    pq.write_table(table(GRAY, label=list(range(6))), tmp_path / "a.parquet")
    assert same(everything(load("parquet", tmp_path / "a.parquet")), sorted_like(GRAY, range(6)))


def test_a_folder_of_parquet_files_as_the_hub_has_them(tmp_path):
    for i in range(3):
        cells = [{"bytes": encoded(x), "path": None} for x in COLOR[2 * i : 2 * i + 2]]
        pq.write_table(pa.table({"img": cells, "labels": [2 * i, 2 * i + 1]}), tmp_path / f"{i}.parquet")
    assert same(everything(load("parquet", tmp_path)), sorted_like(COLOR, range(6)))


def test_columns_are_named_in_the_recipe(tmp_path):
    pq.write_table(table(COLOR, picture=[encoded(x) for x in GRAY], digit=list(range(6))), tmp_path / "a.parquet")
    found = load("parquet", tmp_path / "a.parquet", image="picture", label="digit")
    assert same(everything(found), sorted_like(GRAY, range(6)))


def test_a_label_column_of_texts_is_left_out_unless_it_is_asked_for(tmp_path):
    pq.write_table(table(GRAY, label=list("abcdef")), tmp_path / "a.parquet")
    assert load("parquet", tmp_path / "a.parquet").train.labels is None
    with pytest.raises(BadInput, match="column 'label': one whole number per image is expected"):
        load("parquet", tmp_path / "a.parquet", label="label")


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        ({"picture": [b"x"]}, {}, "no image column image or img or images; it has picture. Set data.image"),
        ({"image": [b"x"]}, {"image": "img"}, "no image column img; it has image"),
        ({"image": [b"x"]}, {"label": "y"}, "no label column y; it has image"),
        ({"image": ["x"]}, {}, "column 'image', row 0: encoded image bytes are expected, found str"),
        ({"image": [3]}, {}, "column 'image', row 0: encoded image bytes are expected, found int"),
        ({"image": [{"bytes": None, "path": "a.png"}]}, {}, "column 'image', row 0: encoded image bytes are expected, found NoneType"),
        ({"image": [{"path": "a.png"}]}, {}, "column 'image', row 0: encoded image bytes are expected, found NoneType"),
        ({"image": [encoded(GRAY[0]), None]}, {}, "column 'image', row 1: encoded image bytes are expected, found NoneType"),
        ({"image": [encoded(GRAY[0]), b"x"]}, {}, ".*row 1: not a png"),
        ({"image": [encoded(GRAY[0]), encoded(COLOR[0])]}, {}, ".*row 1: 4x5 color, but .*row 0 is 4x5 gray"),
        ({"image": [encoded(x) for x in GRAY], "label": [0, 1, None, 3, 4, 5]}, {"label": "label"}, "column 'label': one whole number"),
        ({"image": pa.array([], pa.binary())}, {}, "no images in it"),
    ],
)
def test_wrong_columns_are_named(tmp_path, content, options, expected):
    pq.write_table(pa.table(content), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match=rf"a\.parquet(: |, ){expected}"):
        load("parquet", tmp_path / "a.parquet", **options)


def test_a_parquet_file_that_lies_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(GRAY), path, compression="none")
    whole = path.read_bytes()
    for content in (whole[:-9], whole[: len(whole) // 2], b"PAR1" + b"\xff" * 64 + b"PAR1", whole[:4] + b"\xff" * 40 + whole[44:]):
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"a\.parquet"):
            load("parquet", path)
