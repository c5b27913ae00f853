"""Fine-tuning on packed weights: what the adapter's initialisation is worth, and what a step takes in memory.

    python benchmarks/finetune.py [--output finetune.json] [--plot finetune.png] [--bits 2] [--format int] [--group 64]
                                  [--rank 16] [--steps 60] [--seeds 0,1,2] [--learning-rate 2e-4] [--device cuda]
    python benchmarks/finetune.py --memory [--output finetune_memory.json] [--length 256] [--device cuda]

The first compares LoRA that starts at zero with LoRA that starts as the compensation of the rounding error: LoftQ's
(five turns of rounding and truncated SVD) and QERA's (weighted by the layers' inputs). The second measures one step
with 4-bit weights, with bfloat16 ones and with bitsandbytes' NF4, each in a fresh process. Both take SmolLM2-135M and
the texts of the testbed, unless --model names a folder; a run that was killed goes on from its JSON.
"""

from finetuning.command import main

if __name__ == "__main__":
    main(__doc__)
