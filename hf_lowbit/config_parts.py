"""The parts of a config that are configs themselves, and the error of all of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from hf_lowbit.compensation import METRICS
from hf_lowbit.formats import SpecError, WeightSpec
from hf_lowbit.nn.factors import check_factor_bits
from hf_lowbit.suggestion import suggest

if TYPE_CHECKING:
    from hf_lowbit.config import LowbitConfig

_KEEP = ("branch", "adapter", "fused")


class ConfigError(ValueError):
    """A configuration that cannot be: unknown or out-of-range fields. Raised before any weight is read."""


@dataclass(frozen=True)
class LowRankConfig:
    """Low-rank compensation of the rounding error: W is replaced by Q(W) + B A.

    Attributes:
        rank: r of A ``[r, in]`` and B ``[out, r]``; with ``budget_bits`` the largest that a layer may get.
        budget_bits: most bits per weight in all (codes, scales and factors) over the quantized layers; ranks are then
            chosen per layer. None: every layer has ``rank``.
        metric: what the factors minimise, of :data:`hf_lowbit.compensation.METRICS`. "identity", the weight's error,
            needs no data; "mean_abs", "diag" and "full" weight it by the layer's inputs, "full" (QERA-exact, EoRA)
            being the error of its output.
        iterations: of rounding and factors in turns (LoftQ, arXiv 2310.08659), of which the best is kept. For methods
            that round a matrix by itself.
        factor_bits: 16, or 8 or 4: factors are codes themselves, with a scale per group (LQER, CALDERA).
        keep: "branch": inside the packed layer, saved and reloaded with it; "adapter": a PEFT adapter, attached at
            once and saved beside the packed base in ``lowbit_adapter/``; "fused": trained block by block and added to
            the weight before it is rounded (QLLM, arXiv 2310.08041), so that nothing is stored.
    """

    rank: int = 32
    budget_bits: float | None = None
    metric: str = "identity"
    iterations: int = 1
    factor_bits: int = 16
    keep: str = "branch"

    def __post_init__(self) -> None:
        for name in ("rank", "iterations"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"low_rank.{name} must be a positive integer, not {getattr(self, name)!r}")
        budget = self.budget_bits
        if budget is not None and (type(budget) not in (int, float) or not 0 < budget <= 16):
            raise ConfigError(f"low_rank.budget_bits must be a number of bits between 0 and 16, not {budget!r}")
        for name, allowed in (("metric", tuple(METRICS)), ("keep", _KEEP)):
            if getattr(self, name) not in allowed:
                raise ConfigError(_unknown(name, getattr(self, name), allowed))
        try:
            check_factor_bits(self.factor_bits)
        except SpecError as error:
            raise ConfigError(f"low_rank.{error}") from None
        if self.keep == "adapter" and self.factor_bits != 16:
            raise ConfigError(
                f'low_rank.factor_bits={self.factor_bits} needs keep="branch": a PEFT adapter holds floats'
            )
        if self.keep == "fused":
            self._check_fused()

    def _check_fused(self) -> None:
        defaults = {"metric": "identity", "iterations": 1, "factor_bits": 16, "budget_bits": None}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise ConfigError(
                    f'low_rank.{name}={getattr(self, name)!r} has no meaning with keep="fused", whose factors are '
                    f'trained on the outputs of blocks and stored nowhere; use {name}={default!r}, or keep="branch"'
                )

    @property
    def needs_data(self) -> bool:
        """Whether factors, or ranks within a budget, depend on inputs: all but one rank of the metric "identity" do."""
        return self.metric != "identity" or self.keep == "fused" or self.budget_bits is not None


@dataclass(frozen=True)
class TuningConfig:
    """End-to-end tuning after a calibrated method: scales and norms are trained until the quantized model predicts what
    the float one did (:mod:`hf_lowbit.calibration.tuning`). Codes stay, and nothing is added to the file.

    Attributes:
        epochs: passes over the calibration data.
        learning_rate: of Adam, for the logarithm of each scale and for norms relative to their size.
        samples: of each step.
    """

    epochs: int = 2
    learning_rate: float = 1e-3
    samples: int = 2

    def __post_init__(self) -> None:
        for name in ("epochs", "samples"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"tuning.{name} must be a positive integer, not {getattr(self, name)!r}")
        rate = self.learning_rate
        if type(rate) not in (int, float) or not 0 < rate < 1:
            raise ConfigError(f"tuning.learning_rate must lie between 0 and 1, not {rate!r}")


def check_absorbs(weight: WeightSpec) -> None:
    """Raise ConfigError for a format whose values are not known while a correction is trained to be fused into it."""
    reason = None
    if weight.format == "fp":
        reason = "the split of format 'fp' is searched for the finished weight; give format='fp_eXmY'"
    elif weight.is_open:
        reason = "the exponent of format 'power' is searched for the finished weight; give exponent=..."
    elif weight.has_fitted_table:
        reason = "the table of format 'codebook' is fitted to the finished weight; give codebook=[...]"
    if reason is not None:
        raise ConfigError(
            f'low_rank.keep="fused" trains a correction through the rounding, and {reason}, or use keep="branch"'
        )


def check_field_names(cls: type, values: dict[str, object], where: str = "") -> None:
    """Raise ConfigError for a key of ``values`` that is no field of ``cls``, naming the closest one."""
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            hint = suggest(name, known, "known fields")
            raise ConfigError(f"{cls.__name__} has no field {f'{where}.' if where else ''}{name}; {hint}")


def _unknown(name: str, value: object, allowed: tuple[str, ...]) -> str:
    return f"low_rank.{name}={value!r} is not supported; {suggest(value, allowed, 'supported')}"


def check_activations(config: LowbitConfig) -> None:
    """Raise ConfigError for fields about quantized inputs that say nothing without others."""
    asked = config.activation_bits is not None or config.activation_format is not None
    for name, default, needs in (
        ("activation_symmetric", True, "activation_bits"),
        ("activation_group_size", None, "activation_bits or activation_format"),
        ("activation_static", False, "activation_bits or activation_format"),
        ("activation_timesteps", False, "activation_bits or activation_format, and activation_static=True"),
        ("activation_shift", False, "activation_format, and activation_static=True"),
    ):
        if not asked and (value := getattr(config, name)) != default:
            raise ConfigError(f"{type(config).__name__}: {name}={value} needs {needs}")
    percentile = config.activation_percentile
    if type(percentile) not in (int, float) or not 0 < percentile <= 100:
        raise ConfigError(
            f"{type(config).__name__}: activation_percentile must lie above 0 and at most at 100, not {percentile!r}"
        )
    if percentile != 100 and not config.has_static_inputs:
        raise ConfigError(
            f"{type(config).__name__}: activation_percentile={percentile} needs activation_static=True: scales that "
            "are made as inputs come cover all of them"
        )
