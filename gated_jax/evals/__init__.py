"""What a trained model does: its loss, its attention sinks, what it recalls."""
