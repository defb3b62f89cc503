"""Every code block of the README runs, in order, as it stands there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_layout import ORDER

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_every_block_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```(python|bash)\n(.*?)```", README.read_text(), re.DOTALL)
    assert {language for language, _ in blocks} == {"python", "bash"}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, str(README), "exec"), names)
        else:
            for command in block.splitlines():
                run(command)


def run(command):
    program, *arguments = shlex.split(command, comments=True)
    assert program == "vggtorch"
    result = subprocess.run(
        [sys.executable, "-m", "vggtorch", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_the_map_of_rooms_is_complete_and_in_order():
    rows = re.findall(r"^\| (`[^|]*`) \|", README.read_text().split("## The code")[1], re.MULTILINE)
    listed = re.findall(r"`(\w+)(?:/|\.py)`", " ".join(rows))
    assert listed == list(ORDER)
