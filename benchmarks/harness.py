"""What the benchmarks share: turns of A B A B, medians, and the facts that belong to a result."""

from __future__ import annotations

import itertools
import platform
import statistics
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vggtorch.lowering import kernels
from vggtorch.measuring import in_turns


def header(device: torch.device) -> str:
    """Hardware, versions, date and command, as a line of Markdown each."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        hardware = names[0] if names else platform.processor()
        extensions = torch.backends.cpu.get_cpu_capability()
        hardware += f", {torch.get_num_threads()} threads, {extensions}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "keras"))
    return (
        f"- {hardware}\n"
        f"- Python {platform.python_version()}, {versions}\n"
        f"- {date.today()}: `python {' '.join(sys.argv)}`"
    )


def compiles(name: str, run: Callable[[], object]) -> bool:
    """Whether a candidate that is compiled at its first call can be; prints why not."""
    try:
        run()
    except Exception as error:  # no C++ compiler, no Triton ...
        print(f"\n{name} can't be compiled here: {str(error).strip().splitlines()[0]}")
        return False
    return True


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors at the worst moment of a call, above what was there before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    kineto: Any = profile.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes))


def matmul_rate(dtype: torch.dtype, device: torch.device, repeats: int = 5) -> float:
    """Floating-point operations per second of a large matrix product, by whoever is fastest.

    That is not always torch: its float32 product is MKL's, which on some CPUs is half as fast as
    oneDNN's, and oneDNN computes the convolutions.
    """
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    products: dict[str, Callable[[], object]] = {"torch": lambda: a @ b}
    if kernels.has_fused_ops(a, dtype):
        products["oneDNN"] = lambda: kernels.linear(a, b, None)
    seconds = in_turns(products, repeats, device)
    return 2 * n**3 / min(statistics.median(values) for values in seconds.values())


def table(
    seconds: dict[str, list[float]], ours: str, flops: float = 0, peak: float = 0
) -> list[str]:
    """Markdown rows: median, quartiles, how many times as long as `ours`, share of the peak.

    The ratio is the median of those in each turn, which hardly sees a machine that gets slower.
    """
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        low, _, high = statistics.quantiles(values, n=4)
        row = f"| {name} | {median * 1e3:.1f} | {low * 1e3:.1f}-{high * 1e3:.1f} "
        ratio = statistics.median(a / b for a, b in zip(values, seconds[ours], strict=True))
        row += f"| {ratio:.2f} |"
        rows.append(row + (f" {flops / median / peak:.2f} |" if peak else ""))
    return rows
