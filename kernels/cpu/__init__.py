"""Plain-PyTorch formulations of the ops that are fast on a CPU."""
