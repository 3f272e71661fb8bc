"""A small text-to-image latent diffusion model of the parts and the folder layout of Stable Diffusion.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022. The parts are those of diffusers and
transformers, so what is saved here loads wherever Stable Diffusion does.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import mse_loss

from ..errors import BadInput
from ..model import Images, Model
from ..noise import Noise
from ..trace import Sampler

_START, _END, _STOP = "<|startoftext|>", "<|endoftext|>", "</w>"
_WORD = re.compile(r"[^\W\d_]+|\d|[^\s\w]+")  # as CLIP splits texts: words, single digits, signs
_BYTES = 256


class TextToImage(nn.Module):
    """Tokenizer, text encoder, autoencoder and denoiser.

    Args:
        image: ``(C, H, W)``; sides are multiples of 8. Latents are ``(latent, H / 4, W / 4)``.
        width: channels of the denoiser's first stage, a multiple of 32; the second has twice as many.
        autoencoder: channels of the autoencoder's first stage, a multiple of 8; the others have twice as many.
        latent: channels of the latents.
        text: width of the text encoder, a multiple of 32.
        vocabulary: most tokens, at least 514: 512 of them are the bytes, within a word and at its end.
        tokens: longest caption, with its start and end.

    Raises:
        BadInput: diffusers or transformers are not installed.
        ValueError: the numbers do not fit together.
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 32),
        width: int = 64,
        autoencoder: int = 32,
        latent: int = 4,
        text: int = 64,
        vocabulary: int = 768,
        tokens: int = 16,
    ):
        super().__init__()
        try:
            from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
            from transformers import CLIPTextConfig, CLIPTextModel
        except ImportError:
            raise BadInput("a text_to_image model needs diffusers and transformers; install potstill[diffusion]") from None
        channels, high, wide = image
        if high % 8 or wide % 8:
            raise ValueError(f"text_to_image: images of {high}x{wide}; sides that are multiples of 8 are expected")
        if width % 32 or autoencoder % 8 or text % 32:
            raise ValueError("text_to_image: width and text are multiples of 32, autoencoder of 8")
        if vocabulary < 2 * _BYTES + 2:
            raise ValueError(f"text_to_image: vocabulary {vocabulary}; at least {2 * _BYTES + 2} is expected")
        self.image, self.tokens, self.vocabulary = image, tokens, vocabulary
        self.vae = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(autoencoder, 2 * autoencoder, 2 * autoencoder),
            layers_per_block=1,
            latent_channels=latent,
            norm_num_groups=8,
            sample_size=max(high, wide),
            force_upcast=False,
        )
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocabulary,
                hidden_size=text,
                intermediate_size=4 * text,
                projection_dim=text,
                num_hidden_layers=2,
                num_attention_heads=text // 32,
                max_position_embeddings=tokens,
                pad_token_id=vocabulary - 1,
                bos_token_id=vocabulary - 2,
                eos_token_id=vocabulary - 1,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=max(high, wide) // 4,
            in_channels=latent,
            out_channels=latent,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(width, 2 * width),
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=text,
            attention_head_dim=width // 32,  # which diffusers takes for the number of heads
        )
        self.scheduler = DDIMScheduler(  # Stable Diffusion's
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        )
        self.register_buffer("latent_scale", torch.ones(()))
        self.tokenizer: Any = None
        self._tokenizer_files: dict[str, str] = {}

    def model(self) -> Model:
        """The network with its one program so far: the autoencoder."""
        return Model(self, Images(self.image, (0.5,), (0.5,)), infer=self.infer)

    def infer(self, sample: Sampler, x: Tensor) -> Normal:
        """Image to latents and back; the decoder's std is nominal."""
        posterior = self.vae.encode(x).latent_dist
        return Normal(self.vae.decode(sample("z", Normal(posterior.mean, posterior.std))).sample, 0.1)

    def read(self, captions: Sequence[str]) -> None:
        """Make the tokenizer from the captions that will be learnt."""
        from transformers import CLIPTokenizer

        self._tokenizer_files = tokenizer_files(captions, self.vocabulary)
        with tempfile.TemporaryDirectory() as folder:
            _write(self._tokenizer_files, Path(folder))
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=self.tokens)

    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Token ids, ``(n, tokens)`` int64; what is longer is cut.

        Raises:
            RuntimeError: there is no tokenizer yet.
        """
        if self.tokenizer is None:
            raise RuntimeError("no tokenizer: read the captions first")
        ids = self.tokenizer(list(captions), padding="max_length", max_length=self.tokens, truncation=True).input_ids
        return torch.tensor(ids, dtype=torch.int64)

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Means of the latents of images ``(n, C, H, W)`` in [0, 1], unscaled: ``(n, latent, H / 4, W / 4)``."""
        mean: Tensor = self.vae.encode(images * 2 - 1).latent_dist.mean
        return mean

    def pipeline(self) -> Any:
        """The parts as a ``diffusers.StableDiffusionPipeline``, which shares their weights."""
        from diffusers import StableDiffusionPipeline

        self.vae.register_to_config(scaling_factor=float(1 / self.latent_scale))
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the diffusers folder, weights in float16."""
        pipeline = copy.deepcopy(self).half().pipeline()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(folder, safe_serialization=True)
        _write(self._tokenizer_files, Path(folder) / "tokenizer")  # transformers 5 writes, but other versions do not read, tokenizer.json alone


def _write(files: dict[str, str], folder: Path) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


class AutoencoderLoss(nn.Module):
    """Absolute error of the reconstruction, with a KL so weak that latents keep what the image needs.

    Args:
        net: whose autoencoder learns.
        kl: weight of the latents' KL in nats, beside the error's mean over pixels, which is in [0, 1].
    """

    def __init__(self, net: TextToImage, kl: float = 1e-6):
        super().__init__()
        self.vae, self.kl = net.vae, kl

    def forward(self, noise: Noise, images: Tensor) -> dict[str, Tensor]:
        """Losses ``(batch,)`` of images ``(batch, C, H, W)`` in [0, 1]."""
        x = images * 2 - 1
        posterior = self.vae.encode(x).latent_dist
        z = posterior.mean + posterior.std * noise.normal("z", posterior.mean.shape, x.device)
        error = (self.vae.decode(z).sample - x).abs().flatten(1).mean(1) / 2
        return {"reconstruction": error, "kl": self.kl * posterior.kl()}


class DenoisingLoss(nn.Module):
    """The denoiser's mean squared error of the noise (Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020).

    The text encoder learns along. Some captions are replaced by the empty one, for classifier-free guidance (Ho and Salimans,
    "Classifier-Free Diffusion Guidance", 2022).

    Args:
        net: with a tokenizer.
        dropout: share of captions that are emptied.
    """

    def __init__(self, net: TextToImage, dropout: float = 0.1):
        super().__init__()
        self.unet, self.text_encoder, self.dropout = net.unet, net.text_encoder, dropout
        self.register_buffer("alphas", net.scheduler.alphas_cumprod.clone(), persistent=False)
        self.register_buffer("empty", net.encode_text([""]), persistent=False)

    def forward(self, noise: Noise, latents: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Loss ``(batch,)``.

        Args:
            noise: picks the time, the noise and the captions that are dropped.
            latents: scaled to a std of 1, ``(batch, latent, H / 4, W / 4)``.
            tokens: of the captions, ``(batch, tokens)``.
        """
        n, device = len(latents), latents.device
        time = (noise.uniform("time", (n,), device) * len(self.alphas)).long()
        tokens = torch.where((noise.uniform("dropped", (n,), device) < self.dropout)[:, None], self.empty, tokens)
        kept = self.alphas[time].view(n, 1, 1, 1)
        eps = noise.normal("eps", latents.shape, device)
        context = self.text_encoder(tokens).last_hidden_state
        found = self.unet(kept.sqrt() * latents + (1 - kept).sqrt() * eps, time, context).sample
        return {"eps": mse_loss(found, eps, reduction="none").flatten(1).mean(1)}


def tokenizer_files(captions: Sequence[str], vocabulary: int) -> dict[str, str]:
    """The two files that a ``CLIPTokenizer`` is made of: frequent words are one token each, any other text is spelled out in bytes.

    Byte-pair encoding (Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", ACL 2016).

    Args:
        captions: whose words are learnt.
        vocabulary: size of the table of tokens; what is not needed stays unused.
    """
    letters = list(_byte_letters().values())
    merges = _merges(captions, vocabulary - 2 * _BYTES - 2)
    names = [*letters, *(letter + _STOP for letter in letters), *("".join(pair) for pair in merges)]
    names += [f"<|unused{i}|>" for i in range(vocabulary - 2 - len(names))] + [_START, _END]
    table = json.dumps({name: i for i, name in enumerate(names)}, ensure_ascii=False)
    return {"vocab.json": table, "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)}


def _byte_letters() -> dict[int, str]:
    """A printable letter for each byte, in CLIP's order, which is GPT-2's (Radford et al., 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(_BYTES) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(_BYTES + i) for i, b in enumerate(others)}


def _merges(captions: Sequence[str], most: int) -> list[tuple[str, str]]:
    """The most frequent pair of neighbors, again and again, until every word is one symbol; of equals the first in the alphabet."""
    letters = _byte_letters()
    counts = Counter(word for caption in captions for word in _WORD.findall(caption.lower()))
    words = {word: [letters[b] for b in word.encode()] for word in counts}
    for symbols in words.values():
        symbols[-1] += _STOP
    merges: list[tuple[str, str]] = []
    while len(merges) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in zip(symbols, symbols[1:], strict=False):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, symbols in words.items():
            words[word] = _joined(symbols, best)
    return merges


def _joined(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined
