"""A finished student as files that other programs run: ONNX, torch.export's .pt2, or a folder in diffusers' layout.

The exported graph takes its standard noise as input, one tensor for each node of the program under the node's name, so that whoever runs
it draws the numbers: independent standard normals, or uniforms in [0, 1), as ``export.json`` beside it says. After it is written it is
run on noise that torch is run on too, and refused where the two differ.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from . import build, config
from .data import floats
from .distill.calibration import NoiseMap
from .errors import BadInput, Failed, Refused
from .evaluate.cost import file_mib, latency, parameters, size_mib
from .evaluate.features import pixels
from .evaluate.frechet import frechet
from .families.chain import Chain
from .families.classifier import classes_of
from .families.diffusion import UNet, chain_of
from .families.gan import GAN, LABEL
from .families.latent import LatentDiffusion
from .jobs import Job, Workshop
from .model import Model
from .noise import FixedNoise, Noise, NoiseSource
from .pipeline import describe
from .state import lock, new_folder, write_json
from .synthesize import surrogate
from .synthesize.prior import Prior
from .trace import Node, Point, run

Target = Literal["onnx", "torch-export", "diffusers"]
TARGETS: tuple[Target, ...] = ("onnx", "torch-export", "diffusers")
FORMAT = "potstill-export/1"
TOLERANCE = 1e-5
"""Largest difference between an exported float32 graph and torch, of images in [0, 1]; of larger values, in units of the largest."""

_ROWS = 64  # on which they are compared
_CALIBRATION = 256  # samples that show a quantizer the range of each activation
_COMPARED = 1024  # images of a Fréchet distance where the run has no held-out ones
_REPEATS = 20  # calls of a network that is timed
_DRAW = {
    "normal": "independent standard normal numbers",
    "uniform": "independent uniform numbers, 0 or more and below 1",
    "image": "images in [0, 1]",
    "values": "values in units of the data",
    "time": "the time of each image, as in chain.links",
    "number": "the number of each image's condition, from 0 on",
}


@dataclass(frozen=True)
class _Input:
    """One input of a graph: its shape without the batch, and what it holds."""

    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def described(self) -> dict[str, Any]:
        dtype = "int64" if self.kind == "number" else "float32"
        return {"name": self.name, "shape": ["batch", *self.shape], "dtype": dtype, "kind": self.kind, "draw": _DRAW[self.kind]}


@dataclass(frozen=True)
class _Part:
    """One graph of an export.

    Args:
        name: of its file, without the ending.
        program: what it does.
        net: tensors in the order of the inputs to tensors in the order of the outputs.
        inputs: what it takes.
        outputs: their names.
        plain: what torch says of inputs by name, without the module above.
        draw: inputs by name from noise, for a number of rows.
    """

    name: str
    program: str
    net: nn.Module
    inputs: tuple[_Input, ...]
    outputs: tuple[str, ...]
    plain: Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
    draw: Callable[[Noise, int], dict[str, Tensor]]


class _Asked:
    """Noise that remembers what it was asked for: node by node its kind and shape."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple[str, tuple[int, ...]]] = {}

    def normal(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return self._note("normal", name, shape, device)

    def uniform(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return self._note("uniform", name, shape, device)

    def _note(self, kind: str, name: str, shape: Sequence[int], device: torch.device | str) -> Tensor:
        if self.asked.setdefault(name, (kind, tuple(shape))) != (kind, tuple(shape)):
            raise BadInput(f"export: node {name!r} asks for noise of two kinds or shapes under one name")
        draw = Noise().normal if kind == "normal" else Noise().uniform
        return draw(name, shape, device)


class _Middle:
    """Noise without chance: every node is drawn at its mean, a coin or a category at its likelier side."""

    def normal(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return torch.zeros(tuple(shape), device=device)

    def uniform(self, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return torch.full(tuple(shape), 0.5, device=device)


class _Generator(nn.Module):
    def __init__(self, model: Model, names: Sequence[str]):
        super().__init__()
        self.net, self._model, self._names = model.net, model, tuple(names)

    def forward(self, *noise: Tensor) -> tuple[Tensor, ...]:
        # shape[0], for len() would make the batch of the example a constant of the graph.
        return (self._model.sample(noise[0].shape[0], FixedNoise(dict(zip(self._names, noise, strict=True)))),)


class _Inferrer(nn.Module):
    def __init__(self, model: Model):
        super().__init__()
        self.net, self._model = model.net, model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(_inferred(self._model, x, _Middle()).values())


class _Denoiser(nn.Module):
    def __init__(self, chain: Chain):
        super().__init__()
        self.chain = chain

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return (self.chain(*inputs),)


@torch.no_grad()
def _inferred(model: Model, x: Tensor, noise: NoiseSource) -> dict[str, Tensor]:
    """Logits of a classifier; or the mean of every latent under its node's name, and the reconstruction."""
    trace = run(model.program("infer"), model.images.encode(x), noise=noise, n=x.shape[0], device=x.device)
    if isinstance(trace.out.dist, Categorical):
        return {"logits": trace.out.dist.logits}
    latents = {name: _mean(node) for name, node in trace.latents().items() if not isinstance(node.dist, Point)}
    return latents | {"reconstruction": model.images.clip(model.images.decode(trace.out.dist.mean))}


def _mean(node: Node) -> Tensor:
    dist: Distribution = node.dist
    return dist.logits if isinstance(dist, Categorical) else dist.mean


@dataclass(frozen=True)
class _Source:
    """What is exported, in eval mode on the CPU, and the run that made it, where it is one of a run; ``beside``: the map of its noise."""

    model: Model
    beside: NoiseMap | None = None
    folder: Path | None = None
    recipe: config.Recipe | None = None
    shop: Workshop | None = field(default=None, repr=False)


def export(path: str | Path, to: Target, out: Path | None = None, int8: bool = False, allowed: Sequence[str] = ()) -> dict[str, Any]:
    """Write the student of a finished run, or the model in a folder, for other programs to run; return what ``export.json`` says of it.

    * onnx: ``model.onnx``, noise to ``image`` in [0, 1] (``values`` of data that are no pictures), or of a classifier ``image`` to
      ``logits``, log probabilities. Where a generator infers too, ``encoder.onnx``: ``image`` to the mean of each latent (of a category
      its logits), each level given the mean of the one above it, and ``reconstruction``. Of a chain, one call of its denoiser;
      ``export.json`` has the times and levels of its links.
    * torch-export: the same graphs as ``model.pt2`` and ``encoder.pt2``, for ``torch.export.load``; ``most_rows`` is the end of its batch.
    * diffusers: a folder that diffusers' pipelines load, of a diffusion or flow model.

    Args:
        path: folder of a run or of a model, ``zoo:NAME``, or a Hub id.
        to: one of :data:`TARGETS`.
        out: a new folder; by default ``export/TO`` in the run's.
        int8: also write ``model.int8.onnx``, its activations calibrated on noise, or of a classifier on the run's surrogate: no data.
        allowed: modules that a recipe's own model may come from.

    Raises:
        BadInput: there is no such model, it is of another kind, cannot be traced, or a package is missing.
        Refused: the folder is there already.
        Failed: what was written does not compute what torch computes.
    """
    if to not in TARGETS:
        raise BadInput(f"export: to {to!r}; {', '.join(TARGETS)} is expected")
    if int8 and to != "onnx":
        raise BadInput(f"export: int8 is of onnx; {to} is as the student is")
    _check_packages(to)
    source = _source(path, allowed)
    if out is None:
        if source.folder is None:
            raise BadInput(f"export: {path} is no folder of a run; say where to write with --out")
        out = source.folder / "export" / to
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Refused(f"{out}: is there already; nothing is overwritten: remove it, or choose another --out")
    inside = source.folder is not None and out.resolve().is_relative_to(source.folder.resolve())
    # A run that goes on in the same folder would take what is half written here for what a killed process left.
    held = lock(source.folder / "state" / "run.lock", what=str(source.folder)) if inside and source.folder else contextlib.nullcontext()
    try:
        with held, build.memory_watched(), new_folder(out) as folder:
            found = _written(source, to, int8, folder)
            write_json(folder / "export.json", found)
    except FileExistsError:
        raise Refused(f"{out}: is there already; nothing is overwritten: remove it, or choose another --out") from None
    return found


def _check_packages(to: Target) -> None:
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch-export": (), "diffusers": ("diffusers",)}[to]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        extra = "diffusion" if to == "diffusers" else "export"
        raise BadInput(f"export to {to} needs {' and '.join(missing)}: pip install 'potstill[{extra}]'")


def _source(path: str | Path, allowed: Sequence[str]) -> _Source:
    folder = Path(path).expanduser()
    if not (folder / "recipe.yaml").is_file():
        folder = build.locate(str(path))
        return _mapped(build.pretrained(str(folder)).model(), folder)
    recipe = config.read(folder / "recipe.yaml")
    student = folder / "student"
    if recipe.students:
        one = student / f"w{recipe.students[0]}"
        raise BadInput(f"{folder}: it has students of several sizes; give the folder of one, such as {one}, and --out")
    if not (student / "model.safetensors").is_file():
        raise BadInput(f"{folder}: no student in it; run the distill stage first")
    build.allow(allowed)
    recipe = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"device": "cpu"})})
    shop = Workshop(recipe, folder, tuple(allowed))
    if (student / "config.json").is_file():
        model: Model = build.pretrained(str(student)).model()
    else:  # a model of one's own, or a denoiser with its teacher's texts and autoencoder: made again, then loaded
        arm = next((a for a in recipe.arms if a.kind == "data_free"), recipe.arms[0])
        model = shop.student(Job(arm, recipe.seeds[0]))
        build.load_weights(model.net, student / "model.safetensors")
    return replace(_mapped(model, student), folder=folder, recipe=recipe, shop=shop)


def _mapped(model: Model, folder: Path) -> _Source:
    model.net.to("cpu", memory_format=torch.contiguous_format)
    beside = build.noise_map(model.frozen(), folder)
    return _Source(beside.onto(model) if beside else model, beside)


def _written(source: _Source, to: Target, int8: bool, folder: Path) -> dict[str, Any]:
    model = source.model
    nets = [model.net, *([source.beside] if source.beside else [])]
    found: dict[str, Any] = {
        "format": FORMAT,
        "to": to,
        "network": type(model.net).__name__,
        "params": sum(map(parameters, nets)),
        "image": {"shape": list(model.images.shape), "pixels": model.images.pixels},
    }
    if chain := chain_of(model):
        found["chain"] = _links(chain)
    if to == "diffusers":
        return found | _pipeline(source, folder)
    parts = _parts(model)
    found["graphs"], found["table"] = {}, []
    for part in parts:
        exported = _traced(part, part.draw(Noise((0, "export", part.name)), 2))
        # Diffusers' enlarging looks whether a batch has 64 images: a bound of torch's graph, none of ONNX's, which has no such checks.
        most = _most_rows(exported) if to == "torch-export" else None
        inputs = part.draw(Noise((0, "export", part.name)), min(_ROWS, most or _ROWS))
        path = folder / f"{part.name}.{'onnx' if to == 'onnx' else 'pt2'}"
        call = _as_onnx(part, exported, path) if to == "onnx" else _as_pt2(exported, path)
        apart = _difference(part.plain(inputs), call([inputs[i.name] for i in part.inputs]))
        if not apart <= TOLERANCE:
            raise Failed(f"export: {path.name} differs from torch by {apart:.2g} on the same noise; at most {TOLERANCE:g} is allowed")
        graph: dict[str, Any] = {"program": part.program, "inputs": [i.described for i in part.inputs], "outputs": list(part.outputs)}
        graph |= {"max_abs_difference": apart, "compared_on": len(inputs[part.inputs[0].name])}
        found["graphs"][path.name] = graph | ({"most_rows": most} if most else {})
        if part is parts[0]:
            row = {"name": "ONNX" if to == "onnx" else "torch.export", "file": path.name, "size_mib": file_mib(path)}
            found["table"] += [{"name": "torch", "file": None, "size_mib": sum(map(size_mib, nets))} | _timed(part, _eager(part))]
            found["table"] += [row | {"max_abs_difference": apart} | _timed(part, call, most)]
    if labels := _labels(model):
        found["labels"] = labels
    if int8:
        small = folder / "model.int8.onnx"
        found["int8"], row = _quantized(source, parts[0], folder / "model.onnx", small)
        found["table"].append(row)
    found["measured_on"] = describe(torch.device("cpu")) | {"threads": 1}
    return found


# ------------------------------------------------------------------ what is exported


def _parts(model: Model) -> list[_Part]:
    if chain := chain_of(model):
        return [_denoiser(chain)]
    if model.generate is None:
        return [_inferrer(model, "model")]
    return [_generator(model), *([_inferrer(model, "encoder")] if model.infer is not None else [])]


def _generator(model: Model) -> _Part:
    asked = [_Asked(), _Asked()]
    for noise, n in zip(asked, (2, 3), strict=True):
        model.sample(n, noise)
    if not asked[0].asked:
        raise BadInput("export: the generate program takes no noise, so there is nothing to give an exported one")
    for name, (kind, shape) in asked[0].asked.items():
        if shape[0] != 2 or asked[1].asked.get(name) != (kind, (3, *shape[1:])):
            raise BadInput(f"export: node {name!r} asks for noise whose shape is not (batch, ...)")
    inputs = tuple(_Input(name, shape[1:], kind) for name, (kind, shape) in asked[0].asked.items())

    def draw(noise: Noise, n: int) -> dict[str, Tensor]:
        return {i.name: (noise.normal if i.kind == "normal" else noise.uniform)(i.name, (n, *i.shape)) for i in inputs}

    def plain(given: Mapping[str, Tensor]) -> list[Tensor]:
        return [model.sample(len(next(iter(given.values()))), FixedNoise(given))]

    output = "image" if model.images.pixels else "values"
    return _Part("model", "generate", _Generator(model, [i.name for i in inputs]), inputs, (output,), plain, draw)


def _inferrer(model: Model, name: str) -> _Part:
    kind = "image" if model.images.pixels else "values"
    taken = _Input(kind, tuple(model.images.shape), kind)

    def draw(noise: Noise, n: int) -> dict[str, Tensor]:
        if model.generate is not None:
            return {kind: model.sample(n, noise)}
        return {kind: noise.uniform(kind, (n, *taken.shape))}

    outputs = tuple(_inferred(model, draw(Noise(), 2)[kind], _Middle()))
    if set(outputs) & {kind}:
        raise BadInput(f"export: a node named {kind!r} cannot be told from the graph's input; give it another name")
    return _Part(name, "infer", _Inferrer(model), (taken,), outputs, lambda x: [*_inferred(model, x[kind], _Middle()).values()], draw)


def _denoiser(chain: Chain) -> _Part:
    told = (_Input("told", (), "number"),) if chain.conditions else ()
    inputs = (_Input("x", tuple(chain.image), "normal"), _Input("t", (), "time"), *told)

    def draw(noise: Noise, n: int) -> dict[str, Tensor]:
        at = (noise.uniform("t", (n, 1))[:, 0] * chain.steps).long()
        number = (noise.uniform("told", (n, 1))[:, 0] * chain.conditions).long()
        return {"x": noise.normal("x", (n, *chain.image)), "t": chain.links[at, 0]} | ({"told": number} if told else {})

    @torch.no_grad()
    def plain(given: Mapping[str, Tensor]) -> list[Tensor]:
        return [chain(*given.values())]

    return _Part("model", "denoise", _Denoiser(chain), inputs, ("prediction",), plain, draw)


def _links(chain: Chain) -> dict[str, Any]:
    """What sampling by the denoiser takes: times before and after each link, and alpha and sigma at both."""
    before, after = chain.links.unbind(1)
    levels = torch.cat([level.flatten(1) for time in (before, after) for level in chain.levels(time)], 1)
    return {
        "prediction": chain.prediction,
        "sampler": chain.sampler,
        "clip": chain.clip and chain.prediction != "flow",
        "conditions": chain.conditions,
        "shape": list(chain.image),
        "links": chain.links.tolist(),
        "levels": levels.tolist(),
        "how": "x starts as standard normal noise; a noisy x is alpha clean + sigma noise; levels are alpha, sigma before and after a link",
    }


def _labels(model: Model) -> dict[str, Any] | None:
    if isinstance(model.net, GAN) and model.net.classes:
        how = "the label drawn is where the noise is largest: for label k, 0.5 in column k and 0 elsewhere"
        return {"input": LABEL, "classes": model.net.classes, "how": how}
    if classes := classes_of(model):
        return {"output": "logits", "classes": classes}
    return None


# ------------------------------------------------------------------ graphs


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Within the block torch's exporter and the quantizer say nothing: what is wrong is an exception, or found by the comparison."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _traced(part: _Part, example: Mapping[str, Tensor]) -> Any:
    batch = torch.export.Dim.DYNAMIC
    tensors = tuple(example[i.name].clone() for i in part.inputs)  # of a view, the graph would ask for the same base
    shapes: Any = tuple({0: batch} for _ in tensors)
    # A module with *args has one argument of that name, whose shapes are a tuple of their own.
    shapes = shapes if isinstance(part.net, _Inferrer) else (shapes,)
    try:
        with _silent(), torch.no_grad():  # as it is called: a graph that switches gradients off cannot be read back
            exported = torch.export.export(part.net.eval(), tensors, dynamic_shapes=shapes)
    except Exception as error:
        text = str(error)
        hint = (
            "it fixes the batch: write x.shape[0] instead of len(x)" if "specialized it to be a constant" in text else build.reason(error)
        )
        raise BadInput(f"export: the {part.program} program cannot be traced: {hint}") from None
    for node in exported.graph.nodes:  # where on this machine each line of code lies is nobody's business
        node.meta.pop("stack_trace", None)
    return exported


def _most_rows(exported: Any) -> int | None:
    """The largest batch that a graph takes, or ``None`` where there is no end to it."""
    ends = [int(bound.upper) for bound in exported.range_constraints.values() if bound.upper.is_Integer]
    return min(ends, default=None)


def _as_pt2(exported: Any, path: Path) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    try:
        with _silent():
            torch.export.save(exported, path)
            module = torch.export.load(path).module()
    except OSError:
        raise
    except Exception as error:
        raise BadInput(f"export: {path.name} cannot be written and read back: {build.reason(error)}") from None
    return lambda tensors: module(*tensors)


def _as_onnx(part: _Part, exported: Any, path: Path) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    import onnx

    try:
        with _silent():
            program = torch.onnx.export(
                exported, dynamo=True, input_names=[i.name for i in part.inputs], output_names=list(part.outputs), verbose=False
            )
            model = program.model_proto
    except Exception as error:
        raise BadInput(f"export: the {part.program} program cannot be written as ONNX: {build.reason(error)}") from None
    batch = next(iter(model.graph.input)).type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == batch:
                dim.dim_param = "batch"
    for node in (*model.graph.node, *model.graph.initializer, *(n for f in model.functions for n in f.node)):
        node.doc_string = ""
        del node.metadata_props[:]
    del model.graph.metadata_props[:]
    onnx.save(model, path)
    return _session(path)


def _session(path: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """A graph as onnxruntime runs it, on one CPU thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def call(tensors: Sequence[Tensor]) -> list[Tensor]:
        fed = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, fed)]

    return call


def _eager(part: _Part) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    @torch.no_grad()
    def call(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        found: Sequence[Tensor] = part.net(*tensors)
        return found

    return call


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest absolute difference of outputs, of one that goes beyond 1 in units of its largest value; NaN where a shape differs."""
    apart = [0.0]
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape or not b.isfinite().all():
            return float("nan")
        apart.append(((a.double() - b.double()).abs().max() / max(1.0, a.abs().max().item())).item())
    return max(apart)


def _timed(part: _Part, call: Callable[[Sequence[Tensor]], object], most: int | None = None) -> dict[str, float]:
    """Median time of 1 and of 64 rows, in ms, on one CPU thread; the noise is drawn before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        given = {n: [*part.draw(Noise((0, "latency")), n).values()] for n in (1, 64) if n <= (most or n)}
        found = {n: latency(lambda n: call(given[n]), n, device="cpu", repeats=_REPEATS, warmup=3) for n in given}
    finally:
        torch.set_num_threads(before)
    return {f"latency_ms_b{n}": took.median_ms for n, took in found.items()}


# ------------------------------------------------------------------ int8


def _quantized(source: _Source, part: _Part, path: Path, small: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the graph in 8 bits; what changes by it, and its row of the table."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if part.program == "denoise":
        raise BadInput("export: int8 is of models that take noise to an image in one call; rounding errors of a chain add up")
    model = source.model
    shown = _calibration(source, part)

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            rows = range(0, len(next(iter(shown.values()))), _ROWS)
            self._parts = iter({name: tensor[i : i + _ROWS].numpy() for name, tensor in shown.items()} for i in rows)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._parts, None)

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".int8.", suffix=".tmp") as temporary, _silent():
        prepared = Path(temporary) / "prepared.onnx"
        try:
            quant_pre_process(path, prepared, skip_symbolic_shape=True)
            kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
            quantize_static(prepared, small, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **kinds)
        except Exception as error:
            raise BadInput(f"export: onnxruntime cannot quantize this {type(model.net).__name__}: {build.reason(error)}") from None
    call, whole = _session(small), _session(path)
    inputs = part.draw(Noise((0, "export", part.name)), _ROWS)
    apart = _difference(part.plain(inputs), call([inputs[i.name] for i in part.inputs]))
    about: dict[str, Any] = {"file": small.name, "max_abs_difference": apart, "calibrated_on": len(next(iter(shown.values())))}
    row = {"name": "ONNX int8", "file": small.name, "size_mib": file_mib(small), "max_abs_difference": apart} | _timed(part, call)
    if part.program == "generate":
        about["frechet"] = _frechet_change(source, part, whole, call)
        return about, row | {"frechet": about["frechet"]["int8"]}
    images = [tensor[-_ROWS:] for tensor in shown.values()]
    outputs = [c(images)[0] for c in (whole, call)]
    if part.outputs == ("logits",):
        about["same_label"] = (outputs[0].argmax(1) == outputs[1].argmax(1)).float().mean().item()
    return about, row


def _calibration(source: _Source, part: _Part) -> dict[str, Tensor]:
    """Rows of every input that show a quantizer what the activations are like."""
    if part.program == "generate":
        return part.draw(Noise((0, "export", "calibration")), _CALIBRATION)
    folders = [f for f in (source.recipe.synthesized if source.recipe else {}) if source.folder and (source.folder / f).is_dir()]
    if not folders or source.folder is None:
        raise BadInput("export: int8 of a model that generates nothing is calibrated on the surrogate; export from the folder of its run")
    images = surrogate.read(source.folder / folders[0])
    if images.shape[1:] != tuple(source.model.images.shape) or len(images) < _ROWS:
        raise BadInput(f"export: {folders[0]}: at least {_ROWS} images of {tuple(source.model.images.shape)} are needed to calibrate int8")
    kept = min(_CALIBRATION, len(images)) // _ROWS * _ROWS
    return {part.inputs[0].name: floats(images[:kept])}


def _frechet_change(
    source: _Source,
    part: _Part,
    whole: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    small: Callable[[Sequence[Tensor]], Sequence[Tensor]],
) -> dict[str, Any]:
    """Squared Fréchet distance of the float and of the int8 graph's images, from the same noise, to the same reference.

    The reference is the run's held-out images on the run's features; of a model without them, the float graph's own images from other
    noise, on pixels, so that the float's figure is the floor.
    """
    recipe, shop = source.recipe, source.shop
    n = _COMPARED
    if recipe is not None and shop is not None and recipe.evaluate is not None and recipe.evaluate.reference == "data":
        section, real = recipe.evaluate, shop.real
        features = build.features(section.features, torch.device("cpu"), shop.allowed, section.batch, real.train.images)
        test = floats(real.test.images[: section.n])
        n, name, reference, of = len(test), features.features.name, f"held-out images of {real.name}", features.of
        compared = of(test)
    else:
        own = pixels(source.model.images.pixels)
        name, reference, of = own.name, "the float graph's own images, from other noise", own
        compared = of(_drawn(part, whole, Noise((0, "export", "reference")), n))
    try:
        pair = [frechet(compared, of(_drawn(part, call, Noise((0, "export", "frechet")), n))) for call in (whole, small)]
    except ValueError as error:
        raise BadInput(f"export: no Fréchet distance of the int8 graph: {build.reason(error)}") from None
    return {"features": name, "reference": reference, "n": n, "float": pair[0], "int8": pair[1], "change": pair[1] - pair[0]}


def _drawn(part: _Part, call: Callable[[Sequence[Tensor]], Sequence[Tensor]], noise: Noise, n: int) -> Tensor:
    """``(n, C, H, W)`` from a graph of noise."""
    batches = [part.draw(noise.at(range(i, min(i + 256, n))), min(256, n - i)) for i in range(0, n, 256)]
    return torch.cat([call([given[i.name] for i in part.inputs])[0] for given in batches])


# ------------------------------------------------------------------ diffusers


def _pipeline(source: _Source, folder: Path) -> dict[str, Any]:
    """Write a folder in diffusers' layout, read it back, and compare the denoisers."""
    net = source.model.net
    chain = chain_of(source.model)
    if chain is None or not isinstance(net, (UNet, LatentDiffusion)):
        raise BadInput(f"export: diffusers' folders are of diffusion and flow models; this is a {type(net).__name__}. Use onnx")
    if isinstance(net, UNet):
        net.save_pipeline(folder)
    else:
        of = source.recipe.teacher if source.recipe else None
        teacher = build.locate(of.path) if isinstance(of, config.Pretrained) else None
        if teacher is None or not (teacher / "vae").is_dir():
            raise BadInput("export: the student goes into its teacher's pipeline, which is not on this disk as a whole folder")
        for item in sorted(teacher.iterdir()):
            if item.is_dir() and not item.name.startswith(".") and item.name != "unet":
                shutil.copytree(item, folder / item.name)
        shutil.copyfile(teacher / "model_index.json", folder / "model_index.json")
        net.unet.save_pretrained(folder / "unet", safe_serialization=True)
    loaded = Prior.from_pretrained(folder).unet.eval()
    part = _denoiser(chain)
    inputs = part.draw(Noise((0, "export", part.name)), _ROWS)
    with torch.no_grad():
        expected = part.plain(inputs)
        own = net.chain.net if isinstance(net, UNet) else net.unet
        state, other = own.state_dict(), loaded.state_dict()
        if state.keys() != other.keys():
            raise Failed("export: the folder's unet has other weights than the student")
        own.load_state_dict(other)
        apart = _difference(expected, part.plain(inputs))
    if not apart <= TOLERANCE:
        raise Failed(f"export: unet differs from torch by {apart:.2g} on the same noise; at most {TOLERANCE:g} is allowed")
    graph = {"program": "denoise", "inputs": [i.described for i in part.inputs], "outputs": list(part.outputs)}
    row = {"name": "diffusers", "file": "unet", "size_mib": sum(file_mib(p) for p in (folder / "unet").glob("*.safetensors"))}
    table = [{"name": "torch", "file": None, "size_mib": size_mib(net)} | _timed(part, _eager(part)), row | {"max_abs_difference": apart}]
    return {"graphs": {"unet": graph | {"max_abs_difference": apart, "compared_on": _ROWS}}, "table": table}


# ------------------------------------------------------------------ words


def summary(found: Mapping[str, Any]) -> list[str]:
    """What was written, a line each: the graphs, their differences, the table."""
    lines = []
    for name, graph in found["graphs"].items():
        inputs = ", ".join(f"{i['name']} {'x'.join(map(str, i['shape'][1:])) or '1'}" for i in graph["inputs"][:4])
        more = f" and {len(graph['inputs']) - 4} more" if len(graph["inputs"]) > 4 else ""
        outputs = ", ".join(graph["outputs"][:4]) + (", ..." if len(graph["outputs"]) > 4 else "")
        lines.append(f"{name}: {inputs}{more} -> {outputs}; max difference to torch {graph['max_abs_difference']:.2g}")
    for row in found["table"]:
        times = [f"{row[f'latency_ms_b{n}']:.3g} ms for {n}" for n in (1, 64) if f"latency_ms_b{n}" in row]
        lines.append(f"{row['name']:<13}{row['size_mib']:.3f} MiB  {', '.join(times)}")
    if frechet_of := found.get("int8", {}).get("frechet"):
        lines.append(
            f"int8: Fréchet distance {frechet_of['int8']:.4g}, float {frechet_of['float']:.4g}, on {frechet_of['features']}, "
            f"{frechet_of['n']} images against {frechet_of['reference']}"
        )
    if "same_label" in found.get("int8", {}):
        lines.append(f"int8: {found['int8']['same_label']:.1%} of the labels are the float graph's")
    return lines
