"""Making the libraries know every method: transformers at once, diffusers and PEFT when they are imported."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from hf_lowbit.method import methods


def register_all() -> None:
    """Register every method with transformers now, and with diffusers and PEFT now or on their import."""
    from hf_lowbit.integrations import transformers as adapter

    for method in methods().values():
        adapter.register(str(method.config_class.quant_method), method.config_class)
    _when_imported("diffusers.quantizers.auto", "hf_lowbit.integrations.diffusers")
    _when_imported("peft.tuners.lora.model", "hf_lowbit.integrations.peft")


def _when_imported(library_module: str, adapter: str) -> None:
    """Call ``adapter.register_all()`` as soon as ``library_module`` has been executed."""

    def register() -> None:
        importlib.import_module(adapter).register_all()

    if library_module in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _ImportHook(library_module, register))


class _ImportHook(importlib.abc.MetaPathFinder):
    """Finds one module through the other finders, once, and runs a callback after it has been executed."""

    def __init__(self, name: str, callback: Callable[[], None]) -> None:
        self.name, self.callback = name, callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The ordinary spec, with a loader that calls back."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                self.callback()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
