"""An example plugin: stochastic rounding, a method in one folder.

Round up or down at random, with the probability that makes the expected weight exact. It shows the parts of a method;
it is not one to recommend.
"""

from dataclasses import dataclass
from typing import ClassVar

from hf_lowbit import LowbitConfig, Method, MethodName


@dataclass(kw_only=True, repr=False)
class StochasticConfig(LowbitConfig):
    """LowbitConfig's fields; ``seed`` makes the rounding repeatable."""

    quant_method: ClassVar[MethodName] = MethodName("lowbit_stochastic")


METHOD = Method(
    name="stochastic",
    config_class=StochasticConfig,
    recipe="hf_lowbit_stochastic.recipe:make_recipe",
    summary="stochastic rounding: unbiased, noisier than nearest; an example",
    paper="Gupta et al. 2015, arXiv:1502.02551",
)
