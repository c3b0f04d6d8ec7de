"""Several processes on one list of images, as torchrun starts them: who does what, and one account of it all.

Work is shared by rank alone, with no process group and no collective. Where torchrun (or MASTER_ADDR and MASTER_PORT)
gives the ranks a store, they count in it, and rank 0 waits there for what the others did.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")
_PATIENCE = timedelta(minutes=5)
_POLL_SECONDS = 0.2


@dataclass
class Outcome:
    """What a rank did: counts of images, and the failed ones with the reasons."""

    written: int = 0
    skipped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    restarts: list[tuple[str, str]] = field(default_factory=list)
    """Images of an interrupted run that were begun anew, and why."""

    def add(self, other: Outcome) -> None:
        self.written += other.written
        self.skipped += other.skipped
        self.failures += other.failures
        self.restarts += other.restarts


@dataclass(frozen=True)
class Ranks:
    """This process among ``size`` of them."""

    rank: int = 0
    size: int = 1
    store: Any = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Ranks:
        """By RANK and WORLD_SIZE; one process where they are not set.

        Raises:
            ValueError: one of them is missing or out of range.
            OSError: the ranks do not meet at MASTER_ADDR and MASTER_PORT.
        """
        given = {name: environment[name] for name in ("RANK", "WORLD_SIZE") if name in environment}
        if not given:
            return cls()
        try:
            rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
        except (KeyError, ValueError):
            rank, size = -1, 0
        if not 0 <= rank < size:
            said = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"RANK and WORLD_SIZE must be whole numbers with RANK below WORLD_SIZE, got {said}")
        meet = size > 1 and "MASTER_ADDR" in environment and "MASTER_PORT" in environment
        return cls(rank, size, _store(environment) if meet else None)

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all of them."""
        return self.rank == 0 or self.store is None

    def share(self, items: Sequence[_T]) -> list[_T]:
        """Every ``size``-th item from the ``rank``-th on: each item is one rank's."""
        return list(items[self.rank :: self.size])

    def begin(self, images: int) -> None:
        """Says how many images this rank will do."""
        if self.store is not None:
            self.store.add("images", images)

    def advance(self) -> None:
        """Says that an image is done."""
        if self.store is not None:
            self.store.add("done", 1)

    def counts(self) -> tuple[int, int] | None:
        """Images done, and images to do, of all ranks; None where they have no store."""
        return None if self.store is None else (self.store.add("done", 0), self.store.add("images", 0))

    def conclude(self, own: Outcome, waiting: Callable[[], None] = lambda: None) -> Outcome:
        """On rank 0 what all ranks did, once all have said it; on others, and without a store, ``own``.

        ``waiting`` is called now and then until then.
        """
        if self.store is None:
            return own
        if self.rank > 0:
            self.store.set(f"outcome {self.rank}", json.dumps(asdict(own)))
            return own
        for rank in range(1, self.size):
            while not self.store.check([f"outcome {rank}"]):  # not wait, which no signal ends
                waiting()
                time.sleep(_POLL_SECONDS)
            content = json.loads(self.store.get(f"outcome {rank}"))
            for name in ("failures", "restarts"):
                content[name] = [(image, reason) for image, reason in content[name]]
            own.add(Outcome(**content))
        waiting()
        return own


def use_own_gpu(environment: Mapping[str, str]) -> None:
    """Makes the GPU of LOCAL_RANK the current one, in turns where there are fewer than processes."""
    if "LOCAL_RANK" in environment and torch.cuda.is_available():
        torch.cuda.set_device(int(environment["LOCAL_RANK"]) % torch.cuda.device_count())


def _store(environment: Mapping[str, str]) -> Any:
    from torch.distributed import PrefixStore, rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=_PATIENCE))
    except (RuntimeError, ValueError) as error:
        place = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        raise OSError(f"the ranks did not meet at {place}: {str(error).splitlines()[0]}") from error
    return PrefixStore(f"predict {environment.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
