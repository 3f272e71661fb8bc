"""Seeded hostile input for every reader of something from outside: what is wrong must end in one clean error, soon, in little memory.

Inputs are made from sound ones, by their bytes and by their structure, and from known tricks. Readers run in child processes, many
inputs to one, whose memory is limited. A finding is an exception that the command line does not turn into one line, more than 5 s of
the processor or 30 s by the clock, more than 1 GiB, a dead process, a control character on the terminal, or a file outside of the
folder that was read.

    python benchmarks/fuzz.py [--inputs 10000] [--seed 0] [--kinds recipe,image]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS, BYTES = 5.0, 1 << 30
WAIT_SECONDS = 30.0  # by the clock, where other work shares the processor, or where a reader waits for something
_STARTING = 60.0  # a child that has just begun reads the sound inputs first
_IMPORTS = [
    "potstill.build",
    "potstill.pipeline",
    "potstill.report.page",
    "diffusers",
    "transformers",
    "torch.utils.serialization",
    "diffusers.models.unets.unet_2d",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.schedulers",
    "PIL.Image",
    "PIL.PngImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.WebPImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.TiffImagePlugin",
    "PIL.BmpImagePlugin",
    "pyarrow.parquet",
]


# ------------------------------------------------------------------ what is wrong


EDGES = [
    b"\0",
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\xff" * 8,
    b"\0" * 16,
    b"PK\x03\x04",
    b"\x80\x02",
    b"\x1b[2J",
    b"{",
    b"[[",
]
HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    1e308,
    float("nan"),
    float("inf"),
    -0.5,
    "",
    "x" * 5000,
    "\x1b[2J",
    "a\nb",
]
HOSTILE += ["../../outside", "/etc/hostname", "zoo:../..", "<fuzz onload=1>", "\u202eabc", "\ud800", "\0", [], {}, [[]], [0] * 100, {"": 0}]
HOSTILE += ["python:os:system", "%s%n", "{}", "5" * 400, [-1, 2**40], [1, 10**6, 10**6], 4097, 100_000]


def spoiled(rng: random.Random, data: bytes) -> bytes:
    """Bytes with a few of them changed, moved, left out or added."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, n = rng.randrange(len(found) + 1), rng.choice((1, 2, 4, 8, 64, 1000))
        # Headers and footers say most.
        at = rng.choice((at, min(at, rng.randrange(64)), max(0, len(found) - rng.randrange(1, 64))))
        match rng.randrange(8):
            case 0:
                found[at : at + 1] = bytes([found[at] ^ 1 << rng.randrange(8)]) if at < len(found) else b"\0"
            case 1:
                found[at : at + n] = rng.randbytes(min(n, 16))
            case 2:
                edge = rng.choice(EDGES)
                found[at : at + len(edge)] = edge
            case 3:
                found[at:at] = rng.choice(EDGES) * rng.choice((1, 1, 50))
            case 4:
                del found[at : at + n]
            case 5:
                found[at:at] = found[at : at + n]
            case 6:
                other = rng.randrange(len(found) + 1)
                found[at : at + n] = found[other : other + n]
            case _:
                if rng.random() < 0.3:
                    del found[at:]
                else:
                    found[at : at + n] = bytes(min(n, len(found)))
    return bytes(found)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within plain data."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [found for key, value in pairs for found in [(tree, key), *places(value)]]


def changed(rng: random.Random, tree: Any) -> Any:
    """Plain data with a few of its values changed, moved, left out or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        every = places(tree)
        if not every:
            return rng.choice(HOSTILE)
        at, key = rng.choice(every)
        match rng.randrange(8):
            case 0:
                del at[key]
            case 1:
                at[key] = at[rng.choice(list(at))] if isinstance(at, dict) else [at[key]]
            case 2:
                other, name = rng.choice(every)
                if name in other if isinstance(other, dict) else name < len(other):
                    at[key] = json.loads(json.dumps(other[name]))
            case 3 if isinstance(at, dict):
                at[rng.choice(("", "x", "kind", "../x", "\x1b[2J", "__class__", str(key).upper()))] = rng.choice(HOSTILE)
            case 4 if isinstance(at[key], (int, float)) and not isinstance(at[key], bool):
                at[key] = rng.choice((-at[key], at[key] + 1, at[key] * 1000, at[key] * 10**9, at[key] / 3, str(at[key])))
            case 5:
                value: Any = 0
                for _ in range(rng.choice((3, 40))):
                    value = [value] if rng.random() < 0.5 else {"a": value}
                at[key] = value
            case _:
                at[key] = rng.choice(HOSTILE)
    return tree


def as_json(rng: random.Random, tree: Any) -> bytes:
    """Plain data, changed, as JSON, some of which is none."""
    text = json.dumps(changed(rng, tree)).encode()
    trick = rng.random()
    if trick < 0.03:
        return rng.choice((b"[", b'{"a":')) * rng.choice((1000, 100_000))
    if trick < 0.06:
        return text.replace(b"1", b"1" * rng.choice((400, 5000)), 1)
    if trick < 0.09:
        return text + b" " * 10 + b"[0," * 50_000
    return spoiled(rng, text) if trick < 0.4 else text


def zip_bomb(name: str, head: bytes, size: int) -> bytes:
    """An archive of kilobytes that unpacks to ``size`` zeros after a head."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open(name, "w", force_zip64=True) as member,
    ):
        member.write(head)
        for _ in range(size >> 20):
            member.write(bytes(1 << 20))
    return buffer.getvalue()


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """What stands before an array's numbers."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


def safetensors(header: Any, body: bytes, length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


# ------------------------------------------------------------------ kinds of input


@dataclass(frozen=True)
class Kind:
    """Input of one kind: how often, how it is made in an empty folder, and what reads it.

    Args:
        share: of all inputs.
        make: (rng, folder, sound) writes it there, the sound one first of all.
        read: (folder) calls the library's readers.
    """

    share: float
    make: Callable[[random.Random, Path, bool], None]
    read: Callable[[Path], object]


def _recipe(base: Path) -> Kind:
    import yaml

    from potstill import config

    texts = [path.read_text(encoding="utf-8") for path in sorted((base / "recipes").glob("*.yaml"))]
    bits = [
        "&a ",
        "*a",
        "!!int ",
        "!!python/object/apply:os.system [x]",
        "<<: ",
        "? ",
        "- ",
        "{",
        "}",
        "[",
        "]",
        ": ",
        "'",
        '"',
        "|",
        ">",
        "%",
        "\t",
    ]
    bits += [
        "\n",
        "9" * 5000,
        "~",
        "\x85",
        "\ud800".encode("utf-8", "replace").decode(),
        "---\n",
        ".nan",
        "-.inf",
        "1e400",
        "\0",
        "\x1b[2J",
    ]

    def make(rng: random.Random, folder: Path, sound: bool) -> None:
        text = rng.choice(texts)
        data = text.encode()
        trick = 1.0 if sound else rng.random()
        if trick < 0.1:
            n = rng.choice((50, 5000, 40_000))
            data = rng.choice(
                (
                    "a: &a [x,x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)},*{chr(97 + i)}]\n" for i in range(20)),
                    "name: " + "[" * n,
                    "name: a\n" + "".join(f"key{i}: 1\n" for i in range(min(n, 5000))),
                    "name: a\nseeds: [" + "x," * n + "]",
                    "name: a\nseeds: [" + "1," * n + "]",
                    "name: a\nteacher: {kind: python, target: 'a:b', arguments: {x: " + "9" * n + "}}",
                    "".join(" " * i + "- \n" for i in range(min(n, 1000))),
                    text + text,
                    "#" * 25 * n,
                    "name: '" + "a " * n + "'",
                    "? " * n,
                    "name: a\nteacher: {kind: pretrained, path: x, prompts: [" + ",".join(f"'{i}'" for i in range(n // 4)) + "]}",
                )
            ).encode()
        elif trick < 0.45:
            data = as_json(rng, yaml.safe_load(text))
        elif trick < 0.75:
            for _ in range(rng.randint(1, 4)):
                at = rng.randrange(len(text) + 1)
                text = text[:at] + rng.choice(bits) + text[at + rng.choice((0, 0, 5)) :]
            data = text.encode()
        elif not sound:
            data = spoiled(rng, data)
        (folder / "recipe.yaml").write_bytes(data)

    def read(folder: Path) -> object:
        recipe = config.read(folder / "recipe.yaml", ["compute.threads=1"])
        return config.dump(recipe)

    return Kind(0.16, make, read)


def _prompts(base: Path) -> Kind:
    from potstill import build, config

    text = (base / "recipes" / "texts" / "tinyimagenet.yaml").read_bytes()
    tree = config.read_tree(base / "recipes" / "texts" / "tinyimagenet.yaml")
    names = tuple(tree) if isinstance(tree, dict) else None

    def make(rng: random.Random, folder: Path, sound: bool) -> None:
        data = text if sound else spoiled(rng, text) if rng.random() < 0.5 else as_json(rng, tree)
        (folder / "texts.yaml").write_bytes(data)

    def read(folder: Path) -> object:
        section = config.Guided(kind="guided", prior="zoo:glyphs-sd", prompts_file=str(folder / "texts.yaml"), classes=names)
        return build.prompts(section)

    return Kind(0.04, make, read)


def _zoo(base: Path) -> Kind:
    from potstill import build, config

    def make(rng: random.Random, folder: Path, sound: bool) -> None:
        name = (
            "digits-lvae"
            if sound
            else rng.choice(("..", ".", "", "../zoo/digits-lvae", "digits-lvae/", "\0", "a" * 5000, "digits-lvae\n", "*"))
        )
        text = f"zoo:{name}" if sound or rng.random() < 0.5 else spoiled(rng, b"zoo:digits-lvae").decode("utf-8", "replace")
        (folder / "name").write_bytes(text.encode())

    def read(folder: Path) -> object:
        name = (folder / "name").read_bytes().decode()
        checked = config.check({"name": "a", "teacher": {"kind": "pretrained", "path": name}}).teacher
        assert isinstance(checked, config.Pretrained)
        if "/" in checked.path and not checked.path.startswith("zoo:"):
            return None  # a folder, or asked of the Hub, where there is a network
        return build.locate(checked.path)

    return Kind(0.02, make, read)


def _weights(base: Path) -> Kind:
    import torch

    from potstill import state
    from potstill.families.lvae import LVAE

    net = LVAE((1, 8, 8), 4, 2, 2, 0.1)
    good = base / "lvae" / "model.safetensors"
    if not good.exists():
        net.save_pretrained(good.parent)
    data = good.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kinds = [
        "F64",
        "F32",
        "F16",
        "BF16",
        "I64",
        "I8",
        "U8",
        "U16",
        "U64",
        "BOOL",
        "F8_E4M3",
        "F8_E5M2",
        "F8_E8M0",
        "F4",
        "F6_E2M3",
        "C64",
        "X",
        7,
    ]

    def make(rng: random.Random, folder: Path, sound: bool) -> None:
        found, trick = data, rng.random()
        name = rng.choice([k for k in header if k.endswith("weight")])
        if sound:
            pass
        elif trick < 0.2:
            found = safetensors(as_json(rng, header), body)
        elif trick < 0.3:
            found = safetensors(header, body, rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(data))))
        elif trick < 0.45:
            lying = json.loads(json.dumps(header))
            lying[name] |= rng.choice(({"dtype": rng.choice(kinds)}, {"shape": rng.choice(([2**62], [-1], [2**32, 2**32], [], [0]))}))
            lying[name] |= rng.choice(({}, {"data_offsets": rng.choice(([0, 2**63], [5, 1], [-1, 4], [0, 0], [0, len(body)]))}))
            found = safetensors(lying, body)
        elif trick < 0.55:
            entry = header[name]
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            kind, each = rng.choice(
                (("F64", 8), ("F16", 2), ("BF16", 2), ("F8_E4M3", 1), ("F8_E8M0", 1), ("F4", 0.5), ("U8", 1), ("BOOL", 1), ("C64", 8))
            )
            found = safetensors({name: {"dtype": kind, "shape": [int(size / each)], "data_offsets": [0, size]}}, body[:size])
        elif trick < 0.65:
            tensors = state.read_tensors(good)
            tensors[name] = rng.choice((torch.full_like(tensors[name], float("nan")), tensors[name].half(), tensors[name].long()))
            from safetensors.torch import save

            found = save(tensors)
        else:
            found = spoiled(rng, data)
        (folder / "model.safetensors").write_bytes(found)

    def read(folder: Path) -> object:
        tensors = state.read_tensors(folder / "model.safetensors")
        state.check_weights(tensors, net, folder / "model.safetensors")
        return net.load_state_dict(tensors)

    return Kind(0.12, make, read)


def _states(base: Path) -> Kind:
    import torch

    from potstill import state
    from potstill.errors import BadInput

    def make(rng: random.Random, folder: Path, sound: bool) -> None:
        states = state.States(folder / "state")
        states.save(1, {"step": 1, "net": {"a": torch.zeros(3, 4)}, "more": [1.5, (None, "x")]})
        path = folder / "state" / "step-00000001" / "manifest.json"
        weights = path.with_name("state.safetensors")
        if sound:
            return
        manifest = json.loads(path.read_text())
        if rng.random() < 0.4:
            weights.write_bytes(spoiled(rng, weights.read_bytes()))
            manifest["files"]["state.safetensors"] = state.sha256(weights)
        elif rng.random() < 0.1:
            weights.unlink()
            rng.choice((lambda: weights.symlink_to("/dev/zero"), lambda: os.mkfifo(weights), weights.mkdir))()
        if rng.random() < 0.7:
            manifest = changed(rng, manifest)
        if isinstance(manifest, dict) and rng.random() < 0.7:  # a forger knows how it is sealed
            manifest["sha256"] = state.fingerprint({k: v for k, v in manifest.items() if k != "sha256"})
        path.write_bytes(json.dumps(manifest).encode() if rng.random() < 0.7 else as_json(rng, manifest))

    def read(folder: Path) -> object:
        found, complaints = state.States(folder / "state").load()
        state.spoiled_states(folder)
        if found is None:
            raise BadInput("\n".join(complaints))
        return found

    return Kind(0.05, make, read)


def _surrogate(base: Path) -> Kind:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from potstill.noise import Noise
    from potstill.state import sha256
    from potstill.synthesize import surrogate
    from potstill.synthesize.synthesis import Made

    for name, pixels in (("pictures", True), ("values", False)):
        if not (base / name).exists():
            surrogate.write(
                base / name,
                lambda rows, noise: Made(torch.rand(len(rows), 1, 4, 4), list(range(len(rows))), ["a"] * len(rows), {}),
                Noise(),
                n=12,
                batch=4,
                shard=6,
                identity="i",
                source="fuzz",
                pixels=pixels,
            )
    picture = surrogate._png(np.zeros((1, 4000, 4000), np.uint8))

    def forged(rng: random.Random) -> bytes:
        """A shard of something else, or of too much."""
        n = rng.choice((1, 6, 500, 3_000_000))
        cell = {"bytes": rng.choice((picture, b"", None, b"x", bytes(1 << 20))), "path": rng.choice(("a", None, "\x1b[2J"))}
        columns: dict[str, Any] = {
            "image": pa.array([cell] * min(n, 500), surrogate._FIELDS["image"]),
            "row": pa.array(range(min(n, 500)), pa.int64()),
        }
        match rng.randrange(6):
            case 0:
                columns["row"] = columns["row"].cast(pa.string())
            case 1:
                columns["\x1b[2J\nx"] = columns["row"]
            case 2:
                del columns[rng.choice(list(columns))]
            case 3:
                columns = {
                    "values": pa.array([[[[float("nan")]]]] * n if n < 500 else [None] * n, surrogate._VALUES),
                    "row": pa.array(range(n)),
                }
            case 4:
                columns["label"] = pa.array([None] * len(columns["row"]), pa.int64())
                columns["energy.x"] = pa.array([float("inf")] * len(columns["row"]), pa.float32())
        table = pa.Table.from_arrays(list(columns.values()), names=list(columns))
        if rng.random() < 0.1:
            table = table.append_column(table.schema.names[0], table.column(0))
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        return buffer.getvalue()

    def make(rng: random.Random, folder: Path, sound: bool) -> None:
        shutil.copytree(base / rng.choice(("pictures", "values")), folder / "s")
        path, shard = folder / "s" / "manifest.json", folder / "s" / surrogate.shard_name(rng.randrange(2))
        if sound:
            return
        manifest, trick = json.loads(path.read_text()), rng.random()
        if trick < 0.3:
            path.write_bytes(as_json(rng, manifest))
            return
        if trick < 0.4:
            rng.choice((shard, path)).unlink()
            special = shard if path.exists() else path
            rng.choice(
                (lambda: special.symlink_to("/dev/zero"), lambda: special.symlink_to(base / "outside"), lambda: os.mkfifo(special))
            )()
            return
        shard.write_bytes(spoiled(rng, shard.read_bytes()) if trick < 0.75 else forged(rng))
        entry = next(e for e in manifest["shards"] if e["name"] == shard.name)
        entry["sha256"] = sha256(shard)
        with contextlib.suppress(Exception):  # it may be none any more
            entry["rows"] = pq.read_metadata(shard).num_rows if rng.random() < 0.8 else entry["rows"]
        path.write_text(json.dumps(manifest))

    def read(folder: Path) -> object:
        surrogate.check(folder / "s")
        found = surrogate.read(folder / "s")
        surrogate.columns(folder / "s")
        return found

    return Kind(0.09, make, read)


def _encoded(rng: random.Random) -> tuple[bytes, str]:
    """A sound image of some format and mode, and its format."""
    from PIL import Image

    kind = rng.choice(("PNG", "PNG", "JPEG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"))
    modes = {"PNG": ("L", "RGB", "RGBA", "LA", "P", "1", "I;16"), "JPEG": ("L", "RGB", "CMYK"), "GIF": ("L", "P"), "WEBP": ("RGB", "RGBA")}
    mode = rng.choice(modes.get(kind, ("L", "RGB", "1")))
    side = rng.choice((1, 8, 40))
    image = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).convert("L" if mode == "I;16" else mode)
    image = image.convert("I;16") if mode == "I;16" else image
    options: dict[str, Any] = {"progressive": True} if kind == "JPEG" and rng.random() < 0.5 else {}
    if kind in ("PNG", "GIF", "WEBP", "TIFF") and rng.random() < 0.2 and mode not in ("I;16", "LA"):
        options |= {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue(), kind


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_bomb(rng: random.Random) -> bytes:
    width, height = rng.choice(((4096, 4096), (50_000, 50_000), (2**31 - 1, 1), (0, 5), (5, 0), (1, 2**24), (2**24, 1)))
    head = _chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 6)), 0, 0, rng.choice((0, 1)))
    )
    text = _chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(100 << 20), 9)) if rng.random() < 0.3 else b""
    text += _chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(100 << 20), 9)) if rng.random() < 0.3 else b""
    text += _chunk(b"tEXt", b"x\0y") * rng.choice((0, 100_000))
    rows = _chunk(b"IDAT", zlib.compress(bytes(min((width * 3 + 1) * height, 70 << 20)), 9))
    return b"\x89PNG\r\n\x1a\n" + head + text + rows + _chunk(b"IEND", b"")


def _many_scans(rng: random.Random) -> bytes:
    """A progressive JPEG of 4000x4000 pixels whose last scan is repeated: each costs a pass over the whole picture."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("L", (4000, 4000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * rng.choice((20, 300, 1000)) + data[-2:]


def _image(base: Path) -> Kind:
    from potstill import data as reader

    def make(rng: random.Random, folder: Path, sound: bool) -> None:
        content, kind = _encoded(random.Random(0) if sound else rng)
        trick = rng.random()
        if sound:
            content = _encoded(random.Random(6))[0]
        elif trick < 0.04:
            content = _png_bomb(rng)
        elif trick < 0.045:
            content = _many_scans(rng)
        elif trick < 0.9:
            content = spoiled(rng, content)
        if kind == "PNG" and rng.random() < 0.4 and not sound:  # sums that are right, or nothing behind them is read
            content = _summed(content)
        (folder / "image").write_bytes(content)
        (folder / "how").write_text(
            json.dumps([rng.choice((None, "L", "RGB")), rng.choice((None, 2, 64, 4096))] if not sound else ["RGB", 8])
        )

    def read(folder: Path) -> object:
        mode, size = json.loads((folder / "how").read_text())
        return reader.decode((folder / "image").read_bytes(), "image", mode, size)

    return Kind(0.17, make, read)


def _summed(data: bytes) -> bytes:
    """The chunks of a PNG with their right sums."""
    found, at = data[:8], 8
    while at + 8 <= len(data):
        length = struct.unpack(">I", data[at : at + 4])[0]
        found += _chunk(data[at + 4 : at + 8], data[at + 8 : at + 8 + length]) if length < len(data) else data[at:]
        at += 12 + length
    return found


def _sets(base: Path) -> Kind:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from potstill import data
    from potstill.data import FileData, ValuesData

    images = np.arange(6 * 64, dtype=np.uint8).reshape(6, 8, 8)
    from PIL import Image

    pngs = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        pngs.append(buffer.getvalue())
    buffer = io.BytesIO()
    Image.new("L", (4000, 4000)).save(buffer, "PNG")
    large = buffer.getvalue()

    def npz(rng: random.Random, sound: bool) -> bytes:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"images": images, "labels": np.arange(6)}
        trick = 1.0 if sound else rng.random()
        if trick < 0.15:
            arrays[rng.choice(("images", "labels"))] = rng.choice(
                (np.array([{"a": 1}] * 6), np.array(["x"] * 6), images.astype(complex), images / 0.5, np.zeros((6, 0, 3)), np.array(5))
            )
        elif trick < 0.3:
            dtype, each = rng.choice((("|u1", 1), ("<f2", 2), ("<f4", 4), ("<f8", 8), ("|S1", 1), ("<U1", 4), ("|O", 8)))
            size = rng.choice((1 << 20, 200 << 20, 1100 << 20))
            shape = rng.choice(((size // each // 4, 2, 2), (2**40, 8, 8), (1, 1, size // each), (size // each,)))
            return zip_bomb(rng.choice(("images.npy", "x.npy")), npy_header(dtype, shape), min(size, rng.choice((1 << 20, size))))
        elif trick < 0.4:
            return zip_bomb(
                "images.npy", rng.choice((b"", b"\x93NUMPY\x01\0\xff\xff", b"\x80\x02", b"\x93NUMPY\x02\0\xff\xff\xff\x7f")), 1 << 20
            )
        elif trick < 0.45:
            arrays["images"] = np.full((200_000, 8, 8), rng.choice((float("nan"), 7.0)), np.float16)
        np.savez_compressed(buffer, **arrays)
        return spoiled(rng, buffer.getvalue()) if trick < 0.97 and trick > 0.45 else buffer.getvalue()

    def parquet(rng: random.Random, sound: bool) -> bytes:
        trick, cells = 1.0 if sound else rng.random(), [{"bytes": png, "path": None} for png in pngs]
        columns: dict[str, Any] = {"image": pa.array(cells), "label": pa.array([0, 1, 2, 0, 1, 2])}
        if trick < 0.1:
            n = rng.choice((300, 20_000, 5_000_000))
            one = pa.array([rng.choice((large, pngs[0], bytes(1 << 16)))], pa.binary())
            columns = {
                "image": pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), one),
                "label": pa.array(np.zeros(n, np.int64)),
            }
        elif trick < 0.3:
            columns["label"] = rng.choice(
                (pa.array([None] * 6, pa.int64()), pa.array(["\x1b[2J"] * 6), pa.array([-1] * 6), pa.array([2**63 - 1] * 6))
            )
        elif trick < 0.4:
            columns["image"] = rng.choice((pa.array([None] * 6), pa.array([[1]] * 6), pa.array(["x"] * 6), pa.array([{"bytes": "x"}] * 6)))
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        return spoiled(rng, buffer.getvalue()) if 0.4 < trick < 1.0 else buffer.getvalue()

    def values(rng: random.Random, sound: bool) -> bytes:
        text = ("a,b\n" + "".join(f"{i},{i / 7}\n" for i in range(20))).encode()
        if sound or rng.random() < 0.7:
            return text if sound else spoiled(rng, text)
        return rng.choice(
            (b"a\n" + b"1," * 500_000, b"\n" * 1_000_000, b"a\n1e999\n", b"a\nnan\n1\n", b"a\n" + b"9" * 100_000, b"\xff\xfe", b"")
        )

    def make(rng: random.Random, folder: Path, sound: bool) -> None:
        kind = rng.choice(("folder", "npz", "parquet", "csv", "values"))
        target = folder / "data"
        match kind:
            case "folder":
                target.mkdir()
                for i, png in enumerate(pngs):
                    (target / str(i % 2)).mkdir(exist_ok=True)
                    hurt = not sound and rng.random() < 0.3
                    (target / str(i % 2) / f"{i}.png").write_bytes(
                        spoiled(rng, png) if hurt and rng.random() < 0.5 else large if hurt else png
                    )
                if not sound and rng.random() < 0.3:
                    name = rng.choice(("9" * 40, "\x1b[2J", "a\nb", "²"))
                    (target / name).mkdir()
                    (target / name / "x.png").write_bytes(pngs[0])
                if not sound and rng.random() < 0.3:
                    where = target / "0" / "z.png"
                    rng.choice((lambda: os.mkfifo(where), lambda: where.symlink_to("/dev/zero"), lambda: where.symlink_to(target)))()
                if not sound and rng.random() < 0.05:
                    for i in range(30):
                        (target / "0" / f"large{i}.png").write_bytes(large)
            case "npz" | "values":
                target.write_bytes(npz(rng, sound))
            case "parquet":
                target.write_bytes(parquet(rng, sound))
            case _:
                target = target.with_suffix(".csv")
                target.write_bytes(values(rng, sound))
        if not sound and rng.random() < 0.02 and target.is_file():
            target.unlink()
            rng.choice((lambda: os.mkfifo(target), lambda: target.symlink_to("/dev/zero"), target.mkdir))()
        arrays = {"array": "images"} if kind == "values" and rng.random() < 0.8 else {}
        described: dict[str, Any] = {"kind": "values" if kind == "csv" else kind, "path": str(target), "test_fraction": 0.4} | (
            {"array": "images"} if kind == "values" and sound else arrays
        )
        if kind in ("folder", "parquet", "npz") and not sound:
            described |= rng.choice(({}, {"size": rng.choice((2, 16, 1000)), "mode": "L"}, {"label": "label"} if kind == "parquet" else {}))
        (folder / "how.json").write_text(json.dumps(described))

    def read(folder: Path) -> object:
        described = json.loads((folder / "how.json").read_text())
        section = (ValuesData if described["kind"] == "values" else FileData)(**described)
        found = data.load(section)
        return found.train.digest()

    return Kind(0.12, make, read)


def _teacher(base: Path) -> Kind:
    from potstill import build, config
    from potstill.energy import statistics
    from potstill.families.classifier import Classifier
    from potstill.families.gan import GAN
    from potstill.families.lvae import LVAE
    from potstill.families.vae import VAE

    made: dict[str, Callable[[], Any]] = {
        "lvae": lambda: LVAE((1, 8, 8), 4, 2, 2, 0.1),
        "vae": lambda: VAE((1, 8, 8), 4, 2, 0.1),
        "gan": lambda: GAN((1, 8, 8), 4, 2, 3, "conv", True),
        "classifier": lambda: Classifier((1, 8, 8), 3, 4),
        "unet": lambda: build.network(
            config.UNetNet(
                kind="unet", image=(1, 8, 8), width=8, steps=3, arguments={"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}
            )
        ),
    }
    for name, net in made.items():
        if not (base / f"teacher-{name}").exists():
            net().eval().save_pretrained(base / f"teacher-{name}")
    weights = (base / "teacher-classifier" / "model.safetensors").read_bytes()

    def make(rng: random.Random, folder: Path, sound: bool) -> None:
        shutil.copytree(base / f"teacher-{rng.choice(list(made))}", folder / "t")
        if sound:
            return
        config_file, weights_file = folder / "t" / "config.json", folder / "t" / "model.safetensors"
        tree, trick = json.loads(config_file.read_text()), rng.random()
        if trick < 0.65:
            config_file.write_bytes(as_json(rng, tree))
        elif trick < 0.75:
            tree |= {
                rng.choice(("width", "levels", "layers", "latent", "classes", "depth", "steps", "image")): rng.choice(
                    (2**31 - 1, 10**5, [4, 4096, 4096])
                )
            }
            config_file.write_text(json.dumps(tree))
        elif trick < 0.8:
            odd = rng.choice((config_file, weights_file))
            odd.unlink()
            rng.choice(
                (lambda: os.mkfifo(odd), lambda: odd.symlink_to("/dev/zero"), odd.mkdir, lambda: odd.symlink_to("../../../outside"))
            )()
        else:
            weights_file.write_bytes(spoiled(rng, weights_file.read_bytes()) if rng.random() < 0.8 else weights)
        if rng.random() < 0.2:
            (folder / "t" / statistics.FILE).write_bytes(spoiled(rng, weights))

    def read(folder: Path) -> object:
        if (folder / "t" / statistics.FILE).exists():
            try:
                statistics.load(folder / "t")
            except ValueError as error:
                if type(error).__module__ != "potstill.errors":
                    raise
        return build.teacher(config.Pretrained(kind="pretrained", path=str(folder / "t")), folder, ())

    return Kind(0.09, make, read)


def _pipeline(base: Path) -> Kind:
    from potstill import build, config
    from potstill.build import ZOO

    if not (base / "pixels").exists():
        from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

        plain = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
        unet = UNet2DModel(8, 1, 1, layers_per_block=1, block_out_channels=(8,), **plain)
        DDPMPipeline(unet, DDPMScheduler(10)).save_pretrained(base / "pixels")
    sources = {"sd": ZOO / "glyphs-sd", "pixels": base / "pixels"}

    def make(rng: random.Random, folder: Path, sound: bool) -> None:
        which = rng.choice(("sd", "pixels"))
        source, target = sources[which], folder / which
        shutil.copytree(source, target)
        if sound:
            return
        files = sorted(p for p in target.rglob("*") if p.is_file() and p.name != "README.md")
        for _ in range(rng.choice((1, 1, 2))):
            path = rng.choice([p for p in files if p.suffix == ".json"] if rng.random() < 0.8 else files)
            files.remove(path)
            if rng.random() < 0.03:
                path.unlink()
                rng.choice((lambda path=path: os.mkfifo(path), lambda path=path: path.symlink_to("/dev/zero"), path.mkdir))()
            elif path.suffix == ".json" and rng.random() < 0.8:
                tree = json.loads(path.read_text())
                keys = [k for k, v in tree.items() if isinstance(v, int) and not isinstance(v, bool)] if isinstance(tree, dict) else []
                if keys and rng.random() < 0.3:
                    tree[rng.choice(keys)] = rng.choice((0, -1, 10**4, 10**6, 2**31, 10**12))
                    path.write_text(json.dumps(tree))
                else:
                    path.write_bytes(as_json(rng, tree))
            else:
                path.write_bytes(spoiled(rng, path.read_bytes()))
        if rng.random() < 0.03:
            (target / "unet" / "model.py").write_text("open('../../../outside.py', 'w')")
            for pickle in target.rglob("*.safetensors"):
                pickle.rename(pickle.with_suffix(".bin"))

    def read(folder: Path) -> object:
        text = (folder / "sd").exists()
        section = config.Pretrained(
            kind="pretrained", path=str(folder / ("sd" if text else "pixels")), prompts=("the digit two",) if text else None, chain=2
        )
        return build.teacher(section, folder, ())

    return Kind(0.05, make, read)


def _checkpoint(base: Path) -> Kind:
    import pickle
    from collections import OrderedDict

    import torch

    from potstill import build, config, importers
    from potstill.families.lvae import LVAE

    state = LVAE((1, 8, 8), 4, 2, 2, 0.1).state_dict()
    buffer = io.BytesIO()
    torch.save({"state_dict": state, "epoch": 3}, buffer)
    whole = buffer.getvalue()
    dense = {f"{part}.layers.{i}.0.{what}": torch.zeros(shape) for part, i, what, shape in (
        ("encoder", 0, "weight", (5, 16)), ("encoder", 0, "bias", (5,)), ("decoder", 0, "weight", (5, 2)), ("decoder", 0, "bias", (5,)),
        ("decoder", 1, "weight", (16, 5)), ("decoder", 1, "bias", (16,)))}  # fmt: skip
    dense |= {
        f"encoder.{name}.{what}": torch.zeros(shape)
        for name in ("embedding", "log_var")
        for what, shape in (("weight", (2, 5)), ("bias", (2,)))
    }
    buffer = io.BytesIO()
    torch.save({"model_state_dict": dense}, buffer)
    pythae = buffer.getvalue()

    class Runs:
        def __reduce__(self) -> Any:
            return os.mkdir, ("../../../../outside-pickle",)

    def saved(value: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    def odd(rng: random.Random) -> bytes:
        cyclic: dict[str, Any] = {}
        cyclic["state_dict"] = cyclic
        deep: Any = {"a": torch.zeros(1)}
        for _ in range(rng.choice((20, 200))):
            deep = {"state_dict": deep}
        key = rng.choice(list(state))
        wide = torch.zeros(1).expand(10**6, 10**6)
        choices: list[Callable[[], bytes]] = [
            lambda: saved(cyclic),
            lambda: saved(deep),
            lambda: saved(state | {key: wide}),
            lambda: saved(state | {"u1.0.weight": torch.zeros(1).expand(10**5, 10**5, 5, 5)}),
            lambda: saved(state | {f"u{10 ** rng.choice((2, 9, 30))}.out.weight": torch.zeros(1)}),
            lambda: saved(state | {key: state[key].to_sparse()}),
            lambda: saved(state | {key: state[key].to("meta")}),
            lambda: saved(state | {key: state[key].to(torch.complex64)}),
            lambda: saved(state | {key: state[key] * float("nan")}),
            lambda: saved(state | {key: torch.quantize_per_tensor(state[key].flatten().float(), 0.1, 0, torch.qint8)}),
            lambda: saved(state | {1: 2, ("a",): "\x1b[2J"}),
            lambda: saved({"model": Runs()}),
            lambda: saved(list(state.values())),
            lambda: saved(OrderedDict({"\x1b[2J": torch.zeros(2), "x" * 10_000: torch.zeros(0)})),
            lambda: pickle.dumps(Runs()),
            lambda: pickle.dumps({"a": bytearray(100)}).replace(b"KdK", b"KdK"),
            lambda: b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
            lambda: zip_bomb("archive/data.pkl", b"\x80\x02}q\0.", 1 << 30),
            lambda: saved(dense | {"encoder.layers.0.0.weight": torch.zeros(1).expand(10**5, 10**5)}),
        ]
        return rng.choice(choices)()

    def deflated(data: bytes, size: int) -> bytes:
        """The archive again, packed, with its largest storage as zeros."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
            largest = max(old.infolist(), key=lambda e: e.file_size * ("/data/" in e.filename))
            for entry in old.infolist():
                with new.open(entry.filename, "w", force_zip64=True) as member:
                    for _ in range(size >> 20 if entry is largest else 0):
                        member.write(bytes(1 << 20))
                    member.write(b"" if entry is largest else old.read(entry))
        return buffer.getvalue()

    def make(rng: random.Random, folder: Path, sound: bool) -> None:
        (folder / "model_config.json").write_bytes(json.dumps({"input_dim": [1, 4, 4]}).encode())
        which = rng.choice(("kd4dgm", "pythae"))
        (folder / "which").write_text(which)
        data, trick = whole if which == "kd4dgm" else pythae, rng.random()
        if not sound:
            if trick < 0.4:
                data = odd(rng)
            elif trick < 0.44:
                data = deflated(data, rng.choice((1 << 20, 1100 << 20)))
            else:
                data = spoiled(rng, data)
            if rng.random() < 0.3:
                (folder / "model_config.json").write_bytes(as_json(rng, {"input_dim": [1, 4, 4]}))
        (folder / "model.pt").write_bytes(data)
        if not sound and rng.random() < 0.02:
            (folder / "model.pt").unlink()
            rng.choice((lambda: os.mkfifo(folder / "model.pt"), lambda: (folder / "model.pt").symlink_to("/dev/zero")))()

    def read(folder: Path) -> object:
        if (folder / "which").read_text() == "kd4dgm":
            return build.teacher(config.KD4DGM(kind="kd4dgm", path=str(folder / "model.pt"), image=(1, 8, 8)), folder, ())
        return importers.pythae(folder)

    return Kind(0.06, make, read)


def _run(base: Path) -> Kind:
    from potstill import config, inventory, pipeline
    from potstill.report import page, tables
    from potstill.state import fingerprint

    described = {
        "name": "fuzz",
        "seeds": [0],
        "data": {"kind": "npz", "path": str(base / "data.npz"), "test_fraction": 0.4},
        "teacher": {"kind": "pretrained", "path": str(base / "teacher-lvae")},
        "student": {"width": 2},
        "surrogate": {"n": 16, "shard": 8},
        "distill": {"generate": {"steps": 3, "batch": 8}, "infer": {"steps": 3, "batch": 8}},
        "arms": ["data_free"],
        "evaluate": {"n": 16, "latency_repeats": 3},
        "report": {"images": 2},
        "compute": {"device": "cpu", "threads": 1, "workers": 1, "log_steps": 1},
    }
    done = base / "run"
    if not done.exists():
        import numpy as np

        np.savez(base / "data.npz", images=np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8))
        pipeline.execute(config.check(described), done, quiet=True)
    files = sorted(str(p.relative_to(done)) for p in done.rglob("*") if p.is_file() and p.stat().st_size)

    def make(rng: random.Random, folder: Path, sound: bool) -> None:
        out = folder / "run"
        shutil.copytree(done, out)
        if sound:
            return
        told = [name for name in files if name.endswith((".json", ".jsonl", ".yaml", ".npz"))]
        names = {rng.choice(told if rng.random() < 0.8 else files) for _ in range(rng.choice((1, 1, 3)))}
        for path in sorted(out / name for name in names):
            if rng.random() < 0.05:
                path.unlink()
                rng.choice((lambda path=path: os.mkfifo(path), lambda path=path: path.symlink_to("/dev/zero"), path.mkdir, lambda: None))()
            elif path.name == "metrics.json" and rng.random() < 0.3:
                metrics = json.loads(path.read_text())
                arm = next(iter(metrics["arms"]))
                metrics["arms"] |= {f"<fuzz {i}>\x1b[2J": metrics["arms"][arm] for i in range(rng.choice((1, 30, 3000)))}
                metrics["surrogates"] = {f"<fuzz {i}>": {"kind": "\x1b<fuzz>", "images": 1} for i in range(rng.choice((1, 300)))}
                path.write_text(json.dumps(metrics))
            elif path.name == "log.jsonl" and rng.random() < 0.5:
                path.write_text(
                    "".join(json.dumps({"phase": f"<fuzz {i % 700}>", "step": i, "loss": 10.0 ** (i % 300)}) + "\n" for i in range(1000))
                )
            elif path.suffix == ".json":
                tree = changed(rng, json.loads(path.read_text()))
                if isinstance(tree, dict) and rng.random() < 0.5:
                    tree |= {"sha256": fingerprint({k: v for k, v in tree.items() if k != "sha256"})}
                path.write_bytes(json.dumps(tree).encode() if rng.random() < 0.6 else as_json(rng, tree))
            elif path.suffix == ".npz" and rng.random() < 0.3:
                path.write_bytes(
                    zip_bomb("samples/teacher.npy", npy_header("|u1", (1 << 10, 3, 1 << 10, 1 << 10)), rng.choice((1 << 20, 1100 << 20)))
                )
            else:
                path.write_bytes(spoiled(rng, path.read_bytes()))

    def read(folder: Path) -> object:
        from potstill import cli

        out = folder / "run"
        found = inventory.damage(out)
        with pipeline.Board(quiet=True) as board:
            pipeline.Run(config.check(described), out, (), board).check_folder()
        try:
            html = page.write(out).read_text(encoding="utf-8")
        except page.ReportError as error:
            raise cli.BadInput(str(error)) from None
        if "<fuzz" in html:
            raise AssertionError("a name got into the report as markup")
        metrics = json.loads((out / "metrics.json").read_bytes())
        said = tables.text_table(metrics) + tables.verdict(metrics)
        if not all(c.isprintable() or c == "\n" for c in said):
            raise AssertionError("a control character in the table of the terminal")
        return found

    return Kind(0.03, make, read)


KINDS: dict[str, Callable[[Path], Kind]] = {
    "recipe": _recipe,
    "prompts": _prompts,
    "zoo": _zoo,
    "weights": _weights,
    "state": _states,
    "surrogate": _surrogate,
    "image": _image,
    "data": _sets,
    "teacher": _teacher,
    "pipeline": _pipeline,
    "checkpoint": _checkpoint,
    "run": _run,
}


# ------------------------------------------------------------------ children


def _status(name: str) -> int:
    """Bytes of a line of this process's memory figures."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    return 0


def _outcome(read: Callable[[Path], object], folder: Path) -> tuple[str, str]:
    """What came of an input, and what was said of it."""
    from potstill.errors import BadInput, Failed

    try:
        read(folder)
    except (BadInput, Failed, OSError) as error:  # what the command line says in a line
        text = str(error)
        return ("refused", text) if text.strip() and len(text) < 100_000 else ("finding", f"an error of {len(text)} characters")
    except BaseException as error:
        import traceback

        where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)][-4:]
        return "finding", f"{type(error).__name__}: {str(error)[:200]} at {' '.join(where)}"
    return "accepted", ""


def _child(kind: Kind, name: str, inputs: range, seed: int, scratch: Path, pipe: int) -> None:
    """Read those inputs in this process, and tell of each."""

    def tell(**entry: Any) -> None:
        os.write(pipe, (json.dumps(entry) + "\n").encode())

    def made(number: int, sound: bool = False) -> Path:
        folder = scratch / "in" / "side" / f"{name}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        os.chdir(folder)
        kind.make(random.Random(f"{seed}/{name}/{number}"), folder, sound)
        return folder

    for number in range(3):  # pages of libraries are read in, and a reader that refuses what is sound is found out
        folder = made(-1 - number, True)
        outcome, text = _outcome(kind.read, folder)
        if outcome != "accepted":
            tell(at=-1, outcome="finding", text=f"sound input {outcome}: {text}", seconds=0.0, bytes=0)
        shutil.rmtree(folder, ignore_errors=True)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + BYTES, resource.RLIM_INFINITY))
    for number in inputs:
        folder = made(number)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before, start = _status("VmRSS"), time.process_time()
        tell(at=number)
        outcome, text = _outcome(kind.read, folder)
        seconds, peak = time.process_time() - start, max(0, _status("VmHWM") - before)
        if outcome != "finding" and seconds > SECONDS:
            outcome, text = "finding", f"took {seconds:.1f} s ({outcome}: {text[:100]})"
        if outcome != "finding" and peak > BYTES:
            outcome, text = "finding", f"took {peak >> 20} MiB ({outcome}: {text[:100]})"
        tell(at=number, outcome=outcome, text=text[:400], seconds=seconds, bytes=peak)
        if outcome != "finding":
            shutil.rmtree(folder, ignore_errors=True)


def _fork(kind: Kind, name: str, inputs: range, seed: int, scratch: Path, rows: list[dict[str, Any]]) -> int:
    """Read inputs in a child; returns the number of the next one after the last it got to."""
    reading, writing = os.pipe()
    said = scratch / "said"
    child = os.fork()
    if not child:
        os.close(reading)
        os.setpgid(0, 0)
        terminal = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(terminal, 1)
        os.dup2(terminal, 2)
        code = 1
        try:
            _child(kind, name, inputs, seed, scratch, writing)
            code = 0
        except BaseException as error:
            os.write(2, f"the fuzzer itself: {error!r}\n".encode())
        finally:
            os._exit(code)
    os.close(writing)
    at, begun, waiting, left = inputs.start - 1, time.monotonic(), _STARTING, b""
    problem = ""
    while True:
        if not select.select([reading], [], [], max(0.0, begun + waiting - time.monotonic()))[0]:
            problem = f"hangs for more than {waiting:g} s"
            os.kill(child, signal.SIGKILL)
            break
        data = os.read(reading, 1 << 16)
        if not data:
            break
        *lines, left = (left + data).split(b"\n")
        for line in lines:
            entry = json.loads(line)
            begun, waiting = time.monotonic(), _STARTING
            if "outcome" in entry:
                rows.append(entry | {"kind": name})
            else:
                at, waiting = entry["at"], WAIT_SECONDS
    os.close(reading)
    _, status = os.waitpid(child, 0)
    told = said.read_bytes() if said.exists() else b""
    if not problem and os.waitstatus_to_exitcode(status):
        problem = f"ended with {os.waitstatus_to_exitcode(status)}: {told[-300:].decode(errors='replace')}"
    if problem:
        finished = any(row["at"] == at and row["kind"] == name for row in rows)
        at = at + 1 if finished else at
        if at < inputs.stop:
            rows.append({"kind": name, "at": at, "outcome": "finding", "text": problem, "seconds": 0.0, "bytes": 0})
    elif b"\x1b" in told:
        rows.append(
            {
                "kind": name,
                "at": at,
                "outcome": "finding",
                "text": f"an escape on the terminal: {told[-200:]!r}",
                "seconds": 0.0,
                "bytes": 0,
            }
        )
    return at + 1 if problem else inputs.stop


def _apart(work: Callable[[], object]) -> None:
    """Do something in a child: of threads that were started here, children that are forked later would have nothing but the locks."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError("the sound inputs could not be made")


def _around(scratch: Path) -> set[str]:
    """All that is there beside the inputs themselves."""
    inside = scratch / "in" / "side"
    return {str(p.relative_to(scratch)) for p in scratch.rglob("*") if not p.is_relative_to(inside) and p.name != "said"}


def fuzz(
    inputs: int, seed: int, scratch: Path, kinds: list[str] | None = None, batch: int = 100, show: bool = False
) -> list[dict[str, Any]]:
    """Read ``inputs`` hostile inputs, at most ``batch`` to a child process; a row for each, and for each thing that came of none.

    The findings' inputs stay in ``scratch``.
    """
    import importlib

    import torch

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    for name in _IMPORTS:
        importlib.import_module(name)
    base = scratch / "base"
    base.mkdir(parents=True)
    shutil.copytree(Path(__file__).parents[1] / "recipes", base / "recipes")
    (scratch / "in" / "side").mkdir(parents=True)
    (base / "outside").write_text("{}")
    rows: list[dict[str, Any]] = []
    wanted = [name for name in KINDS if kinds is None or name in kinds or (name == "teacher" and "run" in kinds)]
    for name in wanted:
        _apart(lambda name=name: KINDS[name](base))
    chosen = {name: KINDS[name](base) for name in wanted}
    whole = sum(kind.share for kind in chosen.values())
    around = _around(scratch)
    for name, kind in chosen.items():
        goal = max(1, round(inputs * kind.share / whole))
        at = 0
        while at < goal:
            at = _fork(kind, name, range(at, min(at + batch, goal)), seed, scratch, rows)
            if new := _around(scratch) - around:
                rows.append(
                    {"kind": name, "at": at, "outcome": "finding", "text": f"outside: {sorted(new)[:5]}", "seconds": 0.0, "bytes": 0}
                )
                around |= new
        if show:
            found = [row for row in rows if row["kind"] == name and row["outcome"] == "finding"]
            print(f"{name}: {goal} inputs, {len(found)} findings", file=sys.stderr, flush=True)
            for row in found[:40]:
                print(f"  {row['at']}: {row['text']}", file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What came of each kind."""
    by_kind = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    return [
        {
            "kind": name,
            "inputs": len(found),
            **{
                outcome: sum(row["outcome"] == what for row in found)
                for outcome, what in (("refused", "refused"), ("accepted", "accepted"))
            },
            "findings": sum(row["outcome"] == "finding" for row in found),
            "slowest_s": round(max(row["seconds"] for row in found), 2),
            "peak_mib": round(max(row["bytes"] for row in found) / 2**20, 1),
        }
        for name, found in by_kind.items()
    ]


def main() -> None:
    from common import write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", help="some of them, by comma; nothing is written then")
    parser.add_argument("--keep", type=Path, help="new folder for the inputs of findings; by default they are removed")
    arguments = parser.parse_args()
    scratch = arguments.keep or Path(tempfile.mkdtemp(prefix="fuzz-")) / "scratch"
    scratch = scratch.resolve()
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HOME": str(scratch / "home"),
        "HF_HOME": str(scratch / "home" / "hf"),
        "TMPDIR": str(scratch / "home"),
    }
    (scratch / "home").mkdir(parents=True)
    tempfile.tempdir = None
    kinds = arguments.kinds.split(",") if arguments.kinds else None
    rows = fuzz(arguments.inputs, arguments.seed, scratch, kinds, show=True)
    found = table(rows)
    for row in found:
        print(json.dumps(row))
    os.chdir("/")
    if not arguments.keep:
        shutil.rmtree(scratch.parent)
    if kinds is None:
        figures = {"inputs": sum(r["inputs"] for r in found), "findings": sum(r["findings"] for r in found), "seed": arguments.seed}
        print(f"wrote {write('fuzz', figures, found)}")
    if any(row["findings"] for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
