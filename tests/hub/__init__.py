"""A local Hugging Face Hub for the test suite."""
