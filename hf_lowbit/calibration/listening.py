"""What layers read, told as they read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

Tell = Callable[[str, nn.Module, Tensor], Tensor | None]


def layers_of_kind(model: nn.Module, kinds: tuple[type[nn.Module], ...] = LAYERS) -> dict[str, nn.Module]:
    """The model's layers of these classes by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@contextmanager
def told_inputs(modules: Mapping[str, nn.Module], tell: Tell) -> Iterator[None]:
    """Within it ``tell`` gets the name, the module and the first argument of each of their calls; what it returns is
    read instead, unless that is None.
    """

    def hook(name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            changed = tell(name, module, args[0])
            return None if changed is None else ((changed, *args[1:]), kwargs)
        key = next(iter(kwargs))
        changed = tell(name, module, kwargs[key])
        return None if changed is None else (args, {**kwargs, key: changed})

    handles = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: hook(name, module, args, kwargs), with_kwargs=True
        )
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
