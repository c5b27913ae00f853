"""GPTQModel in an environment of its own: its dequantized weights, as a float checkpoint. Imports nothing of ours."""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from peak import peak_mb


def main(order):
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, order["threads"])))  # its loader wants two, and takes one

    import torch
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(order["threads"])
    ids = torch.load(order["data"])
    config = QuantizeConfig(
        bits=order["bits"],
        group_size=order["group"] or -1,
        sym=order["fields"].get("symmetric", True),
        desc_act=False,
        offload_to_disk=False,  # as ours
    )
    begun = time.monotonic()
    model = GPTQModel.load(order["model"], config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    model.quantize(rows, batch_size=8)
    facts = {"seconds": time.monotonic() - begun, "peak_mb": peak_mb()}
    with tempfile.TemporaryDirectory() as folder:  # what it has in memory is laid out for saving
        model.save(folder)
        loaded = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16)
        state = dequantized(loaded.model.eval().float())  # scales are float16 on disk; their products are not
    plain = AutoModelForCausalLM.from_pretrained(order["model"], dtype=torch.float32)
    missing, unexpected = plain.load_state_dict(state, strict=False)
    if unexpected or any("weight" in name and "lm_head" not in name for name in missing):
        raise SystemExit(f"weights do not fit: missing {missing[:5]}, unexpected {unexpected[:5]}")
    plain.save_pretrained(order["output"])
    AutoTokenizer.from_pretrained(order["model"]).save_pretrained(order["output"])
    Path(order["facts"]).write_text(json.dumps(facts))


def dequantized(model):
    """Parameter name -> float32 values, of packed layers those of their codes."""
    state = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            state[f"{name}.weight"] = module.dequantize_weight().t().float()
        else:
            for key, parameter in module.named_parameters(recurse=False):
                state[f"{name}.{key}" if name else key] = parameter.float()
    return state


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
