"""Which layers each stage of QuEST trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hf_lowbit.calibration.roles import Roles
from hf_lowbit.calibration.selective import Stage
from hf_lowbit.config import ConfigError
from hf_lowbit.plan import packed_modules
from hf_lowbit.plan.patterns import first_match, generalise
from hf_lowbit_quest.config import QuESTConfig

# By the names of diffusers: the paper's feed-forward layers, else its attention's.
SENSITIVE = (
    ("ff.net", "ff_context.net", "ffn.net", "proj_mlp", "conv_inverted", "conv_point"),
    ("to_q", "to_k", "to_v", "to_qkv"),
)  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """Layers of a model.

    Attributes:
        time: of the first stage.
        sensitive: of the second.
        ends: the first and the last that read the sample.
        notes: for the report.
    """

    time: tuple[str, ...]
    sensitive: tuple[str, ...]
    ends: tuple[str, ...]
    notes: list[str]


def select(roles: Roles, config: QuESTConfig) -> Selection:
    """Resolve the config's patterns, or its defaults, against what was found in a model.

    Raises:
        ConfigError: a pattern of the config that no layer matches.
    """
    names, notes = roles.called, []
    time = roles.time if config.time_layers is None else _matching("time_layers", config.time_layers, names)
    rest = [name for name in names if name not in time]
    if config.sensitive_layers is not None:
        sensitive = _matching("sensitive_layers", config.sensitive_layers, rest)
    else:
        found = ([name for name in rest if first_match(patterns, name)] for patterns in SENSITIVE)
        sensitive = tuple(next((layers for layers in found if layers), ()))
    for title, layers in (("time embedding", time), ("sensitive", sensitive)):
        shapes = ", ".join(dict.fromkeys(map(generalise, layers))) or "none"
        notes.append(f"{title} layers, to be finetuned: {shapes} ({len(layers)} layers)")
    return Selection(tuple(time), sensitive, roles.ends, notes)


def stages_of(model: nn.Module, selection: Selection, config: QuESTConfig, steps: int) -> list[Stage]:
    """The two stages, for the layers that are packed.

    Args:
        steps: of one epoch.
    """
    packed = packed_modules(model)
    time, sensitive = ([name for name in names if name in packed] for names in (selection.time, selection.sensitive))
    rate = config.rate_of_weights(steps * config.epochs)
    return [
        Stage(
            "time embedding layers", tuple(time), biases=tuple(time), inputs=tuple(time),
            weight_rate=rate, input_rate=config.time_input_rate, epochs=config.epochs,
        ),
        Stage(
            "sensitive layers and input scales", tuple(sensitive), biases=(),
            inputs=tuple(name for name in packed if name not in time),
            weight_rate=rate, input_rate=config.input_rate, epochs=config.epochs,
        ),
    ]  # fmt: skip


def _matching(field: str, patterns: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    for pattern in patterns:
        if not any(first_match([pattern], name) for name in names):
            raise ConfigError(
                f"QuESTConfig: {field} names {pattern!r}, which no linear or convolution layer of this model matches "
                f"that is called; there are {', '.join(dict.fromkeys(map(generalise, names[:40])))}, ..."
            )
    return tuple(name for name in names if first_match(patterns, name))
