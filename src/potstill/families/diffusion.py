"""What is made of diffusers' parts: a denoiser of pixels as teacher and student, and a miniature Stable Diffusion as prior.

The prior (Rombach et al., "High-resolution image synthesis with latent diffusion models", CVPR 2022) is saved in Stable Diffusion's
folder layout, so that whatever loads one loads the other.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..errors import BadInput
from ..model import Model
from ..noise import Noise
from .chain import FLOW_TIMES, Chain, Prediction, prediction_of
from .latent import LatentDiffusion

_TOKENS = 16  # of a caption; Stable Diffusion has 77
_PIXEL_STD = 0.1  # of the autoencoder's Gaussian output, in units of an image in [0, 1]


class UNet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="potstill",
    tags=["potstill", "unconditional-image-generation"],
    license="apache-2.0",
):
    """Diffusers' ``UNet2DModel`` with the chain that samples from it; see :class:`Chain` for its nodes.

    Args:
        image: ``(C, H, W)``; sides divisible by 2 for every level but the first.
        width: channels of the first level.
        multipliers: channels of each level, in units of the width.
        layers: residual blocks in a level.
        prediction: what it predicts: "epsilon", "v", "sample" or "flow".
        sampler: "ddim" or "ddpm"; a flow takes Euler's steps.
        steps: links of the chain.
        clip: predicted images to [-1, 1] at every link; has no part in a flow.
        schedule: of the noise, as diffusers names them: "linear", "scaled_linear" or "squaredcos_cap_v2".
        betas: first and last beta; have no part in the last of the schedules, nor in a flow.
        times: at which it is trained; have no part in a flow.
        classes: labels of which the network is told one; 0 for none.
        arguments: further ones of ``UNet2DModel``. The groups of its norms and the width of its heads fall where channels are too few.
        family: written to ``config.json``, so that a checkpoint says what it is.

    Raises:
        BadInput: diffusers is not installed.
        ValueError: the numbers do not fit together.
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 32),
        width: int = 64,
        multipliers: Sequence[float] = (1, 2),
        layers: int = 1,
        prediction: Prediction = "epsilon",
        sampler: Literal["ddim", "ddpm"] = "ddim",
        steps: int = 50,
        clip: bool = True,
        schedule: str = "linear",
        betas: tuple[float, float] = (1e-4, 0.02),
        times: int = 1000,
        classes: int = 0,
        arguments: dict[str, Any] | None = None,
        family: str = "unet",
    ):
        super().__init__()
        try:
            from diffusers import DDPMScheduler, UNet2DModel
        except ImportError:
            raise BadInput("a unet needs diffusers: pip install 'potstill[diffusion]'") from None
        channels, height, pixels_wide = image
        if min(channels, height, pixels_wide, width, layers, *multipliers) <= 0:
            raise ValueError(f"UNet(image={tuple(image)}, width={width}, multipliers={tuple(multipliers)}, layers={layers}): not positive")
        halved = 2 ** (len(multipliers) - 1)
        if height % halved or pixels_wide % halved:
            raise ValueError(f"a unet of {len(multipliers)} levels needs sides divisible by {halved}, not {height}x{pixels_wide}")
        self.image, self.width, self.multipliers, self.layers = (channels, height, pixels_wide), width, tuple(multipliers), layers
        self.schedule, self.betas, self.times, self.arguments = schedule, (betas[0], betas[1]), times, dict(arguments or {})
        blocks = tuple(max(1, round(width * m)) for m in multipliers)
        plain = {"down_block_types": ("DownBlock2D",) * len(blocks), "up_block_types": ("UpBlock2D",) * len(blocks)}
        given: dict[str, Any] = {**plain, "norm_num_groups": 8, "attention_head_dim": 8, **self.arguments}
        try:
            given["norm_num_groups"] = math.gcd(given["norm_num_groups"], *blocks)
            if given["attention_head_dim"] is not None:
                given["attention_head_dim"] = min(given["attention_head_dim"], *blocks)
            unet = UNet2DModel(
                sample_size=(height, pixels_wide),
                in_channels=channels,
                out_channels=channels,
                block_out_channels=blocks,
                layers_per_block=layers,
                num_class_embeds=classes or None,
                **given,
            )
            noises = DDPMScheduler(times, betas[0], betas[1], schedule)
        except (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, NameError, NotImplementedError) as error:
            raise ValueError(f"diffusers' UNet2DModel: {error}") from None
        alphas = None if prediction == "flow" else noises.alphas_cumprod
        self.chain = Chain(unet, self.image, prediction, alphas, sampler, steps, clip, classes)

    @classmethod
    def of(cls, unet: Any, scheduler: Any, steps: int | None = None, sampler: Literal["ddim", "ddpm"] | None = None) -> UNet:
        """A network that diffusers has loaded, in eval mode.

        Args:
            unet: a ``UNet2DModel``.
            scheduler: its noise schedule.
            steps: links of the chain; by default as the scheduler's pipeline has it: every time for DDPM, 50 for all others.
            sampler: by default the scheduler's own: DDPM's for DDPM, DDIM's for all others.

        Raises:
            BadInput: a schedule or conditions that are not supported.
        """
        settings, noises = json.loads(json.dumps(dict(unet.config), default=str)), scheduler.config
        if settings.get("class_embed_type"):
            raise BadInput(f"teacher: its unet has class_embed_type {settings['class_embed_type']}, which is not supported")
        prediction = prediction_of(scheduler)
        if noises.get("trained_betas") is not None or noises.get("clip_sample_range", 1.0) != 1.0:
            found = "trained_betas" if noises.get("trained_betas") is not None else f"clip_sample_range {noises['clip_sample_range']}"
            raise BadInput(f"teacher: its scheduler has {found}, which is not supported")
        size, widths = settings.pop("sample_size"), settings.pop("block_out_channels")
        if size is None:
            raise BadInput("teacher: its unet's config.json has no sample_size, so the size of its images is not known")
        height, pixels_wide = (size, size) if isinstance(size, int) else size
        layers, channels = settings.pop("layers_per_block"), settings.pop("in_channels")
        stochastic = type(scheduler).__name__ == "DDPMScheduler" and prediction != "flow"
        net = cls(
            (channels, height, pixels_wide),
            widths[0],
            [w / widths[0] for w in widths],
            layers,
            prediction,
            sampler or ("ddpm" if stochastic else "ddim"),
            steps or (noises["num_train_timesteps"] if stochastic and sampler in (None, "ddpm") else 50),
            bool(noises.get("clip_sample", False)),
            noises.get("beta_schedule", "linear"),
            (noises.get("beta_start", 1e-4), noises.get("beta_end", 0.02)),
            noises["num_train_timesteps"],
            settings.pop("num_class_embeds", None) or 0,
            {k: v for k, v in settings.items() if k != "out_channels" and not k.startswith("_")},
        )
        net.chain.net.load_state_dict(unet.state_dict())
        return net.eval()

    def model(self) -> Model:
        """The network with its two programs."""
        return Model(self, self.chain.images, self.chain.generate, link=self.chain.link)

    def shrunk(self, width: int, steps: int | None = None) -> UNet:
        """A fresh network of another width, and of a chain of that many steps where they are given."""
        c = self.chain
        return UNet(
            self.image,
            width,
            self.multipliers,
            self.layers,
            c.prediction,
            c.sampler,
            steps or c.steps,
            c.clip,
            self.schedule,
            self.betas,
            self.times,
            c.conditions,
            self.arguments,
        )

    def save_pipeline(self, folder: Path) -> None:
        """Write a folder in diffusers' layout, ``unet`` and ``scheduler``, which its pipelines load."""
        import diffusers

        c = self.chain
        if c.prediction == "flow":
            scheduler, pipeline = diffusers.FlowMatchEulerDiscreteScheduler(FLOW_TIMES), "DDPMPipeline"
        else:
            betas = {"beta_start": self.betas[0], "beta_end": self.betas[1], "beta_schedule": self.schedule}
            predicts = "v_prediction" if c.prediction == "v" else c.prediction
            kind, pipeline = ("DDPMScheduler", "DDPMPipeline") if c.sampler == "ddpm" else ("DDIMScheduler", "DDIMPipeline")
            scheduler = getattr(diffusers, kind)(
                self.times, **betas, clip_sample=c.clip, prediction_type=predicts, timestep_spacing="trailing"
            )
        c.net.save_pretrained(folder / "unet", safe_serialization=True)
        scheduler.save_pretrained(folder / "scheduler")
        index = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__}
        index |= {"unet": ["diffusers", type(c.net).__name__], "scheduler": ["diffusers", type(scheduler).__name__]}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def chain_of(model: Model) -> Chain | None:
    """The chain that a model samples from, or ``None`` where it is no diffusion or flow model."""
    if isinstance(model.net, (UNet, LatentDiffusion)):
        return model.net.chain
    return model.net if isinstance(model.net, Chain) else None


def tokenizer(captions: Iterable[str], folder: Path) -> Any:
    """A CLIP tokenizer for which every word of the captions is one token; other text falls apart into smaller pieces.

    Args:
        captions: whose words its merges are made of.
        folder: where its two files are written.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Whitespace
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    encode = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    words = {word for caption in set(captions) for word, _ in Whitespace().pre_tokenize_str(caption.lower())}
    merges = _merges(sorted(encode(word)[0][0] for word in words))
    vocabulary = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(pair) for pair in merges), "<|startoftext|>", "<|endoftext|>"]
    index = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    (folder / "vocab.json").write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=_TOKENS)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte pair encoding (Sennrich et al., ACL 2016) until every word is one symbol.

    Libraries break ties of frequency by the order of a hash table, which differs from run to run; here the first by name wins.
    """
    pieces = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for symbols in pieces for pair in itertools.pairwise(symbols)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        for symbols in pieces:
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1
    return merges


class TextToImage(nn.Module):
    """Autoencoder, text encoder and denoiser.

    Args:
        image: ``(C, H, W)``; sides divisible by 8. Latents are ``(latent, H / 4, W / 4)``.
        captions: all texts that the tokenizer should know.
        width: channels of the denoiser's first level; the second has twice as many.
        autoencoder: channels of the autoencoder's first level, likewise.
        latent: channels of the latents.
        text: width of the text encoder.

    Raises:
        BadInput: diffusers is not installed, or the image's sides do not divide.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        captions: Iterable[str],
        width: int = 48,
        autoencoder: int = 16,
        latent: int = 4,
        text: int = 64,
    ):
        super().__init__()
        try:
            from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
            from transformers import CLIPTextConfig, CLIPTextModel
        except ImportError:
            raise BadInput("a text_to_image model needs diffusers and transformers: pip install 'potstill[diffusion]'") from None
        channels, height, pixels_wide = image
        if height % 8 or pixels_wide % 8 or height != pixels_wide:
            raise BadInput(f"a text_to_image model needs square images with sides divisible by 8, not {height}x{pixels_wide}")
        self.image, self.latent = image, (latent, height // 4, pixels_wide // 4)
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer = tokenizer(captions, Path(folder))
            self._tokenizer_files = {name: (Path(folder) / name).read_text(encoding="utf-8") for name in ("vocab.json", "merges.txt")}
        self.scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        )
        self.vae = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(autoencoder, 2 * autoencoder, 2 * autoencoder),
            layers_per_block=1,
            latent_channels=latent,
            norm_num_groups=8,
            sample_size=height,
            mid_block_add_attention=False,
        )
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=text,
                intermediate_size=2 * text,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=_TOKENS,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=self.latent[1],
            in_channels=latent,
            out_channels=latent,
            block_out_channels=(width, 2 * width),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=text,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        self.register_buffer("scale", torch.ones(()))

    @property
    def device(self) -> torch.device:
        return self.vae.device

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """``(n, 16)`` int64; each distinct text is tokenized once."""
        distinct = sorted(set(captions))
        found = self.tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt").input_ids
        index = {text: i for i, text in enumerate(distinct)}
        return found[torch.tensor([index[text] for text in captions])]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images ``(n, C, H, W)`` in [0, 1] to the mean of their latents, unscaled."""
        parts = [self.vae.encode(part.to(self.device) * 2 - 1).latent_dist.mean for part in images.split(256)]
        return torch.cat(parts)

    def save_pretrained(self, folder: Path) -> None:
        """Write a folder that diffusers' ``StableDiffusionPipeline`` loads, in half precision."""
        import diffusers

        self.vae.register_to_config(scaling_factor=float(self.scale))
        index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
        for name in ("vae", "text_encoder", "unet"):
            net = copy.deepcopy(getattr(self, name)).to(memory_format=torch.contiguous_format)
            for parameter in (*net.parameters(), *net.buffers()):
                if parameter.is_floating_point():
                    parameter.data = parameter.data.half()
            net.save_pretrained(folder / name, safe_serialization=True)
            index[name] = ["transformers" if name == "text_encoder" else "diffusers", type(net).__name__]
        self.tokenizer.save_pretrained(folder / "tokenizer")
        for name, text in self._tokenizer_files.items():  # which transformers 5 leaves out, and older ones read
            (folder / "tokenizer" / name).write_text(text, encoding="utf-8")
        self.scheduler.save_pretrained(folder / "scheduler")
        index |= {"tokenizer": ["transformers", type(self.tokenizer).__name__], "scheduler": ["diffusers", type(self.scheduler).__name__]}
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class Autoencoding(nn.Module):
    """The negative ELBO of images with a small weight on the latents' KL, as latent diffusion has it."""

    def __init__(self, net: TextToImage, kl: float = 1e-3):
        super().__init__()
        self.net, self._kl = net, kl

    def forward(self, noise: Noise, images: Tensor) -> dict[str, Tensor]:
        """Losses in nats, ``(batch,)``; images ``(batch, C, H, W)`` in [0, 1]."""
        x = images * 2 - 1
        posterior = self.net.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * noise.normal("z", posterior.mean.shape, x.device)
        error = self.net.vae.decode(z).sample - x
        out = 0.5 * (error / (2 * _PIXEL_STD)).pow(2).flatten(1).sum(1)
        return {"out": out, "kl": self._kl * posterior.kl()}


class Denoising(nn.Module):
    """The noise predicted from noisy latents and a caption (Ho et al., NeurIPS 2020).

    Args:
        net: whose autoencoder is trained.
        dropout: share of captions replaced by none, for classifier-free guidance (Ho and Salimans, 2022).
    """

    def __init__(self, net: TextToImage, dropout: float = 0.1):
        super().__init__()
        self.net, self._dropout = net, dropout
        self.register_buffer("_alphas", net.scheduler.alphas_cumprod, persistent=False)
        self.register_buffer("_nothing", net.tokens([""])[0], persistent=False)

    def forward(self, noise: Noise, latents: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Squared error summed over the latent, ``(batch,)``.

        Args:
            noise: of the diffusion, its times and the dropped captions.
            latents: ``(batch, C, H, W)``, scaled to variance 1.
            tokens: ``(batch, 16)`` int64.
        """
        n, device = len(latents), latents.device
        t = (noise.uniform("t", (n, 1), device)[:, 0] * len(self._alphas)).long()
        dropped = noise.uniform("dropout", (n, 1), device) < self._dropout
        states = self.net.text_encoder(torch.where(dropped, self._nothing.to(device), tokens)).last_hidden_state
        alpha = self._alphas.to(device)[t].view(-1, 1, 1, 1)
        eps = noise.normal("eps", latents.shape, device)
        found = self.net.unet(alpha.sqrt() * latents + (1 - alpha).sqrt() * eps, t, encoder_hidden_states=states).sample
        return {"out": (found - eps).pow(2).flatten(1).sum(1)}
