"""What a float denoiser shows on its own trajectories."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_lowbit.calibration.concatenations import find_concatenations
from hf_lowbit.calibration.data.recorded import RecordedBatches
from hf_lowbit.calibration.first_token import constant_first_token, find_text_layers
from hf_lowbit.calibration.units import Batch
from hf_lowbit.config import LowbitConfig
from hf_lowbit.integrations.prompts import Prompts
from hf_lowbit.integrations.trajectories import record_trajectories
from hf_lowbit.testbed.cache import cache_home


@dataclass(frozen=True)
class Recorded:
    """Calls of a denoiser, and what they show.

    Attributes:
        batches: keyword arguments, each of one timestep.
        text_layers: layers that read the text.
        parts: layer -> channels of its input's parts, where the config gives these scales of their own.
        constant: layers whose first token is left out of their inputs' range.
        notes: why there are none.
    """

    batches: Sequence[Batch]
    text_layers: list[str]
    parts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constant: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def spread(self, most: int) -> list[Batch]:
        """So many batches at most, evenly over the trajectory, with about ``most`` samples together."""
        samples = next(len(x) for x in self.batches[0].values() if isinstance(x, Tensor) and x.dim() > 1)
        count = min(len(self.batches), max(1, most // samples))
        step = len(self.batches) / count
        return [self.batches[int((index + 0.5) * step)] for index in range(count)]


def look_at(model: nn.Module, config: LowbitConfig, batches: Sequence[Batch]) -> Recorded:
    """What the config's method would look for: methods that split shortcuts, or set the first token apart, have fields
    ``split_shortcuts`` and ``bos_aware``."""
    text_layers = find_text_layers(model, batches[0])
    parts = find_concatenations(model, batches[0]) if getattr(config, "split_shortcuts", False) else {}
    if not text_layers or not getattr(config, "bos_aware", False):
        return Recorded(batches, text_layers, parts)
    token = constant_first_token(batches)
    if isinstance(token, str):
        return Recorded(batches, text_layers, parts, notes=[f"{token}: it is measured like all others"])
    return Recorded(batches, text_layers, parts, constant=text_layers)


@contextmanager
def trajectories(
    pipeline: Any, component: str, prompts: Sequence[Any], steps: int, seed: int, arguments: Mapping[str, Any]
) -> Iterator[RecordedBatches]:
    """The calls of a component while the pipeline draws a picture of each prompt; their files go unless work on them
    fails.

    Raises:
        ConfigError: prompts or arguments that the pipeline does not take.
        DataError: values that are not finite.
    """
    found, files = record_trajectories(
        pipeline, [component], Prompts(prompts, steps, None, arguments), len(prompts), seed,
        cache_home().parent / "resume", own_folder=False,
    )  # fmt: skip
    try:
        yield found[component]
    except BaseException:
        files.leave()
        raise
    files.finish()
