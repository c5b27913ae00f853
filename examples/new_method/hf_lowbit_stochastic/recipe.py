"""The algorithm, imported when a model is first quantized with it."""

import torch
from torch import Tensor

from hf_lowbit import LowbitConfig, Recipe
from hf_lowbit.formats import PackedTensor, WeightSpec, decode, pack_codes, unpack_codes
from hf_lowbit.formats.packed import scales
from hf_lowbit.rounding import round_to_nearest


def make_recipe(config: LowbitConfig) -> Recipe:
    """One rounding function, seeded per tensor so that order does not matter."""

    def rounding(weight: Tensor, spec: WeightSpec) -> PackedTensor:
        packed = round_to_nearest(weight, spec)
        scale = scales(packed)  # [..., rows, groups]
        step = scale.repeat_interleave(packed.columns // scale.shape[-1], dim=-1)
        error = (weight.float() - decode(packed)) / step  # in codes: between -1/2 and 1/2
        generator = torch.Generator().manual_seed(config.seed)
        flip = torch.rand(weight.shape, generator=generator) < error.abs()
        codes = unpack_codes(packed.weight, spec.bits, packed.columns).int()
        codes = (codes + torch.where(flip, error.sign().int(), 0)).clamp(0, 2**spec.bits - 1)
        packed.weight = pack_codes(codes.to(torch.uint8), spec.bits)
        return packed

    return Recipe(rounding=rounding)
