"""AutoRound in an environment of its own: its dequantized weights, as a float checkpoint. Imports nothing of ours."""

import json
import sys
import time
from pathlib import Path

from peak import peak_mb


def main(order):
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(order["threads"])
    ids = torch.load(order["data"])
    tokenizer = AutoTokenizer.from_pretrained(order["model"])
    model = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float32)
    begun = time.monotonic()
    rounder = AutoRound(
        model,
        tokenizer,
        bits=order["bits"],
        group_size=order["group"] or -1,
        sym=order["fields"].get("symmetric", True),
        iters=order["fields"]["iterations"],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=8,
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in ids],
        device_map="cpu",
        low_gpu_mem_usage=False,
        amp=has_bfloat16_units(),
    )
    result = rounder.quantize()
    seconds = time.monotonic() - begun
    quantized = result[0] if isinstance(result, tuple) else result
    quantized.float().save_pretrained(order["output"])
    tokenizer.save_pretrained(order["output"])
    facts = {"seconds": seconds, "peak_mb": peak_mb()}
    Path(order["facts"]).write_text(json.dumps(facts))


def has_bfloat16_units():
    """Where it is faster, AutoRound computes in bfloat16, as it does by default."""
    import torch

    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
