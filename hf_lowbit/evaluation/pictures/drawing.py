"""Drawing with a pipeline: one prompt, one seed, one picture, whatever the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lowbit.config import ConfigError
from hf_lowbit.integrations.prompts import prompt_argument


class PromptError(ValueError):
    """Prompts that a pipeline cannot be asked with."""


def takes_classes(pipeline: Any) -> bool:
    """True for a class-conditional pipeline, such as DiT; False for one that reads texts.

    Args:
        pipeline: or its class.

    Raises:
        PromptError: it reads neither.
    """
    try:
        return prompt_argument(pipeline) == "class_labels"
    except ConfigError:
        kind = pipeline if isinstance(pipeline, type) else type(pipeline)
        raise PromptError(f"{kind.__name__} is no pipeline that draws from texts or class labels") from None


def check_arguments(kind: type, arguments: Mapping[str, Any]) -> None:
    """Raise PromptError for what a class of pipelines does not take, or drawing sets itself."""
    ours = ("prompt", "class_labels", "num_inference_steps", "generator", "output_type", "return_dict", "latents")
    known = inspect.signature(kind.__call__).parameters
    for name in arguments:
        if name not in known or name in ours:
            why = "is set by drawing itself" if name in ours else f"is none of {kind.__name__}'s"
            raise PromptError(f"the argument {name!r} {why}; leave it out")


def check_prompts(prompts: Sequence[str | int], classes: bool) -> list[Any]:
    """Texts, or class labels as integers, which may be given by their digits.

    Raises:
        PromptError: none at all, or what is no class label.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise PromptError("there is no prompt to draw: a list of texts or class labels is needed")
    if not classes:
        return [str(prompt) for prompt in prompts]
    labels = []
    for prompt in prompts:
        if not str(prompt).strip().isdecimal():
            raise PromptError(f"a class-conditional pipeline draws class labels such as 0, not {prompt!r}")
        labels.append(int(prompt))
    return labels


@torch.no_grad()
def draw_pictures(
    pipeline: Any,
    prompts: Sequence[str | int],
    *,
    steps: int = 25,
    seed: int = 0,
    batch_size: int = 16,
    advance: Callable[[int], None] | None = None,
    **arguments: Any,
) -> Tensor:
    """Pictures float32 [n, c, h, w] in [0, 1] on the CPU; the i-th starts from the noise of seed + i.

    Args:
        pipeline: of diffusers, text- or class-conditional.
        prompts: one for each picture.
        steps: denoising steps.
        batch_size: pictures drawn at once; it changes them by rounding errors only.
        advance: called with the number of pictures after each batch.
        arguments: others of the pipeline's call, such as height, width or guidance_scale.

    Raises:
        PromptError: prompts or a pipeline that cannot be.
    """
    classes = takes_classes(pipeline)
    asked = check_prompts(prompts, classes)
    parts = []
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        # One generator per picture, on the CPU: noise that depends on neither batch nor device.
        noise = [torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))]
        given = {"class_labels" if classes else "prompt": batch, "num_inference_steps": steps, "generator": noise}
        images = pipeline(**given, output_type="np", **arguments).images
        values = torch.from_numpy(images).float()  # [n, h, w, c], or [n, h, w] of one channel
        values = values.unsqueeze(-1) if values.ndim == 3 else values
        parts.append(values.permute(0, 3, 1, 2))
        if advance is not None:
            advance(len(batch))
    return torch.cat(parts).contiguous()
