"""Packed mixers of tiny random models, by themselves, with scales that fit a random input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.method import Recipe
from hf_lowbit.nn import KINDS, LayerSpec, MixerSpec, PackedMixer, kind_of, mixer_kind
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.tensorwise import Outcome, quantize_parameter
from tests.integrations.tiny_state_space import TINY, mixers_of

WEIGHTS = WeightSpec(bits=8, group_size="tensor", scale_dtype="float32")
SPECS = {
    "mamba": MixerSpec(8, 8),
    "falcon_mamba": MixerSpec(8, 8),
    "mamba2": MixerSpec(8, 8, True, 2, 3),
}


def float_mixer(name: str) -> Any:
    """The first mixer of a tiny model, float32."""
    return next(iter(mixers_of(TINY[name].create(), TINY[name].mixer).values()))


def unpacked(name: str, spec: MixerSpec) -> PackedMixer:
    """A packed mixer in which all is still float."""
    module = float_mixer(name)
    mixer = KINDS[str(mixer_kind(module))].from_float(module, LayerSpec(WEIGHTS, mixer=spec))
    assert isinstance(mixer, PackedMixer)
    return mixer.eval()


def packed(name: str, spec: MixerSpec | None = None) -> PackedMixer:
    """All of its weights are codes, of its layers in the order of the forward; sites have scales of absolute maxima."""
    spec = SPECS[name] if spec is None else spec
    mixer = unpacked(name, spec)
    for parameter in mixer.packed_parameters:
        round_parameter(mixer, parameter)
    for child, layer in list(mixer.named_children()):
        if (kind := kind_of(layer)) is not None:
            activation = None if kind == "conv1d" or spec.activation_bits is None else ActivationSpec()
            replaced = KINDS[kind].from_float(layer, LayerSpec(WEIGHTS, activation))
            round_parameter(replaced, "weight")
            setattr(mixer, child, replaced)
    if spec.activation_bits is not None:
        set_scales(mixer)
    return mixer


def round_parameter(module: Any, name: str) -> None:
    module.allocate(name, packed=False)
    quantize_parameter(module, name, getattr(module, name), Recipe(round_to_nearest), "mixer", Outcome())


def hidden(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, 32, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def heard(mixer: PackedMixer, x: Tensor) -> dict[str, Tensor]:
    """What its listener is told of a call."""
    values: dict[str, Tensor] = {}
    mixer.listener = lambda site, x: values.update({site: x})
    mixer(x)
    mixer.listener = None
    return values


@torch.no_grad()
def set_scales(mixer: PackedMixer) -> None:
    geometry, clusters = mixer.geometry, mixer.mixer_spec.clusters
    if clusters is not None:
        heads = torch.arange(1, clusters[0] + 1).expand(geometry.groups, -1).clone()
        channels = torch.arange(1, clusters[1] + 1).expand(geometry.groups, clusters[0], -1).clone()
        heads[:, -1], channels[..., -1] = geometry.heads_per_group, geometry.head_dim
        mixer.set_clusters(heads, channels)
    told = heard(mixer, hidden(4, 40, seed=1))
    for site, shape in mixer.sites().items():
        values = told[site].abs().amax((0, 1))  # [channels], [G, n] or [channels, n]
        if len(shape) == 1:
            largest = values.amax(-1) if shape[0] > 1 else values.amax().reshape(1)
        else:
            cluster, rows = mixer.clusters_of_channels(), values.reshape(geometry.intermediate, -1)
            assert cluster is not None
            largest = torch.stack([rows[cluster == k].amax(0) for k in range(int(cluster.max()) + 1)]).reshape(shape)
        mixer.set_site_scale(site, largest / 127)


def children(mixer: nn.Module) -> dict[str, Any]:
    return dict(mixer.named_children())
