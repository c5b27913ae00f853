"""GPTQ on a GPU: one block of 8B's shape by its parts, all of 8B's, and a 30B that neither card nor host could hold.

    python benchmarks/calibration_gpu.py block [--samples 128] [--precision highest high] [--loop]
    python benchmarks/calibration_gpu.py full --work DIR [--seconds 480] [--samples 128] [--precision highest]
    python benchmarks/calibration_gpu.py stream --work DIR [--seconds 480] [--samples 32] [--cap-gib 24]
    torchrun --nproc-per-node 2 benchmarks/calibration_gpu.py parallel

Llamas of random weights, at 4 bits in groups of 128, on random tokens, 2048 a sample. ``full``: the model of 16 GB lies
in the host's memory, its blocks come to the card. ``stream``: blocks are drawn when they are reached, by seeds of their
names, and exist nowhere else; the process may take --cap-gib of the card. Both keep finished blocks in --work, stop by
themselves once --seconds have passed and go on when the same command is given again, so that short leases are enough;
the result counts the seconds of all calls. ``parallel``: two processes, each with half of the data, and with a GPU
where there are as many, against one. Results are added to --output, a JSON file, under the mode's name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "30b": {
        "hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52,
        "num_key_value_heads": 52, "vocab_size": 32000,
    },
    "small": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 3, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
}  # fmt: skip
LENGTH = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("block", "full", "stream", "parallel"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--precision", nargs="*", default=["highest"], help="of torch.set_float32_matmul_precision")
    parser.add_argument("--loop", action="store_true", help="block: also without the fused sweep over columns")
    parser.add_argument("--work", type=Path, help="full, stream: where finished blocks are kept")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--cap-gib", type=float, default=24)
    parser.add_argument("--backend", choices=("nccl", "gloo"), default="nccl", help="parallel: gloo shares a card too")
    parser.add_argument("--shape", choices=list(SHAPES), help="by default the mode's")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    facts = {"block": block, "full": full, "stream": stream, "parallel": parallel}[options.mode](options)
    if facts is None:
        return
    facts = {
        "card": torch.cuda.get_device_name(), "torch": torch.__version__,
        "options": {k: v for k, v in vars(options).items() if v is not None and k not in ("work", "output")}, **facts,
    }  # fmt: skip
    print(json.dumps(facts, indent=1, default=str))
    if options.output:
        known = json.loads(options.output.read_text()) if options.output.is_file() else {}
        options.output.write_text(json.dumps({**known, options.mode: facts}, indent=1, default=str) + "\n")


# -- models ------------------------------------------------------------------------------------------------------------


def hollow(shape: str, **sizes: int) -> Any:
    """A Llama whose blocks are on the meta device; the rest is drawn, bfloat16, in the host's memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SHAPES[shape], **sizes}, tie_word_embeddings=False, dtype="bfloat16")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(default)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        fill(model.get_submodule(name), drawn(model.get_submodule(name), name), "cpu")
    return model.eval()


def drawn(module: nn.Module, name: str) -> dict[str, Tensor]:
    """Weights as transformers initialises them, by a seed of the name; drawn on the card, which is fast."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    generator = torch.Generator("cuda").manual_seed(seed)

    def draw(parameter: Tensor) -> Tensor:
        if parameter.dim() == 1:
            return torch.ones(parameter.shape, dtype=parameter.dtype, device="cuda")
        return torch.randn(parameter.shape, dtype=parameter.dtype, device="cuda", generator=generator).mul_(0.02)

    return {key: draw(parameter) for key, parameter in module.named_parameters()}


def fill(module: nn.Module, tensors: dict[str, Tensor], device: str) -> None:
    """Put them in the places of meta parameters."""
    for key, tensor in tensors.items():
        owner, _, leaf = key.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor.to(device), False)


def whole(shape: str, device: str = "cpu", **sizes: int) -> Any:
    """All of it in one memory."""
    model = hollow(shape, **sizes)
    for index, layer in enumerate(model.model.layers):
        fill(layer, drawn(layer, f"model.layers.{index}"), device)
    return model.to(device)


def settings(samples: int) -> Any:
    import hf_lowbit

    ids = tokens(samples, 0)
    return hf_lowbit.GPTQConfig(bits=4, group_size=128, dataset=ids, num_samples=samples, sequence_length=LENGTH)


def tokens(samples: int, seed: int) -> Tensor:
    return torch.randint(0, 32000, (samples, LENGTH), generator=torch.Generator().manual_seed(seed))


# -- one block ---------------------------------------------------------------------------------------------------------


def block(options: argparse.Namespace) -> dict[str, Any]:
    """The parts of the middle one of three blocks: the first warms up, the last hands nothing on."""
    import hf_lowbit
    from hf_lowbit.rounding import feedback

    shape, results = options.shape or "8b", {}
    reference = logits(whole(shape, "cuda", num_hidden_layers=3))
    ways = [(precision, False) for precision in options.precision]
    for precision, loop in [*ways, *([(options.precision[-1], True)] if options.loop else [])]:
        torch.set_float32_matmul_precision(precision)
        model = whole(shape, num_hidden_layers=3)
        with Parts() as parts, patch.object(feedback, "runs_on", lambda _: False) if loop else ExitStack():
            hf_lowbit.quantize(model, settings(options.samples), device="cuda")
        torch.set_float32_matmul_precision("highest")
        moved = model.to("cuda")
        results[f"{precision}{', loop over columns' if loop else ''}"] = {
            "seconds_of_block": parts.blocks[1],
            "logits_error": float((logits(moved) - reference).norm() / reference.norm()),
            "mean_layer_error": mean([layer.error for layer in hf_lowbit.report(model).layers if layer.error]),
        }
        del model, moved
    return {"shape": shape, "results": results}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """On a sample that was not calibrated on."""
    return model(tokens(1, 1).cuda()).logits.float()


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


class Parts:
    """Seconds of a block's parts, measured with the card idle at both ends of each."""

    def __enter__(self) -> Parts:
        from hf_lowbit.calibration import block, walk
        from hf_lowbit.calibration.progress import Progress
        from hf_lowbit.calibration.statistics import Hessian
        from hf_lowbit.rounding import feedback, gptq

        self.blocks: list[dict[str, float]] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._begun, step = time.monotonic(), Progress.step

        def finished(progress: Progress, *args: Any) -> None:
            step(progress, *args)
            torch.cuda.synchronize()
            now = time.monotonic()
            total, inner = now - self._begun, dict(self._seconds)
            inner["forward for statistics"] -= inner.get("Hessian sums", 0)
            self.blocks.append({**inner, "other": total - sum(inner.values()), "total": total})
            self._begun, self._seconds = now, defaultdict(float)

        self._patches = ExitStack()
        for owner, name, what in (
            (block.Block, "gather", "forward for statistics"),
            (Hessian, "update", "Hessian sums"),
            (feedback, "inverse_factor", "Cholesky"),
            (gptq, "round_columns", "rounding loop"),
            (gptq, "to_packed", "packing"),
            (walk, "advance", "forward to the next block"),
        ):
            self._patches.enter_context(patch.object(owner, name, self._timed(what, getattr(owner, name))))
        self._patches.enter_context(patch.object(Progress, "step", finished))
        return self

    def __exit__(self, *error: object) -> None:
        self._patches.close()

    def _timed(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            begun = time.monotonic()
            result = function(*args, **kwargs)
            torch.cuda.synchronize()
            self._seconds[what] += time.monotonic() - begun
            return result

        return timed


# -- whole models, in several calls ------------------------------------------------------------------------------------


def full(options: argparse.Namespace) -> dict[str, Any] | None:
    """The model in the host's memory."""
    return resumed(options, options.shape or "8b", lambda shape: (whole(shape), None))


def stream(options: argparse.Namespace) -> dict[str, Any] | None:
    """The model nowhere: blocks are drawn when they are reached."""
    from hf_lowbit.calibration.placement import BlockWeights

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(options.cap_gib * 2**30 / total)

    def make(shape: str) -> tuple[Any, BlockWeights]:
        model = hollow(shape)
        layers = dict(hollow(shape).named_modules())
        return model, BlockWeights(lambda name: drawn(layers[name], name), f"drawn, {shape}")

    return resumed(options, options.shape or "30b", make)


def resumed(options: argparse.Namespace, shape: str, make: Callable[[str], tuple[Any, Any]]) -> dict[str, Any] | None:
    """One call of several; facts of all of them once the model is whole, None before."""
    import logging

    import hf_lowbit

    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(message)s")
    begun = time.monotonic()
    options.work.mkdir(parents=True, exist_ok=True)
    os.environ["HF_LOWBIT_HOME"] = str(options.work)
    torch.set_float32_matmul_precision(options.precision[0])
    record = options.work / f"{options.mode}.json"
    calls = json.loads(record.read_text()) if record.is_file() else []
    model, weights = make(shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    made = time.monotonic()
    with until(begun + options.seconds) as blocks, Peak() as host:
        hf_lowbit.quantize(model, settings(options.samples), device="cuda", weights=weights)
    calls.append({
        "seconds": time.monotonic() - begun, "of_these_to_make_the_model": made - begun, **blocks,
        "peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_gpu_gib": torch.cuda.max_memory_reserved() / 2**30,
        "peak_host_gib": host.largest / 2**30, "pinned_gib": host.pinned / 2**30,
    })  # fmt: skip
    record.write_text(json.dumps(calls))
    print(json.dumps(calls[-1]))
    if blocks["stopped"]:
        print(f"stopped after {options.seconds:g} s; give the same command again")
        return None
    record.unlink()
    report = hf_lowbit.report(model)
    return {
        "shape": shape, "parameters": parameters, "float_gib": 2 * parameters / 2**30, "calls": calls,
        "seconds": sum(call["seconds"] for call in calls), "bits_per_weight": report.bits_per_weight,
        "packed_gib": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30,
        "mean_layer_error": mean([layer.error for layer in report.layers if layer.error]),
    }  # fmt: skip


class OutOfTime(Exception):
    """The call's seconds are over."""


@contextmanager
def until(end: float) -> Iterator[dict[str, Any]]:
    """Count blocks, and stop after the one during which time runs out."""
    from hf_lowbit.calibration.progress import Progress

    step, counts = Progress.step, {"computed": 0, "taken_over": 0, "stopped": False}

    def counted(progress: Progress, name: str, restored: bool) -> None:
        step(progress, name, restored)
        counts["taken_over" if restored else "computed"] += 1
        if time.monotonic() > end and progress.done < progress.total:
            raise OutOfTime

    with patch.object(Progress, "step", counted):
        try:
            yield counts
        except OutOfTime:
            counts["stopped"] = True


class Peak:
    """The largest resident memory of this process, sampled; page-locked memory, which is not in it, apart."""

    def __enter__(self) -> Peak:
        import threading

        self.largest, self.pinned, self._stop = 0, 0, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        page = os.sysconf("SC_PAGE_SIZE")
        while not self._stop.wait(0.05):
            self.largest = max(self.largest, int(Path("/proc/self/statm").read_text().split()[1]) * page)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        stats = torch.cuda.host_memory_stats()
        self.pinned = max([stats.get(f"{kind}_bytes.peak", 0) for kind in ("allocated", "active", "reserved")])


# -- several GPUs ------------------------------------------------------------------------------------------------------


def parallel(options: argparse.Namespace) -> dict[str, Any] | None:
    """Hessians of two processes against those of one, and the codes that GPTQ makes of them."""
    import torch.distributed as dist

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group(options.backend)
    rank, count = dist.get_rank(), dist.get_world_size()
    shape, samples = options.shape or "small", min(options.samples, 32)
    hessians(shape, count)  # so that no start of a library or a kernel is timed
    sums, seconds = hessians(shape, samples)
    codes = packed(shape, samples)
    digests: list[Any] = [None] * count
    dist.all_gather_object(digests, hashlib.sha256(b"".join(c.numpy().tobytes() for c in codes.values())).hexdigest())
    dist.barrier()
    dist.destroy_process_group()
    if rank != 0:
        return None
    alone, seconds_alone = hessians(shape, samples)
    codes_alone = packed(shape, samples)
    differences = [float((sums[key] - alone[key]).norm() / alone[key].norm()) for key in alone]
    words = sum(c.numel() for c in codes_alone.values())
    same = sum(int((codes[key] == codes_alone[key]).sum()) for key in codes_alone)
    return {
        "processes": count, "cards": min(count, torch.cuda.device_count()), "shape": shape, "samples": samples,
        "hessians": len(differences),
        "largest_relative_difference": max(differences), "processes_agree": len(set(digests)) == 1,
        "seconds": seconds, "seconds_alone": seconds_alone, "equal_words_of_codes": same / words,
    }  # fmt: skip


def hessians(shape: str, samples: int) -> tuple[dict[str, Tensor], float]:
    """Of every matrix, with blocks rounded to nearest, so that all see the same inputs; and the seconds."""
    from hf_lowbit.calibration.block import Block
    from hf_lowbit.calibration.placement import Placement, as_device
    from hf_lowbit.calibration.walk import Walk
    from hf_lowbit.plan import build_plan
    from hf_lowbit.rounding import round_to_nearest
    from hf_lowbit.tensorwise import pack_parameter

    model, config, sums = whole(shape), settings(samples), {}
    batches = [{"input_ids": row[None]} for row in config.dataset]

    def step(block: Block) -> None:
        for key, hessian in block.hessians().items():
            sums[f"{block.name}.{key}"] = hessian.matrix.cpu()
            block.pack(key, round_to_nearest(block.matrices[key].weight, block.matrices[key].spec))

    plan = build_plan(model, config)
    plan.layers.pop("lm_head", None)
    placement = Placement(model, plan.layers, as_device("cuda"))
    begun = time.monotonic()
    Walk(model, plan.layers, step, batches, pack_parameter, placement=placement).run()
    return sums, time.monotonic() - begun


def packed(shape: str, samples: int) -> dict[str, Tensor]:
    """The codes of GPTQ."""
    import hf_lowbit

    model = whole(shape)
    hf_lowbit.quantize(model, settings(samples), device="cuda")
    return {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype == torch.int32}


if __name__ == "__main__":
    main()
