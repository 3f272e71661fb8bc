"""Tiny random diffusion priors, built from configurations and saved in the diffusers layout."""

from __future__ import annotations

import json

import torch


def unet_config(conditional, prediction="epsilon"):
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "in_channels": 4, "out_channels": 4}
    if conditional:
        return blocks | {
            "sample_size": 4,
            "cross_attention_dim": 8,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    return blocks | {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    }


def tokenizer(folder):
    """A CLIP tokenizer that knows single characters."""
    from transformers import CLIPTokenizer

    characters = [chr(c) for c in range(33, 127)]
    vocabulary = {c: i for i, c in enumerate([*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def text_to_image(folder, scheduler=None, seed=0):
    """A StableDiffusionPipeline of a few thousand parameters on 8x8 pictures, and its folder."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words = tokenizer(folder)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(**unet_config(True))
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            layers_per_block=1,
            sample_size=8,
        )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=words,
        unet=unet,
        scheduler=scheduler or DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "pipeline")
    return pipeline, folder / "pipeline"


def pixels(seed=0, classes=None):
    """An unconditional (or class-conditional) denoiser on 1x8x8 pixels."""
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        extra = {} if classes is None else {"num_class_embeds": classes}
        return UNet2DModel(**unet_config(False), **extra)
