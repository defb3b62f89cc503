"""Threads, forked and spawned workers after a model was accelerated; memory over many calls."""

from __future__ import annotations

import multiprocessing
import os
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
import tiny

import vggtorch as vt

TIMES = float(os.environ.get("VGGTORCH_ATTACK", "1"))
pytestmark = pytest.mark.slow


def network() -> keras.Model:
    return vt.accelerate_(tiny.network(batch_norm=True))


def images() -> np.ndarray:
    return np.random.default_rng(0).random((8, 16, 16, 3), dtype=np.float32) * 255


def test_threads_that_predict_at_the_same_time():
    model, x = network(), images()
    expected = model.predict(x, verbose=0)
    found: list[np.ndarray] = []

    def predict() -> None:
        for _ in range(5):
            found.append(np.asarray(model(x, training=False).detach()))

    threads = [threading.Thread(target=predict) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for array in found:
        np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5)


def _predicts(queue) -> None:
    queue.put(np.asarray(network()(images(), training=False).detach()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_started_after_a_model_was_accelerated(method, one_thread):
    expected = np.asarray(network()(images(), training=False).detach())
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_predicts, args=(queue,))
    worker.start()
    found = queue.get(timeout=120)
    worker.join()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("what", ["predict", "surgery", "load"])
def test_memory_stays_flat(what, tmp_path):
    model, x = network(), images()
    plain = tiny.network()
    plain.save(tmp_path / "m.keras")

    def once() -> None:
        if what == "predict":
            model.predict(x, verbose=0)
        elif what == "surgery":
            cut = vt.truncate(plain, "block2_pool")
            vt.stack(cut, [keras.layers.Flatten(), keras.layers.Dense(2)])
        else:
            keras.saving.load_model(tmp_path / "m.keras")

    for _ in range(20):
        once()
    before = resident()
    count = round({"predict": 100, "surgery": 25, "load": 10}[what] * TIMES)
    for _ in range(count):
        once()
    grown = resident() - before
    print(f"{count} times {what}: {grown / 2**20:.1f} MiB more")
    assert grown < 2**25
