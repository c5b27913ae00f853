"""The package list and the native library; everything else is in pyproject.toml.

Three source roots make one distribution: the repository (the platform), `plugins/` (a package per method, and the
file that optimum-cli looks for in its own namespace) and `model_cards/`, installed as `hf_lowbit.model_cards`.
pyproject.toml can either search roots or rename a folder, not both.

The native CPU kernels are plain C++17 without torch or Python headers, one file per instruction set with flags of its
own. Where they cannot be built (no compiler, an unknown one) the package installs without them.
"""

import json
import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOTS = {".": ["hf_lowbit", "hf_lowbit.*"], "plugins": ["hf_lowbit_*", "optimum", "optimum.*"]}
NATIVE = Path("hf_lowbit/kernels/cpu/native")
COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden"]
X86_FLAGS = json.loads((NATIVE / "x86_flags.json").read_text())  # source -> flags of its instruction set
# What an older compiler may not know: source -> what tells api.cpp to do without.
LEFT_OUT = {"avx512.cpp": "-DHFL_NO_AVX512", "avx512_bf16.cpp": "-DHFL_NO_AVX512_BF16", "amx.cpp": "-DHFL_NO_AMX"}
NEEDS = {"avx512_bf16.cpp": "avx512.cpp", "amx.cpp": "avx512_bf16.cpp"}  # whose kernels it calls; in this order


class BuildNative(build_ext):
    """Compiles each source with the flags of its instruction set, side by side."""

    def build_extension(self, ext: Extension) -> None:
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        sources = {"plain.cpp": [], **(X86_FLAGS if is_x86 else {})}
        defines = ["-DHFL_X86"] if is_x86 else []

        def compile_one(name: str) -> list[str]:
            arguments = [*COMMON_FLAGS, *defines, *sources.get(name, [])]
            try:
                return self.compiler.compile([str(NATIVE / name)], self.build_temp, extra_postargs=arguments)
            except CompileError:
                if name not in LEFT_OUT:
                    raise
                return []

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = dict(zip(sources, pool.map(compile_one, sources), strict=True))
        for name, needed in NEEDS.items():
            if not compiled.get(needed):
                compiled[name] = []
        defines += [define for name, define in LEFT_OUT.items() if not compiled.get(name)]
        objects = [
            *compile_one("api.cpp"),
            *compile_one("operator.cpp"),
            *(path for paths in compiled.values() for path in paths),
        ]
        target = self.get_ext_fullpath(ext.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        self.compiler.link_shared_object(objects, target, target_lang="c++")


package_dir = {"hf_lowbit.model_cards": "model_cards"}
for root, include in ROOTS.items():
    for package in find_namespace_packages(root, include=include):
        package_dir[package] = f"{root}/{package.replace('.', '/')}".removeprefix("./")

setup(
    packages=sorted(package_dir),
    package_dir=package_dir,
    ext_modules=[
        Extension(
            "hf_lowbit.kernels.cpu._lowbit",
            sources=sorted(map(str, NATIVE.glob("*.cpp"))),
            depends=sorted(str(path) for path in NATIVE.iterdir() if path.suffix in (".h", ".inc", ".json")),
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
