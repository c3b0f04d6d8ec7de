"""Whole models: compared with the reference and with strong peers, in parts, and in the demo."""
