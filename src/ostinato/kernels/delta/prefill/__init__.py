"""The kernels of a chunk of consecutive tokens of one slot."""
