"""Modules whose weight their owner reads directly, past the module's forward.

Some model code computes with ``self.dt_proj.weight`` or casts to ``self.wo.weight.dtype`` itself. A packed weight there
would be used as a matrix of integers. The owner's source says so, without a list of architectures.

One whose forward reads nothing of a weight but its type, as Mamba's of its head, can be told a float type
(:mod:`hf_lowbit.nn.stand_in`).
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
_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.device|_)(\.dtype\b)?")


def directly_read(owner: nn.Module, child: str) -> bool:
    """True when a method of ``owner`` reads ``self.<child>.weight``, or its type elsewhere than in forward."""
    owner_class: Any = type(owner)  # mypy takes a module class for unhashable
    return child in _children_read(owner_class)[0] - _FUSED_KERNEL_ONLY.get(type(owner).__name__, set())


def type_read(owner: nn.Module, child: str) -> bool:
    """True when ``owner``'s forward reads ``self.<child>.weight.dtype``, and no more of this weight is read."""
    owner_class: Any = type(owner)
    read, of_types = _children_read(owner_class)
    return child in of_types - read


@cache
def _children_read(owner: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Children whose weights are read, and those whose type is read in forward."""
    read: set[str] = set()
    of_types: set[str] = set()
    for cls in owner.__mro__:
        if cls.__module__.startswith("torch.") or not issubclass(cls, nn.Module) or cls is nn.Module:
            continue
        for name, member in vars(cls).items():
            function = inspect.unwrap(member) if callable(member) else None
            if inspect.isfunction(function) and not _IGNORED_METHODS.fullmatch(name):
                for child, is_type in _READ.findall(_source(function)):
                    (of_types if is_type and name == "forward" else read).add(child)
    return frozenset(read), frozenset(of_types)


def _source(function: object) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))  # type: ignore[arg-type]
    except (OSError, TypeError):
        return ""
