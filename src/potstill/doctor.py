"""A look at somebody's own model before hours are spent on it: its programs are run, and what is wrong is said in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from .build import reason
from .distill.distiller import tensors_of
from .divergence import shape_of
from .evaluate.cost import parameters
from .families.latent import LatentDiffusion
from .model import Model
from .noise import Noise
from .trace import Trace, run

# Shares of the range of pixels: a network that is sure of nothing strays this far, one with another range farther.
_STRAYS = 0.25
_MANY = 0.05  # of the pixels
# Of a repeated run in the same precision, and of a row alone: convolutions of other batches add up in another order.
_SAME, _ALONE = 1e-5, 1e-3
# Most std of a latent that is as good as a point, and least and most that a network's output can mean.
_POINT, _ABSURD = 1e-4, 1e3
# Least spread of the posterior's means over images in units of its std: below, a latent tells less than 0.002 nats of an image.
_SIGNAL = 0.05
_SHOWN = 12  # nodes of a program in its summary


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a model.

    Args:
        check: what was looked at, such as "range".
        program: where it was seen: "generate", "infer" or "link"; "model" where it is of no program alone.
        what: was found.
        remedy: what to do about it.
    """

    check: str
    program: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.program}: {self.what}; {self.remedy}"


@dataclass
class _Visit:
    """One examination: a model, and what was found so far."""

    model: Model
    n: int
    findings: list[Finding] = field(default_factory=list)

    def say(self, check: str, program: str, what: str, remedy: str) -> None:
        self.findings.append(Finding(check, program, what, remedy))

    def run(self, program: str, x: Tensor | None, noise: Noise, n: int | None = None) -> Trace:
        """Run a program, and compute every conditional and value of it."""
        inputs = () if x is None else (self.model.images.encode(x),)
        trace = run(self.model.program(program), *inputs, noise=noise, n=n or self.n, device=self.model.device)
        for node in trace.values():
            _ = node.dist, node.value
        return trace


def examine(model: Model, n: int = 8) -> list[Finding]:
    """Everything that is found wrong with a model; an empty list where nothing is.

    Every program is run on ``n`` samples: twice on the same noise, on other noise, one sample alone, and for a gradient. The images
    that an inference program is shown are the model's own samples, where it generates, and plain, black, white and noisy ones.
    The network is left as it was.

    Args:
        model: a teacher, or a student, or what is to become one.
        n: samples of a run, at least 2.
    """
    if n < 2:
        raise ValueError(f"examine with n={n}; at least 2 samples are needed to compare them")
    visit = _Visit(model, n)
    if all(program is None for program in (model.generate, model.infer, model.link)):
        visit.say("programs", "model", "it has no program", "give Model a generate function, an infer function, or both")
        return visit.findings
    _look_at_images(visit)
    if training := [name or type(module).__name__ for name, module in model.net.named_modules() if _learns_statistics(module)]:
        what = f"{', '.join(training[:3])}{', ...' if len(training) > 3 else ''} {'are' if len(training) > 1 else 'is'} in train mode"
        visit.say("train mode", "model", what, "call model.frozen(), or net.eval(): each image would change with the batch around it")
    with _unchanged(model.net):
        model.net.eval()
        drawn = _look_at(visit, "generate", None) if model.generate else None
        samples = None
        if drawn is not None:
            samples = model.images.clip(model.images.decode(drawn.out.dist.mean.detach()).float())
        for program in ("infer", "link"):
            if getattr(model, program) is not None:
                found = _look_at(visit, program, _images(visit, samples))
                if program == "infer" and found is not None and drawn is not None:
                    _compare_latents(visit, drawn, found)
    return visit.findings


def summary(model: Model) -> list[str]:
    """What a model is, a line for the network and one for each of its programs, each run once. The network is left as it was.

    Raises:
        ValueError: a program fails.
    """
    visit = _Visit(model, 2)
    low, high = (model.images.encode(torch.full((1, *model.images.shape), v)).flatten() for v in (0.0, 1.0))
    lines = [
        f"{type(model.net).__name__} of {parameters(model.net):,} parameters; images {_sizes(model.images.shape)}, "
        f"to the network from {low.min():.3g} to {high.max():.3g}"
    ]
    with _unchanged(model.net), torch.no_grad():
        model.net.eval()
        for program in ("generate", "infer", "link"):
            if getattr(model, program) is not None:
                trace = visit.run(program, None if program == "generate" else _images(visit, None), Noise((0, "doctor")))
                lines.append(f"{program}: {', '.join(_shortened([f'{name} {_described(node.dist)}' for name, node in trace.items()]))}")
    return lines


# ------------------------------------------------------------------ what is looked at


def _look_at_images(visit: _Visit) -> None:
    images = visit.model.images
    if not {len(images.mean), len(images.std)} <= {1, images.shape[0]} or not all(s > 0 for s in images.std):
        what = f"its images have mean {images.mean} and std {images.std} for {images.shape[0]} channels"
        visit.say("range", "model", what, "give one number, or one per channel, std above 0")
    elif images.pixels and max(images.mean) > 1.5 and max(images.std) > 1.5:
        what = f"its images have mean {images.mean} and std {images.std}, which are of pixels from 0 to 255"
        visit.say("range", "model", what, "divide both by 255: potstill's pixels are in [0, 1]")


def _look_at(visit: _Visit, program: str, x: Tensor | None) -> Trace | None:
    """Every check of one program; its trace where it can be used further."""
    noise = Noise((0, "doctor")).at(range(visit.n))
    buffers = {name: buffer.clone() for name, buffer in visit.model.net.named_buffers()}
    try:
        with torch.no_grad(), _listening(visit, program):
            trace = visit.run(program, x, noise)
    except Exception as error:
        _failed(visit, program, error)
        return None
    changed = [name for name, buffer in visit.model.net.named_buffers() if not _equal(buffer, buffers[name])]
    if changed and not any(f.check == "train mode" and f.program == program for f in visit.findings):
        what = f"running it changes {', '.join(changed[:3])}{', ...' if len(changed) > 3 else ''}"
        visit.say("train mode", program, what, "do not call train() in it, nor batch_norm with training=True: a teacher stays as it is")
    if not _has_shape(visit, program, trace) or not _is_finite(visit, program, trace):
        return None
    _look_at_range(visit, program, trace)
    _look_at_stds(visit, program, trace)
    with torch.no_grad():
        if _is_repeatable(visit, program, x, noise, trace):
            _look_at_rows(visit, program, x, trace)
            if program == "generate":
                _look_at_noise(visit, trace)
        if program == "infer":
            _look_at_posterior(visit, x)
    if program == "infer":
        _look_at_gradient(visit, x, noise)
    return trace


def _failed(visit: _Visit, program: str, error: Exception) -> None:
    text = reason(error)
    if "parameter scale" in text:
        what = "it makes a Normal whose std is not positive, as a log-variance would be"
        visit.say("std", program, what, "where the network gives a log-variance, write Normal(mean, (log_variance / 2).exp())")
    elif "parameter loc" in text or "parameter logits" in text:
        visit.say("finite", program, f"NaN in a distribution: {text}", "look for a weight, a logarithm or a division that is not finite")
    else:
        called = "sample" if program == "generate" else "sample, x"
        visit.say("programs", program, f"it fails: {text}", f"it is called as {program}({called}), here for {visit.n} samples")


def _has_shape(visit: _Visit, program: str, trace: Trace) -> bool:
    wanted, out = (visit.n, *visit.model.images.shape), trace.out.dist
    found = shape_of(out)
    if program == "link" or found == wanted:
        return True
    if isinstance(out, Categorical) and program == "infer":
        found = tuple(out.logits.shape)
        if len(found) == 2 and found[0] == visit.n:
            return True
        what = f"for {visit.n} images it gives logits of shape {found}, and ({visit.n}, classes) is expected"
        visit.say("shape", program, what, "one row of logits per image")
        return False
    what = f"for {visit.n} samples its output is {found}, and {wanted} is expected, (batch, C, H, W)"
    if found == (wanted[0], *wanted[2:], wanted[1]):
        remedy = "its channels are last: .permute(0, 3, 1, 2) brings them forward"
    elif found[1:] == wanted[1:]:
        remedy = f"make as many as sample.n says, which is {visit.n} here"
    elif len(found) > 1 and found[0] == visit.n and torch.Size(found).numel() == torch.Size(wanted).numel():
        remedy = f".view(-1, {', '.join(map(str, wanted[1:]))}) would give it that shape"
    elif found[2:] == wanted[2:] and found[0] == wanted[0]:
        remedy = f"it has {found[1]} channels: is one of its parts a std? Images(shape=...) says {wanted[1]}"
    else:
        remedy = "change what it returns, or the shape in Images"
    visit.say("shape", program, what, remedy)
    return False


def _is_finite(visit: _Visit, program: str, trace: Trace) -> bool:
    for name, node in trace.items():
        if not all(t.isfinite().all() for t in (*tensors_of(node.dist), node.value) if t.is_floating_point()):
            visit.say(
                "finite", program, f"NaN or infinite values at node {name!r}", "look at the weights, and at every log, sqrt and division"
            )
            return False
    return True


def _look_at_range(visit: _Visit, program: str, trace: Trace) -> None:
    out = trace.out.dist
    if isinstance(out, Categorical) or program == "link" or not visit.model.images.pixels:
        return
    images, raw = visit.model.images, out.mean.detach().float()
    x = images.decode(raw)
    low, high, outside = x.min().item(), x.max().item(), ((x < -_STRAYS) | (x > 1 + _STRAYS)).float().mean().item()
    # A sigmoid's images, taken for those of a tanh, fill the upper half alone.
    half = 0.49 < low < 0.52 and high < 1.01 and -0.01 < raw.min() < 0.05 and images.mean != (0.0,)
    if outside > _MANY or half:
        what = f"pixels from {low:.3g} to {high:.3g}, and [0, 1] is expected"
        if outside > _MANY:
            what += f" ({outside:.0%} are outside)"
        bottom, top = raw.min().item(), raw.max().item()
        seen = f"the network's own values go from {bottom:.3g} to {top:.3g}"
        visit.say("range", program, what, f"{seen}: {_range_advice(bottom, top)}")


def _range_advice(low: float, high: float) -> str:
    if low >= -0.05 and high <= 1.05:
        return "Images.between(shape, 0, 1) would fit, or leave mean and std out"
    if -1.1 <= low < -0.05 and high <= 1.1:
        return "Images.between(shape, -1, 1) would fit, that is mean 0.5 and std 0.5"
    if low >= -5 and 10 < high <= 300:
        return "Images.between(shape, 0, 255) would fit"
    return "give Images the mean and std of the pixels that it was trained on, or look at its weights"


def _look_at_stds(visit: _Visit, program: str, trace: Trace) -> None:
    for name, node in trace.items():
        dist = _normal(node.dist)
        if dist is None:
            continue
        scale = dist.scale.float()
        if scale.min() <= 0:
            what = f"the std of node {name!r} goes down to {scale.min():.3g}, as a log-variance would"
            visit.say("std", program, what, "where the network gives a log-variance, write Normal(mean, (log_variance / 2).exp())")
        elif scale.max() > _ABSURD:
            what = f"the std of node {name!r} goes up to {scale.max():.3g}"
            visit.say("std", program, what, "is exp() taken of what is a std already, or of a log-variance that is not halved?")
        elif program == "infer" and node is not trace.out:
            prior = _normal(node.prior) if node.prior is not None else None
            ratio = scale if prior is None else scale / prior.scale.float()
            if ratio.min() > 0.999 and ratio.mean() > 1.05:
                what = f"the posterior of {name!r} is wider than its prior for every image and element (std from {scale.min():.3g})"
                visit.say("std", program, what, "where the network gives a std, do not take exp() of it as of a log-variance")


def _is_repeatable(visit: _Visit, program: str, x: Tensor | None, noise: Noise, trace: Trace) -> bool:
    again = visit.run(program, x, noise)
    if list(again) != list(trace):
        visit.say(
            "noise", program, f"its nodes differ from run to run: {list(trace)}, then {list(again)}", "ask for the same nodes in every run"
        )
        return False
    for name, node in trace.items():
        if _distance(node, again[name]) > _SAME:
            what = f"on the same noise node {name!r} comes out otherwise the second time"
            remedy = "draw nothing by torch.randn or dropout: every random choice is sample(name, dist) or sample.normal(name, shape)"
            visit.say("noise", program, what, remedy)
            return False
    return True


def _look_at_noise(visit: _Visit, trace: Trace) -> None:
    if not trace.latents():
        visit.say("noise", "generate", "it draws no latent", 'take its noise from sample.normal("z", shape)')
        return
    mean = trace.out.dist.mean.float()
    if (mean - mean[:1]).abs().max() <= _SAME * (1 + mean.abs().max()):
        remedy = "does it use what it draws? If so, the decoder ignores its latents, and there is nothing to distill"
        visit.say("noise", "generate", "every image that it generates is the same, whatever the noise", remedy)


def _look_at_rows(visit: _Visit, program: str, x: Tensor | None, trace: Trace) -> None:
    row = visit.n - 1
    try:
        alone = visit.run(program, None if x is None else x[row:], Noise((0, "doctor")).at([row]), 1)
    except Exception as error:
        visit.say("rows", program, f"it fails for a single sample: {reason(error)}", "BatchNorm in train mode and squeeze() do; use eval()")
        return
    for name, node in trace.items():
        if name in alone and _distance(node, alone[name], row) > _ALONE:
            what = f"node {name!r} of a sample changes with the samples beside it"
            visit.say("rows", program, what, "BatchNorm in train mode, a mean over the batch and a view() that mixes rows do that")
            return


def _look_at_posterior(visit: _Visit, x: Tensor | None) -> None:
    trace = visit.run("infer", x, Noise((0, "doctor")).at([0] * visit.n))  # one noise for all: what differs is the images' doing
    latents = {name: dist for name, node in trace.latents().items() if (dist := _normal(node.dist)) is not None}
    if not latents or len(latents) < len(trace.latents()):
        return
    widest = max(dist.scale.float().max().item() for dist in latents.values())
    signal = max((d.loc.float().std(0) / d.scale.float().mean(0).clamp_min(1e-12)).max().item() for d in latents.values())
    if widest < _POINT:
        what = f"the posterior is a point: its std is {widest:.2g} at most, so its KL is no measure of an image"
        visit.say("posterior", "infer", what, "of an autoencoder, use the latents without a distribution, and guide by reconstruction")
    elif signal < _SIGNAL:
        what = "the posterior is the same for every image, so its KL carries no signal and the latents no image"
        remedy = "it has collapsed, as it does where the loss averages over pixels: train again on their sum, or guide by other energies"
        visit.say("posterior", "infer", what, remedy)


def _look_at_gradient(visit: _Visit, x: Tensor | None, noise: Noise) -> None:
    assert x is not None
    x = x.clone().requires_grad_()
    remedy = "look for no_grad, inference_mode, detach, numpy or rounding between the image and what it returns"
    try:
        with torch.enable_grad():
            trace = visit.run("infer", x, noise)
            out = trace.out.dist
            parts = {"out": (out.logits if isinstance(out, Categorical) else out.mean)}
            if any(isinstance(node.dist, (Bernoulli, Categorical)) for node in trace.latents().values()):
                parts.clear()  # no gradient passes a coin
            latents = [t for node in trace.latents().values() for t in tensors_of(node.dist) if t.is_floating_point()]
            if latents:
                parts["its latents"] = torch.cat([t.float().reshape(-1) for t in latents])
            for name, tensor in parts.items():
                if not tensor.requires_grad:
                    visit.say("gradient", "infer", f"no gradient goes from {name} to the image", remedy)
                    return
                (gradient,) = torch.autograd.grad(tensor.float().square().sum(), x, retain_graph=True, allow_unused=True)
                if gradient is None or not gradient.any():
                    visit.say("gradient", "infer", f"the gradient from {name} to the image is 0 everywhere", remedy)
                    return
                if not gradient.isfinite().all():
                    visit.say(
                        "gradient", "infer", f"the gradient from {name} to the image is NaN or infinite", "look for a sqrt or a norm at 0"
                    )
                    return
    except Exception as error:
        visit.say("gradient", "infer", f"it fails when a gradient is asked for: {reason(error)}", remedy)


def _compare_latents(visit: _Visit, drawn: Trace, found: Trace) -> None:
    generated, inferred = ({k: tuple(n.value.shape[1:]) for k, n in t.latents().items()} for t in (drawn, found))
    if not generated or not inferred:
        return
    if not generated.keys() & inferred.keys():
        what = f"infer names its latents {', '.join(inferred)}, and generate {', '.join(generated)}"
        visit.say("names", "model", what, "give a latent one name in both, or what is inferred cannot be generated from")
    for name in generated.keys() & inferred.keys():
        if generated[name] != inferred[name]:
            what = f"node {name!r} is {generated[name]} in generate and {inferred[name]} in infer"
            visit.say("names", "model", what, "give a latent one shape in both, or what is inferred cannot be generated from")


# ------------------------------------------------------------------ their parts


def _images(visit: _Visit, samples: Tensor | None) -> Tensor:
    """Images ``(n, C, H, W)`` in [0, 1] that differ as much as images can, the model's own among them; or values about the mean."""
    images, device, noise = visit.model.images, visit.model.device, Noise((0, "doctor", "images"))
    if images.pixels:
        x = noise.uniform("x", (visit.n, *images.shape), device)
        for i, level in zip(range(0, visit.n, 4), (0.5, 0.0, 1.0), strict=False):
            x[i] = level
    else:
        x = images.decode(noise.normal("x", (visit.n, *images.shape), device))
    if samples is not None:
        x[1::2] = samples[1::2]
    return x


def _learns_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.training


@contextmanager
def _unchanged(net: nn.Module) -> Iterator[None]:
    """Put modes and buffers back after the block."""
    modes = {module: module.training for module in net.modules()}
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])


@contextmanager
def _listening(visit: _Visit, program: str) -> Iterator[None]:
    """See which modules a program calls: those that are no part of the network, and BatchNorm in train mode."""
    own, strangers, training = set(visit.model.net.modules()), set[nn.Module](), set[nn.Module]()
    if isinstance(visit.model.net, LatentDiffusion):  # its autoencoder is shared with students, by design
        own |= set(visit.model.net.chain.vae.modules())

    def listen(module: nn.Module, inputs: Any) -> None:
        if module not in own and any(True for _ in (*module.parameters(False), *module.buffers(False))):
            strangers.add(module)
        if _learns_statistics(module):
            training.add(module)

    handle = register_module_forward_pre_hook(listen)
    try:
        yield
    finally:
        handle.remove()
    if strangers:
        what = f"it calls {_kinds(strangers)}, which {'are' if len(strangers) > 1 else 'is'} no part of Model's net"
        remedy = "make the network one module that holds them all, or they are neither frozen, nor moved to a GPU, nor saved"
        visit.say("net", program, what, remedy)
    if training:
        what = f"{_kinds(training)} of it run in train mode, though eval() was called"
        visit.say("train mode", program, what, "do not call train() in it: a teacher stays as it is")


def _kinds(modules: set[nn.Module]) -> str:
    return ", ".join(sorted({type(module).__name__ for module in modules}))


def _normal(dist: Distribution) -> Normal | None:
    while isinstance(dist, Independent):
        dist = dist.base_dist
    return dist if isinstance(dist, Normal) else None


def _distance(a: Any, b: Any, row: int | None = None) -> float:
    """Largest difference of two nodes' tensors, in units of the larger's size; of one row of the first where it is given."""
    # A distribution makes some of its tensors when first asked, and so may have more than its twin.
    apart = [0.0]
    for p, q in ((a.value, b.value), *zip(tensors_of(a.dist), tensors_of(b.dist), strict=False)):
        p = p if row is None or not p.ndim else p[row : row + 1]
        if p.shape != q.shape:
            return float("inf")
        if p.numel():
            scale = 1 + p.abs().max().item()
            apart.append((p.double() - q.double()).abs().max().item() / scale)
    return max(apart)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _described(dist: Distribution) -> str:
    if isinstance(dist, Categorical):
        return f"Categorical of {dist.logits.shape[-1]}"
    return f"{type(dist).__name__} {_sizes(shape_of(dist)[1:])}"


def _shortened(nodes: list[str]) -> list[str]:
    """The first nodes and the last: a chain may have a thousand."""
    left_out = len(nodes) - _SHOWN
    return nodes if left_out <= 0 else [*nodes[: _SHOWN - 1], f"{left_out} more", nodes[-1]]


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "1"
