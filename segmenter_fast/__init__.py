"""Segmenter with fused kernels."""
