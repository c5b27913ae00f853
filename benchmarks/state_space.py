"""State-space models: quality, size and speed of the trained Mamba and Mamba-2 of tests/assets, quantized and float.

    python benchmarks/state_space.py [--models mamba,mamba2] [--rows 'float,quamba*'] [--output FILE.json]
                                     [--plot FILE.png] [--tokens 16384] [--samples 48]
    python benchmarks/state_space.py --speed [--models mamba,mamba2,mamba-130m,mamba2-130m] [--rounds 7] ...
    python benchmarks/state_space.py --list

Quality: held-out documentation (tests/assets/debian-text) in windows of 512 tokens, twice: as prompts, each in one
pass, and token by token through the cache after its first 64 tokens, which is where quantized states are read again.
Perplexity, as a multiple of the float model's on the same tokens too, KL to the float model and top-1 agreement, with
95 % intervals by bootstrap over windows; bytes of one sequence's state in the cache, and of the checkpoint as it lies
on disk (what is not packed in 16 bits). "float" is transformers' own path in float32.

Speed: milliseconds of a prompt of 512 tokens and of one decoded token (after 64), batch 1, all rows in turn in every
round of one run; medians, and medians of the ratio to float32 of the same round. mamba-130m and mamba2-130m have the
sizes of the published models and random weights: of them nothing but speed is measured.

Each row is written as it ends, and rows that the file has with the same settings are kept (--again measures them
anew). Rows that failed are tried again, but for those of torchao and bitsandbytes, where the error is the result.
These two are measured where they are installed (benchmarks/peers); nothing is downloaded.
"""

from mambas.command import main

if __name__ == "__main__":
    main(__doc__)
