"""Peak memory of one LoRA step by how the frozen weights are held, each in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetuning.command import Store

OUTPUT = "finetune_memory.json"
VARIANTS = ("packed int4", "packed nf4", "bfloat16", "bitsandbytes nf4")


def measure(options: Namespace, store: Store) -> None:
    """One process for each way to hold the weights."""
    for variant in VARIANTS:
        key = {name: getattr(options, name) for name in ("rank", "batch", "length", "device")}
        key |= {"variant": variant, "model": Path(options.model).name if options.model else "SmolLM2-135M-Instruct"}
        if store.has(key):
            continue
        request = {**key, "source": options.model, "work": str(options.work.absolute()), "group": options.group}
        # freed tensors go back to the system, so that the peak is the step's and not malloc's
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
        command = [sys.executable, "-m", "finetuning.memory", json.dumps(request)]
        done = subprocess.run(
            command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            print(f"{variant}: failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
            continue
        store.add(key, json.loads(done.stdout.splitlines()[-1]))


def show(rows: list[dict[str, Any]], options: Namespace) -> None:
    """A table."""
    print(f"{'weights':18}{'held, MB':>10}{'peak, MB':>10}{'of a step, MB':>15}{'seconds':>10}{'loss':>8}")
    for row in rows:
        held, peak = row["held_bytes"] / 1e6, row["peak_bytes"] / 1e6
        name, seconds = row["key"]["variant"], row["step_seconds"]
        print(f"{name:18}{held:10.0f}{peak:10.0f}{peak - held:15.0f}{seconds:10.2f}{row['loss']:8.3f}")


def worker(request: dict[str, Any]) -> dict[str, Any]:
    """Load, adapt and train one step, after one that allocates the optimizer's state.

    On the CPU memory is what the process has beyond its start without files' pages (RssAnon: bfloat16 weights are
    therefore copied out of their file); on a GPU what torch has allocated.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    from finetuning.curves import windows
    from hf_lowbit.testbed import calibration_text, smollm2

    source = request["source"] or str(smollm2())
    batch = windows(source, calibration_text()[:200_000], request["length"])[: request["batch"]]
    memory = Memory(request["device"])
    model = _load(request, source)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=request["rank"], target_modules="all-linear", task_type="CAUSAL_LM"))
    batch = batch.to(model.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> float:
        loss = model.train()(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    step()
    held, started = memory.now(), time.monotonic()
    with memory:
        loss = step()
    seconds = time.monotonic() - started
    return {"held_bytes": held, "peak_bytes": memory.highest, "loss": loss, "step_seconds": seconds}


def _load(request: dict[str, Any], source: str) -> Any:
    """The model in bfloat16 with its matrices held as the variant says, all of it out of its mapped file."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import hf_lowbit

    variant, arguments = request["variant"], {"dtype": torch.bfloat16, "device_map": request["device"]}
    if variant == "bitsandbytes nf4":
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
    elif variant != "bfloat16":
        source = _packed(request, source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, **arguments)
    if variant.startswith("packed"):
        hf_lowbit.prepare_for_training(model, gradient_checkpointing=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def _packed(request: dict[str, Any], source: str) -> str:
    """The folder of the quantized model, made in a process of its own."""
    import hf_lowbit

    fields = {"format": "int"} if request["variant"] == "packed int4" else {"format": "nf", "scale_bits": 8}
    config = hf_lowbit.RTNConfig(bits=4, group_size=request["group"], **fields)  # scale_bits: double quantization
    folder = Path(request["work"]) / request["variant"].replace(" ", "-")
    if not (folder / "config.json").is_file():
        command = [sys.executable, "-c", _QUANTIZE, source, str(folder), json.dumps(config.to_dict())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return str(folder)


_QUANTIZE = (
    "import sys, json, hf_lowbit\n"
    "hf_lowbit.quantize(sys.argv[1], hf_lowbit.RTNConfig.from_dict(json.loads(sys.argv[3])), output=sys.argv[2])"
)


class Memory:
    """What this process holds beyond its start, and the most of it inside a with block."""

    def __init__(self, device: str) -> None:
        self.device, self.highest, self._stop = device, 0, threading.Event()
        self._start = 0
        self._start = self.now()

    def now(self) -> int:
        """Bytes."""
        if self.device == "cuda":
            import torch

            return int(torch.cuda.memory_allocated())
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")) - self._start

    def __enter__(self) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        if self.device == "cuda":
            import torch

            self.highest = int(torch.cuda.max_memory_allocated())
            return
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.is_set():
            self.highest = max(self.highest, self.now())
            time.sleep(0.002)


if __name__ == "__main__":
    print(json.dumps(worker(json.loads(sys.argv[1]))))
