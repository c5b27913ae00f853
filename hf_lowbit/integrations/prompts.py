"""What a pipeline is asked for: prompts, and the arguments of its calls that they become."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_lowbit.config import ConfigError

_OURS = ("generator", "num_inference_steps", "output_type", "return_dict", "latents")
_AT_ONCE = 8  # pictures: their noise is each one's own, so that this does not change what is drawn
_MOST_TIMESTEPS = 25  # of Q-Diffusion (arXiv 2302.04304) for Stable Diffusion


@dataclass(frozen=True)
class Prompts:
    """How calibration data of a pipeline is drawn.

    Attributes:
        prompts: texts, class labels, or dictionaries of arguments of the pipeline's call, in turn.
        steps: of denoising; None for the pipeline's default.
        timesteps: how many of the steps are recorded, evenly spaced; None for all, at most 25.
        arguments: of every call, such as guidance_scale, height and width.

    Raises:
        ConfigError: no prompts, or a number that is too small or too large.
    """

    prompts: Sequence[Any]
    steps: int | None = None
    timesteps: int | None = None
    arguments: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompts, list | tuple) or not self.prompts:
            raise ConfigError(
                f"prompts must be a list, and not empty, of texts, class labels or dictionaries of the pipeline's "
                f"arguments, not {self.prompts!r}"
            )
        for name in ("steps", "timesteps"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name} must be an integer of at least 1, not {value!r}")
        if self.steps is not None and self.timesteps is not None and self.timesteps > self.steps:
            raise ConfigError(f"timesteps={self.timesteps} cannot be recorded of steps={self.steps}: give fewer")

    def recorded_steps(self, visited: int) -> set[int]:
        """Indices of the steps that are recorded, of so many that the pipeline visits."""
        count = min(visited, _MOST_TIMESTEPS if self.timesteps is None else self.timesteps)
        return {index * visited // count for index in range(count)}

    def request(self) -> dict[str, Any]:
        """What was asked for, without the prompts themselves: to tell one drawing from another."""
        return {
            "prompts": len(self.prompts),
            "prompts_sha256": hashlib.sha256(json.dumps(_plain(self.prompts)).encode()).hexdigest(),
            "steps": self.steps,
            "timesteps": self.timesteps,
            **{name: _plain(value) for name, value in (self.arguments or {}).items()},
        }

    def facts(self, pipeline: Any, pictures: int) -> dict[str, Any]:
        """What is drawn, with the pipeline's own defaults."""
        known = inspect.signature(pipeline.__call__).parameters
        given = {"num_inference_steps": self.steps, **(self.arguments or {})}

        def value(name: str) -> Any:
            default = known[name].default if name in known else None
            return default if given.get(name) is None else given[name]

        return {
            "prompts": len(self.prompts),
            "pictures": pictures,
            "steps": value("num_inference_steps"),
            "guidance_scale": _plain(value("guidance_scale")),
        }

    def calls(self, pipeline: Any, pictures: int) -> list[list[dict[str, Any]]]:
        """Arguments of each picture, in lists of those that are drawn together: of more than one, all but "prompt" (or
        "class_labels") are the same.

        Raises:
            ConfigError: prompts or arguments that the pipeline does not take.
        """
        known = inspect.signature(pipeline.__call__).parameters
        common = dict(self.arguments or {})
        for name in common:
            _check_argument(pipeline, known, name)
        if self.steps is not None:
            common["num_inference_steps"] = self.steps
        key = prompt_argument(pipeline) if any(not isinstance(p, Mapping) for p in self.prompts) else ""
        calls: list[list[dict[str, Any]]] = []
        for index in range(pictures):
            prompt = self.prompts[index % len(self.prompts)]
            if isinstance(prompt, Mapping):
                for name in prompt:
                    _check_argument(pipeline, known, name)
                calls.append([{**common, **prompt}])
            elif calls and len(calls[-1]) < _AT_ONCE and set(calls[-1][0]) == {*common, key}:
                calls[-1].append({**common, key: [_checked(prompt, key)]})
            else:
                calls.append([{**common, key: [_checked(prompt, key)]}])
        return calls


def prompt_argument(pipeline: Any) -> str:
    """The pipeline's argument for what a picture shows: "prompt", or "class_labels" of a class-conditional one.

    Raises:
        ConfigError: it has neither.
    """
    known = inspect.signature(pipeline.__call__).parameters
    for name in ("prompt", "class_labels"):
        if name in known:
            return name
    raise ConfigError(
        f"{type(pipeline).__name__} takes neither a prompt nor class labels: pass prompts as dictionaries of its own "
        "arguments"
    )


def joined(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Arguments of one call that draws several pictures."""
    if len(calls) == 1:
        return dict(calls[0])
    key = "prompt" if "prompt" in calls[0] else "class_labels"
    return {**calls[0], key: [prompt for call in calls for prompt in call[key]]}


def _checked(prompt: Any, key: str) -> Any:
    if key == "prompt":
        if not isinstance(prompt, str):
            raise ConfigError(f"prompts of this pipeline are texts, not {prompt!r}")
        return prompt
    if isinstance(prompt, bool) or not str(prompt).strip().isdecimal():
        raise ConfigError(f"prompts of this pipeline are class labels, integers of at least 0, not {prompt!r}")
    return int(prompt)


def _check_argument(pipeline: Any, known: Mapping[str, Any], name: str) -> None:
    if name in _OURS:
        remedy = "give steps=... instead" if name == "num_inference_steps" else "leave it out"
        raise ConfigError(f"the pipeline's argument {name!r} is set by the recording: {remedy}")
    if name not in known:
        raise ConfigError(f"{type(pipeline).__name__} takes no argument {name!r}; leave it out")


def _plain(value: Any) -> Any:
    """As JSON holds it; of tensors, arrays and pictures a hash."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy()
    if hasattr(value, "tobytes"):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
