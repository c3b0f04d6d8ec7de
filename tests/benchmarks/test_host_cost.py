"""The host's part of a call of a fused operator stays small."""

from __future__ import annotations

import pytest

from segmenter_fast.benchmarks import host_cost
from segmenter_fast.kernels.registry import FUSED, HAS_TRITON, INTERPRET

if not HAS_TRITON or INTERPRET:
    pytest.skip("needs Triton's own launch: Triton, and no TRITON_INTERPRET", allow_module_level=True)

# Microseconds for each launch of a call, where a plain custom operator takes PLAIN; twice as much on a busy machine.
MOST, PLAIN = 25.0, 2.5


def test_a_call_costs_little_beside_a_plain_operator() -> None:
    found = host_cost.measure()
    assert {name.split(",")[0] for name in found} <= FUSED.keys()
    assert all(cost.launches for cost in found.values())
    assert not {
        name: cost for name, cost in found.items() if cost.ours > 2 * MOST * cost.launches * max(1, cost.plain / PLAIN)
    }
    assert all(cost.with_binder > cost.ours for cost in found.values())
