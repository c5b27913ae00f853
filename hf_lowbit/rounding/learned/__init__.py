"""Learned rounding: quantizers of one weight, to be trained against what a layer or block puts out."""

from hf_lowbit.rounding.learned.adaptive import AdaptiveRounding
from hf_lowbit.rounding.learned.base import LearnedWeight
from hf_lowbit.rounding.learned.clipping import LearnedClipping, MovingClipping
from hf_lowbit.rounding.learned.rebased import RebasedRounding
from hf_lowbit.rounding.learned.sign import SignRounding
from hf_lowbit.rounding.learned.whole_space import WholeSpaceRounding

__all__ = [
    "AdaptiveRounding",
    "LearnedClipping",
    "LearnedWeight",
    "MovingClipping",
    "RebasedRounding",
    "SignRounding",
    "WholeSpaceRounding",
]
