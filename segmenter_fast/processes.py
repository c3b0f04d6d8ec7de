"""The processes of one command, as torchrun starts them: rank, size and device, exchange, signals.

Several processes are started by ``torchrun``, or by anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT. Prediction shares images by rank, and counts them in a key-value store. Training joins a process group,
which is nccl between GPUs and gloo elsewhere. A process on its own communicates with nobody.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .devices import choose_device

T = TypeVar("T")
_STORE_TIMEOUT = timedelta(minutes=5)
_POLL_SECONDS = 0.2


@dataclass
class PredictionReport:
    """Results of one rank: how many images it wrote and skipped, and (image, reason) pairs."""

    written: int = 0
    skipped: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    restarts: list[tuple[str, str]] = field(default_factory=list)
    """Images whose interrupted run could not be continued, and why."""

    def add(self, other: PredictionReport) -> None:
        self.written += other.written
        self.skipped += other.skipped
        self.failures += other.failures
        self.restarts += other.restarts


@dataclass(frozen=True)
class World:
    """This process among the ``size`` that run the command. ``World()`` is a process on its own."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank on this machine."""
    device: torch.device = field(default=torch.device("cpu"))
    """Device of training."""
    store: Any = None
    """Key-value store of the ranks of a prediction."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> World:
        """Read RANK, WORLD_SIZE and LOCAL_RANK; a process on its own where they are not set.

        Raises:
            ValueError: RANK or WORLD_SIZE is missing or out of range, or one of the three is no number.
        """
        given = {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in environment}
        alone = "RANK" not in given and "WORLD_SIZE" not in given
        try:
            local_rank = int(given.get("LOCAL_RANK", 0))
            rank, size = (0, 1) if alone else (int(given["RANK"]), int(given["WORLD_SIZE"]))
        except (KeyError, ValueError):
            rank, size, local_rank = -1, 0, 0
        if not 0 <= rank < size or local_rank < 0:
            said = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"RANK and WORLD_SIZE must be whole numbers with RANK below WORLD_SIZE, got {said}")
        return cls(rank, size, local_rank)

    # Prediction: each image is one rank's, and a store counts them.

    def for_prediction(self) -> World:
        """Connect to the store of the ranks, if there are several and MASTER_ADDR and MASTER_PORT are set.

        The GPU of LOCAL_RANK becomes the current one, in turns where there are fewer GPUs than processes.

        Raises:
            OSError: the ranks do not meet there.
        """
        if self.local_rank and torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        if self.size == 1 or "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
            return self
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=_STORE_TIMEOUT))
        except (RuntimeError, ValueError) as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise OSError(f"the ranks did not meet at {place}: {str(error).splitlines()[0]}") from error
        prefix = f"predict {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return dataclasses.replace(self, store=dist.PrefixStore(prefix, store))

    def count(self, done: int = 0, total: int = 0) -> tuple[int, int] | None:
        """Add to the images that are done, and to all images, of a prediction; return both sums over all ranks.

        None without a store.
        """
        return None if self.store is None else (self.store.add("done", done), self.store.add("images", total))

    def collect(self, own: PredictionReport, show: Callable[..., object] = lambda **counts: None) -> None:
        """Add the reports of all ranks to that of rank 0, once all have sent theirs.

        Until then ``show`` is called several times a second with the sums of ``count`` as ``completed`` and ``total``.
        """
        if self.store is None:
            return
        if self.rank > 0:
            self.store.set(f"report {self.rank}", json.dumps(asdict(own)))
            return
        for rank in range(1, self.size):
            while not self.store.check([f"report {rank}"]):  # store.wait would not end on a signal
                show(completed=self.store.add("done", 0), total=self.store.add("images", 0))
                time.sleep(_POLL_SECONDS)
            content = json.loads(self.store.get(f"report {rank}"))
            for name in ("failures", "restarts"):
                content[name] = [(image, reason) for image, reason in content[name]]
            own.add(PredictionReport(**content))
        show(completed=self.store.add("done", 0), total=self.store.add("images", 0))

    # Training: collectives of the process group.

    def broadcast(self, value: T) -> T:
        """Return the first process's value, any picklable object, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def in_first(self, action: Callable[..., T], *arguments: Any) -> T | None:
        """Run an action in the first process and return its result; the others return None.

        All processes raise its OSError or ValueError, so that none waits for one that has stopped.
        """
        result: T | None = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                result = action(*arguments)
            except (OSError, ValueError) as raised:
                error = raised
        if self.size > 1:
            error = self.broadcast(error)
        if error is not None:
            raise error
        return result


@contextmanager
def process_group(device: str = "auto", timeout: float = 600.0) -> Iterator[World]:
    """Join the processes that were started together, for the block. A group that exists already is used.

    Args:
        device: "auto", "cpu" or "cuda"; each process on a machine takes a GPU of its own.
        timeout: seconds that a process waits for the others, at the start and in every exchange.

    A process that is lost later ends the others. Between CPUs (gloo) they raise ConnectionError at once. Between GPUs
    (nccl) they notice after ``timeout``, when PyTorch's watchdog aborts each process (SIGABRT) with a message of its
    own, because a collective on a GPU cannot be interrupted. Checkpoints stay whole either way.

    Raises:
        ConnectionError: (an OSError) the other processes cannot be reached in time, or were lost and the backend says
            so.
        ValueError: no such device, more processes than GPUs, or an environment as in ``World.from_environment``.
    """
    world = World.from_environment()
    place = choose_device(device)
    if world.size == 1:
        yield dataclasses.replace(world, device=place)
        return
    if place.type == "cuda":
        place = choose_device(f"cuda:{world.local_rank}")
        torch.cuda.set_device(place)
    world = dataclasses.replace(world, device=place)
    if dist.is_initialized():  # by the calling program
        yield world
        return
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    where = f"{os.environ.get('MASTER_ADDR', '(no MASTER_ADDR)')}:{os.environ.get('MASTER_PORT', '(no MASTER_PORT)')}"
    # Default arguments in this module hold the group for ever if the compiler imports it later. The group's threads
    # then outlive the interpreter, and one that frees a tensor aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:  # DistNetworkError, DistStoreError, a missing variable
        raise ConnectionError(
            f"rank {world.rank} of {world.size} cannot meet the others at {where} within {timeout:g} s: "
            f"{_first_line(error)}; check that rank 0 runs there, that the port is open, and that all processes were "
            "started"
        ) from error
    try:
        yield world
    except RuntimeError as error:
        # gloo's errors are plain RuntimeErrors that name its files or the peer
        lost = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in ("gloo", "peer", "nccl"))
        if not lost:
            raise
        raise ConnectionError(
            f"rank {world.rank} of {world.size} lost the others: {_first_line(error)}; one of them ended or hangs, see "
            "its own message; start all of them again with --resume auto to go on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]


class StopRequest:
    """Note SIGTERM and SIGINT inside the block instead of ending the process; only the main thread can.

    A second signal ends the process at once. One that comes within a second counts as the first, because launchers and
    terminals may deliver a request twice.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGINT)
    _REPEAT_SECONDS = 1.0

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
        if time.monotonic() - self._since < self._REPEAT_SECONDS:
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    @classmethod
    def ignore(cls, worker: int = 0) -> None:
        """Make a data worker ignore both signals; the process that started it ends it.

        A terminal or a batch system signals the whole group, which would end the workers before the step is done.
        """
        for number in cls._SIGNALS:
            signal.signal(number, signal.SIG_IGN)
