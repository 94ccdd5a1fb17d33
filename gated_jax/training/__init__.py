"""The run: one update, its checkpoints, its metrics, and the loop over them."""
