"""Time and peak of memory until VGG16 is ready with every page of its weights touched.

    python benchmarks/loading.py [--rounds 5] [--folder FOLDER]

Every load runs in a process of its own, one way after the other, round after round, on the same
random weights (torchvision's own initialisation, seed 0), after a first check that all ways end in
the same values. Time counts from after the imports; memory is the peak of resident memory (VmHWM,
Linux) above what the imports left. The files are in the page cache throughout.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the parent process stays small, and each way imports what it needs itself
    import torch

# Ways before which the converted copy is deleted: a load that makes it, and the making alone.
CONVERTING = ("first load", "conversion")
WAYS = ("vggtorch", "torchvision", "torchvision mmap", "keras.applications", *CONVERTING, "copy")


def resident(field: str) -> float:
    """Resident memory of this process in MB: `VmRSS` now, `VmHWM` at its peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def touch(tensors: Mapping[str, torch.Tensor]) -> float:
    """Read a value of every page of memory, in the order in which they are stored."""
    total = 0.0
    for tensor in tensors.values():
        stored = tensor.detach().as_strided((tensor.numel(),), (1,))
        total += float(stored[::1024].abs().sum())  # 1024 values of fp32 are a page
    return total


def loader(way: str, folder: Path) -> Callable[[], Mapping[str, torch.Tensor]]:
    """Import what a way of loading needs; returns the way itself."""
    checkpoint = folder / "vgg16.pth"
    if way == "copy":

        def copy() -> Mapping[str, torch.Tensor]:
            with checkpoint.open("rb") as source, (folder / "copy").open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
            return {}

        return copy
    if way.startswith("torchvision"):
        import torch
        import torchvision

        def plain() -> Mapping[str, torch.Tensor]:
            model = torchvision.models.vgg16()
            state = torch.load(checkpoint, weights_only=True, mmap=way.endswith("mmap"))
            model.load_state_dict(state)
            return model.state_dict()

        return plain

    import vggtorch as vt
    from vggtorch.models import named_variables

    if way == "keras.applications":
        import keras

        def stock() -> Mapping[str, torch.Tensor]:
            model = keras.applications.VGG16(weights=None)
            model.load_weights(folder / "vgg16.weights.h5")
            return {key: variable.value for key, variable in named_variables(model).items()}

        return stock

    if way == "conversion":
        from vggtorch import weights

        return lambda: weights.converted(checkpoint).tensors

    def ours() -> Mapping[str, torch.Tensor]:
        model = vt.VGG16(weights=checkpoint)
        return {key: variable.value for key, variable in named_variables(model).items()}

    return ours


def child(way: str, folder: Path) -> None:
    """Load once and print what it took."""
    load = loader(way, folder)
    before, start = resident("VmRSS"), time.perf_counter()
    tensors = load()
    touch(tensors)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": resident("VmHWM") - before}))


def prepare(folder: Path) -> None:
    """Write the files, and check that every way ends in the same values."""
    import torch
    import torchvision

    from vggtorch import models, weights

    torch.manual_seed(0)
    state = torchvision.models.vgg16().state_dict()
    torch.save(state, folder / "vgg16.pth")
    models.convert(folder / "vgg16.pth", folder / "vgg16.weights.h5")
    expected = weights.to_keras(state, "torchvision")
    for way in ("vggtorch", "vggtorch", "keras.applications"):
        tensors = loader(way, folder)()
        assert tensors.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(tensors[key].detach(), tensor), f"{way}: {key} differs"


def run(step: str, way: str, folder: Path) -> str:
    """One of this script's own steps in a fresh process; returns the last line that it printed."""
    done = subprocess.run(
        [sys.executable, __file__, "--folder", str(folder), step, way],
        env={**os.environ, "VGGTORCH_HOME": str(folder / "home"), "KERAS_BACKEND": "torch"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout.strip().split("\n")[-1]


def measure(folder: Path, rounds: int) -> None:
    """All ways in turn, and a table of what they took."""
    run("--prepare", "files", folder)
    size = (folder / "vgg16.pth").stat().st_size / 1e6
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            # Giving the room of an old file back may take longer than writing the new one.
            if way in CONVERTING:
                shutil.rmtree(folder / "home")
            elif way == "copy":
                (folder / "copy").unlink(missing_ok=True)
            measured[way].append(json.loads(run("--child", way, folder)))

    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, ", end="")
    print(run("--versions", "all", folder))
    print(f"python benchmarks/loading.py --rounds {rounds}; weights: {size:.0f} MB")
    reference = statistics.median(m["seconds"] for m in measured["torchvision"])
    print(f"{'':20} {'s, median':>10} {'min-max':>13} {'/ torchvision':>14} {'peak / weights':>15}")
    for way, results in measured.items():
        seconds = sorted(m["seconds"] for m in results)
        median = statistics.median(seconds)
        peak = statistics.median(m["peak"] for m in results) / size
        spread = f"{seconds[0]:.3f}-{seconds[-1]:.3f}"
        print(f"{way:20} {median:10.3f} {spread:>13} {median / reference:14.3f} {peak:15.2f}")


def versions() -> str:
    """The versions of what is measured."""
    import keras
    import torch
    import torchvision

    ours = {"torch": torch, "torchvision": torchvision, "keras": keras}
    return ", ".join(f"{name} {module.__version__}" for name, module in ours.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="for 2.5 GB of files; a temporary one otherwise"
    )
    # What the script runs of itself in fresh processes.
    for step in ("--child", "--prepare", "--versions"):
        parser.add_argument(step, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.folder)
    elif arguments.prepare:
        prepare(arguments.folder)
    elif arguments.versions:
        print(versions())
    elif arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
        measure(arguments.folder, arguments.rounds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), arguments.rounds)


if __name__ == "__main__":
    main()
