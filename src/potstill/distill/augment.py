"""Random shifts and mirror images of training images (He et al., CVPR 2016, section 4.2), addressed by row as all randomness is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Augment
from ..noise import NoiseSource


def augmented(x: Tensor, section: Augment, noise: NoiseSource) -> Tensor:
    """Images ``(batch, C, H, W)``, each moved by whole pixels and mirrored as its row of the noise says, on the device where they are.

    Args:
        x: images.
        section: how far, what comes in, and whether to mirror; its shift is below the side of the images.
        noise: addressed by the batch's rows: an image's change does not depend on the batch around it.
    """
    n, _, height, width = x.shape
    down, right, mirror = noise.uniform("augment", (n, 3), x.device).unbind(1)
    if section.shift:
        s = section.shift
        padded = F.pad(x, (s, s, s, s), mode="constant" if section.padding == "zero" else "reflect")
        y, z = ((u * (2 * s + 1)).long()[:, None] + torch.arange(size, device=x.device) for u, size in ((down, height), (right, width)))
        batch = torch.arange(n, device=x.device)[:, None, None]
        x = padded[batch, :, y[:, :, None], z[:, None, :]].permute(0, 3, 1, 2)
    if section.flip:
        x = torch.where((mirror < 0.5)[:, None, None, None], x.flip(3), x)
    return x
