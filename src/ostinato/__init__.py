"""Ostinato: an LLM decode engine whose whole step is one CUDA graph, and a checker for everybody's captures."""

__version__ = "0.1.0"
