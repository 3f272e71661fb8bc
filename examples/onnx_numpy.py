"""Images from an exported student, with onnxruntime and numpy alone: neither torch nor potstill is needed.

potstill export runs/digits-demo --to onnx --out student
python examples/onnx_numpy.py student images.png
"""

import json
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import onnxruntime

if len(sys.argv) not in (3, 4):
    sys.exit(f"usage: python {sys.argv[0]} FOLDER IMAGE.png [SEED]; FOLDER is what potstill export --to onnx wrote")
folder, target = Path(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
rows = columns = 8

# export.json says what the graph takes: one tensor of noise for each node of the model, under the node's name.
inputs = json.loads((folder / "export.json").read_text())["graphs"]["model.onnx"]["inputs"]
draw = {"normal": rng.standard_normal, "uniform": rng.random}
noise = {i["name"]: draw[i["kind"]]((rows * columns, *i["shape"][1:])).astype(np.float32) for i in inputs}

session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
(images,) = session.run(["image"], noise)  # (64, C, H, W) in [0, 1]

_, channels, height, width = images.shape
grid = images.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
pixels = (255 * grid).round().astype(np.uint8)


# A PNG file is three chunks: its size, its rows, and its end.
def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


size = struct.pack(">2I5B", columns * width, rows * height, 8, 0 if channels == 1 else 2, 0, 0, 0)  # 8 bits, gray or RGB
lines = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: the row as it is
png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
Path(target).write_bytes(png)
