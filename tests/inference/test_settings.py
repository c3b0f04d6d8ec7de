"""Settings take a model's window and stride, and refuse numbers out of range by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from segmenter_fast import SegmenterConfig
from segmenter_fast.inference.settings import Settings, fits_one_window

CONFIG = SegmenterConfig(num_classes=5, window_size=64, window_stride=48)


def test_windows_are_those_of_the_model_unless_given() -> None:
    assert Settings.of(CONFIG) == Settings(64, 48)
    assert Settings.of(CONFIG, stride=10) == Settings(64, 10)
    assert Settings.of(CONFIG, window=50, scales=[0.5, 2], flip=True, batch_size=3) == Settings(
        50, 48, (0.5, 2), True, 3
    )
    assert Settings.of(CONFIG, window=16) == Settings(16, 16)  # the model's stride never exceeds the window


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"stride": 65}, "stride must be at most the window, 64, or pixels between windows get no label; got 65"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"scales": ()}, "scales must name at least one scale, got none"),
        *(
            ({"scales": (1.0, scale)}, f"scales must be factors above 0, up to 16, got 1.0, {scale}")
            for scale in (0.0, -1.0, 16.5, float("inf"), float("nan"))
        ),
    ],
)
def test_numbers_out_of_range_are_named(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{"window": 64, "stride": 48, **given})


@pytest.mark.parametrize(
    ("size", "enlarged", "fits"),
    [
        ((64, 64), True, True),
        ((40, 64), True, False),
        ((40, 64), False, True),
        ((65, 64), True, False),
        ((40, 65), False, False),
    ],
)
def test_one_window_fits_images_that_are_not_enlarged(size: tuple[int, int], enlarged: bool, fits: bool) -> None:
    model = SimpleNamespace(config=SimpleNamespace(upscale_small_images=enlarged))
    assert fits_one_window(model, size, 64) is fits
    assert fits_one_window(object(), size, 64) is (fits and enlarged)  # other models enlarge
