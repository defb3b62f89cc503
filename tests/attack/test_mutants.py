"""Damaged files of every form load right or not at all, and what is said names the file.

    VGGTORCH_ATTACK=500 python -m pytest tests/attack/test_mutants.py -s

prints how many mutants of each form there were, how many were refused, and what the slowest took.
"""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from checkpoint_files import (
    keras_tensors,
    onnx_state,
    small_state,
    write_legacy_weights,
    write_onnx,
)
from PIL import Image

from vggtorch.models import load_model, read_image
from vggtorch.training import checkpoints
from vggtorch.weights import readers, sources

TIMES = float(os.environ.get("VGGTORCH_ATTACK", "1"))


def picture(kind: str, path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, kind, exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x00")


def state(path: Path, new: bool = True) -> None:
    torch.save(small_state(), path, _use_new_zipfile_serialization=new)


def run_checkpoint(path: Path) -> None:
    content = {"variables": list(small_state().values()), "average": {}, "progress": {"epoch": 1}}
    checkpoints.write(path, content)


def safetensors(path: Path) -> None:
    sources.write(path.with_suffix(".safetensors"), small_state(), "imagenet")
    path.with_suffix(".safetensors").rename(path)


def plain_safetensors(path: Path) -> None:
    from safetensors.torch import save_file

    save_file(small_state(), path)


def of_keras(ending: str, path: Path) -> None:
    named = path.with_name(f"m{ending}")
    (tiny.network().save_weights if ending == ".weights.h5" else tiny.network().save)(named)
    named.rename(path)


def pixels(path: Path) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(read_image(path)))]


def values(checkpoint: sources.Checkpoint) -> list[torch.Tensor]:
    return list(checkpoint.tensors.values())


# A form: how it is written, how it is read, whether it has checksums over all that matters, and how
# many mutants there are of it for one of the quick ones: HDF5 costs a process each.
Form = tuple[Callable[[Path], None], Callable[[Path], list[torch.Tensor]], bool, float]
FORMS: dict[str, Form] = {
    "zip": (state, lambda p: values(sources.read(p)), True, 1),
    "pickle": (
        lambda p: state(p, new=False),
        lambda p: values(sources.read(p)), False, 1,
    ),
    "run's checkpoint": (run_checkpoint, lambda p: checkpoints.read(p)["variables"], True, 1),
    "safetensors": (safetensors, lambda p: values(sources.read(p)), True, 1),
    "plain safetensors": (plain_safetensors, lambda p: values(sources.read(p)), False, 1),
    "onnx": (
        lambda p: write_onnx(p, onnx_state(), channels_last=False),
        lambda p: values(sources.read(p)), False, 1,
    ),
    ".weights.h5": (
        lambda p: of_keras(".weights.h5", p), lambda p: values(sources.read(p)), False, 0.02,
    ),
    "legacy h5": (
        lambda p: write_legacy_weights(p, keras_tensors(tiny.network())),
        lambda p: values(sources.read(p)), False, 0.02,
    ),
    ".keras, weights": (
        lambda p: of_keras(".keras", p), lambda p: values(sources.read(p)), True, 0.02,
    ),
    ".keras, model": (
        lambda p: of_keras(".keras", p),
        lambda p: [v.value for v in load_model(p).weights], True, 0.2,
    ),
    **{
        kind: (functools.partial(picture, kind), pixels, False, 1)
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")
    },
}  # fmt: skip


def mutant(rng: random.Random, content: bytes) -> bytes:
    """Content with one kind of damage: cut, flipped bits, noise, a hole, a stretch doubled."""
    changed = bytearray(content)
    start = rng.randrange(len(changed))
    place = rng.random()
    if place < 0.4:  # most of what a parser looks at stands at one of the ends
        start = min(start, rng.randrange(200))
    elif place < 0.6:
        start = max(0, len(changed) - 1 - rng.randrange(200))
    stop = min(len(changed), start + rng.randrange(1, 64))
    kind = rng.randrange(6)
    if kind == 0:
        del changed[start:]
    elif kind == 1:
        for _ in range(rng.randrange(1, 9)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        changed[start:stop] = rng.randbytes(stop - start)
    elif kind == 3:
        del changed[start:stop]
    elif kind == 4:
        changed[start:start] = changed[start:stop]
    else:
        changed[start:stop] = b"\xff" * (stop - start)
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore")
def test_mutants_load_right_or_not_at_all(tmp_path, monkeypatch, form):
    write, read, checked, share = FORMS[form]
    path = tmp_path / ("m.keras" if form == ".keras, model" else "mutant")
    write(path)
    content = path.read_bytes()
    expected = [tensor.detach().clone() for tensor in read(path)]
    monkeypatch.setattr(readers, "H5_TIMEOUT", 5.0)
    refused, slowest = 0, 0.0
    count = max(4, round(100 * TIMES * share))
    for seed in range(count):
        path.write_bytes(mutant(random.Random(f"{form} {seed}"), content))
        began = time.process_time()
        try:
            found = read(path)
        except ValueError as error:
            assert str(path) in str(error), seed
            assert len(str(error)) < 5000, seed
            refused += 1
        else:
            if checked:
                assert len(found) == len(expected), seed
                assert all(map(torch.equal, found, expected)), seed
            if form not in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
                assert all(bool(torch.isfinite(tensor).all()) for tensor in found), seed
        slowest = max(slowest, time.process_time() - began)
    print(f"{form}: {count} mutants, {refused} refused, the slowest took {slowest:.2f} s")
    assert refused > count // 5 or form in ("GIF", "BMP", "JPEG", "TIFF", "WEBP")
