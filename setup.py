"""The package list; everything else is in pyproject.toml.

Three source roots make one distribution: the repository (the platform), `plugins/` (a package per method, and the
file that optimum-cli looks for in its own namespace) and `model_cards/`, installed as `hf_lowbit.model_cards`.
pyproject.toml can either search roots or rename a folder, not both.
"""

from setuptools import find_namespace_packages, setup

ROOTS = {".": ["hf_lowbit", "hf_lowbit.*"], "plugins": ["hf_lowbit_*", "optimum", "optimum.*"]}

package_dir = {"hf_lowbit.model_cards": "model_cards"}
for root, include in ROOTS.items():
    for package in find_namespace_packages(root, include=include):
        package_dir[package] = f"{root}/{package.replace('.', '/')}".removeprefix("./")

setup(packages=sorted(package_dir), package_dir=package_dir)
