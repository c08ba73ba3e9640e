"""Capture of a callable as a CUDA graph that cannot silently replay garbage. Knows no language model."""
