"""Replayed blocks: computed once, and the same bits as without."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from hf_lowbit.calibration.replay import Replay
from tests.calibration.test_units import nearest, walk

UNET = Path(__file__).parents[1] / "assets" / "sd-fashion" / "unet"


class TwoCalls(nn.Module):
    """Calls one block twice, and changes what it returns in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        once = self.first(x)
        twice = self.first(2 * x)
        once += 1
        return self.second(once + twice)


def counted(module: nn.Module) -> list[int]:
    calls: list[int] = []
    forward = module.forward
    module.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    return calls


@torch.no_grad()
def test_a_finished_block_is_computed_once_for_each_batch_and_call() -> None:
    torch.manual_seed(0)
    model, inputs = TwoCalls(), torch.randn(2, 3, 4)
    expected = [model(x) for x in inputs]
    calls = counted(model.first)
    replay = Replay(model)
    replay.finish("first")
    for _ in range(3):
        for batch, x in enumerate(inputs):
            with replay.handing_on(batch):
                assert torch.equal(model(x), expected[batch])
    assert len(calls) == 4, "two batches, two calls each"
    assert torch.equal(model(inputs[0]), expected[0]) and len(calls) == 6, "outside, it computes"


@torch.no_grad()
def test_what_the_limit_does_not_hold_is_computed_each_time() -> None:
    model, x = TwoCalls(), torch.ones(3, 4)
    expected = model(x)
    calls = counted(model.first)
    replay = Replay(model, limit=3 * 4 * 4)
    replay.finish("first")
    for _ in range(2):
        with replay.handing_on(0):
            assert torch.equal(model(x), expected)
    assert len(calls) == 3, "the first call is kept, the second computed twice"


def test_a_unet_gets_the_same_bits_with_and_without() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "sample": torch.randn(2, 4, 8, 8, generator=generator),
            "timestep": torch.full((2,), timestep),
            "encoder_hidden_states": torch.randn(2, 16, 96, generator=generator),
        }
        for timestep in (900, 100)
    ]
    models = [UNet2DConditionModel.from_pretrained(UNET, torch_dtype=torch.float32) for _ in range(2)]
    for model, limit in zip(models, (0, None), strict=True):
        walk(model, batches, nearest, limit=limit)
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
