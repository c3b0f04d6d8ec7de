"""Trainings killed at random moments, for ``tests/fuzz/test_kills.py``: ``killed.py CHAINS FOLDER`` prints JSON.

Every training is a fork of this process, which has imported everything: a start takes milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import segmenter_fast as sf
from segmenter_fast.train.engine import train
from segmenter_fast.train.logs import read_log
from segmenter_fast.train.presets import Recipe
from support.training import RECIPE, Squares, small_model, weights

MOST_KILLS = 6
KINDS: dict[str, Recipe] = {
    "plain": RECIPE.replace(steps=9, evaluate_every=3, save_every=1),
    "average": RECIPE.replace(steps=8, ema=0.9, drop_path=0.5, evaluate_every=2, save_every=3, pictures=1),
    "adamw": RECIPE.replace(steps=8, optimizer="adamw", lr=1e-3, clip=0.5, accumulate=2, evaluate_every=5, keep=1),
    "muon": RECIPE.replace(steps=8, optimizer="muon", lr=1e-3, batch_size=3, evaluate_every=4),
}


def training(out: Path, recipe: Recipe) -> int:
    """Start a training that goes on from what is there, and return its process."""
    if process := os.fork():
        return process
    code = 99
    try:
        for stream in (1, 2):
            os.dup2(os.open(out.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        result = train(small_model(recipe), Squares(), Squares(3, 1), recipe, out, device="cpu", resume="auto")
        code = 0 if result.finished else 75
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def end(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def difference(out: Path, whole: Path) -> str:
    """Return what differs between two finished runs; empty if nothing does."""
    for name in ("checkpoint", "last", "best"):
        found, wanted = (
            weights(run) if name == "checkpoint" else sf.load(run / name).state_dict() for run in (out, whole)
        )
        if found.keys() != wanted.keys() or not all(torch.equal(found[key], wanted[key]) for key in wanted):
            return f"other weights of {name}"
    for kind, value in (("step", "loss"), ("evaluation", "miou")):
        found, wanted = (
            [(line["step"], line[value]) for line in read_log(run) if line["kind"] == kind] for run in (out, whole)
        )
        if found != wanted:
            return f"another log of {kind}: {found}, not {wanted}"
    if (out / "scores.json").read_bytes() != (whole / "scores.json").read_bytes():
        return "other scores.json"
    left = [path for path in out.rglob("*") if path.name.startswith(".saving-") and "samples" not in path.parts]
    return f"{left[0]} is left" if left else ""


def main() -> None:
    chains, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    counts = {"chains": 0, "killed": 0, "stopped": 0}
    wrong, seconds = list[str](), dict[str, float]()
    for chain in range(chains):
        draw, name = random.Random(chain), list(KINDS)[chain % len(KINDS)]
        out, code = folder / f"chain {chain}", -1
        if name not in seconds:
            start = time.perf_counter()
            assert end(training(folder / name, KINDS[name])) == 0, (folder / f"{name}.out").read_text()
            seconds[name] = time.perf_counter() - start
        for _ in range(MOST_KILLS):
            process = training(out, KINDS[name])
            time.sleep(draw.uniform(0.05, 0.9) * seconds[name])
            number = signal.SIGTERM if draw.random() < 0.2 else signal.SIGKILL
            os.kill(process, number)
            code = end(process)
            counts["killed"] += code == -signal.SIGKILL
            counts["stopped"] += code == 75
            if code not in (75, -signal.SIGKILL, -signal.SIGTERM):
                break
        if code != 0:
            code = end(training(out, KINDS[name]))
        problem = difference(out, folder / name) if code == 0 else f"exit code {code}"
        if problem:
            wrong.append(f"chain {chain}, {name}: {problem}; {out.with_suffix('.out').read_text()[-300:]}")
        counts["chains"] += 1
        shutil.rmtree(out)
    print(json.dumps({"counts": counts, "wrong": wrong}))


if __name__ == "__main__":
    main()
