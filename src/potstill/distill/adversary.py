"""An adversary: a network that tells a student's images from those it should make, and what the student learns from it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..divergence import per_sample
from ..families.gan import LABEL, Discriminator
from ..model import Model
from ..noise import Noise
from ..trace import Trace, run


class Adversary(nn.Module):
    """Losses of a discriminator and of the generator against it, which one optimizer lowers together.

    Each side is held constant in the other's losses: no term of the discriminator's reaches the generator, and the other way round.
    The generator's loss is the non-saturating one (Goodfellow et al., NeurIPS 2014), and the discriminator's gradient at real images
    is penalized (R1 of Mescheder et al., "Which Training Methods for GANs do actually Converge?", ICML 2018).

    Args:
        discriminator: it learns too.
        weight: of the generator's adversarial loss; with 0, the discriminator only gives features.
        features: weight of the squared distance of each pair of images, real and fake, in the discriminator's hidden layers,
            the mean of each layer; for images paired by shared noise.
        r1: weight of half the squared norm of that gradient.
    """

    def __init__(self, discriminator: Discriminator, weight: float = 1.0, features: float = 0.0, r1: float = 1.0):
        super().__init__()
        self.discriminator = discriminator
        self.weight, self.features, self.r1 = weight, features, r1

    def forward(
        self, real: Tensor, fake: Tensor, real_labels: Tensor | None = None, fake_labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses by name, each ``(batch,)``.

        Args:
            real: ``(batch, C, H, W)`` in [0, 1], images as they should be.
            fake: the generator's.
            real_labels: ``(batch,)`` int64, where there are classes.
            fake_labels: those that the generator was shown.
        """
        losses = {}
        held = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        if self.weight or self.features:
            logits, hidden = functional_call(self.discriminator, held, (fake, fake_labels))
            if self.weight:
                losses["adversarial"] = self.weight * F.softplus(-logits)
            if self.features:
                with torch.no_grad():
                    _, wanted = self.discriminator(real, real_labels)
                distances = [per_sample((a - b) ** 2) / a[0].numel() for a, b in zip(hidden, wanted, strict=True)]
                losses["features"] = self.features * torch.stack(distances).sum(0)
        x = real.detach().requires_grad_(bool(self.r1))
        real_logits, _ = self.discriminator(x, real_labels)
        fake_logits, _ = self.discriminator(fake.detach(), fake_labels)
        losses["discriminator"] = F.softplus(-real_logits) + F.softplus(fake_logits)
        if self.r1:
            (slope,) = torch.autograd.grad(real_logits.sum(), x, create_graph=True)
            losses["r1"] = 0.5 * self.r1 * per_sample(slope**2)
        return losses

    def of_traces(self, teacher: Trace, student: Trace, models: tuple[Model, Model]) -> dict[str, Tensor]:
        """As :meth:`forward`, of the outputs of a teacher and a student, given with their models."""
        real, fake = (model.images.decode(trace.out.dist.mean) for model, trace in zip(models, (teacher, student), strict=True))
        return self(real, fake, self.labels_of(teacher), self.labels_of(student))

    def labels_of(self, trace: Trace) -> Tensor | None:
        """The labels that a generator was shown, where the discriminator reads them."""
        return trace[LABEL].value if self.discriminator.classes else None


class AdversarialTraining(nn.Module):
    """A generator against a discriminator on real images: how a GAN is trained, and a student of one from scratch.

    Where the model has an encoder, it learns the noise behind the generator's images (the latent regressor of Donahue et al.,
    "Adversarial Feature Learning", ICLR 2017).

    Args:
        model: a model that generates.
        adversary: the discriminator's side, with its weights.
    """

    def __init__(self, model: Model, adversary: Adversary):
        super().__init__()
        self.net, self.adversary = model.net, adversary
        self._model = model

    def forward(self, noise: Noise, images: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Losses by name, each ``(batch,)``; images ``(batch, C, H, W)`` in [0, 1], labels ``(batch,)`` where there are classes."""
        model, adversary = self._model, self.adversary
        trace = run(model.program("generate"), noise=noise, n=len(images), device=model.device)
        fake = model.images.decode(trace.out.dist.mean)
        losses: dict[str, Tensor] = adversary(images, fake, labels, adversary.labels_of(trace))
        if model.infer is not None:
            known = trace.values_of()
            found = run(model.infer, trace.output.detach(), noise=noise, given=known)
            losses |= {f"encoder.{name}": -per_sample(node.dist.log_prob(known[name])) for name, node in found.latents().items()}
        return losses
