"""Making the libraries know every method, as soon as the part of them that must know is imported.

Importing transformers' quantizers takes more than a second, so that registration waits for it as it does for diffusers
and PEFT: whoever loads a model imports them anyway.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

ADAPTERS = {
    "transformers.quantizers.auto": "hf_lowbit.integrations.transformers",
    "diffusers.quantizers.auto": "hf_lowbit.integrations.diffusers",
    "peft.tuners.lora.model": "hf_lowbit.integrations.peft",
}


_engine: list[str] = []


def register_all(engine: str) -> None:
    """Register every method with each library now, or on its import.

    Args:
        engine: "module:function" of what calibrates a loaded model. It stands on the integrations, so that they know it
            by this name only.
    """
    _engine[:] = [engine]
    for library_module, adapter in ADAPTERS.items():
        _when_imported(library_module, adapter)


def registered_engine() -> Callable[..., None]:
    """The function that calibrates a float model in place: (model, config, recipe)."""
    module, _, name = _engine[0].partition(":")
    found: Callable[..., None] = getattr(importlib.import_module(module), name)
    return found


def _when_imported(library_module: str, adapter: str) -> None:
    """Call ``adapter.register_all()`` as soon as ``library_module`` has been executed."""

    def register() -> None:
        # the adapter may be what is importing the library right now: then it registers at its own end
        getattr(importlib.import_module(adapter), "register_all", lambda: None)()

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
