"""Latent text-to-image diffusion (Rombach et al., "High-resolution image synthesis with latent diffusion models", CVPR 2022), in miniature.

The parts are those of Stable Diffusion and are saved in its folder layout, so that whatever loads one loads the other.
"""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadInput
from ..noise import Noise

_TOKENS = 16  # of a caption; Stable Diffusion has 77
_PIXEL_STD = 0.1  # of the autoencoder's Gaussian output, in units of an image in [0, 1]


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
