"""``python -m hf_lowbit.cli``."""

from hf_lowbit.cli import main

if __name__ == "__main__":
    main()
