"""Every code block of the README runs, in order, as it stands there."""

import re
from pathlib import Path

import pytest
from blocks import run_blocks
from test_layout import ORDER

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.usefixtures("onnx_operators")
def test_every_block_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(README) == {"python", "bash"}


def test_the_map_of_rooms_is_complete_and_in_order():
    rows = re.findall(r"^\| (`[^|]*`) \|", README.read_text().split("## The code")[1], re.MULTILINE)
    listed = re.findall(r"`(\w+)(?:/|\.py)`", " ".join(rows))
    assert listed == list(ORDER)
