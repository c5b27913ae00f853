"""Quality of quantized language models: methods and peers on one model, one calibration set, one held-out text.

    python benchmarks/quality_language.py [--bits 4,3,2] [--group 64] [--samples 64] [--length 256] [--tokens 8192]
                                          [--methods rtn,gptq,...] [--peers DIR_OF_VENVS] [--output quality.json]
                                          [--plot quality.png]

Every variant is quantized in a fresh process, which gives its seconds and its peak memory, and judged in this one by
KL(float || quantized) and perplexity, with 95 % intervals over windows, also of differences of pairs. The peers'
environments are described in benchmarks/peers/README.md; their dequantized weights are judged in the same model.
"""

from quality.command import main
from quality.language import prepare

if __name__ == "__main__":
    main(__doc__, prepare)
