"""`python -m gated_jax.train`: the trainer where there is no checkout."""
