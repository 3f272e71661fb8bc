"""The recipe: what a run does, checked whole before anything starts. Imports no torch."""

from __future__ import annotations

import functools
import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from .errors import RecipeError, has_token, meant, shown
from .store import checked, is_url

MAX_RECIPE_BYTES = 1 << 20
MAX_RECIPE_DEPTH = 32
MAX_RECIPE_VALUES = 10_000  # PyYAML reads that many in a second or two
MAX_PROBLEMS = 100  # that are told at once
TEACHER_IMAGES = 1024  # that models are measured against where there is no data; Fréchet distances of fewer are mostly bias


class Section(BaseModel):
    """Every part of a recipe: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # Keys that a section got when runs of it were about, with their defaults. At these they are left out of what is dumped, so that what is
    # hashed of an old run's recipe stays what it was.
    _later: ClassVar[dict[str, Any]] = {}

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in dump(self).items() if k not in self._later or v != self._later[k]}


def _json(value: Any) -> Any:
    """Refuse what JSON cannot hold, for the recipe is stored and hashed as JSON."""
    match value:
        case None | bool() | int():
            pass
        case float():
            if not math.isfinite(value):
                raise ValueError(f"a finite number is expected, found {value}")
        case str():
            _plain(value)
        case list():
            for item in value:
                _json(item)
        case dict():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"names are expected as keys, found {key!r}")
                _plain(key)
                _json(item)
        case _:
            raise ValueError(f"numbers, texts, lists and mappings are expected, found a {type(value).__name__}")
    return value


def _plain(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a line of printable characters is expected")
    return text


def _number(value: Any) -> Any:
    if isinstance(value, (bool, str)):
        raise ValueError("a number is expected")
    return value


_NUMERIC = BeforeValidator(_number)  # pydantic alone would take true for 1
Count = Annotated[int, Field(ge=1, lt=2**31), _NUMERIC]
Positive = Annotated[float, Field(gt=0), _NUMERIC]
NotNegative = Annotated[float, Field(ge=0), _NUMERIC]
Fraction = Annotated[float, Field(ge=0, lt=1), _NUMERIC]
Seed = Annotated[int, Field(ge=0, lt=2**63), _NUMERIC]
Side = Annotated[int, Field(ge=2, le=4096), _NUMERIC]
PerChannel = Annotated[tuple[Annotated[float, _NUMERIC], ...], Field(min_length=1, max_length=4)]
ImageShape = tuple[Annotated[int, Field(ge=1, le=4), _NUMERIC], Side, Side]
Steps = Annotated[int, Field(ge=2, le=4096), _NUMERIC]
One = Annotated[int, Field(ge=1, le=1), _NUMERIC]
PointShape = tuple[Annotated[int, Field(ge=2, le=2), _NUMERIC], One, One]
StrokeShape = tuple[Annotated[int, Field(ge=3, le=3), _NUMERIC], Steps, One]
OneOrTwo = Annotated[tuple[Annotated[float, _NUMERIC], ...], Field(min_length=1, max_length=2)]
PositiveOneOrTwo = Annotated[tuple[Positive, ...], Field(min_length=1, max_length=2)]
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_TARGET = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
Name = Annotated[str, Field(pattern=_NAME)]
Target = Annotated[str, Field(pattern=_TARGET)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_plain)]
Pattern = Annotated[str, AfterValidator(_plain)]
Address = Annotated[Text, AfterValidator(checked)]
Located = Annotated[Text, AfterValidator(lambda path: checked(path) if is_url(path) else path)]
Arguments = Annotated[dict[str, Any], AfterValidator(_json)]
Labels = Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31), _NUMERIC], ...], Field(min_length=1)]


# ------------------------------------------------------------------ real data, which only its owner has


class DigitsData(Section):
    """scikit-learn's 1,797 handwritten digits, 8x8, split by a seed."""

    kind: Literal["digits"]
    seed: Seed = 0
    train: Annotated[int, Field(ge=1, le=1796), _NUMERIC] = 1200


class FileData(Section):
    """Images in a folder (png, jpg, webp, bmp), a parquet file or folder of them, or an npz file; here, or at an address such as s3://."""

    kind: Literal["folder", "parquet", "npz"]
    path: Located
    test_path: Located | None = Field(default=None, description="held-out images; without it a fraction is split off by the seed")
    test_fraction: Annotated[float, Field(gt=0, lt=1), _NUMERIC] = 0.1
    seed: Seed = 0
    image: Text | None = Field(
        default=None, description="parquet column or npz array of the images; by default the first of image, img, images, x"
    )
    label: Text | None = Field(
        default=None, description="parquet column or npz array of the labels; by default label, labels or y where there is one"
    )
    size: Side | None = Field(default=None, description="resize to size x size; without it another size is an error")
    mode: Literal["L", "RGB"] | None = Field(default=None, description="convert to gray or color; without it another mode is an error")


class GlyphsData(Section):
    """Captioned characters, drawn from the fonts that matplotlib ships: public pictures for a prior."""

    kind: Literal["glyphs"]
    seed: Seed = 0
    n: Annotated[int, Field(ge=2, le=2**24), _NUMERIC] = Field(default=40000, description="pictures to train on")
    test: Annotated[int, Field(ge=1, le=2**20), _NUMERIC] = Field(default=500, description="further pictures, held out")
    size: Side = 32
    digits: Annotated[float, Field(ge=0, le=1), _NUMERIC] = Field(default=0.75, description="share of digits; the rest are letters")


class ValuesData(Section):
    """Numbers that are no pixels: a csv file with a head line and a point in each row, or an npz array of points or sequences."""

    kind: Literal["values"]
    path: Located
    test_path: Located | None = Field(default=None, description="held-out rows; without it a fraction is split off by the seed")
    test_fraction: Annotated[float, Field(gt=0, lt=1), _NUMERIC] = 0.5
    seed: Seed = 0
    array: Text | None = Field(default=None, description="npz array (n, C), (n, C, steps) or (n, C, H, W); by default the only one, or x")


class OldFaithfulData(Section):
    """272 eruptions of the geyser Old Faithful: duration and waiting time in minutes, split by a seed."""

    kind: Literal["old_faithful"]
    seed: Seed = 0
    test_fraction: Annotated[float, Field(gt=0, lt=1), _NUMERIC] = 0.5


class StrokesData(Section):
    """Outlines of digits as a pen would draw them, from the fonts that matplotlib ships: lifted pen, and offset of each step."""

    kind: Literal["strokes"]
    seed: Seed = 0
    n: Annotated[int, Field(ge=2, le=2**22), _NUMERIC] = Field(default=4000, description="sequences to train on")
    test: Annotated[int, Field(ge=1, le=2**20), _NUMERIC] = Field(default=400, description="further sequences, held out")
    steps: Annotated[int, Field(ge=9, le=4096), _NUMERIC] = Field(default=24, description="points of a sequence")


Data = Annotated[DigitsData | GlyphsData | FileData | ValuesData | OldFaithfulData | StrokesData, Field(discriminator="kind")]


# ------------------------------------------------------------------ networks


class LVAENet(Section):
    """Hierarchical VAE of Chen et al., CVPR 2023."""

    kind: Literal["lvae"]
    image: ImageShape
    width: Count = 128
    levels: Count = 5
    latent: Count = 16
    std: Positive = 0.05**0.5


class VAENet(Section):
    """VAE with one vector of latents."""

    kind: Literal["vae"]
    image: ImageShape
    width: Count = 64
    latent: Count = 32
    std: Positive = 0.1


class GANNet(Section):
    """Generator of a GAN, with labels where there are classes, and an encoder where it is asked for."""

    kind: Literal["gan"]
    image: ImageShape
    width: Count = 64
    latent: Count = 64
    classes: Annotated[int, Field(ge=0, le=2**20), _NUMERIC] = Field(
        default=0, description="labels that the generator is shown; 0 for none"
    )
    arch: Literal["conv", "mlp"] = "conv"
    encoder: bool = Field(default=False, description="whether it infers what an image was generated from")


class ClassifierNet(Section):
    """Small residual classifier; its last hidden layer serves as features."""

    kind: Literal["classifier"]
    image: ImageShape
    classes: Annotated[int, Field(ge=2, le=2**20), _NUMERIC]
    width: Count = 32


class ResNetNet(Section):
    """Residual classifier for small images of He et al., CVPR 2016; a wide one where the width is larger."""

    kind: Literal["resnet"]
    image: ImageShape
    classes: Annotated[int, Field(ge=2, le=2**20), _NUMERIC]
    depth: Annotated[int, Field(ge=8, le=2000), _NUMERIC] = Field(default=20, description="layers: 6 n + 2")
    width: Count = 16
    mean: PerChannel = Field(default=(0.0,), description="of the pixels in [0, 1] that it was trained on: one number, or one per channel")
    std: PerChannel = Field(default=(1.0,), description="of those pixels, likewise")


class HelmholtzNet(Section):
    """Helmholtz machine with binary latents on points of two values, of Chen et al., CVPR 2023; it learns by wake and sleep."""

    kind: Literal["helmholtz"]
    image: PointShape = (2, 1, 1)
    width: Count = 8
    latent: Count = 2
    std: Positive = Field(default=0.5, description="of the values, standardized")
    mean: OneOrTwo = Field(default=(0.0,), description="of the data: one number, or one per value")
    scale: PositiveOneOrTwo = Field(default=(1.0,), description="standard deviation of the data, likewise")


class VRNNNet(Section):
    """Variational recurrent network of strokes, of Chung et al., NeurIPS 2015, and Chen et al., CVPR 2023."""

    kind: Literal["vrnn"]
    image: StrokeShape
    width: Count = 64
    hidden: Count = Field(default=128, description="units of the recurrent state; a student's shrink with its width")
    latent: Count = 16
    std: Positive = Field(default=1.0, description="of an offset, standardized")
    temperature: NotNegative = Field(default=1.0, description="factor of that std where strokes are drawn; published: 0")
    mean: OneOrTwo = Field(default=(0.0,), description="of the data's offsets: one number, or one per direction")
    scale: PositiveOneOrTwo = Field(default=(1.0,), description="standard deviation of the data's offsets, likewise")


class TextToImageNet(Section):
    """A miniature Stable Diffusion: a prior for guided synthesis, which learns from captioned pictures or from classes."""

    kind: Literal["text_to_image"]
    image: ImageShape
    width: Annotated[int, Field(ge=8, multiple_of=8, le=2**14), _NUMERIC] = Field(default=48, description="of the denoiser's first level")
    autoencoder: Annotated[int, Field(ge=8, multiple_of=8, le=2**14), _NUMERIC] = Field(default=16, description="width of its first level")
    latent: Count = 4
    text: Annotated[int, Field(ge=8, multiple_of=8, le=2**14), _NUMERIC] = Field(default=64, description="width of the text encoder")


class UNetNet(Section):
    """Denoiser of pixels, diffusers' ``UNet2DModel``, with the chain that samples from it: a diffusion or a flow model."""

    kind: Literal["unet"]
    image: ImageShape
    width: Count = Field(default=64, description="channels of the first level")
    multipliers: Annotated[tuple[Positive, ...], Field(min_length=1, max_length=8)] = Field(
        default=(1, 2), description="channels of each level, in units of the width; each level but the first halves the image"
    )
    layers: Annotated[int, Field(ge=1, le=64), _NUMERIC] = Field(default=1, description="residual blocks in a level")
    prediction: Literal["epsilon", "v", "sample", "flow"] = "epsilon"
    sampler: Literal["ddim", "ddpm"] = Field(default="ddim", description="a flow takes Euler's steps")
    steps: Annotated[int, Field(ge=1, le=2**16), _NUMERIC] = Field(default=50, description="links of its chain")
    clip: bool = Field(default=True, description="predicted images to their range at every link; has no part in a flow")
    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    betas: tuple[Annotated[float, Field(gt=0, lt=1), _NUMERIC], Annotated[float, Field(gt=0, lt=1), _NUMERIC]] = (1e-4, 0.02)
    times: Annotated[int, Field(ge=1, le=2**16), _NUMERIC] = Field(default=1000, description="at which it is trained; of no part in a flow")
    classes: Annotated[int, Field(ge=0, le=2**20), _NUMERIC] = Field(default=0, description="labels that it is told; 0 for none")
    arguments: Arguments | None = Field(default=None, description="further ones of UNet2DModel, such as down_block_types")


Net = Annotated[
    LVAENet | VAENet | GANNet | ClassifierNet | ResNetNet | UNetNet | HelmholtzNet | VRNNNet | TextToImageNet, Field(discriminator="kind")
]
CLASSIFIERS = (ClassifierNet, ResNetNet)
NO_PICTURES = (HelmholtzNet, VRNNNet)  # their data are points and strokes


class Pretrained(Section):
    """A folder written by ``save_pretrained``, ``zoo:NAME``, or a Hub id; or a diffusers pipeline, of pixels, or of latents and texts."""

    kind: Literal["pretrained"]
    path: Text
    chain: Count | None = Field(default=None, description="links of a diffusion or flow teacher's chain; by default its own")
    sampler: Literal["ddim", "ddpm"] | None = Field(default=None, description="of a diffusers folder; by default as its scheduler")
    prompts: Annotated[tuple[Text, ...], Field(min_length=1)] | None = Field(
        default=None, description="texts that a text-to-image teacher draws, and its student learns to draw; each as often"
    )
    negative: Annotated[str, AfterValidator(_plain)] = ""
    guidance_scale: Annotated[float, Field(ge=0, le=100), _NUMERIC] = Field(
        default=1.0, description="of a text-to-image teacher's classifier-free guidance, whose outcome the student learns; 1 is none"
    )


class Trained(Section):
    """What the ``train`` section of this recipe makes."""

    kind: Literal["trained"]


class Weights(Section):
    """A network described here, with weights from a safetensors file under the published names."""

    kind: Literal["weights"]
    path: Text
    net: Net


class KD4DGM(Section):
    """An LVAE checkpoint of the published code of Chen et al., CVPR 2023 (``.pth.tar``)."""

    kind: Literal["kd4dgm"]
    path: Text
    image: ImageShape | None = Field(default=None, description="by default the largest square that the checkpoint's levels fit")
    std: Positive = Field(default=0.05**0.5, description="of the output, which the checkpoint does not hold")


class Transformers(Section):
    """An image classifier of transformers: a folder or Hub id."""

    kind: Literal["transformers"]
    path: Text
    image: ImageShape | None = Field(default=None, description="by default as its preprocessor crops or resizes to")
    mean: PerChannel | None = Field(default=None, description="of the pixels in [0, 1]; by default its preprocessor's")
    std: PerChannel | None = Field(default=None, description="of those pixels, likewise")


class Pythae(Section):
    """A folder of a VAE that pythae wrote, with pythae's own dense encoder and decoder; others go by kind python."""

    kind: Literal["pythae"]
    path: Text
    std: Positive = Field(default=1.0, description="of the output; pythae's squared error is that of 1")


class Python(Section):
    """``module:name``, a function that returns a :class:`potstill.model.Model`; the module must be allowed with ``--import``."""

    kind: Literal["python"]
    target: Target
    arguments: Arguments = {}


Teacher = Annotated[Pretrained | Trained | Weights | KD4DGM | Transformers | Pythae | Python, Field(discriminator="kind")]


class Budget(Section):
    """What a student may cost at most. Exactly one of the three."""

    params: Count | None = Field(default=None, description="parameters")
    mib: Positive | None = Field(default=None, description="MiB of its weights on disk")
    ms: Positive | None = Field(
        default=None, description="milliseconds for one image, measured here when distill begins; what is found is kept with the run"
    )

    @model_validator(mode="after")
    def _one(self) -> Budget:
        given = [k for k in ("params", "mib", "ms") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of params, mib and ms; found {', '.join(given) or 'none'}")
        return self


class Student(Section):
    """The teacher's architecture with another width, given or found, or another network, or the teacher. Exactly one of the six."""

    width: Count | None = Field(default=None, description="channels of the student's hidden maps")
    ratio: Annotated[float, Field(gt=1), _NUMERIC] | None = Field(
        default=None, description="times fewer parameters than the teacher; the nearest width is found"
    )
    budget: Budget | None = Field(default=None, description="what it may cost; the largest width within it is found")
    target: Target | None = Field(default=None, description="module:name of a function that returns a Model")
    net: Net | None = Field(default=None, description="a network of potstill's own, where the teacher's architecture is another's")
    start: Literal["teacher"] | None = Field(default=None, description="a copy of the teacher, weights and all, which goes on learning")
    arguments: Arguments = {}
    encoder: bool = Field(default=False, description="give the student of a GAN without an encoder one, which the phase infer trains")

    _later = {"net": None}

    @model_validator(mode="after")
    def _one(self) -> Student:
        given = [k for k in ("width", "ratio", "budget", "target", "net", "start") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of width, ratio, budget, target, net and start; found {', '.join(given) or 'none'}")
        if self.arguments and self.target is None:
            raise ValueError("arguments go with target")
        if self.encoder and (self.target or self.net or self.start):
            raise ValueError("encoder goes with width, ratio or budget; a model of one's own has the programs that it has")
        return self


# ------------------------------------------------------------------ what is done with them


class Augment(Section):
    """Random changes of the training images, drawn anew at every update. Off where the section is absent."""

    shift: Annotated[int, Field(ge=0, le=4096), _NUMERIC] = Field(default=0, description="most pixels by which an image is moved, each way")
    padding: Literal["zero", "reflect"] = Field(default="zero", description="what comes in at the side that an image is moved from")
    flip: bool = Field(default=False, description="mirror every other image, left to right")


class Training(Section):
    """Updates of one phase."""

    steps: Count = 1000
    batch: Annotated[int, Field(ge=2, lt=2**31), _NUMERIC] = 128
    lr: Positive = 2e-3
    warmup: NotNegative = Field(default=50, description="updates over which the learning rate rises from 0")
    decay: Literal["cosine", "constant"] = "cosine"
    weight_decay: NotNegative = 0.0
    beta1: Fraction = Field(default=0.9, description="memory of Adam's first moment; against an adversary, 0 is steadier")
    beta2: Fraction = Field(
        default=0.95,
        description="memory of Adam's second moment; 0.999 remembers the first updates' huge gradients for too long in a short training",
    )
    clip: Positive | None = Field(default=None, description="largest norm of the gradient")
    ema: Fraction = Field(
        default=0.0, description="decay per update of an exponential moving average of the weights, which is what is kept; 0 is off"
    )
    augment: Augment | None = Field(default=None, description="of real or surrogate images; noise is not augmented")


class EarlyStopping(Section):
    """A phase ends when its student gets no better on fresh samples of the teacher, and keeps the weights that were best there."""

    every: Count = Field(default=500, description="updates between two looks")
    patience: Count = Field(default=4, description="looks on end that find nothing better, after which the phase ends")
    n: Annotated[int, Field(ge=2, lt=2**31), _NUMERIC] = Field(
        default=1024, description="samples of the teacher that are looked at, always the same, which no training sees"
    )


class Stoppable(Training):
    """Updates of one phase, or fewer."""

    early_stopping: EarlyStopping | None = Field(
        default=None, description="end before all steps are done, by the phase's own loss on fresh samples of the teacher"
    )

    _later = {"early_stopping": None}


class Adversary(Section):
    """The network that a generator is trained against; it is no part of what is saved in the end."""

    width: Count = 32
    arch: Literal["conv", "mlp"] = "conv"
    r1: NotNegative = Field(default=1.0, description="weight of half the squared norm of its gradient at real images")


class Adversarial(Adversary):
    """A discriminator that tells the student's images from the teacher's."""

    weight: NotNegative = Field(default=1.0, description="of the student's loss against it")
    features: NotNegative = Field(default=0.0, description="weight of the distance of paired images in its hidden layers")

    @model_validator(mode="after")
    def _used(self) -> Adversarial:
        if not (self.weight or self.features):
            raise ValueError("weight and features are both 0, so the student learns nothing from it; leave the section out")
        return self


class Train(Training):
    """A teacher or a feature network from real data: the data owner's side."""

    model: Net
    labels: Labels | None = Field(default=None, description="train on images of these labels alone; the held-out ones keep all")
    beta: NotNegative = Field(default=1.0, description="weight of the latents' KL")
    beta_warmup: NotNegative = Field(default=200, description="updates over which beta rises from 0")
    autoencoder: Training = Field(default=Training(), description="first phase of a text_to_image model; the rest is of its denoiser")
    dropout: Fraction = Field(default=0.1, description="share of captions left out, for classifier-free guidance of a text_to_image model")
    discriminator: Adversary = Field(default=Adversary(), description="of a gan")


class Rule(Section):
    """Which nodes to compare, and how; the first rule that matches a node wins."""

    nodes: Pattern = "*"
    by: Literal["kl", "reverse_kl", "wasserstein2", "mse", "hinton"] = "kl"
    temperature: Positive = Field(default=1.0, description="of hinton")
    weight: NotNegative = 1.0
    reduce: Literal["sum", "mean"] = "sum"


class Term(Section):
    """One energy of the images, which guidance lowers."""

    kind: Literal[
        "cross_entropy",
        "batchnorm",
        "relative_batchnorm",
        "activation_summary",
        "disagreement",
        "posterior_kl",
        "reconstruction",
        "typicality",
        "total_variation",
        "l2",
        "diversity",
        "python",
    ]
    weight: Annotated[float, _NUMERIC] = 1.0
    start: Annotated[float, Field(ge=0, le=1), _NUMERIC] = Field(default=0.0, description="of the synthesis, from 0 to 1")
    stop: Annotated[float, Field(ge=0, le=1), _NUMERIC] = Field(default=1.0, description="of the synthesis, from 0 to 1")
    nodes: Pattern = Field(default="*", description="of posterior_kl: pattern of the latents that count")
    n: Annotated[int, Field(ge=2, lt=2**20), _NUMERIC] = Field(default=512, description="of typicality: the teacher's samples to go by")
    target: Target | None = Field(default=None, description="of python: module:name of an Energy, or of a function of a view")

    @model_validator(mode="after")
    def _whole(self) -> Term:
        if (self.kind == "python") != (self.target is not None):
            raise ValueError("target goes with kind python, and kind python needs one")
        if self.start > self.stop:
            raise ValueError(f"starts at {self.start:g}, after its stop at {self.stop:g}")
        for key, kind in (("nodes", "posterior_kl"), ("n", "typicality")):
            if self.kind != kind and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} goes with kind {kind}")
        return self


def _distinct(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    kinds = [t.target or t.kind for t in terms]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"two are the same: {', '.join(kinds)}")
    return terms


def _of_students_images(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    if any(t.kind == "disagreement" for t in terms):
        raise ValueError("disagreement compares with a student, and these are the student's own images; it is for surrogates")
    return terms


Terms = Annotated[tuple[Term, ...], AfterValidator(_distinct)]
Spoken = Annotated[Terms, AfterValidator(_of_students_images)]


class Synthesis(Section):
    """What every surrogate has."""

    n: Annotated[int, Field(ge=2, lt=2**31), _NUMERIC] = Field(default=4096, description="images")
    batch: Count = 256
    shard: Count = Field(default=4096, description="images in a file")
    energy: Terms = Field(default=(), description="what guides the images, and is recorded of each; only recorded without guidance")
    classes: Annotated[tuple[Text, ...], Field(min_length=2)] | None = Field(
        default=None, description="names of the labels, in their order; each label gets as many images"
    )
    store: Address | None = Field(
        default=None,
        description="where its shards are kept instead of in the run's folder, such as s3://bucket/folder (or gs, az, abfs, hf, file): an "
        "empty folder, or one that holds the same images, which are then not made again. Credentials come from the environment",
    )

    _later = {"store": None}


class Ancestral(Synthesis):
    """Images from the teacher's own prior."""

    kind: Literal["ancestral"] = "ancestral"
    observe: Literal["mean", "sample", "mixed"] = Field(
        default="mean", description="the mean of the output's conditional, a draw from it, or draws with every share of its noise"
    )
    sweeps: Annotated[int, Field(ge=0, le=1000), _NUMERIC] = Field(
        default=0, description="times that each image's latents are inferred and the image generated again, which moves it towards the data"
    )


class Uniform(Synthesis):
    """Pixels of uniform noise: what a surrogate must beat."""

    kind: Literal["uniform"]


class Inversion(Synthesis):
    """Pixels optimized from noise."""

    kind: Literal["inversion"]
    steps: Count = 200
    lr: Positive = 0.1
    jitter: Annotated[int, Field(ge=0, le=64), _NUMERIC] = Field(default=0, description="largest shift in pixels, anew for each update")


class Latent(Synthesis):
    """The noise of a generator, optimized: the teacher's own, another's, or the latents of a diffusion prior's decoder."""

    kind: Literal["latent"]
    generator: Text | None = Field(default=None, description="folder or zoo:NAME of a model; by default the teacher")
    steps: Count = 100
    lr: Positive = 0.05
    pull: NotNegative = Field(
        default=0.1, description="weight of half the noise's squared norm, which keeps it where the generator was trained"
    )


class Guided(Synthesis):
    """Images from a diffusion prior, guided by what the teacher says of them."""

    kind: Literal["guided"]
    prior: Text = Field(
        description="a folder in the diffusers layout, zoo:NAME, or a Hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    scheduler: Literal["ddim", "ddpm", "dpmsolver++", "euler", "euler_ancestral", "lcm", "flow_euler"] | None = None
    tiny: Text | None = Field(default=None, description="folder or Hub id of an AutoencoderTiny, for decode: tiny")
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    steps: Annotated[int, Field(ge=1, le=1000), _NUMERIC] = 25
    mode: Literal["full", "clean", "off"] = Field(
        default="full", description="gradient through the denoiser, of the predicted clean image alone, or no guidance"
    )
    scale: NotNegative = Field(default=1.0, description="of a step; 1 is that of the tilted density exp(-energy)")
    clip: Positive = Field(default=0.3, description="largest root mean square of a step, in units of the noise level")
    repeats: Annotated[int, Field(ge=1, le=100), _NUMERIC] = Field(default=1, description="gradient steps per network call, in mode clean")
    decode: Literal["vae", "tiny", "linear"] = Field(default="vae", description="for the gradient; finished images have the whole decoder")
    prompts: Annotated[tuple[Text, ...], Field(min_length=1)] | None = Field(
        default=None, description="wordings, with {} where the name of the class goes"
    )
    prompts_file: Text | None = Field(
        default=None, description="YAML or JSON: a list of texts for each name in classes, or without those one list"
    )
    negative: Annotated[str, AfterValidator(_plain)] = ""
    guidance_scale: Annotated[float, Field(ge=0, le=100), _NUMERIC] = Field(
        default=1.0, description="of classifier-free guidance; 1 is none"
    )
    eta: Annotated[float, Field(ge=0, le=1), _NUMERIC] = Field(default=0.0, description="of ddim: 0 is deterministic")
    save_memory: bool = Field(default=False, description="checkpoint the denoiser's activations, and decode image by image")

    @model_validator(mode="after")
    def _whole(self) -> Guided:
        if self.prompts and self.prompts_file:
            raise ValueError("give prompts or prompts_file, not both")
        if self.prompts and not self.classes and any("{}" in p for p in self.prompts):
            raise ValueError("prompts with {} need classes, whose names go there")
        if (self.decode == "tiny") != (self.tiny is not None):
            raise ValueError("decode: tiny and tiny, the network it is done with, go together")
        if self.repeats > 1 and self.mode != "clean":
            raise ValueError("repeats goes with mode clean; in mode full each step would be another pass of the denoiser")
        return self


def _surrogate_kind(value: Any) -> Any:
    return value.get("kind", "ancestral") if isinstance(value, dict) else getattr(value, "kind", None)


Surrogate = Annotated[
    Annotated[Ancestral, Tag("ancestral")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[Inversion, Tag("inversion")]
    | Annotated[Latent, Tag("latent")]
    | Annotated[Guided, Tag("guided")],
    Discriminator(_surrogate_kind),
]


class Generator(Stoppable):
    """First phase: the student's generator on the teacher's noise."""

    rules: tuple[Rule, ...] = (Rule(nodes="z*", by="wasserstein2", weight=0.1, reduce="mean"), Rule(nodes="out", by="kl"))
    replay: Pattern = Field(default="", description="pattern of nodes at which the student takes the teacher's values")
    share: Pattern = Field(default="*", description="pattern of nodes at which the student gets the teacher's noise")
    start: Name = Field(
        default="noise",
        description="what a data-free arm's batches begin with: noise that never runs out; the same calibrated, through the map that the "
        "section calibrate finds; or the noise that the teacher infers behind images: surrogate for those of the arm's own, or the name of "
        "one of surrogates",
    )
    adversarial: Adversarial | None = Field(default=None, description="a discriminator of teacher and student beside the rules")
    perceptual: tuple[Rule, ...] = Field(
        default=(),
        description="which latents to compare of what the teacher's encoder infers from its own image and from the student's: a distance "
        "between images as the teacher sees them, at two to three times an update's cost",
    )
    energy: Spoken = Field(
        default=(),
        description="what the teacher says of the student's images by themselves, added to the rules, such as batchnorm: the statistics "
        "of its training data, which its own samples may miss as well",
    )

    @model_validator(mode="after")
    def _falls(self) -> Generator:
        if self.early_stopping and self.adversarial:
            raise ValueError("early_stopping needs a loss that falls, and against an adversary none does; leave one of the two out")
        return self


class Calibrate(Training):
    """Before any student and without data, a small affine map of the noise of each of the teacher's latents is found.

    With it the teacher's samples feed its layers what its training data did, whose moments BatchNorm layers remember. Students of arms
    that start: calibrated learn on such noise, as students with data learn on the noise that the teacher infers behind them.
    """

    steps: Count = 240
    batch: Annotated[int, Field(ge=2, lt=2**31), _NUMERIC] = 192
    lr: Positive = 3e-3
    warmup: NotNegative = 10
    beta2: Fraction = 0.999
    energy: Spoken = Field(
        default=(Term(kind="relative_batchnorm"),), min_length=1, description="what the teacher says of its samples, which is lowered"
    )


class Encoder(Stoppable):
    """Second phase: the student's encoder on images, its generator frozen. Without a first phase, all that inference uses."""

    rules: tuple[Rule, ...] | None = Field(
        default=None,
        description="by default none where there is an ELBO, for a classifier hinton at temperature 4, and with start: noise kl",
    )
    start: Literal["surrogate", "noise"] = Field(
        default="surrogate",
        description="what a data-free arm's batches are: surrogate images, or new ones from the teacher, whose noise is known and is "
        "compared with what the student infers",
    )
    replay: Pattern = ""
    elbo: NotNegative | None = Field(
        default=None,
        description="weight of the student's own negative ELBO of the images; by default 1, and 0 for a classifier or with start: noise",
    )

    @model_validator(mode="after")
    def _fits(self) -> Encoder:
        if self.elbo and self.start == "noise":
            raise ValueError("elbo goes with start: surrogate; with start: noise, weigh the student's output by a rule")
        return self


class Link(Training):
    """Phase of a chain too long to unroll, such as diffusion: one random link per sample, with the teacher's prediction as target."""

    rules: tuple[Rule, ...] = (Rule(nodes="prediction", by="mse", reduce="mean"),)
    replay: Pattern = Field(default="*", description="pattern of nodes at which the student takes the teacher's values")
    share: Pattern = Field(default="*", description="pattern of nodes at which the student gets the teacher's noise")
    start: Name = Field(
        default="noise",
        description="what a data-free arm's links begin with: the teacher's own unfinished images, on their way from noise, in a pool; "
        "or finished images, noised again: surrogate for those of the arm's own, or the name of one of surrogates",
    )
    pool: Annotated[int, Field(ge=2, lt=2**31), _NUMERIC] = Field(default=1024, description="unfinished images that are kept")


class Scratch(Training):
    """The one phase of a student without a teacher, on real images.

    It is the ELBO, for a classifier the cross-entropy of the labels, and for a GAN the losses of generator and discriminator.
    """

    steps: Count = Field(default=1000, description="updates; by default as many as all phases of a distilled arm together")
    beta: NotNegative = Field(default=1.0, description="weight of the latents' KL")
    beta_warmup: NotNegative = Field(default=200, description="updates over which beta rises from 0")
    discriminator: Adversary = Field(default=Adversary(), description="of a gan")


class Continual(Scratch):
    """The one phase of a student that learns new images while its teacher's own are replayed, so that it keeps what the teacher knew.

    It is the loss of ``scratch`` on both, and the rules on the teacher's noise, where there are some.
    """

    new: Annotated[float, Field(gt=0, lt=1), _NUMERIC] = Field(
        default=0.5, description="weight of the new images, such as their share of all that is to be known; the rest is the replayed ones'"
    )
    elbo: NotNegative = Field(default=1.0, description="weight of the replayed images' ELBO; published: 0, which lets the encoder forget")
    rules: tuple[Rule, ...] = Field(
        default=(),
        description="what to compare of both generators on the same noise. Published, with a model that is told whether to draw old images "
        "or new ones; one that is not told could draw nothing new from noise at which it is held to the old",
    )

    @model_validator(mode="after")
    def _replays(self) -> Continual:
        if not self.elbo and not any(rule.weight for rule in self.rules):
            raise ValueError("elbo is 0 and no rule has a weight, so nothing is replayed; that is a scratch arm")
        return self


class Distill(Section):
    """The two phases of a distilled student, and the one of a student from scratch.

    ``infer: null`` leaves the encoder as it was born. ``generate: null`` is for classifiers, and for autoencoders whose prior
    cannot be sampled: the one phase "infer" then trains all that inference uses, on images. ``link`` is for diffusion and flow,
    where it comes first: "generate" after it unrolls the student's chain, and distills a short one from a long one.
    """

    link: Link | None = None
    generate: Generator | None = Generator()
    infer: Encoder | None = Encoder()
    scratch: Scratch = Scratch()
    continual: Continual = Continual()
    labels: Labels | None = Field(
        default=None, description="arms with real images see those of these labels alone; the held-out ones keep all"
    )
    rounds: Annotated[int, Field(ge=1, le=1000), _NUMERIC] = Field(
        default=1,
        description="parts that the data-free phase infer is done in; before each but the first, surrogates with the energy disagreement "
        "are made again against the student, and join the images",
    )

    def as_many(self, kind: Literal["scratch", "continual"]) -> Distill:
        """With as many updates for arms of that kind as all phases of a distilled arm have, unless their number is given."""
        section: Scratch = getattr(self, kind)
        whole = sum(phase.steps for phase in (self.link, self.generate, self.infer) if phase is not None)
        if not whole or "steps" in section.model_fields_set:
            return self
        return self.model_copy(update={kind: section.model_copy(update={"steps": whole})})

    def generators(self, arm: Arm) -> tuple[tuple[str, Link | Generator], ...]:
        """The phases of a distilled arm that train the student's generator, in order, by name."""
        if not arm.distilled:
            return ()
        given = (("link", self.link), ("generate", self.generate if arm.generate else None))
        return tuple((name, section) for name, section in given if section is not None)

    def phases(self, arm: Arm) -> dict[str, int]:
        """Updates of each phase of an arm by name, as the recipe has them for all arms."""
        if not arm.distilled:
            section: Scratch = getattr(self, arm.kind)
            return {arm.kind: section.steps}
        encoder = {"infer": self.infer.steps} if self.infer and arm.infer else {}
        return {name: section.steps for name, section in self.generators(arm)} | encoder


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Arm(Section):
    """One row of the table: a way to make the student.

    ``data_free`` sees no data. ``with_data`` is distilled on real images by the same losses. ``scratch`` has no teacher: the
    ELBO, or a classifier's cross-entropy, on real images, or where it names surrogates on theirs. ``continual`` learns real images
    while it is held to its teacher's own.
    """

    kind: Literal["data_free", "with_data", "scratch", "continual"]
    name: Name | None = None
    steps: Count | dict[Name, Count] | None = Field(
        default=None, description="updates of the first phase, or of phases by name, where this arm's differ from the recipe's"
    )
    replay: Pattern | None = None
    share: Pattern | None = None
    start: Name | None = Field(default=None, description="of the first of the phases link and generate, where this arm's differs")
    chain: Count | None = Field(default=None, description="links of the student's chain, where it is to be shorter than the teacher's")
    adversarial: Adversarial | None = Field(default=None, description="of the phase generate, where this arm's differs")
    perceptual: tuple[Rule, ...] | None = Field(default=None, description="of the phase generate, where this arm's differ")
    energy: Spoken | None = Field(default=None, description="of the phase generate, where this arm's differ")
    surrogate: Annotated[tuple[Name, ...], Field(min_length=1), BeforeValidator(_listed)] | None = Field(
        default=None, description="one of the recipe's surrogates by name, or several put together; by default the section surrogate"
    )
    labels: Labels | None = Field(default=None, description="of its real images, where this arm's differ from the recipe's")
    generate: bool = Field(default=True, description="whether a distilled arm has the phase generate")
    infer: bool = Field(default=True, description="whether a distilled arm's encoder is trained too")

    @property
    def title(self) -> str:
        """The row's name in metrics.json."""
        return self.name or f"student_{self.kind}"

    @property
    def real(self) -> bool:
        """Whether it trains on real images."""
        return self.kind in ("with_data", "continual") or (self.kind == "scratch" and self.surrogate is None)

    @property
    def distilled(self) -> bool:
        """Whether it has the phases of distillation rather than one of its own."""
        return self.kind in ("data_free", "with_data")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits(self) -> Arm:
        own = [k for k in ("replay", "share", "adversarial", "perceptual", "energy") if getattr(self, k) is not None]
        if own and not self.distilled:
            raise ValueError(f"{own[0]} is of distilled arms; a {self.kind} arm has one phase of its own")
        if self.labels is not None and not self.real:
            raise ValueError("labels are of arms with real images")
        if self.kind != "data_free" and (self.start is not None or (self.surrogate is not None and self.kind != "scratch")):
            raise ValueError("start and surrogate are of data_free arms; the others have real images")
        if self.title == "teacher":
            raise ValueError("an arm cannot be named teacher, which is the teacher's own row")
        return self


class Evaluate(Section):
    """Figures for the teacher and every arm."""

    features: Text = Field(
        default="pixels",
        description="pixels, standardized (each channel by the training data's mean and standard deviation, for data that are no "
        "pictures), classifier:PATH (a folder or zoo:NAME), or python:module:name",
    )
    reference: Literal["data", "teacher"] = Field(
        default="data",
        description="what is measured against: held-out real images, or, without any data, fresh samples of the teacher; images of the "
        "first surrogate where it generates none",
    )
    privacy: bool = Field(
        default=False,
        description="look for copies of training images: how near to one the images of each arm and surrogate are, beside how near "
        "held-out images are; needs data, split as it was for the teacher",
    )
    n: Annotated[int, Field(ge=8), _NUMERIC] | None = Field(
        default=None, description=f"images on each side; by default all held-out real ones, or {TEACHER_IMAGES:,} of the teacher"
    )
    batch: Count = 256
    k: Count = Field(default=5, description="neighbors of precision, recall, density and coverage")
    groups: dict[Name, Labels] = Field(
        default={}, description="labels by a name: figures of the held-out images of each group, and its share of the samples"
    )
    latency_threads: Count = 1
    latency_repeats: Annotated[int, Field(ge=3), _NUMERIC] = 50

    _later = {"reference": "data", "privacy": False}

    @model_validator(mode="after")
    def _labeled(self) -> Evaluate:
        if self.groups and self.reference == "teacher":
            raise ValueError("groups are of labels, which the images of reference: teacher do not have")
        return self

    @property
    def reads_data(self) -> bool:
        """Whether real images are looked at."""
        return self.reference == "data" or self.privacy


class Report(Section):
    """The page."""

    images: Annotated[int, Field(ge=1, le=64), _NUMERIC] = Field(default=16, description="in a row of pictures")


class Compute(Section):
    """Where and how fast. A figure depends on the number of threads in its last digits, so it is stored beside it."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    threads: Count | None = Field(
        default=None, description="of one training on the CPU; by default the cores, shared among what runs side by side"
    )
    workers: Count | None = Field(default=None, description="trainings side by side; by default one per core on a CPU, one on a GPU")
    shard_teacher: bool = Field(
        default=False,
        description="for a teacher that does not fit: each of several processes keeps a part of its weights while students are trained",
    )
    save_seconds: NotNegative = Field(default=30.0, description="between two saved states")
    log_steps: Count = 25
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        default=(), description="that are told every line of a training's log; they keep their files in the run's folder trackers"
    )
    divergence_patience: Count | None = Field(
        default=1000,
        description="updates on end that a loss may be far above its smallest, by ten times its largest size in the first 100 updates, "
        "before the training is stopped with its last state from before; null for any number",
    )


class Recipe(Section):
    """One run. Sections that are absent are stages that are not done."""

    name: Name
    seed: Seed = 0
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0, 1, 2)
    data: Data | None = None
    train: Train | None = None
    teacher: Teacher | None = None
    calibrate: Calibrate | None = None
    student: Student | None = None
    students: Annotated[tuple[Count, ...], Field(min_length=1)] | None = Field(
        default=None, description="widths of several students, in place of student; those of an arm and a seed share the teacher's work"
    )
    surrogate: Surrogate | None = None
    surrogates: dict[Name, Surrogate] = Field(default={}, description="further ones by name, for arms that say so")
    distill: Distill | None = None
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)] = (Arm(kind="data_free"),)
    evaluate: Evaluate | None = None
    report: Report | None = None
    compute: Compute = Compute()

    @property
    def widths(self) -> tuple[int | None, ...]:
        """Of the students of each arm and seed; ``None`` for the one that the section student describes."""
        return self.students or (None,)

    @property
    def synthesized(self) -> dict[str, Surrogate]:
        """Every surrogate by its folder within the run's."""
        first: dict[str, Surrogate] = {"surrogate": self.surrogate} if self.surrogate else {}
        return first | {f"surrogates/{name}": section for name, section in self.surrogates.items()}

    def images_of(self, arm: Arm, phase: str) -> tuple[str, ...]:
        """Folders of the surrogates whose images a phase of an arm begins with: none where it has real images, or noise alone."""
        distill = self.distill or Distill()
        own = tuple(f"surrogates/{name}" for name in arm.surrogate) if arm.surrogate else ("surrogate",)
        if arm.real:
            return ()
        if phase == "infer":
            return own if distill.infer is not None and arm.infer and distill.infer.start == "surrogate" and arm.kind == "data_free" else ()
        if phase == "scratch":
            return own if arm.kind == "scratch" else ()
        start = self.start_of(arm, phase)
        return {None: (), "noise": (), "calibrated": (), "surrogate": own}.get(start, (f"surrogates/{start}",))

    def start_of(self, arm: Arm, phase: str) -> str | None:
        """What the batches of a phase of an arm's generator begin with; ``None`` where it has no such phase, or real images."""
        distill = self.distill or Distill()
        section = next((found for name, found in distill.generators(arm) if name == phase), None)
        if section is None or arm.real:
            return None
        return arm.start if arm.start and distill.generators(arm)[0][0] == phase else section.start

    def every_image_of(self, arm: Arm) -> tuple[str, ...]:
        """Folders of all surrogates that an arm trains on."""
        return tuple(dict.fromkeys(f for phase in ("link", "generate", "infer", "scratch") for f in self.images_of(arm, phase)))

    @field_validator("seeds", "arms", "students")
    @classmethod
    def _distinct(cls, values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        names = [v.title if isinstance(v, Arm) else v for v in values or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"two are the same: {', '.join(map(str, names))}")
        return values

    @model_validator(mode="after")
    def _even(self) -> Recipe:
        """Arms get equal numbers of updates unless the recipe says otherwise."""
        kinds: tuple[Literal["scratch", "continual"], ...] = ("scratch", "continual")
        for kind in kinds:
            if self.distill and any(arm.kind == kind for arm in self.arms):
                object.__setattr__(self, "distill", self.distill.as_many(kind))  # frozen it is for others
        return self

    @model_validator(mode="after")
    def _complete(self) -> Recipe:
        problems = []
        if self.train and not self.data:
            problems.append("train: needs data")
        if isinstance(self.teacher, Trained):
            if not self.train:
                problems.append("teacher: kind trained needs a train section")
            elif isinstance(self.train.model, TextToImageNet):
                problems.append(
                    "teacher: kind trained needs a train.model that distillation knows; a text_to_image model serves as a prior"
                )
            elif isinstance(self.train.model, CLASSIFIERS) and self.distill and self.distill.generate:
                problems.append("distill.generate: train.model is a classifier, which does not generate; set generate: null")
        if self.synthesized and not self.teacher:
            problems.append(f"{'surrogate' if self.surrogate else 'surrogates'}: needs a teacher")
        if self.distill and not self.teacher:
            problems.append("distill: needs a teacher")
        if self.calibrate and not self.teacher:
            problems.append("calibrate: needs a teacher")
        for arm in self.arms if self.distill else ():
            if self.start_of(arm, "generate") == "calibrated" and not self.calibrate:
                problems.append(f"arm {arm.title}: start: calibrated needs a section calibrate")
            if self.start_of(arm, "link") == "calibrated":
                problems.append(f"arm {arm.title}: start: calibrated is of the phase generate; a chain's links begin with plain noise")
        if "calibrated" in self.surrogates:
            problems.append("surrogates.calibrated: a name that start has another meaning for; choose another")
        if self.compute.shard_teacher and ((self.student and self.student.start) or (self.distill and self.distill.link)):
            problems.append("compute.shard_teacher: is not for students that start as their teacher, nor for the phase link")
        if self.student and self.students:
            problems.append("students: widths in place of student; give one of the two")
        if self.distill and not (self.student or self.students):
            problems.append("distill: needs a student")
        for arm in self.arms if self.distill else ():
            if unknown := [f for f in self.every_image_of(arm) if f not in self.synthesized]:
                if name := unknown[0].partition("/")[2]:
                    known = ", ".join(self.surrogates) or "none"
                    problems.append(f"arm {arm.title}: surrogate {name} is not among surrogates, which has {known}")
                    continue
                phase = next(p for p in ("infer", "generate", "link", "scratch") if "surrogate" in self.images_of(arm, p))
                way_out = ", or infer: null" if phase == "infer" and self.distill and self.distill.generate else ""
                problems.append(f"distill.{phase}: trains on surrogate images and needs a surrogate section{way_out}")
                break
        for arm in self.arms if self.distill else ():
            if self.distill and isinstance(arm.steps, dict):
                phases = self.distill.phases(arm)
                if absent := [name for name in arm.steps if name not in phases]:
                    problems.append(f"arm {arm.title}: steps: it has no phase {absent[0]}, only {', '.join(phases) or 'none'}")
            if self.distill and not self.distill.generators(arm):
                if arm.distilled and not (self.distill.infer and arm.infer):
                    problems.append(f"arm {arm.title}: without generate and infer it has no phase")
                if any(v is not None for v in (arm.replay, arm.share, arm.start, arm.adversarial)):
                    problems.append(f"arm {arm.title}: replay, share, start and adversarial are of the phase generate, which is null")
        stores = [section.store for section in self.synthesized.values() if section.store]
        if twice := [url for url, count in Counter(stores).items() if count > 1]:
            problems.append(f"surrogates: two have the same store, {twice[0]}")
        compares = [f for f, section in self.synthesized.items() if any(term.kind == "disagreement" for term in section.energy)]
        if compares and (self.distill is None or self.distill.rounds < 2):
            problems.append(f"{compares[0]}: energy disagreement compares with the student of the round before; set distill.rounds above 1")
        if (
            self.distill
            and self.distill.rounds > 1
            and (not compares or not self.distill.infer or self.distill.infer.steps < self.distill.rounds)
        ):
            problems.append("distill.rounds: needs a surrogate with the energy disagreement, and a phase infer with a step for each round")
        if self.distill and not self.data and any(arm.real for arm in self.arms):
            problems.append("arms: with_data, scratch and continual need data")
        if self.evaluate and not self.distill:
            problems.append("evaluate: needs distill")
        if self.evaluate and self.evaluate.privacy and not self.data:
            problems.append("evaluate.privacy: needs data, whose training images it looks for")
        elif self.evaluate and self.evaluate.reads_data and not self.data:
            problems.append("evaluate: needs data to compare with; reference: teacher does without, and measures against its samples")
        if self.report and not self.evaluate:
            problems.append("report: needs evaluate")
        if problems:
            raise ValueError("\n".join(problems))
        return self


# ------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: ``1e-3`` is a number; ``on``, ``010`` and ``2024-01-01`` are no surprises. No duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            keys = Counter(k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode))
            for key, count in keys.items():
                if count > 1:
                    raise RecipeError(f"line {node.start_mark.line + 1}: {reprlib.repr(key)} is given twice")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        return int(self.construct_scalar(node))

    def construct_yaml_float(self, node: Any) -> float:
        return float(self.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


_INTEGER, _NUMBER = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_DECIMAL = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _starts in (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (_INTEGER, r"[-+]?[0-9]+", list("-+0123456789")),
    (_NUMBER, _DECIMAL, list("-+.0123456789")),
    ("tag:yaml.org,2002:merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _starts)
_Loader.add_constructor(_INTEGER, _Loader.construct_yaml_int)
_Loader.add_constructor(_NUMBER, _Loader.construct_yaml_float)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that YAML 1.1 or 1.2 would take for something else."""


_Dumper.add_implicit_resolver(_NUMBER, re.compile(f"^(?:{_DECIMAL})$"), list("-+.0123456789"))


def _parse(text: str, source: str) -> Any:
    try:
        depth = values = 0
        for event in yaml.parse(text, Loader=_Loader):
            if isinstance(event, yaml.AliasEvent):
                raise RecipeError(f"line {event.start_mark.line + 1}: aliases are not allowed; write the value out")
            if getattr(event, "tag", None) is not None:
                tag = event.tag.replace("tag:yaml.org,2002:", "!!")
                raise RecipeError(f"line {event.start_mark.line + 1}: tags such as {tag} are not allowed; write the value plainly")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            values += isinstance(event, yaml.ScalarEvent)
            if values > MAX_RECIPE_VALUES:
                raise RecipeError(f"line {event.start_mark.line + 1}: more than {MAX_RECIPE_VALUES} values and keys until here")
            if depth > MAX_RECIPE_DEPTH:
                raise RecipeError(f"line {event.start_mark.line + 1}: nested more than {MAX_RECIPE_DEPTH} deep")
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(shown(f"{source}: {where}not YAML: {problem}")) from None
    except (ValueError, RecursionError) as error:
        raise RecipeError(shown(f"{source}: {error}")) from None


def _override(tree: dict[Any, Any], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"{assignment}: an override is written a.b=value")
    value = _parse(text, assignment)
    at: Any = tree
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(at, dict):
            if last:
                at[key] = value
            elif at.get(key) is None:
                at[key] = {}
            at = at[key]
        elif isinstance(at, list):
            if not (key.isascii() and key.isdigit()) or int(key) >= len(at):
                raise RecipeError(f"{assignment}: {'.'.join(keys[:i])} is a list of {len(at)}; an index below that is expected")
            if last:
                at[int(key)] = value
            at = at[int(key)]
        else:
            raise RecipeError(f"{assignment}: {'.'.join(keys[:i])} is no section of the recipe")


@functools.cache
def _schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _sections(location: Sequence[int | str]) -> list[dict[str, Any]]:
    """Schemas of what may stand at a location: of a union every kind, until its tag is a part of the location."""
    schema = _schema()
    definitions = schema["$defs"]
    candidates = [schema]
    for part in location:
        following, union = [], []
        for s in candidates:
            if isinstance(part, int):
                following.append(s.get("items", {}))
            elif part in s.get("properties", {}):
                following.append(s["properties"][part])
            elif "patternProperties" in s:  # names of the user's own
                following += s["patternProperties"].values()
            else:
                union.append(s)  # the part is a tag, which is no key
        following += [s for s in union if part in _kinds(s)] or union
        candidates = []
        while following:
            s = following.pop(0)
            if "$ref" in s:
                following.append(definitions[s["$ref"].rpartition("/")[2]])
            elif "anyOf" in s or "oneOf" in s:
                following += s.get("anyOf", []) + s.get("oneOf", [])
            else:
                candidates.append(s)
    return candidates


def _kinds(section: dict[str, Any]) -> list[str]:
    """The kinds of a union that a section of it stands for."""
    kind = section.get("properties", {}).get("kind", {})
    return [kind["const"]] if "const" in kind else list(kind.get("enum", ()))


def _unknown(location: Sequence[int | str]) -> str:
    """What is wrong with a key that its section does not have: it is another kind's, or it is like one that the section has."""
    *home, key = location
    every = _sections(home[:-1]) if home else []  # where the last part is a tag, the kinds of its union
    others = [kind for s in every if key in s.get("properties", {}) for kind in _kinds(s)]
    if others and any(home[-1] in _kinds(s) for s in every):
        return f"is of kind {' or '.join(others)}, and here kind is {home[-1]}; remove it, or change kind"
    return "unknown key" + meant(key, [known for s in _sections(home) for known in s.get("properties", {})])


def recipe_keys() -> list[str]:
    """Every key that an override may set, such as ``distill.generate.lr=``, but for those within lists and names of the user's own."""
    schema = _schema()

    def within(s: dict[str, Any], path: str) -> Iterator[str]:
        if "$ref" in s:
            yield from within(schema["$defs"][s["$ref"].rpartition("/")[2]], path)
        elif members := s.get("anyOf", s.get("oneOf")):
            found = [key for member in members for key in within(member, path)]
            deeper = [key for key in found if key != f"{path}="]
            yield from deeper or found
        elif "properties" in s:
            for key, value in s["properties"].items():
                yield from within(value, f"{path}.{key}" if path else key)
        else:
            yield f"{path}="

    return list(dict.fromkeys(within(schema, "")))


def _problem(error: Any) -> str:
    location = error["loc"]
    path = _dotted(location)
    if error["type"] == "extra_forbidden":
        return f"{path}: {_unknown(location)}"
    if error["type"] == "union_tag_not_found":
        return f"{path}: {'its kind is missing' if isinstance(error['input'], dict) else _WORDS['dict_type']}"
    if error["type"] == "union_tag_invalid":
        kinds, kind = _choices(error), error["input"]["kind"]
        return f"{path}.kind: one of {', '.join(kinds)} is expected (found {_SHORT.repr(kind)}){meant(kind, kinds)}"
    pattern = error.get("ctx", {}).get("pattern")
    message = (
        _WORDS.get(error["type"])
        or _PATTERNS.get(pattern)
        or error["msg"].removeprefix("Value error, ").replace("Tuple should", "A list should")
    )
    if not location and error["type"] == "value_error":
        return message  # of Recipe's own check, whose lines name their section
    found = error.get("input")
    # An address is not repeated: where it is wrong, it may hold a secret in a way that nobody has thought of.
    hidden = isinstance(found, (dict, list, tuple)) or error["type"] == "missing" or (isinstance(found, str) and is_url(found))
    shown = "" if hidden else f" (found {_SHORT.repr(found)})"
    return f"{path or 'recipe'}: {message[0].lower() + message[1:]}{shown}{meant(found, _choices(error))}"


def _choices(error: Any) -> list[str]:
    """The values that one of a few could have had, of an error that tells them."""
    told = error.get("ctx", {})
    return re.findall(r"'([^']*)'", str(told.get("expected_tags") or told.get("expected") or ""))


# pydantic speaks of Python, but a recipe is YAML.
_WORDS = dict.fromkeys(("tuple_type", "list_type"), "a list is expected")
_PATTERNS = {
    _NAME: "a name of letters, digits, dots, hyphens and underscores is expected, with a letter or digit first, 100 at most",
    _TARGET: "write module:function, such as mine:teacher",
}
_WORDS |= dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping is expected")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def _secret(tree: Any, place: str = "") -> str | None:
    """Where plain data has an access token of the Hub, as a value or as a key."""
    if isinstance(tree, str):
        return place if has_token(tree) else None
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    for key, value in pairs:
        path = f"{place}.{key}" if place else str(key)
        if found := _secret(str(key), path) or _secret(value, path):
            return found
    return None


def _check_secret(tree: Any, source: str = "") -> None:
    if place := _secret(tree):
        where = f"{source}: {place}" if source else place
        raise RecipeError(
            shown(f"{where}: an access token of the Hub; what is written here gets into reports and cards: set HF_TOKEN instead")
        )


def _dotted(location: Sequence[int | str]) -> str:
    """The path as the user wrote it: without the names that pydantic gives to the members of a union."""
    unions, tags = (
        {"data", "teacher", "net", "model", "surrogate"},
        {"digits", "folder", "parquet", "npz", "lvae", "vae", "gan", "classifier", "resnet", "unet", "glyphs", "text_to_image"},
    )
    tags |= {"kd4dgm", "transformers", "pythae", "values", "old_faithful", "strokes", "helmholtz", "vrnn"}
    tags |= {"pretrained", "trained", "weights", "python", "ancestral", "uniform", "inversion", "latent", "guided"}
    parts = []
    for i, part in enumerate(location):
        named = i > 1 and location[i - 2] == "surrogates"
        if not (part in tags and i and (location[i - 1] in unions or named)):
            parts.append(str(part))
    return ".".join(parts)


def check(tree: Any) -> Recipe:
    """A recipe from plain data.

    Raises:
        RecipeError: one line for each thing that is wrong.
    """
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe: a mapping of sections is expected, found {_kind(tree)}")
    _check_secret(tree)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        every = error.errors()
        # A list whose only item is wrong is told to be empty too, which is not what the user wrote.
        deeper = {e["loc"][:i] for e in every for i in range(len(e["loc"]))}
        found = [e for e in every if e["type"] != "too_short" or e["loc"] not in deeper]
        lines = [*map(_problem, found[:MAX_PROBLEMS]), *([f"and {len(found) - MAX_PROBLEMS} more"] if len(found) > MAX_PROBLEMS else [])]
        raise RecipeError(shown("\n".join(lines))) from None


def read_tree(path: str | Path) -> Any:
    """Read a small YAML or JSON file as plain data.

    Raises:
        RecipeError: the file is missing, too large, or no YAML.
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except OSError as error:
        if Path(path).is_dir():
            inside = Path(path) / "recipe.yaml"
            instead = f"a run's recipe is {inside}" if inside.is_file() else "a recipe's file is expected"
            raise RecipeError(f"{path}: is a folder; {instead}") from None
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None
    if len(data) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: more than {MAX_RECIPE_BYTES} bytes; a recipe is a page of text")
    tree = _parse(text, str(path))
    _check_secret(tree, str(path))
    return tree


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe, with dotted overrides such as ``distill.generate.lr=1e-3``.

    Raises:
        RecipeError: the file is missing, is no YAML, or is no recipe.
    """
    tree = read_tree(path)
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a mapping of sections is expected, found {_kind(tree)}")
    for assignment in overrides:
        _override(tree, assignment)
    return check(tree)


def _kind(tree: Any) -> str:
    return "nothing" if tree is None else f"a {type(tree).__name__}"


def parse(text: str, source: str) -> Recipe:
    """A recipe from its text.

    Raises:
        RecipeError: it is no YAML, or no recipe; a line for each problem.
    """
    return check(_parse(text, source))


def in_a_line(value: Any) -> str:
    """Plain data as YAML in one line, as a recipe's values are written."""
    text: str = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.removesuffix("...\n").strip()  # three dots end a document that is one value alone


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with every default written out."""
    return yaml.dump(recipe.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
