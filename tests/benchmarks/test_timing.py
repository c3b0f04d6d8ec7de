"""The clock is held against things whose time and memory are known."""

from __future__ import annotations

import itertools
import platform
import subprocess
import sys
import time

import pytest
import torch

from segmenter_fast.benchmarks.device import measure_ceilings
from segmenter_fast.benchmarks.timing import Failure, Timing, input_sets, measure, peak_memory

CPU = torch.device("cpu")
MIB = 2**20


def timed(outcome: Timing | Failure) -> Timing:
    assert isinstance(outcome, Timing), outcome
    return outcome


def test_a_known_sleep() -> None:
    outcomes = measure(
        {"20 ms": [lambda: time.sleep(0.02)], "40 ms": [lambda: time.sleep(0.04)]}, CPU, seconds=0.3, min_samples=5
    )
    short, long = timed(outcomes["20 ms"]), timed(outcomes["40 ms"])
    # A sleep is never shorter than asked for; a loaded machine makes it longer.
    assert short.p20_ms >= 20
    assert long.p20_ms >= 40
    assert short.p20_ms < 30
    assert long.p20_ms < 60
    assert short.method == "perf_counter"


def test_percentiles_are_ordered_and_samples_counted() -> None:
    x = torch.randn(1000)
    timing = timed(measure({"add": [lambda: x + 1]}, CPU, seconds=0.05, min_samples=7, max_samples=9)["add"])
    assert 0 < timing.p20_ms <= timing.median_ms <= timing.p80_ms
    assert 7 <= timing.samples <= 9
    assert timing.calls > 1, "a call of microseconds must be timed in bundles"


def test_a_known_copy_runs_at_the_measured_bandwidth() -> None:
    """Half the size, the same rate. Three times leaves room for whoever else uses this machine."""
    bandwidth = measure_ceilings(CPU, (), seconds=0.4).copy_gb_s
    source = torch.randn(32 * MIB)
    target = torch.empty_like(source)
    copy = timed(measure({"copy": [lambda: target.copy_(source)]}, CPU, seconds=0.4)["copy"])
    rate = 2 * source.nbytes / copy.median_ms / 1e6
    assert bandwidth / 3 < rate < bandwidth * 3


def test_two_runs_agree_within_the_spread_they_report() -> None:
    """A neighbour that comes or goes between two runs moves them apart; it does not do so five times."""
    a, b = torch.randn(2, 192, 192)
    for _ in range(5):
        first, second = (timed(measure({"mm": [lambda: a @ b]}, CPU, seconds=0.15)["mm"]) for _ in range(2))
        if first.p20_ms <= second.p80_ms and second.p20_ms <= first.p80_ms:
            return
    pytest.fail(f"five times in a row two runs lay apart; the last: {first}, {second}")


def test_variants_take_turns() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        time.sleep(0.003)  # longer than a sample has to be: one call is one sample

    timings = measure(
        {name: [lambda n=name: call(n)] for name in "abc"}, CPU, seconds=0.01, min_samples=6, max_samples=6
    )
    assert "".join(order).endswith("abc" * 6)
    assert {timed(t).calls for t in timings.values()} == {1}


def test_input_sets_rotate() -> None:
    seen: list[int] = []
    calls = [lambda i=i: (seen.append(i), time.sleep(0.003)) for i in range(3)]
    timing = timed(measure({"": calls}, CPU, seconds=0.01, min_samples=6, max_samples=6)[""])
    assert timing.input_sets == 3
    rounds = seen[-6:]
    assert all((later - earlier) % 3 == 1 for earlier, later in itertools.pairwise(rounds))


def test_a_failing_variant_is_an_outcome_and_the_others_are_timed() -> None:
    def breaks() -> None:
        raise RuntimeError("no kernel for this shape\nand a long trace")

    def too_large() -> None:
        torch.empty(2**60, dtype=torch.uint8)

    outcomes = measure({"breaks": [breaks], "large": [too_large], "works": [lambda: None]}, CPU, seconds=0.05)
    assert outcomes["breaks"] == Failure("failed", "RuntimeError: no kernel for this shape")
    large = outcomes["large"]
    assert isinstance(large, Failure)
    assert large.status == "out of memory"
    timed(outcomes["works"])


def test_a_variant_that_fails_later_is_an_outcome() -> None:
    countdown = iter(range(8))

    def call() -> None:
        time.sleep(0.003)
        next(countdown)

    outcome = measure({"": [call]}, CPU, seconds=0.0, min_samples=50)[""]
    assert isinstance(outcome, Failure)
    assert outcome.note.startswith("StopIteration")


def test_a_variant_without_calls_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one call"):
        measure({"nothing": []}, CPU)


@pytest.mark.parametrize("mebibytes", [1, 16, 128])
def test_peak_memory_counts_what_is_touched(mebibytes: int) -> None:
    count = mebibytes * MIB // 4
    peak = peak_memory(lambda: torch.ones(count).add_(1), CPU)
    if peak is None:
        pytest.skip("this kernel cannot reset the high-water mark of resident memory")
    assert peak == pytest.approx(mebibytes * MIB, rel=0.1, abs=0.6 * MIB)


def test_peak_memory_is_the_worst_moment_not_the_sum() -> None:
    count = 16 * MIB // 4

    def twice() -> None:
        torch.ones(count)
        torch.ones(count)

    peak = peak_memory(twice, CPU)
    if peak is None:
        pytest.skip("this kernel cannot reset the high-water mark of resident memory")
    assert peak == pytest.approx(16 * MIB, rel=0.1)


FAULTS = """
import resource, statistics, torch
from segmenter_fast.benchmarks.timing import measure

faults = []

def call():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

measure({"": [call]}, torch.device("cpu"), seconds=0.1, min_samples=40)
print(max(faults), int(statistics.median(faults[-20:])))
"""


def test_no_sample_pays_for_memory_that_a_call_before_had_freed() -> None:
    """In a process of its own: after an allocation that failed, glibc serves the thread from another heap."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc can be told to keep freed memory")
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    first, later = map(int, done.stdout.split())
    assert first > 1000, "the first touch of each page"
    assert later < 100


def test_small_inputs_need_many_sets_and_large_ones_one() -> None:
    assert input_sets(2**34, CPU) == 1
    assert input_sets(1, CPU) == 64
    assert input_sets(1, CPU, limit=5) == 5


@pytest.mark.gpu
def test_launch_bound_work_is_replayed_from_a_graph() -> None:
    from segmenter_fast.benchmarks.timing import own_stream

    device = torch.device("cuda")
    with own_stream(device):
        x = torch.randn(1000, device=device)
        large = torch.randn(2**28, device=device)
        small = timed(measure({"add": [lambda: x + 1]}, device, seconds=0.1)["add"])
        big = timed(measure({"copy": [lambda: large.clone()]}, device, seconds=0.1)["copy"])
    assert (small.method, big.method) == ("cuda graph", "cuda events")
    assert small.median_ms < 0.02
    assert big.peak_bytes == large.nbytes
