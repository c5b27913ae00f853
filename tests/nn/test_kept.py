"""Linear layers that compiled graphs know by numbers: which ones, and how long."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hf_lowbit.formats import ActivationSpec, WeightSpec
from hf_lowbit.kernels.kept import KEPT_PRODUCTS
from hf_lowbit.nn import LayerSpec, PackedLinear, keep_matrices
from hf_lowbit.rounding import round_to_nearest

INT4 = WeightSpec(bits=4, group_size=32)


def packed_layer(activation: ActivationSpec | None = None, seed: int = 0) -> PackedLinear:
    generator = torch.Generator().manual_seed(seed)
    layer = PackedLinear.from_float(nn.Linear(64, 48), LayerSpec(INT4, activation=activation))
    layer.allocate("weight", packed=True)
    layer.set_packed("weight", round_to_nearest(torch.randn(48, 64, generator=generator), INT4))
    return layer.requires_grad_(False)


def test_layers_whose_inputs_need_nothing_stored() -> None:
    layers = [packed_layer(), packed_layer(ActivationSpec("int", 8)), packed_layer(ActivationSpec("float8_e4m3fn", 8))]
    forced = packed_layer()
    forced.backend = "reference"
    model = nn.ModuleList([*layers, forced, nn.Linear(4, 4)])
    assert keep_matrices(model) == 2
    assert [layer.kept is not None for layer in (*layers, forced)] == [True, True, False, False]


def test_a_number_is_that_of_the_tensors() -> None:
    layer = packed_layer()
    numbers = []
    for _ in range(2):
        keep_matrices(layer)
        assert layer.kept is not None
        numbers.append(layer.kept.number)
    layer.set_packed("weight", packed_layer(seed=1).packed())
    keep_matrices(layer)
    assert numbers[0] == numbers[1] < layer.kept.number
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.kept is None


@pytest.mark.parametrize("activation", [None, ActivationSpec("int", 8)], ids=str)
def test_compiled_without_gradients_its_codes_are_no_inputs(activation: ActivationSpec | None) -> None:
    layer, x, graphs = packed_layer(activation), torch.randn(3, 64), []
    keep_matrices(layer)

    def backend(module: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(module.graph)
        return module

    expected = layer(x)
    for records in (False, True):
        torch.compiler.reset()
        with torch.set_grad_enabled(records):
            assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(x), expected)
    calls = [
        [node for node in graph.nodes if node.target in (KEPT_PRODUCTS, KEPT_PRODUCTS.overloadpacket)]
        for graph in graphs
    ]
    assert [len(call) for call in calls] == [1, 0]
    assert sum(node.op == "placeholder" for node in graphs[0].nodes) == 2  # the input and the bias


@torch.no_grad()
@pytest.mark.parametrize("change", ["move", "replace"])
def test_graphs_of_what_was_moved_or_replaced_refuse_to_run(change: str) -> None:
    layer, x = packed_layer(), torch.randn(3, 64)
    keep_matrices(layer)
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    compiled = torch.compile(layer, backend="inductor", fullgraph=True, options=options)
    for _ in range(2):
        assert torch.equal(compiled(x), layer(x))
    if change == "move":
        layer.to("cpu", torch.float64).to(torch.float32)
    else:
        layer.set_packed("weight", packed_layer(seed=1).packed())
    assert layer.kept is None
    with pytest.raises(RuntimeError, match="the weights of this compiled graph are no more"):
        compiled(x)
    torch.compiler.reset()
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


@torch.no_grad()
def test_exported_programs_have_their_codes() -> None:
    layer, x = packed_layer(), torch.randn(3, 64)
    keep_matrices(layer)
    program = torch.export.export(layer, (x,))
    assert all(node.target is not KEPT_PRODUCTS for node in program.graph.nodes)
    assert torch.equal(program.module()(x), layer(x))
