"""Training: data sets and augmentation, a plain PyTorch loop on one process or many, checkpoints, logs, evaluation."""
