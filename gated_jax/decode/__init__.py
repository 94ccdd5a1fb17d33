"""Sampling from a trained model; `generate.py` first."""

from gated_jax.decode.generate import generate
from gated_jax.decode.sampling import Sampling
from gated_jax.decode.weights import for_decoding
from gated_jax.decode.weights import load

__all__ = ['Sampling', 'for_decoding', 'generate', 'load']
