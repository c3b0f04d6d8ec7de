"""The generated tables of benchmarks/README.md: ``python -m segmenter_fast.benchmarks.report.tables`` writes them.

They come from the committed JSON alone and stand between ``<!-- measured -->`` and ``<!-- /measured -->``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..case import OURS
from ..models.defaults import Ratios, ratios_of
from ..models.peers import in_words
from ..models.summary import compared, fastest, gain, memory, pair, runtimes_of, speed
from ..ops import OPS
from ..results import RESULTS, Result, read
from ..runner import run_command

README = RESULTS.parent / "README.md"
FIRST_PAGE = RESULTS.parents[1] / "README.md"
HEADLINES = {"seg_s_mask_16": "ViT-S/16", "seg_s_mask_32": "S/32"}
GPU_HEADLINE = "seg_b_mask_16", "ViT-B/16"
SMOOTH = {"classes": 150, "patch": 16, "map": "smooth"}
# Rows of the table of ops: label, file, parameters of the case.
OP_ROWS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("`upsample_argmax`, smooth maps", "upsample_argmax", SMOOTH),
    ("`upsample_argmax`, noise", "upsample_argmax", SMOOTH | {"map": "noise"}),
    ("`upsample_cross_entropy`, forward and backward", "upsample_cross_entropy", SMOOTH | {"pass": "forward+backward"}),
    ("`upsample_softmax`", "upsample_softmax", SMOOTH | {"pass": "forward"}),
    ("`upsample_softmax`, forward and backward", "upsample_softmax", SMOOTH | {"pass": "forward+backward"}),
    ("`mask_scores`", "mask_scores", {"classes": 150, "pass": "forward"}),
    ("`mask_scores`, forward and backward", "mask_scores", {"classes": 150, "pass": "forward+backward"}),
    ("`attention`", "attention", {"tokens": 1025, "pass": "forward", "dtype": "float32"}),
    ("`attention`", "attention", {"tokens": 1025, "pass": "forward", "dtype": "bfloat16"}),
)
PICTURES = {
    "throughput": "Throughput against patch size and against tokens",
    "split": "Time of encoder, decoder and upsampling",
    "classes": "Peak memory against classes",
}


def rewritten(text: str, name: str, block: str) -> str:
    """``text`` with ``block`` between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: no place for it, or more than one.
    """
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    text, count = pattern.subn(lambda found: f"{found[1]}\n{block}\n\n{found[2]}", text)
    if count != 1:
        raise ValueError(f"there must be one block <!-- {name} --> ... <!-- /{name} -->, found {count}")
    return text


def tables(results: Path) -> str:
    """The tables and plots of every device, one after the other."""
    return "\n\n".join(filter(None, map(measured, sorted(results.iterdir()))))


def figures(results: Path) -> str:
    """Speed and memory on a GPU and on a CPU, as far as they were measured."""
    return "\n\n".join(filter(None, (_gpu_figures(results), _cpu_figures(results))))


def _gpu_figures(results: Path) -> str:
    """Speed and memory of GPU_HEADLINE at two batch sizes on the first GPU that has both."""
    for path in sorted(results.glob("*/throughput.json")):
        result = read(path)
        wanted = {"variant": GPU_HEADLINE[0], "dtype": "bfloat16", "size": 512}
        found = {c["batch"]: (c, rows) for c, rows in result.cases if c.items() >= wanted.items()}
        if result.device.type != "cuda" or not {1, 32} <= found.keys():
            continue
        case = {key: value for key, value in found[1][0].items() if key != "batch"}
        trios = [compared(found[batch][1]) for batch in (1, 32)]
        official = " and ".join(f"**{gain(ours, reference)}**" for reference, _, ours in trios)
        best = " and ".join(f"**{gain(ours, peer)}**" for _, peer, ours in trios)
        held = " and ".join(memory((reference, ours), " / ") for reference, _, ours in trios)
        return f"""On {_where(result)}, {GPU_HEADLINE[1]}, {in_words(case)}, at batch 1 and 32:

- Images per second, relative to the official arithmetic: {official}.
- Relative to the same model compiled by PyTorch, with its fused attention: {best}.
- Memory beyond the weights, official arithmetic / ours: {held} MiB.
{_training_figures(path.with_name("training.json"))}""".rstrip()
    return ""


def _training_figures(path: Path) -> str:
    """A line on the training step of GPU_HEADLINE against PyTorch's autocast, where it was measured."""
    for case, rows in read(path).cases if path.exists() else []:
        by_name = {row.variant: row for row in rows}
        eager, ours = by_name.get("eager AMP"), by_name.get(OURS)
        wanted = {"model": "seg_b_mask", "patch": 16, "classes": 150}
        if case.items() >= wanted.items() and eager and ours and eager.timing and ours.timing:
            times = f"{eager.timing.median_ms:.0f} / {ours.timing.median_ms:.1f} ms, {memory((eager, ours), ' / ')} MiB"
            step = f"A training step of {case['batch']} images, replayed as a CUDA graph"
            return f"- {step}, official arithmetic under autocast / ours: {times}."
    return ""


def _cpu_figures(results: Path) -> str:
    """Speed and memory of HEADLINES on the first device that has both in float32; nothing where there is none."""
    for path in sorted(results.glob("*/throughput.json")):
        result = read(path)
        alike = [(c, rows) for c, rows in result.cases if c.items() >= {"dtype": "float32", "batch": 1}.items()]
        cases = {c["variant"]: rows for c, rows in alike if c["variant"] in HEADLINES and compared(rows)[2].timing}
        if cases.keys() != HEADLINES.keys():
            continue
        official, best, held = [], [], []
        for variant, name in HEADLINES.items():
            reference, peer, ours = compared(cases[variant])
            others = [row for row in cases[variant] if row.variant in runtimes_of(alike)]
            official.append(f"**{gain(ours, reference)}** with {name}")
            best.append(f"**{gain(ours, fastest([peer, *others]))}** with {name}")
            held.append(f"{memory((reference, ours), ' / ')} MiB with {name}")
        peers = ", ".join(["PyTorch compiled", *runtimes_of(alike)])
        return f"""On {_where(result)}, {in_words(alike[0][0])} ([all measurements](benchmarks/README.md#results)):

- Images per second, relative to the official arithmetic: {", ".join(official)}.
- Relative to the fastest of its rivals ({peers}): {", ".join(best)}.
- Memory of an image, official arithmetic / ours: {", ".join(held)}."""
    return ""


def measured(folder: Path) -> str:
    """The tables and plots of one device, as far as its files are there."""
    parts = []
    models = folder / "throughput.json"
    if models.exists():
        parts.append(_models_table(read(models)))
        for name, caption in PICTURES.items():
            if (folder / f"{name}.png").exists() and (folder / f"{name}.json").exists():
                parts.append(f"![{caption}](results/{folder.name}/{name}.png)")
    defaults = folder / "defaults.json"
    if defaults.exists() and (ratios := ratios_of(read(defaults).cases)):
        parts.append(_defaults_table(read(defaults), ratios))
    if (folder / "swap_in.json").exists():
        parts.append(_swap_table(read(folder / "swap_in.json")))
    merging = folder / "merging.json"
    if merging.exists():
        parts.append(_merging_table(read(merging)))
        parts.append(f"![Token merging, speed by the labels that are kept](results/{folder.name}/merging.png)")
    results = {op: read(folder / f"{op}.json") for op in OPS if (folder / f"{op}.json").exists()}
    rows = [cells for label, op, wanted in OP_ROWS if op in results and (cells := _op_row(label, results[op], wanted))]
    if rows:
        where = _where(next(iter(results.values())))
        title = f"The ops on {where} (150 classes, 32 x 32 patches to 512 x 512; attention: 12 heads of 64):"
        header = "| op | eager | `torch.compile` | ours | over eager | peak MiB, eager / ours |"
        parts.append(make_table(title, header, rows))
    if "attention" in results and results["attention"].device.type == "cuda":
        parts.append(_attention_table(results["attention"]))
    return "\n\n".join(parts)


def _attention_table(result: Result) -> str:
    """TFLOP/s of ours and of PyTorch's fastest ``scaled_dot_product_attention`` at every length and batch."""
    table = []
    for case, rows in sorted(
        result.cases, key=lambda found: (found[0]["dtype"], found[0]["batch"] == 1, found[0]["tokens"])
    ):
        ours = next(row for row in rows if row.variant == OURS)
        peer = fastest(row for row in rows if row.variant.startswith("SDPA"))
        if ours.timing and peer.timing:
            rates = [
                f"{row.tflops:.0f} ({row.timing.median_ms:.3g} ms)" for row in (peer, ours) if row.timing and row.tflops
            ]
            name = f"{case['tokens']}, batch {case['batch']}, {case['dtype']}, {case['pass']}"
            table.append((name, peer.variant, *rates, f"{peer.timing.median_ms / ours.timing.median_ms:.2f}x"))
    title = f"Attention on {_where(result)}, 12 heads of 64, TFLOP/s (milliseconds), beside PyTorch's fastest backend:"
    return make_table(title, "| tokens | PyTorch's fastest | its rate | ours | over it |", table)


def make_table(title: str, header: str, rows: Iterable[Sequence[str]]) -> str:
    rule = "|---" * (header.count("|") - 1) + "|"
    return "\n".join([title, "", header, rule, *(f"| {' | '.join(cells)} |" for cells in rows)])


def _models_table(result: Result) -> str:
    """A line for each case of a ``throughput.json``: figures, or the reason why there are none."""
    shared = {key: value for key, value in result.cases[0][0].items() if all(c[key] == value for c, _ in result.cases)}
    title = f"Images per second on {_where(result)} (PyTorch {result.device.torch}), {in_words(shared)}, a photograph"
    title += " (in brackets: how many times faster ours is):"
    runtimes = runtimes_of(result.cases)
    header = f"| | tokens | {' | '.join(['reference', 'peer', *runtimes, 'ours'])} | share of peak "
    header += "| MiB, reference / ours | error of the logits, peer / ours |"
    table = []
    for case, rows in sorted(result.cases, key=lambda found: _order(found[0])):
        reference, peer, ours = compared(rows)
        own = in_words({key: value for key, value in case.items() if key not in shared})
        name = f"`{case['variant']}`" + (f", {own}" if own else "")
        others = [reference, peer, *(row for row in rows if row.variant in runtimes)]
        speeds = [f"{speed(row)} ({gain(ours, row)})".replace(" ()", "") for row in others]
        share = f"{ours.share:.0%}" if ours.share else ""
        errors = pair(("" if row.error is None else f"{row.error:.2g}" for row in (peer, ours)), " / ")
        cells = (*speeds, f"**{speed(ours)}**", share, memory((reference, ours), " / "), errors)
        table.append((name, str(case["tokens"]), *cells))
    return make_table(title, header, table)


def _defaults_table(result: Result, ratios: Ratios) -> str:
    title = f"Time of our defaults over that of plain PyTorch, the faster of eager and SDPA, on {_where(result)}:"
    rows = []
    for form, found in ratios.items():
        worst, where = max(found)
        rows.append((f"`{form.removeprefix('ours ')}`", str(len(found)), f"{min(found)[0]:.2f}", f"{worst:.2f}", where))
    return make_table(title, "| | cases | best | worst | worst case |", rows)


def _swap_table(result: Result) -> str:
    """Time and memory of each loop before and after ``accelerate``."""
    table = []
    for case, rows in result.cases:
        plain, ours = (row.timing for row in rows)
        if plain and ours:
            times = f"{plain.median_ms:.0f} / {ours.median_ms:.0f} ms"
            gain = f"{plain.median_ms / ours.median_ms:.2f}x"
            table.append((f"{case['model']}, {case['loop']}", times, gain, memory(rows, " / ")))
    title = f"Models of others before and after `accelerate`, 150 classes, batch 1, float32, on {_where(result)}:"
    return make_table(title, "| | before / after | over it | MiB, before / after |", table)


def _merging_table(result: Result) -> str:
    """Images per second of each schedule of token merging, and what it keeps of the exact model's labels."""
    names = list(dict.fromkeys(row.variant for _, rows in result.cases for row in rows))
    table = []
    for case, rows in result.cases:
        exact, by_name = rows[0], {row.variant: row for row in rows}
        cells = []
        for name in names:
            row = by_name.get(name)
            kept = f", {row.labels:.1%} kept" if row and row is not exact and row.labels is not None else ""
            cells.append(
                f"{speed(row)} ({gain(row, exact)}){kept}".replace(" (1.00x)", "") if row and row.timing else ""
            )
        table.append((f"`{case['variant']}`, {in_words({k: case[k] for k in ('size', 'dtype')})}", *cells))
    title = f"Images per second with token merging on {_where(result)}, batch 1 (in brackets: over the exact model)."
    title += " Labels kept: those of the exact model in float32, with real weights on four photographs."
    return make_table(title, f"| | {' | '.join(name.removeprefix('ours ') for name in names)} |", table)


def _op_row(label: str, result: Result, wanted: dict[str, Any]) -> tuple[str, ...] | None:
    # A dtype without a ceiling is emulated by the device, and every ratio of it is large.
    own = [(c, rows) for c, rows in result.cases if c.items() >= wanted.items()]
    case, rows = next((found for found in own if found[0]["dtype"] in result.ceilings.matmul_tflops), ({}, []))
    by_name = {row.variant: row for row in rows}
    eager, compiled, ours = (by_name.get(name) for name in ("eager", "compile", OURS))
    if eager and not eager.timing and "eager float32" in by_name:  # in low precision PyTorch's gradient is too far off
        eager, label = by_name["eager float32"], f"{label} (eager in float32)"
    if not (eager and eager.timing and ours and ours.timing):
        return None
    times = [row.timing.median_ms if row and row.timing else None for row in (eager, compiled, ours)]
    return (
        f"{label}, batch {case['batch']}, {case['dtype']}",
        *("" if time is None else f"{time:.0f} ms" if time >= 100 else f"{time:.3g} ms" for time in times),
        f"{eager.timing.median_ms / ours.timing.median_ms:.1f}x",
        memory((eager, ours), " / "),
    )


def _order(case: dict[str, Any]) -> tuple[Any, ...]:
    size = "tsbl".find(case["variant"].split("_")[1])
    return case["dtype"], case["batch"], case["size"], case["classes"], size, case["patch"]


def _where(result: Result) -> str:
    device = result.device
    return device.name if device.type == "cuda" else f"{device.name} with {device.threads} threads"


def main() -> None:
    """Write the tables of the committed results into README.md and benchmarks/README.md."""
    README.write_text(rewritten(README.read_text(), "measured", tables(RESULTS)))
    FIRST_PAGE.write_text(rewritten(FIRST_PAGE.read_text(), "figures", figures(RESULTS)))


if __name__ == "__main__":
    run_command(main)
