"""Packed state-space mixers: projections, convolution, decay and the states between tokens (see :mod:`.base`)."""
