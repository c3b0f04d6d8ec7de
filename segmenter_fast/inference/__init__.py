"""Sliding windows, single images and folders of images. The public name is ``slide``."""

from .sliding import slide

__all__ = ["slide"]
