"""Peak memory, each measured in a process of its own."""
