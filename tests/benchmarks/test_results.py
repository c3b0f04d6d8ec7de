"""Result files are written whole and read back as they were; a device is described."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from segmenter_fast.benchmarks.case import OURS, Row
from segmenter_fast.benchmarks.device import Ceilings, describe, instruction_set
from segmenter_fast.benchmarks.ops import OPS
from segmenter_fast.benchmarks.results import Result, read, write
from support.benchmarks import CPU, timing_of


def result() -> Result:
    ceilings = Ceilings(10.0, {"float32": 0.3})
    found = Result("upsample_argmax", describe(CPU), ceilings, "2026-01-01T00:00:00+00:00", True)
    for case in OPS["upsample_argmax"](CPU, True):
        rows = [Row(OURS, "ok", "", 1e-7, timing_of(2.0), 1.0, None, 0.1), Row("eager", "out of memory", "needs 9 GiB")]
        found.cases.append((case.parameters, rows))
    found.refused.append("a case: ours disagrees")
    found.not_run.append("another case")
    return found


def test_round_trip(tmp_path: Path) -> None:
    path = write(result(), tmp_path)
    assert path == tmp_path / describe(CPU).slug / "upsample_argmax.json"
    assert read(path) == result()
    assert [p.name for p in path.parent.iterdir()] == ["upsample_argmax.json"], "nothing is left beside"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(result(), tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        write(replace(result(), cases=[({"a": float("nan")}, [])]), tmp_path)
    assert read(path) == result()
    assert len(list(path.parent.iterdir())) == 1


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"schema": 0}))
    with pytest.raises(ValueError, match="schema 1"):
        read(path)


def test_the_record_says_what_ran() -> None:
    record = describe(CPU)
    assert record.torch == torch.__version__
    assert record.threads == torch.get_num_threads()
    assert record.cores >= 1
    assert record.slug == record.slug.lower()
    assert record.architecture.lower() in record.slug
    assert record.name == f"{record.cpu} ({record.architecture})"
    assert not set(record.slug) - set("abcdefghijklmnopqrstuvwxyz0123456789-")


@pytest.mark.parametrize(
    ("capability", "checks", "expected"),
    [
        ("AVX512", {"_is_amx_tile_supported"}, "AMX"),
        ("AVX512", {"_is_avx512_bf16_supported"}, "AVX512-BF16"),
        ("AVX512", set(), "AVX512"),
        ("AVX2", {"_is_amx_tile_supported", "_is_avx512_bf16_supported"}, "AVX2"),
        ("SVE256", set(), "SVE256"),
    ],
)
def test_kinds_of_one_processor_have_folders_of_their_own(
    capability: str, checks: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in checks, raising=False)
    assert instruction_set() == expected
    assert f"-{expected.lower()}-" in describe(CPU).slug
