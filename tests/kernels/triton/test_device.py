"""Where the Triton kernels run, and what is said where they do not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hf_lowbit import ConfigError
from hf_lowbit.kernels import kernel_of, packed_linear, triton, why_not
from hf_lowbit_rtn import RTNConfig
from tests.kernels.cpu.matrices import random_packed

absent = triton.unavailable_because()


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, hf_lowbit.kernels; sys.exit(any(n.split('.')[0] == 'triton' for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(absent is None, reason="it runs here")
def test_forced_where_it_cannot_run_it_is_refused_by_name() -> None:
    assert why_not("triton") == f"backend 'triton' does not run here ({absent}); 'reference' does"
    with pytest.raises(ConfigError, match="backend 'triton' does not run here"):
        RTNConfig(backend="triton")


@pytest.mark.skipif(absent is None, reason="it runs here")
def test_without_it_products_are_the_reference_s() -> None:
    packed, x = random_packed(24, 64, bits=4), torch.randn(3, 64)
    assert not triton.runs_on(torch.device("cpu")) and triton.describe(packed, x.dtype) is None
    assert torch.equal(packed_linear(x, packed, backend="triton"), packed_linear(x, packed, backend="reference"))
    assert kernel_of(packed, None, "triton") == "torch"
