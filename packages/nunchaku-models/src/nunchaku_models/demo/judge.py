"""Name the emoji in a picture: the semantic score of the demo model.

A small convolutional network that knows every emoji the demo model was trained on, in both styles.
It was trained on renderings only, never on generated pictures, so its verdict on a generated picture
is independent of the model that drew it.

>>> model, classes = load_judge()
>>> classify([picture], model, classes)[0][0]
Guess(name='red apple', probability=0.98)
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

PICTURE_SIZE = 128
FOLDER = Path(__file__).parent


class Guess(NamedTuple):
    """One candidate for what a picture shows."""

    name: str
    probability: float


class ResidualBlock(nn.Module):
    """Depthwise 5x5 for space, two pointwise layers for channels, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.project = nn.Conv2d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(F.relu(self.expand(self.norm(self.depthwise(x)))))


class Downsample(nn.Sequential):
    """Halve the resolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.BatchNorm2d(in_channels), nn.Conv2d(in_channels, out_channels, 2, stride=2))


class EmojiClassifier(nn.Module):
    """Pictures (B, 3, 128, 128) in [0, 1] to logits (B, classes); 0.7 M parameters."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 4, stride=4)
        self.body = nn.Sequential(
            ResidualBlock(32),
            ResidualBlock(32),
            Downsample(32, 64),
            ResidualBlock(64),
            ResidualBlock(64),
            Downsample(64, 128),
            ResidualBlock(128),
            ResidualBlock(128),
            Downsample(128, 160),
            ResidualBlock(160),
        )
        self.norm = nn.BatchNorm1d(160)
        self.head = nn.Linear(160, num_classes)

    def forward(self, pictures: Tensor) -> Tensor:
        features = self.body(self.stem(2 * pictures - 1))
        return self.head(self.norm(features.mean(dim=(2, 3))))


def load_judge(device: torch.device | str = "cpu") -> tuple[EmojiClassifier, list[str]]:
    """The shipped classifier in evaluation mode, and the name of each of its classes."""
    classes = json.loads((FOLDER / "classes.json").read_text())
    model = EmojiClassifier(len(classes))
    model.load_state_dict(load_file(FOLDER / "classifier.safetensors"))
    return model.float().eval().to(device), classes


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """PIL images to (B, 3, 128, 128) in [0, 1]; other sizes are resampled."""
    size = (PICTURE_SIZE, PICTURE_SIZE)
    pixels = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for image in images]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def classify(
    images: Sequence[Image.Image], model: EmojiClassifier, classes: Sequence[str], top: int = 1
) -> list[list[Guess]]:
    """The ``top`` likeliest names of every image, best first."""
    pictures = to_tensor(images).to(model.head.weight.device)
    probabilities, indices = model(pictures).softmax(dim=1).topk(top, dim=1)
    return [
        [Guess(classes[i], p) for i, p in zip(row_indices, row, strict=True)]
        for row_indices, row in zip(indices.tolist(), probabilities.tolist(), strict=True)
    ]
