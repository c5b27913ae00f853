"""QuESTConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit.config import ConfigError, MethodName
from hf_lowbit.config_adaptive import AdaptiveConfig, check_split
from hf_lowbit.formats.spec import GroupSize
from hf_lowbit.plan.patterns import check_patterns

_GROUP = 32
_RATE, _MOST = 1e-5, 2e-4  # of weights: the paper's, and in short runs at most [ours]
_TRAVEL = 0.02  # [ours] rate times steps, where that allows: about the step of a 4-bit weight


@dataclass(kw_only=True, repr=False)
class QuESTConfig(AdaptiveConfig):
    """QuEST (arXiv 2402.03666): W4A8, a table of input scales by timestep, and finetuning of chosen layers.

    ``activation_bits=4`` is W4A4. Its inputs have groups of 32, and its weights the same groups, where none are given
    [ours: the authors' code has one scale for each input channel, which no integer product can factor out; the paper's
    figures of W4A4 are simulations of it]. ``epochs=0`` is the start without finetuning.

    Attributes:
        split: layers that read a concatenation, the shortcuts of a U-Net's decoder, have scales of their own for each
            part of it, as in Q-Diffusion (arXiv 2302.04304), whose code the authors start from.
        search_inputs: ranges of inputs with the least sum of |x - x_hat|^2.4; False: from the smallest to the largest.
        per_timestep_scales: layers that read the time embedding have a scale for each timestep, as in the authors'
            code; False: one for all, as the paper says.
        end_bits: of the inputs of the first and the last layer, at least; with one scale for all of it, as in the
            authors' code.
        time_layers: names or regular expressions of the layers of the first stage; None: all whose input changes with
            the timestep but not with the sample. (The authors' code takes the projections in residual blocks.)
        sensitive_layers: those of the second stage; None: feed-forward layers ("ff.net", as in the authors' setting for
            Stable Diffusion), in a model without them the query, key and value projections (theirs for unconditional
            models).
        epochs: passes over the data in each stage, of which the best is kept. The authors take 20 in the second, and 50
            to 400 for each timestep in the first, one timestep after the other; here they are mixed [ours].
        step_samples: samples of each step, all of one timestep; 4 in the authors' code.
        weight_rate: of Adam, for weights and biases. None: the paper's 1e-5; in runs of fewer than 2,000 steps 0.02
            over their number, at most 2e-4, so that a weight can reach the next code [ours].
        time_input_rate, input_rate: the same for input scales, of time layers in the first stage (1e-5 in the authors'
            code) and of all others in the second (1e-4).
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_quest")  # type: ignore[misc,assignment]

    group_size: GroupSize = None
    activation_bits: int | None = 8
    activation_symmetric: bool = False
    activation_static: bool = True
    activation_timesteps: bool = True
    split: bool = True
    search_inputs: bool = True
    per_timestep_scales: bool = True
    end_bits: int = 8
    time_layers: list[str] | None = None
    sensitive_layers: list[str] | None = None
    epochs: int = 4
    step_samples: int = 4
    weight_rate: float | None = None
    time_input_rate: float = 1e-5
    input_rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.activation_bits in (4, 6) and self.activation_group_size is None and self.group_size is None:
            self.activation_group_size = self.group_size = _GROUP
        super().__post_init__()
        for name in ("split", "search_inputs", "per_timestep_scales"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"QuESTConfig: {name} must be True or False, not {getattr(self, name)!r}")
        for name, least in (("epochs", 0), ("step_samples", 1)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ConfigError(
                    f"QuESTConfig: {name} must be an integer of at least {least}, not {getattr(self, name)!r}"
                )
        for name in ("weight_rate", "time_input_rate", "input_rate"):
            value = getattr(self, name)
            if (value is not None or name != "weight_rate") and not (type(value) in (int, float) and 0 < value < 1):
                raise ConfigError(f"QuESTConfig: {name} must be a number between 0 and 1, not {value!r}")
        if self.end_bits not in (4, 6, 8):
            raise ConfigError(f"QuESTConfig: end_bits must be 4, 6 or 8, not {self.end_bits!r}")
        check_split(self, self.split)
        self._check_inputs()
        self._check_patterns()

    def rate_of_weights(self, steps: int) -> float:
        """In a stage of so many steps."""
        return self.weight_rate or min(_MOST, max(_RATE, _TRAVEL / max(1, steps)))

    def _check_inputs(self) -> None:
        if self.activation_bits is None or self.activation_format not in (None, "int"):
            raise ConfigError(
                "QuESTConfig: inputs must be quantized to activation_bits=4, 6 or 8 of 'int': their scales are what is "
                "trained; for weights alone take the method 'adaround'"
            )
        if not self.activation_static or not self.activation_timesteps:
            raise ConfigError(
                "QuESTConfig: activation_static and activation_timesteps must be True: the scales of each timestep are "
                "what is trained; for other inputs take the method 'adaround' or 'q_diffusion'"
            )
        if self.search_inputs and self.activation_percentile != 100:
            raise ConfigError(
                f"QuESTConfig: activation_percentile={self.activation_percentile} is for ranges that are not searched: "
                "use search_inputs=False with it"
            )

    def _check_patterns(self) -> None:
        for name in ("time_layers", "sensitive_layers"):
            patterns = getattr(self, name)
            if patterns is None:
                continue
            if not isinstance(patterns, list | tuple) or not patterns:
                raise ConfigError(f"QuESTConfig: {name} must be a list of names or regular expressions, or None")
            try:
                check_patterns(patterns)
            except ValueError as error:
                raise ConfigError(f"QuESTConfig: {name}: {error}") from None
            setattr(self, name, list(patterns))
