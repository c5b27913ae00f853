"""Low-rank compensation of a quantized language model, against plain methods of the same bits per weight.

    python benchmarks/low_rank.py [--only 'gptq-3-*,*-mixed*'] [--device cuda] [--samples 64] [--length 256]
                                  [--tokens 8192] [--output low_rank.json] [--plot low_rank.png]
    python benchmarks/low_rank.py --list
    python benchmarks/low_rank.py --layers [--bits 3,2] [--rank 16] [--output layers.json]

Rows are rtn and gptq of 3 and 2 bits: alone, in groups of 64, 32 and 16; with low-rank branches of every metric; with
ranks, bits, or both chosen within the budget that such a branch takes. All are judged by KL(float || quantized) and
perplexity on held-out text, with 95 % intervals. Rows that the JSON has already are kept. --layers measures on every
layer what each metric leaves of the output's error, fails where "full" does not leave least, and names the layers that
do not follow the usual order of the others.
"""

from low_rank_rows.command import main

if __name__ == "__main__":
    main(__doc__)
