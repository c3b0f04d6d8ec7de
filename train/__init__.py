"""Training: data sets, augmentation, a plain PyTorch loop in one process or many, checkpoints, logs, evaluation."""
