"""Benchmarks of the ops and of the whole model: see README.md beside this file."""
