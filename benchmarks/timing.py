"""Time and peak memory of calls: warm-up, variants in turns, median with p20 and p80.

A variant is a list of calls without arguments, one for each input set. Its calls take turns, so that a call does not
find its inputs in the cache (``input_sets`` counts the sets that this needs). Three clocks:

    perf_counter  CPU. A sample is as many calls as fill SAMPLE_MS.
    cuda events   The device's clock around the calls of a sample.
    cuda graph    The device's clock around replays of one graph with a call on every input set. All variants of a
                  comparison use it as soon as one is launch-bound, i.e. launching takes the host longer than running
                  takes the device: events would then time Python. A variant that cannot be captured keeps events.

On a CPU with glibc, freed memory stays with the process while variants are timed, as with the allocators that PyTorch's
tuning guide recommends. By glibc's own rules big blocks go back to the system and are faulted in again, or not, by the
luck of the heap's layout: the same reference then takes 450 to 780 ms.

Peak memory is what one call needs beyond what is held before it, its outputs included: the allocator's peak on CUDA;
on Linux the high-water mark of resident memory, which counts the scratch of every library; None elsewhere.
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

from .deadline import OutOfTimeError

Call = Callable[[], Any]

SAMPLE_MS = 2.0
LAUNCH_BOUND = 0.8
MAX_CALLS = 2000
# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


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
    """The reason why a variant has no time. ``status`` is "out of memory", "not run" for lack of time, or "failed"."""

    status: str
    note: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        message = str(error).strip().splitlines()
        note = f"{type(error).__name__}: {message[0][:200] if message else ''}"
        if isinstance(error, OutOfTimeError):
            return cls("not run", str(error))
        # The CPU allocator raises a plain RuntimeError, and a compiler one of its own.
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        memory |= any(text in str(error) for text in ("can't allocate memory", "CUDA out of memory"))
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

    A variant that raises leaves the rounds and is returned as a Failure. On CUDA, prepare and time the calls inside
    ``own_stream``: a graph can only capture work of its own stream.

    Raises:
        ValueError: a variant without a call.
    """
    if empty := [name for name, calls in variants.items() if not calls]:
        raise ValueError(f"every variant needs at least one call, {empty} have none")
    _keep_freed_memory(True)
    outcomes: dict[str, Timing | Failure] = {}
    clocks: dict[str, _Clock] = {}
    peaks: dict[str, int | None] = {}
    for name, calls in variants.items():
        try:
            clocks[name] = _warm_up(calls, device, seconds / 10)
            peaks[name] = peak_memory(calls[0], device)
        except Exception as error:  # a peer may raise anything; the row reports it
            outcomes[name] = Failure.of(error)
        release(device)
    if any(clock.launch_bound for clock in clocks.values()):
        clocks = {name: _captured(clock) for name, clock in clocks.items()}
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for round_ in range(max_samples):
            if round_ >= min_samples and time.perf_counter() > end:
                break
            for name in [name for name in clocks if name not in outcomes]:
                try:
                    samples[name].append(clocks[name].sample())
                except Exception as error:
                    outcomes[name] = Failure.of(error)
    finally:
        gc.enable()
    for name in [name for name in clocks if name not in outcomes]:
        p20, median, p80 = (float(p) for p in np.percentile(samples[name], (20, 50, 80)))
        clock = clocks[name]
        found = len(samples[name]), clock.count, len(clock.calls), clock.method, peaks[name]
        outcomes[name] = Timing(median, p20, p80, *found)
    return {name: outcomes[name] for name in variants}


def input_sets(set_bytes: int, device: torch.device, limit: int = 64) -> int:
    """Number of input sets of ``set_bytes`` that fill twice the cache, within ``limit`` and 1/8 of the free memory.

    The cache is L2 on CUDA, and on a CPU the L2 of the threads in use: the last level is shared with the rest of the
    server, so nothing is claimed about it.
    """
    needed = math.ceil(2 * _cache_bytes(device) / max(set_bytes, 1))
    affordable = available_memory(device) // 8 // max(set_bytes, 1)
    return int(max(1, min(needed, limit, affordable)))


def available_memory(device: torch.device) -> int:
    """Bytes that a call can still allocate: free and cached device memory on CUDA; MemAvailable on Linux."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    return _field(meminfo, "MemAvailable") if meminfo.exists() else 2**33


def peak_memory(call: Call, device: torch.device) -> int | None:
    """Peak bytes of one ``call`` beyond what is held before it. None where the system cannot report it."""
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
    try:
        if not _keep_freed_memory(False):
            return None
        reset.write_text("5")  # resets the high-water mark, see proc(5)
        before = _field(status, "VmRSS")
        call()
        return max(0, _field(status, "VmHWM") - before)
    except PermissionError:
        return None
    finally:
        _keep_freed_memory(True)


def _keep_freed_memory(keep: bool) -> bool:
    """Keep freed memory for later calls, or give it back at once, so that resident memory is live.

    Returns False where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return False
    # Blocks with mappings of their own are returned when freed. There are none, or all of 64 KiB and more have one.
    libc.mallopt(M_MMAP_MAX, 0 if keep else 2**16)
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    libc.mallopt(M_TRIM_THRESHOLD, -1 if keep else 2**17)
    if not keep:
        libc.malloc_trim(0)
    return True


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Run the block in a CUDA stream of its own; does nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Empty the allocator's cache after a variant, so that the next one has the same room."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif _keep_freed_memory(False):
        _keep_freed_memory(True)


class _Clock:
    """Takes samples of ``count`` calls each of one variant; ``graph`` holds one call on every input set."""

    def __init__(
        self, calls: Sequence[Call], device: torch.device, count: int, graph: torch.cuda.CUDAGraph | None = None
    ) -> None:
        self.calls, self.device, self.count, self.graph = calls, device, count, graph
        self.launch_bound = False
        self.turn = 0
        self.method = "cuda graph" if graph else "cuda events" if device.type == "cuda" else "perf_counter"

    def sample(self) -> float:
        """Milliseconds a call."""
        cuda = self.device.type == "cuda"
        if cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
        start = time.perf_counter()
        if self.graph:
            for _ in range(self.count // len(self.calls)):
                self.graph.replay()
        else:
            for _ in range(self.count):
                self.calls[self.turn % len(self.calls)]()
                self.turn += 1
        host_ms = (time.perf_counter() - start) * 1e3
        if not cuda:
            return host_ms / self.count
        end.record()
        end.synchronize()
        device_ms = begin.elapsed_time(end)
        self.launch_bound = host_ms > LAUNCH_BOUND * device_ms
        return device_ms / self.count


def _warm_up(calls: Sequence[Call], device: torch.device, seconds: float) -> _Clock:
    """Call for ``seconds``, at least once, and choose the calls of a sample from the last times."""
    clock = _Clock(calls, device, 1)
    end = time.perf_counter() + seconds
    times = [clock.sample()]
    while time.perf_counter() < end and clock.turn < MAX_CALLS:
        times.append(clock.sample())
    estimate = float(np.median(times[-5:]))
    clock = _Clock(calls, device, _calls_per_sample(estimate))
    if estimate < seconds * 1e3:
        clock.sample()  # sets launch_bound; slow calls are not launch-bound
    return clock


def _captured(clock: _Clock) -> _Clock:
    """A clock over a graph of the calls, or ``clock`` itself where they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for call in clock.calls:
                call()
    except Exception:  # capture may raise anything; ``method`` of the row says that it failed
        torch.cuda.synchronize()
        return clock
    sets = len(clock.calls)
    probe = _Clock(clock.calls, clock.device, sets, graph)
    probe.sample()
    return _Clock(clock.calls, clock.device, _calls_per_sample(probe.sample() * sets) * sets, graph)


def _calls_per_sample(ms: float) -> int:
    return max(1, min(MAX_CALLS, math.ceil(SAMPLE_MS / max(ms, 1e-6))))


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
