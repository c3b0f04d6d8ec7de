"""The record of the device and software behind a result, and the device's measured ceilings.

``python -m segmenter_fast.benchmarks.device [auto | cpu | cuda]`` prints the record.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import typer

from segmenter_fast.devices import choose_device, cpu_has, usable_cores

from .timing import Timing, available_memory, measure, own_stream


@dataclass(frozen=True)
class DeviceRecord:
    """The machine and the software that produced a result. ``slug`` names its folder below ``results``.

    ``dirty`` tells that tracked files differed from the commit; it is None without git.
    """

    name: str
    slug: str
    type: str
    driver: str | None
    architecture: str
    memory_bytes: int
    cpu: str
    cores: int
    threads: int
    python: str
    torch: str
    triton: str | None
    package: str
    commit: str | None
    dirty: bool | None
    platform: str


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: a copy in GB/s (bytes read plus bytes written), square matrix products in TFLOP/s by dtype."""

    copy_gb_s: float
    matmul_tflops: dict[str, float]

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in self.matmul_tflops.items())
        return f"copy {self.copy_gb_s:.4g} GB/s, matrix product {rates}"


def describe(device: torch.device) -> DeviceRecord:
    """Describe this machine for results measured on ``device``."""
    git = ("git", "-C", str(Path(__file__).parent))
    changed = _output(*git, "status", "--porcelain", "-uno", "--", ":/", ":/!benchmarks/results")
    cpuinfo, threads = Path("/proc/cpuinfo"), torch.get_num_threads()
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    cpu = found.group(1).strip() if found else platform.processor() or platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory = properties.name, properties.total_memory
        gcn = getattr(properties, "gcnArchName", "").split(":")[0]
        architecture = gcn if torch.version.hip else f"sm_{properties.major}{properties.minor}"
        slug = _slug(name)
        nvidia = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = _output(*(("cat", "/sys/module/amdgpu/version") if torch.version.hip else nvidia))
        driver = driver.splitlines()[0] if driver else None
    else:
        driver, memory = None, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        architecture = instruction_set()
        name, slug = f"{cpu} ({architecture})", f"{_slug(cpu)}-{_slug(architecture)}-{threads}-threads"
    return DeviceRecord(
        name=name,
        slug=slug,
        type=device.type,
        driver=driver,
        architecture=architecture,
        memory_bytes=memory,
        cpu=cpu,
        cores=usable_cores(),
        threads=threads,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        package=_version("segmenter-fast") or "not installed",
        commit=_output(*git, "rev-parse", "HEAD"),
        dirty=None if changed is None else bool(changed),
        platform=platform.platform(),
    )


def instruction_set() -> str:
    """The CPU's means of matrix products that PyTorch uses: AMX, AVX512-BF16, AVX512, AVX2 and the like.

    One name of a processor stands for several: an "AMD EPYC" may have bfloat16 products or not.
    """
    names = {"amx_tile": "AMX", "avx512_bf16": "AVX512-BF16"}
    found = (name for feature, name in names.items() if cpu_has(feature))
    return next(found, torch.backends.cpu.get_cpu_capability())  # AVX2 also where ATEN_CPU_CAPABILITY lowers it to that


def measure_ceilings(device: torch.device, dtypes: tuple[torch.dtype, ...], seconds: float = 1.0) -> Ceilings:
    """Measure the copy bandwidth and the matrix-product rate of each dtype, ``seconds`` for each.

    On a CPU the rate is the higher of ``torch.mm`` and of oneDNN's product with packed weights: ``torch.mm`` runs MKL
    in float32, which leaves AVX512 unused on AMD.
    """
    cuda = device.type == "cuda"

    def median_ms(function: Any, *args: Any) -> float:
        outcome = measure({"": [lambda: function(*args)]}, device, seconds=seconds)[""]
        if not isinstance(outcome, Timing):
            raise RuntimeError(f"a ceiling could not be measured: {outcome.note}")
        return outcome.median_ms

    with own_stream(device):
        count = min(2**30 if cuda else 2**28, available_memory(device) // 8) // 4
        source = torch.randn(count, device=device)
        bandwidth = 2 * source.nbytes / median_ms(torch.empty_like(source).copy_, source) / 1e6
        del source
        rates = {}
        side = 8192 if cuda else 2048
        for dtype in dtypes:
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            fastest = median_ms(torch.mm, a, b)
            if not cuda and torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16):
                packed = torch.ops.mkldnn._reorder_linear_weight(b)
                options: tuple[Any, ...] = (packed, None, "none", [], "")
                fastest = min(fastest, median_ms(torch.ops.mkldnn._linear_pointwise, a, *options))
            rates[name_of(dtype)] = 2 * side**3 / fastest / 1e9
    return Ceilings(bandwidth, rates)


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def _slug(name: str) -> str:
    """``nvidia-h100-80gb-hbm3`` for ``NVIDIA H100 80GB HBM3``."""
    plain = re.sub(r"\((r|tm|c)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """The output of a command, or None where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def main(device: str = typer.Argument("auto")) -> None:
    """Describe a device as results do."""
    for key, value in asdict(describe(choose_device(device))).items():
        print(f"{key:14} {value}")


if __name__ == "__main__":
    typer.run(main)
