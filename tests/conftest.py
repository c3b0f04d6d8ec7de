"""Test configuration: a skip always states what the machine lacks."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from segmenter_fast.kernels.registry import INTERPRET
from support import no_hypothesis
from support.parallel import pytest_addoption, pytest_configure  # noqa: F401

if importlib.util.find_spec("hypothesis") is None:
    no_hypothesis.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))
        if item.get_closest_marker("interpret") and not INTERPRET:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (make test runs it in a second pass)"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
