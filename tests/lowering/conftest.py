import pytest

from vggtorch.lowering import running

# These files have little to do with how a batch runs.
WITHOUT_GROUPS = (
    "test_applications", "test_export", "test_kernels", "test_network", "test_torch_",
)  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test a second time with one image in each group, which small images never need."""
    once = metafunc.definition.get_closest_marker("once") is not None
    if not (once or metafunc.module.__name__.split(".")[-1].startswith(WITHOUT_GROUPS)):
        ids = ["batch", "groups_of_one"]
        metafunc.parametrize("group_bytes", [None, 1], ids=ids, indirect=True)


@pytest.fixture(autouse=True)
def group_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many bytes a group of images may have; None for what it has outside of tests."""
    number = getattr(request, "param", None)
    if number is not None:
        monkeypatch.setattr(running, "GROUP_BYTES", number)
