"""What is said where the Triton kernels do not run."""

from __future__ import annotations

import pytest
import torch

from hf_lowbit import ConfigError
from hf_lowbit.kernels import Operand, causal_convolution, kernel_of, packed_linear, selective_scan, triton, why_not
from hf_lowbit_rtn import RTNConfig
from tests.kernels.cpu.matrices import random_packed
from tests.kernels.mixers import scan_inputs


def test_forced_where_it_cannot_run_it_is_refused_by_name() -> None:
    assert why_not("triton") == f"backend 'triton' does not run here ({triton.unavailable_because()}); 'reference' does"
    with pytest.raises(ConfigError, match="backend 'triton' does not run here"):
        RTNConfig(backend="triton")


def test_without_it_products_are_the_reference_s() -> None:
    packed, x = random_packed(24, 64, bits=4), torch.randn(3, 64)
    assert not triton.runs_on(torch.device("cpu")) and triton.describe(packed, x.dtype) is None
    assert torch.equal(packed_linear(x, packed, backend="triton"), packed_linear(x, packed, backend="reference"))
    assert kernel_of(packed, None, "triton") == "torch"


def test_scans_and_convolutions_refuse_it_by_name() -> None:
    for backend, message in (("triton", "backend 'triton' does not run here"), ("gpu", "'gpu' does not exist")):
        with pytest.raises(ValueError, match=message):
            selective_scan(**scan_inputs("mamba", 1, 2, torch.float32), backend=backend)
        with pytest.raises(ValueError, match=message):
            causal_convolution(Operand(torch.zeros(1, 2, 8)), torch.ones(8, 4), None, backend=backend)
