"""Text to NumPy batches. The door is `pipeline.make_pipeline`."""
