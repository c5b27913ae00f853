"""Peak anonymous memory of rotating a model's residual stream, in the process that does it.

    MALLOC_MMAP_THRESHOLD_=1000000 python -m tests.memory.rotating FOLDER

prints one JSON line. See :mod:`tests.memory.probe` for what is measured.
"""

from __future__ import annotations

import json
import sys

from tests.memory.probe import PeakSampler, anonymous_bytes


def main(folder: str) -> None:
    """The language model in ``folder``, tied, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_lowbit.calibration.rotating import rotate_stream

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_input_embeddings().weight.numel()
    ids = torch.arange(1, 33)[None]
    with torch.no_grad():
        model(input_ids=ids)  # what the first call costs
    before = anonymous_bytes()
    with PeakSampler() as sampler:
        rotated = rotate_stream(model, [{"input_ids": ids}])
    after = anonymous_bytes()
    facts = {"peak_bytes": sampler.peak - before, "after_bytes": after - before, "rotated": bool(rotated.readers)}
    print(json.dumps({**facts, "float32_bytes": 4 * (size + head), "stored_bytes": 2 * (size + head)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
