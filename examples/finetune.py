"""Fine-tune a model whose weights stay packed: quantize, train the adapter that repairs the rounding, save, reload.

    pip install "hf-lowbit[train]"
    python examples/finetune.py HuggingFaceTB/SmolLM2-135M-Instruct smollm2-tuned

The adapter is LoftQ's (arXiv 2310.08659): it begins as the low-rank part of what rounding lost, and is trained further.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import hf_lowbit
from hf_lowbit.testbed import calibration_text


def main() -> None:
    """Train on the prose that comes with hf_lowbit; put your own texts in ``rows``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()

    low_rank = hf_lowbit.LowRankConfig(rank=16, keep="adapter")
    config = hf_lowbit.RTNConfig(bits=3, group_size=64, low_rank=low_rank)
    model = AutoModelForCausalLM.from_pretrained(options.model, quantization_config=config)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    ids = tokenizer(calibration_text()[:200_000], verbose=False)["input_ids"]
    starts = range(0, len(ids) - options.length, options.length)
    rows = Dataset.from_list([{"input_ids": ids[start : start + options.length]} for start in starts])

    model = hf_lowbit.prepare_for_training(model, train_compensation=True)  # or get_peft_model, for a new adapter
    arguments = SFTConfig(
        output_dir=f"{options.output}-checkpoints",
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=2e-4,
        logging_steps=10,
        save_steps=20,
        bf16=False,
        report_to=[],
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are token ids already
    )
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()  # or trainer.train(resume_from_checkpoint=True)

    model.get_base_model().save_pretrained(options.output)  # packed weights and the trained adapter
    tokenizer.save_pretrained(options.output)
    reloaded = AutoModelForCausalLM.from_pretrained(options.output)
    print(f"{hf_lowbit.report(reloaded).bits_per_weight:.2f} bits per weight, in {options.output}")


if __name__ == "__main__":
    main()
