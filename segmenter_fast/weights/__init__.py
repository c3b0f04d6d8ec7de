"""Checkpoints: safe reading, a key map and a configuration for each format, strict loading."""
