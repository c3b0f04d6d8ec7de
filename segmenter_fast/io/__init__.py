"""Images as rows of pixels, read a band at a time from files that need not fit into memory, and their label maps."""

from .opening import LARGE_PIXELS, Raster, open_raster
from .pixels import Pixels

__all__ = ["LARGE_PIXELS", "Pixels", "Raster", "open_raster"]
