"""Tests in parallel processes, the most valuable first, without pytest-xdist.

``python tests/support/parallel.py --processes 12 --seconds 110 --out FOLDER tests -m gpu`` starts pytest with the last
arguments in every process. All processes walk through the same list, and each test is run by the process that claims
it first. FOLDER has, from the first second on: ``tests.txt``, a line for each test that ended; ``failures.txt``, the
errors; ``pytest.log``, the output of the first process. A process whose CUDA context an error has broken ends, and
another takes its place.

Exit code: 0; 1 if a test failed, or a module could not be imported, or the time was up before the last test.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

try:
    import pytest
except ImportError:
    sys.exit("the tests need pytest: pip install pytest")

# One build of each kernel, then graphs, whole models, training; the slowest of the others come before the rest, except
# the many builds that prove the least.
ORDER = (
    r"test_ops\.py::test_(same_input_same_bits|opcheck)|::test_long_sequences\[1025|::test_(as_accurate|every_dtype)",
    r"test_graphs|cuda_graphs|gpu/test_inference",
    r"test_predict|accelerate/",
    r"gpu/test_training",
    r"::test_any_shape|::test_head_sizes",
    r"test_ops|test_mask_scores|test_upsample_cross_entropy|test_timing",
    r"^(?!.*::test_equals_pytorch)",
)
BROKEN = re.compile(r"illegal memory access|device-side assert|misaligned address|unspecified launch failure")


def rank(name: str) -> int:
    """The place of a test in ORDER; the rest comes last."""
    return next((place for place, pattern in enumerate(ORDER) if re.search(pattern, name)), len(ORDER))


class Share:
    """A pytest plugin that runs the tests which no other process of ``folder`` has claimed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.broken = folder, False
        (folder / "claimed").mkdir(parents=True, exist_ok=True)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: rank(item.nodeid))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        (self.folder / "collected").write_text(str(len(session.items)))

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for item in session.items:
            if self.claim(item.nodeid):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if self.broken:
                raise session.Interrupted("an error has broken the CUDA context")
        return True

    def claim(self, name: str) -> bool:
        try:
            with (self.folder / "claimed" / hashlib.sha1(name.encode()).hexdigest()).open("x") as file:
                file.write(name)
        except FileExistsError:
            return False
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.append("tests.txt", f"{report.outcome:8}{report.duration:7.1f} s  {report.nodeid}\n")
        if report.failed:
            self.append("failures.txt", f"==== {report.nodeid}\n{report.longreprtext}\n\n")
            self.broken |= bool(BROKEN.search(report.longreprtext))

    def append(self, name: str, text: str) -> None:
        with (self.folder / name).open("ab", buffering=0) as file:
            file.write(text.encode())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--share", type=Path, metavar="FOLDER", help="share the tests with the other processes of FOLDER")


def pytest_configure(config: pytest.Config) -> None:
    if folder := config.getoption("--share"):
        config.pluginmanager.register(Share(folder))


def run(arguments: list[str], folder: Path, processes: int, seconds: float) -> int:
    """Run the tests that pytest finds by ``arguments``, print what came of them and return the exit code."""
    deadline = time.monotonic() + seconds
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = ["--share", str(folder), "-q", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", *arguments, *options]
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        with (folder / "pytest.log" if not started else Path(os.devnull)).open("wb") as log:
            # A session of its own: the signal at the end reaches what a test has started, too.
            started.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
        return started[-1]

    running = [start() for _ in range(processes)]
    try:
        while running and time.monotonic() < deadline:
            time.sleep(0.1)
            ended = [process for process in running if process.poll() is not None]
            running = [process for process in running if process not in ended]
            # 0, 1 and 5: the list is done; anything else: the process broke down in the middle.
            broken = [process for process in ended if process.returncode not in (0, 1, 4, 5)]
            running += [start() for _ in broken if len(started) < 3 * processes]
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return summary(folder)


def summary(folder: Path) -> int:
    """Print the tests that did not pass and how many there are of each kind; return the exit code."""
    lines = (folder / "tests.txt").read_text().splitlines() if (folder / "tests.txt").exists() else []
    outcomes = {line.split(maxsplit=3)[3]: line.split()[0] for line in lines}
    cut = {path.read_text() for path in (folder / "claimed").glob("*")} - set(outcomes)
    with (folder / "tests.txt").open("a") as file:
        file.writelines(f"{'cut':8}          {name}\n" for name in sorted(cut))
    collected = int((folder / "collected").read_text()) if (folder / "collected").exists() else 0
    log = (folder / "pytest.log").read_text(errors="replace")
    errors = re.findall(r"^(?:ERROR (?!.*::).*|E +\w*Error: .*)", log, re.MULTILINE) if "ERROR" in log else []
    failed = [name for name, outcome in outcomes.items() if outcome == "failed"]
    print(*errors, *(f"FAILED {name}" for name in failed), *(f"CUT {name}" for name in sorted(cut)), sep="\n")
    counts = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    late = collected - len(outcomes)
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()) + f", {late} of {collected} not ended")
    if not collected:
        print(log[-3000:])
    for name in ("claimed", "collected"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return int(bool(failed or errors or late or not collected))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run tests in parallel processes.")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--out", type=Path, required=True)
    known, rest = parser.parse_known_args()
    sys.exit(run(rest, known.out.resolve(), known.processes, known.seconds))
