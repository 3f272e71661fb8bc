"""How fast is guided synthesis? ``Guided``, in batches, against the published algorithm written out, on the same pipeline and teacher.

The published loop is that of Qi et al., "Data-free knowledge distillation with diffusion models", 2025, with its gradient repaired:
one image at a time; two calls of the denoiser a step, for classifier-free guidance; the whole decoder; the teacher; the gradient
through all of them; and ``latents - size * gradient`` before the scheduler's step. Both are given the best of three sizes of their
step, by the energy of the images, and take turns in one process, so that a machine whose speed drifts slows both.

Where the networks are so small that a call costs more than its arithmetic, a batch is what makes the difference: that is ``tiny``,
of the tests' widths. ``small`` is bound by arithmetic on one thread of a CPU, and all that is left to save is the decoder.
The weights are random, on which speed does not depend. No cheap decoder stands in for a random one, so those of its rows tell a
speed alone; ``--prior`` takes a trained pipeline instead.

    python benchmarks/guided_speed.py
    python benchmarks/guided_speed.py --size sd15 --device cuda
    python benchmarks/guided_speed.py --prior FOLDER
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import write
from potstill.build import pretrained
from potstill.energy import Energy, Look, batchnorm, cross_entropy
from potstill.families.classifier import ResNet
from potstill.families.diffusion import tokenizer
from potstill.model import Model
from potstill.noise import Noise
from potstill.synthesize.guided import Guided, fitted
from potstill.synthesize.prior import Prior, Prompts
from potstill.synthesize.synthesis import Synthesizer

ENERGY = cross_entropy + 0.1 * batchnorm
PROMPTS = Prompts(tuple((f"a picture of {label}",) for label in range(10)))
STRENGTH = 3.0  # of classifier-free guidance
CLIP = 3.0  # ten times the usual: the published loop knows no bound, and nothing pulls the images of a random denoiser back
NOISE = Noise((0,))


@dataclass(frozen=True)
class Size:
    """A pipeline of Stable Diffusion's shape.

    Args:
        side: of the latents, in pixels.
        channels: of the denoiser's levels; the last has no attention.
        layers: of each level.
        heads: of the attention.
        text: width of the text encoder.
        tokens: of a prompt.
        decoder: channels of the autoencoder's levels, each but the last twice as large as the next.
        groups: of the normalization.
        images: that each variant makes.
        batch: of ours.
        steps: of the sampler.
        sizes: of the published loop's step that are tried.
        scales: of ours.
    """

    side: int
    channels: tuple[int, ...]
    layers: int
    heads: int
    text: int
    tokens: int
    decoder: tuple[int, ...]
    groups: int
    images: int
    batch: int
    steps: int = 10
    sizes: tuple[float, ...] = (3.0, 10.0, 30.0)
    scales: tuple[float, ...] = (100.0, 300.0, 1000.0)

    def divided(self, by: int) -> Size:
        """A narrower one on smaller latents, to try the code on a small machine."""

        def narrow(channels: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(max(self.groups, c // by // self.groups * self.groups) for c in channels)

        return replace(self, side=self.side // by, channels=narrow(self.channels), decoder=narrow(self.decoder))


SIZES = {
    "tiny": Size(side=8, channels=(8, 16), layers=1, heads=4, text=8, tokens=16, decoder=(8, 8, 8), groups=4, images=32, batch=32),
    "small": Size(side=16, channels=(32, 64), layers=2, heads=2, text=32, tokens=16, decoder=(32, 32, 64), groups=8, images=8, batch=8),
    "sd15": Size(
        side=64,
        channels=(320, 640, 1280, 1280),
        layers=2,
        heads=8,
        text=768,
        tokens=77,
        decoder=(128, 256, 512, 512),
        groups=32,
        images=4,
        batch=4,
        sizes=(0.3, 1.0, 3.0),
    ),
}


def pipeline(size: Size, device: torch.device, dtype: torch.dtype) -> Prior:
    """A random one."""
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer([text for texts in PROMPTS.wordings for text in texts], Path(folder))
    words.model_max_length = size.tokens
    levels, stages = len(size.channels), len(size.decoder)
    torch.manual_seed(0)
    with torch.device(device):
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=size.text,
                intermediate_size=4 * size.text,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=size.tokens,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=size.side,
            in_channels=4,
            out_channels=4,
            block_out_channels=size.channels,
            down_block_types=(*("CrossAttnDownBlock2D",) * (levels - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (levels - 1)),
            layers_per_block=size.layers,
            cross_attention_dim=size.text,
            attention_head_dim=size.heads,  # diffusers' name for their number
            norm_num_groups=size.groups,
        )
        vae = AutoencoderKL(
            block_out_channels=size.decoder,
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            layers_per_block=size.layers,
            latent_channels=4,
            norm_num_groups=size.groups,
            sample_size=size.side * 2 ** (stages - 1),
        )
        width, blocks = max(size.decoder[0] // 2, 4), (*(size.layers + 1,) * (stages - 1), 1)
        cheap = AutoencoderTiny(
            encoder_block_out_channels=(width,) * stages,
            decoder_block_out_channels=(width,) * stages,
            num_encoder_blocks=blocks[::-1],
            num_decoder_blocks=blocks,
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    return Prior(_cast(unet, dtype), scheduler, _cast(vae, dtype), [(words, text)], _cast(cheap, dtype))


def _cast(net: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in net.parameters():
        parameter.data = parameter.data.to(dtype)
    return net


@dataclass(frozen=True)
class Published:
    """The published algorithm, for a batch of one. Its first six arguments are those of :class:`Guided`."""

    prior: Prior
    shape: tuple[int, int, int]
    steps: int
    scale: float

    def __call__(self, energy: Energy, look: Look, n: int, noise: Noise, watch: Any = None) -> Tensor:
        """``(1, C, H, W)`` in [0, 1]."""
        prior, scheduler = self.prior, copy.deepcopy(self.prior.scheduler)
        scheduler.set_timesteps(self.steps)
        condition = prior.condition(PROMPTS.of(look.labels, noise, n), None, "", STRENGTH)
        latents = noise.normal("latents", (n, *prior.latent_shape), prior.device)
        for t in scheduler.timesteps:
            latents.requires_grad_()
            without = prior.unet(latents.to(prior.dtype), t, **condition.negative).sample.float()
            along = prior.unet(latents.to(prior.dtype), t, **condition.arguments).sample.float()
            predicted = without + STRENGTH * (along - without)
            product = scheduler.alphas_cumprod[t]
            clean = (latents - (1 - product).sqrt() * predicted) / product.sqrt()
            loss = energy(look(self._decoded(clean))).sum()
            (slope,) = torch.autograd.grad(loss, latents)
            latents = scheduler.step(predicted.detach(), t, latents.detach() - self.scale * slope).prev_sample
        with torch.no_grad():
            return self._decoded(latents).clamp(0, 1)

    def _decoded(self, clean: Tensor) -> Tensor:
        vae = self.prior.vae
        pictures = vae.decode((clean / vae.config.scaling_factor).to(self.prior.dtype)).sample.float() * 0.5 + 0.5
        return fitted(pictures, self.shape)


@dataclass(frozen=True)
class Variant:
    """One way to make the images, with the sizes of its step that are tried."""

    make: Callable[[float], Synthesizer]
    batch: int
    scales: tuple[float, ...]


def variants(prior: Prior, shape: tuple[int, int, int], size: Size) -> dict[str, Variant]:
    """The published loop, ours, and ours without guidance."""

    def ours(mode: str, decode: str = "vae") -> Variant:
        def make(scale: float) -> Guided:
            return Guided(prior, shape, size.steps, mode, scale, CLIP, decode=decode, prompts=PROMPTS, guidance_scale=STRENGTH)

        return Variant(make, size.batch, (1.0,) if mode == "off" else size.scales)

    found = {"published": Variant(lambda scale: Published(prior, shape, size.steps, scale), 1, size.sizes)}
    for mode in ("full", "clean"):
        found |= {
            f"{mode}, {decode}": ours(mode, decode) for decode in ("vae", "tiny", "linear") if decode != "tiny" or prior.tiny is not None
        }
    return found | {"unguided": ours("off")}


def draw(sampler: Synthesizer, teacher: Model, n: int, batch: int) -> Tensor:
    """``(n, C, H, W)``; row ``i`` is made for label ``i`` modulo 10."""
    parts = []
    for start in range(0, n, batch):
        rows = range(start, min(start + batch, n))
        look = Look(teacher, labels=torch.tensor(rows, device=teacher.device) % 10)
        parts.append(sampler(ENERGY, look, len(rows), NOISE.at(rows)))
    return torch.cat(parts)


@torch.no_grad()
def energies(images: Tensor, teacher: Model) -> tuple[float, float]:
    """Mean energy of finished images, seen together, as ours are made, and each alone, as the published loop saw it."""
    labels = torch.arange(len(images), device=images.device) % 10
    alone = [ENERGY(Look(teacher, labels=y)(x)) for x, y in zip(images.split(1), labels.split(1), strict=True)]
    return float(ENERGY(Look(teacher, labels=labels)(images)).mean()), float(torch.cat(alone).mean())


def peak(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """What some work returns, and the MiB it took at its peak above what rested before: of the GPU, or else resident, as Linux counts."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return work(), (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that the allocator keeps would hide what is taken from it
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return work(), math.nan
    before = _resident("VmRSS")
    return work(), (_resident("VmHWM") - before) / 2**10


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def tuned(variant: Variant, teacher: Model, n: int) -> float:
    """The scale whose images have the lowest energy."""
    if len(variant.scales) == 1:
        return variant.scales[0]
    found = {scale: energies(draw(variant.make(scale), teacher, n, variant.batch), teacher)[0] for scale in variant.scales}
    return min(found, key=lambda scale: math.inf if math.isnan(found[scale]) else found[scale])


def measure(prior: Prior, teacher: Model, size: Size, repeats: int) -> list[dict[str, Any]]:
    """One row a variant."""
    rows, draws = {}, {}
    for name, variant in variants(prior, teacher.images.shape, size).items():
        scale = tuned(variant, teacher, max(size.images // 4, 1))
        draws[name] = partial(draw, variant.make(scale), teacher, size.images, variant.batch)
        images, memory = peak(draws[name], prior.device)
        together, alone = energies(images, teacher)
        row = {"batch": variant.batch, "scale": scale, "energy": together, "energy_alone": alone, "peak_mib": memory}
        rows[name] = {"variant": name, **row}
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for _ in range(repeats):
        for name, work in draws.items():
            start = time.perf_counter()
            work()
            if prior.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    for name, row in rows.items():
        row["images_per_s"] = size.images / statistics.median(seconds[name])
        row["speedup"] = statistics.median(a / b for a, b in zip(seconds["published"], seconds[name], strict=True))
    return list(rows.values())


def fastest(rows: list[dict[str, Any]], mode: str) -> dict[str, Any]:
    """Of a mode, the fastest variant of no higher energy than the published loop's, or else the one with the whole decoder."""
    published = next(row for row in rows if row["variant"] == "published")
    found = [row for row in rows if row["variant"].startswith(mode)]
    return max((row for row in found if row["energy"] <= published["energy"]), key=lambda row: row["speedup"], default=found[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="by default tiny and small")
    parser.add_argument("--prior", type=Path, help="a trained pipeline's folder, instead of random ones")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--divide", type=int, default=1, help="the channels and the side of the latents, to try sd15 on a small machine")
    parser.add_argument("--batch", type=int, help="of ours")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(chosen.device)
    figures: dict[str, float] = {}
    rows = []
    for name in [chosen.prior.name] if chosen.prior else [chosen.size] if chosen.size else ["tiny", "small"]:
        size = SIZES.get(name, SIZES["tiny"])
        size = size.divided(chosen.divide) if chosen.divide > 1 else size
        size = replace(size, batch=chosen.batch, images=max(size.images, chosen.batch)) if chosen.batch else size
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        prior = Prior.from_pretrained(chosen.prior, device=device, dtype=dtype) if chosen.prior else pipeline(size, device, dtype)
        net = ResNet((3, 64, 64), width=64) if name == "sd15" else pretrained("zoo:digits-classifier")
        found = measure(prior, net.to(device).model().frozen(), size, chosen.repeats)
        print(f"{name}: {prior.parameters() / 1e6:.2f} million parameters, {prior.image_shape} pixels, {size.steps} steps")
        for row in found:
            print(
                f"  {row['variant']:14} batch {row['batch']:2}: {row['images_per_s']:7.2f} images/s ({row['speedup']:5.2f} x), "
                f"energy {row['energy']:.3f} (alone {row['energy_alone']:.3f}) at scale {row['scale']:g}, peak {row['peak_mib']:.0f} MiB"
            )
        published = next(row for row in found if row["variant"] == "published")
        suffix = "" if name == "tiny" else f"_{name}"
        for mode, end in (("full", ""), ("clean", "_clean")):
            best = fastest(found, mode)
            figures |= {f"speedup_{mode}{suffix}": best["speedup"], f"energy_ratio{end}{suffix}": best["energy"] / published["energy"]}
        rows += [{"size": name, **row} for row in found]
    print(f"wrote {write('guided_speed', figures, rows)}")


if __name__ == "__main__":
    main()
