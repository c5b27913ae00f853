"""What quickstart does, step by step."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from hf_lowbit.cli.console import say
from hf_lowbit.cli.fresh import fingerprint, load_in_fresh_process
from hf_lowbit.cli.keep import keep_evaluation
from hf_lowbit.cli.progress import progress, windows

QUESTION = "What is the capital of France?"
GROUP_SIZE = 64
SEQUENCE_LENGTH = 512


def tour(folder: Path, bits: int, max_tokens: int) -> dict[str, Any]:
    """Fetch, quantize while loading, save, reload in a fresh process, measure, answer; all numbers of it.

    An earlier result in ``folder`` is replaced; what was measured on exactly these weights before is not measured
    again.

    Raises:
        FileExistsError: the folder holds something that hf_lowbit did not write. Nothing is fetched then.
    """
    from hf_lowbit.config import LowbitConfig
    from hf_lowbit.method import methods
    from hf_lowbit.output import prepare_output
    from hf_lowbit.reporting import Report

    begun = time.monotonic()
    config: LowbitConfig = methods()["rtn"].config_class.from_dict({"bits": bits, "group_size": GROUP_SIZE})
    prepare_output(folder, config, None, resume=False)
    earlier = Report.load(folder)
    source, origin, fetched = _fetch()

    say(f"quantizing it to {bits} bits in groups of {GROUP_SIZE} while it loads")
    started = time.monotonic()
    model = _quantize(source, config, folder)
    quantized = time.monotonic() - started

    say("loading the result in a fresh process, and asking it a question")
    saved = fingerprint(model)
    fresh = load_in_fresh_process(folder, QUESTION)

    started = time.monotonic()
    settings = {"weights": saved[:16], "max_tokens": max_tokens, "sequence_length": SEQUENCE_LENGTH}
    repeat = f"hf-lowbit quickstart --bits {bits} --max-tokens {max_tokens}"
    known = earlier.evaluation if earlier is not None else {}
    reused = all(known.get(name) == value for name, value in settings.items())
    evaluation = known if reused else {**_evaluate(source, folder, max_tokens), **settings, "command": repeat}
    evaluated = time.monotonic() - started
    keep_evaluation(model, folder, evaluation)
    seconds = {
        "fetch": fetched,
        "quantize": quantized,
        "load": fresh["load_seconds"],
        "answer": fresh["answer_seconds"],
        "evaluate": evaluated,
        "total": time.monotonic() - begun,
    }
    return {
        **origin,
        **_sizes(folder, source),
        "output": str(folder),
        "method": "rtn",
        "bits": bits,
        "group_size": GROUP_SIZE,
        "sha256": saved,
        "reload_equal": fresh["sha256"] == saved,
        "evaluation": evaluation,
        "evaluation_reused": reused,
        "question": QUESTION,
        "answer": fresh["answer"],
        "answer_tokens": fresh["answer_tokens"],
        "threads": _threads(),
        "seconds": seconds,
    }


def _fetch() -> tuple[Path, dict[str, Any], float]:
    from hf_lowbit.testbed import read_source, smollm2

    say("fetching SmolLM2-135M-Instruct (once; later runs find it in the cache)")
    started = time.monotonic()
    source = smollm2()
    seconds = time.monotonic() - started
    recorded = read_source(source)
    origin = {
        "model": recorded["name"],
        "source": recorded["source"],
        "rounded": recorded["rounded"],
        "note": recorded["note"],
    }
    return source, origin, seconds


def _quantize(source: Path, config: Any, folder: Path) -> Any:
    from hf_lowbit import quantize

    with progress("quantizing"):
        return quantize(str(source), config, output=folder, resume=False)


def _evaluate(source: Path, folder: Path, max_tokens: int) -> dict[str, Any]:
    """Quality of what was saved. Its weights are decoded once, for speed: in float32 the outputs are the same bits."""
    import torch
    from transformers import AutoTokenizer

    from hf_lowbit import dequantize
    from hf_lowbit.cli.measure import in_float32
    from hf_lowbit.cli.run import load
    from hf_lowbit.evaluation import evaluate_language_model
    from hf_lowbit.testbed import validation_text

    say(f"measuring it and the original on {max_tokens:,} tokens of text: the longest step")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    compared = in_float32(load(source, "loading the original"))
    options: dict[str, Any] = {"sequence_length": SEQUENCE_LENGTH, "max_tokens": max_tokens}
    measured = dequantize(in_float32(load(folder, "loading the result")), torch.float32)
    with windows(measured, "measuring", total=math.ceil(max_tokens / (SEQUENCE_LENGTH - 1))):
        values = evaluate_language_model(measured, tokenizer, validation_text(), reference=compared, **options)
    return {**values, "dtype": "float32", "data": "the validation text shipped with hf_lowbit"}


def _sizes(folder: Path, source: Path) -> dict[str, Any]:
    from hf_lowbit.cli.account import accounts
    from hf_lowbit.cli.headers import weight_files

    report = accounts(folder)[""].report
    return {
        "bits_per_weight": report.bits_per_weight,
        "original_bits": report.original_bits,
        "packed_bytes": report.packed_bytes,
        "elements": report.elements,
        "layers": len([layer for layer in report.layers if layer.elements]),
        "file_bytes": sum(path.stat().st_size for path in weight_files(folder)),
        "float_file_bytes": sum(path.stat().st_size for path in weight_files(source)),
    }


def _threads() -> int:
    import torch

    return torch.get_num_threads()
