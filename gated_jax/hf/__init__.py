"""Hugging Face checkpoints, both directions.

    python -m gated_jax.hf import|export|add-gate|list

The functions are `load` and `save` in `gated_jax/hf/convert.py`; the tables
in `gated_jax/hf/families/` are the place to begin reading.
"""
