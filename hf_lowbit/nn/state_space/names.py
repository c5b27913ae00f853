"""transformers' mixers by the names of their classes: which generation they are, and what sets them apart.

Those of one generation agree in the names of their projections, parameters and sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class MixerNames:
    """One class.

    Attributes:
        kind: of the packed mixer that takes its place.
        norms: children that normalise what x_proj returns for dt, B and C.
        input_multiplier: an attribute, a float that the mixer's input is multiplied by.
        output_multiplier: a buffer ``[1, 1, channels]`` that the output of in_proj is multiplied by.
    """

    kind: str
    norms: tuple[str, str, str] | None = None
    input_multiplier: str | None = None
    output_multiplier: str | None = None


_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")
MIXERS: dict[str, MixerNames] = {
    "MambaMixer": MixerNames("mamba"),
    "FalconMambaMixer": MixerNames("mamba", norms=_NORMS),
    "JambaMambaMixer": MixerNames("mamba", norms=_NORMS),
    "Mamba2Mixer": MixerNames("mamba2"),
    "BambaMixer": MixerNames("mamba2"),
    "Zamba2MambaMixer": MixerNames("mamba2"),
    "NemotronHMamba2Mixer": MixerNames("mamba2"),
    "FalconH1Mixer": MixerNames("mamba2", input_multiplier="ssm_in_multiplier", output_multiplier="mup_vector"),
    "GraniteMoeHybridMambaLayer": MixerNames("mamba2"),
}
_REFUSED = {
    "ZambaMambaMixer": "its x_proj and dt_proj are parameters of several heads and no layers",
}
GENERATIONS = {"mamba": 1, "mamba2": 2}


def names_of(module: nn.Module) -> MixerNames | None:
    """The row of a float mixer; None for any other module."""
    return MIXERS.get(type(module).__name__)


def mixer_kind(module: nn.Module) -> str | None:
    """The kind that packs a float mixer; None for other modules, and for mixers that are refused."""
    names = names_of(module)
    return None if names is None or mixer_refusal(module) is not None else names.kind


def mixer_refusal(module: nn.Module) -> str | None:
    """Why a module that is a state-space mixer cannot be packed as one; None for mixers that can, and for the rest."""
    name = type(module).__name__
    if name in _REFUSED:
        return f"{name} is not supported: {_REFUSED[name]}"
    parameters = dict(module.named_parameters(recurse=False))
    if name not in MIXERS:
        return f"{name} is no mixer that is known" if {"A_log", "D"} <= set(parameters) else None
    activation = getattr(module, "activation", "silu")
    return None if activation in ("silu", "swish") else f"{name} with the activation {activation!r} is not supported"
