"""Processes share work by rank, report to rank 0, join a group, and note signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from segmenter_fast.processes import PredictionReport, StopRequest, World, process_group


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def _two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of rank 1 of 2, whose rank 0 was never started."""
    variables = {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": unused_port()}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_one_process_does_everything() -> None:
    world = World.from_environment({"LOCAL_RANK": "3"})
    assert world == World(local_rank=3)
    assert world.for_prediction() is world
    assert world.count(done=1, total=5) is None
    own = PredictionReport(written=3)
    world.collect(own)
    assert own == PredictionReport(written=3)


@pytest.mark.parametrize("size", [1, 2, 20])
def test_the_environment_tells_rank_and_size(size: int) -> None:
    for rank in range(size):
        assert World.from_environment({"RANK": str(rank), "WORLD_SIZE": str(size)}) == World(rank, size)


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "one", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "two"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"},
    ],
)
def test_a_wrong_environment_is_refused(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"RANK and WORLD_SIZE must be whole numbers.*got"):
        World.from_environment(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"RANK and WORLD_SIZE must be whole numbers.*got"), process_group("cpu"):
        pass


@pytest.mark.usefixtures("_two_ranks")
def test_the_error_names_the_place_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setattr("segmenter_fast.processes._STORE_TIMEOUT", timedelta(seconds=1))
        with pytest.raises(OSError, match=rf"the ranks did not meet at 127\.0\.0\.1:{port}: "):
            World.from_environment().for_prediction()


def test_rank_0_collects_the_reports_of_all() -> None:
    store = HashStore()
    worlds = [World(rank, 3, store=store) for rank in range(3)]
    shown: list[dict[str, int]] = []
    own = PredictionReport(1, 0, [("a", "broken")])
    with ThreadPoolExecutor() as pool:
        for each in worlds:
            each.count(total=2)
        last = pool.submit(worlds[0].collect, own, lambda **counts: shown.append(counts))
        worlds[1].count(done=1)
        worlds[1].collect(PredictionReport(1, 1, [("b", "missing")]))
        assert not last.done()
        worlds[2].collect(PredictionReport(2, 0, [], [("c", "another model")]))
        last.result(timeout=30)
    assert own == PredictionReport(4, 1, [("a", "broken"), ("b", "missing")], [("c", "another model")])
    assert worlds[0].count() == (1, 6)
    assert shown[-1] == {"completed": 1, "total": 6}


def test_a_process_on_its_own_needs_no_group() -> None:
    with process_group("cpu") as world:
        assert world == World()
        assert world.broadcast("value") == "value"

    def fail(reason: str) -> None:
        raise OSError(reason)

    assert World().in_first(max, 3, 4) == 4
    with pytest.raises(OSError, match="no space left"):
        World().in_first(fail, "no space left")


@pytest.mark.usefixtures("_two_ranks")
def test_a_process_without_its_peers_gives_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.perf_counter()
    message = r"rank 1 of 2 cannot meet the others at 127.0.0.1:\d+ within 2 s"
    with pytest.raises(ConnectionError, match=message), process_group("cpu", timeout=2):
        pass
    assert time.perf_counter() - start < 30
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(ConnectionError, match=r"no MASTER_ADDR.*MASTER_ADDR expected"), process_group("cpu"):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_the_handlers_return(number: signal.Signals) -> None:
    before: Any = signal.getsignal(number)
    with StopRequest() as request:
        assert request.signal is None
        signal.raise_signal(number)
        assert request.signal is number
    assert signal.getsignal(number) is before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_second_signal_ends_the_process_at_once() -> None:
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        with StopRequest():
            for pause in (0, 0, 1.1):  # the second counts as the first
                time.sleep(pause)
                signal.raise_signal(signal.SIGTERM)
                os.write(writes, b".")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
    assert os.read(reads, 9) == b".."


_LEAVES_A_GROUP = """
import os, torch, torch.distributed as dist
from segmenter_fast.processes import process_group

with process_group("cpu"):
    dist.all_reduce(torch.ones(3))
    import torch._dynamo  # as the first use of the compiler does
threads = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
assert not any("gloo" in name for name in threads), threads
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed on Linux only")
def test_no_thread_of_a_group_outlives_it(tmp_path: Path) -> None:
    """A thread that frees a tensor while the interpreter ends aborts the process."""
    script = tmp_path / "script.py"
    script.write_text(_LEAVES_A_GROUP)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run([*launcher, str(script)], capture_output=True, text=True, timeout=180)
    assert ran.returncode == 0, ran.stderr
