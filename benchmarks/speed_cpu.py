"""Speed on this CPU: kernels against its read bandwidth, and SmolLM2-135M in `generate`, all in one run.

    python benchmarks/speed_cpu.py [--threads 2] [--inputs bfloat16] [--output speed_cpu.json] [--no-model]
                                   [--large-pages]

Variants are interleaved, medians over the rounds are reported, and ratios are of values of the same run: other work on
the machine changes both sides. Weights are cycled through more memory than the caches hold.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_lowbit.formats import ActivationSpec, PackedTensor, WeightSpec
from hf_lowbit.kernels import cpu, packed_linear
from hf_lowbit.kernels.cpu.products import read_bytes
from hf_lowbit.kernels.routes import multiplies_fast

COLD_BYTES = 256 << 20
ROUNDS = {1: 40, 8: 40}  # of packed products, by tokens
FORMATS: dict[str, dict[str, Any]] = {
    "int2 g64": {"bits": 2, "group_size": 64},
    "int3 g64": {"bits": 3, "group_size": 64},
    "int4 g64": {"bits": 4, "group_size": 64},
    "int4 g64 asymmetric": {"bits": 4, "group_size": 64, "symmetric": False},
    "nf4 g64": {"format": "nf", "bits": 4, "group_size": 64},
    "int8 row": {"bits": 8},
    "float8_e4m3fn row": {"format": "float8_e4m3fn", "bits": 8},
    "ternary base 3": {"format": "ternary", "bits": 2, "packing": "base3"},
}
SHAPES = ((4096, 4096), (14336, 4096))


def microseconds(calls: dict[str, Callable[[int], Any]], rounds: dict[str, int], blocks: int) -> dict[str, float]:
    """Median time of each call(round); in every block each of them has its rounds one after the other.

    Other work on a machine, and its memory, change from second to second: each meets the same of it.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    for block in range(blocks):
        for name, call in calls.items():
            for i in range(block * rounds[name], (block + 1) * rounds[name]):
                begun = time.perf_counter()
                call(i)
                times[name].append(time.perf_counter() - begun)
    return {name: 1e6 * statistics.median(of_call) for name, of_call in times.items()}


def random_packed(rows: int, columns: int, spec: WeightSpec) -> PackedTensor:
    """Random codes: only where they lie matters."""
    stored = spec.companions((rows,), columns)
    codes = torch.randint(-(2**31), 2**31 - 1, stored[""][0], dtype=torch.int32)
    if spec.packing == "base3":
        codes &= 0x5A5A5A5A
    if spec.number_format.name == "float8_e4m3fn":
        codes &= 0x77777777  # no NaN
    scale = torch.rand(stored["_scale"][0]).bfloat16().view(torch.int16)
    zero_point = None if spec.symmetric else torch.randint(2**31, stored["_zero_point"][0], dtype=torch.int32)
    return PackedTensor(codes, scale, spec, columns, zero_point)


def kernels(inputs: torch.dtype, large_pages: bool) -> list[dict[str, Any]]:
    """One row per shape, format and number of tokens, for inputs of a type.

    Args:
        large_pages: packed weights, and what reading is measured on, lie in them: as where models stay.
    """
    memory = torch.ones(COLD_BYTES, dtype=torch.uint8)
    if large_pages:
        cpu.gather_in_large_pages([memory])
    results = []
    for rows, columns in SHAPES:
        floats = [torch.randn(rows, columns) for _ in range(2)]
        for name, fields in FORMATS.items():
            spec = WeightSpec(**fields)
            cold = [
                random_packed(rows, columns, spec) for _ in range(2 + COLD_BYTES // (rows * columns * spec.bits // 8))
            ]
            if large_pages:
                cpu.gather_in_large_pages(tensor for packed in cold for tensor in packed.tensors().values())
            for packed in cold:  # what is asked of a matrix when it is first used belongs to no token
                packed_linear(torch.zeros(1, columns, dtype=inputs), packed)
            for tokens in (1, 8, 128, 512):
                x = torch.randn(tokens, columns).to(inputs)
                result = measure(cold, floats, x, memory, ROUNDS.get(tokens, 1))
                results.append({"shape": [rows, columns], "format": name, "tokens": tokens, **result})
                print(f"{rows}x{columns} {name:19} {tokens:4} tokens: {describe(result)}", flush=True)
    return results


def measure(
    cold: list[PackedTensor], floats: list[torch.Tensor], x: torch.Tensor, memory: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Microseconds of one product in each way, and bandwidths.

    Args:
        rounds: how many packed products follow each other before what they are compared to has its turn, five times. As
            in decoding, many of one token: the first ones wait for code, too, that other work has pushed out of caches.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in cold[0].tensors().values())
    halves, full, half = [weight.bfloat16() for weight in floats], x.float(), x.bfloat16()
    calls: dict[str, Callable[[int], Any]] = {
        "read": lambda _: read_bytes(memory),
        "us": lambda i: packed_linear(x, cold[i % len(cold)]),
        "float32_us": lambda i: full @ floats[i % 2].t(),
        "bfloat16_us": lambda i: half @ halves[i % 2].t(),
    }
    matrix = cpu.describe(cold[0])
    if matrix is not None and cpu.multiplies_int8(matrix):
        activation = ActivationSpec("int", 8)
        calls["int8_us"] = lambda i: packed_linear(x, cold[i % len(cold)], activation)
    times = microseconds(calls, {name: rounds if name in ("us", "int8_us") else 1 for name in calls}, blocks=5)
    reading = COLD_BYTES / times.pop("read") / 1e3
    return {"read_gb_s": reading, **times, "gb_s": size / times["us"] / 1e3}


def describe(result: dict[str, float]) -> str:
    """A row of :func:`measure` in words."""
    text = (
        f"{result['us']:8.0f} us, {result['gb_s'] / result['read_gb_s']:4.0%} of reading, "
        f"{result['float32_us'] / result['us']:.2f}x float32, {result['bfloat16_us'] / result['us']:.2f}x bfloat16"
    )
    if "int8_us" not in result:
        return text
    ratios = [result[floats] / result["int8_us"] for floats in ("float32_us", "bfloat16_us")]
    return f"{text}, int8 inputs {ratios[0]:.2f}x, {ratios[1]:.2f}x"


def language_model(new_tokens: int = 64, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Decode and prefill of SmolLM2-135M: floats, and 4 bits with and without siblings."""
    from transformers import AutoModelForCausalLM

    from hf_lowbit.nn import disconnect_siblings
    from hf_lowbit.testbed import smollm2
    from hf_lowbit_rtn import RTNConfig

    folder = smollm2()
    four = RTNConfig(bits=4, group_size=64, quantize_embeddings=True, quantize_lm_head=True)
    models = {
        "float32": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "bfloat16": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16),
        "4 bits": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=four),
        "4 bits, each alone": AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=four
        ),
    }
    disconnect_siblings(models["4 bits, each alone"])
    prompt, long = torch.randint(10, 40000, (1, 64)), torch.randint(10, 40000, (1, 512))
    times: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in models}
    with torch.no_grad():
        for i in range(rounds + 1):
            for name, model in models.items():
                count = new_tokens if name != "bfloat16" else new_tokens // 8
                begun = time.perf_counter()
                model.generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
                middle = time.perf_counter()
                model(long)
                if i:  # the first round warms up
                    times[name]["decode"].append(count / (middle - begun))
                    times[name]["prefill"].append(512 / (time.perf_counter() - middle))
    speeds = {name: {kind: statistics.median(v) for kind, v in kinds.items()} for name, kinds in times.items()}
    for name, speed in speeds.items():
        print(
            f"SmolLM2-135M {name:18}: decode {speed['decode']:6.1f} tokens/s, prefill {speed['prefill']:6.0f} tokens/s"
        )
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    fast = "bfloat16" if multiplies_fast(torch.bfloat16) else "float32"
    parser.add_argument("--inputs", choices=("float32", "bfloat16"), default=fast, help="default here: %(default)s")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--no-model", action="store_true", help="kernels only")
    parser.add_argument("--no-kernels", action="store_true", help="the model only")
    parser.add_argument("--large-pages", action="store_true", help="weights lie in large pages of memory")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "instruction_sets": cpu.instruction_sets(),
        "threads": arguments.threads,
        "inputs": arguments.inputs,
        "torch": torch.__version__,
    }
    print(results)
    if not arguments.no_kernels:
        results["kernels"] = kernels(getattr(torch, arguments.inputs), arguments.large_pages)
    if not arguments.no_model:
        results["language_model"] = language_model()
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
