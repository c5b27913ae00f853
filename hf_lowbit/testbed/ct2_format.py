"""The container of CTranslate2's ``model.bin``: named arrays, and aliases of them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# The codes of CTranslate2's DataType that NumPy has a type for; bfloat16 (5) is none of them.
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_VERSION = 6


@dataclass
class _Reader:
    """Little-endian integers, strings and arrays, one after another."""

    data: bytes
    position: int = field(default=0)

    def integer(self, code: str) -> int:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(f"<{code}")
        return int(value)

    def string(self) -> str:
        length = self.integer("H")  # counts the terminating zero byte
        value = self.data[self.position : self.position + length - 1].decode()
        self.position += length
        return value

    def array(self) -> NDArray[np.generic]:
        shape = [self.integer("I") for _ in range(self.integer("B"))]
        code, size = self.integer("B"), self.integer("I")
        if code not in _DTYPES:
            raise ValueError(f"CTranslate2 data type {code} is not supported")
        if self.position + size > len(self.data):
            raise struct.error("an array ends behind the file's end")
        dtype = np.dtype(_DTYPES[code]).newbyteorder("<")
        values = np.frombuffer(self.data, dtype, size // dtype.itemsize, self.position).reshape(shape)
        self.position += size
        return values


def read_ct2(path: Path) -> tuple[str, dict[str, NDArray[np.generic]]]:
    """Read a CTranslate2 model file of binary version 6.

    Returns:
        The name of the model specification, such as ``WhisperSpec``, and the variables by name, aliases included;
        the arrays are read-only views of the file's bytes.

    Raises:
        ValueError: another version, an unsupported data type, or a file that ends too early or too late.
    """
    reader = _Reader(path.read_bytes())
    try:
        version = reader.integer("I")
        if version != _VERSION:
            raise ValueError(f"{path.name} has CTranslate2 binary version {version}; {_VERSION} is supported")
        specification = reader.string()
        reader.integer("I")  # the specification's revision
        variables = {}
        for _ in range(reader.integer("I")):
            name = reader.string()
            variables[name] = reader.array()
        for _ in range(reader.integer("I")):
            alias, name = reader.string(), reader.string()
            variables[alias] = variables[name]
    except struct.error as error:
        raise ValueError(f"{path.name} is cut off") from error
    if reader.position != len(reader.data):
        raise ValueError(f"{path.name} has {len(reader.data) - reader.position} bytes more than it describes")
    return specification, variables
