"""Loss curves of LoRA by its initialisation: the same rank, scaling, data and steps."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from finetuning.command import Store

OUTPUT = "finetune.json"
# Name -> LowRankConfig's fields; None: a new adapter, whose B is zero.
VARIANTS: dict[str, dict[str, Any] | None] = {
    "zero": None,
    "loftq": {"metric": "identity", "iterations": 5},
    "qera": {"metric": "full"},
}
_KEPT = ("format", "bits", "group", "rank", "steps", "evaluate_every", "batch", "length", "windows", "learning_rate")
_CALIBRATION = 64  # windows that QERA's metric is collected on


def measure(options: Namespace, store: Store) -> None:
    """Train every variant with every seed."""
    for variant in options.variants.split(","):
        for seed in map(int, options.seeds.split(",")):
            key = {name: getattr(options, name) for name in _KEPT}
            key |= {"model": Path(options.model).name if options.model else "SmolLM2-135M-Instruct"}
            key |= {"variant": variant, "seed": seed, "device": options.device}
            if not store.has(key):
                started = time.monotonic()
                values = _run(options, variant, seed)
                store.add(key, {**values, "seconds": time.monotonic() - started})
                print(f"{variant}, seed {seed}: {values['held_out'][-1]['loss']:.4f} after {options.steps} steps")


def show(rows: list[dict[str, Any]], options: Namespace) -> None:
    """A table, and a picture if one is wanted."""
    curves = _curves(rows)
    steps = [step for step, _ in next(iter(curves.values()))]
    print("held-out loss, nats per token, mean of the seeds (standard deviation)")
    print(f"{'step':8}" + "".join(f"{step:>18}" for step in steps))
    for variant, points in curves.items():
        cells = (f"{mean(losses):.4f} ({stdev(losses) if len(losses) > 1 else 0:.4f})" for _, losses in points)
        print(f"{variant:8}" + "".join(f"{cell:>18}" for cell in cells))
    if options.plot:
        _draw(curves, rows[0]["key"], options.plot)


def _curves(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, list[float]]]]:
    """Variant -> (step, losses of the seeds)."""
    found: dict[str, list[tuple[int, list[float]]]] = {}
    for variant in dict.fromkeys(row["key"]["variant"] for row in rows):
        runs = [row["held_out"] for row in rows if row["key"]["variant"] == variant]
        found[variant] = [(points[0]["step"], [p["loss"] for p in points]) for points in zip(*runs, strict=True)]
    return found


def _draw(curves: dict[str, list[tuple[int, list[float]]]], key: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for variant, points in curves.items():
        steps = [step for step, _ in points]
        axes.plot(steps, [mean(losses) for _, losses in points], marker="o", markersize=3, label=variant)
        low, high = ([choose(losses) for _, losses in points] for choose in (min, max))
        axes.fill_between(steps, low, high, alpha=0.2)
    axes.set(xlabel="steps", ylabel="held-out loss (nats per token)")
    axes.set_title(f"{key['model']}, {key['bits']} bits, groups of {key['group']}, LoRA of rank {key['rank']}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _run(options: Namespace, variant: str, seed: int) -> dict[str, Any]:
    """Train one adapter; the losses of its steps, and of held-out text on the way."""
    from hf_lowbit.testbed import calibration_text, smollm2, validation_text

    source = options.model or str(smollm2())
    train = windows(source, calibration_text(), options.length)
    held_out = windows(source, validation_text(), options.length)[: options.windows]
    model = _adapted(options, source, variant, seed, train)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(len(train), generator=generator) for _ in range(-(-_samples(options) // len(train)))]
    )
    losses, points = [], []
    for step in range(options.steps + 1):
        if step % options.evaluate_every == 0 or step == options.steps:
            points.append({"step": step, "loss": _loss(model, held_out, options.batch)})
        if step == options.steps:
            break
        batch = train[order[step * options.batch : (step + 1) * options.batch]].to(model.device)
        loss = model.train()(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "held_out": points, "parameters": sum(p.numel() for p in trained)}


def _samples(options: Namespace) -> int:
    return int(options.steps * options.batch)


def _adapted(options: Namespace, source: str, variant: str, seed: int, train: Tensor) -> Any:
    """The quantized model with the variant's adapter, all layers of its body adapted and scaled by 1."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import hf_lowbit

    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    folder = options.work / f"{variant}-{options.format}{options.bits}-g{options.group}-r{options.rank}"
    compensation = VARIANTS[variant]
    if not (folder / "config.json").is_file():
        low_rank = None
        if compensation is not None:
            low_rank = hf_lowbit.LowRankConfig(rank=options.rank, keep="adapter", **compensation)
        grid = {"symmetric": False} if options.format == "int" else {"format": options.format}
        config = hf_lowbit.RTNConfig(bits=options.bits, group_size=options.group, low_rank=low_rank, **grid)
        data = train[:_CALIBRATION] if compensation and compensation["metric"] != "identity" else None
        if data is not None:
            config.num_samples, config.sequence_length = len(data), data.shape[1]
        hf_lowbit.quantize(source, config, data=data, output=folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    nn.Module.to(model, options.device)
    torch.manual_seed(seed)
    started = compensation is not None
    model = hf_lowbit.prepare_for_training(model, gradient_checkpointing=False, train_compensation=started)
    if not started:
        config = LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    return model


@torch.no_grad()
def _loss(model: Any, rows: Tensor, batch: int) -> float:
    parts = [part.to(model.device) for part in rows.split(batch)]
    total = sum(float(model.eval()(input_ids=part, labels=part).loss) * len(part) for part in parts)
    return total / len(rows)


def windows(source: str, text: str, length: int) -> Tensor:
    """Token ids ``[windows, length]`` of a text."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(source)(text, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
