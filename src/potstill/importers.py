"""Checkpoints of other projects, read without running what is pickled in them."""

from __future__ import annotations

import logging
import re
import reprlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BadInput, BrokenFile
from .families.lvae import LVAE
from .families.own import from_autoencoder, from_logits
from .model import Images, Model
from .state import check_plain, check_weights, read_description, read_json, read_tensors

# The way on from weights of a network that nothing here describes.
OWN_NETWORK = (
    "write a module mine.py with two functions, teacher and student, each of which returns a potstill Model, then: potstill init "
    "mine:teacher --import mine. The guide docs/guides/own-vae.md shows it"
)
_NESTED = ("state_dict", "model_state_dict", "model")
_LARGEST = 4096  # channels, height or width
_DEEPEST = 8  # levels of those in each other; a pickle may hold a mapping that holds itself


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file that ``torch.save`` wrote, or of a safetensors file, by name.

    A state dict is looked for under ``state_dict``, ``model_state_dict`` and ``model`` too, and the prefix ``module.`` of a network
    that was saved within DataParallel is taken away.

    Raises:
        BrokenFile: the file is missing or broken, holds more than tensors and plain values, or no state dict.
    """
    file = Path(path).expanduser()
    if file.suffix == ".safetensors":
        return _plain_names(read_tensors(file))
    check_plain(file)
    _check_archive(file)
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BrokenFile(f"{file}: {'no such file' if isinstance(error, FileNotFoundError) else error.strerror}") from None
    except Exception as error:  # what is raised differs between versions of torch and kinds of damage
        if held := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise BrokenFile(
                f"{file}: holds a {held[1]}, and reading it could run code; save the tensors alone: torch.save(net.state_dict(), path)"
            ) from None
        raise BrokenFile(f"{file}: not a file that torch.save wrote, or not whole ({(str(error).splitlines() or [''])[0][:80]})") from None
    for _ in range(_DEEPEST):
        inner = next((found[k] for k in _NESTED if isinstance(found.get(k), Mapping)), None) if isinstance(found, Mapping) else None
        if inner is None:
            break
        found = inner
    if not isinstance(found, Mapping) or not found or not all(isinstance(t, Tensor) for t in found.values()):
        what = f"a mapping with {', '.join(map(_short, list(found)[:5]))}" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise BrokenFile(f"{file}: a state dict of tensors is expected, also under {' or '.join(_NESTED)}; it holds {what}")
    for name, tensor in found.items():
        if not _is_plain(tensor):
            raise BrokenFile(f"{file}: {_short(name)} is no tensor with a number of its own in each place; save net.state_dict() anew")
    return _plain_names({str(name): tensor for name, tensor in found.items()})


def _short(key: Any) -> str:
    return key[:60] if isinstance(key, str) else reprlib.repr(key)


def _check_archive(file: Path) -> None:
    """torch.save packs nothing: an archive that is packed may hold terabytes.

    Raises:
        BrokenFile: it is.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except Exception:  # no archive; torch says what is wrong with it
        return
    if packed:
        raise BrokenFile(f"{file}: a packed archive, which torch.save does not write")


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is in memory, number by number: not sparse, quantized, without data, or a few numbers told to be many."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return False
    return bool(tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size())


def _plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrapped = all(name.startswith("module.") for name in tensors)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in tensors.items()}


def kd4dgm(path: str | Path, image: tuple[int, int, int] | None = None, std: float = 0.05**0.5) -> LVAE:
    """An LVAE of the published code (Chen et al., CVPR 2023), in eval mode; its width, levels and latents are those of the checkpoint.

    Args:
        path: of the ``.pth.tar``.
        image: ``(C, H, W)``; by default the largest square image with the checkpoint's number of halvings, such as 32x32.
        std: of the output, which the checkpoint does not hold; published: sqrt(0.05).

    Raises:
        BadInput: it cannot be read, or is of another network.
    """
    tensors = read_checkpoint(path)
    levels = max((int(m[1]) for name in tensors if (m := re.match(r"u([0-9]{1,2})\.", name))), default=0)  # one a halving
    top = f"u{levels}" if levels > 1 else "u1.1"
    stem, head = tensors.get("u1.0.weight"), tensors.get(f"{top}.out.weight")
    if stem is None or head is None or stem.ndim != 4 or head.ndim != 4:
        names = ", ".join(f"{name} {tuple(t.shape)}" for name, t in list(tensors.items())[:5])
        raise BadInput(
            f"{path}: weights alone do not say what the network is (only an LVAE of KD4DGM is known by its weights, u1.0.weight and so on; "
            f"here are {names}); {OWN_NETWORK}"
        )
    blocks = len({m[1] for name in tensors if (m := re.match(rf"{re.escape(top)}\.net\.(\d+)\.", name))})
    width, channels = stem.shape[:2]
    side = 2 ** (levels - 1 + blocks // 2)

    def made() -> LVAE:
        return LVAE(image or (channels, side, side), width, levels, head.shape[0] // 2, std)

    try:
        with torch.device("meta"):
            check_weights(tensors, made(), path)
    except BadInput:
        raise
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"{path}: {(str(error).splitlines() or [''])[0]}") from None
    net = made()
    net.load_state_dict(tensors)
    return net.eval()


def from_hub(name: str, patterns: Sequence[str], ignored: Sequence[str] = ()) -> Path:
    """The folder into which a model of the Hub is downloaded.

    Args:
        name: ``owner/name``, which is no folder here.
        patterns: of the files that are wanted.
        ignored: of those that are not.

    Raises:
        BadInput: the Hub is not reached, or does not give it.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=list(ignored) or None))
    except GatedRepoError:  # which is a RepositoryNotFoundError too
        why = "the Hub gives the model of that name only to those who accept its terms: do so on its page, then hf auth login"
    except RepositoryNotFoundError:
        why = "the Hub was asked and knows no such model; a private one needs hf auth login"
    except HFValidationError:
        why = "no model of the Hub can have that name"
    except Exception as error:  # of the network below the Hub: what is raised differs between its versions
        if isinstance(error, OSError) and error.filename:  # a full disk, not the network
            raise
        why = "the Hub was asked and not reached (no network?)"
    raise BadInput(f"{name}: there is no such folder, and {why}")


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block transformers and diffusers do not tell the terminal of a checkpoint, in its own words: the errors here say it."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("transformers", "diffusers"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def whole(made: tuple[Any, Mapping[str, Any]], path: str | Path) -> Any:
    """A network as transformers or diffusers loads it, with what they say of its weights, of which none may be made up.

    Raises:
        BadInput: some are not in its file, and would be random.
    """
    net, said = made
    if missing := sorted(said["missing_keys"]):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise BadInput(f"{path}: not the weights of a {type(net).__name__}: it lacks {', '.join(missing[:5])}{more}")
    return net


def transformers_classifier(
    path: str,
    image: tuple[int, int, int] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Model:
    """An image classifier of transformers, from a folder or Hub id, in eval mode.

    Args:
        path: of the folder, or Hub id; only safetensors are read.
        image: ``(C, H, W)``; by default as its preprocessor crops or resizes to.
        mean: of the pixels in [0, 1]; by default its preprocessor's.
        std: likewise.

    Raises:
        BadInput: transformers is not installed, there is no such model, or it does not say what images it takes.
    """
    try:
        from transformers import AutoModelForImageClassification
        from transformers.utils import cached_file
    except ImportError:
        raise BadInput("a teacher of kind transformers needs transformers: pip install 'potstill[diffusion]'") from None
    folder = Path(path).expanduser()
    if folder.is_dir():
        path = str(folder)
        read_description(folder / "config.json")
        for file in folder.glob("*.safetensors"):
            check_plain(file)
    try:
        with quiet():
            net = whole(AutoModelForImageClassification.from_pretrained(path, use_safetensors=True, output_loading_info=True), path)
        found = cached_file(path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    except BadInput:
        raise
    except Exception as error:  # what is raised for a folder that is wrong differs between versions and kinds of damage
        raise BadInput(f"{path}: no image classifier that transformers can load ({(str(error).splitlines() or [''])[0][:160]})") from None
    told = read_description(Path(found)) if found else {}
    try:
        factor = 255 * told.get("rescale_factor", 1 / 255) if told.get("do_rescale", True) else 255.0
        if told.get("do_normalize", bool(told)):
            mean, std = (given or tuple(v / factor for v in told.get(key, ())) for given, key in ((mean, "image_mean"), (std, "image_std")))
        elif told:
            mean, std = mean or (0.0,), std or (1 / factor,)
        image = image or _image_shape(told, net.config)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise BadInput(f"{path}: its preprocessor_config.json does not describe images ({error}); give image, mean and std") from None
    if not (image and mean and std):
        lacking = " and ".join(name for name, value in (("image", image), ("mean", mean), ("std", std)) if not value)
        raise BadInput(f"{path}: its preprocessor_config.json does not say the {lacking} of its images; give them")
    return from_logits(net.eval(), Images(image, mean, std))


def _image_shape(told: Mapping[str, Any], described: Any) -> tuple[int, int, int] | None:
    size = told.get("crop_size") if told.get("do_center_crop", "crop_size" in told) else None
    size = size or told.get("size") or getattr(described, "image_size", None)
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or (size.get("height"), size.get("width"))
    height, width = (size, size) if isinstance(size, int) else size if size else (None, None)
    return (getattr(described, "num_channels", 3), height, width) if height and width else None


class _Dense(nn.Module):
    """The dense encoder or decoder that pythae makes where it is given none, under pythae's names of the weights."""

    def __init__(self, inputs: int, hidden: int, outputs: int, image: tuple[int, int, int] | None = None):
        super().__init__()
        self.image = image
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU())])
        if image is None:
            self.embedding, self.log_var = nn.Linear(hidden, outputs), nn.Linear(hidden, outputs)
        else:
            self.layers.append(nn.Sequential(nn.Linear(hidden, outputs), nn.Sigmoid()))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images to mean and log-variance, or latents to images."""
        h = x.flatten(1)
        for layer in self.layers:
            h = layer(h)
        return (self.embedding(h), self.log_var(h)) if self.image is None else h.view(-1, *self.image)


def pythae(
    path: str | Path, encoder: nn.Module | None = None, decoder: nn.Module | None = None, images: Images | None = None, std: float = 1.0
) -> Model:
    """A VAE from a folder that pythae's ``save`` wrote, in eval mode.

    What pythae pickles of an encoder or decoder of the user's own is not read: give both as modules, into which the weights go.

    Args:
        path: of the folder with ``model.pt`` and ``model_config.json``.
        encoder: returns ``embedding`` and ``log_covariance``, or a pair of them; by default pythae's dense one.
        decoder: returns the image, or an object with ``reconstruction``; by default pythae's dense one.
        images: shape and range; by default ``input_dim`` of the configuration, and pixels in [0, 1].
        std: of the output, in units of an image in [0, 1]; pythae's squared error is that of 1.

    Raises:
        BadInput: the folder cannot be read, or its weights are of other modules.
    """
    folder = Path(path).expanduser()
    tensors = read_checkpoint(folder / "model.pt")
    described = read_json(folder / "model_config.json")
    shape = described.get("input_dim") if isinstance(described, dict) else None
    if images is None:
        if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and 0 < n <= _LARGEST for n in shape):
            raise BadInput(f"{folder / 'model_config.json'}: input_dim is {shape}; [C, H, W] is expected, or give images")
        images = Images((shape[0], shape[1], shape[2]))
    first, last = tensors.get("encoder.layers.0.0.weight"), tensors.get("encoder.embedding.weight")
    if encoder is None or decoder is None:
        if first is None or last is None or first.ndim != 2 or "encoder.log_var.weight" not in tensors:
            raise BadInput(f"{folder}: its encoder is not pythae's dense one; give encoder and decoder as modules")
        (hidden, pixels), latent = first.shape, len(last)
        encoder = encoder or _Dense(pixels, hidden, latent)
        decoder = decoder or _Dense(latent, hidden, pixels, images.shape)
    net = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    check_weights(tensors, net, folder / "model.pt")
    net.load_state_dict(tensors)
    return from_autoencoder(encoder, decoder, images, std=std, net=net.eval())
