"""QuEST: learned rounding, input scales of each timestep, then finetuning of a few chosen layers."""

from hf_lowbit.method import Method
from hf_lowbit_quest.config import QuESTConfig

METHOD = Method(
    name="quest",
    config_class=QuESTConfig,
    recipe="hf_lowbit_quest.recipe:make_recipe",
    summary="learned rounding, 4- or 8-bit inputs with scales of each timestep, then chosen layers tuned",
    paper="QuEST: Low-bit Diffusion Model Quantization via Efficient Selective Finetuning (arXiv 2402.03666)",
    domains=("diffusion",),
    needs_data=True,
)

__all__ = ["METHOD", "QuESTConfig"]
