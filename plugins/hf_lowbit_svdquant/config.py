"""SVDQuantConfig."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from hf_lowbit.config import ConfigError, LowbitConfig, LowRankConfig, MethodName
from hf_lowbit.formats.spec import GroupSize
from hf_lowbit.nn import LayerSpec
from hf_lowbit.plan.denoiser_names import EMBEDDERS, MODULATION, OUTPUT
from hf_lowbit.plan.patterns import check_patterns, first_match


@dataclass(kw_only=True, repr=False)
class SVDQuantConfig(LowbitConfig):
    """SVDQuant (arXiv 2411.05007): W4A4 in groups of 64, with a branch of rank 32.

    ``activation_bits=None`` leaves inputs as they are (W4A16). ``low_rank`` takes ``rank`` and ``factor_bits``; None is
    smoothing and rounding to nearest.

    Attributes:
        inputs_to_not_convert: names or regular expressions of layers whose inputs stay as they are. By default those
            of a denoiser that read the timestep's embedding, embed inputs, or make the output, as in the authors'
            export [ours: their weights are coded, where the authors leave all but the modulation at 16 bits].
        smooth_steps: n of the exponents k / n that smoothing tries, two scales each; 1 leaves it out.
        iterations: at most, of branch and codes in turns; the first that does not help ends them. 1 is the paper's
            algorithm, 100 its code's.
        gptq: choose the codes of what the branch leaves by GPTQ.
        share_branch: layers that read the same input have one A, from one decomposition.
    """

    quant_method: ClassVar[MethodName] = MethodName("lowbit_svdquant")  # type: ignore[misc]
    fits_rank: ClassVar[bool] = True

    group_size: GroupSize = 64
    activation_bits: int | None = 4
    activation_group_size: int | None = 64
    low_rank: LowRankConfig | None = field(default_factory=LowRankConfig)
    inputs_to_not_convert: list[str] = field(default_factory=lambda: [EMBEDDERS, MODULATION, OUTPUT])
    smooth_steps: int = 20
    iterations: int = 100
    gptq: bool = False
    share_branch: bool = True

    def __post_init__(self) -> None:
        if self.activation_bits is None and self.activation_format is None:  # inputs have no groups either
            self.activation_group_size = None
        super().__post_init__()
        for name in ("smooth_steps", "iterations"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"SVDQuantConfig: {name} must be a positive integer, not {getattr(self, name)!r}")
        for name in ("gptq", "share_branch"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"SVDQuantConfig: {name} must be True or False, not {getattr(self, name)!r}")
        if self.activation_static:
            raise ConfigError(
                "SVDQuantConfig: activation_static must be False: SVDQuant's inputs have scales per token"
            )
        self._check_low_rank()
        try:
            self.inputs_to_not_convert = [*self.inputs_to_not_convert]
            check_patterns(self.inputs_to_not_convert)
        except (TypeError, ValueError) as problem:
            raise ConfigError(f"SVDQuantConfig: inputs_to_not_convert: {problem}") from None

    def layer_spec(self, name: str) -> LayerSpec:
        """The specification of the module called ``name``, of full precision inputs where they are asked for."""
        spec = super().layer_spec(name)
        return spec if first_match(self.inputs_to_not_convert, name) is None else replace(spec, activation=None)

    def _check_low_rank(self) -> None:
        """The branch is the method's own: what compensation would do beside it is refused."""
        defaults = {"metric": "identity", "iterations": 1, "budget_bits": None, "keep": "branch"}
        for name, only in defaults.items():
            if self.low_rank is not None and (given := getattr(self.low_rank, name)) != only:
                raise ConfigError(
                    f"SVDQuantConfig: low_rank.{name} must be {only!r}, not {given!r}: the branch comes from the "
                    "weight before it is rounded; to repair what rounding lost take another method, such as gptq"
                )
