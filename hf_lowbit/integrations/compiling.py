"""How transformers' `generate` compiles the decode step of a model with packed layers, so that it is fast on a CPU."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers.quantizers.auto  # noqa: F401  its import registers us, which takes all of compat: so it comes first
from torch import nn

from hf_lowbit.integrations.compat.transformers import compile_everywhere
from hf_lowbit.nn import keep_matrices

if TYPE_CHECKING:
    from transformers import CompileConfig


_CPP_SINCE = (2, 13)  # the first torch that was tried: its C++ calls our operators without Python


def compile_config(modules_stay: bool | nn.Module = False) -> CompileConfig:
    """For ``model.generate(..., cache_implementation="static", compile_config=compile_config())``, on every device.

    The step is one graph, in which packed layers that read the same input compute together, as they do in eager mode.
    Without a GPU the code around its kernels is C++, too, and attention of the new token is sums in float32.

    Args:
        modules_stay: the model's modules stay as they are from the first step on: no adapter is added, switched or
            removed, and no hook; nor do names of Python's modules come to mean something else (a patched function of
            transformers, hooks of all modules). torch then need not look at each of them before every token, which
            takes as long as a tenth to a quarter of a small model's step; and a change would not be noticed. Other
            arguments, caches and lengths are. Each model has graphs of its own; but where torch.compile has no
            ``isolate_recompiles``, models of one process share them: compile only one there. Instead of True, the
            model itself: then what its packed linear layers on a CPU store stays, too, once moved into large pages of
            memory, and is no longer handed over before every token. Once it is moved or replaced, graphs of it refuse
            to run; but what is put in the place of a layer's parameters by hand is not noticed.
    """
    from transformers import CompileConfig

    from hf_lowbit.kernels.angles import ComputeAnglesOnce
    from hf_lowbit.kernels.joining import JoinProducts
    from hf_lowbit.kernels.one_pass import OnePass
    from hf_lowbit.kernels.one_query import SumOneQuery

    passes = OnePass((JoinProducts(), SumOneQuery(), ComputeAnglesOnce()))
    options: dict[str, Any] = {"post_grad_custom_pre_pass": passes, "size_asserts": False}
    if torch.__version__ >= _CPP_SINCE and not torch.cuda.is_available():  # type: ignore[operator]
        options |= {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}  # the latter compiles in half the time
    if isinstance(modules_stay, nn.Module):
        keep_matrices(modules_stay)
    if modules_stay is not False:
        options["guard_filter_fn"] = _of_calls
    mode: Any = None  # torch takes a mode or options
    config = CompileConfig(fullgraph=True, mode=mode, options=options)
    compile_everywhere(config)
    if modules_stay is not False and "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        # What is still looked at does not tell two models apart. transformers passes on what the config has.
        vars(config)["isolate_recompiles"] = True
    return config


def _of_calls(guards: Sequence[Any]) -> list[bool]:
    """Which guards stay: those of a call's arguments and of torch's state, like whether it records gradients."""
    modules = torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards)
    names = torch.compiler.skip_guard_on_globals_unsafe(guards)
    return [of_module and of_name for of_module, of_name in zip(modules, names, strict=True)]
