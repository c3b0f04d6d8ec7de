"""Test configuration: a skip always states what the machine lacks."""

from __future__ import annotations

import pytest
import torch

from segmenter_fast.kernels.registry import INTERPRET


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))
        if item.get_closest_marker("interpret") and not INTERPRET:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (make test runs it in a second pass)"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
