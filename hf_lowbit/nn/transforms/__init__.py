"""What packed layers do with their inputs and outputs, one file for each kind."""

from hf_lowbit.nn.transforms.base import TRANSFORMS, TransformSpec, register_transform
from hf_lowbit.nn.transforms.hadamard import Hadamard
from hf_lowbit.nn.transforms.incoherence import Incoherence
from hf_lowbit.nn.transforms.reassembly import Reassembly
from hf_lowbit.nn.transforms.scaled_hadamard import ScaledHadamard
from hf_lowbit.nn.transforms.scaling import Scaling

__all__ = [
    "TRANSFORMS",
    "Hadamard",
    "Incoherence",
    "Reassembly",
    "ScaledHadamard",
    "Scaling",
    "TransformSpec",
    "register_transform",
]
