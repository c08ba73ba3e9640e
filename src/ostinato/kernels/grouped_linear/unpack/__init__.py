"""Four-bit weights to bfloat16, in registers."""
