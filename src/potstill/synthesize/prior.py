"""A diffusion prior in the diffusers folder layout, as parts: text encoder, denoiser, decoder, scheduler.

The parts are used, never a pipeline's ``__call__``, which runs under ``no_grad`` and so cannot be guided.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadInput
from ..importers import from_hub, quiet, whole
from ..noise import Noise
from ..state import check_plain, digest_of, read_description

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
}
"""What a recipe calls them, and what diffusers does."""

_DENOISERS = ("UNet2DModel", "UNet2DConditionModel")
_DECODERS = ("AutoencoderKL", "AutoencoderTiny")
_TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_LAYOUTS = "unet (UNet2DModel or UNet2DConditionModel) and scheduler, with vae, and with text_encoder and tokenizer where it reads text"


@dataclass(frozen=True)
class Affine:
    """The predicted clean sample as ``skip * noisy + out * network's output``, and ``noisy = alpha * clean + sigma * noise``."""

    skip: float
    out: float
    alpha: float
    sigma: float

    @property
    def level(self) -> float:
        """Share of noise in the noisy sample, from 0 to 1: the std of the clean one given the noisy one, for data of variance 1."""
        return self.sigma / (self.alpha**2 + self.sigma**2) ** 0.5


def affine(scheduler: Any, index: int) -> Affine:
    """How the network's output at the scheduler's step of that index turns into the predicted clean sample.

    Follows the schedulers' own parametrization: variance-preserving (Ho et al., NeurIPS 2020), variance-exploding (Karras et al.,
    NeurIPS 2022) or the straight path of flow matching (Lipman et al., ICLR 2023); prediction of noise, velocity (Salimans and
    Ho, ICLR 2022), sample or flow.
    """
    kind, prediction = type(scheduler).__name__, getattr(scheduler.config, "prediction_type", "flow_prediction")
    if kind == "FlowMatchEulerDiscreteScheduler" or prediction == "flow_prediction":
        sigma = float(scheduler.sigmas[index])
        return Affine(1.0, -sigma, 1 - sigma, sigma)
    if kind in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"):
        sigma = float(scheduler.sigmas[index])
        scale = sigma**2 + 1
        skip, out = {"epsilon": (1.0, -sigma), "v_prediction": (1 / scale, -sigma / scale**0.5)}.get(prediction, (0.0, 1.0))
        return Affine(skip, out, 1.0, sigma)
    if kind == "DPMSolverMultistepScheduler":
        alpha, sigma = (float(v) for v in scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index]))
    else:
        product = float(scheduler.alphas_cumprod[int(scheduler.timesteps[index])])
        alpha, sigma = product**0.5, (1 - product) ** 0.5
    skip, out = {"epsilon": (1 / alpha, -sigma / alpha), "v_prediction": (alpha, -sigma)}.get(prediction, (0.0, 1.0))
    return Affine(skip, out, alpha, sigma)


@dataclass(frozen=True)
class Prompts:
    """Texts for the denoiser, several wordings for each class, or for all images where there are no classes.

    Args:
        wordings: one tuple of texts per class, in the order of the labels; a single one serves every label.
        negative: what classifier-free guidance moves away from.
    """

    wordings: tuple[tuple[str, ...], ...]
    negative: str = ""

    def of(self, labels: Tensor | None, noise: Noise, n: int) -> list[str]:
        """One text per image; which wording follows from the noise's row."""
        chance = noise.uniform("wording", (n, 1))[:, 0].tolist()
        classes = [0] * n if labels is None or len(self.wordings) == 1 else labels.tolist()
        chosen = [self.wordings[c] for c in classes]
        return [texts[int(u * len(texts))] for texts, u in zip(chosen, chance, strict=True)]


@dataclass(frozen=True)
class Condition:
    """What the denoiser is told beside the noisy sample.

    Args:
        arguments: of the denoiser, each ``(n, ...)``.
        negative: the same without the class, for classifier-free guidance (Ho and Salimans, 2022), or ``None``.
        strength: weight of that guidance; 1 is none.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    negative: dict[str, Any] | None = None
    strength: float = 1.0


class Prior:
    """The parts of a diffusers pipeline, frozen.

    Args:
        unet: denoiser.
        scheduler: its noise schedule; copied for every run, for it keeps state.
        vae: decoder of latents, or ``None`` where the denoiser works on pixels.
        texts: (tokenizer, text encoder) pairs: none, one (Stable Diffusion 1 and 2) or two (XL).
        tiny: an ``AutoencoderTiny`` of the same latents, for cheap gradients, or ``None``.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        vae: nn.Module | None = None,
        texts: Sequence[tuple[Any, nn.Module]] = (),
        tiny: nn.Module | None = None,
    ):
        self.unet, self.scheduler, self.vae, self.texts, self.tiny = unet, scheduler, vae, tuple(texts), tiny
        for net in self._nets():
            net.eval().requires_grad_(False)
        if unet.config.in_channels != unet.config.out_channels:
            raise BadInput(
                f"prior: the denoiser reads {unet.config.in_channels} channels and predicts {unet.config.out_channels}; "
                "inpainting models and learned variances are not supported"
            )
        self._embedded: dict[str, tuple[Tensor, Tensor]] = {}
        self._linear: Tensor | None = None
        self.linear_rest: float | None = None
        """Share of variance that the linear decode leaves, once it is fitted."""

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        scheduler: str | None = None,
        tiny: Path | str | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Prior:
        """Load the parts from a folder that a diffusers pipeline saved, or from a Hub id. Safetensors only; no code of the folder runs.

        Args:
            path: folder or Hub id, such as ``stable-diffusion-v1-5/stable-diffusion-v1-5``.
            scheduler: a key of :data:`SCHEDULERS`; by default the folder's own where it is one of them, else DDIM.
            tiny: folder or Hub id of an ``AutoencoderTiny`` of the same latents, for cheap gradients.
            dtype: of the networks.
            device: of the networks.

        Raises:
            BadInput: diffusers is not installed, nothing is there, the layout is not known, or a file is broken.
        """
        try:
            import diffusers
            import transformers
        except ImportError:
            raise BadInput("a diffusion prior needs diffusers and transformers: pip install 'potstill[diffusion]'") from None
        folder = _folder(path)
        index = parts_of(folder)
        _known(folder, index)
        _check_files(folder)
        bars = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()  # ours are enough
        try:
            with quiet():
                for part in ("unet", "vae"):
                    if part in index:
                        _check_size(getattr(diffusers, index[part]), folder / part)
                told = {"use_safetensors": True, "output_loading_info": True}
                plain = {"torch_dtype": dtype, "low_cpu_mem_usage": False, **told}
                unet = whole(getattr(diffusers, index["unet"]).from_pretrained(folder / "unet", **plain), folder / "unet")
                vae = None
                if "vae" in index:
                    vae = whole(getattr(diffusers, index["vae"]).from_pretrained(folder / "vae", **plain), folder / "vae")
                texts = []
                for suffix in ("", "_2"):
                    if (part := f"text_encoder{suffix}") in index:
                        encoder = whole(
                            getattr(transformers, index[part]).from_pretrained(folder / part, dtype=dtype, **told), folder / part
                        )
                        tokenizer = getattr(transformers, index[f"tokenizer{suffix}"]).from_pretrained(folder / f"tokenizer{suffix}")
                        texts.append((tokenizer, encoder.to(device)))
                own = index["scheduler"]
                name = SCHEDULERS[scheduler] if scheduler else (own if own in SCHEDULERS.values() else SCHEDULERS["ddim"])
                made = getattr(diffusers, name).from_config(read_description(folder / "scheduler" / "scheduler_config.json"))
                cheap = None
                if tiny is not None:
                    cheap = whole(diffusers.AutoencoderTiny.from_pretrained(tiny, **plain), tiny).to(device)
                prior = cls(unet.to(device), made, None if vae is None else vae.to(device), texts, cheap)
                _check_scale(prior)
        except BadInput:
            raise
        except Exception as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadInput(f"prior {path}: cannot be loaded: {text}") from None
        finally:
            if bars:
                transformers.utils.logging.enable_progress_bar()
        return prior

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of what is denoised."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of its pictures."""
        channels, height, width = self.latent_shape
        if self.vae is None:
            return channels, height, width
        factor = 2 ** (len(self._blocks()) - 1)
        return self.vae.config.out_channels, height * factor, width * factor

    def _blocks(self) -> Sequence[int]:
        assert self.vae is not None  # the caller's own check
        config = self.vae.config
        blocks: Sequence[int] = getattr(config, "block_out_channels", None) or config.decoder_block_out_channels
        return blocks

    @property
    def classes(self) -> int | None:
        """Number of classes that the denoiser is conditioned on."""
        return getattr(self.unet.config, "num_class_embeds", None)

    def _nets(self) -> list[nn.Module]:
        return [net for net in (self.unet, self.vae, self.tiny, *(encoder for _, encoder in self.texts)) if net is not None]

    def parameters(self) -> int:
        """Number of parameters of all parts."""
        return sum(p.numel() for net in self._nets() for p in net.parameters())

    def nbytes(self) -> int:
        """Bytes of all parts' parameters."""
        return sum(p.numel() * p.element_size() for net in self._nets() for p in net.parameters())

    def digest(self) -> str:
        """Hex digest of the weights and the schedule."""
        schedule = json.dumps(dict(self.scheduler.config), sort_keys=True, default=str)
        return hashlib.sha256("\n".join([schedule, *map(digest_of, self._nets())]).encode()).hexdigest()

    def save_memory(self) -> None:
        """Keep less for the gradient, at the price of time: activations of the denoiser are computed again, images decoded one by one."""
        self.unet.enable_gradient_checkpointing()
        if self.vae is not None:
            self.vae.enable_slicing()

    # ------------------------------------------------------------------ condition

    def condition(self, prompts: Sequence[str] | None, labels: Tensor | None, negative: str = "", strength: float = 1.0) -> Condition:
        """What the denoiser is told of each image.

        Args:
            prompts: one text per image, for a denoiser that reads text.
            labels: ``(n,)`` int64, for a denoiser conditioned on classes.
            negative: text that classifier-free guidance moves away from.
            strength: of that guidance; 1 is none.

        Raises:
            BadInput: the denoiser wants what is not given, or a label that it does not know.
        """
        if self.texts:
            if prompts is None:
                raise BadInput("prior: it reads text; give prompts")
            embedded = [self._embed(p) for p in prompts]
            nothing = self._embed(negative) if strength != 1 else None
            return Condition(self._arguments(embedded), None if nothing is None else self._arguments([nothing] * len(embedded)), strength)
        if strength != 1:
            raise BadInput("prior: it reads no text, so there is no classifier-free guidance; leave guidance_scale at 1")
        classes = self.classes
        if not classes:
            return Condition()
        if labels is None:
            raise BadInput(f"prior: it is conditioned on {classes} classes; give classes")
        if int(labels.max()) >= classes:
            raise BadInput(f"prior: label {int(labels.max())}, but it knows {classes} classes")
        return Condition({"class_labels": labels.to(self.device)})

    @torch.no_grad()
    def _embed(self, prompt: str) -> tuple[Tensor, Tensor]:
        """One text, encoded once however many images it is for: ``(tokens, width)`` and the pooled ``(width,)``."""
        if prompt not in self._embedded:
            states, pooled = [], torch.empty(0)
            for tokenizer, encoder in self.texts:
                tokens = tokenizer(
                    prompt, padding="max_length", max_length=_longest(tokenizer, encoder), truncation=True, return_tensors="pt"
                )
                mask = tokens.attention_mask.to(self.device) if getattr(encoder.config, "use_attention_mask", None) else None
                found = encoder(tokens.input_ids.to(self.device), attention_mask=mask, output_hidden_states=len(self.texts) > 1)
                if len(self.texts) > 1:  # XL takes the last layer but one of both, and the second's pooled vector
                    states.append(found.hidden_states[-2])
                    pooled = found[0][0]
                else:
                    states.append(found[0])
            self._embedded[prompt] = torch.cat(states, -1)[0], pooled
        return self._embedded[prompt]

    def _arguments(self, embedded: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        arguments: dict[str, Any] = {"encoder_hidden_states": torch.stack([states for states, _ in embedded]).to(self.dtype)}
        if len(self.texts) > 1:
            _, height, width = self.image_shape
            ids = torch.tensor([[height, width, 0, 0, height, width]], device=self.device, dtype=self.dtype)
            pooled = torch.stack([p for _, p in embedded]).to(self.dtype)
            arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids.expand(len(embedded), -1)}
        if getattr(self.unet.config, "time_cond_proj_dim", None):
            raise BadInput(
                "prior: a denoiser with an embedded guidance scale (a distilled LCM) is not supported; use what it was distilled from"
            )
        return arguments

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output for ``(n, C, H, W)``, with classifier-free guidance where the condition has a negative."""
        if condition.negative is None:
            output: Tensor = self.unet(noisy, t, **condition.arguments, return_dict=False)[0]
            return output
        both = _join(condition.negative, condition.arguments)
        without, along = self.unet(torch.cat([noisy] * 2), t, **both, return_dict=False)[0].chunk(2)
        return without + condition.strength * (along - without)

    # ------------------------------------------------------------------ decode

    def decode(self, latents: Tensor, how: str = "vae") -> Tensor:
        """Latents ``(n, C, H, W)`` to images ``(n, C, H, W)``, about [0, 1], unclipped.

        Args:
            latents: as the denoiser's clean sample.
            how: "vae" for the whole decoder; "tiny" for the AutoencoderTiny, or "linear" for a linear map of each latent pixel to a
                color (see :meth:`fit_linear`), both only good enough for a gradient.
        """
        if self.vae is None:
            return latents.float() * 0.5 + 0.5
        if how == "linear":
            if self._linear is None:
                raise RuntimeError("fit_linear() comes before a linear decode")
            ones = torch.ones_like(latents[:, :1], dtype=torch.float32)
            return torch.einsum("oc,nchw->nohw", self._linear, torch.cat([latents.float(), ones], 1))
        if how == "tiny":
            if self.tiny is None:
                raise BadInput("prior: decode tiny needs the folder or id of an AutoencoderTiny in prior.tiny")
            found: Tensor = self.tiny.decode(latents.to(self.dtype), return_dict=False)[0]
            return found.float() * 0.5 + 0.5
        config = self.vae.config
        scaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        image: Tensor = self.vae.decode(scaled.to(self.dtype), return_dict=False)[0]
        return image.float() * 0.5 + 0.5

    @torch.no_grad()
    def fit_linear(self, latents: Tensor) -> float:
        """Fit the linear decode by least squares to the whole decoder's images of some latents, and return the share of variance it leaves.

        Args:
            latents: ``(n, C, H, W)``, clean samples of this prior.
        """
        if self.vae is None:
            return 0.0
        pictures = torch.cat([self.decode(part) for part in latents.split(16)])
        target = F.adaptive_avg_pool2d(pictures, latents.shape[-2:]).movedim(1, -1).flatten(0, 2).double()
        rows = latents.double().movedim(1, -1).flatten(0, 2)
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        solution = torch.linalg.lstsq(rows.cpu(), target.cpu()).solution
        self._linear = solution.T.float().to(latents.device)
        rest = (rows.cpu() @ solution - target.cpu()).pow(2).sum() / (target.cpu() - target.cpu().mean(0)).pow(2).sum().clamp_min(1e-12)
        self.linear_rest = float(rest)
        return self.linear_rest


def _join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two sets of arguments, one batch after the other."""
    return {k: _join(v, second[k]) if isinstance(v, dict) else torch.cat([v, second[k]]) for k, v in first.items()}


def _folder(path: Path | str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    text = str(path)
    if text.count("/") != 1 or text.startswith((".", "/")):
        raise BadInput(f"prior {path}: no such folder, and not a Hub id of the form owner/name")
    patterns = ["*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.safetensors"]
    try:
        return from_hub(text, patterns, ["*fp16*", "*non_ema*", "safety_checker/*"])
    except BadInput as error:
        raise BadInput(f"prior {error}") from None


def _longest(tokenizer: Any, encoder: Any) -> int:
    """Tokens of a text: as many as the encoder has places for, whatever a tokenizer's file says."""
    most: int = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    return most


def _check_files(folder: Path) -> None:
    """See that a pipeline's files are files, and that its descriptions can be made.

    Raises:
        BrokenFile: one is a pipe or a device, or describes more than there is anywhere.
    """
    for path in sorted(folder.glob("*/*")):
        check_plain(path)
        if path.name in ("config.json", "scheduler_config.json"):
            read_description(path)


def _check_scale(prior: Prior) -> None:
    """See that the latents' size and scale, which are not used before the first picture, are numbers.

    Raises:
        BadInput: they are not.
    """
    if prior.vae is not None:
        for name in ("scaling_factor", "shift_factor"):
            value = getattr(prior.vae.config, name, None)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and (value or name == "shift_factor")) and value is not None:
                raise BadInput(f"prior: its vae's config.json has {name} {value!r}; a number is expected")


def _check_size(kind: Any, folder: Path) -> None:
    """See that a network is no larger than its file, before memory is taken for it.

    Raises:
        BadInput: it is.
    """
    with torch.device("meta"):
        net = kind.from_config(read_description(folder / "config.json"))
    numbers, held = sum(t.numel() for t in net.state_dict().values()), sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    if held and numbers > held:
        raise BadInput(f"{folder}: config.json describes {numbers} weights, but the safetensors files there have {held} bytes")


def parts_of(folder: Path) -> dict[str, str]:
    """Class names of a pipeline's parts, as its index has them; those that are null are left out.

    Raises:
        BadInput: the index is not there, is too large, or is none.
    """
    content = read_description(folder / "model_index.json")
    parts = {k: v for k, v in content.items() if isinstance(v, list) and len(v) == 2 and all(isinstance(name, str) for name in v)}
    return {name: kind for name, (_, kind) in parts.items()}


def _known(folder: Path, index: dict[str, str]) -> None:
    """Refuse every layout but those that are supported, before any class is looked up by a name from the folder."""
    wanted = {"unet": _DENOISERS, "vae": _DECODERS, "vqvae": ()}
    wanted |= {f"text_encoder{s}": _TEXT_ENCODERS for s in ("", "_2")} | {f"tokenizer{s}": _TOKENIZERS for s in ("", "_2")}
    problem = next((f"{name} is a {index[name]}" for name, kinds in wanted.items() if name in index and index[name] not in kinds), None)
    if problem is None:
        needed = ["unet", "scheduler", *(f"tokenizer{s}" for s in ("", "_2") if f"text_encoder{s}" in index)]
        problem = next((f"it has no {name}" for name in needed if name not in index), None)
    if problem is None:
        extra = sorted(index.keys() - wanted.keys() - {"scheduler", "safety_checker", "feature_extractor", "image_encoder"})
        problem = f"it has a part {extra[0]!r}" if extra else None
    if problem:
        raise BadInput(f"prior {folder}: {problem}; expected a pipeline of {_LAYOUTS}")
