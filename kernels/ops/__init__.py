"""Argument checks, fake kernels, derivatives and registration of the public ops."""
