"""Settings of inference: scales, mirroring, windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real

from ..config import LARGEST_SCALE, SegmenterConfig
from ..io.channels import RGB, Channels

MOST_WINDOWS = 1_000_000
"""Windows of one image: at the model's speed, days of work."""


@dataclass(frozen=True)
class Settings:
    """Options of inference for one image.

    Args:
        window: side of the square windows, pixels.
        stride: pixels from one window to the next.
        scales: factors that the image is resized by; the probabilities of all scales are averaged.
        flip: segment every scale mirrored, too.
        batch_size: windows, or images that one window covers, that go through the model at once.
        channels: bands of the image that the model takes.

    Raises:
        TypeError: scales that are no numbers.
        ValueError: a number out of its range, naming it.
    """

    window: int
    stride: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch_size: int = 2
    channels: Channels = RGB

    def __post_init__(self) -> None:
        for name, given in (("window", self.window), ("stride", self.stride), ("batch_size", self.batch_size)):
            if given < 1:
                raise ValueError(f"{name} must be at least 1, got {given}")
        if self.stride > self.window:
            raise ValueError(
                f"stride must be at most the window, {self.window}, or pixels between windows get no label; "
                f"got {self.stride}"
            )
        if not all(isinstance(scale, Real) for scale in self.scales):
            raise TypeError(f"scales must be numbers, such as (0.75, 1.0), got {self.scales!r}")
        if not self.scales:
            raise ValueError("scales must name at least one scale, got none")
        if not all(0 < scale <= LARGEST_SCALE for scale in self.scales):
            found = ", ".join(map(str, self.scales))
            raise ValueError(f"scales must be factors above 0, up to {LARGEST_SCALE}, got {found}")

    @classmethod
    def of(
        cls,
        config: SegmenterConfig,
        window: int | None = None,
        stride: int | None = None,
        scales: Sequence[float] | float = (1.0,),
        flip: bool = False,
        batch_size: int = 2,
        bands: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> Settings:
        """Settings with the window, the stride, the bands and the scale of a model's configuration where they are None.

        The configuration's stride is reduced to a smaller window.
        """
        window = config.window_size if window is None else window
        stride = min(config.window_stride, window) if stride is None else stride
        factors = tuple(scales) if isinstance(scales, Iterable) else (scales,)
        return cls(window, stride, factors, flip, batch_size, channels_of(config, bands, scale))


def channels_of(config: SegmenterConfig, bands: Sequence[int] | None = None, scale: float | None = None) -> Channels:
    """Return the channels that a model takes, with the bands and the scale of its configuration where they are None."""
    named = config.bands if bands is None else tuple(bands)
    return Channels(config.in_channels, named, config.pixel_scale if scale is None else scale)


def check_work(size: Sequence[int], views: Sequence[Sequence[int]], settings: Settings) -> None:
    """Refuse an image whose views would be absurdly many pixels or windows, before any work.

    Args:
        size: (height, width) of the image.
        views: those of its views: every scale, enlarged to the window.

    Raises:
        ValueError: a view is more than ``LARGEST_SCALE`` times as large as the image and has more than 2**26 pixels, or
            the views have more than ``MOST_WINDOWS`` windows.
    """
    (height, width), windows = size, 0
    for rows, columns in views:
        growth = max(rows / height, columns / width)
        down, across = (max(-(-(side - settings.window) // settings.stride), 0) + 1 for side in (rows, columns))
        windows += down * across
        if (growth > LARGEST_SCALE and rows * columns > 1 << 26) or windows > MOST_WINDOWS:
            raise ValueError(
                f"an image of {width} x {height} pixels would become {columns:,} x {rows:,} and take at least "
                f"{windows:,} windows: scales are {', '.join(map(str, settings.scales))}, and the smaller side is "
                f"enlarged to the window of {settings.window}; give a smaller window or other scales"
            )


def enlarges_small_images(model: object) -> bool:
    """Return whether the model's origin enlarges images below the window; the official program, the default, does."""
    return getattr(getattr(model, "config", None), "upscale_small_images", True)


def fits_one_window(model: object, size: Sequence[int], window: int) -> bool:
    """Return whether a single window covers a whole image of ``size`` (height, width) without resizing it."""
    return max(size) <= window and (min(size) == window or not enlarges_small_images(model))


def one_window(model: object, size: Sequence[int], settings: Settings) -> bool:
    """Return whether ``model.segment`` of a whole image of ``size`` gives the labels that ``settings`` ask for."""
    return settings.scales == (1.0,) and not settings.flip and fits_one_window(model, size, settings.window)
