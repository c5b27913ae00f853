"""One layer at a time, everything else float: what each width of its weights, and of its inputs, does to the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from hf_lowbit.allocation.coupled_groups import ScoredLayer
from hf_lowbit.calibration.divergence import SensitivityError
from hf_lowbit.calibration.progress import Progress
from hf_lowbit.calibration.splitting import grouped_by_part
from hf_lowbit.calibration.substitution import substituted
from hf_lowbit.formats import PackedTensor, WeightSpec
from hf_lowbit.nn import LayerSpec
from hf_lowbit.rounding import round_to_nearest
from hf_lowbit.rounding.parts import round_parts
from hf_lowbit.search.pipeline.groups import CONTENT
from hf_lowbit.search.pipeline.inputs import InputRange, quantized_inputs
from hf_lowbit.search.pipeline.judge import Judge
from hf_lowbit.search.pipeline.measurements import Measurements
from hf_lowbit.search.pipeline.subjects import Subject


class Sensitivity:
    """Scores of subjects, the higher the better: SSIM of content layers, SQNR in dB of the others."""

    def __init__(
        self, model: nn.Module, judge: Judge, ranges: Mapping[str, InputRange], measurements: Measurements
    ) -> None:
        self._model, self.ranges = model, ranges
        self.judge, self.known = judge, measurements

    def measure(self, subjects: Sequence[Subject]) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
        """Layer -> bits -> score, of weights and of inputs.

        Raises:
            SensitivityError: a width of one layer that makes the result NaN or infinite; the message names both.
        """
        weights: dict[str, dict[int, float]] = {}
        inputs: dict[str, dict[int, float]] = {}
        progress = Progress(len(subjects), "layer")
        for subject in subjects:
            name, restored = subject.name, True
            weights[name], inputs[name] = {}, {}
            for bits in subject.weights:
                key = f"weight {bits} {name}"
                restored &= key in self.known or len(subject.weights) == 1
                if len(subject.weights) > 1:
                    weights[name][bits] = self._score(key, subject, self.with_weights({name: bits}, [subject]))
                else:
                    weights[name][bits] = 0.0
            for bits in subject.inputs if name in self.ranges else ():
                key = f"inputs {bits} {name}"
                restored &= key in self.known
                inputs[name][bits] = self._score(key, subject, self.with_inputs({name: bits}))
            progress.step(name, restored)
        return weights, inputs

    def with_weights(
        self, bits: Mapping[str, int], subjects: Sequence[Subject]
    ) -> Callable[[], AbstractContextManager[None]]:
        """A context in which these layers have rounded weights."""
        chosen = [subject for subject in subjects if subject.name in bits]
        return partial(_rounded, self._model, [(subject, bits[subject.name]) for subject in chosen])

    def with_inputs(self, bits: Mapping[str, int | None]) -> Callable[[], AbstractContextManager[None]]:
        """A context in which these layers read rounded inputs."""
        return partial(quantized_inputs, self._model, bits, self.ranges)

    def _score(self, key: str, subject: Subject, changed: Callable[[], AbstractContextManager[None]]) -> float:
        def measure() -> float:
            with changed():
                content = subject.group == CONTENT
                return self.judge.similarity() if content else self.judge.noise_ratio()

        try:
            return self.known.get(key, measure)
        except SensitivityError as problem:
            what, bits, name = key.split(" ", 2)
            raise SensitivityError(f"{name} with {what} of {bits} bits: {problem}") from None


def scored(
    subjects: Sequence[Subject],
    sizes: Mapping[str, int],
    scores: Mapping[str, Mapping[int, float]],
    objective: str,
) -> list[ScoredLayer]:
    """Subjects for the integer program.

    Args:
        sizes: layer -> its part in the mean.
        scores: layer -> bits -> score.
        objective: "score": the sum of scores, as in the paper. "noise": the power of the noise, 10^(-dB/10), which adds
            up where layers are independent, as decibels do not; SSIM counts as it is.
    """
    return [
        ScoredLayer(
            sizes[subject.name],
            {bits: _value(score, subject.group, objective) for bits, score in scores[subject.name].items()},
        )
        for subject in subjects
    ]


def _value(score: float, group: str, objective: str) -> float:
    return -(10 ** (-score / 10)) if objective == "noise" and group != CONTENT else score


@contextmanager
def _rounded(model: nn.Module, chosen: Sequence[tuple[Subject, int]]) -> Iterator[None]:
    whole = {subject.name: subject.weights[bits] for subject, bits in chosen if subject.parts is None}
    with ExitStack() as stack:
        stack.enter_context(substituted(model, whole, round_to_nearest))
        for subject, bits in chosen:
            if subject.parts is not None:
                layer, rounding = subject.weights[bits], partial(_round_parts, widths=subject.parts)
                stack.enter_context(substituted(model, {subject.name: layer}, rounding))
        yield


def _round_parts(weight: Tensor, spec: WeightSpec, widths: tuple[int, ...]) -> PackedTensor:
    return round_parts(weight, grouped_by_part(LayerSpec(spec), widths).weight, widths, round_to_nearest)
