"""Packed modules: torch modules whose weights are codes."""

from hf_lowbit.nn.base import CorruptWeightError, PackedModule
from hf_lowbit.nn.conv import PackedConv1d, PackedConv2d
from hf_lowbit.nn.embedding import PackedEmbedding
from hf_lowbit.nn.exact import (
    EXACT_KINDS,
    ExactColumns,
    ExactSparse,
    ExactSpec,
    keep_columns,
    keep_weights,
    register_exact,
)
from hf_lowbit.nn.experts import PackedExperts
from hf_lowbit.nn.kept import keep_matrices
from hf_lowbit.nn.kinds import KINDS, kind_of, refusal_of, register_kind
from hf_lowbit.nn.linear import PackedConv1D, PackedLinear
from hf_lowbit.nn.siblings import connect_siblings, disconnect_siblings
from hf_lowbit.nn.spec import LayerSpec
from hf_lowbit.nn.stand_in import answer_owner
from hf_lowbit.nn.state_space.base import PackedMixer
from hf_lowbit.nn.state_space.mamba import PackedMamba
from hf_lowbit.nn.state_space.mamba2 import PackedMamba2
from hf_lowbit.nn.state_space.names import mixer_kind, mixer_refusal
from hf_lowbit.nn.state_space.spec import MixerSpec
from hf_lowbit.nn.transforms import (
    TRANSFORMS,
    Hadamard,
    Incoherence,
    Reassembly,
    Scaling,
    TransformSpec,
    register_transform,
)

__all__ = [
    "EXACT_KINDS",
    "KINDS",
    "TRANSFORMS",
    "CorruptWeightError",
    "ExactColumns",
    "ExactSparse",
    "ExactSpec",
    "Hadamard",
    "Incoherence",
    "LayerSpec",
    "MixerSpec",
    "PackedConv1D",
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedExperts",
    "PackedLinear",
    "PackedMamba",
    "PackedMamba2",
    "PackedMixer",
    "PackedModule",
    "Reassembly",
    "Scaling",
    "TransformSpec",
    "answer_owner",
    "connect_siblings",
    "disconnect_siblings",
    "keep_columns",
    "keep_matrices",
    "keep_weights",
    "kind_of",
    "mixer_kind",
    "mixer_refusal",
    "refusal_of",
    "register_exact",
    "register_kind",
    "register_transform",
]
