"""Denoisers of the trained test pipelines: one forward, quantized against float, interleaved in one run.

    python benchmarks/speed_diffusion.py [--batches 1,8,32] [--rounds 15] [--threads N] [--output speed_diffusion.json]

Every variant takes its turn in every round; medians over the rounds are reported, in milliseconds, and as a ratio to
float32 of the same round's batch. Static scales come from a few random latents: what is measured is time, not quality.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import hf_lowbit
from hf_lowbit.kernels.cpu import instruction_sets

ASSETS = Path(__file__).parent.parent / "tests" / "assets"
W8A8 = {"bits": 8, "group_size": None, "activation_bits": 8, "activation_static": True}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "bfloat16": None,
    "W8A8 static": W8A8,
    "W8A8 static asymmetric": {**W8A8, "activation_symmetric": False},
    "W8A8 dynamic": {**W8A8, "activation_static": False},
    "W4A8 static": {**W8A8, "bits": 4},
    "W4A8 static, weights in groups of 64": {**W8A8, "bits": 4, "group_size": 64},
    "W4A16, weights in groups of 64": {"bits": 4, "group_size": 64},
}


def load(name: str) -> torch.nn.Module:
    """The denoiser of a test pipeline, in float32."""
    from diffusers import DiTTransformer2DModel, UNet2DConditionModel

    cls, folder = {
        "UNet": (UNet2DConditionModel, ASSETS / "sd-fashion" / "unet"),
        "DiT": (DiTTransformer2DModel, ASSETS / "dit-fashion" / "transformer"),
    }[name]
    model: torch.nn.Module = cls.from_pretrained(folder, torch_dtype=torch.float32)
    return model.eval()


def inputs(name: str, batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Random arguments of one call."""
    generator = torch.Generator().manual_seed(batch)
    latents = torch.randn(batch, 4, 8, 8, generator=generator).to(dtype)
    timestep = torch.full((batch,), 481)
    if name == "DiT":
        return {"hidden_states": latents, "timestep": timestep, "class_labels": torch.arange(batch) % 10}
    text = torch.randn(batch, 16, 96, generator=generator).to(dtype)
    return {"sample": latents, "timestep": timestep, "encoder_hidden_states": text}


def variant(name: str, fields: dict[str, Any] | None, label: str) -> torch.nn.Module:
    """The denoiser, quantized like that."""
    model = load(name)
    if fields is None:
        return model.to(torch.bfloat16) if label == "bfloat16" else model
    data = [inputs(name, 8, torch.float32) for _ in range(2)]
    config = hf_lowbit.RTNConfig(
        **fields, **({"dataset": data, "num_samples": 16} if fields.get("activation_static") else {})
    )
    quantized: torch.nn.Module = hf_lowbit.quantize(model, config)
    return quantized


@torch.inference_mode()
def measure(name: str, batches: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row for each variant and batch."""
    models = {label: variant(name, fields, label) for label, fields in VARIANTS.items()}
    rows = []
    for batch in batches:
        times: dict[str, list[float]] = {label: [] for label in models}
        for turn in range(rounds + 2):  # two to warm up
            for label, model in models.items():
                given = inputs(name, batch, torch.bfloat16 if label == "bfloat16" else torch.float32)
                started = time.perf_counter()
                model(**given)
                if turn > 1:
                    times[label].append(1e3 * (time.perf_counter() - started))
        median = {label: statistics.median(values) for label, values in times.items()}
        ratios = {
            label: statistics.median(a / b for a, b in zip(times["float32"], values, strict=True))
            for label, values in times.items()
        }
        for label in models:
            row = {"model": name, "batch": batch, "variant": label, "ms": median[label], "speedup": ratios[label]}
            rows.append(row)
            print(f"{name:5} batch {batch:3}  {label:38} {median[label]:9.2f} ms  {ratios[label]:5.2f}x float32")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--models", default="UNet,DiT")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    batches = [int(batch) for batch in arguments.batches.split(",")]
    rows = [row for name in arguments.models.split(",") for row in measure(name, batches, arguments.rounds)]
    machine = {
        "processor": platform.processor() or platform.machine(),
        "instructions": instruction_sets(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"machine": machine, "rounds": arguments.rounds, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
