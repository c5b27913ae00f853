"""Adapters to the Hugging Face libraries: the only code that touches their internals."""
