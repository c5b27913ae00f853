"""OmniQuant's learnable equivalent transformation (LET): scales and shifts of a block's sites, trained, then folded.

X' = (X - delta) / s, W' = W diag(s), b' = b + W delta (arXiv 2308.13137, equation 3). What is trained is what will be
stored: training computes with the very values that are written into the block at its end.

[ours]: the sites are those that are found by trying, whatever the architecture: also the input of an MLP's last layer
where a linear layer can be divided (the authors leave it out), and value heads that several query heads share (their
code refuses those). Scales are learned as logarithms, so that they stay positive. Inputs are shifted after norms alone,
where norm and consumers have biases. The authors' scale between queries and keys is left out: their product is not
quantized here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_lowbit.calibration.block import Block
from hf_lowbit.calibration.inspected import first_output
from hf_lowbit.calibration.matrices import Matrix
from hf_lowbit.calibration.scaling import (
    balancing_scale,
    block_sites,
    first_sequence,
    input_magnitude,
    keys_of,
    storable_scale,
)
from hf_lowbit.calibration.sites import Site
from hf_lowbit.calibration.statistics import Extremes, Magnitude
from hf_lowbit.rounding.learned.functions import replaced
from hf_lowbit.transforms.fold import expand_scale, input_weights

Values = dict[str, Tensor]  # name of a parameter in the block -> what it is now
_ALPHA = 0.5  # of the first scales, as the authors'


class EquivalentTransformation:
    """The learnable scales and shifts of one block, begun at SmoothQuant's scale and the middle of the inputs.

    Attributes:
        sites: where the scales are.
    """

    def __init__(self, block: Block, magnitudes: Mapping[str, Magnitude], lr_scale: float = 1.0) -> None:
        """Args:
            block: float still.
            magnitudes: of the inputs of its matrices.
            lr_scale: the learning rate of what is learned here, in units of the training's.

        Raises:
            ValueError: the block returns NaN or infinite values.
        """
        self._block, self._lr_scale = block, lr_scale
        self.sites: list[Site] = []
        self._logarithms: list[nn.Parameter] = []
        self._shifts: dict[int, nn.Parameter] = {}
        for site in block_sites(block):
            magnitude = input_magnitude(block, site, dict(magnitudes))
            if magnitude is None:
                continue
            if shifts_exactly(block, site):
                key = next(key for layer in site.consumers for key in keys_of(block, layer))
                extremes = block.collect(Extremes, [key])[key]
                self._shifts[len(self.sites)] = nn.Parameter((extremes.most + extremes.least) / 2)
            self.sites.append(site)
            self._logarithms.append(nn.Parameter(balancing_scale(block, site, magnitude, _ALPHA).log()))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is learned."""
        yield from ((f"scale.{index}", logarithm) for index, logarithm in enumerate(self._logarithms))
        yield from ((f"shift.{index}", shift) for index, shift in self._shifts.items())

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As a learned weight's; none for a block without sites."""
        learned = [parameter for _, parameter in self.named_parameters()]
        return [{"params": learned, "lr_scale": self._lr_scale}] if learned else []

    def scale(self, index: int) -> Tensor:
        """s of a site, float32 ``[channels]``, moved to where what it divides can be stored; differentiable."""
        scale = self._logarithms[index].exp()
        return replaced(scale, storable_scale(self._block.module, self.sites[index], scale.detach()).float())

    def shift(self, index: int) -> Tensor | None:
        """delta of a site, moved likewise; None where nothing is shifted."""
        if index not in self._shifts:
            return None
        shift, scale = self._shifts[index], self.scale(index).detach()
        bias = self._block.module.get_parameter(f"{self.sites[index].previous}.bias").detach()
        return replaced(shift, bias - ((bias - shift.detach()) / scale).bfloat16().float() * scale)

    def values(self, without: Collection[str] = ()) -> Values:
        """Every parameter of the block that the transformation changes, float32 and differentiable.

        Args:
            without: names of weights that need not be computed.
        """
        module, now = self._block.module, Values()
        for index, site in enumerate(self.sites):  # with weights that no scale has multiplied yet
            if (shift := self.shift(index)) is not None:
                _shift(module, site, shift, now)
        for index, site in enumerate(self.sites):
            _divide(module, site, self.scale(index), now, without)
            _multiply(module, site, self.scale(index), now, without)
        return now

    def rewriting(self, matrix: Matrix) -> Callable[[Tensor], Tensor]:
        """What the transformation makes of the weight ``[rows, columns]`` of a matrix."""
        numbered = list(enumerate(self.sites))
        is_first = matrix.key in keys_of(self._block, matrix.layer)
        columns = next((index for index, site in numbered if is_first and matrix.layer in site.consumers), None)
        rows = next((index for index, site in numbered if site.previous == matrix.layer), None)

        def rewrite(weight: Tensor) -> Tensor:
            if columns is not None:
                site = self.sites[columns]
                weight = weight * expand_scale(self.scale(columns), site.repeat, site.head_dim)
            return weight if rows is None else weight / self.scale(rows).unsqueeze(1)

        return rewrite

    @torch.no_grad()
    def fold_(self) -> None:
        """Write the values into the block, whose function stays the same."""
        for name, value in self.values().items():
            self._block.module.get_parameter(name).copy_(value)


@torch.no_grad()
def shifts_exactly(block: Block, site: Site) -> bool:
    """Whether what a norm hands on can be shifted: tried, on one sequence, where it and all consumers have biases."""
    module = block.module
    involved = [module.get_submodule(str(name)) for name in (site.previous, *site.consumers)]
    if site.kind != "norm" or not all(_has_bias(layer) for layer in involved):
        return False
    if not all(len(input_weights(layer)) == 1 for layer in involved[1:]):
        return False
    shift = torch.randn(site.channels, generator=torch.Generator().manual_seed(block.seed)).to(block.device)
    whole = Values()
    _shift(module, site, shift, whole)
    half = {f"{site.previous}.bias": whole[f"{site.previous}.bias"]}
    args, kwargs = first_sequence(block)
    old, shifted, moved = (first_output(functional_call(module, new, args, kwargs)) for new in (Values(), whole, half))
    return bool((shifted - old).norm() <= 1e-3 * (moved - old).norm())


def _shift(module: nn.Module, site: Site, shift: Tensor, now: Values) -> None:
    _update(module, f"{site.previous}.bias", now, lambda bias: bias - shift)
    for name in site.consumers:
        ((weight, dim),) = input_weights(module.get_submodule(name))
        through = torch.tensordot(shift, weight.detach(), dims=([0], [dim]))
        _update(module, f"{name}.bias", now, lambda bias, through=through: bias + through)


def _divide(module: nn.Module, site: Site, scale: Tensor, now: Values, without: Collection[str]) -> None:
    name, previous = f"{site.previous}.weight", module.get_submodule(str(site.previous))
    if site.kind == "norm":  # in float64: the quotient is a bfloat16 number that nothing may blur
        one, s = float(site.offset), scale.double()
        _update(module, name, now, lambda weight: ((weight.double() + one) / s - one).float())
    elif name not in without:
        along = scale.unsqueeze(1) if isinstance(previous, nn.Linear) else scale
        _update(module, name, now, lambda weight: weight / along)
    if _has_bias(previous):
        _update(module, f"{site.previous}.bias", now, lambda bias: bias / scale)


def _multiply(module: nn.Module, site: Site, scale: Tensor, now: Values, without: Collection[str]) -> None:
    consumed = expand_scale(scale, site.repeat, site.head_dim)
    for layer in site.consumers:
        owner = module.get_submodule(layer)
        names = {id(parameter): f"{layer}.{name}" for name, parameter in owner.named_parameters(recurse=False)}
        for parameter, dim in input_weights(owner):
            if (name := names[id(parameter)]) not in without:
                along = consumed.reshape([-1 if d == dim else 1 for d in range(parameter.dim())])
                _update(module, name, now, lambda weight, along=along: weight * along)


def _update(module: nn.Module, name: str, now: Values, change: Callable[..., Tensor]) -> None:
    name = name.removeprefix(".")
    now[name] = change(now[name] if name in now else module.get_parameter(name).detach())


def _has_bias(module: nn.Module) -> bool:
    return isinstance(getattr(module, "bias", None), nn.Parameter)
