"""Every registered method through the same promises: a new method joins by being registered."""
