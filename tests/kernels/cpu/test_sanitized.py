"""The kernels under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from hf_lowbit.kernels import cpu
from hf_lowbit.kernels.cpu import library

NATIVE = Path(library.__file__).parent / "native"
FLAGS = ["-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{NATIVE}"]
X86 = json.loads((NATIVE / "x86_flags.json").read_text())


@pytest.mark.slow
def test_no_byte_out_of_place(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    assert compiler, "a C++ compiler with sanitizers is needed"
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    sources = {"api.cpp": [], "plain.cpp": [], **(X86 if is_x86 else {})}
    absent = {name for name in X86 if name.removesuffix(".cpp") not in cpu.instruction_sets()}
    sources = {name: flags for name, flags in sources.items() if name not in absent}
    defines = ["-DHFL_X86"] if is_x86 else []
    defines += [f"-DHFL_NO_{name.removesuffix('.cpp').upper()}" for name in sorted(absent)]
    jobs = []
    for name, flags in sources.items():
        command = [compiler, *FLAGS, *defines, *flags, "-c", str(NATIVE / name), "-o", str(tmp_path / f"{name}.o")]
        jobs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
    for job in jobs:
        _, errors = job.communicate()
        assert job.returncode == 0, errors[-3000:]
    program = tmp_path / "sanitized"
    objects = [str(tmp_path / f"{name}.o") for name in sources]
    test = str(Path(__file__).parent / "sanitized.cpp")
    subprocess.run([compiler, *FLAGS, test, *objects, "-pthread", "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    assert result.stdout.count("done") == len(sources) - 1
