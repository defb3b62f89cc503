"""Attacks, a sample of each in the suite; VGGTORCH_ATTACK=100 makes each 100 times longer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
sys.path += [str(TESTS / "weights"), str(TESTS / "training")]  # for checkpoint_files, killed


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No attack touches the caches of whoever runs it, or the network."""
    monkeypatch.setenv("VGGTORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("VGGTORCH_OFFLINE", "1")
