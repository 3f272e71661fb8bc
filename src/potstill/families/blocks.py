"""Residual convolution blocks of the published LVAE (Chen et al., CVPR 2023), under its state-dict names."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def halvings(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Image sizes from ``(H, W)`` down to ``(1, 1)``, each half the one before, rounded up as a stride of 2 does."""
    sizes = [size]
    while sizes[-1] != (1, 1):
        height, width = sizes[-1]
        sizes.append((-(-height // 2), -(-width // 2)))
    return sizes


class DownBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection; the first may halve the size. ``(batch, C, H, W)`` in and out."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1):
        super().__init__()
        changes = stride != 1 or channels_in != channels
        self.downsample = nn.Conv2d(channels_in, channels, 1, stride, bias=False) if changes else None
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.downsample is None else self.downsample(x)
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(h)) + skip, inplace=True)


class UpBlock(nn.Module):
    """Two 3x3 convolutions around a skip connection, after nearest-neighbor enlargement to ``size`` where it is given."""

    def __init__(self, channels_in: int, channels: int, size: tuple[int, int] | None = None):
        super().__init__()
        self.size = size
        changes = size is not None or channels_in != channels
        self.upsample = nn.Conv2d(channels_in, channels, 1, bias=False) if changes else None
        self.conv1 = nn.Conv2d(channels_in, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None:
            x = F.interpolate(x, self.size, mode="nearest")
        skip = x if self.upsample is None else self.upsample(x)
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(h)) + skip, inplace=True)


class Down(nn.Module):
    """One bottom-up rung: for each stride a block of that stride and a plain one, then a 1x1 convolution of the result.

    Returns the hidden map, for the next rung, and the 1x1 convolution's output, for this rung's latent.
    """

    def __init__(self, channels_in: int, channels_out: int, width: int, strides: list[int]):
        super().__init__()
        blocks: list[nn.Module] = []
        for stride in strides:
            blocks += [DownBlock(channels_in, width, stride), DownBlock(width, width)]
            channels_in = width
        self.net = nn.Sequential(*blocks)
        self.out = nn.Conv2d(width, channels_out, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.net(x)
        return h, self.out(h)


class Up(nn.Module):
    """One top-down rung: for each size a block that enlarges to it and a plain one, then a 1x1 convolution."""

    def __init__(self, channels_in: int, channels_out: int, width: int, sizes: list[tuple[int, int]]):
        super().__init__()
        blocks: list[nn.Module] = []
        for size in sizes:
            blocks += [UpBlock(channels_in, width, size), UpBlock(width, width)]
            channels_in = width
        self.net = nn.Sequential(*blocks)
        self.out = nn.Conv2d(width, channels_out, 1, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.out(self.net(z))
        return out
