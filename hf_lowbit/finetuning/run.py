"""The run: checks, an optional quantization, training with checkpoints, the result."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_lowbit.config import ConfigError, LowbitConfig
from hf_lowbit.finetuning.examples import Examples, Row, collate, read_examples
from hf_lowbit.finetuning.result import write_result
from hf_lowbit.finetuning.settings import FinetuneSettings
from hf_lowbit.integrations.adapters import ADAPTER, adapter_names
from hf_lowbit.integrations.loading import load_quantized, read_json
from hf_lowbit.kernels.routes import has_bfloat16_units
from hf_lowbit.nn import PackedLinear
from hf_lowbit.plan import packed_modules

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger("hf_lowbit")

_CHECKPOINTS = 10  # of a run, at most; the last one is kept


def finetune(
    model: str,
    data: str,
    output: str | Path,
    settings: FinetuneSettings | None = None,
    config: LowbitConfig | None = None,
    resume: bool = True,
) -> dict[str, Any]:
    """Train a LoRA adapter on a packed language model.

    A model with a compensation adapter (``low_rank`` with keep="adapter") has that adapter trained, and ``output``
    becomes a complete model folder; on any other a new adapter is trained, and ``output`` is a PEFT folder with it.

    Args:
        model: folder or repository, quantized by hf_lowbit, or a float one with a ``config``.
        data: a file or dataset (:func:`hf_lowbit.finetuning.examples.read_examples`).
        output: a new or empty folder. While the run lasts, its checkpoints are in a hidden folder beside it.
        config: quantize the model first, with a compensation adapter.
        resume: take up the last checkpoint of a run with the same arguments that was killed.

    Returns:
        What is written to ``lowbit_finetune.json``.

    Raises:
        ConfigError, DataError: a request that cannot be fulfilled, before the work begins.
        FileExistsError: ``output`` is not empty, or an unfinished run with other arguments is beside it.
    """
    started, settings, output = time.monotonic(), settings or FinetuneSettings(), Path(output)
    _check_output(output)
    _check_model(model, config)
    examples = _examples(model, data, settings)
    train, held_out = examples.split(settings.held_out, settings.seed)
    _check_enough(train, settings)
    request: dict[str, Any] = {"model": model, "data": examples.fingerprint, "settings": settings.to_dict()}
    request["quantization"] = None if config is None else config.to_dict()
    work = _work_folder(output, request, resume)
    base = model if config is None else _quantized(model, config, examples, work / "base")
    tuned, fresh = _adapted(load_quantized(base), settings, config)
    trainer = _trainer(tuned, train, held_out, settings, work)
    before = _loss_before(trainer, work)
    checkpoint = _last_checkpoint(work)
    if checkpoint is not None:
        logger.info("resuming from %s", Path(checkpoint).name)
    trainer.train(resume_from_checkpoint=checkpoint)
    after = trainer.evaluate()["eval_loss"]
    facts = {
        "model": model,
        "data": {"description": examples.description, "train": len(train), "held_out": len(held_out)},
        "adapter": _describe(tuned, fresh),
        "settings": settings.to_dict(),
        "held_out_loss": {"before": before, "after": after},
        "losses": [{key: e[key] for key in ("step", "loss")} for e in trainer.state.log_history if "loss" in e],
        "seconds": time.monotonic() - started,
    }
    write_result(tuned, output, base, facts, fresh)
    shutil.rmtree(work)
    return facts


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output} is a file; the result needs a folder")
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; name a new or empty folder")


def _check_model(model: str, config: LowbitConfig | None) -> None:
    stored = read_json(model, "config.json")
    if stored is None:
        raise ConfigError(
            f"{model} has no config.json: it is neither a folder with a transformers model nor a repository that "
            "can be reached"
        )
    method = str(stored.get("quantization_config", {}).get("quant_method", ""))
    if config is None and not method.startswith("lowbit_"):
        raise ConfigError(
            f"{model} is not quantized by hf_lowbit: name a quantized model, or quantize it first with a method"
        )
    if config is not None:
        if method:
            raise ConfigError(f"{model} is quantized already ({method}): leave the method and bits out")
        if config.low_rank is None or config.low_rank.keep != "adapter":
            raise ConfigError('a model that is quantized first needs low_rank=LowRankConfig(rank, keep="adapter")')


def _examples(model: str, data: str, settings: FinetuneSettings) -> Examples:
    from transformers import AutoConfig, AutoTokenizer

    positions = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", None)
    if positions is not None and settings.max_length > positions:
        raise ConfigError(f"max_length={settings.max_length} exceeds the {positions} positions of {model}")
    return read_examples(data, AutoTokenizer.from_pretrained(model), settings.max_length)


def _check_enough(train: list[Row], settings: FinetuneSettings) -> None:
    if len(train) < settings.batch_size:
        raise ConfigError(
            f"the data makes {len(train)} samples of up to {settings.max_length} tokens to train on, fewer than one "
            f"batch of {settings.batch_size}: give more text, or lower the batch size or max_length"
        )


def _work_folder(output: Path, request: dict[str, Any], resume: bool) -> Path:
    """The hidden folder of the run, which says what was asked for."""
    work = output.absolute().parent / f".{output.absolute().name}.lowbit-finetune"
    told, asked = work / "request.json", json.loads(json.dumps(request))
    if work.exists() and not resume:
        shutil.rmtree(work)
    if told.is_file() and json.loads(told.read_text()) != asked:
        if {path.name for path in work.iterdir()} - {"request.json", "before.json"}:  # else nothing would be lost
            raise FileExistsError(
                f"an unfinished run with other arguments is beside {output}: repeat its arguments, name another "
                "folder, or pass resume=False to drop it"
            )
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    told.write_text(json.dumps(request, indent=2))
    return work


def _quantized(model: str, config: LowbitConfig, examples: Examples, folder: Path) -> str:
    from hf_lowbit.quantization import quantize

    quantize(model, config, data=examples.texts, output=folder)
    return str(folder)


def _adapted(model: Any, settings: FinetuneSettings, config: LowbitConfig | None) -> tuple[Any, bool]:
    """The PEFT model, and whether its adapter is a new one."""
    from transformers import set_seed

    from hf_lowbit.integrations.peft import prepare_for_training

    if not torch.cuda.is_available() and not has_bfloat16_units(torch.device("cpu")):
        nn.Module.to(model, torch.float32)  # what is packed stays packed
    set_seed(settings.seed)
    compensated = ADAPTER in adapter_names(model)
    if config is not None and not compensated:
        raise ConfigError("the quantized model came without the adapter that its low_rank asks for")
    if compensated and settings.alpha is not None:
        raise ConfigError(
            "alpha is for a new adapter: this model's compensation is trained, which keeps its scale of 1"
        )
    model = prepare_for_training(model, settings.gradient_checkpointing, train_compensation=compensated)
    if compensated:
        logger.info("the model's compensation adapter is trained; it keeps its own rank")
        return model, False
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    _check_rank(model, settings.rank, targets)
    from peft import LoraConfig, get_peft_model

    alpha = 2 * settings.rank if settings.alpha is None else settings.alpha
    lora = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    return get_peft_model(model, lora), True


def _check_rank(model: nn.Module, rank: int, targets: str | list[str]) -> None:
    for name, layer in packed_modules(model).items():
        chosen = targets == "all-linear" or name.rpartition(".")[2] in targets
        if chosen and isinstance(layer, PackedLinear) and rank > min(layer.in_features, layer.out_features):
            shape = f"{layer.out_features} x {layer.in_features}"
            raise ConfigError(f"rank={rank} exceeds the smaller side of {name}, {shape}")


def _trainer(model: Any, train: list[Row], held_out: list[Row], settings: FinetuneSettings, work: Path) -> Trainer:
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    class Told(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                logger.info("step %d of %d: loss %.4f", state.global_step, state.max_steps, float(logs["loss"]))

    per_epoch = -(-len(train) // (settings.batch_size * settings.accumulation))
    steps = settings.steps or settings.epochs * per_epoch
    arguments = TrainingArguments(
        str(work / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(0.03 * steps),
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_strategy="steps",
        save_steps=max(1, -(-steps // _CHECKPOINTS)),
        save_total_limit=1,
        logging_steps=max(1, steps // 100),
        seed=settings.seed,
        data_seed=settings.seed,
        report_to=[],
        disable_tqdm=True,
        label_names=["labels"],
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=lambda rows: collate(rows, padding=0),
        callbacks=[Told()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _loss_before(trainer: Trainer, work: Path) -> float:
    """The held-out loss before the first step, which a resumed run has measured already."""
    kept = work / "before.json"
    if not kept.is_file():
        kept.write_text(json.dumps(trainer.evaluate()["eval_loss"]))
    loss: float = json.loads(kept.read_text())
    return loss


def _last_checkpoint(work: Path) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    folder = work / "checkpoints"
    found: str | None = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return found


def _describe(model: Any, fresh: bool) -> dict[str, Any]:
    config = next(iter(model.peft_config.values()))
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    start = "zero" if fresh else "compensation of the rounding error"
    return {"rank": config.r, "alpha": config.lora_alpha, "parameters": count, "initialisation": start}
