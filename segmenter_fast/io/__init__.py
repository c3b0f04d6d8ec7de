"""Images as rows of pixels from memory or from files larger than it, label maps as files, atomic writing."""

from .images import Pixels, Raster, open_raster

__all__ = ["Pixels", "Raster", "open_raster"]
