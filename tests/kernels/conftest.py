"""One set of op tests serves three backends: the CPU formulations, Triton interpreted on the CPU, Triton on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Backend:
    """Where an op runs, and in which dtypes its arithmetic can be trusted there."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]


_ALL = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter's bfloat16 tl.dot is wrong in Triton 3.7 to 3.9.
_BACKENDS = (
    pytest.param(Backend("cpu", "cpu", _ALL), id="cpu"),
    pytest.param(
        Backend("interpret", "cpu", (torch.float32, torch.float16)), id="interpret", marks=pytest.mark.interpret
    ),
    pytest.param(Backend("gpu", "cuda", _ALL), id="gpu", marks=pytest.mark.gpu),
)


@pytest.fixture(params=_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param
