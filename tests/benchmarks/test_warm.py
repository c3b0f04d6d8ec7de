"""Compilation ahead: each task is a case that the run on a GPU times, and is run once."""

from __future__ import annotations

import pytest
import torch

from segmenter_fast import VARIANTS
from segmenter_fast.benchmarks import warm
from segmenter_fast.benchmarks.case import OURS
from segmenter_fast.benchmarks.models.comparison import PEER
from segmenter_fast.benchmarks.ops import OPS
from support.benchmarks import CPU


def test_every_task_is_a_case_of_the_run_on_a_gpu() -> None:
    tasks = warm.tasks()
    assert len(set(tasks)) == len(tasks)
    assert {"seg_b_mask_16", "training", *OPS} <= {task.name for task in tasks}
    cuda = torch.device("cuda")
    for task in tasks:
        if task.name in OPS:
            assert set(task.variants) & set(OPS[task.name](cuda, False)[task.number].variants)
        elif task.name != "training":
            assert set(task.variants) <= {OURS, PEER}


@pytest.mark.parametrize("task", [warm.Task("mask_scores", 0, ("eager", OURS)), warm.Task("seg_t_mask_16", 1, (PEER,))])
def test_a_task_runs_its_variants_once(task: warm.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setitem(VARIANTS, "seg_t_mask_16", VARIANTS["seg_t_mask_16"].replace(depth=1, decoder_depth=1))
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    done = warm.build(CPU, task)
    assert done.startswith(f"{task}: ")
    assert done.endswith(" s"), done
    assert compiled


def test_what_fails_is_told() -> None:
    assert "ValueError: unknown variant" in warm.build(CPU, warm.Task("seg_q_mask_16", 1, (OURS,)))
