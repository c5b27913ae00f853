"""Quality of Whisper-tiny.en with a quantized decoder: methods on one calibration set, other speakers held out.

    python benchmarks/quality_speech.py [--bits 4,3] [--group 64] [--samples 32] [--methods rtn,gptq,...]
                                        [--output speech.json] [--plot speech.png]

The decoder's matrices are quantized from their true float16 weights; encoder, embedding and head stay float. It is
calibrated on windows of five seconds of one recording and judged on all such windows of two others, a second apart, by
KL(float || quantized) and perplexity of what the float model hears in them. The windows overlap: ten that follow each
other count as one for the intervals.
"""

from quality.command import main
from quality.speech import prepare

if __name__ == "__main__":
    main(__doc__, prepare, bits="4,3", samples=32, length=64)
