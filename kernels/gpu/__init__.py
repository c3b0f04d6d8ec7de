"""The fused ops in Triton, for CUDA and ROCm."""
