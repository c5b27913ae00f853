"""Sites: where a scale per channel can be folded between the layers of a block, found by trying [ours].

No class per architecture. A norm or a linear layer has its outputs divided by a random scale, and the block runs on
one captured call: the layers whose inputs are now the old ones divided by the very same scale read these outputs,
whatever views, copies, gathers or repeated heads lie between. Their columns are multiplied by it, and the site counts
only if the block returns what it did before. SmoothQuant's (arXiv 2211.10438) and AWQ's (arXiv 2306.00978) tables of
layers per model come out of this for their models.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_lowbit.calibration.trial import Trial, copy_call, first_floating
from hf_lowbit.transforms.fold import FoldError, expand_scale, fold_scale, input_channels, is_norm, output_channels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """One place for a scale.

    Attributes:
        previous: name in the block of the module whose outputs are divided.
        consumers: names of every module that reads them, layers to be quantized or not (routers), in call order.
        channels: of ``previous``, which is the length of the scale.
        repeat, head_dim: each head of ``previous`` is read ``repeat`` times (grouped-query attention).
        offset: the norm multiplies by 1 + weight.
        kind: what ``previous`` is.
    """

    previous: str | None
    consumers: tuple[str, ...]
    channels: int
    repeat: int = 1
    offset: bool = False
    kind: Literal["norm", "linear"] = "norm"
    head_dim: int | None = None


def fold_site(block: nn.Module, site: Site, scale: Tensor) -> None:
    """Fold a scale ``[site.channels]`` into a block's site, in place.

    Raises:
        FoldError: as :func:`hf_lowbit.transforms.fold_scale`, or a site without a previous module.
    """
    if site.previous is None:
        raise FoldError(f"nothing before {', '.join(site.consumers)} can be divided; divide their input at run time")
    consumers = [block.get_submodule(name) for name in site.consumers]
    shape: dict[str, Any] = {"repeat": site.repeat, "head_dim": site.head_dim, "offset": site.offset}
    fold_scale(block.get_submodule(site.previous), consumers, scale, **shape)


@torch.no_grad()
def find_sites(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layers: Collection[str], seed: int = 0
) -> list[Site]:
    """The sites of a block that at least one of ``layers`` reads from, in call order.

    The block itself is not touched: a copy of it (in float64 if it can) runs about three times per site and once or
    twice per other norm or layer, so a call of few tokens is best.

    A site is refused, and logged, when modules of its width lie idle in this call and nothing shows what they would
    read in another: experts that got no token are placed by their siblings, anything else is not guessed.

    Args:
        block: any module, float.
        args, kwargs: of one call of it.
        layers: names in the block of the layers to be quantized.
        seed: of the random scales.

    Raises:
        ValueError: the block returns NaN or infinite values on this call.
    """
    trial = Trial(block, args, kwargs)
    found = (_site(trial, name, layers, seed) for name in trial.order)
    return [site for site in found if site is not None]


def _site(trial: Trial, previous: str, layers: Collection[str], seed: int) -> Site | None:
    module = trial.modules[previous]
    channels = output_channels(module)
    if channels is None:
        return None
    norm = is_norm(module)
    widths = {name: input_channels(trial.modules[name]) or 0 for name in trial.inputs}
    fits = {name: w for name, w in widths.items() if w == channels or (not norm and w % channels == 0)}
    later = [name for name in trial.order[trial.order.index(previous) + 1 :] if name in fits]
    if not set(later) & set(layers):
        return None
    scale = _random_scale(channels, trial, seed)
    for offset in (False, True) if norm else (False,):
        layout, consumers, outputs = _consumers(trial, previous, later, scale, offset)
        if consumers:
            break
    if layout is None or not set(consumers) & set(layers):
        return None
    for name in trial.unread:
        if name not in fits or name in consumers:
            continue
        role = _role_of_idle(name, previous, consumers, trial)
        if role == "consumer":
            consumers.append(name)
        elif role is None and trial.is_dormant(name, _random_scale(widths[name], trial, seed)):
            logger.info("no site after %s: nothing shows what the idle %s would read", previous, name)
            return None
    repeat, head_dim = layout
    consumed = expand_scale(scale, repeat, head_dim)
    with trial.folded(None, consumers, scale, consumed):
        unbalanced = trial.run()
    if not trial.preserves(outputs, unbalanced):
        return None
    return Site(previous, tuple(consumers), channels, repeat, offset, "norm" if norm else "linear", head_dim)


Layout = tuple[int, int | None]  # repeat, head_dim


def _consumers(
    trial: Trial, previous: str, later: list[str], scale: Tensor, offset: bool
) -> tuple[Layout | None, list[str], list[Tensor]]:
    """How the consumers repeat the heads, who they are, and the block's outputs with everything folded.

    Folding what was found can bring more to light: experts get their own tokens back once the router is folded.
    """
    consumers: list[str] = []
    layout: Layout = (1, None)
    while True:
        layouts: dict[str, list[set[Layout]]] = {name: [] for name in later}

        def note(name: str, x: Tensor | None, layouts: dict[str, list[set[Layout]]] = layouts) -> None:
            calls, originals = layouts[name], trial.inputs[name]
            original = originals[len(calls)] if len(calls) < len(originals) else None
            calls.append(_layouts(x, original, scale, trial.tolerance))

        with trial.folded(previous, consumers, scale, expand_scale(scale, *layout), offset):
            outputs = trial.run(later, note)
        possible = {name: set.intersection(*calls) if calls else set() for name, calls in layouts.items()}
        new = [name for name in later if possible[name] and name not in consumers]
        if not new:
            return (layout if consumers else None), consumers, outputs
        fitting = set.intersection(*(possible[name] for name in new))
        if len(fitting) != 1 or (consumers and fitting != {layout}):
            return None, consumers, outputs  # heads that are read in several ways, or cannot be told apart
        layout = fitting.pop()
        consumers = [name for name in later if name in consumers or name in new]


def _layouts(x: Tensor | None, original: Tensor | None, scale: Tensor, tolerance: float) -> set[Layout]:
    """Every (repeat, head_dim) for which ``x`` is the original input divided by the scale, channel by channel."""
    if x is None or original is None or x.shape != original.shape or not bool(original.any()):
        return set()
    channels, repeat = len(scale), x.shape[-1] // len(scale)
    heads = [None] if repeat == 1 else [h for h in range(1, channels + 1) if channels % h == 0]
    new, old = x.reshape(-1, x.shape[-1]), original.reshape(-1, x.shape[-1])
    allowed = tolerance * old.norm(dim=0)
    return {
        (repeat, head)
        for head in heads
        if bool(((new * expand_scale(scale, repeat, head) - old).norm(dim=0) <= allowed).all())
    }


def _role_of_idle(name: str, previous: str, consumers: list[str], trial: Trial) -> Literal["consumer", "other"] | None:
    """What an idle module would be, judged by its siblings: modules whose names differ in one number only.

    All of its siblings read ``previous``, which lies outside of them: so would it (an expert that got no token). A
    sibling does not, or ``previous`` belongs to one of them: it would not. None: no sibling was called.
    """
    parts = name.split(".")
    known = None
    for other in trial.inputs:
        theirs = other.split(".")
        if other in trial.unread or len(theirs) != len(parts):
            continue
        differing = [i for i, (a, b) in enumerate(zip(parts, theirs, strict=True)) if a != b]
        if len(differing) != 1 or not (parts[differing[0]].isdigit() and theirs[differing[0]].isdigit()):
            continue
        within = f"{previous}.".startswith(".".join(theirs[: differing[0] + 1]) + ".")
        if other not in consumers or within:
            return "other"
        known = "consumer"
    return known  # type: ignore[return-value]


def _random_scale(channels: int, trial: Trial, seed: int) -> Tensor:
    """Positive, between 1/2 and 2, on the trial's device."""
    x = next(iter(trial.outputs))
    uniform = torch.rand(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (4**uniform / 2).to(x.device, x.dtype)


@torch.no_grad()
def shared_inputs(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layers: Collection[str]
) -> list[tuple[str, ...]]:
    """The layers in groups that read the very same input tensor (or views of the same values), in call order.

    Every layer is in exactly one group; layers that are not called come last, alone. Arguments as
    :func:`find_sites`.
    """
    read: dict[str, list[Any]] = {}
    kept: list[Tensor] = []  # alive, so that no address is used twice

    def note(name: str, call: Any) -> None:
        x = first_floating(call)
        if x is not None:
            kept.append(x)
            place = (x.data_ptr(), x.numel(), x.shape[-1:], x.stride()[-1:], x.dtype)
            read.setdefault(name, []).append((*place, None if x.is_inference() else x._version))

    training = [module for module in block.modules() if module.training]
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda m, a, k, name=name: note(name, (a, k)), with_kwargs=True
        )
        for name in layers
    ]
    try:
        block.eval()
        copied = copy_call(args, kwargs)
        block(*copied[0], **copied[1])
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    groups: dict[Any, list[str]] = {}
    for name, places in read.items():
        groups.setdefault(tuple(places), []).append(name)
    return [tuple(group) for group in groups.values()] + [(name,) for name in layers if name not in read]
