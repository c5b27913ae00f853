"""Mixed precision of blocks while they are calibrated."""

from __future__ import annotations

import torch

from hf_lowbit.kernels.routes import has_bfloat16_units


def autocast(device: torch.device, mixed_precision: bool) -> torch.autocast:
    """Within it matrix products are bfloat16 where that was asked for and is faster than float32.

    Parameters, norms, losses and sums with a float32 residual stay float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision and has_bfloat16_units(device))
