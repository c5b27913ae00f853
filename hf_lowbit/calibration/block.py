"""Block: what a method sees of one block while it is quantized."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.autocast import autocast
from hf_lowbit.calibration.calls import Calls
from hf_lowbit.calibration.gathering import Gathering
from hf_lowbit.calibration.low_rank import UNCOMPENSATED, BlockCompensation, Compensation, Rounding
from hf_lowbit.calibration.matrices import Matrix, matrices_of, why_without_inputs
from hf_lowbit.calibration.parallel import combine
from hf_lowbit.calibration.statistics import Hessian, Magnitude, Statistic
from hf_lowbit.calibration.store import TensorStore
from hf_lowbit.formats import PackedTensor
from hf_lowbit.nn import PackedModule
from hf_lowbit.nn.timestep import at_timestep
from hf_lowbit.plan import PlannedLayer, replace_module
from hf_lowbit.rounding.completing import round_completely
from hf_lowbit.rounding.store import stack

UNREACHED = "no token of the calibration data reaches it: rounded to nearest"
_S = TypeVar("_S", bound=Statistic)


class PackedParameter(NamedTuple):
    """What packing a parameter left behind: its relative error, and the factors of an adapter if there is one."""

    error: float
    adapter: tuple[Tensor, Tensor] | None = None


class Pack(Protocol):
    """Turns a matrix' codes into the packed parameter of its module."""

    def __call__(
        self,
        module: PackedModule,
        parameter: str,
        weight: Tensor,
        packed: PackedTensor,
        where: str,
        *,
        weighting: Tensor | list[Tensor | None] | None = None,
        factors: tuple[Tensor, Tensor] | None = None,
    ) -> PackedParameter:
        """See :func:`hf_lowbit.tensorwise.pack_parameter`."""


class Block:
    """One block, its float32 module and the data that runs through it.

    A method reads :attr:`matrices`, collects statistics, and calls :meth:`pack` for every matrix. A layer whose
    matrices are all packed is replaced at once, so that later statistics see it quantized.

    Attributes:
        name: in the model.
        module: the block itself, in float32; its layers are replaced one by one.
        matrices: key -> what is left to quantize or was quantized, in the order of definition.
        notes: key -> why a matrix was not quantized as the method would have it.
        seed: of whatever a method draws.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        layers: dict[str, PlannedLayer],
        calls: Calls,
        index: int,
        store: TensorStore,
        inputs: list[int],
        targets: list[int],
        pack: Pack,
        seed: int = 0,
        compensation: Compensation = UNCOMPENSATED,
        mixed_precision: bool = False,
    ) -> None:
        self.name, self.module, self.seed = name, module, seed
        self._mixed_precision = mixed_precision
        self._layers = dict(layers)
        self._calls, self._index, self._store, self._inputs, self._targets = calls, index, store, inputs, targets
        self._pack = pack
        self.matrices: dict[str, Matrix] = {}
        for layer, planned in layers.items():
            found = matrices_of(layer, module.get_submodule(layer), planned.kind, planned.spec)
            self.matrices.update({matrix.key: matrix for matrix in found})
        self._waiting: dict[str, PackedTensor] = {}  # until its layer is complete
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}  # likewise, a method's own
        self._compensation = BlockCompensation(self, compensation)
        self._finished: set[str] = set()
        self.done: dict[str, PackedParameter] = {}
        self.notes: dict[str, str] = {}

    def __len__(self) -> int:
        """Batches (of this process)."""
        return len(self._calls)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.module.parameters()).device

    def flowing(self, batch: int) -> Tensor | None:
        """What the quantized part of the model hands to this block, ``[sequences, tokens, channels]``."""
        return self._store.get(self._inputs[batch]).float() if self._inputs else None

    def target(self, batch: int) -> Tensor:
        """What the block of the float model returned for the batch. For methods that ask for targets."""
        return self._store.get(self._targets[batch]).float()

    def timestep(self, batch: int) -> Tensor | None:
        """Of a denoiser's samples in a batch, as the model is given it; None for a model without timesteps."""
        return self._calls.timesteps[batch]

    def arguments(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The block's arguments for a batch, from the quantized part of the model."""
        return self._calls.arguments(batch, self._index, self.flowing(batch), torch.float32)

    def output_of(self, value: Any) -> Tensor:
        """The tensor that flows on, of what the module returned."""
        return self._calls.output(self._index, value)

    def autocast(self) -> torch.autocast:
        """Within it the block computes as its method asked for (:attr:`hf_lowbit.method.Recipe.mixed_precision`)."""
        return autocast(self.device, self._mixed_precision)

    def run(self, batch: int) -> Tensor:
        """The block's output for a batch."""
        args, kwargs = self.arguments(batch)
        with self.autocast(), at_timestep(self.timestep(batch)):
            return self.output_of(self.module(*args, **kwargs))

    def hessians(self, keys: Collection[str] | None = None) -> dict[str, Hessian]:
        """Mean of x x^T of every matrix' inputs; one object for all that read the same input."""
        return self.collect(Hessian, keys)

    def magnitudes(self, keys: Collection[str] | None = None) -> dict[str, Magnitude]:
        """Mean and largest |x| per channel."""
        return self.collect(Magnitude, keys)

    @torch.no_grad()
    def collect(self, make: Callable[[int, torch.device], _S], keys: Collection[str] | None = None) -> dict[str, _S]:
        """Run all data and gather a statistic of the inputs of matrices that are still float.

        Args:
            make: channels, device -> an empty statistic.
            keys: of :attr:`matrices`; None for all.

        Returns:
            key -> statistic, the same object for matrices that read the same tensor; matrices without inputs (see
            :attr:`notes`) are left out.
        """
        wanted = [m for key, m in self.matrices.items() if (keys is None or key in keys) and key not in self._finished]
        for matrix in wanted:
            if reason := why_without_inputs(matrix):
                self.notes.setdefault(matrix.key, reason)
        return self.gather(make, [matrix.key for matrix in wanted if why_without_inputs(matrix) is None])

    @torch.no_grad()
    def gather(self, make: Callable[[int, torch.device], _S], keys: Collection[str]) -> dict[str, _S]:
        """:meth:`collect` for matrices that are float and have inputs, whatever is noted of them."""
        usable = {key: self.matrices[key] for key in keys}
        statistics = {key: make(matrix.weight.shape[1], self.device) for key, matrix in usable.items()}
        gathering = Gathering(self.module, usable, statistics)
        with gathering.listening():
            for batch in range(len(self)):
                args, kwargs = self.arguments(batch)
                with self.autocast(), gathering.batch(args, kwargs), at_timestep(self.timestep(batch)):
                    self.module(*args, **kwargs)
        alias = gathering.alias
        combine([statistic for key, statistic in statistics.items() if key not in alias])
        return {key: statistics[alias.get(key, key)] for key in statistics}

    @torch.no_grad()
    def pack(self, key: str, packed: PackedTensor, factors: tuple[Tensor, Tensor] | None = None) -> None:
        """Take a matrix' codes. With the last matrix of a layer, the packed layer takes the float one's place.

        Args:
            factors: A ``[branches * rank, columns]`` and B ``[rows, rank]`` of a low-rank branch that the method chose.
                Without, a layer with a rank gets those of what packing left of its weight; with a metric that needs
                inputs, these are collected as the block's first matrix is packed.
        """
        self._compensation.collect()
        self._waiting[key] = packed
        if factors is not None:
            self._factors[key] = factors
        self._finished.add(key)
        matrix = self.matrices[key]
        parts = [other for other in self.matrices.values() if other.layer == matrix.layer]
        if all(part.key in self._waiting for part in parts):
            self._replace(matrix, parts)

    def note(self, key: str, line: str) -> None:
        """Say one more thing about a matrix."""
        self.notes[key] = f"{self.notes[key]}; {line}" if key in self.notes else line

    def round_unreached(self, key: str) -> None:
        """Pack a matrix whose inputs the data does not show: an expert that no token chooses."""
        self.round_to_nearest(key, UNREACHED)

    def round_to_nearest(self, key: str, reason: str) -> None:
        """Pack a matrix without calibration, and say why."""
        self.notes[key] = reason
        matrix = self.matrices[key]
        self.pack(key, round_completely(matrix.weight, matrix.spec))

    def target_of_rounding(self, key: str, rounding: Rounding) -> Tensor:
        """What a method that rounds each matrix by itself has to round, ``[rows, columns]``: the weight, or with
        ``iterations`` that less the low-rank factors found in turns with it.
        """
        matrix = self.matrices[key]
        where, weighting = self.full_name(matrix.layer), self._compensation.weighting(matrix)
        return self._compensation.how.target(
            matrix.weight, matrix.skeleton, matrix.parameter, where, rounding, weighting
        )

    def full_name(self, layer: str) -> str:
        """Of a layer, in the model."""
        return ".".join(name for name in (self.name, layer) if name)

    @property
    def unpacked(self) -> list[str]:
        """Keys of the matrices that are still float."""
        return [key for key in self.matrices if key not in self._finished]

    def _replace(self, matrix: Matrix, parts: list[Matrix]) -> None:
        module, where = matrix.skeleton, self.full_name(matrix.layer)
        for parameter in module.packed_parameters:
            own = [part for part in parts if part.parameter == parameter]
            weight = getattr(module, parameter)
            repair = self._repair(own)
            tensors = [self._waiting.pop(part.key) for part in own]
            packed = tensors[0] if own[0].expert is None else stack(tensors)
            self.done[f"{where}.{parameter}"] = self._pack(module, parameter, weight, packed, where, **repair)
        if matrix.layer:
            replace_module(self.module, matrix.layer, module)
        else:
            self.module = module

    def _repair(self, parts: list[Matrix]) -> dict[str, Any]:
        """The factors of a parameter that its method chose, or the weighting with which they are to be found."""
        given = [self._factors.pop(part.key) for part in parts if part.key in self._factors]
        stacked = parts[0].expert is not None
        if given:
            a, b = ([pair[index] for pair in given] for index in range(2))
            return {"factors": (torch.stack(a), torch.stack(b)) if stacked else given[0]}
        weightings = [self._compensation.weighting(part) for part in parts]
        for part in parts:
            if reason := self._compensation.why_identity(part):
                self.note(part.key, reason)
            self._compensation.forget(part.key)
        if all(weighting is None for weighting in weightings):
            return {}
        return {"weighting": weightings if stacked else weightings[0]}
