"""Whole models on this CPU: language, speech, diffusion, and other runtimes in environments of their own.

    python benchmarks/models_cpu.py [--only smollm2,whisper,diffusion,llama1b] [--peers DIR_OF_VENVS]
                                    [--output models_cpu.json] [--plot models_cpu.png]

Every number comes from a fresh process that loads a saved model; variants take turns, medians over the rounds are
reported. The peers' environments are described in benchmarks/peers/README.md; without them they are listed as not
measured. Memory is read from /proc: Linux only.
"""

from whole_models.command import main

if __name__ == "__main__":
    main(__doc__)
