"""The information-elastic connection of IR-QLoRA (arXiv 2402.05445, section 3.3): skip paths inside LoRA.

h = A x + beta1 pool(x), y += scaling * (B h + beta2 repeat(h)): the adapter also sees averages of its input, and hands
its narrow vector on. Both are linear, blocks P1 ``[r, in]`` and P2 ``[out, r]``, so that the connection is a LoRA with
A' = A + beta1 P1 and B' = B + beta2 P2. That is how it is computed, on packed and on float layers alike: PEFT reads A'
and B' wherever it reads A and B (forward, merging, DoRA), and what it saves are A' and B', an ordinary LoRA that loads
without hf_lowbit. beta1 and beta2 are saved beside them, as ``elastic_beta``, for training to continue.

Where r does not divide a width, the blocks are gcd(r, width), and repeated in place [recall: the paper tiles them].
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import peft.tuners.lora.model  # noqa: F401  its import registers us, which takes all of compat: so it comes first
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_lowbit.integrations.compat import peft as compat

_BETA = "elastic_beta"  # beside the weight, in state dicts
_FILE = "adapter_model.safetensors"


class ElasticConnection(nn.Module):
    """A LoRA factor with its skip path: W + beta P.

    Attributes:
        beta: the only parameter, ``[1, 1]`` (PEFT takes vectors for shards), zero at first: plain LoRA.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(1, 1, dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """The factor that LoRA computes with."""
        return weight + _path(weight, self.beta)


def block_average(rows: int, columns: int, device: torch.device | str | None = None) -> Tensor:
    """P: ``[rows, columns]`` float32, averages of gcd(rows, columns) blocks of the input, each repeated for its rows.

    ``[r, in]`` with r | in is the mean over the last dimension of x ``[r, in / r]``; ``[out, r]`` with r | out repeats
    each of the r values out / r times.
    """
    blocks = math.gcd(rows, columns)
    row, column = (torch.arange(size, device=device) * blocks // size for size in (rows, columns))
    return (row.unsqueeze(1) == column).float() * (blocks / columns)


def add_elastic_connection(
    model: nn.Module, adapter_name: str = "default", folder: str | os.PathLike[str] | None = None
) -> list[str]:
    """Give every linear LoRA layer of an adapter the elastic connection, to be trained with it.

    Call it after ``get_peft_model`` or ``PeftModel.from_pretrained``. The model computes what it did before: both betas
    are zero, or those of ``folder`` taken out of A' and B' again.

    Args:
        model: with the adapter; changed in place.
        adapter_name: of the adapter.
        folder: a saved adapter that was trained with the connection and is loaded already.

    Returns:
        Names of the layers.

    Raises:
        ValueError: no linear layer has the adapter, one has the connection already, or ``folder`` holds no betas.
    """
    layers = _lora_layers(model, adapter_name)
    betas = {} if folder is None else _saved_betas(Path(folder))
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            factor = getattr(layer, part)[adapter_name]
            if parametrize.is_parametrized(factor, "weight"):
                raise ValueError(f"{name} has the elastic connection already")
            parametrize.register_parametrization(factor, "weight", ElasticConnection(factor.weight))
            factor.register_state_dict_post_hook(_save_plain)
            factor.register_load_state_dict_pre_hook(_load_plain)
            if folder is not None:
                _take_out(factor, betas, name, part, Path(folder))
    return list(layers)


def remove_elastic_connection(model: nn.Module, adapter_name: str = "default") -> list[str]:
    """Merge the connection into A and B, exactly, and leave a plain LoRA.

    Returns:
        Names of the layers; those without a connection are left alone.
    """
    removed = []
    for name, layer in _lora_layers(model, adapter_name).items():
        factors = [getattr(layer, part)[adapter_name] for part in ("lora_A", "lora_B")]
        for factor in (factor for factor in factors if parametrize.is_parametrized(factor, "weight")):
            parametrize.remove_parametrizations(factor, "weight", leave_parametrized=True)
            removed.append(name)
    return list(dict.fromkeys(removed))


def _lora_layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, compat.Linear) and adapter_name in m.lora_A}
    if not found:
        raise ValueError(f"no linear layer of this {type(model).__name__} has a LoRA adapter called {adapter_name!r}")
    return found


def _save_plain(factor: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State dicts hold the factor with its path, under the name that plain LoRA has, and beta."""
    if f"{prefix}parametrizations.weight.original" not in state:
        return
    weight = state.pop(f"{prefix}parametrizations.weight.original")
    state[f"{prefix}{_BETA}"] = state.pop(f"{prefix}parametrizations.weight.0.beta")
    state[f"{prefix}weight"] = weight + _path(weight, state[f"{prefix}{_BETA}"])


def _load_plain(factor: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The inverse of :func:`_save_plain`; without a beta it is zero, and the factor as it comes."""
    if not parametrize.is_parametrized(factor, "weight") or f"{prefix}weight" not in state:
        return
    weight = state.pop(f"{prefix}weight")
    beta = state.pop(f"{prefix}{_BETA}", torch.zeros(1, 1, dtype=weight.dtype))
    state[f"{prefix}parametrizations.weight.original"] = weight - _path(weight, beta)
    state[f"{prefix}parametrizations.weight.0.beta"] = beta


def _path(weight: Tensor, beta: Tensor) -> Tensor:
    """What is added to a factor: beta P."""
    rows, columns = weight.shape
    return beta.to(weight) * block_average(rows, columns, weight.device).to(weight.dtype)


def _saved_betas(folder: Path) -> dict[str, Tensor]:
    path = folder / _FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no {_FILE}")
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.endswith(_BETA)}  # noqa: SIM118


@torch.no_grad()
def _take_out(factor: Any, betas: dict[str, Tensor], name: str, part: str, folder: Path) -> None:
    ending = f"{name}.{part}.{_BETA}"
    # Names begin at the model that has the adapter, keys at the PEFT model that it would be in.
    beta = next((tensor for key, tensor in betas.items() if f".{key}".endswith(f".{ending}")), None)
    if beta is None:
        raise ValueError(f"{folder} has no {_BETA} for {name}: it was not trained with the elastic connection")
    connection = factor.parametrizations.weight
    connection[0].beta.copy_(beta)
    connection.original.sub_(_path(connection.original, connection[0].beta))
