"""A small residual classifier: a teacher of labels, and a source of features for the metrics."""

from __future__ import annotations

from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.distributions import Categorical

from ..model import Images, Model
from ..trace import Sampler
from .blocks import DownBlock


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
