"""Checkpoints: pure key maps per origin, safe reading, and one strict way into a model."""
