"""Peak anonymous memory of quantizing a checkpoint while it loads, measured in the process that does it.

    MALLOC_MMAP_THRESHOLD_=1000000 python -m tests.memory.probe FOLDER '{"bits": 4, "group_size": 64}'

prints one JSON line. Anonymous memory is what cannot be given back to a file: the checkpoint's own mapped pages do not
count. The threshold makes malloc return freed tensors to the system, so that the peak is the program's and not glibc's.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class PeakSampler:
    """Samples anonymous memory every two milliseconds in a thread."""

    def __init__(self) -> None:
        self.peak, self._stop = anonymous_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.002)

    def __enter__(self) -> PeakSampler:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous_bytes())


def main(folder: str, fields: str) -> None:
    """Quantize the language model in ``folder`` with RTN and print what it took."""
    import torch
    from transformers import AutoModelForCausalLM

    import hf_lowbit

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    hf_lowbit.quantize(torch.nn.Sequential(torch.nn.Linear(64, 64)), hf_lowbit.RTNConfig(bits=4, group_size=64))
    before = anonymous_bytes()
    started = time.monotonic()
    with PeakSampler() as sampler:
        config = hf_lowbit.RTNConfig(**json.loads(fields))
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    report = hf_lowbit.report(model)
    parameters = {id(p): p for p in model.parameters()}.values()
    result = {
        "peak_bytes": sampler.peak - before,
        "packed_bytes": report.packed_bytes,
        "largest_float_bytes": max(layer.elements for layer in report.layers) * 2,
        "float_bytes": report.elements * 2 + report.other_bytes,
        "other_bytes": report.other_bytes,
        "resident_bytes": sum(p.numel() * p.element_size() for p in parameters),
        "bits_per_weight": report.bits_per_weight,
        "seconds": time.monotonic() - started,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
