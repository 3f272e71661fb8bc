"""Images from an exported student, with onnxruntime and numpy, and PIL to write the file: neither torch nor potstill is needed.

potstill export runs/digits-demo --to onnx --out student
python examples/onnx_numpy.py student images.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

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
Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(target)
