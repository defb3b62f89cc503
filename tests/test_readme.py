"""Every code block of the README runs, in order, as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert blocks("python")
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), names)


@pytest.mark.parametrize("command", "".join(blocks("bash")).splitlines())
def test_commands_run(command, tmp_path):
    program, *arguments = shlex.split(command, comments=True)
    assert program == "vggtorch"
    result = subprocess.run(
        [sys.executable, "-m", "vggtorch", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_map_of_files_is_complete_and_in_order():
    from test_layout import MODULES, ORDER

    listed = re.findall(r"`vggtorch/(\w+)\.py`", README.read_text())
    assert listed == [module for module in ORDER if module in MODULES]
