"""CUDA graphs of one model: captured for each kind of call, replayed for the next ones of that kind."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Kinds of calls that keep a graph; the least recently used is dropped first.
MOST_GRAPHS = 8


@dataclass(frozen=True)
class _Graph:
    """A captured graph, the buffers it reads and writes, and the function, which holds all else that it reads."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    result: Any
    function: Callable[[Tensor], Any]


class Graphs:
    """The CUDA graphs of a model on one device. Several threads, each with a stream of its own, may replay them.

    The graphs share one memory pool, so that a replay may overwrite the result of another one. The result is therefore
    taken under a lock, and a replay on another stream waits until the one before has been taken.
    Source: the rules of ``torch.cuda.graph_pool_handle`` in PyTorch's notes on CUDA graphs.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._lock = threading.Lock()
        self._pool: Any = None
        self._capturing: torch.cuda.Stream | None = None  # one for all: memory is reused within a stream alone
        self._stream: torch.cuda.Stream | None = None  # of the last replay
        self._taken: torch.cuda.Event | None = None  # its result

    def __len__(self) -> int:
        return len(self._graphs)

    def run(
        self,
        key: Hashable,
        function: Callable[[Tensor], Any],
        images: Tensor,
        take: Callable[[Any], Tensor] = torch.clone,
    ) -> Tensor:
        """``take(function(images))`` by the graph of ``key``, which is captured at its first call.

        Args:
            key: everything that decides which kernels ``function`` launches, the shape and dtype of images included.
            function: launches the same kernels at every call and reads nothing that is freed while it lives.
            images: tensor on a CUDA device.
            take: makes the answer from the result, which the next replay overwrites.
        """
        with self._lock, torch.cuda.device_of(images):
            stream = torch.cuda.current_stream()
            if self._taken is not None and stream != self._stream:
                stream.wait_event(self._taken)
            if key not in self._graphs:
                if len(self._graphs) == MOST_GRAPHS:
                    self._graphs.popitem(last=False)
                self._graphs[key] = self._capture(function, images)
            self._graphs.move_to_end(key)
            graph = self._graphs[key]
            graph.images.copy_(images)
            graph.graph.replay()
            taken = take(graph.result)
            if self._taken is None:
                self._taken = torch.cuda.Event()
            self._taken.record(stream)
            self._stream = stream
        return taken

    # A buffer made in inference mode could not be written to outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, function: Callable[[Tensor], Any], images: Tensor) -> _Graph:
        """Graph of ``function``, captured on a stream of the current device that nothing else uses."""
        fixed = torch.empty_like(images)
        fixed.copy_(images)
        if self._capturing is None:
            self._capturing = torch.cuda.Stream()
        if not self._graphs:  # the allocator gives up a pool with its last graph
            self._pool = torch.cuda.graph_pool_handle()
        current, stream = torch.cuda.current_stream(), self._capturing
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, tunes and fills the allocator before anything is captured
                function(fixed)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate and synchronise during the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            result = function(fixed)
        current.wait_stream(stream)
        return _Graph(graph, fixed, result, function)
