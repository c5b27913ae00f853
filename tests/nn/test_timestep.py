"""The timestep of a running model, and layers with scales of each timestep."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.nn import LayerSpec, PackedModule, connect_siblings
from hf_lowbit.nn.timestep import (
    Timestep,
    UnknownTimestepError,
    at_timestep,
    attach_timestep,
    current_timestep,
    detach_timestep,
)

Pack = Callable[[nn.Module, LayerSpec], PackedModule]
STEPS = (900, 500, 100)
SPEC = LayerSpec(WeightSpec(bits=4, group_size=16), ActivationSpec("int", 8, static=True, timesteps=STEPS))
PLAIN = LayerSpec(SPEC.weight, ActivationSpec("int", 8, static=True))
SCALES = torch.tensor([[0.03], [0.02], [0.005]])


class Denoiser(nn.Module):
    """A layer, called with ``[batch, tokens, channels]``, the tokens folded into the batch where that is asked for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.checkpointed = False

    def forward(self, sample: Tensor, timestep: Any, fold: bool = False) -> Tensor:
        x = sample.flatten(0, 1) if fold else sample
        y: Tensor = checkpoint(self.layer, x, use_reentrant=False) if self.checkpointed else self.layer(x)
        return y.view(*sample.shape[:-1], -1)


def layer_of(pack: Pack, spec: LayerSpec = SPEC, scales: Tensor = SCALES) -> PackedModule:
    torch.manual_seed(0)
    layer = pack(nn.Linear(32, 8), spec)
    layer.set_input_scale("weight", scales)
    return layer


def denoiser(pack: Pack, scales: Tensor = SCALES) -> Denoiser:
    model = Denoiser(layer_of(pack, scales=scales))
    attach_timestep(model)
    return model


def at(pack: Pack, row: int, x: Tensor) -> Tensor:
    """What an untimed layer with the scale of one timestep makes of it."""
    y: Tensor = layer_of(pack, PLAIN, SCALES[row])(x)
    return y


def samples(count: int = 1) -> Tensor:
    return torch.randn(count, 5, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("value", "row"),
    [
        (900, 0), (1000, 0), (701, 0), (700, 0), (699, 1), (500.0, 1), (300, 1), (299.9, 2), (0, 2),
        (torch.tensor(480), 1), (torch.tensor([110.0]), 2), (torch.tensor([890, 910]), 0), (torch.tensor(0.5), 2),
    ],
)  # fmt: skip
@torch.no_grad()
def test_the_nearest_is_used(pack: Pack, value: Any, row: int) -> None:
    """Of two the earlier in denoising; a number, or a tensor of one or of as many as there are samples."""
    model, x = denoiser(pack), samples(2)
    expected = at(pack, row, x)
    assert torch.equal(model(x, value), expected) and torch.equal(model(sample=x, timestep=value), expected)
    assert not any(torch.equal(expected, at(pack, other, x)) for other in range(3) if other != row)


@torch.no_grad()
def test_samples_of_several_timesteps(pack: Pack) -> None:
    model, x = denoiser(pack), samples(4)
    mixed = model(x, torch.tensor([100, 900, 510, 100]))
    for sample, row in enumerate([2, 0, 1, 2]):
        assert torch.equal(mixed[[sample]], at(pack, row, x[[sample]]))
    assert torch.equal(model(x, torch.tensor([100, 900, 510, 100]), fold=True), mixed)


@torch.no_grad()
def test_rows_that_are_no_multiple_of_the_samples(pack: Pack) -> None:
    model = denoiser(pack)
    with pytest.raises(ValueError, match="timesteps of 2 samples differ, and an input of 5 rows is no multiple"):
        model(samples(5), torch.tensor([900, 100]))
    model(samples(5), torch.tensor([900, 890]))  # of the same, whatever their number


@torch.no_grad()
def test_equal_scales_are_those_of_a_layer_without_timesteps(pack: Pack) -> None:
    """QuEST's test 2."""
    model, x = denoiser(pack, SCALES[:1].expand(3, 1)), samples(3)
    assert torch.equal(model(x, torch.tensor([1, 950, 500])), at(pack, 0, x))


def test_nobody_said_at_which(pack: Pack) -> None:
    model, x = denoiser(pack), samples()
    with pytest.raises(UnknownTimestepError, match="call the model that holds it, with its timestep"):
        model.layer(x)
    with pytest.raises(UnknownTimestepError):
        model(x, None)
    with at_timestep(500):
        assert torch.equal(model.layer(x), at(pack, 1, x))
    with pytest.raises(UnknownTimestepError):
        model.layer(x)


class Controlled(Denoiser):
    """A denoiser that calls another, at a timestep of its own, before its layer."""

    def __init__(self, layer: nn.Module, other: Denoiser) -> None:
        super().__init__(layer)
        self.other = other

    def forward(self, sample: Tensor, timestep: Any, fold: bool = False) -> Tensor:
        return self.other(sample, 100) + self.layer(sample)


@torch.no_grad()
def test_models_do_not_disturb_each_other(pack: Pack) -> None:
    outer, x = Controlled(layer_of(pack), denoiser(pack)), samples()
    attach_timestep(outer)
    assert torch.equal(outer(x, 900), at(pack, 2, x) + at(pack, 0, x))
    with pytest.raises(ValueError, match=r"inputs of 3 columns, and weights of \[32\]"):
        outer(x[..., :3], 900)
    assert current_timestep() is None


@torch.no_grad()
def test_copies_and_pickles_call_themselves(pack: Pack) -> None:
    model, x = denoiser(pack), samples()
    expected = model(x, 900)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, 900), expected)
        other.layer.set_input_scale("weight", SCALES.flip(0))
        assert torch.equal(other(x, 900), at(pack, 2, x)) and torch.equal(model(x, 900), expected)


def test_attaching(pack: Pack) -> None:
    model = denoiser(pack)
    forward = model.forward
    attach_timestep(model)
    assert model.forward is forward and str(inspect.signature(model.forward)).startswith("(sample: 'Tensor', timestep")
    detach_timestep(model)
    assert "forward" not in vars(model) and set(model.state_dict()) == {f"layer.{k}" for k in model.layer.state_dict()}
    for other in (Denoiser(layer_of(pack, PLAIN, SCALES[0])), nn.Sequential(layer_of(pack))):
        attach_timestep(other)  # not needed, or never told
        assert "forward" not in vars(other)


def test_another_librarys_forward_is_kept(pack: Pack) -> None:
    model = Denoiser(layer_of(pack))
    own = model.forward
    model.forward = lambda *args, **kwargs: 2 * own(*args, **kwargs)  # type: ignore[method-assign]
    attach_timestep(model)
    assert torch.equal(model(samples(), 500), 2 * at(pack, 1, samples()))
    detach_timestep(model)
    assert vars(model)["forward"].__name__ == "<lambda>"


def test_checkpointing_computes_the_same_again(pack: Pack) -> None:
    """Blocks run once more in backward, where the model does not."""
    torch.manual_seed(0)
    gradients = []
    for checkpointed in (False, True):
        model, x = denoiser(pack), samples(3).requires_grad_()
        model.checkpointed = checkpointed
        model(x, torch.tensor([900, 100, 500])).square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0] is not None and gradients[1] is not None and torch.equal(*gradients)


@torch.no_grad()
def test_compiled_it_is_the_same(pack: Pack) -> None:
    model, x = denoiser(pack), samples(3)
    compiled = torch.compile(model, backend="eager")
    for timestep in (900, 100, torch.tensor([900, 100, 500]), torch.tensor([100, 100, 500])):
        assert torch.equal(compiled(x, timestep), model(x, timestep))


@torch.no_grad()
def test_siblings_compute_together(pack: Pack) -> None:
    parent = nn.Module()
    parent.to_q, parent.to_k = layer_of(pack), layer_of(pack)
    x = samples(2)
    assert connect_siblings(parent) == 1
    for timestep in (torch.tensor([900, 100]), 500, 100):
        with at_timestep(timestep):
            together = [parent.to_q(x), parent.to_k(x)]
            alone = layer_of(pack)(x)
        assert all(torch.equal(y, alone) for y in together)
    parent.to_k.set_input_scale("weight", SCALES.flip(0))
    assert connect_siblings(parent) == 0


def test_tables_are_checked(pack: Pack) -> None:
    layer = layer_of(pack)
    assert layer.companion_shapes("weight")["weight_input_scale"] == ((3, 1), torch.int32)
    assert "static, 3 timesteps" in repr(layer)
    with pytest.raises(ValueError, match=r"weight_input_scale has the shape \[3, 1\], not \[2, 1\]"):
        layer.set_input_scale("weight", SCALES[:2])
    with pytest.raises(ValueError, match="have no shift"):
        layer.set_input_scale("weight", SCALES, SCALES)


def test_a_timestep_is_read_once() -> None:
    timestep = Timestep(torch.tensor([[900.0], [100.0]], dtype=torch.bfloat16))
    assert timestep.nearest(STEPS) is timestep.nearest(STEPS)
    assert torch.equal(torch.as_tensor(timestep.rows(STEPS, 4)), torch.tensor([0, 0, 2, 2]))
