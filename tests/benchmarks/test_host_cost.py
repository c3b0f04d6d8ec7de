"""The host's part of a call of a fused operator, and of a whole model, stays small."""

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


def test_a_model_costs_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Microseconds where ``torch.zeros`` takes 2; twice as much on a busy machine."""
    monkeypatch.setattr(host_cost, "CALLS", 200)
    monkeypatch.setattr(host_cost.torch.cuda, "is_available", lambda: False)
    most = {"replay of a graph": 20, "S/16 without graphs": 3000}
    found = host_cost.measure_models()
    slow = max(1.0, found.pop("torch.zeros") / 2)
    assert found.keys() == most.keys()
    assert not {call: cost for call, cost in found.items() if cost > 2 * slow * most[call]}
