"""CUDA graphs on the CPU: a capture records the operators on their very tensors, a replay runs them again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten


def storage(tensor: Tensor) -> int:
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage()._cdata  # packed weights have none


class FakeGraph:
    """Recorded operators. Like a real graph it keeps what was made in the capture, and nothing else that it reads."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, list[Any], Any, list[Tensor]]] = []
        self.made: dict[int, Tensor] = {}

    def record(self, function: Any, arguments: Any, results: Any) -> None:
        leaves, spec = tree_flatten(arguments)
        held = [
            weakref.ref(leaf) if isinstance(leaf, Tensor) and id(leaf) not in self.made else (lambda leaf=leaf: leaf)
            for leaf in leaves
        ]
        made = [result for result in tree_flatten(results)[0] if isinstance(result, Tensor)]
        self.made |= {id(result): result for result in made}
        self.steps.append((function, held, spec, made))

    def replay(self) -> None:
        for function, held, spec, made in self.steps:
            leaves = [hold() for hold in held]
            freed = [
                hold for hold, leaf in zip(held, leaves, strict=True) if isinstance(hold, weakref.ref) and leaf is None
            ]
            assert not freed, f"the graph reads freed memory in {function}"
            arguments, options = tree_unflatten(leaves, spec)
            read = {storage(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
            again = [
                result for result in tree_flatten(function(*arguments, **options))[0] if isinstance(result, Tensor)
            ]
            for result, new in zip(made, again, strict=True):
                if storage(result) not in read:  # else a view, or written in place
                    result.copy_(new)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        self.graph.record(function, (args, kwargs or {}), results)
        return results


class FakeStream:
    """A stream that notes what it waited for."""

    def __init__(self) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, stream: FakeStream) -> None:
        self.waited.append(stream)

    def wait_event(self, event: FakeEvent) -> None:
        self.waited.append(event)


class FakeEvent:
    stream: FakeStream | None = None

    def record(self, stream: FakeStream) -> None:
        self.stream = stream


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace what ``segmenter_fast.graphs`` takes from torch.cuda; the log lists captures, pools and devices."""
    log = SimpleNamespace(captures=[], devices=[], local=threading.local(), pools={})

    def current_stream(*_: Any) -> FakeStream:
        if not hasattr(log.local, "stream"):
            log.local.stream = FakeStream()
        return log.local.stream

    class Capture(_Recorder):
        def __init__(self, graph: FakeGraph, pool: Any, stream: Any, capture_error_mode: str) -> None:
            super().__init__(graph)
            # As PyTorch's allocator: a pool that has lost its last graph cannot be used again.
            assert log.pools.get(pool, True), "use_count > 0"
            log.pools.setdefault(pool, weakref.WeakSet()).add(graph)
            log.captures.append(
                SimpleNamespace(pool=pool, stream=stream, mode=capture_error_mode, devices=[*log.devices])
            )

    class Device:
        def __init__(self, images: Tensor) -> None:
            self.images = images

        def __enter__(self) -> None:
            log.devices.append(self.images.device)

        def __exit__(self, *_: Any) -> None:
            log.devices.pop()

    class OnStream:
        def __init__(self, stream: FakeStream) -> None:
            self.stream = stream

        def __enter__(self) -> None:
            self.before, log.local.stream = current_stream(), self.stream

        def __exit__(self, *_: Any) -> None:
            log.local.stream = self.before

    replacements: dict[str, Callable[..., Any]] = {
        "CUDAGraph": FakeGraph,
        "graph": Capture,
        "Stream": FakeStream,
        "Event": FakeEvent,
        "stream": OnStream,
        "current_stream": current_stream,
        "device_of": Device,
        "graph_pool_handle": object,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    return log
