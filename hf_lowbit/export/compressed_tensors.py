"""Writing the folder: transformers saves the packed model, and its tensors are stored under their other names."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor

from hf_lowbit.export.reading import check_loads
from hf_lowbit.export.scheme import ExportError, Scheme
from hf_lowbit.export.tensors import compressed
from hf_lowbit.formats import PackedTensor
from hf_lowbit.nn import PackedExperts, PackedModule
from hf_lowbit.output import save_complete
from hf_lowbit.plan import packed_modules

_OURS = re.compile(r"README\.md|lowbit_report\.json|.*\.safetensors(\.index\.json)?")


def write(model: Any, schemes: dict[str, Scheme], config: dict[str, Any], staged: Path, source: str | None) -> None:
    """Fill an empty folder with weights, config and, if there is a source, its tokenizer or processor.

    transformers names the tensors and splits fused experts, as for any save; which matrix a stored tensor is, is then
    found by its name, or by its codes for an expert.

    Raises:
        ExportError: a stored tensor that cannot be attributed, or a result that transformers does not load.
    """
    with tempfile.TemporaryDirectory(dir=staged.parent) as scratch:
        plain = Path(scratch)
        save_complete(model, plain, source)
        tensors = _rename(_stored(plain), packed_modules(model), schemes, model.dtype)
        save_torch_state_dict(tensors, staged, metadata={"format": "pt"})
        for path in plain.iterdir():
            if path.is_file() and not _OURS.fullmatch(path.name):
                shutil.move(path, staged / path.name)
    values = json.loads((staged / "config.json").read_text(encoding="utf-8"))
    values["quantization_config"] = config
    (staged / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    check_loads(model, staged)


def _stored(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def _rename(
    stored: Iterator[tuple[str, Tensor]],
    modules: dict[str, PackedModule],
    schemes: dict[str, Scheme],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    companions = {f"{name}.{key}" for name, module in modules.items() for key in _companions(module)}
    result: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, tensor in stored:
        owner, _, parameter = name.rpartition(".")
        if tensor.is_floating_point() or parameter == "bias":
            result[name] = tensor
        elif owner in modules and parameter in modules[owner].packed_parameters and not _is_experts(modules[owner]):
            matrix = modules[owner].packed(parameter)
            result |= {f"{owner}.{key}": value for key, value in compressed(matrix, schemes[owner], dtype).items()}
            written.add(id(matrix.weight))
        elif name in companions:
            continue
        elif (stack := _stack_of(owner, modules)) is not None:
            if parameter == "weight":
                matrix = _expert_matrix(name, tensor, stack, modules[stack])
                result |= {f"{owner}.{key}": value for key, value in compressed(matrix, schemes[stack], dtype).items()}
        else:
            result[name] = tensor
    _check_complete(result, written, modules)
    return result


def _companions(module: PackedModule) -> list[str]:
    return [key for name in module.packed_parameters for key in module.companion_shapes(name) if key != name]


def _is_experts(module: PackedModule) -> bool:
    return isinstance(module, PackedExperts)


def _stack_of(owner: str, modules: dict[str, PackedModule]) -> str | None:
    """The fused experts that ``owner`` ("...experts.3.up_proj") is a projection of."""
    name = owner.rpartition(".")[0].rpartition(".")[0]
    return name if name in modules and _is_experts(modules[name]) else None


def _expert_matrix(name: str, codes: Tensor, stack: str, experts: PackedModule) -> PackedTensor:
    """The packed matrix with these codes: gate, up or down of one expert. Each architecture names them its own way."""
    index = int(name.removeprefix(f"{stack}.").partition(".")[0])
    gate_up = experts.packed("gate_up_proj")[index]
    half = gate_up.weight.shape[0] // 2
    parts = (gate_up.rows(slice(half)), gate_up.rows(slice(half, None)), experts.packed("down_proj")[index])
    found = [part for part in parts if torch.equal(part.weight.cpu(), codes)]
    if len(found) != 1:
        raise ExportError(f"{name}: {len(found)} of this expert's projections have these codes, so it cannot be split")
    return found[0]


def _check_complete(result: dict[str, Tensor], written: set[int], modules: dict[str, PackedModule]) -> None:
    """Every packed matrix must be there: names on disk may be others than those of the modules."""
    for name, module in modules.items():
        if isinstance(module, PackedExperts):
            packed = [key for key in result if key.startswith(f"{name}.") and key.endswith(".weight_packed")]
            complete = len(packed) == 3 * module.num_experts
        else:
            complete = all(id(module.packed(parameter).weight) in written for parameter in module.packed_parameters)
        if not complete:
            raise ExportError(f"{name}: the model is saved under other names than its modules', or its experts fused")
