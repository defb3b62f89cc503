"""For all tests. What is heavy is imported late: with several workers one process runs no test."""

import vggtorch  # noqa: F401 - before any test imports Keras: it selects the torch backend

import functools  # isort: skip
import gc  # isort: skip

import psutil  # isort: skip
import pytest  # isort: skip

SLOW_EXAMPLES = {"bench", "compress", "distill_"}  # examples in docstrings that take seconds


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Python does not look for cycles in what is imported, now or later: a third of the imports.

    In the tests it looks less often than by default, since networks are built all the time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(10_000)
        gc.enable()


def pytest_sessionfinish():
    """pytest looks five times for cycles that are left; after the first there are none."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items):
    import torch

    for item in items:
        if isinstance(item, pytest.DoctestItem) and item.name.split(".")[-1] in SLOW_EXAMPLES:
            item.add_marker("slow")
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def _memory():
    """Bytes that the process had when it was last freed of cycles."""
    return [psutil.Process().memory_info().rss]


@pytest.fixture(autouse=True)
def _room_for_the_next(_memory):
    """Whole networks stand in cycles, which Python looks for seldom: free what has piled up."""
    yield
    if psutil.Process().memory_info().rss > _memory[0] + 2e9:
        gc.collect()
        _memory[0] = psutil.Process().memory_info().rss


def _narrow_(patch):
    from vggtorch import architectures
    from vggtorch.models import converting
    from vggtorch.weights import conversion, state_dicts

    for module in (architectures, conversion, state_dicts, converting):
        patch.setattr(module, "WIDTHS", (8, 16, 32, 64, 64))
    for module in (architectures, conversion):
        patch.setattr(module, "HIDDEN", 64)


@pytest.fixture
def narrow(monkeypatch):
    """The VGGs with an eighth of the channels, for what doesn't depend on how many there are."""
    _narrow_(monkeypatch)


@pytest.fixture(scope="module")
def narrow_throughout():
    """The same for a whole file and its fixtures."""
    with pytest.MonkeyPatch.context() as patch:
        _narrow_(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _command_line():
    """typer makes all commands of their functions for every call; here, once."""
    import typer.main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def _weights_taken_off():
    """Keras looks for cycles whenever a weight is taken off a layer, here for a second: no more."""
    from keras.layers import Layer

    take_off = Layer.__delattr__

    def without_a_search(self, name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gc, "collect", lambda *_: 0)
            take_off(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layer, "__delattr__", without_a_search)
        yield


@pytest.fixture(scope="session")
def onnx_operators():
    """torch.onnx reads the source of each of its operators for every file; from here on, once."""
    from torch.onnx._internal.exporter import _registration

    with pytest.MonkeyPatch.context() as patch:
        read = functools.cache(_registration.ONNXRegistry.from_torchlib)
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(read))
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For tests on small tensors: on a busy machine threads would only wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def winograd_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small convolutions, which don't pay, take Winograd's way too."""
    from vggtorch.lowering import winograd

    for name in ("MIN_TILES", "MIN_CHANNELS", "GRADIENT_MIN_CHANNELS"):
        monkeypatch.setattr(winograd, name, dict.fromkeys(winograd.TRANSFORMS, 0))
