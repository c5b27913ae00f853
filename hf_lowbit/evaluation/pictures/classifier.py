"""A small convolutional classifier of pictures: its features are a space to measure distances in.

It is not Inception: distances in its space compare methods with each other, and mean nothing next to published FIDs.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class ClassifierConfig:
    """What a classifier reads and names.

    Attributes:
        labels: names of the classes, in order.
        channels: of the pictures.
        size: their height and width, in pixels.
        widths: channels of the stages; each halves the size, and the last is how many features there are.
    """

    labels: tuple[str, ...]
    channels: int = 1
    size: int = 32
    widths: tuple[int, ...] = (32, 64, 96)


class Seen(NamedTuple):
    """What a classifier makes of n pictures: a map of each stage [n, c, h, w], features [n, d], logits [n, classes]."""

    maps: tuple[Tensor, ...]
    features: Tensor
    logits: Tensor


class PictureClassifier(nn.Module):
    """Stages of strided and plain 3x3 convolutions with batch normalization, the mean over space, a linear layer."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        before = (config.channels, *config.widths)
        self.stages = nn.ModuleList(_stage(a, b) for a, b in zip(before, config.widths, strict=False))
        self.head = nn.Linear(config.widths[-1], len(config.labels))

    def forward(self, pictures: Tensor) -> Seen:
        """Pictures: float [n, channels, size, size] in [0, 1].

        Raises:
            ValueError: pictures of another shape.
        """
        expected = (self.config.channels, self.config.size, self.config.size)
        if pictures.ndim != 4 or pictures.shape[1:] != expected:
            raise ValueError(f"the classifier reads pictures [n, {', '.join(map(str, expected))}], not "
                             f"{list(pictures.shape)}")  # fmt: skip
        maps, x = [], 2 * pictures - 1
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        features = x.mean((2, 3))
        return Seen(tuple(maps), features, self.head(features))

    @torch.no_grad()
    def see(self, pictures: Tensor, batch_size: int = 256) -> Seen:
        """:meth:`forward` in batches, on the classifier's device, in float32; results are on the CPU."""
        device = self.head.weight.device
        parts = [self(part.to(device, torch.float32)) for part in pictures.split(batch_size)]
        if not parts:
            raise ValueError("there is no picture to classify")
        maps = zip(*(part.maps for part in parts), strict=True)
        return Seen(
            tuple(torch.cat(same).cpu() for same in maps),
            torch.cat([part.features for part in parts]).cpu(),
            torch.cat([part.logits for part in parts]).cpu(),
        )

    def save(self, folder: str | Path) -> None:
        """Config as JSON, weights as safetensors in float16."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / _CONFIG).write_text(json.dumps(asdict(self.config), indent=1) + "\n", encoding="utf-8")
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        halves = {name: value.half() for name, value in state.items() if value.is_floating_point()}
        save_file({**state, **halves}, Path(folder) / _WEIGHTS)

    @classmethod
    def load(cls, folder: str | Path) -> PictureClassifier:
        """A saved classifier, in float32 and evaluation mode.

        Raises:
            FileNotFoundError: there is none.
        """
        path = Path(folder)
        if not (path / _CONFIG).is_file() or not (path / _WEIGHTS).is_file():
            raise FileNotFoundError(f"{folder} holds no picture classifier: {_CONFIG} and {_WEIGHTS} are needed")
        values = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        for name in ("labels", "widths"):
            values[name] = tuple(values[name])
        model = cls(ClassifierConfig(**values))
        model.load_state_dict(load_file(path / _WEIGHTS))
        return model.float().eval()


def _stage(inputs: int, outputs: int) -> nn.Sequential:
    """Half the size: [n, inputs, h, w] -> [n, outputs, h / 2, w / 2]."""
    layers: list[nn.Module] = []
    for index in range(2):
        convolution = nn.Conv2d(inputs if index == 0 else outputs, outputs, 3, 2 - index, 1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)
