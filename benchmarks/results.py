"""Result files: one JSON for each op, written complete or not at all."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from segmenter_fast.io.atomic import atomic_path

from .cases import Row
from .device import Ceilings, DeviceRecord
from .timing import Timing

SCHEMA = 1


@dataclass
class Result:
    """What one op's benchmark found. ``refused`` cases had wrong outputs; ``not_run`` ones no time left."""

    op: str
    device: DeviceRecord
    ceilings: Ceilings
    started: str
    quick: bool
    cases: list[tuple[dict[str, Any], list[Row]]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    def path(self, folder: Path) -> Path:
        return folder / self.device.slug / f"{self.op}.json"


def write(result: Result, folder: Path) -> Path:
    """Write ``result`` below ``folder`` and return the file's path."""
    content = asdict(result) | {
        "schema": SCHEMA,
        "cases": [{"case": case, "rows": [asdict(row) for row in rows]} for case, rows in result.cases],
    }
    return write_json(content, result.path(folder))


def write_json(content: Any, path: Path) -> Path:
    """Write ``content`` to ``path``. NaN and infinities are refused."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)
    return path


def read(path: Path) -> Result:
    """The result that ``write`` wrote.

    Raises:
        ValueError: the file has another schema.
    """
    content = json.loads(path.read_text())
    if content.pop("schema", None) != SCHEMA:
        raise ValueError(f"{path} must have schema {SCHEMA}; run the benchmark again")
    cases = [(entry["case"], [_row(row) for row in entry["rows"]]) for entry in content.pop("cases")]
    device, ceilings = DeviceRecord(**content.pop("device")), Ceilings(**content.pop("ceilings"))
    return Result(**content, device=device, ceilings=ceilings, cases=cases)


def _row(content: dict[str, Any]) -> Row:
    timing = content.pop("timing")
    return Row(**content, timing=Timing(**timing) if timing else None)
