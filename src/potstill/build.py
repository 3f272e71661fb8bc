"""From a recipe to objects. The one module that knows every family, and where what a recipe points at is checked."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.distributions import Categorical

from . import config, data
from . import energy as energies
from .distill.adversary import Adversary
from .distill.calibration import NOISE_MAP, NoiseMap
from .divergence import Divergence, Match, hinton, kl, mse, reverse_kl, wasserstein2
from .energy.view import Energy
from .errors import BadInput, Failed
from .evaluate.cost import parameters, size_mib
from .families.classifier import Classifier, ResNet
from .families.diffusion import TextToImage, UNet, chain_of
from .families.gan import GAN, Discriminator
from .families.helmholtz import HelmholtzMachine
from .families.latent import LatentDiffusion, Told
from .families.lvae import LVAE
from .families.vae import VAE
from .families.vrnn import VRNN
from .importers import OWN_NETWORK, from_hub, kd4dgm, pythae, transformers_classifier
from .model import Model
from .noise import Noise
from .state import check_weights, digest_of, fingerprint, read_json, read_tensors, sha256
from .synthesize.ancestral import Ancestral, Uniform
from .synthesize.guided import Guided
from .synthesize.inversion import Inversion, LatentInversion
from .synthesize.prior import Prior, Prompts, parts_of
from .synthesize.synthesis import Synthesizer
from .trace import run

if TYPE_CHECKING:
    from .evaluate.features import Features

PACKAGE = Path(__file__).parent
ZOO = PACKAGE / "zoo"
Network = LVAE | VAE | GAN | Classifier | ResNet | UNet | LatentDiffusion | HelmholtzMachine | VRNN
_NET: TypeAdapter[config.Net] = TypeAdapter(config.Net)
_INSTALLED = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
_TIMED = 20  # calls of a network whose time is looked for; the median counts


def reason(error: BaseException) -> str:
    """What went wrong in somebody else's code, in one line, with the line of their own code that it came from."""
    own = [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not Path(f.filename).is_relative_to(PACKAGE) and "-packages" not in f.filename
    ]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)  # a KeyError's own text is in quotes
    kind = "" if isinstance(error, ValueError) or (isinstance(error, KeyError) and " " in text) else f"{type(error).__name__}: "
    return f"{kind}{(text.splitlines() or [''])[0]}{where}"


_LESS = "lower batch (of the surrogate: or mode clean, decode linear, save_memory), or compute.workers"


@contextmanager
def memory_watched() -> Iterator[None]:
    """Turns what torch and Python raise when memory is out, on the CPU or a GPU, into one error.

    Raises:
        Failed: memory ran out in the block.
    """
    try:
        yield
    except MemoryError:
        raise Failed(f"out of memory; {_LESS}") from None
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise Failed(f"out of memory; {_LESS} ({str(error).splitlines()[0]})") from None
        raise


def born(seed: int, name: str, make: Callable[[], Any]) -> Any:
    """Call ``make`` with torch's own generator, which initializes weights, seeded by the run's seed; it is put back after."""
    words = Noise((seed, "weights")).uniform(name, (1, 2)).mul(2**24).long().flatten().tolist()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(words[0] * 2**24 + words[1])
        return make()


def network(net: config.Net) -> Network:
    """A fresh network.

    Raises:
        BadInput: its numbers do not fit together.
    """
    try:
        match net:
            case config.LVAENet():
                return LVAE(net.image, net.width, net.levels, net.latent, net.std)
            case config.VAENet():
                return VAE(net.image, net.width, net.latent, net.std)
            case config.GANNet():
                return GAN(net.image, net.width, net.latent, net.classes, net.arch, net.encoder)
            case config.ClassifierNet():
                return Classifier(net.image, net.classes, net.width)
            case config.ResNetNet():
                return ResNet(net.image, net.classes, net.depth, net.width, net.mean, net.std)
            case config.HelmholtzNet():
                return HelmholtzMachine(net.image, net.width, net.latent, net.std, net.mean, net.scale)
            case config.VRNNNet():
                return VRNN(net.image, net.width, net.hidden, net.latent, net.std, net.temperature, net.mean, net.scale)
            case config.UNetNet():
                described = net.model_dump(exclude={"kind"})
                return UNet(**described)
            case config.TextToImageNet():
                raise BadInput(f"a {net.kind} model is a prior; it is trained, and is no teacher")
    except ValueError as error:
        raise BadInput(str(error)) from None
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # it does not fit in memory, or in a tensor
        raise BadInput(f"a {net.kind} of these numbers cannot be made: {(str(error).splitlines() or [''])[0]}") from None


def text_to_image(net: config.TextToImageNet, captions: Sequence[str]) -> TextToImage:
    """A fresh prior that knows the words of those captions.

    Raises:
        BadInput: diffusers is not installed, or its numbers do not fit together.
    """
    try:
        return TextToImage(net.image, captions, net.width, net.autoencoder, net.latent, net.text)
    except BadInput:
        raise
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"train.model: {reason(error)}") from None


def load_weights(net: nn.Module, path: Path) -> None:
    """Load a safetensors file into a network, by name and shape.

    Raises:
        BadInput: the file is broken, holds NaN, or is of another network.
    """
    tensors = read_tensors(path)
    check_weights(tensors, net, path)
    net.load_state_dict(tensors)


def locate(path: str) -> Path:
    """The folder that ``zoo:NAME``, a local folder, or a Hub id stands for; a Hub id is downloaded, its plain files alone.

    Raises:
        BadInput: there is none.
    """
    if path.startswith("zoo:"):
        folder = ZOO / path[4:]
        names = sorted(p.parent.name for what in ("model.safetensors", "model_index.json") for p in ZOO.glob(f"*/{what}"))
        if folder.name not in names or folder.parent != ZOO:
            raise BadInput(f"{path}: no such model in the zoo; it has {', '.join(names) or 'none'}")
        return folder
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / "recipe.yaml").is_file() and not (folder / "config.json").exists():
            raise BadInput(f"{path}: this is a run; {_students_of(path)}")
        if (folder / "model.safetensors").is_file() and not (folder / "config.json").exists():
            raise BadInput(
                f"{path}: no config.json, so the weights are of a network of your own: make it by your code, and load model.safetensors "
                "into it"
            )
        return folder
    if folder.exists():
        raise BadInput(
            f"{path}: a folder with config.json and model.safetensors is expected; it is a file, and weights alone do not say what the "
            f"network is: {OWN_NETWORK}"
        )
    if path.count("/") == 1 and not path.startswith((".", "~", "/")):
        return from_hub(path, ["config.json", "model.safetensors", NOISE_MAP, "model_index.json"])
    raise BadInput(f"{path}: no such folder")


def _students_of(run: str) -> str:
    """What to load in place of a run's folder."""
    student = Path(run) / "student"
    home = student.expanduser()
    found = [student, *(student / folder.name for folder in sorted(home.glob("w*")))]
    there = [str(folder) for folder in found if (folder.expanduser() / "model.safetensors").is_file()]
    return f"load {' or '.join(there)}" if there else "it has no student yet: its distill stage makes one"


def pretrained(path: str) -> Network:
    """A network from a folder that :meth:`save_pretrained` wrote, or from one of a diffusers pipeline that denoises pixels, in eval mode.

    Raises:
        BadInput: no such folder, or what is in it is broken.
    """
    folder = locate(path)
    if (folder / "model_index.json").exists():
        return denoiser(path)
    described = read_json(folder / "config.json")
    if not isinstance(described, dict) or "family" not in described:
        raise BadInput(f"{folder / 'config.json'}: no family in it; a folder written by a potstill network's save_pretrained is expected")
    try:
        section = _NET.validate_python({k: v for k, v in described.items() if k != "family"} | {"kind": described["family"]})
    except ValidationError as error:
        wrong = error.errors()[0]
        path_in_it = ".".join(str(part) for part in wrong["loc"][1:])
        raise BadInput(f"{folder / 'config.json'}: {path_in_it or 'family'}: {wrong['msg']}") from None
    return _filled(section, folder / "model.safetensors").eval()


def load(path: str | Path) -> Model:
    """The model in a folder of config.json and model.safetensors, ready to sample from, infer by, or distill.

    A student that draws from calibrated noise has its map of it beside its weights; then it is given standard noise as any other, and
    maps it by itself. Without that map, :func:`pretrained` gives its network.

    Args:
        path: the folder, ``zoo:NAME``, or a Hub id.

    Returns:
        It, frozen, on the CPU.

    Raises:
        BadInput: no such folder, or what is in it is broken.
    """
    folder = locate(str(path))
    model = pretrained(str(folder)).model().frozen()
    calibrated = noise_map(model, folder)
    return calibrated.onto(model) if calibrated else model


def noise_map(model: Model, folder: Path) -> NoiseMap | None:
    """The map of a frozen model's noise that lies beside its weights, if any.

    Raises:
        BadInput: it is broken, or of another model.
    """
    file = folder / NOISE_MAP
    if not file.is_file():
        return None
    try:
        net = NoiseMap(model)
    except ValueError as error:
        raise BadInput(f"{file}: {error}") from None
    load_weights(net, file)
    return net.eval().requires_grad_(False)


def _filled(section: config.Net, weights: Path) -> Network:
    """The network of that description with the weights of a file.

    Raises:
        BadInput: the file is broken, holds NaN, or is of another network.
    """
    tensors = read_tensors(weights)
    with torch.device("meta"):  # so that a description of terabytes is found out by the file, not by the memory
        check_weights(tensors, network(section), weights)
    net = network(section)
    net.load_state_dict(tensors)
    return net


def denoiser(path: str, steps: int | None = None, sampler: Literal["ddim", "ddpm"] | None = None) -> UNet:
    """A network from a folder or Hub id in diffusers' layout: ``unet``, a UNet2DModel, and ``scheduler``.

    Args:
        path: folder, or Hub id.
        steps: links of its chain; by default as its pipeline has it.
        sampler: by default as its scheduler.

    Raises:
        BadInput: it cannot be loaded, or is of another layout.
    """
    prior = Prior.from_pretrained(path)
    if prior.vae is not None or prior.texts or type(prior.unet).__name__ != "UNet2DModel":
        raise BadInput(f"{path}: a diffusers pipeline of a UNet2DModel without autoencoder or text encoder is expected as a teacher")
    try:
        return UNet.of(prior.unet, prior.scheduler, steps, sampler)
    except BadInput:
        raise
    except Exception as error:  # a description is whatever is in the folder
        raise BadInput(f"{path}: {reason(error)}") from None


def text_to_image_teacher(section: config.Pretrained) -> LatentDiffusion:
    """A text-to-image pipeline in diffusers' layout, for the prompts of the recipe.

    Raises:
        BadInput: it cannot be loaded, is of another layout, or the recipe names no prompts.
    """
    if not section.prompts:
        raise BadInput(f"teacher.prompts: {section.path} draws what a text says; list texts for its student to learn")
    prior = Prior.from_pretrained(locate(section.path) if section.path.startswith("zoo:") else section.path)
    if prior.vae is None or not prior.texts or type(prior.vae).__name__ != "AutoencoderKL":
        raise BadInput(
            f"{section.path}: as a text-to-image teacher, a UNet2DConditionModel with an AutoencoderKL and a text encoder is expected"
        )
    try:
        told, nothing = (prior.condition(texts, None).arguments for texts in (section.prompts, [section.negative]))
        net = Told(prior.unet, told, nothing if section.guidance_scale != 1 else None, section.guidance_scale)
        return LatentDiffusion.of(prior.unet, prior.scheduler, prior.vae, prior.image_shape, net, section.chain, section.sampler)
    except BadInput:
        raise
    except Exception as error:  # a description is whatever is in the folder
        raise BadInput(f"{section.path}: {reason(error)}") from None


def allow(modules: Sequence[str]) -> None:
    """Import the modules that the caller allowed, which may also register divergences and draws.

    Raises:
        BadInput: there is no such module, or importing it fails.
    """
    for module in modules:
        if module.endswith(".py"):
            raise BadInput(f"--import {module}: a module is expected, not its file; write --import {_module_of(module)}")
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in (module, module.partition(".")[0]):  # one that the module itself imports
                raise BadInput(f"--import {module}: cannot be imported: {reason(error)}") from None
            where = f"in the current directory, {os.getcwd()}, or elsewhere on sys.path"
            raise BadInput(f"--import {module}: there is no module {error.name} {where}; run potstill where it is") from None
        except (Exception, SystemExit) as error:
            raise BadInput(f"--import {module}: cannot be imported: {reason(error)}") from None


def _module_of(file: str) -> str:
    """How a module is called whose file was named; of one elsewhere, as it is called where it lies."""
    path = Path(file).with_suffix("")
    return path.name if path.is_absolute() or ".." in path.parts else ".".join(path.parts)


def named(target: str, allowed: Sequence[str]) -> Any:
    """What ``module:name`` stands for, in a module that the caller allowed by name.

    Raises:
        BadInput: the module was not allowed, or has no such name.
    """
    module, _, name = target.partition(":")
    if module not in allowed:
        raise BadInput(f"{target}: a recipe does not run code unless you allow its module: add --import {module}")
    allow([module])
    found = getattr(importlib.import_module(module), name, None)
    if found is None:
        raise BadInput(f"{target}: module {module} has no {name!r}")
    return found


def digest_of_code(module: str) -> str:
    """Of what an imported module's source does: not of its comments and layout. Empty where it has no source, or is an installed one."""
    try:
        source = inspect.getsourcefile(sys.modules[module])
        if source is None or any(Path(source).is_relative_to(place) for place in (PACKAGE, *_INSTALLED)):
            return ""
        return fingerprint(ast.dump(ast.parse(Path(source).read_text(encoding="utf-8"))))
    except (OSError, KeyError, TypeError, ValueError, SyntaxError):
        return ""


def resolve(target: str, allowed: Sequence[str], **arguments: Any) -> Any:
    """Call ``module:name``, from a module that the caller allowed by name.

    Raises:
        BadInput: the module was not allowed, or has no such function, or the function fails.
    """
    function = named(target, allowed)
    if not callable(function):
        raise BadInput(f"{target}: not a function")
    try:
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise BadInput(f"{target}: {error}; it is called with what the recipe has as arguments: {{...}} beside target") from None
    except ValueError:  # it has no signature that can be read
        pass
    try:
        return function(**arguments)
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(f"{target}: {reason(error)}") from None


def _own_model(target: str, allowed: Sequence[str], **arguments: Any) -> Model:
    model = resolve(target, allowed, **arguments)
    if not isinstance(model, Model):
        raise BadInput(f"{target}: returned a {type(model).__name__}; a potstill.model.Model is expected")
    return model


def teacher(section: config.Teacher, trained: Path, allowed: Sequence[str]) -> Model:
    """The teacher, frozen.

    Args:
        section: of the recipe.
        trained: folder of the model that this run's train stage made.
        allowed: modules that code may come from.

    Raises:
        BadInput: it cannot be loaded, or does not generate images of its shape, or infer them or their labels, that are finite.
    """
    model = loaded(section, trained, allowed)
    if model.generate is None and model.infer is None:
        raise BadInput(f"teacher: the {type(model.net).__name__} has neither a generate nor an infer program")
    # A link is one call of the network; the whole chain may be a thousand.
    _check_output(model, "link" if model.link is not None else "infer" if model.generate is None else "generate")
    return model


def loaded(section: config.Teacher, trained: Path, allowed: Sequence[str]) -> Model:
    """The teacher as :func:`teacher` gives it, but unseen: none of its programs is run.

    Raises:
        BadInput: it cannot be loaded.
    """
    model: Model
    match section:
        case config.Pretrained():
            model = _pretrained_teacher(section).model()
        case config.Trained():
            if not (trained / "model.safetensors").exists():
                raise BadInput("teacher: not trained yet; run the train stage first")
            model = pretrained(str(trained)).model()
        case config.Weights():
            model = _filled(section.net, Path(section.path).expanduser()).model()
        case config.KD4DGM():
            model = kd4dgm(section.path, section.image, section.std).model()
        case config.Transformers():
            model = transformers_classifier(section.path, section.image, section.mean, section.std)
        case config.Pythae():
            model = pythae(section.path, std=section.std)
        case config.Python():
            model = _own_model(section.target, allowed, **section.arguments)
    return model.frozen()


def _pretrained_teacher(section: config.Pretrained) -> Network:
    folder = locate(section.path)
    if (folder / "model_index.json").exists():
        if parts_of(folder).get("unet") == "UNet2DConditionModel":
            return text_to_image_teacher(section)
        _untold(section)
        return denoiser(section.path, section.chain, section.sampler)
    _untold(section)
    net = pretrained(str(folder))  # found once: a Hub id is asked for over the network
    if section.sampler is not None:
        raise BadInput(f"teacher.sampler: is of a diffusers folder; {section.path} has its own")
    if section.chain is None:
        return net
    if not isinstance(net, UNet):
        raise BadInput(f"teacher.chain: is of a diffusion or flow model; {section.path} is a {type(net).__name__}")
    try:
        longer = net.shrunk(net.width, section.chain)
    except ValueError as error:
        raise BadInput(f"teacher.chain: {error}") from None
    longer.load_state_dict(net.state_dict())
    return longer.eval()


def _untold(section: config.Pretrained) -> None:
    if section.prompts or section.negative or section.guidance_scale != 1:
        raise BadInput(f"teacher: prompts, negative and guidance_scale are of text-to-image teachers; {section.path} reads no text")


def _check_output(teacher: Model, program: str) -> None:
    """See that a teacher's program runs, and that two images, or the logits of two, come out finite."""
    shape = tuple(teacher.images.shape)
    try:
        inputs = () if program == "generate" else (teacher.images.encode(torch.full((2, *shape), 0.5, device=teacher.device)),)
        with torch.no_grad():
            out = run(teacher.program(program), *inputs, noise=Noise((0,)), n=2, device=teacher.device).out.dist
            labels = isinstance(out, Categorical)
            x = out.logits if labels else out.mean
    except Exception as error:
        raise BadInput(f"teacher: its {program} program fails: {reason(error)}") from None
    chain = chain_of(teacher)
    expected = tuple(chain.image) if chain and program == "link" else shape  # a link of latents gives latents
    if tuple(x.shape) != (2, *expected) and not (labels and program == "infer" and x.shape[:-1] == (2,)):
        raise BadInput(f"teacher: for 2 images of {shape} it {program}s {tuple(x.shape)}")
    if not x.isfinite().all():
        raise BadInput(f"teacher: it {program}s NaN or infinite {'logits' if labels else 'pixels'}; look at its weights")


def width_for(net: Network, ratio: float, encoder: bool = False) -> int:
    """The width at which a network of the same kind, a GAN with an encoder if asked, has about ``ratio`` times fewer parameters."""
    goal = parameters(net) / ratio

    def count(width: int) -> int:
        with torch.device("meta"):
            return parameters(_shrunk(net, width, encoder))

    low = _widest(net.width, lambda width: count(width) <= goal) or 1
    return min((low, min(low + 1, net.width)), key=lambda w: abs(count(w) - goal))


def _widest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest width up to ``most`` that fits, where all narrower ones do; 0 where none does."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def width_within(budget: config.Budget, of: Model, encoder: bool = False, threads: int = 1) -> int:
    """The largest width, up to the teacher's own, at which a student of a teacher is within a budget.

    Args:
        budget: of the recipe.
        of: the teacher.
        encoder: whether the student of a GAN has one.
        threads: that a time is measured with on a CPU.

    Raises:
        BadInput: not even width 1 is within it, or the teacher's width cannot be changed.
    """
    net = _shrinkable(of)

    def cost(width: int) -> float:
        if budget.params is not None:
            with torch.device("meta"):
                return parameters(_shrunk(net, width, encoder))
        fresh = born(0, "budget", lambda: _shrunk(net, width, encoder))
        if budget.mib is not None:
            return size_mib(fresh)
        from .evaluate.arms import timed  # late, for it brings scipy, which a training does not need

        fresh.to(of.device, memory_format=torch.channels_last)
        return timed(fresh.model().frozen(), 1, threads, _TIMED).median_ms

    kind, most = next((kind, value) for kind in ("params", "mib", "ms") if (value := getattr(budget, kind)) is not None)
    width = _widest(net.width, lambda width: cost(width) <= most)
    if not width:
        raise BadInput(f"student.budget.{kind}: {most:g}, but a {type(net).__name__} of width 1 takes {cost(1):.4g}; give more")
    return width


def _shrinkable(of: Model) -> Network:
    if not isinstance(of.net, Network):
        what = type(of.net).__name__
        raise BadInput(
            f"student: width, ratio, budget and start are for potstill's own families; the teacher is a {what}. Give a net or a target"
        )
    return of.net


def _shrunk(net: Network, width: int, encoder: bool, chain: int | None = None) -> Network:
    if isinstance(net, (UNet, LatentDiffusion)):
        return net.shrunk(width, chain)
    return net.shrunk(width, encoder or None) if isinstance(net, GAN) else net.shrunk(width)


def student(section: config.Student, of: Model, seed: int, allowed: Sequence[str], chain: int | None = None) -> Model:
    """A fresh student of a teacher, its weights drawn from the seed.

    Args:
        section: of the recipe.
        of: the teacher.
        seed: of the weights.
        allowed: modules that code may come from.
        chain: links of its chain, where it is another than the teacher's.

    Raises:
        BadInput: it is wider than the teacher, makes images of another shape, or has no chain.
    """
    if section.start is not None:
        net = _shrinkable(of)
        copy = born(seed, "student", lambda: _shrunk(net, net.width, False, chain))
        copy.load_state_dict(net.state_dict())
        model: Model = copy.model()
    elif section.target is not None:
        target = section.target
        model = born(seed, "student", lambda: _own_model(target, allowed, **section.arguments))
    elif section.net is not None:
        described = section.net
        if chain is not None and isinstance(described, config.UNetNet):
            described = described.model_copy(update={"steps": chain})
        model = born(seed, "student", lambda: network(described)).model()
    else:
        net = _shrinkable(of)
        if section.encoder and not isinstance(net, GAN):
            raise BadInput(f"student.encoder: is for the student of a GAN; that of a {type(net).__name__} has the programs of its teacher")
        width = section.width if section.width is not None else width_for(net, section.ratio or 1, section.encoder)
        if width > net.width:
            raise BadInput(f"student: width {width} is wider than the teacher's {net.width}")
        try:
            model = born(seed, "student", lambda: _shrunk(net, width, section.encoder, chain)).model()
        except ValueError as error:
            raise BadInput(f"student: {error}") from None
    if chain is not None and not isinstance(model.net, (UNet, LatentDiffusion)):
        raise BadInput(f"student: an arm's chain is of a diffusion or flow model of potstill's own; it is a {type(model.net).__name__}")
    if tuple(model.images.shape) != tuple(of.images.shape):
        raise BadInput(f"student: makes images of {tuple(model.images.shape)}, the teacher of {tuple(of.images.shape)}")
    if model.images.pixels != of.images.pixels:
        raise BadInput("student: Images.pixels differs from the teacher's; both make pictures, or neither")
    return model


def adversary(section: config.Adversary, model: Model, seed: int) -> Adversary:
    """A fresh discriminator of a model's images, with the weights of its losses.

    Raises:
        BadInput: it cannot be made.
    """
    classes = model.net.classes if isinstance(model.net, GAN) else 0
    weights = (section.weight, section.features) if isinstance(section, config.Adversarial) else (1.0, 0.0)
    try:
        net = born(seed, "discriminator", lambda: Discriminator(model.images.shape, section.width, classes, section.arch))
    except (RuntimeError, MemoryError, OverflowError) as error:
        raise BadInput(f"a discriminator of these numbers cannot be made: {(str(error).splitlines() or [''])[0]}") from None
    return Adversary(net, *weights, section.r1).to(model.device)


def dataset(section: config.Data | None, shape: tuple[int, int, int], who: str, pixels: bool = True) -> data.Dataset | None:
    """The real data, checked against the images that a network takes, or the other values where it takes no pictures.

    Raises:
        BadInput: it cannot be read, or is of another shape.
    """
    if section is None:
        return None
    loaded = data.load(section)
    found = loaded.train.images.shape[1:]
    if found != tuple(shape):
        raise BadInput(
            f"data: images of {found[0]} channels, {found[1]}x{found[2]}; the {who} takes {shape[0]} channels, {shape[1]}x{shape[2]}"
        )
    if pixels != (loaded.train.images.dtype.name == "uint8"):
        kinds = ["values that are no pixels", "pictures"]
        raise BadInput(f"data: {kinds[not pixels]}; the {who} takes {kinds[pixels]}")
    return loaded


@dataclass(frozen=True)
class FeatureSource:
    """Features with a fingerprint of the network behind them."""

    features: Features
    digest: str

    def of(self, images: Tensor) -> Any:
        """The features of images ``(n, C, H, W)``, ``(n, d)`` float32.

        Raises:
            BadInput: the network behind them fails, or gives something else.
        """
        try:
            return self.features(images)
        except Exception as error:
            raise BadInput(f"evaluate.features: {reason(error)}") from None


def features(text: str, device: torch.device, allowed: Sequence[str], batch: int, train: data.Kept) -> FeatureSource:
    """The features that a recipe names.

    Args:
        text: ``pixels``, ``standardized``, ``classifier:PATH`` or ``python:module:name``, a function that returns a network from images
            ``(batch, C, H, W)`` in [0, 1] to features ``(batch, d)``.
        device: where the network runs.
        allowed: modules that code may come from.
        batch: images at a time.
        train: real training images ``(n, C, H, W)``, or other values.

    Raises:
        BadInput: anything else, or a classifier of other images.
    """
    from .evaluate.features import from_network, pixels, standardized  # late, for it brings scipy, which a training does not need

    kind, _, rest = text.partition(":")
    shape, pictures = train.shape[1:], train.dtype.name == "uint8"
    if text == "pixels":
        return FeatureSource(pixels(pictures), "pixels")
    if text == "standardized":
        if pictures:
            raise BadInput("evaluate.features: standardized is for data that are no pictures; use pixels, or a network")
        try:
            return FeatureSource(standardized(data.floats(train)), "standardized")
        except ValueError as error:
            raise BadInput(f"evaluate.features: {error}") from None
    if kind == "classifier" and rest:
        net = pretrained(rest)
        if not isinstance(net, (Classifier, ResNet)):
            raise BadInput(f"evaluate.features: {rest} is a {type(net).__name__}; a classifier is expected")
        if net.image != tuple(shape):
            raise BadInput(f"evaluate.features: the classifier {rest} takes images of {net.image}, the data's are {tuple(shape)}")
        return FeatureSource(from_network(text, _Body(net), batch=batch, device=str(device)), sha256(locate(rest) / "model.safetensors"))
    if kind == "python" and rest:
        network = resolve(rest, allowed)
        if not isinstance(network, nn.Module):
            raise BadInput(f"evaluate.features: {rest} returned a {type(network).__name__}; a torch.nn.Module is expected")
        found = replace(from_network(text, network, batch=batch, device=str(device)), pixels=pictures)
        return FeatureSource(found, digest_of(network))
    raise BadInput(f"evaluate.features: {text!r}; pixels, standardized, classifier:PATH or python:module:name is expected")


class _Body(nn.Module):
    def __init__(self, net: Classifier | ResNet):
        super().__init__()
        self.net, self.images = net, net.model().images

    def forward(self, x: Tensor) -> Tensor:
        return self.net.features(self.images.encode(x))


def energy(
    terms: Sequence[config.Term], model: Model, of: config.Teacher, seed: int, allowed: Sequence[str], rival: bool = False
) -> Energy:
    """The energies of a recipe, composed.

    Args:
        terms: of the recipe.
        model: the teacher.
        of: where it comes from; activations recorded when it was trained lie beside it.
        seed: of what energies draw.
        allowed: modules that code may come from.
        rival: whether there is a student to compare with; without one, terms that compare are left out.

    Raises:
        BadInput: a term wants what the teacher does not have.
    """
    total = Energy()
    for term in terms:
        if term.kind == "disagreement" and not rival:
            continue
        if term.kind == "python":
            found = named(term.target or "", allowed)
            if not isinstance(found, Energy) and not callable(found):
                raise BadInput(f"{term.target}: an Energy, or a function of a view, is expected; it is a {type(found).__name__}")
            one = found if isinstance(found, Energy) else energies.energy(found)
        elif term.kind == "typicality":
            one = energies.typicality(_of_two_programs(model, term.kind), Noise((seed, "typicality")), term.n)
        elif term.kind == "activation_summary":
            if not isinstance(of, config.Pretrained):
                raise BadInput("energy activation_summary: reads the file beside a teacher of kind pretrained")
            one = energies.activation_summary(energies.statistics.load(locate(of.path)))
        elif term.kind == "posterior_kl" and term.nodes != "*":
            one = energies.posterior_kl_at(term.nodes)
        else:
            plain = energies.ENERGIES[term.kind]
            assert isinstance(plain, Energy)
            one = plain
        total = total + (term.weight * one).between(term.start, term.stop)
    return total


def _of_two_programs(model: Model, kind: str) -> Model:
    if model.generate is None or model.infer is None:
        raise BadInput(f"energy {kind}: needs a teacher that generates and infers; this {type(model.net).__name__} does not do both")
    return model


def prompts(section: config.Guided) -> Prompts | None:
    """The wordings of a recipe, by class.

    Raises:
        BadInput: the file of prompts is broken, or has no texts for a class.
    """
    names = section.classes or ("",)
    if section.prompts:
        return Prompts(tuple(tuple(p.replace("{}", name) for p in section.prompts) for name in names), section.negative)
    if not section.prompts_file:
        return None
    path = Path(section.prompts_file).expanduser()
    content = config.read_tree(path)
    if section.classes is None:
        if isinstance(content, dict):
            raise BadInput(f"{path}: texts by name, and the recipe names no classes; name them, or list texts alone")
        return Prompts((_texts(content, str(path)),), section.negative)
    missing = [name for name in section.classes if not isinstance(content, dict) or not content.get(name)]
    if missing:
        raise BadInput(
            f"{path}: no prompts for {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; a list for each class is expected"
        )
    return Prompts(tuple(_texts(content[name], f"{path}: {name}") for name in section.classes), section.negative)


def _texts(found: Any, where: str) -> tuple[str, ...]:
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.isprintable() and t for t in texts):
        raise BadInput(f"{where}: a list of texts is expected")
    return tuple(texts)


def synthesizer(section: config.Surrogate, model: Model) -> tuple[Synthesizer, Prompts | None]:
    """What makes the images of a surrogate, and the prompts it goes by.

    Raises:
        BadInput: a prior or a generator cannot be loaded, or its images cannot be the teacher's.
    """
    shape, device = model.images.shape, model.device
    if not model.images.pixels and not isinstance(section, config.Ancestral):
        raise BadInput(f"surrogate: kind {section.kind} makes pictures, but the teacher's data are none; use kind ancestral")
    match section:
        case config.Ancestral():
            if model.generate is None:
                raise BadInput(
                    f"surrogate: kind ancestral draws from the teacher's own prior, but a {type(model.net).__name__} does not generate"
                )
            if section.sweeps and model.infer is None:
                raise BadInput(f"surrogate: sweeps infer the latents of images, but a {type(model.net).__name__} does not")
            return Ancestral(section.observe, section.sweeps), None
        case config.Uniform():
            return Uniform(shape), None
        case config.Inversion():
            return Inversion(shape, section.steps, section.lr, section.jitter), None
        case config.Latent():
            generator = model if section.generator is None else pretrained(section.generator).model().frozen()
            if generator.generate is None:
                raise BadInput(f"surrogate: kind latent inverts a generator, but a {type(generator.net).__name__} does not generate")
            generator.net.to(device)
            return LatentInversion(generator, shape, section.steps, section.lr, section.pull), None
        case config.Guided():
            wordings = prompts(section)
            path = ZOO / section.prior[4:] if section.prior.startswith("zoo:") else section.prior
            if isinstance(path, Path) and (path.parent != ZOO or not (path / "model_index.json").is_file()):
                names = sorted(p.parent.name for p in ZOO.glob("*/model_index.json"))
                raise BadInput(f"{section.prior}: no such prior in the zoo; it has {', '.join(names) or 'none'}")
            dtype = getattr(torch, section.dtype)
            prior = Prior.from_pretrained(path, scheduler=section.scheduler, tiny=section.tiny, dtype=dtype, device=device)
            if section.save_memory:
                prior.save_memory()
            guided = Guided(
                prior,
                shape,
                section.steps,
                section.mode,
                section.scale,
                section.clip,
                section.repeats,
                section.decode,
                wordings,
                section.guidance_scale,
                section.eta,
            )
            return guided, wordings


def rules(section: Sequence[config.Rule]) -> tuple[Match, ...]:
    """The rules of a recipe as functions."""
    named: dict[str, Divergence] = {"kl": kl, "reverse_kl": reverse_kl, "wasserstein2": wasserstein2, "mse": mse}
    return tuple(Match(r.nodes, hinton(r.temperature) if r.by == "hinton" else named[r.by], r.weight, r.reduce) for r in section)


def cores() -> int:
    """CPU cores that this process may use: those it is bound to, or its container's share of them where that is less."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count
