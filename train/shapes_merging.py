"""Token merging of the ``shapes`` model: mIoU on the held-out scenes against FLOPs, with and without training.

``python -m segmenter_fast.train.shapes_merging CONTINUED SCRATCH FOLDER`` evaluates the packaged model at several
shares and the best models of two runs with merging, and writes ``scores.json`` and ``scores.png`` into the folder.
docs/token-merging.md has the commands of the runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..describe import count_macs
from ..inference.settings import Settings
from ..segmenter import Segmenter
from ..token_merging import TokenMerging
from ..weights.load import load
from ..weights.reading import read_mapping
from .evaluation import evaluate
from .run_folder import BEST, RUN
from .shapes_model import held_out_scenes, load_shapes_model

LAYERS, SHARES = (1, 2, 3), (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
EXACT, MERGED, CONTINUED, SCRATCH = (
    "exact",
    "merged, not trained for it",
    "trained on with merging",
    "from random weights",
)
MARKERS = {EXACT: "s", MERGED: "o", CONTINUED: "^", SCRATCH: "D"}


def score(model: Segmenter, kind: str) -> dict[str, Any]:
    """The mIoU of a model on all held-out scenes, and the multiply-accumulates of one of them."""
    scenes = held_out_scenes(model)
    scores = evaluate(model, scenes, scenes.size, Settings(scenes.size, scenes.size))
    merging, macs = model.config.merging, count_macs(model.config, scenes.size)
    share = None if merging is None else list(merging.shares)
    return {"kind": kind, "share": share, "macs": macs, "miou": round(scores.miou, 4), "scenes": len(scenes)}


def measure(runs: dict[str, Path]) -> list[dict[str, Any]]:
    """Scores of the packaged model, exact and at ``SHARES``, and of runs by their kind, with merging and without."""
    model = load_shapes_model()
    found = [score(model, EXACT)]
    found += [score(model.with_merging(TokenMerging(LAYERS, share)), MERGED) for share in SHARES]
    for kind, run in runs.items():
        steps, trained = {"steps": read_mapping(run / RUN)["recipe"]["steps"]}, load(run / BEST).float().eval()
        found += [score(trained, kind) | steps, score(trained.with_merging(None), f"{kind}, merging off") | steps]
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draw mIoU against the factor of FLOPs that merging saves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.2, 4.0), layout="constrained")
    for kind, marker in MARKERS.items():
        points = sorted((found[0]["macs"] / one["macs"], 100 * one["miou"]) for one in found if one["kind"] == kind)
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, label=kind)
    axes.axhspan(100 * found[0]["miou"] - 0.3, 100 * found[0]["miou"], alpha=0.12, label="0.3 points below exact")
    axes.set(xlabel="times fewer FLOPs (computed)", ylabel=f"mIoU of {found[0]['scenes']} held-out scenes, %")
    axes.set_title("shapes, seg_m_mask_8: token merging, single runs")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def main(
    continued: Annotated[Path, typer.Argument(help="Run that trained the packaged model on with merging.")],
    scratch: Annotated[Path, typer.Argument(help="Run with merging from random weights.")],
    out: Annotated[Path, typer.Argument(help="Folder of scores.json and scores.png.")],
) -> None:
    """Evaluate the packaged model at several shares, and two runs that were trained with merging."""
    out.mkdir(parents=True, exist_ok=True)
    found = measure({CONTINUED: continued, SCRATCH: scratch})
    (out / "scores.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, out / "scores.png")


if __name__ == "__main__":
    typer.run(main)
