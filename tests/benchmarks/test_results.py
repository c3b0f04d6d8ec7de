"""Result files: written whole, read back as they were, drawn; the command line writes nothing that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from segmenter_fast.benchmarks import kernels as command
from segmenter_fast.benchmarks import run
from segmenter_fast.benchmarks.cases import OURS, Case, Row, Variant
from segmenter_fast.benchmarks.device import Ceilings, describe, resolve
from segmenter_fast.benchmarks.ops import OPS, upsample
from segmenter_fast.benchmarks.plots import draw
from segmenter_fast.benchmarks.results import Result, read, write, write_json
from segmenter_fast.benchmarks.timing import Timing

CPU = torch.device("cpu")


def result() -> Result:
    timing = Timing(2.0, 1.5, 2.5, 10, 3, 4, "perf_counter", 12345)
    ceilings = Ceilings(10.0, {"float32": 0.3})
    found = Result("upsample_argmax", describe(CPU), ceilings, "2026-01-01T00:00:00+00:00", True)
    for case in OPS["upsample_argmax"](CPU, True):
        rows = [Row(OURS, "ok", "", 1e-7, timing, 1.0, None, 0.1), Row("eager", "out of memory", "needs 9 GiB")]
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
    path = write_json({"a": 1}, tmp_path / "x.json")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json({"a": float("nan")}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = write_json({"schema": 0}, tmp_path / "x.json")
    with pytest.raises(ValueError, match="schema 1"):
        read(path)


def test_the_record_says_what_ran() -> None:
    record = describe(CPU)
    assert record.torch == torch.__version__
    assert record.threads == torch.get_num_threads()
    assert record.cores >= 1
    assert record.slug == record.slug.lower()
    assert not set(record.slug) - set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, cpu or cuda"):
        resolve("tpu")


def tiny(op: str, device: torch.device, quick: bool) -> list[Case]:
    cases = [
        upsample._case(op, device, torch.float32, 1, "forward", upsample.Point(classes, 8, 32)) for classes in (3, 5)
    ]
    return [replace(c, variants={k: v for k, v in c.variants.items() if k != "compile"}) for c in cases]


@pytest.fixture
def tiny_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure_ceilings", lambda *args, **kwargs: Ceilings(10.0, {"float32": 0.3}))
    monkeypatch.setitem(OPS, "upsample_argmax", lambda device, quick: tiny("upsample_argmax", device, quick))


@pytest.mark.usefixtures("tiny_cases")
def test_the_command_writes_and_the_plots_follow(tmp_path: Path) -> None:
    assert command.main(["upsample_argmax", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/*.json")
    found = read(path)
    assert [case["classes"] for case, _ in found.cases] == [3, 5]
    assert all(row.status == "ok" and row.timing for _, rows in found.cases for row in rows)
    (plot,) = draw(path.parent)
    assert plot.name == "upsample.png"
    assert plot.stat().st_size > 10_000


@pytest.mark.usefixtures("tiny_cases")
def test_a_wrong_kernel_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(upsample.OPS["upsample_argmax"], ours=lambda masks, size: masks.new_zeros((1, *size)).byte())
    monkeypatch.setitem(upsample.OPS, "upsample_argmax", wrong)
    assert command.main(["upsample_argmax", "--device", "cpu", "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.usefixtures("tiny_cases")
def test_a_spent_budget_lists_what_was_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["upsample_argmax", "--device", "cpu", "--budget", "0", "--out", str(tmp_path)]) == 0
    assert "2 of 2 cases not run" in capsys.readouterr().out


def test_attention_is_drawn(tmp_path: Path) -> None:
    timing = Timing(2.0, 1.5, 2.5, 10, 3, 4, "perf_counter", 12345)
    rows = [Row(OURS, "ok", "", 1e-7, timing, 1.0, 0.1, 0.3), Row("xformers", "absent", "not installed")]
    cases = [(case.parameters, rows) for case in OPS["attention"](CPU, True)]
    write(replace(result(), op="attention", cases=cases), tmp_path)
    (plot,) = draw(tmp_path / describe(CPU).slug)
    assert plot.name == "attention.png"


def test_variants_of_every_op_include_eager_and_ours() -> None:
    for op, cases in OPS.items():
        case = cases(CPU, True)[0]
        assert isinstance(case.variants["eager"], Variant), op
        assert isinstance(case.variants[OURS], Variant), op
