"""Statistics are those of whole runs, and batches end where the last layer was reached."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.gathering import Gathering
from hf_lowbit.calibration.matrices import Matrix, matrices_of
from hf_lowbit.calibration.statistics import Hessian
from hf_lowbit.formats import WeightSpec
from hf_lowbit.nn import LayerSpec


class Counted(nn.Linear):
    """Counts the tokens that it multiplies."""

    multiplied = 0

    def forward(self, x: Tensor) -> Tensor:
        self.multiplied += x.shape[0]
        return super().forward(x)


class Chain(nn.Module):
    """Two layers that read the same tensor and two that follow, the last of them called ``repeats`` times."""

    def __init__(self, repeats: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.o, self.down = (Counted(8, 8) for _ in range(4))
        self.repeats = repeats

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        y = self.o(torch.relu(self.q(x) * self.k(x)))
        for _ in range(0 if skip else self.repeats):
            y = self.down(y)
        return y


def gathered(
    chain: Chain, batches: list[Tensor], names: tuple[str, ...], stops: bool = True, skips: tuple[int, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    spec = LayerSpec(weight=WeightSpec(bits=4, group_size=8))
    matrices: dict[str, Matrix] = {
        matrix.key: matrix for name in names for matrix in matrices_of(name, chain.get_submodule(name), "linear", spec)
    }
    statistics = {key: Hessian(8) for key in matrices}
    gathering = Gathering(chain, matrices, statistics)
    with torch.no_grad(), gathering.listening():
        for index, x in enumerate(batches):
            with gathering.batch(x, *(() if stops else (torch.zeros(index),))):  # no two batches are alike
                chain(x, skip=index in skips)
    return {key: statistics[gathering.alias.get(key, key)].matrix for key in statistics}, gathering.alias


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 8, generator=generator) for size in sizes]


def check(chain: Chain, data: list[Tensor], names: tuple[str, ...], skips: tuple[int, ...] = ()) -> dict[str, int]:
    """Statistics are the whole runs', bit for bit; returns the tokens that each layer multiplied."""
    found, alias = gathered(chain, data, names, skips=skips)
    counts = {name: layer.multiplied for name, layer in chain.named_children() if isinstance(layer, Counted)}
    whole, same = gathered(chain, data, names, stops=False, skips=skips)
    assert alias == same and all(torch.equal(found[key], whole[key]) for key in whole)
    return counts


def test_what_follows_the_last_input_is_left_out() -> None:
    counts = check(Chain(), batches(5, 5, 3, 3, 5), ("q", "k", "o", "down"))
    assert counts == {"q": 21, "k": 21, "o": 21, "down": 8}, "the last layer of the first batch of each shape"


def test_of_some_layers_only_what_leads_to_them_is_computed() -> None:
    counts = check(Chain(), batches(5, 5, 5), ("q", "k"))
    assert counts == {"q": 15, "k": 5, "o": 5, "down": 5}


def test_batches_run_to_their_end_where_a_layer_is_called_again() -> None:
    counts = check(Chain(repeats=2), batches(5, 5), ("q", "down"))
    assert counts["down"] == 20


def test_batches_run_to_their_end_where_a_layer_was_not_called() -> None:
    counts = check(Chain(), batches(5, 5, 5), ("q", "down"), skips=(0,))
    assert counts["down"] == 5, "of the second; only the third ends early"
