"""The one clock of every benchmark: warm-up, round robin over the variants, median with p20 and p80, peak memory.

A variant is a list of calls without arguments, one for each input set; they take turns, so that a call does not find
its inputs in the cache where its last one left them (``input_sets`` says how many that needs). The clocks:

    perf_counter  CPU. A sample is as many calls as fill SAMPLE_MS.
    cuda events   the device's own clock around the calls of a sample.
    cuda graph    the same around replays of one graph that holds a call on every input set. Taken for all variants of
                  a comparison as soon as one is launch-bound, i.e. the host takes longer to launch than the device to
                  run: events would then time Python. A variant that cannot be captured keeps events, and says so.

Peak memory is that of one call beyond what is there before it, the outputs included: the allocator's on CUDA; on Linux
the kernel's own high-water mark of resident memory, which sees every library's scratch too; None elsewhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]

SAMPLE_MS = 2.0
LAUNCH_BOUND = 0.8
MAX_CALLS = 2000
# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call. ``samples`` were taken, each the mean of ``calls`` calls over ``input_sets`` inputs."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    calls: int
    input_sets: int
    method: str
    peak_bytes: int | None


@dataclass(frozen=True)
class Failure:
    """Why a variant has no time. ``status`` is "out of memory" or "failed"."""

    status: str
    note: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        message = str(error).strip().splitlines()
        note = f"{type(error).__name__}: {message[0][:200] if message else ''}"
        # The CPU allocator raises a plain RuntimeError.
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        return cls("out of memory" if memory else "failed", note)


def measure(
    variants: Mapping[str, Sequence[Call]],
    device: torch.device,
    *,
    seconds: float = 1.0,
    min_samples: int = 5,
    max_samples: int = 100,
) -> dict[str, Timing | Failure]:
    """Time the variants against each other for about ``seconds``, in rounds of one sample each.

    A variant that raises is dropped from the rounds and comes back as a Failure. On CUDA call it inside
    ``own_stream``, in which the calls were also made: a graph can only capture work of its own stream.

    Raises:
        ValueError: a variant without a call.
    """
    if empty := [name for name, calls in variants.items() if not calls]:
        raise ValueError(f"every variant needs at least one call, {empty} have none")
    outcomes: dict[str, Timing | Failure] = {}
    clocks: dict[str, _Clock] = {}
    peaks: dict[str, int | None] = {}
    for name, calls in variants.items():
        try:
            clocks[name] = _warm_up(calls, device, seconds / 10)
            peaks[name] = peak_memory(calls[0], device)
        except Exception as error:  # a peer may fail in any way it likes; the row says how
            outcomes[name] = Failure.of(error)
        release(device)
    if any(clock.launch_bound for clock in clocks.values()):
        clocks = {name: _captured(clock) for name, clock in clocks.items()}
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    with _no_garbage_collection():
        end = time.perf_counter() + seconds
        for round_ in range(max_samples):
            if round_ >= min_samples and time.perf_counter() > end:
                break
            for name in [name for name in clocks if name not in outcomes]:
                try:
                    samples[name].append(clocks[name].sample())
                except Exception as error:
                    outcomes[name] = Failure.of(error)
    for name, clock in clocks.items():
        if name not in outcomes:
            p20, median, p80 = (float(p) for p in np.percentile(samples[name], (20, 50, 80)))
            outcomes[name] = Timing(
                median, p20, p80, len(samples[name]), clock.calls, len(clock.thunks), clock.method, peaks[name]
            )
    return {name: outcomes[name] for name in variants}


def input_sets(set_bytes: int, device: torch.device, limit: int = 64) -> int:
    """How many input sets of ``set_bytes`` make twice the cache, at most ``limit`` and an eighth of the free memory.

    The cache is L2 on CUDA. On a CPU it is the cores' own (L2 summed over the threads in use): the last level belongs
    to a whole server, and no benchmark can claim to know what its neighbours leave of it.
    """
    needed = math.ceil(2 * _cache_bytes(device) / max(set_bytes, 1))
    affordable = available_memory(device) // 8 // max(set_bytes, 1)
    return int(max(1, min(needed, limit, affordable)))


def available_memory(device: torch.device) -> int:
    """Bytes that a call can still get: free device memory and what the allocator caches; MemAvailable on Linux."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 2**33
    return _field(meminfo, "MemAvailable")


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Bytes that one ``call`` needs at its worst beyond what is held before it. None where nothing can tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists() or not reset.exists():
        return None
    libc = ctypes.CDLL(None)
    try:
        # Every block of 64 KiB becomes a mapping of its own, freed blocks go back: what is resident is what is live.
        libc.mallopt(M_MMAP_THRESHOLD, 2**16)
        libc.malloc_trim(0)
        reset.write_text("5")  # resets the high-water mark, see proc(5)
        before = _field(status, "VmRSS")
        call()
        return max(0, _field(status, "VmHWM") - before)
    except (PermissionError, AttributeError):
        return None
    finally:
        # Where the C library's own adjustment ends, on which every variant is then timed alike.
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """A side stream for everything that is timed; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back what the allocator caches for a finished variant, so that the next one has the same room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Clock:
    """Takes samples of one variant by the host's clock."""

    method = "perf_counter"
    launch_bound = False

    def __init__(self, thunks: Sequence[Call], calls: int) -> None:
        self.thunks = thunks
        self.calls = calls
        self.turn = 0

    def run(self) -> None:
        for _ in range(self.calls):
            self.thunks[self.turn % len(self.thunks)]()
            self.turn += 1

    def sample(self) -> float:
        start = time.perf_counter()
        self.run()
        return (time.perf_counter() - start) * 1e3 / self.calls


class _EventClock(_Clock):
    """Takes samples by the device's clock."""

    method = "cuda events"

    def sample(self) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start = time.perf_counter()
        begin.record()
        self.run()
        host_ms = (time.perf_counter() - start) * 1e3
        end.record()
        end.synchronize()
        device_ms = begin.elapsed_time(end)
        self.launch_bound = host_ms > LAUNCH_BOUND * device_ms
        return device_ms / self.calls


class _GraphClock(_EventClock):
    """Takes samples of replays of a graph that holds one call on every input set."""

    method = "cuda graph"

    def __init__(self, thunks: Sequence[Call], calls: int, graph: torch.cuda.CUDAGraph) -> None:
        super().__init__(thunks, calls)
        self.graph = graph

    def run(self) -> None:
        for _ in range(self.calls // len(self.thunks)):
            self.graph.replay()


def _warm_up(thunks: Sequence[Call], device: torch.device, seconds: float) -> _Clock:
    """Call for ``seconds``, at least once; size the samples by the last calls."""
    kind = _EventClock if device.type == "cuda" else _Clock
    clock = kind(thunks, 1)
    end = time.perf_counter() + seconds
    last = [clock.sample()]
    while time.perf_counter() < end and clock.turn < MAX_CALLS:
        last.append(clock.sample())
    estimate = float(np.median(last[-5:]))
    sized = kind(thunks, max(1, min(MAX_CALLS, math.ceil(SAMPLE_MS / max(estimate, 1e-6)))))
    if estimate < seconds * 1e3:
        sized.sample()  # also tells whether it is launch-bound, which slow calls are not
    return sized


def _captured(clock: _Clock) -> _Clock:
    """The clock over a graph, or the clock itself where the calls cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for thunk in clock.thunks:
                thunk()
    except Exception:  # capture refuses in many ways; the method of the row tells
        torch.cuda.synchronize()
        return clock
    sets = len(clock.thunks)
    probe = _GraphClock(clock.thunks, sets, graph)
    probe.sample()
    replays = max(1, min(MAX_CALLS, math.ceil(SAMPLE_MS / (probe.sample() * sets))))
    return _GraphClock(clock.thunks, replays * sets, graph)


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    own = int(size.read_text().strip().removesuffix("K")) * 1024 if size.exists() else 2**21
    return own * torch.get_num_threads()


def _field(path: Path, name: str) -> int:
    """Bytes of one ``name: value kB`` line of a proc file."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{path} has no line {name}")


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
