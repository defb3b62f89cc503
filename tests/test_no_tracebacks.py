"""Whatever file a user hands to a command, what comes back is a line that names it."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import zipfile
import zlib
from pathlib import Path

import keras
import pytest
import tiny
import torch
from test_text import harmless

from vggtorch import cli
from vggtorch.cli import main
from vggtorch.models import load_model, remember_
from vggtorch.training import TrainConfig, finetune

COMMANDS = {
    "inspect": ["inspect", "FILE"],
    "before": ["inspect", "whole.keras", "--before", "FILE"],
    "bench": ["bench", "FILE", "--repeats", "1"],
    "export": ["export", "FILE", "out.onnx"],
    "predict": ["predict", "image.png", "--model", "FILE"],
    "convert": ["convert", "FILE", "out.safetensors"],
}  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("kept") / "m.keras"
    remember_(tiny.network(), "oxford").save(path)
    return path.read_bytes()


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tiny.pictures(tmp_path / "p", each=1) / "red" / "0.png").rename("image.png")
    return tmp_path


def refused(command: list[str], capsys: pytest.CaptureFixture[str], names: str) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("vggtorch: ") and error.count("\n") == 1, error
    assert names in error
    assert harmless(error) and len(error) < 5000
    return error


def rewritten(content: bytes, path: Path, **members: str | bytes) -> None:
    """The same archive with other members, whose checksums are right."""
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        before = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in (before | {f"{n}.json": v for n, v in members.items()}).items():
            archive.writestr(name, value)


def configs(content: bytes, tmp_path: Path) -> dict[str, str]:
    """Hostile configurations of a model."""
    path = tmp_path / "read.keras"
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    layers = config["config"]["layers"]
    swapped = json.dumps(config)
    layers[2]["config"]["filters"] = "many"
    wrong_type = json.dumps(config)
    layers[2]["config"]["filters"] = -4
    negative = json.dumps(config)
    layers[2] = {"module": "os", "class_name": "system", "config": {}, "name": "x"}
    return {
        "no json": "{",
        "a list": "[]",
        "null": "null",
        "empty": "{}",
        "deep": "[" * 100_000,
        "deep objects": '{"config":' * 50_000 + "1" + "}" * 50_000,
        "words for numbers": wrong_type,
        "negative": negative,
        "another module": json.dumps(config),
        "an unknown class": swapped.replace('"Conv2D"', '"Conv9D\\u001b[31m"'),
        "a lambda": swapped.replace('"Conv2D"', '"Lambda"'),
        "a number for a name": swapped.replace('"block1_conv1"', "7"),
        "links to nowhere": swapped.replace('"block1_conv1", 0, 0', '"nowhere", 0, 0'),
        "a huge layer": swapped.replace('"filters": 6', '"filters": 1000000000000'),
    }


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_model(kept, place, capsys, command):
    path = place / "m.keras"
    (place / "whole.keras").write_bytes(kept)
    arguments = [str(path) if a == "FILE" else a for a in COMMANDS[command]]
    rng = random.Random(command)
    damaged = [b"", b"PK", kept[:-1], kept[: len(kept) // 2], kept + b"x", bytes(1000), b"<html>"]
    for _ in range(5):
        content = bytearray(kept)
        content[rng.randrange(len(kept))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(content))
    for content in damaged:
        path.write_bytes(content)
        capsys.readouterr()
        if main(arguments) == 0:  # a flipped bit where nothing depends on it
            assert len(content) == len(kept)
        else:
            refused(arguments, capsys, "m.keras")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["inspect", "export", "predict"])
def test_a_hostile_configuration(kept, place, capsys, command):
    path = place / "m.keras"
    arguments = [str(path) if a == "FILE" else a for a in COMMANDS[command]]
    for name, config in configs(kept, place).items():
        rewritten(kept, path, config=config)
        assert refused(arguments, capsys, "m.keras"), name


def test_a_configuration_that_asks_for_far_more_than_the_file_has(place):
    """It is refused before Keras takes the memory, and what draws at random is left as it was."""
    path = place / "m.keras"
    keras.Sequential([keras.Input((8,)), keras.layers.Dense(6)]).save(path)
    with zipfile.ZipFile(path) as archive:
        config = archive.read("config.json").decode()
    rewritten(path.read_bytes(), path, config=config.replace('"units": 6', '"units": 30000000'))
    before = random.getstate()
    with pytest.raises(ValueError, match=r"asks for \d{9,} bytes of weights, and there are \d+$"):
        load_model(path)
    assert random.getstate() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("command", ["inspect", "predict", "convert"])
def test_what_is_no_file_at_all(place, capsys, command):
    (place / "folder.keras").mkdir()
    os.mkfifo(place / "pipe.keras")
    (place / "words.keras").write_text("words")
    (place / "loop.keras").symlink_to("loop.keras")
    torch.save({}, place / "tensors.keras")
    for name in ("folder", "pipe", "words", "loop", "tensors", "nowhere"):
        refused([f"{name}.keras" if a == "FILE" else a for a in COMMANDS[command]], capsys, name)


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


@pytest.mark.slow
def test_an_image_of_400_million_pixels(kept, place, capsys):
    (place / "m.keras").write_bytes(kept)
    rows = zlib.compress(bytes((20_000 // 8 + 1) * 20_000), 9)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0))
    content = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (place / "huge.png").write_bytes(content)
    assert len(content) < 100_000
    refused(["predict", "huge.png", "--model", "m.keras"], capsys, "pixels; expected at most")


def test_what_nobody_thought_of_is_one_line_too(monkeypatch, capsys):
    def fails(*_: object) -> None:
        raise LookupError("of our own\nmaking")

    monkeypatch.setattr(cli, "_show", fails)
    error = refused(["weights"], capsys, "unexpected LookupError: of our own (--debug shows where")
    assert "Traceback" not in error
    with pytest.raises(LookupError):
        main(["weights", "--debug"])


class Killed(torch.utils.data.TensorDataset):
    content_name = "killed"

    def __init__(self, number: int | None) -> None:
        super().__init__(*tiny.dataset().tensors)
        self.number = number

    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None and index == 7:
            if self.number is None:
                raise ValueError("image 7 is gone")
            os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a signal that kills")
@pytest.mark.parametrize(
    ("name", "message"),
    [("SIGKILL", "was killed, for want of memory perhaps"), (None, "^image 7 is gone$")],
)
def test_a_worker_that_dies_or_raises(tmp_path, name, message):
    number = getattr(signal, name) if name else None
    config = TrainConfig(
        epochs=1, batch_size=6, num_workers=1, cache=False, output_dir=str(tmp_path / "run")
    )
    with pytest.raises(ValueError, match=message):
        finetune(tiny.network(), Killed(number), config=config)


def test_a_dataset_of_nothing(tmp_path):
    config = TrainConfig(epochs=1, output_dir=str(tmp_path / "run"))
    nothing = torch.utils.data.TensorDataset(torch.zeros(0, 16, 16, 3), torch.zeros(0))
    for pair in ((nothing, None), (tiny.dataset(), nothing)):
        with pytest.raises(ValueError, match="Received an empty TensorDataset; expected images"):
            finetune(tiny.network(), pair[0], pair[1], config)
    with pytest.raises(ValueError, match="Received an empty TensorDataset; expected images"):
        loader = torch.utils.data.DataLoader(nothing, batch_size=4)
        finetune(tiny.network(), loader, config=config)


@pytest.mark.slow
def test_a_legacy_model_that_is_damaged(place, capsys):
    keras.saving.save_model(tiny.network(), "m.h5")
    content = Path("m.h5").read_bytes()
    Path("m.h5").write_bytes(content[: len(content) // 2])
    refused(["inspect", "m.h5"], capsys, "m.h5")
