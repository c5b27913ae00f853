"""LoRA trains on every method's packed layers, saves, and reloads to the same output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.matrix.models import TinyModel, fingerprint


def test_lora_trains_saves_and_reloads(
    method: Any, tiny: TinyModel, artefact: Callable[..., Any], tmp_path: Path
) -> None:
    saved = artefact(method, tiny)
    base = tiny.load(saved.folder, torch.float32)
    before = fingerprint(base)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=list(tiny.lora)))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        output = model(**tiny.inputs(torch.float32))
        loss = (output.logits if hasattr(output, "logits") else output.sample).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n), "some adapter did not train"
    model.eval()
    trained = tiny.run(model)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(tiny.load(saved.folder, torch.float32), tmp_path / "adapter").eval()
    assert torch.equal(tiny.run(reloaded), trained)
    assert fingerprint(model.unload()) == before, "training changed the base"
