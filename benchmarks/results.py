"""Result files: one JSON for each benchmark of a device."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from segmenter_fast.io.atomic import write_json

from .case import Row
from .device import Ceilings, DeviceRecord
from .timing import Timing

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"
# Each case's parameters and rows.
CaseRows = list[tuple[dict[str, Any], list[Row]]]


@dataclass
class Result:
    """The result of one benchmark. ``refused`` names cases with wrong outputs, ``not_run`` those without time."""

    op: str
    device: DeviceRecord
    ceilings: Ceilings
    started: str
    quick: bool
    cases: CaseRows = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)


def write(result: Result, folder: Path) -> Path:
    """Write ``<folder>/<device>/<op>.json`` and return its path. NaN and infinities are refused."""
    content = asdict(result) | {
        "schema": SCHEMA,
        "cases": [{"case": case, "rows": [asdict(row) for row in rows]} for case, rows in result.cases],
    }
    path = folder / result.device.slug / f"{result.op}.json"
    write_json(path, content, indent=1, allow_nan=False)
    return path


def read(path: Path) -> Result:
    """Read a file of ``write``.

    Raises:
        ValueError: the file has another schema.
    """
    content = json.loads(path.read_text())
    if content.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path} must have schema {SCHEMA}; run the benchmark again")
    cases = []
    for entry in content.pop("cases"):
        timings = [Timing(**row["timing"]) if row["timing"] else None for row in entry["rows"]]
        rows = [Row(**row | {"timing": timing}) for row, timing in zip(entry["rows"], timings, strict=True)]
        cases.append((entry["case"], rows))
    device, ceilings = DeviceRecord(**content.pop("device")), Ceilings(**content.pop("ceilings"))
    return Result(**content, device=device, ceilings=ceilings, cases=cases)
