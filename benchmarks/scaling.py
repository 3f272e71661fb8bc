"""What a million guided images of Stable Diffusion 1.5 take: operations counted on its real shapes, without its weights, and bytes.

The denoiser, the decoder and the teacher are built from their published configurations on torch's meta device, which computes shapes
alone, and their multiplications and additions are counted, forward and back to their input. No time is measured here: hours are
operations over a rate that the reader may set, PNG files of 32 by 32
pixels take about 2.3 kB each.

    python benchmarks/scaling.py [--steps 20] [--tflops 200]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import write
from potstill.families.classifier import ResNet

UNET: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
TEACHER: dict[str, Any] = {"image": (3, 32, 32), "classes": 10, "depth": 56, "width": 16}


def counted(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[int, int]:
    """Floating point operations of a network, forward alone, and forward and back to its input."""
    found = []
    for back in (False, True):
        given = x.detach().requires_grad_(back)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(back):
            y = call(given)
            if back:
                y.sum().backward()
        found.append(counter.get_total_flops())
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tflops", type=float, default=200, help="10^12 operations that a GPU does in a second of this work")
    arguments = parser.parse_args()
    with torch.device("meta"):
        parts: dict[str, nn.Module] = {
            "denoiser": UNet2DConditionModel(**UNET),
            "decoder": AutoencoderKL(**VAE),
            "teacher": ResNet(**TEACHER),
        }
        for part in parts.values():
            part.eval().requires_grad_(False)
        texts, latents = torch.empty(1, 77, 768), torch.empty(1, 4, 64, 64)
        unet, vae, teacher = parts["denoiser"], parts["decoder"], parts["teacher"]
        counts = {
            "denoiser": counted(lambda z: unet(z, torch.ones(1), texts, return_dict=False)[0], latents),
            "decoder": counted(lambda z: vae.decode(z, return_dict=False)[0], latents),
            "teacher": counted(teacher, torch.empty(1, 3, 32, 32)),
        }
    rows: list[dict[str, Any]] = [
        {"part": name, "parameters": sum(p.numel() for p in parts[name].parameters()), "forward": forward, "with_gradient": whole}
        for name, (forward, whole) in counts.items()
    ]
    unguided = 2 * counts["denoiser"][0]  # twice: with the text and without, for classifier-free guidance
    seen = counts["teacher"][1]
    ways = {
        "off": unguided,
        "clean, linear decode": unguided + seen,
        "clean, whole decoder": unguided + counts["decoder"][1] + seen,
        "full, linear decode": 2 * counts["denoiser"][1] + seen,
        "full, whole decoder": 2 * counts["denoiser"][1] + counts["decoder"][1] + seen,
    }
    figures: dict[str, float] = {"steps": arguments.steps, "assumed_tflops": arguments.tflops}
    for way, per_step in ways.items():
        per_image = arguments.steps * per_step + counts["decoder"][0]
        hours = per_image * 1e6 / (arguments.tflops * 1e12) / 3600
        rows.append({"way": way, "tflop_per_image": per_image / 1e12, "gpu_hours_per_million": hours})
        print(f"{way:22} {per_image / 1e12:8.1f} TFLOP an image, {hours:7.0f} GPU hours a million at {arguments.tflops:g} TFLOP/s")
    print(f"wrote {write('scaling', figures, rows)}")


if __name__ == "__main__":
    main()
