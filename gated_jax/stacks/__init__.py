"""Kernels read and write the stacks of a scan in place; see `in_place.py`."""

from gated_jax.stacks.in_place import in_place

__all__ = ['in_place']
