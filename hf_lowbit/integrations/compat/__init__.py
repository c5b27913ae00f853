"""Every name of a Hugging Face library that is private or undocumented and that hf_lowbit relies on, by library.

Nothing else in the package touches them. ``tests/integrations/test_compat.py`` checks each one, so that a release which
moves it fails by name instead of silently.
"""
