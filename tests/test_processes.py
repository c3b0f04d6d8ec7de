"""Ranks share the work by number, and tell rank 0 what became of it."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from segmenter_fast.processes import Outcome, Ranks


def test_one_process_is_all_of_them() -> None:
    ranks = Ranks.from_environment({"LOCAL_RANK": "3"})
    assert ranks == Ranks(0, 1, None)
    assert ranks.leads
    assert ranks.share(range(5)) == [0, 1, 2, 3, 4]
    assert ranks.counts() is None
    own = Outcome(written=3)
    assert ranks.conclude(own) is own


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
def test_every_item_is_one_rank_s(size: int) -> None:
    shares = [
        Ranks.from_environment({"RANK": str(rank), "WORLD_SIZE": str(size)}).share(range(11)) for rank in range(size)
    ]
    assert sorted(item for share in shares for item in share) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "one", "WORLD_SIZE": "2"},
    ],
)
def test_an_environment_that_makes_no_sense_is_named(environment: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"RANK and WORLD_SIZE must be whole numbers.*got"):
        Ranks.from_environment(environment)


def test_ranks_that_do_not_meet_are_told_where(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("segmenter_fast.processes._PATIENCE", timedelta(seconds=1))
        with pytest.raises(OSError, match=rf"the ranks did not meet at 127\.0\.0\.1:{port}: "):
            Ranks.from_environment(environment)


def test_rank_0_hears_from_all() -> None:
    store = HashStore()
    ranks = [Ranks(rank, 3, store) for rank in range(3)]
    assert [each.leads for each in ranks] == [True, False, False]
    waits: list[None] = []
    with ThreadPoolExecutor() as pool:
        for each in ranks:
            each.begin(2)
        last = pool.submit(ranks[0].conclude, Outcome(1, 0, [("a", "broken")]), lambda: waits.append(None))
        ranks[1].advance()
        ranks[1].conclude(Outcome(1, 1, [("b", "missing")]))
        assert not last.done()
        ranks[2].conclude(Outcome(2, 0, [], [("c", "another model")]))
        total = last.result(timeout=30)
    assert total == Outcome(4, 1, [("a", "broken"), ("b", "missing")], [("c", "another model")])
    assert ranks[0].counts() == (1, 6)
    assert waits
