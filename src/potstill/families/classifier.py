"""Residual classifiers: teachers and students of labels, and sources of features for the metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.distributions import Categorical

from ..model import Images, Model
from ..noise import Noise
from ..trace import Sampler, run
from .blocks import DownBlock


@torch.no_grad()
def classes_of(model: Model) -> int | None:
    """How many labels a model tells apart; ``None`` for one that generates, or infers something else.

    It is found by running the model once on two gray images, in the mode that it is in.
    """
    if model.generate is not None or model.infer is None:
        return None
    gray = torch.full((2, *model.images.shape), 0.5, device=model.device)
    out = run(model.infer, model.images.encode(gray), noise=Noise((0,))).out.dist
    return int(out.logits.shape[-1]) if isinstance(out, Categorical) else None


class Classifier(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="potstill",
    tags=["potstill", "image-classification"],
    license="apache-2.0",
):
    """Three residual stages of ``width``, 2 and 4 times ``width`` channels, an average over the image, a linear layer.

    Args:
        image: ``(C, H, W)``.
        classes: number of labels.
        width: channels of the first stage.
        family: written to ``config.json``, so that a checkpoint says what it is.
    """

    def __init__(self, image: tuple[int, int, int] = (3, 32, 32), classes: int = 10, width: int = 32, family: str = "classifier"):
        super().__init__()
        channels, height, pixels_wide = image
        self.image, self.classes, self.width = (channels, height, pixels_wide), classes, width
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            DownBlock(width, width),
            DownBlock(width, 2 * width, 2),
            DownBlock(2 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, classes)

    def model(self) -> Model:
        """The network with its one program."""
        return Model(self, Images(self.image), infer=self.infer)

    def shrunk(self, width: int) -> Classifier:
        """A fresh network of another width."""
        return Classifier(self.image, self.classes, width)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, averaged over the image: ``(batch, 4 width)``."""
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of images ``(batch, C, H, W)`` in [0, 1]."""
        logits: Tensor = self.head(self.features(x))
        return logits

    def infer(self, sample: Sampler, x: Tensor) -> Categorical:
        """Image to label."""
        return Categorical(logits=self(x), validate_args=False)


def _shortcut(x: Tensor, stride: int, added: int) -> Tensor:
    """Option A of He et al.: every ``stride``-th pixel, and ``added`` channels of zeros, half of them before and half after."""
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, added // 2, added - added // 2))


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters; the first may halve the size."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.stride, self.added = stride, channels - channels_in
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        h = self.bn2(self.conv2(h))
        skip = _shortcut(x, self.stride, self.added) if self.stride > 1 or self.added else x
        return F.relu(h + skip, inplace=True)


class ResNet(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="potstill",
    tags=["potstill", "image-classification"],
    license="apache-2.0",
):
    """The residual network for small images of He et al. ("Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2).

    Three stages of ``width``, 2 and 4 times ``width`` channels, an average over the image, a linear layer. State-dict keys are
    ``conv1, bn1, layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}, linear``, as widespread checkpoints have them.
    A wide ResNet (Zagoruyko and Komodakis, BMVC 2016) is one of a larger width, though theirs normalize before each convolution.

    Args:
        image: ``(C, H, W)``; tested for 8 to 64 pixels.
        classes: number of labels.
        depth: 6 n + 2 layers, n blocks a stage; published: 20, 32, 44, 56, 110.
        width: channels of the first stage; published: 16.
        mean: of the pixels that it was trained on, in [0, 1]: one number, or one per channel.
        std: of those pixels, likewise.
        family: written to ``config.json``, so that a checkpoint says what it is.

    Raises:
        ValueError: the depth is not 6 n + 2, a count is below 1, or mean or std are not one number or one per channel.
    """

    def __init__(
        self,
        image: tuple[int, int, int] = (3, 32, 32),
        classes: int = 10,
        depth: int = 20,
        width: int = 16,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        family: str = "resnet",
    ):
        super().__init__()
        channels, height, pixels_wide = image
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"a ResNet has 6 n + 2 layers, such as 8, 20 or 56; not {depth}")
        if min(channels, height, pixels_wide, width, classes) < 1:
            raise ValueError(f"ResNet(image={tuple(image)}, classes={classes}, width={width}): all must be positive")
        if not {len(mean), len(std)} <= {1, channels} or not min(std) > 0:
            raise ValueError(
                f"ResNet(mean={tuple(mean)}, std={tuple(std)}): one number or {channels} are expected, one per channel, std above 0"
            )
        self.image, self.classes, self.depth, self.width = (channels, height, pixels_wide), classes, depth, width
        self.mean, self.std = tuple(mean), tuple(std)
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks = depth // 6
        self.layer1 = nn.Sequential(*(_Block(width, width, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(_Block(width, 2 * width, 2), *(_Block(2 * width, 2 * width, 1) for _ in range(blocks - 1)))
        self.layer3 = nn.Sequential(_Block(2 * width, 4 * width, 2), *(_Block(4 * width, 4 * width, 1) for _ in range(blocks - 1)))
        self.linear = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)  # He et al., ICCV 2015: deep ones do not learn from smaller weights

    def model(self) -> Model:
        """The network with its one program."""
        return Model(self, Images(self.image, self.mean, self.std), infer=self.infer)

    def shrunk(self, width: int) -> ResNet:
        """A fresh network of another width."""
        return ResNet(self.image, self.classes, self.depth, width, self.mean, self.std)

    def features(self, x: Tensor) -> Tensor:
        """The last hidden layer, averaged over the image: ``(batch, 4 width)``."""
        h = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.layer3(self.layer2(self.layer1(h))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` of images ``(batch, C, H, W)`` in the network's own range, (pixels - mean) / std."""
        logits: Tensor = self.linear(self.features(x))
        return logits

    def infer(self, sample: Sampler, x: Tensor) -> Categorical:
        """Image to label."""
        return Categorical(logits=self(x), validate_args=False)
