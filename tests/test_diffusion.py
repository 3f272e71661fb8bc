"""The miniature Stable Diffusion: its objectives, its training by a recipe, and the folder that diffusers loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from potstill import config, pipeline
from potstill.cli import main
from potstill.errors import BadInput
from potstill.noise import Noise
from potstill.synthesize.prior import Prior

diffusers = pytest.importorskip("diffusers")

from potstill.families.diffusion import Autoencoding, Denoising, TextToImage  # noqa: E402
from runs import interrupting  # noqa: E402

CAPTIONS = ("the digit one", "the digit two", "a bold letter q", "")
RECIPE = {
    "name": "small",
    "data": {"kind": "glyphs", "n": 24, "test": 4, "size": 16},
    "train": {
        "model": {"kind": "text_to_image", "image": [3, 16, 16], "width": 8, "autoencoder": 8, "text": 8},
        "autoencoder": {"steps": 3, "batch": 8},
        "steps": 3,
        "batch": 8,
    },
    "compute": {"device": "cpu", "threads": 1, "save_seconds": 0, "log_steps": 1},
}


def made(seed=0, image=(3, 16, 16)):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TextToImage(image, CAPTIONS, 8, 8, 4, 8)


@pytest.fixture(scope="module")
def net():
    return made()


def test_every_word_of_the_captions_is_one_token_and_others_are_pieces(net):
    tokens = net.tokens(["the digit two", "a bold letter q", "zebra é"])
    words = [net.tokenizer.convert_ids_to_tokens(row.tolist()) for row in tokens]
    assert words[0][1:4] == ["the</w>", "digit</w>", "two</w>"]
    assert words[1][1:5] == ["a</w>", "bold</w>", "letter</w>", "q</w>"]
    assert len([w for w in words[2] if not w.startswith("<|")]) > 3
    assert tokens.shape == (3, 16)
    assert tokens.max() < net.text_encoder.config.vocab_size


def test_a_tokenizer_is_the_same_in_every_process(tmp_path):
    code = "import pathlib, sys; from potstill.families import diffusion; diffusion.tokenizer(sys.argv[2:], pathlib.Path(sys.argv[1]))"
    found = set()
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        subprocess.run([sys.executable, "-c", code, str(folder), *CAPTIONS], check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        found.add(tuple((folder / name).read_text() for name in ("merges.txt", "vocab.json")))
    assert len(found) == 1


def test_a_long_caption_is_cut(net):
    assert net.tokens(["two " * 100]).shape == (1, 16)


def test_the_autoencoders_loss_is_that_of_its_images(net):
    x = Noise().uniform("x", (3, *net.image))
    losses = Autoencoding(net)(Noise((1,)), x)
    posterior = net.vae.encode(x * 2 - 1).latent_dist
    z = posterior.mean + posterior.std * Noise((1,)).normal("z", posterior.mean.shape)
    expected = ((net.vae.decode(z).sample / 2 + 0.5 - x) ** 2).flatten(1).sum(1) / (2 * 0.1**2)
    assert torch.allclose(losses["out"], expected, rtol=1e-4)
    assert (losses["kl"] >= 0).all()


def test_denoising_is_of_the_rows_and_reads_the_caption(net):
    latents, tokens = Noise().normal("z", (4, 4, 4, 4)), net.tokens(CAPTIONS)
    whole = Denoising(net, 0.0)
    together = whole(Noise((2,)).at(range(4)), latents, tokens)["out"]
    apart = torch.cat([whole(Noise((2,)).at([i]), latents[i : i + 1], tokens[i : i + 1])["out"] for i in range(4)])
    assert torch.allclose(together, apart, rtol=1e-4)
    other = whole(Noise((2,)).at(range(4)), latents, tokens.flip(0))["out"]
    assert not torch.allclose(together, other, rtol=1e-6)
    deaf = Denoising(net, 0.999999)
    both = [deaf(Noise((2,)).at(range(4)), latents, t)["out"] for t in (tokens, tokens.flip(0))]
    assert torch.equal(*both)


def test_a_perfect_prediction_of_the_noise_has_no_loss(net, monkeypatch):
    latents = torch.zeros(3, 4, 4, 4)
    monkeypatch.setattr(
        net.unet,
        "forward",
        lambda noisy, t, encoder_hidden_states: type("Out", (), {"sample": noisy / (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)}),
    )
    alphas = net.scheduler.alphas_cumprod
    assert Denoising(net)(Noise(), latents, net.tokens(CAPTIONS[:3]))["out"].max() < 1e-6


@pytest.mark.parametrize("image", [(3, 12, 12), (3, 16, 8)])
def test_images_that_do_not_divide_are_refused(image):
    with pytest.raises(BadInput, match="divisible by 8"):
        made(image=image)


def train(folder, **more):
    path = folder.parent / f"{folder.name}.json"
    path.write_text(json.dumps(RECIPE | more))
    return main(["train", str(path), "--out", str(folder), "--quiet"])


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_recipe_trains_a_prior_that_loads(tmp_path):
    assert train(tmp_path / "run") == 0
    folder = tmp_path / "run" / "teacher"
    prior = Prior.from_pretrained(folder)
    assert prior.image_shape == (3, 16, 16)
    assert prior.latent_shape == (4, 4, 4)
    stored = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
    assert stored == prior.vae.config.scaling_factor != 0.18215
    log = [json.loads(line) for line in (tmp_path / "run" / "train" / "log.jsonl").read_text().splitlines()]
    assert [(e["phase"], e["step"]) for e in log] == [(phase, step) for phase in ("autoencoder", "denoiser") for step in (1, 2, 3)]
    assert json.loads((tmp_path / "run" / "train" / "held_out.json").read_text())["reconstruction_mse"] > 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_diffusers_own_pipeline_loads_it(tmp_path):
    assert train(tmp_path / "run") == 0
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "teacher", safety_checker=None, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(["the digit two"], num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 16, 16)


def test_training_that_is_cut_short_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    assert train(tmp_path / "whole") == 0
    whole = contents(tmp_path / "whole" / "teacher")
    left = interrupting(monkeypatch)
    codes = []
    for after in (4, 6, 1 << 30):
        left[0] = after
        codes.append(train(tmp_path / "parts"))
    assert codes == [130, 130, 0]
    assert contents(tmp_path / "parts" / "teacher").keys() == whole.keys()
    assert {k: v for k, v in contents(tmp_path / "parts" / "teacher").items() if k != "README.md"} == {
        k: v for k, v in whole.items() if k != "README.md"
    }


def test_classes_serve_as_captions_and_nothing_does_not(place):
    model = {"kind": "text_to_image", "image": [1, 8, 8], "width": 8, "autoencoder": 8, "text": 8}
    tree = {k: v for k, v in place.recipe.items() if k in ("name", "data", "compute")}
    tree["train"] = {"model": model, "autoencoder": {"steps": 1, "batch": 4}, "steps": 1, "batch": 4}
    tree["data"] = tree["data"] | {"path": str(place.folder / "data.npz")}
    pipeline.execute(config.check(tree), place.out)
    vocabulary = json.loads((place.out / "teacher" / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert "class</w>" in vocabulary


def test_a_prior_is_no_teacher(place, capsys):
    code = place.run("run", train=RECIPE["train"], teacher={"kind": "trained"})
    assert code == 2
    assert "a text_to_image model serves as a prior" in capsys.readouterr().err
