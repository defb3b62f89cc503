import vggtorch  # noqa: F401 - before any test imports Keras: it selects the torch backend

import pytest  # isort: skip
import torch  # isort: skip


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="module")
def one_thread():
    """For tests on small tensors: on a busy machine threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
