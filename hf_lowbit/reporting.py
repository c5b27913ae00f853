"""What was done to each layer, what it cost, and what was left out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from hf_lowbit.kernels import arithmetic, kernel_of
from hf_lowbit.nn import LayerSpec, PackedModule

REPORT_FILE = "lowbit_report.json"


@dataclass
class LayerReport:
    """One packed parameter.

    Attributes:
        name: the parameter, for example ``model.layers.0.mlp.up_proj.weight``.
        kind: kind of packed module.
        format, bits, group_size, symmetric, low_rank: what it was packed to.
        activation: format of its quantized input, or None.
        arithmetic: how it multiplies: "decoded", "int8", "float (decoded)" or "simulated".
        kernel: what multiplies a few tokens with it, and decodes it for larger convolutions, on this machine: "cpu",
            "cpu, row by row" (slower) or "torch"; with ", scales decoded" where scales are codes (slower, too).
        elements: weights in it; 0 for a parameter that shares another's storage.
        packed_bytes: codes, scales, zero points, tables and low-rank factors.
        error: ||w - w_hat|| / ||w||, low-rank branch included; None where it was not measured (a reloaded model
            without its report).
        tied_to: the parameter whose storage it shares.
    """

    name: str
    kind: str
    format: str
    bits: int
    group_size: int | str | None
    symmetric: bool
    arithmetic: str
    elements: int
    packed_bytes: int
    activation: str | None = None
    low_rank: int = 0
    kernel: str = "torch"
    error: float | None = None
    tied_to: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """Everything stored for the parameter, in bits, over its weights."""
        return 8 * self.packed_bytes / self.elements if self.elements else 0.0


@dataclass
class Report:
    """A quantized model's account.

    Attributes:
        method: name of the method.
        layers: one entry per packed parameter.
        skipped: module name -> why it stays in full precision.
        warnings: changes nobody asked for, such as smaller groups.
        other_bytes: bytes of all parameters and buffers that are not packed.
        original_bits: bits per weight before quantization, of the packed layers.
        seconds: time to quantize; None for a reloaded model without its report.
        peak_memory_bytes: high-water mark of the process' resident memory when quantization ended.
        evaluation: measured quality, if somebody measured it.
        backend: kernels in use on this machine, the most frequent first: see :attr:`LayerReport.kernel`.
    """

    method: str
    layers: list[LayerReport]
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    other_bytes: int = 0
    original_bits: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)
    backend: str = "torch"

    @property
    def packed_bytes(self) -> int:
        """Bytes stored for the quantized layers."""
        return sum(layer.packed_bytes for layer in self.layers)

    @property
    def elements(self) -> int:
        """Weights in the quantized layers."""
        return sum(layer.elements for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits stored per quantized weight: codes, scales, zero points, tables and low-rank factors."""
        return 8 * self.packed_bytes / self.elements if self.elements else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, totals included."""
        totals = {"bits_per_weight": self.bits_per_weight, "packed_bytes": self.packed_bytes, "elements": self.elements}
        values = asdict(self)
        for entry, layer in zip(values["layers"], self.layers, strict=True):
            entry["bits_per_weight"] = layer.bits_per_weight
        return {"method": self.method, **totals, **values}

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """Inverse of :meth:`to_dict`; unknown keys of later versions are ignored."""
        layers = [LayerReport(**_known(LayerReport, entry)) for entry in values.get("layers", [])]
        return cls(**{**_known(cls, values), "layers": layers})

    @classmethod
    def load(cls, folder: str | Path) -> Report | None:
        """The report of a saved model, or None if there is none or it cannot be read."""
        try:
            return cls.from_dict(json.loads((Path(folder) / REPORT_FILE).read_text()))
        except (OSError, ValueError, TypeError):
            return None


def describe(model: nn.Module, method: str) -> Report:
    """Count what a model with packed modules holds now; errors and reasons come from quantization."""
    layers, seen, packed_ids = [], dict[int, str](), set[int]()
    for name, module in model.named_modules(remove_duplicate=True):
        if not isinstance(module, PackedModule):
            continue
        for parameter in module.packed_parameters:
            entry = _describe_parameter(f"{name}.{parameter}", module, parameter, seen)
            layers.append(entry)
            packed_ids.update(id(getattr(module, key)) for key in module.companion_shapes(parameter))
    others = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in packed_ids}
    other_bytes = sum(tensor.numel() * tensor.element_size() for tensor in others.values())
    kernels = Counter(layer.kernel for layer in layers)
    backend = " + ".join(name for name, _ in kernels.most_common()) or "torch"
    return Report(method, layers, other_bytes=other_bytes, backend=backend)


def arithmetic_of(spec: LayerSpec) -> str:
    """How a layer multiplies: see :func:`hf_lowbit.kernels.sliced.arithmetic`."""
    return arithmetic(spec.weight, spec.activation)


def peak_memory_bytes() -> int | None:
    """High-water mark of this process' resident memory, where the system tells it."""
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _describe_parameter(name: str, module: PackedModule, parameter: str, seen: dict[int, str]) -> LayerReport:
    spec = module.layer_spec
    stored = [getattr(module, key) for key in module.companion_shapes(parameter)]
    owner = seen.setdefault(id(getattr(module, parameter)), name)
    shared = owner != name
    leading, columns = module.matrix_shape(parameter)
    elements = columns
    for size in leading:
        elements *= size
    return LayerReport(
        name=name,
        kind=module.kind,
        format=spec.weight.format,
        bits=spec.weight.bits,
        group_size=spec.weight.group_size,
        symmetric=spec.weight.symmetric,
        arithmetic=arithmetic_of(spec),
        elements=0 if shared else elements,
        packed_bytes=0 if shared else sum(tensor.numel() * tensor.element_size() for tensor in stored),
        activation=None if spec.activation is None else str(spec.activation),
        low_rank=spec.low_rank,
        kernel=kernel_of(module.packed(parameter), spec.activation, module.backend),
        tied_to=owner if shared else None,
    )


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in cls.__dataclass_fields__}  # type: ignore[attr-defined]
