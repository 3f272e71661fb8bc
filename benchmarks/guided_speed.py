"""How fast is guided synthesis? ``Guided``, in batches, against the published algorithm written out, on the same pipeline and teacher.

The published loop is that of Qi et al., "Data-free knowledge distillation with diffusion models", 2025, with its gradient repaired:
one image at a time; two calls of the denoiser a step, for classifier-free guidance; the whole decoder; the teacher; the gradient
through all of them; and ``latents - size * gradient`` before the scheduler's step. Both are given the best of three sizes of their
step, by the energy of the images, and take turns in one process, so that a machine whose speed drifts slows both.

``glyphs-sd`` is the zoo's prior, whose latents a linear map decodes well enough for a gradient. The others have random weights: speed
does not depend on them, but no cheap decoder stands in for a random one, and those rows tell a speed alone. In ``tiny``, of the
tests' widths, a call costs more than its arithmetic, and the batch makes the difference. ``small`` is bound by arithmetic on one
thread of a CPU, where a batch saves little, and all that a mode can spare is the decoder's pass or the denoiser's way back.

    python benchmarks/guided_speed.py
    python benchmarks/guided_speed.py --only sd15 --device cuda
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
from potstill.build import ZOO, pretrained
from potstill.energy import Energy, Look, batchnorm, cross_entropy
from potstill.families.classifier import ResNet
from potstill.families.diffusion import tokenizer
from potstill.model import Model
from potstill.noise import Noise
from potstill.synthesize.guided import Guided, fitted
from potstill.synthesize.prior import Prior, Prompts
from potstill.synthesize.synthesis import Synthesizer

ENERGY = cross_entropy + 0.1 * batchnorm
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPTS = Prompts(tuple((f"the digit {digit}",) for digit in DIGITS))
STRENGTH = 3.0  # of classifier-free guidance
CLIP = 3.0  # ten times the usual, for the published loop knows no bound
NOISE = Noise((0,))


@dataclass(frozen=True)
class Shape:
    """Of a random pipeline that is built like Stable Diffusion's.

    Args:
        side: of the latents, in pixels.
        channels: of the denoiser's levels; the last has no attention.
        layers: of each level.
        heads: of the attention.
        text: width of the text encoder.
        tokens: of a prompt.
        decoder: channels of the autoencoder's levels, each but the last twice as large as the next.
        groups: of the normalization.
    """

    side: int
    channels: tuple[int, ...]
    layers: int
    heads: int
    text: int
    tokens: int
    decoder: tuple[int, ...]
    groups: int

    def divided(self, by: int) -> Shape:
        """A narrower one on smaller latents, to try the code on a small machine."""

        def narrow(channels: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(max(self.groups, c // by // self.groups * self.groups) for c in channels)

        return replace(self, side=self.side // by, channels=narrow(self.channels), decoder=narrow(self.decoder))


@dataclass(frozen=True)
class Case:
    """What is compared.

    Args:
        pipeline: a folder, or the shape of a random one.
        images: that each variant makes.
        batch: of ours.
        sizes: of the published loop's step that are tried.
        scales: of ours.
        steps: of the sampler.
    """

    pipeline: Path | Shape
    images: int
    batch: int
    sizes: tuple[float, ...]
    scales: tuple[float, ...]
    steps: int = 10


TINY = Shape(side=8, channels=(8, 16), layers=1, heads=4, text=8, tokens=16, decoder=(8, 8, 8), groups=4)
SMALL = Shape(side=16, channels=(32, 64), layers=2, heads=2, text=32, tokens=16, decoder=(32, 32, 64), groups=8)
SD15 = Shape(side=64, channels=(320, 640, 1280, 1280), layers=2, heads=8, text=768, tokens=77, decoder=(128, 256, 512, 512), groups=32)
CASES = {
    "glyphs-sd": Case(ZOO / "glyphs-sd", 16, 16, (0.1, 0.3, 1.0), (10.0, 30.0, 100.0)),
    "tiny": Case(TINY, 16, 16, (3.0, 10.0, 30.0), (100.0, 300.0, 1000.0)),
    "small": Case(SMALL, 4, 4, (3.0, 10.0, 30.0), (100.0, 300.0, 1000.0)),
    "sd15": Case(SD15, 4, 4, (0.3, 1.0, 3.0), (100.0, 300.0, 1000.0)),
}


def pipeline(shape: Shape, device: torch.device, dtype: torch.dtype) -> Prior:
    """A random one."""
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with tempfile.TemporaryDirectory() as folder:
        words = tokenizer([text for texts in PROMPTS.wordings for text in texts], Path(folder))
    words.model_max_length = shape.tokens
    levels, stages = len(shape.channels), len(shape.decoder)
    torch.manual_seed(0)
    with torch.device(device):
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=shape.text,
                intermediate_size=4 * shape.text,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=shape.tokens,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=shape.side,
            in_channels=4,
            out_channels=4,
            block_out_channels=shape.channels,
            down_block_types=(*("CrossAttnDownBlock2D",) * (levels - 1), "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * (levels - 1)),
            layers_per_block=shape.layers,
            cross_attention_dim=shape.text,
            attention_head_dim=shape.heads,  # diffusers' name for their number
            norm_num_groups=shape.groups,
        )
        vae = AutoencoderKL(
            block_out_channels=shape.decoder,
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            layers_per_block=shape.layers,
            latent_channels=4,
            norm_num_groups=shape.groups,
            sample_size=shape.side * 2 ** (stages - 1),
        )
        width, blocks = max(shape.decoder[0] // 2, 4), (*(shape.layers + 1,) * (stages - 1), 1)
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
    """The published algorithm, for one image; ``scale`` is the size of its step. To be called as :class:`Guided` is."""

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


def variants(prior: Prior, shape: tuple[int, int, int], case: Case) -> dict[str, Variant]:
    """The published loop, ours, and ours without guidance."""

    def ours(mode: str, decode: str = "vae") -> Variant:
        def make(scale: float) -> Guided:
            return Guided(prior, shape, case.steps, mode, scale, CLIP, decode=decode, prompts=PROMPTS, guidance_scale=STRENGTH)

        return Variant(make, case.batch, (1.0,) if mode == "off" else case.scales)

    found = {"published": Variant(lambda scale: Published(prior, shape, case.steps, scale), 1, case.sizes)}
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
    """Mean energy of finished images, seen as one batch, as ours are made, and each alone, as the published loop sees it.

    They differ by ``batchnorm``, which compares the statistics of a set.
    """
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


def measure(prior: Prior, teacher: Model, case: Case, repeats: int) -> list[dict[str, Any]]:
    """One row a variant."""
    rows, draws = {}, {}
    for name, variant in variants(prior, teacher.images.shape, case).items():
        scale = tuned(variant, teacher, case.images // 2)
        draws[name] = partial(draw, variant.make(scale), teacher, case.images, variant.batch)
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
        row["images_per_s"] = case.images / statistics.median(seconds[name])
        row["speedup"] = statistics.median(a / b for a, b in zip(seconds["published"], seconds[name], strict=True))
    return list(rows.values())


def fastest(rows: list[dict[str, Any]], mode: str) -> dict[str, Any]:
    """Of a mode, the fastest variant of no higher energy than the published loop's, or else the one with the whole decoder."""
    found = [row for row in rows if row["variant"].startswith(mode)]
    return max((row for row in found if row["energy"] <= rows[0]["energy"]), key=lambda row: row["speedup"], default=found[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=["glyphs-sd", "tiny", "small"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--divide", type=int, default=1, help="random pipelines' channels and latents, to try sd15 on a small machine")
    parser.add_argument("--batch", type=int, help="of ours, and the number of images")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(chosen.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    figures: dict[str, float] = {}
    rows = []
    for name in chosen.only:
        case = CASES[name]
        if chosen.batch:
            case = replace(case, batch=chosen.batch, images=chosen.batch)
        if isinstance(case.pipeline, Shape):
            prior = pipeline(case.pipeline.divided(chosen.divide) if chosen.divide > 1 else case.pipeline, device, dtype)
        else:
            prior = Prior.from_pretrained(case.pipeline, dtype=dtype, device=device)
        net = ResNet((3, 64, 64), width=64) if name == "sd15" else pretrained("zoo:digits-classifier")
        found = measure(prior, net.to(device).model().frozen(), case, chosen.repeats)
        print(f"{name}: {prior.parameters() / 1e6:.2f} million parameters, images of {prior.image_shape}, {case.steps} steps")
        for row in found:
            print(
                f"  {row['variant']:14} batch {row['batch']:2}: {row['images_per_s']:6.2f} images/s ({row['speedup']:5.2f} x), "
                f"energy {row['energy']:.3f} (alone {row['energy_alone']:.3f}) at {row['scale']:g}, peak {row['peak_mib']:.0f} MiB"
            )
        suffix = "" if name == chosen.only[0] else f"_{name}"
        for mode, end in (("full", suffix), ("clean", f"_clean{suffix}")):
            best, published = fastest(found, mode), found[0]
            figures[f"speedup_{mode}{suffix}"] = best["speedup"]
            figures[f"energy_ratio{end}"] = best["energy"] / published["energy"]
            figures[f"energy_ratio_alone{end}"] = best["energy_alone"] / published["energy_alone"]
        rows += [{"pipeline": name, **row} for row in found]
    print(f"wrote {write('guided_speed' if device.type == 'cpu' else f'guided_speed_{device.type}', figures, rows)}")


if __name__ == "__main__":
    main()
