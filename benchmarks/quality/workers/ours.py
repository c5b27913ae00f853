"""Quantize with a method of hf_lowbit, in a process of its own: python -m quality.workers.ours ORDER.json"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

from peak import peak_mb


def main(order: dict[str, object]) -> None:
    import torch

    import hf_lowbit

    torch.set_num_threads(int(str(order["threads"])))
    data, length = torch.load(str(order["data"])), int(str(order["length"]))
    method = hf_lowbit.methods()[str(order["method"])]
    fields = dict(order["fields"])  # type: ignore[call-overload]
    config = method.config_class(**fields)
    if method.make_recipe(config).calibrate is not None:
        config = dataclasses.replace(config, dataset=data, num_samples=len(data), sequence_length=length)
    begun = time.monotonic()
    if order["device"] == "cpu":
        hf_lowbit.quantize(order["model"], config, output=str(order["output"]))
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(order["model"], dtype="auto").to(order["device"]).eval()
        hf_lowbit.quantize(model, config).save_pretrained(str(order["output"]))
    seconds = time.monotonic() - begun
    report = json.loads((Path(str(order["output"])) / "lowbit_report.json").read_text())
    facts = {
        "seconds": seconds,
        "peak_mb": peak_mb(),
        "bits_per_weight": report["bits_per_weight"],
        "notes": len(report["warnings"]),
    }
    Path(str(order["facts"])).write_text(json.dumps(facts))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
