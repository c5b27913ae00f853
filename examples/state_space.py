"""A Mamba-2 in 4 bits: find the blocks that need full-precision values, quantize, save, reload, write.

    python examples/state_space.py tests/assets/mamba2-debian out --data tests/assets/debian-text/calibration.txt

Most blocks become W4A8 with int8 states in the cache, a quarter of them W4A16: Quamba2's W4AX (arXiv 2503.22879).
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lowbit


def main() -> None:
    """Search, quantize, and continue a prompt with what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", required=True, help="a text file, or the id of a dataset")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--prompt", default="The package is installed by")
    options = parser.parse_args()

    config = hf_lowbit.Quamba2Config(
        bits=4, dataset=options.data, num_samples=options.samples, sequence_length=options.length
    )
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    found = hf_lowbit.search_blocks(model, config)
    print(f"W4A16: {', '.join(found.blocks)}")

    model = hf_lowbit.quantize(model, found.config)
    print(f"{hf_lowbit.report(model).bits_per_weight:.2f} bits per weight")
    model.save_pretrained(options.output)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.save_pretrained(options.output)

    model = AutoModelForCausalLM.from_pretrained(options.output)
    inputs = tokenizer(options.prompt, return_tensors="pt", return_token_type_ids=False)
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
