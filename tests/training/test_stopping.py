"""Ctrl-C and SIGTERM end a run with a checkpoint, from which it ends as if nothing had happened."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from vggtorch.training import checkpoints, loop, run
from vggtorch.training.loop import finetune
from vggtorch.training.stopping import Interrupted, Terminated


class Signalling(tiny.TensorDataset):
    """The images of tiny.dataset, which send this process a signal when the nth is read."""

    content_name = "tiny"  # so that nothing is read before the run

    def __init__(self, nth: int | None, number: int = signal.SIGINT) -> None:
        super().__init__(*tiny.dataset().tensors)
        self.left, self.number = nth, number

    def __getitem__(self, index: int) -> Any:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)
        return super().__getitem__(index)


def same(found, expected) -> bool:
    weights = zip(tiny.weights(found.model), tiny.weights(expected.model), strict=True)
    figures = [[{**e, "seconds": 0} for e in history.epochs] for history in (found, expected)]
    return all(np.array_equal(a, b) for a, b in weights) and figures[0] == figures[1]


@pytest.fixture(autouse=True)
def _heeds_ctrl_c():
    """As a process in the foreground does; one that a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def settings(config):
    return dataclasses.replace(
        config, epochs=2, batch_size=7, ema_decay=0.9, resume=True, cache=False
    )


@pytest.fixture
def expected(settings, tmp_path):
    other = dataclasses.replace(settings, output_dir=str(tmp_path / "alone"))
    return finetune(tiny.network(), Signalling(None), Signalling(None), other)


# 20 images train, in batches of 7, and 20 validate, in two epochs.
@pytest.mark.slow
@pytest.mark.parametrize("nth", [1, 8, 15, 20, 27, 40, 41])
def test_a_run_stopped_while_images_are_read_ends_as_it_would_have(settings, expected, nth, capsys):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    train = Signalling(nth if nth <= 20 else 21 if nth == 41 else None)
    validation = Signalling(nth - 20 if 20 < nth <= 40 else None)
    with pytest.raises(Interrupted):
        finetune(tiny.network(), train, validation, settings)
    shown = capsys.readouterr().err
    assert "last.pt holds the run, and the same call with `resume` carries it on." in shown
    assert checkpoints.read(Path(settings.output_dir) / "last.pt")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert sorted(p.name for p in Path(settings.output_dir).iterdir() if p.name != ".lock") in (
        ["last.pt"], ["best.pt", "last.pt"],
    )  # fmt: skip
    assert same(finetune(tiny.network(), Signalling(None), Signalling(None), settings), expected)


def signalling(function: Callable, number: int, calls: int = 1) -> Callable:
    """A function that sends this process a signal in its nth call, before it does its work."""
    count = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    return wrapped


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["train_step_", "evaluate", "_best", "regularization"])
def test_a_step_and_an_epoch_end_before_a_run_is_stopped(
    settings, expected, monkeypatch, number, what
):
    monkeypatch.setattr(loop, what, signalling(getattr(loop, what), number))
    stop = Interrupted if number == signal.SIGINT else Terminated
    with pytest.raises(stop) as caught:
        finetune(tiny.network(), Signalling(None), Signalling(None), settings)
    if isinstance(caught.value, Terminated):
        assert caught.value.code == 143
    monkeypatch.undo()
    progress = checkpoints.read(Path(settings.output_dir) / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == {
        "train_step_": (0, 1), "evaluate": (0, 3), "_best": (1, 0), "regularization": (0, 3),
    }[what]  # fmt: skip
    assert same(finetune(tiny.network(), Signalling(None), Signalling(None), settings), expected)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_at_once(settings, expected, monkeypatch):
    monkeypatch.setattr(loop, "train_step_", signalling(loop.train_step_, signal.SIGINT, 2))
    settings = dataclasses.replace(settings, checkpoint_steps=1)
    monkeypatch.setattr(checkpoints, "write", signalling(checkpoints.write, signal.SIGINT, 2))
    with pytest.raises(KeyboardInterrupt) as caught:
        finetune(tiny.network(), Signalling(None), Signalling(None), settings)
    assert caught.type is KeyboardInterrupt
    monkeypatch.undo()
    progress = checkpoints.read(Path(settings.output_dir) / "last.pt")["progress"]
    assert (progress["epoch"], progress["step"]) == (0, 1)
    assert same(finetune(tiny.network(), Signalling(None), Signalling(None), settings), expected)


@pytest.mark.slow
def test_a_run_in_another_thread_gets_no_signals(settings, expected):
    found: list[Any] = []
    run_ = threading.Thread(
        target=lambda: found.append(
            finetune(tiny.network(), Signalling(None), Signalling(None), settings)
        )
    )
    run_.start()
    run_.join()
    assert same(found[0], expected)


@pytest.mark.slow
def test_an_ignored_signal_stays_ignored(settings, expected):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        found = finetune(tiny.network(), Signalling(5), Signalling(None), settings)
    finally:
        signal.signal(signal.SIGINT, before)
    assert same(found, expected)


def test_a_second_run_in_the_folder_is_refused_at_its_start(settings, monkeypatch):
    monkeypatch.setattr(run, "LONGER", 0.0)
    with run.locked(Path(settings.output_dir)):
        with pytest.raises(ValueError, match=r"Another run is at work in .*output_dir='run2'"):
            finetune(tiny.network(), "nowhere", config=settings)
        assert os.listdir(settings.output_dir) == [".lock"]
    with pytest.raises(ValueError, match="nowhere"):
        finetune(tiny.network(), "nowhere", config=settings)


@pytest.mark.slow
def test_the_command_says_how_to_carry_on(tmp_path, monkeypatch, capsys):
    import vggtorch as vt
    from vggtorch.cli import main

    monkeypatch.chdir(tmp_path)
    tiny.pictures(tmp_path / "some images", each=2)
    vt.save_weights(vt.VGG11(weights=None, include_top=False), "a.safetensors")
    command = "finetune 'some images' --architecture vgg11 --weights a.safetensors --epochs 3"
    command += " --image-size 32 --head linear --cut block2_pool --freeze block2_pool"
    step, carry_on = loop.train_step_, f"{command} --resume"
    for number, status, words in (
        (signal.SIGINT, 130, command),
        (signal.SIGTERM, 143, carry_on),
    ):
        monkeypatch.setattr(loop, "train_step_", signalling(step, number))
        assert main(shlex.split(words)) == status
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert lines[-1] == f"vggtorch: carry the run on with vggtorch {carry_on}"
    monkeypatch.setattr(loop, "train_step_", step)
    assert main(shlex.split(carry_on)) == 0
    assert (tmp_path / "run" / "model.keras").exists()
