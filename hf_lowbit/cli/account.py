"""What a saved model stores: its report, checked against the headers of its files, or a count from headers and plan."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lowbit.cli.headers import StoredTensor, read_headers

if TYPE_CHECKING:
    from hf_lowbit.config import LowbitConfig
    from hf_lowbit.nn import LayerSpec
    from hf_lowbit.reporting import Report

_COMPANION = re.compile(r"_((scale|zero_point)(_range)?|table|low_rank_[ab](_scale)?|(transform|exact)_[a-z_0-9]+)$")
_CONFIG_FILES = ("config.json", "lowbit_config.json")


@dataclass
class Account:
    """One quantized model of a folder.

    Attributes:
        config: as stored.
        report: of quantization; made from headers and plan where the folder has none.
        reported: whether the report was there (and agrees with the files).
        file_bytes: bytes of all its tensors.
    """

    config: LowbitConfig
    report: Report
    reported: bool
    file_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the report with its totals, and what was checked."""
        source = (
            "report, verified against the weight files" if self.reported else "headers of the weight files and plan"
        )
        values = {"counted_from": source, "tensor_bytes": self.file_bytes}
        return {**self.report.to_dict(), **values, "source": self.config.provenance.get("source")}


def accounts(folder: Path) -> dict[str, Account]:
    """The quantized models of a folder: {"": account}, or one for each quantized component of a pipeline.

    Raises:
        FileNotFoundError, ConfigError: the folder holds no model that hf_lowbit quantized.
        CorruptWeightError: files that are damaged or contradict report or plan.
    """
    from hf_lowbit.config import ConfigError

    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}")
    if not (folder / "model_index.json").is_file():
        return {"": _account(folder)}
    parts = sorted(path.parent for path in folder.glob("*/config.json") if _is_quantized(path))
    if not parts:
        raise ConfigError(f"{folder} is a pipeline without a component that hf_lowbit quantized")
    return {path.name: _account(path) for path in parts}


def _account(folder: Path) -> Account:
    from hf_lowbit.nn import CorruptWeightError
    from hf_lowbit.reporting import REPORT_FILE, Report

    config = read_config(folder)
    tensors = read_headers(folder)
    packed = _packed_modules(folder, config, tensors)
    report = Report.load(folder)
    if report is None and (folder / REPORT_FILE).exists():
        raise CorruptWeightError(f"{folder / REPORT_FILE} is damaged: it cannot be read")
    if report is not None:
        _verify(folder, report, packed)
    counted = report or _count(config, tensors, packed)
    total = sum(tensor.bytes for tensor in tensors.values())
    counted.other_bytes = total - sum(module.bytes for module in packed.values())
    return Account(config, counted, report is not None, total)


def read_config(folder: Path) -> LowbitConfig:
    """The quantization config of a saved model.

    Raises:
        FileNotFoundError: no config file.
        ConfigError: it cannot be read, or the model is not quantized by hf_lowbit.
    """
    from hf_lowbit.config import ConfigError
    from hf_lowbit.method import methods

    path = next((folder / name for name in _CONFIG_FILES if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} is not a model that hf_lowbit saved: it has no {' or '.join(_CONFIG_FILES)}")
    stored = _quantization_config(path)
    name = str(stored.get("quant_method", "none"))
    if not name.startswith("lowbit_"):
        state = "not quantized" if name == "none" else f"quantized by {name!r}"
        raise ConfigError(f"{folder} holds a model that is {state}, not one that hf_lowbit quantized")
    name = name.removeprefix("lowbit_")
    if name not in methods():
        raise ConfigError(f"{folder} was quantized by the method {name!r}, which is not installed")
    config: LowbitConfig = methods()[name].config_class.from_dict(stored)
    if not config.plan:
        raise ConfigError(f"{path} has no plan: it was not written by hf_lowbit, or edited")
    return config


@dataclass
class _Packed:
    """What the files hold of one planned module."""

    kind: str
    spec: LayerSpec
    tensors: list[str]
    bytes: int = 0


def _packed_modules(folder: Path, config: LowbitConfig, tensors: dict[str, StoredTensor]) -> dict[str, _Packed]:
    """Planned module -> its integer tensors: codes, scales and other companions.

    On disk fused experts are one tensor for each, below the module that the plan names.
    """
    from hf_lowbit.nn import CorruptWeightError

    planned = _planned_layers(config, list(tensors))
    found: dict[str, _Packed] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in ("I32", "I16"):
            continue
        parts = name.split(".")
        owners = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        owner = next((module for module in owners if module in planned), None)
        if owner is not None:
            packed = found.setdefault(owner, _Packed(*planned[owner], tensors=[]))
            packed.tensors.append(name)
            packed.bytes += tensor.bytes
        elif _COMPANION.search(name):
            raise CorruptWeightError(f"{folder}: the plan does not name the packed {name}; was its config edited?")
    if not found:
        raise CorruptWeightError(f"{folder}: the weight files hold no packed layer, although the config has a plan")
    return found


def _planned_layers(config: LowbitConfig, names: list[str]) -> dict[str, tuple[str, LayerSpec]]:
    """Module -> kind and spec. A tied module has no tensors of its own, and a headless model no prefix."""
    from hf_lowbit.plan import Plan, PlanError

    modules = {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts))}
    found = {}
    for entry in config.plan or []:
        for pattern in entry["modules"]:
            try:
                plan = Plan.from_list([{**entry, "modules": [pattern]}], modules, pattern.partition(".")[0])
            except PlanError:
                continue
            found.update({name: (layer.kind, layer.spec) for name, layer in plan.layers.items()})
    return found


def _verify(folder: Path, report: Report, packed: dict[str, _Packed]) -> None:
    from hf_lowbit.nn import CorruptWeightError

    reported: dict[str, int] = {}
    for layer in report.layers:
        module = layer.name.rpartition(".")[0]
        reported[module] = reported.get(module, 0) + layer.packed_bytes
    for module, size in reported.items():
        if module in packed and size and packed[module].bytes != size:
            raise CorruptWeightError(
                f"{folder}: {module} takes {packed[module].bytes} bytes in the weight files and {size} in the report; "
                "the folder is damaged or mixed with another model"
            )
    total = sum(module.bytes for module in packed.values())
    if total != report.packed_bytes:
        raise CorruptWeightError(
            f"{folder}: the packed layers take {total} bytes in the weight files and {report.packed_bytes} in the "
            "report; the folder is damaged or mixed with another model"
        )


def _count(config: LowbitConfig, tensors: dict[str, StoredTensor], packed: dict[str, _Packed]) -> Report:
    from hf_lowbit.reporting import LayerReport, Report, arithmetic_of

    layers = []
    for module, stored in packed.items():
        weight, activation = stored.spec.weight, stored.spec.activation
        codes = [name for name in stored.tensors if not _COMPANION.search(name)]
        layers.append(
            LayerReport(
                name=codes[0] if len(codes) == 1 else module,
                kind=stored.kind,
                format=weight.format,
                bits=weight.bits,
                group_size=weight.group_size,
                symmetric=weight.symmetric,
                arithmetic=arithmetic_of(stored.spec),
                elements=sum(_elements(tensors, name, stored.spec) for name in codes),
                packed_bytes=stored.bytes,
                activation=None if activation is None else str(activation),
                low_rank=stored.spec.low_rank,
            )
        )
    return Report(str(config.quant_method).removeprefix("lowbit_"), layers)


def _elements(tensors: dict[str, StoredTensor], name: str, spec: LayerSpec) -> int:
    """Weights behind a tensor of codes: from its groups or its low-rank factor, else as many as its words hold.

    The last is too many by at most the padding of each row to a whole word.
    """
    rows = math.prod(tensors[name].shape[:-1])
    if isinstance(spec.weight.group_size, int) and f"{name}_scale" in tensors:
        ranges = tensors.get(f"{name}_scale_range")  # [..., groups, 2] where scales are codes
        groups = tensors[f"{name}_scale"].shape[-1] if ranges is None else ranges.shape[-2]
        return rows * groups * spec.weight.group_size
    if f"{name}_low_rank_a" in tensors and spec.factor_bits == 16:
        return rows * tensors[f"{name}_low_rank_a"].shape[-1]
    per_word = 20 if spec.weight.packing == "base3" else 32 / spec.weight.bits
    return int(rows * tensors[name].shape[-1] * per_word)


def _quantization_config(path: Path) -> dict[str, Any]:
    from hf_lowbit.config import ConfigError

    try:
        values = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") or {}
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} cannot be read: its quantization_config is no object")
    return values


def _is_quantized(path: Path) -> bool:
    return str(_quantization_config(path).get("quant_method", "")).startswith("lowbit_")
