"""A stand-in for hypothesis where it is not installed: its tests are skipped, and the others of their modules run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest


def given(*positional: Any, **named: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Skip the test, with the fixtures and parameters that it would have."""

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(test).parameters.values())
        kept = parameters[: len(parameters) - len(positional)]  # positional strategies fill from the right

        @pytest.mark.skip(reason="needs hypothesis: pip install hypothesis")
        def skipped(**_: Any) -> None: ...

        skipped.pytestmark += getattr(test, "pytestmark", [])  # type: ignore[attr-defined]
        skipped.__name__, skipped.__doc__, skipped.__module__ = test.__name__, test.__doc__, test.__module__
        signature = inspect.Signature([parameter for parameter in kept if parameter.name not in named])
        skipped.__signature__ = signature  # type: ignore[attr-defined]
        return skipped

    return decorate


def install() -> None:
    """Put the stand-in where ``import hypothesis`` finds it."""
    module: Any = ModuleType("hypothesis")
    module.given, module.HealthCheck, module.strategies = given, MagicMock(), MagicMock()
    module.settings = lambda *_, **__: lambda test: test
    sys.modules |= {"hypothesis": module, "hypothesis.strategies": module.strategies}
