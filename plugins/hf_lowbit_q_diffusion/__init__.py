"""Q-Diffusion: learned rounding, static inputs from whole denoising trajectories, and split skip connections."""

from hf_lowbit.method import Method
from hf_lowbit_q_diffusion.config import QDiffusionConfig

METHOD = Method(
    name="q_diffusion",
    config_class=QDiffusionConfig,
    recipe="hf_lowbit_q_diffusion.recipe:make_recipe",
    summary="learned rounding and static 8-bit inputs; layers that read a skip connection have scales for each half",
    paper="Q-Diffusion: Quantizing Diffusion Models (arXiv 2302.04304)",
    domains=("diffusion",),
    needs_data=True,
)

__all__ = ["METHOD", "QDiffusionConfig"]
