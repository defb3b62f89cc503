import pytest

from vggtorch.lowering import running


@pytest.fixture(autouse=True, params=[None, 1], ids=["batch", "groups_of_one"])
def group_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test a second time with one image in each group, which small images never need."""
    if request.param is not None:
        monkeypatch.setattr(running, "GROUP_BYTES", request.param)
