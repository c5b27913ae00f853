"""Layers that read a concatenation: which groups they get, of weights and of inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lowbit import RTNConfig
from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.reconstruct import _simulate
from hf_lowbit.calibration.splitting import grouped_by_part, split_layers
from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.kernels.activation import quantize_tokens, restore_tokens
from hf_lowbit.nn import LayerSpec
from hf_lowbit.plan import packed_modules
from tests.plugins.outliers import walk

PARTS = {"shortcut": (32, 16), "conv": (32, 16), "grouped": (32, 16)}


class Decoder(nn.Module):
    """What reads a skip connection: a 1 x 1 and a 3 x 3 convolution, and one of several groups."""

    def __init__(self) -> None:
        super().__init__()
        self.shortcut, self.conv = nn.Conv2d(48, 16, 1), nn.Conv2d(48, 16, 3, padding=1)
        self.grouped, self.plain = nn.Conv2d(48, 16, 1, groups=4), nn.Conv2d(16, 16, 1)

    def forward(self, sample: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([sample, skip], 1)
        return self.plain(self.shortcut(x) + self.conv(x) + self.grouped(x))


def specs_after(config: RTNConfig) -> tuple[dict[str, LayerSpec], dict[str, Any]]:
    """Layer -> its specification as it is packed; key -> parts of one scale."""
    model, whole = Decoder(), {}
    batch = {"sample": torch.randn(2, 32, 4, 4), "skip": torch.randn(2, 16, 4, 4)}

    def step(block: Block) -> None:
        whole.update({block.full_name(key): widths for key, widths in split_layers(block, PARTS).items()})

    walk(model, step, [batch], config)
    return {name: module.layer_spec for name, module in packed_modules(model).items()}, whole


def test_groups_lie_within_parts() -> None:
    specs, whole = specs_after(RTNConfig(bits=4, group_size=None, activation_bits=8))
    for name, group in {"shortcut": 16, "conv": 16 * 9}.items():
        assert specs[name].weight.group_size == group
        assert specs[name].activation == ActivationSpec(group_size=group)
    assert specs["plain"] == specs["grouped"] == LayerSpec(WeightSpec(), ActivationSpec())
    assert whole == {"shortcut.weight": (32, 16), "conv.weight": (288, 144)}


@pytest.mark.parametrize(("own", "expected"), [(8, 8), (24, 8), (32, 16), (None, 16), ("tensor", 16)])
def test_a_group_of_the_configs_own_stays_within_a_part(own: Any, expected: int) -> None:
    spec = grouped_by_part(LayerSpec(WeightSpec(group_size=own)), (32, 16))
    assert spec.weight.group_size == expected and spec.activation is None


def test_weights_in_groups_keep_a_scale_for_each() -> None:
    specs, whole = specs_after(RTNConfig(bits=4, group_size=8))
    assert specs["shortcut"].weight.group_size == 8
    assert not whole


@pytest.mark.parametrize(("name", "activation", "changes"), [
    ("shortcut", ActivationSpec("int", 4, group_size=16), True),
    ("conv", ActivationSpec("int", 4, static=True, group_size=16 * 9), True),
    ("conv", ActivationSpec("int", 4, group_size=16 * 9), False),
])  # fmt: skip
def test_convolutions_in_training_read_codes_where_these_are_values_of_pixels(
    name: str, activation: ActivationSpec, changes: bool
) -> None:
    """Dynamic scales of overlapping patches have no one value for a pixel: the input is read as it comes."""
    module, x = Decoder().get_submodule(name), torch.randn(2, 48, 4, 4)
    (read,) = _simulate(module, (x,), activation, False)
    assert read.shape == x.shape and torch.equal(read, x) is not changes
    if name == "shortcut":
        tokens = x.permute(0, 2, 3, 1).reshape(-1, 48)
        expected = restore_tokens(*quantize_tokens(tokens, activation))
        torch.testing.assert_close(read.permute(0, 2, 3, 1).reshape(-1, 48), expected)
