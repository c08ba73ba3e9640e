"""Products on packed 4-bit weights for compute capability 9.0."""
