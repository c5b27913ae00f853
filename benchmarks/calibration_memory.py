"""Peak memory of a calibrated quantization, against the bytes of the float checkpoint.

    python benchmarks/calibration_memory.py [--method gptq] [--bits 4] [--group 64] [--hidden 2048] [--layers 16]
                                            [--samples 16] [--length 512] [--limit-mb 256] [--output memory.json]

A Llama of random bfloat16 weights (about 1.2 billion with the default sizes) is written to a temporary folder; a fresh
process quantizes it. Peaks are of anonymous memory from before the model is loaded: pages of the checkpoint file, which
the system can take back, do not count. --limit-mb bounds the activations that are kept in memory; the rest is spilled.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

_MMAP_THRESHOLD = "1000000"  # freed tensors go back to the system: the peak is the program's, not the allocator's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--limit-mb", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        quantize(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), options.hidden, options.layers)
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": _MMAP_THRESHOLD}
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", folder]
        facts = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    print(json.dumps(facts, indent=1))
    if options.output:
        options.output.write_text(json.dumps({**vars(options), **facts}, indent=1, default=str))


def write_checkpoint(folder: Path, hidden: int, layers: int) -> None:
    """A Llama 3.2 of these sizes, drawn as transformers initialises it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")


def quantize(options: argparse.Namespace) -> None:
    """In the worker: one JSON line."""
    import torch
    from transformers import AutoModelForCausalLM

    import hf_lowbit
    from hf_lowbit import engine

    torch.set_num_threads(options.threads)
    engine.default_limit = lambda: options.limit_mb << 20  # type: ignore[assignment]
    spilled, logger = Spilled(), logging.getLogger("hf_lowbit")
    logger.addHandler(spilled)
    logger.setLevel(logging.INFO)
    size = sum(file.stat().st_size for file in options.worker.glob("*.safetensors"))
    ids = torch.randint(0, 128256, (options.samples, options.length), generator=torch.Generator().manual_seed(0))
    method = hf_lowbit.methods()[options.method]
    config = method.config_class(
        bits=options.bits, group_size=options.group, dataset=ids, num_samples=len(ids), sequence_length=options.length
    )
    before, begun = anonymous(), time.monotonic()
    with Peak() as peak:
        model = AutoModelForCausalLM.from_pretrained(options.worker, quantization_config=config, dtype=torch.bfloat16)
    facts = {
        "float_mb": size / 2**20,
        "peak_mb": (peak.largest - before) / 2**20,
        "ratio": (peak.largest - before) / size,
        "spilled_mb": spilled.megabytes,
        "seconds": time.monotonic() - begun,
        "bits_per_weight": hf_lowbit.report(model).bits_per_weight,
    }
    print(json.dumps(facts))


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """Samples anonymous memory in a thread."""

    def __enter__(self) -> Peak:
        self.largest, self._stop = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.005):
            self.largest = max(self.largest, anonymous())

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


class Spilled(logging.Handler):
    """What the engine says it has written to disk."""

    megabytes = 0

    def emit(self, record: logging.LogRecord) -> None:
        if "of activations were spilled" in str(record.msg):
            self.megabytes = record.args[0]  # type: ignore[index,assignment]


if __name__ == "__main__":
    main()
