"""The fused kernel of one token whose gates are there already."""
