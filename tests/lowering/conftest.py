import pytest

from vggtorch.lowering import graphs


@pytest.fixture(autouse=True, params=[None, 1], ids=["batch", "groups_of_one"])
def group_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test a second time with one image in each group, which small images never need."""
    if request.param is not None:
        monkeypatch.setattr(graphs, "GROUP_BYTES", request.param)
