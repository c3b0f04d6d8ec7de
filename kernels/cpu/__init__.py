"""Plain PyTorch formulations of the ops, for the CPU and for devices without Triton."""
