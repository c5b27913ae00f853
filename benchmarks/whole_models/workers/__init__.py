"""One module per runtime, each run by the interpreter of its own virtual environment.

`protocol` and `language` import nothing of hf_lowbit; only `lowbit`, `whisper`, `diffusion` and `llama1b` do.
"""
