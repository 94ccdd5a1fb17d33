"""The mathematics: pure functions on arrays, one device's shard at a time."""
