"""The tensors of a model's folder, from the headers of its safetensors files: nothing is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor on disk; ``dtype`` as safetensors writes it (I32, BF16, ...)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * _ITEM_BYTES.get(self.dtype, 1)


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the model in ``folder``; adapters are not part of it.

    Raises:
        FileNotFoundError: no weights.
        CorruptWeightError: a file that is truncated or not safetensors, a shard or a tensor that the index names and
            that is not there.
    """
    from hf_lowbit.nn import CorruptWeightError

    tensors: dict[str, StoredTensor] = {}
    index = next(folder.glob(f"*{_INDEX}"), None)
    expected = _read_index(index) if index is not None else {}
    shards = sorted(set(expected.values())) or [path.name for path in weight_files(folder)]
    if not shards:
        raise FileNotFoundError(f"{folder} has no weights: a .safetensors file is expected")
    for shard in shards:
        if not (folder / shard).is_file():
            raise CorruptWeightError(f"{folder} is damaged: the file {shard} is missing")
        tensors.update(_read_file(folder / shard))
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise CorruptWeightError(
            f"{folder} is damaged: no file has the tensor {missing[0]} (and {len(missing) - 1} more)"
        )
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, without adapters."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_"))


def _read_index(path: Path) -> dict[str, str]:
    from hf_lowbit.nn import CorruptWeightError

    try:
        names: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(tensor): Path(file).name for tensor, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptWeightError(f"{path} cannot be read: {error}") from None


def _read_file(path: Path) -> dict[str, StoredTensor]:
    from safetensors import SafetensorError, safe_open

    from hf_lowbit.nn import CorruptWeightError

    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: StoredTensor(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CorruptWeightError(f"{path} is damaged: {error}") from None
