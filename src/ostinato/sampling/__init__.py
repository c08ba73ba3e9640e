"""Sampling: what a request may ask for, and the state of the sampler that runs in the step."""

from ostinato.sampling.params import SamplingParams
from ostinato.sampling.state import Published, SamplerState

__all__ = ["Published", "SamplerState", "SamplingParams"]
