"""What the begin-of-sequence token of a text costs a quantized text-to-image denoiser, with and without MixDQ's remedy.

    python benchmarks/diffusion_bos.py [--pipeline tests/assets/sd-fashion] [--prompts prompts.txt] [--steps 10]
                                       [--pictures 4] [--bits 8] [--output diffusion_bos.json]

The denoiser is quantized as it is, and as a copy that computes the same on texts whose first token is 55 times as large
as the others (hf_lowbit.testbed.outlier_token). Each with bos_aware and without: the signal to noise ratio, in dB, of
what the keys and values of cross-attention return for the tokens after the first, and of the denoiser's output with
these alone quantized, and with all layers, on trajectories that nothing was calibrated on.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import hf_lowbit
from hf_lowbit.calibration.first_token import TEXT, constant_first_token, find_text_layers
from hf_lowbit.calibration.units import Batch, without_cache
from hf_lowbit.integrations.loading import load_quantized, pipeline_components
from hf_lowbit.integrations.prompts import Prompts
from hf_lowbit.integrations.trajectories import record_trajectories
from hf_lowbit.testbed.outlier_token import outlier_size, with_outlier, with_wider_text

FASHION = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class Noise:
    """Squared signal and error, summed."""

    def __init__(self) -> None:
        self.signal = self.error = 0.0

    def add(self, expected: Tensor, found: Tensor) -> None:
        self.signal += float(expected.double().square().sum())
        self.error += float((found.double() - expected.double()).square().sum())

    @property
    def decibels(self) -> float:
        return 10 * math.log10(self.signal / self.error)


@torch.no_grad()
def measure(
    model: nn.Module, calls: list[Batch], held_out: list[Batch], bits: int, bos_aware: bool
) -> dict[str, float]:
    """One row: the model quantized on calls, and its noise on others."""
    samples = sum(len(call["timestep"]) for call in calls)
    names = find_text_layers(model, held_out[0])
    others = [rf"(?!(?:{'|'.join(map(re.escape, names))})$).*"]
    rest, alone, whole = Noise(), Noise(), Noise()
    for noise, kept in ((alone, others), (whole, None)):
        config = hf_lowbit.MixDQConfig(bits=bits, bos_aware=bos_aware, num_samples=samples, modules_to_not_convert=kept)
        quantized = hf_lowbit.quantize(copy.deepcopy(model), config, data=calls)
        for call in held_out:
            noise.add(model(**call, return_dict=False)[0], quantized(**call, return_dict=False)[0])
            for name in names if noise is alone else ():
                before, after = (one.get_submodule(name)(call[TEXT]) for one in (model, quantized))
                rest.add(before[:, 1:], after[:, 1:])
    return {
        "keys_and_values_db": rest.decibels,
        "output_db_keys_and_values_alone": alone.decibels,
        "output_db": whole.decibels,
    }


def record(pipeline: Any, name: str, prompts: list[str], steps: int, pictures: int, seed: int) -> list[Batch]:
    """The denoiser's calls on trajectories of the float pipeline."""
    with tempfile.TemporaryDirectory() as folder:
        found, _ = record_trajectories(
            pipeline, [name], Prompts(prompts, steps), pictures, seed, Path(folder) / "calls"
        )
        return [without_cache(getattr(pipeline, name), batch) for batch in found[name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="tests/assets/sd-fashion")
    parser.add_argument("--prompts", type=Path, help="a text file, one in each line; by default those of Fashion-MNIST")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pictures", type=int, default=4)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("diffusion_bos.json"))
    options = parser.parse_args()
    prompts = [f"a photo of a {name}" for name in FASHION]
    if options.prompts is not None:
        prompts = [line for line in options.prompts.read_text().splitlines() if line]

    pipeline = load_quantized(options.pipeline).to(torch.float32)
    (name,) = pipeline_components(pipeline)
    model = getattr(pipeline, name)
    calls, held_out = (
        record(pipeline, name, prompts[start:] + prompts[:start], options.steps, options.pictures, seed)
        for start, seed in ((0, 0), (options.pictures, 1000))
    )
    text = torch.cat([call[TEXT] for call in calls])
    sizes = text.norm(dim=-1)
    result: dict[str, Any] = {
        "pipeline": options.pipeline,
        "weights": options.bits,
        "first_token": {
            "is_constant": isinstance(constant_first_token(calls), Tensor),
            "largest": float(text[:, 0].abs().max()),
            "largest_of_the_others": float(text[:, 1:].abs().max()),
            "norm_over_mean_of_the_others": float(sizes[:, 0].mean() / sizes[:, 1:].mean()),
        },
    }
    wider = with_wider_text(model, calls[0])
    result["outlier"] = size = outlier_size(text)
    cases = {
        "as_it_is": (model, calls, held_out),
        "with_an_outlier": (
            wider,
            *([{**c, TEXT: with_outlier(c[TEXT], size)} for c in part] for part in (calls, held_out)),
        ),
    }
    for case, (own, data, others) in cases.items():
        result[case] = {
            key: measure(own, data, others, options.bits, bos_aware=aware)
            for key, aware in (("bos_aware", True), ("plain", False))
        }
        print(case, json.dumps(result[case], indent=1), flush=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
