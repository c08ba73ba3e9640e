"""The fused kernel of one token for each of several slots."""
