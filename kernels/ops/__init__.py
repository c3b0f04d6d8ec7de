"""Argument checks, fake kernels, autograd and autocast of the public ops. Mathematics lives elsewhere."""
