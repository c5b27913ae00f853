"""Calibration: data, blocks, the statistics of their inputs, and the walk over them that can be resumed."""
