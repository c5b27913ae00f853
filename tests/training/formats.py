"""One configuration for every number format that a layer can be packed in, and for what may stand beside the codes."""

from typing import Any

from hf_lowbit import LowRankConfig

FORMATS: dict[str, dict[str, Any]] = {
    "int2": {"bits": 2, "symmetric": False},
    "int3": {"bits": 3},
    "int4": {"bits": 4},
    "int8": {"bits": 8},
    "nf4": {"format": "nf", "bits": 4},
    "lloyd": {"format": "codebook", "bits": 3},  # a table fitted to each tensor
    "codebook": {"format": "codebook", "bits": 2, "codebook": [-1.0, -0.3, 0.3, 1.0]},
    "ternary": {"format": "ternary", "bits": 2, "packing": "base3"},
    "fp8": {"format": "float8_e4m3fn", "bits": 8},
    "coded scales": {"format": "nf", "bits": 4, "scale_bits": 8},
    "branch": {"bits": 2, "low_rank": LowRankConfig(4)},
    "int8 inputs": {"bits": 4, "activation_bits": 8},
}
