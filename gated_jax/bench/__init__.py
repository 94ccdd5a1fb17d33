"""How fast it is on the device at hand. `python -m gated_jax.bench --help`."""
