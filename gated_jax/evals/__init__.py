"""Measures of trained models: loss, attention sinks, gates, recall."""
