"""Modules whose weight their owner reads directly, past the module's forward.

Some model code computes with ``self.dt_proj.weight`` or casts to ``self.wo.weight.dtype`` itself. A packed weight there
would be used as a matrix of integers. The owner's source says so, without a list of architectures.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from functools import cache
from typing import Any

from torch import nn

# Methods that never compute with the weights of a quantized model: initialisation, kernels of another device which
# check the type of what they are given, and diffusers' merging of projections, which fails loudly on integers.
_IGNORED_METHODS = re.compile(r".*init.*|.*cuda.*|.*triton.*|to|_apply|extra_repr|fuse_projections")
# Read only to hand them to a fused training kernel, which returns nothing where it is not installed and refuses
# integers where it is; every other path calls the module.
_FUSED_KERNEL_ONLY = {"MambaMixer": {"x_proj", "out_proj"}, "Mamba2Mixer": {"out_proj"}}
_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.device|_)")


def directly_read(owner: nn.Module, child: str) -> bool:
    """True when a method of ``owner`` reads ``self.<child>.weight``."""
    owner_class: Any = type(owner)  # mypy takes a module class for unhashable
    return child in _children_read(owner_class) - _FUSED_KERNEL_ONLY.get(type(owner).__name__, set())


@cache
def _children_read(owner: Any) -> frozenset[str]:
    children: set[str] = set()
    for cls in owner.__mro__:
        if cls.__module__.startswith("torch.") or not issubclass(cls, nn.Module) or cls is nn.Module:
            continue
        for name, member in vars(cls).items():
            function = inspect.unwrap(member) if callable(member) else None
            if inspect.isfunction(function) and not _IGNORED_METHODS.fullmatch(name):
                children.update(_READ.findall(_source(function)))
    return frozenset(children)


def _source(function: object) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""
